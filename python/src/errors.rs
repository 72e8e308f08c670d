//! The exceptions, each with the message of the client library, which says what to do.

use std::fmt::Display;

use client::{FetchError, LookupError, Outcome, RegisterError, SaveError};
use pyo3::PyErr;
use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyTimeoutError, PyValueError};

create_exception!(shadowserve, Error, PyException, "Anything that went wrong with the data plane.");
create_exception!(
    shadowserve,
    DataPlaneLost,
    Error,
    "There is no data plane, or it has ended: compute, connect anew later."
);
create_exception!(shadowserve, Refused, Error, "The data plane does not carry this out, and says why.");
create_exception!(shadowserve, RegionError, Error, "Memory could not be registered.");

fn lost(error: impl Display) -> PyErr {
    DataPlaneLost::new_err(error.to_string())
}

fn refused(error: impl Display) -> PyErr {
    Refused::new_err(error.to_string())
}

pub(crate) fn connect(error: impl Display) -> PyErr {
    lost(error)
}

/// A value from Python that cannot be.
pub(crate) fn value(error: impl Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}

pub(crate) fn lookup(error: &LookupError) -> PyErr {
    match error {
        LookupError::Lost(_) => lost(error),
        LookupError::TimedOut { .. } => PyTimeoutError::new_err(error.to_string()),
        _ => Error::new_err(error.to_string()),
    }
}

pub(crate) fn register(error: &RegisterError) -> PyErr {
    match error {
        RegisterError::Lost(_) => lost(error),
        RegisterError::Refused { .. } => refused(error),
        RegisterError::Gpu(_) | RegisterError::Ring(_) => value(error),
        _ => RegionError::new_err(error.to_string()),
    }
}

pub(crate) fn fetch(error: &FetchError) -> PyErr {
    match error {
        FetchError::Lost(_) => lost(error),
        FetchError::StillUnderWay { .. } => PyTimeoutError::new_err(error.to_string()),
        FetchError::Invalid(_) | FetchError::ForeignRegion => value(error),
        _ => refused(error),
    }
}

pub(crate) fn save(error: &SaveError) -> PyErr {
    match error {
        SaveError::Lost(_) => lost(error),
        SaveError::StillUnderWay { .. } => PyTimeoutError::new_err(error.to_string()),
        SaveError::Invalid(_) | SaveError::ForeignRegion => value(error),
        _ => refused(error),
    }
}

/// An outcome as Python sees it.
pub(crate) fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Done => "done",
        Outcome::Failed => "failed",
        Outcome::Cancelled => "cancelled",
    }
}
