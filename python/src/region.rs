//! Host memory that fetched planes land in.

use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// Memory that this process and the data plane both map. Fetches write to it. Dropping the last reference
/// unregisters it.
#[pyclass(frozen, module = "shadowserve")]
pub(crate) struct Region(pub(crate) client::Region);

#[pymethods]
impl Region {
    /// Its size, bytes: at least what was asked for.
    #[getter]
    fn nbytes(&self) -> usize {
        self.0.bytes()
    }

    /// Address of its first byte in this process, to be read in place: keep the region as long as anything
    /// points there, and read nothing that a fetch under way may write.
    #[getter]
    fn data_ptr(&self) -> usize {
        self.0.arena().addr()
    }

    /// A copy of `nbytes` bytes from `offset` on.
    fn read<'py>(&self, py: Python<'py>, offset: usize, nbytes: usize) -> PyResult<Bound<'py, PyBytes>> {
        if offset.checked_add(nbytes).is_none_or(|end| end > self.0.bytes()) {
            let size = self.0.bytes();
            return Err(PyIndexError::new_err(format!(
                "bytes {offset}..+{nbytes} lie outside of a region of {size} bytes"
            )));
        }
        PyBytes::new_with(py, nbytes, |out| {
            self.0.copy_out(offset, out).map_err(|error| PyIndexError::new_err(error.to_string()))
        })
    }

    fn __len__(&self) -> usize {
        self.0.bytes()
    }

    fn __repr__(&self) -> String {
        format!("Region({} bytes)", self.0.bytes())
    }
}
