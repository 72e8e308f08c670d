//! A fetch under way, and how it ended.

use client::Outcome;
use pyo3::prelude::*;

use crate::errors;
use crate::seconds::Seconds;
use crate::under_way::{UnderWay, patience};

/// A fetch under way. Dropping it before its end cancels it.
#[pyclass(frozen, module = "shadowserve")]
pub(crate) struct Fetch(pub(crate) UnderWay<client::Fetch>);

#[pymethods]
impl Fetch {
    /// Its number in this session, which the entries of a ring name.
    #[getter]
    fn id(&self, py: Python<'_>) -> u64 {
        self.0.with(py, |fetch| fetch.id())
    }

    /// The report if it has ended, else `None`. Never waits.
    fn poll(&self, py: Python<'_>) -> PyResult<Option<Report>> {
        let ended = self.0.with(py, client::Fetch::poll).map_err(|error| errors::fetch(&error))?;
        Ok(ended.map(Report))
    }

    /// The report. Waits at most `timeout` seconds (`TimeoutError`, and the fetch goes on), or, without one, for the
    /// end that the data plane gives every fetch by its deadline.
    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<Seconds>) -> PyResult<Report> {
        let report =
            self.0.with(py, |fetch| fetch.wait(patience(timeout))).map_err(|error| errors::fetch(&error))?;
        Ok(Report(report))
    }

    /// Asks the data plane to end it. It still ends once, and may end done if that came first: wait for it.
    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        self.0.with(py, client::Fetch::cancel).map_err(|error| errors::fetch(&error))
    }
}

/// How a fetch ended.
#[pyclass(frozen, module = "shadowserve")]
pub(crate) struct Report(client::FetchReport);

#[pymethods]
impl Report {
    /// `"done"`, `"failed"` or `"cancelled"`.
    #[getter]
    fn outcome(&self) -> &'static str {
        errors::outcome(self.0.outcome)
    }

    /// Planes delivered.
    #[getter]
    fn planes(&self) -> u32 {
        self.0.progress.planes
    }

    /// Encoded bytes that arrived.
    #[getter]
    fn encoded_bytes(&self) -> u64 {
        self.0.progress.encoded_bytes
    }

    /// Decoded bytes written.
    #[getter]
    fn delivered_bytes(&self) -> u64 {
        self.0.progress.delivered_bytes
    }

    /// Chunks that did not arrive whole: index into the prefix's chunks, and why. All others did.
    #[getter]
    fn missing(&self) -> Vec<(u32, String)> {
        self.0.missing.iter().map(|missing| (missing.chunk, missing.reason.to_string())).collect()
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
        let (planes, seconds) = (self.0.progress.planes, self.seconds());
        format!("Report({}, {planes} planes in {seconds:.6} s)", self.outcome())
    }
}
