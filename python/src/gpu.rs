//! GPU memory of this process that fetches write to. It arrives here described in numbers: `shadowserve/_gpu.py` reads
//! them off torch tensors.

use client::{
    DeviceUuid, ElementType, GpuAllocation, IpcHandle, LayerBase, PageStrides, PagedKv, PlaneBase,
    RingConfig, Scale,
};
use pyo3::prelude::*;

use crate::errors;

/// A paged KV cache that the data plane can write to. Dropping the last reference unregisters it: free the GPU memory only
/// after that, and after every fetch into it has ended.
#[pyclass(frozen, module = "shadowserve")]
pub(crate) struct PagedCache(pub(crate) client::PagedCache);

#[pymethods]
impl PagedCache {
    /// Pages of each layer.
    #[getter]
    fn pages(&self) -> u32 {
        self.0.kv().pages
    }

    /// Tokens of a page.
    #[getter]
    fn page_tokens(&self) -> u16 {
        self.0.kv().page_tokens
    }

    fn __repr__(&self) -> String {
        let kv = self.0.kv();
        format!("PagedCache({} layers, {} pages of {} tokens)", kv.layers.len(), kv.pages, kv.page_tokens)
    }
}

/// Where the K or V of a layer begins: index of the allocation, offset in bytes, scale (1 unless FP8).
type Place = (u16, u64, f32);

/// A paged KV cache, as Python describes it. Strides are bytes per page, token and head.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct PagedDescription {
    device: [u8; 16],
    /// Handle and size of each.
    allocations: Vec<(Vec<u8>, u64)>,
    element: String,
    page_tokens: u16,
    pages: u32,
    kv_heads: u16,
    head_dim: u16,
    k_strides: (u64, u64, u64),
    v_strides: (u64, u64, u64),
    /// K and V of each layer.
    layers: Vec<(Place, Place)>,
}

impl PagedDescription {
    pub(crate) fn kv(&self) -> PyResult<PagedKv> {
        let strides = |(page, token, head)| PageStrides { page, token, head };
        let place = |(allocation, offset, scale)| PlaneBase { allocation, offset, scale: Scale::new(scale) };
        Ok(PagedKv {
            device: DeviceUuid(self.device),
            allocations: self.allocations.iter().map(allocation).collect::<PyResult<_>>()?,
            element: element(&self.element)?,
            page_tokens: self.page_tokens,
            pages: self.pages,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            k: strides(self.k_strides),
            v: strides(self.v_strides),
            layers: self.layers.iter().map(|&(k, v)| LayerBase { k: place(k), v: place(v) }).collect(),
        })
    }
}

/// A ring, as Python describes it.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct RingDescription {
    device: [u8; 16],
    allocation: (Vec<u8>, u64),
    offset: u64,
    entry_bytes: u64,
    entries: u32,
    element: String,
}

impl RingDescription {
    pub(crate) fn config(&self) -> PyResult<RingConfig> {
        Ok(RingConfig {
            device: DeviceUuid(self.device),
            allocation: allocation(&self.allocation)?,
            offset: self.offset,
            entry_bytes: self.entry_bytes,
            entries: self.entries,
            element: element(&self.element)?,
        })
    }
}

fn allocation((handle, bytes): &(Vec<u8>, u64)) -> PyResult<GpuAllocation> {
    let handle = <[u8; 64]>::try_from(handle.as_slice())
        .map_err(|_| errors::value(format!("an IPC handle has 64 bytes, not {}", handle.len())))?;
    Ok(GpuAllocation { handle: IpcHandle::new(handle), bytes: *bytes })
}

fn element(name: &str) -> PyResult<ElementType> {
    [ElementType::Bf16, ElementType::F16, ElementType::Fp8E4m3]
        .into_iter()
        .find(|element| element.to_string() == name)
        .ok_or_else(|| errors::value(format!("unknown element type {name:?}: use bf16, f16 or fp8_e4m3")))
}

/// A ring in GPU memory that the data plane fills and this process empties, in one order for all fetches into it. Free
/// the GPU memory only after every fetch into it has ended.
#[pyclass(frozen, module = "shadowserve")]
pub(crate) struct Ring(pub(crate) client::GpuRing);

#[pymethods]
impl Ring {
    /// The oldest filled entry that was not released, or `None`. Never waits.
    fn peek(&self) -> PyResult<Option<RingEntry>> {
        Ok(self.0.peek().map_err(|error| errors::Error::new_err(error.to_string()))?.map(RingEntry))
    }

    /// Gives back the entry that `peek` returned: once the GPU has read it.
    fn release(&self) {
        self.0.release();
    }
}

/// A filled entry of a ring.
#[pyclass(frozen, module = "shadowserve")]
pub(crate) struct RingEntry(client::RingEntry);

#[pymethods]
impl RingEntry {
    /// Where its bytes begin, counted from the start of the GPU allocation.
    #[getter]
    fn offset(&self) -> u64 {
        self.0.offset
    }

    /// Bytes of the plane.
    #[getter]
    fn nbytes(&self) -> u32 {
        self.0.holds.bytes
    }

    /// The fetch that it belongs to: `Fetch.id`.
    #[getter]
    fn fetch(&self) -> u64 {
        self.0.holds.fetch
    }

    /// Index into the prefix's chunks.
    #[getter]
    fn chunk(&self) -> u32 {
        self.0.holds.chunk
    }

    /// The layer.
    #[getter]
    fn layer(&self) -> u32 {
        self.0.holds.plane / 2
    }

    /// `"k"` or `"v"`.
    #[getter]
    fn side(&self) -> &'static str {
        if self.0.holds.plane.is_multiple_of(2) { "k" } else { "v" }
    }

    /// Whether the plane is there; if not, the entry is only to be released.
    #[getter]
    fn delivered(&self) -> bool {
        self.0.holds.delivered
    }
}
