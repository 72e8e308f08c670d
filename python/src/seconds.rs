//! Times as Python gives them: a number of seconds.

use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// A time of at least zero, from any number of Python's.
#[derive(Clone, Copy)]
pub(crate) struct Seconds(pub(crate) Duration);

impl Seconds {
    /// So many whole seconds.
    pub(crate) const fn new(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

impl<'py> FromPyObject<'_, 'py> for Seconds {
    type Error = PyErr;

    fn extract(number: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let seconds: f64 = number.extract()?;
        let duration = Duration::try_from_secs_f64(seconds).map_err(|error| {
            PyValueError::new_err(format!("{seconds} is not a time in seconds that can be waited: {error}"))
        })?;
        Ok(Self(duration))
    }
}
