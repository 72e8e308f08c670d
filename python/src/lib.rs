//! `shadowserve._core`: the client library for Python. No DPDK inside, and no CUDA needed to import it.
//!
//! Every call that may wait lets other Python threads run meanwhile. Errors are `shadowserve.Error` and its
//! subclasses: [`errors`] says which stands for what.

mod client;
mod errors;
mod fetch;
mod gpu;
mod prefix;
mod region;
mod save;
mod seconds;
mod under_way;

use pyo3::prelude::*;

#[pymodule(name = "_core")]
mod core {
    #[pymodule_export]
    use super::client::Client;
    #[pymodule_export]
    use super::errors::{DataPlaneLost, Error, Refused, RegionError};
    #[pymodule_export]
    use super::fetch::{Fetch, Report};
    #[pymodule_export]
    use super::gpu::{PagedCache, Ring, RingEntry};
    #[pymodule_export]
    use super::prefix::Prefix;
    #[pymodule_export]
    use super::region::Region;
    #[pymodule_export]
    use super::save::{Save, SaveReport};
}
