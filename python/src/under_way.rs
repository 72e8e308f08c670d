//! What goes on in the data plane while Python does something else.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;

use crate::seconds::Seconds;

/// A fetch or a save, and the Python object whose memory it works on, which lives at least as long.
pub(crate) struct UnderWay<T> {
    what: Mutex<T>,
    _memory: Py<PyAny>,
}

impl<T: Send> UnderWay<T> {
    pub(crate) fn new(what: T, memory: Py<PyAny>) -> Self {
        Self { what: Mutex::new(what), _memory: memory }
    }

    /// Acts on it, with other Python threads running meanwhile.
    pub(crate) fn with<R: Send>(&self, py: Python<'_>, act: impl FnOnce(&mut T) -> R + Send) -> R {
        py.detach(|| act(&mut self.what.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// How long to wait for an end. Without a timeout as long as a data plane can be expected to take: one that misses a deadline by so
/// much has stopped, and its heartbeat says so before.
pub(crate) fn patience(timeout: Option<Seconds>) -> Duration {
    timeout.map_or(Duration::from_secs(3600), |timeout| timeout.0)
}
