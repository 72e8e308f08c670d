//! A save under way, and how it ended.

use std::time::Duration;

use client::Outcome;
use pyo3::prelude::*;

use crate::errors;
use crate::seconds::Seconds;
use crate::under_way::{UnderWay, patience};

/// A save under way. Dropping it before its end cancels it.
#[pyclass(frozen, module = "shadowserve")]
pub(crate) struct Save(pub(crate) UnderWay<client::Save>);

#[pymethods]
impl Save {
    /// The report if it has ended, else `None`. Never waits.
    fn poll(&self, py: Python<'_>) -> PyResult<Option<SaveReport>> {
        match self.0.with(py, |save| save.wait(Duration::ZERO)) {
            Ok(report) => Ok(Some(SaveReport(report))),
            Err(client::SaveError::StillUnderWay { .. }) => Ok(None),
            Err(error) => Err(errors::save(&error)),
        }
    }

    /// The report. Waits at most `timeout` seconds (`TimeoutError`, and the save goes on), or, without one, for the
    /// end that the data plane gives every save by its deadline.
    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<Seconds>) -> PyResult<SaveReport> {
        let report =
            self.0.with(py, |save| save.wait(patience(timeout))).map_err(|error| errors::save(&error))?;
        Ok(SaveReport(report))
    }

    /// Asks the data plane to end it. It still ends once: wait for it.
    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        self.0.with(py, client::Save::cancel).map_err(|error| errors::save(&error))
    }
}

/// How a save ended.
#[pyclass(frozen, module = "shadowserve")]
pub(crate) struct SaveReport(client::SaveReport);

#[pymethods]
impl SaveReport {
    /// `"done"` if every chunk is stored, `"failed"` or `"cancelled"`.
    #[getter]
    fn outcome(&self) -> &'static str {
        errors::outcome(self.0.outcome)
    }

    /// Chunks that were put; the store has checked them, and lookups find them.
    #[getter]
    fn stored(&self) -> u32 {
        self.0.stored
    }

    /// Chunks that the store had before.
    #[getter]
    fn already_stored(&self) -> u32 {
        self.0.already_stored
    }

    /// Encoded bytes of what was put.
    #[getter]
    fn encoded_bytes(&self) -> u64 {
        self.0.encoded_bytes
    }

    /// Chunks that are not known to be stored: index into the chunks that were to be saved, and why.
    #[getter]
    fn not_saved(&self) -> Vec<(u32, String)> {
        self.0.not_saved.iter().map(|missed| (missed.chunk, missed.reason.to_string())).collect()
    }

    /// Chunks that fewer stores have than are to keep them: index into the chunks that were to be saved, how many have it, how many
    /// should, and why another has not.
    #[getter]
    fn fewer_copies(&self) -> Vec<(u32, u8, u8, String)> {
        let fewer = self.0.fewer_copies.iter();
        fewer.map(|at| (at.chunk, at.copies, at.replicas, at.reason.to_string())).collect()
    }

    /// What happened, for a person; empty when done.
    #[getter]
    fn message(&self) -> &str {
        &self.0.message
    }

    /// Seconds from the request to the end as this process saw it.
    #[getter]
    fn seconds(&self) -> f64 {
        self.0.elapsed.as_secs_f64()
    }

    fn __bool__(&self) -> bool {
        self.0.outcome == Outcome::Done
    }

    fn __repr__(&self) -> String {
        let client::SaveReport { stored, already_stored, .. } = self.0;
        let (outcome, seconds) = (self.outcome(), self.seconds());
        format!("SaveReport({outcome}, {stored} chunks stored, {already_stored} before, in {seconds:.6} s)")
    }
}
