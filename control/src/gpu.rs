//! GPU memory that a serving process lends to the data plane: a paged KV cache, or a ring. Only described here: nothing
//! in this crate touches a GPU.
//!
//! A description arrives over the socket and is as hostile as everything else there. [`PagedKv::check`] and
//! [`RingKv::check`] judge all of it that can be judged without a GPU: counts, strides, and that every byte which any
//! page table can name lies within the allocations *as described*. Whether the allocations are what the description says
//! the data plane asks the driver once it has opened their handles.

use serde::{Deserialize, Serialize};

use crate::layout::{Dtype, LayoutError, Shape, nested_span};

/// Most allocations that one paged KV cache may lie in.
pub const MAX_GPU_ALLOCATIONS: usize = 512;
/// Most layers of one paged KV cache.
pub const MAX_GPU_LAYERS: usize = 512;
/// Tokens of the smallest page.
pub const MIN_PAGE_TOKENS: u16 = 16;
/// Tokens of the largest page.
pub const MAX_PAGE_TOKENS: u16 = 256;
/// Most entries of a ring.
pub const MAX_RING_ENTRIES: u32 = 65_536;

/// What `cuIpcGetMemHandle` gives for an allocation: 64 bytes that mean something to the driver only.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpcHandle([[u8; 32]; 2]);

impl IpcHandle {
    /// From the driver's 64 bytes.
    #[must_use]
    pub fn new(bytes: [u8; 64]) -> Self {
        let mut halves = [[0; 32]; 2];
        halves.as_flattened_mut().copy_from_slice(&bytes);
        Self(halves)
    }

    /// From both halves of the driver's 64 bytes.
    #[must_use]
    pub const fn from_halves(halves: [[u8; 32]; 2]) -> Self {
        Self(halves)
    }

    /// The driver's 64 bytes.
    #[must_use]
    pub fn bytes(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes.copy_from_slice(self.0.as_flattened());
        bytes
    }
}

impl std::fmt::Debug for IpcHandle {
    /// Whoever has a handle can map the memory: it is in no log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IpcHandle(..)")
    }
}

/// A GPU, named as `cuDeviceGetUuid` does: its number differs from process to process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DeviceUuid(pub [u8; 16]);

impl std::fmt::Display for DeviceUuid {
    /// As `nvidia-smi -L` writes it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GPU-")?;
        for (index, byte) in self.0.iter().enumerate() {
            let dash = if [4, 6, 8, 10].contains(&index) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for DeviceUuid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// One allocation of GPU memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuAllocation {
    /// Its handle.
    pub handle: IpcHandle,
    /// Its size from its first byte on, bytes. May be less than what was allocated, never more.
    pub bytes: u64,
}

/// The element type of GPU memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ElementType {
    /// bfloat16.
    Bf16,
    /// IEEE 754 half precision.
    F16,
    /// FP8 E4M3 without infinities: the element divided by the scale of its plane.
    Fp8E4m3,
}

impl ElementType {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::Fp8E4m3 => 1,
        }
    }

    /// The 16-bit type, if it is one.
    #[must_use]
    pub const fn dtype(self) -> Option<Dtype> {
        match self {
            Self::Bf16 => Some(Dtype::Bf16),
            Self::F16 => Some(Dtype::F16),
            Self::Fp8E4m3 => None,
        }
    }
}

impl From<Dtype> for ElementType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Bf16 => Self::Bf16,
            Dtype::F16 => Self::F16,
        }
    }
}

impl std::fmt::Display for ElementType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Fp8E4m3 => "fp8_e4m3",
        })
    }
}

/// Strides, in bytes, of the K or of the V of every layer. A head's vector always is one run of bytes.
///
/// Element `d` of head `h` of token `t` of page `p` lies at
/// `offset + p*page + t*token + h*head + d*element` of the allocation, `offset` being the plane's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageStrides {
    /// From a page to the next.
    pub page: u64,
    /// From a token to the next within a page.
    pub token: u64,
    /// From a head to the next.
    pub head: u64,
}

impl PageStrides {
    /// Pages `[page_tokens, kv_heads, head_dim]`, one right behind the other.
    #[must_use]
    pub const fn nhd(page_tokens: u16, kv_heads: u16, head_dim: u16, element: ElementType) -> Self {
        let head = head_dim as u64 * element.bytes();
        let token = kv_heads as u64 * head;
        Self { page: page_tokens as u64 * token, token, head }
    }

    /// Pages `[kv_heads, page_tokens, head_dim]`, one right behind the other.
    #[must_use]
    pub const fn hnd(page_tokens: u16, kv_heads: u16, head_dim: u16, element: ElementType) -> Self {
        let token = head_dim as u64 * element.bytes();
        let head = page_tokens as u64 * token;
        Self { page: kv_heads as u64 * head, token, head }
    }
}

/// What [`ElementType::Fp8E4m3`] elements are to be multiplied by: a positive `f32`, neither tiny nor infinite.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Scale(u32);

impl Scale {
    /// No scale.
    pub const ONE: Self = Self(1.0_f32.to_bits());

    /// Any number; [`PagedKv::check`] judges it.
    #[must_use]
    pub const fn new(scale: f32) -> Self {
        Self(scale.to_bits())
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> f32 {
        f32::from_bits(self.0)
    }
}

impl std::fmt::Debug for Scale {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.get())
    }
}

/// Where the K or the V of one layer begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlaneBase {
    /// Index into [`PagedKv::allocations`].
    pub allocation: u16,
    /// Offset of page 0, token 0, head 0; bytes.
    pub offset: u64,
    /// The scale of its elements: [`Scale::ONE`] unless they are FP8.
    pub scale: Scale,
}

impl PlaneBase {
    /// A place without a scale.
    #[must_use]
    pub const fn new(allocation: u16, offset: u64) -> Self {
        Self { allocation, offset, scale: Scale::ONE }
    }
}

/// K and V of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerBase {
    /// K.
    pub k: PlaneBase,
    /// V.
    pub v: PlaneBase,
}

/// A serving engine's paged KV cache on one GPU. Layers may lie in one allocation each, or all in one (cross-layer
/// layouts), K and V in one tensor or in two: all that is the same for every layer are the strides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagedKv {
    /// The GPU.
    pub device: DeviceUuid,
    /// 1 to [`MAX_GPU_ALLOCATIONS`].
    pub allocations: Vec<GpuAllocation>,
    /// Element type.
    pub element: ElementType,
    /// Tokens of a page, [`MIN_PAGE_TOKENS`] to [`MAX_PAGE_TOKENS`].
    pub page_tokens: u16,
    /// Pages of each layer. A page table names pages below this number.
    pub pages: u32,
    /// KV heads of this rank.
    pub kv_heads: u16,
    /// Elements of one head of one token.
    pub head_dim: u16,
    /// Strides of K.
    pub k: PageStrides,
    /// Strides of V.
    pub v: PageStrides,
    /// 1 to [`MAX_GPU_LAYERS`] layers.
    pub layers: Vec<LayerBase>,
}

/// A ring of equal entries in one allocation, each large enough for a decoded plane. Its descriptors and cursor are in
/// memory that comes with the registration: see [`crate::gpu_ring`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingKv {
    /// The GPU.
    pub device: DeviceUuid,
    /// The memory.
    pub allocation: GpuAllocation,
    /// Element type of the planes that go through it.
    pub element: ElementType,
    /// Where entry 0 begins, bytes.
    pub offset: u64,
    /// Bytes of an entry, a multiple of 256.
    pub entry_bytes: u64,
    /// 1 to [`MAX_RING_ENTRIES`].
    pub entries: u32,
    /// The generation that the ring's memory says; the data plane stops filling when it changes.
    pub generation: u64,
}

/// What a client lends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GpuMemory {
    /// A paged KV cache.
    Pages(PagedKv),
    /// A ring.
    Ring(RingKv),
}

impl GpuMemory {
    /// The GPU that it is on.
    #[must_use]
    pub fn device(&self) -> DeviceUuid {
        match self {
            Self::Pages(kv) => kv.device,
            Self::Ring(ring) => ring.device,
        }
    }

    /// Judges the description: see the module's documentation.
    ///
    /// # Errors
    /// The first thing wrong with it.
    pub fn check(&self) -> Result<(), GpuMemoryError> {
        match self {
            Self::Pages(kv) => kv.check(),
            Self::Ring(ring) => ring.check(),
        }
    }
}

/// Why GPU memory as described cannot be used. The text goes to the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GpuMemoryError {
    /// A count is out of range.
    #[error("{count} {what} are out of range: give {least} to {most}")]
    Count {
        /// Of what.
        what: &'static str,
        /// As given.
        count: u64,
        /// Smallest count.
        least: u64,
        /// Largest count.
        most: u64,
    },
    /// The strides make elements overlap, or overflow.
    #[error("the strides of {side} do not fit the pages: {source}")]
    Strides {
        /// `K` or `V`.
        side: &'static str,
        /// What is wrong.
        source: LayoutError,
    },
    /// An offset splits elements.
    #[error(
        "{side} of layer {layer} begins at byte {offset}, in the midst of an element: make it a multiple of {element_bytes}"
    )]
    Misaligned {
        /// The layer.
        layer: usize,
        /// `K` or `V`.
        side: &'static str,
        /// As given.
        offset: u64,
        /// Bytes of an element.
        element_bytes: u64,
    },
    /// A scale that no element can be divided by, or one where there can be none.
    #[error(
        "{side} of layer {layer} has the scale {scale:?}: give a positive number, and 1 unless the elements are FP8"
    )]
    Scale {
        /// The layer.
        layer: usize,
        /// `K` or `V`.
        side: &'static str,
        /// As given.
        scale: Scale,
    },
    /// A layer names an allocation that is not there.
    #[error("layer {layer} lies in allocation {allocation} of {allocations}: number them from 0")]
    NoSuchAllocation {
        /// The layer.
        layer: usize,
        /// As given.
        allocation: u16,
        /// How many there are.
        allocations: usize,
    },
    /// The pages reach beyond their allocation.
    #[error(
        "{side} of layer {layer} would end at byte {end} of an allocation of {bytes} bytes: name fewer pages, or check \
         the offset and the strides (bytes, not elements)"
    )]
    OutsideAllocation {
        /// The layer.
        layer: usize,
        /// `K` or `V`.
        side: &'static str,
        /// One past the last byte that a page table can name.
        end: u64,
        /// Bytes of the allocation.
        bytes: u64,
    },
    /// The ring reaches beyond its allocation, or its entries are none.
    #[error(
        "a ring of {entries} entries of {entry_bytes} bytes from byte {offset} on does not fit an allocation of {bytes} \
         bytes, or its entries are no multiple of 256 bytes"
    )]
    Ring {
        /// As given.
        entries: u32,
        /// As given.
        entry_bytes: u64,
        /// As given.
        offset: u64,
        /// Bytes of the allocation.
        bytes: u64,
    },
}

fn within(what: &'static str, count: u64, least: u64, most: u64) -> Result<(), GpuMemoryError> {
    if (least..=most).contains(&count) {
        Ok(())
    } else {
        Err(GpuMemoryError::Count { what, count, least, most })
    }
}

impl PagedKv {
    /// Bytes of one head of one token.
    #[must_use]
    pub const fn head_bytes(&self) -> u64 {
        self.head_dim as u64 * self.element.bytes()
    }

    /// Whether chunks of `shape` go into this cache, whatever the element type they are stored with.
    #[must_use]
    pub fn takes(&self, shape: &Shape) -> bool {
        usize::from(shape.layers) == self.layers.len()
            && (shape.kv_heads, shape.head_dim) == (self.kv_heads, self.head_dim)
    }

    /// Judges the description: see the module's documentation. What it accepts holds every byte of every page of every
    /// layer within the allocations' `bytes`, and no arithmetic on it can overflow.
    ///
    /// # Errors
    /// The first thing wrong with it.
    pub fn check(&self) -> Result<(), GpuMemoryError> {
        within("allocations", self.allocations.len() as u64, 1, MAX_GPU_ALLOCATIONS as u64)?;
        within("layers", self.layers.len() as u64, 1, MAX_GPU_LAYERS as u64)?;
        within("tokens of a page", self.page_tokens.into(), MIN_PAGE_TOKENS.into(), MAX_PAGE_TOKENS.into())?;
        within("pages", self.pages.into(), 1, u32::MAX.into())?;
        within("KV heads", self.kv_heads.into(), 1, u16::MAX.into())?;
        within("elements of a head", self.head_dim.into(), 1, u16::MAX.into())?;
        let spans = [self.span_bytes("K", &self.k)?, self.span_bytes("V", &self.v)?];
        for (layer, bases) in self.layers.iter().enumerate() {
            for (side, base, span_bytes) in [("K", bases.k, spans[0]), ("V", bases.v, spans[1])] {
                self.check_base(layer, side, base, span_bytes)?;
            }
        }
        Ok(())
    }

    /// From the first to the last byte of all pages of one plane.
    fn span_bytes(&self, side: &'static str, strides: &PageStrides) -> Result<u64, GpuMemoryError> {
        let axes = [
            ("page", strides.page, u64::from(self.pages)),
            ("token", strides.token, u64::from(self.page_tokens)),
            ("head", strides.head, u64::from(self.kv_heads)),
        ];
        nested_span(self.head_bytes(), self.element.bytes(), axes)
            .map_err(|source| GpuMemoryError::Strides { side, source })
    }

    fn check_base(
        &self,
        layer: usize,
        side: &'static str,
        base: PlaneBase,
        span_bytes: u64,
    ) -> Result<(), GpuMemoryError> {
        let PlaneBase { allocation, offset, scale } = base;
        let scaled = self.element == ElementType::Fp8E4m3;
        if !(scale == Scale::ONE || (scaled && scale.get() > 0.0 && scale.get().is_normal())) {
            return Err(GpuMemoryError::Scale { layer, side, scale });
        }
        let allocations = self.allocations.len();
        let Some(&GpuAllocation { bytes, .. }) = self.allocations.get(usize::from(allocation)) else {
            return Err(GpuMemoryError::NoSuchAllocation { layer, allocation, allocations });
        };
        let element_bytes = self.element.bytes();
        if offset % element_bytes != 0 {
            return Err(GpuMemoryError::Misaligned { layer, side, offset, element_bytes });
        }
        match offset.checked_add(span_bytes) {
            Some(end) if end <= bytes => Ok(()),
            end => {
                let end = end.unwrap_or(u64::MAX);
                Err(GpuMemoryError::OutsideAllocation { layer, side, end, bytes })
            }
        }
    }
}

impl RingKv {
    /// Judges the description.
    ///
    /// # Errors
    /// The first thing wrong with it.
    pub fn check(&self) -> Result<(), GpuMemoryError> {
        within("entries of a ring", self.entries.into(), 1, MAX_RING_ENTRIES.into())?;
        let end = self.entry_bytes.checked_mul(self.entries.into());
        let end = end.and_then(|bytes| bytes.checked_add(self.offset));
        let fits = end.is_some_and(|end| end <= self.allocation.bytes);
        if fits
            && self.entry_bytes > 0
            && self.entry_bytes.is_multiple_of(256)
            && self.offset.is_multiple_of(2)
        {
            return Ok(());
        }
        let &Self { entries, entry_bytes, offset, allocation: GpuAllocation { bytes, .. }, .. } = self;
        Err(GpuMemoryError::Ring { entries, entry_bytes, offset, bytes })
    }
}
