//! Reading the header and table of an encoded chunk.

use crate::format::{self, FixedHeader, FormatError, PlaneEntry};
use crate::{ENTRY_BYTES, FIXED_HEADER_BYTES, Shape};

/// A checked header and table, borrowed: parsing allocates nothing, and no accessor can fail or panic.
///
/// ```
/// # use compress::{ChunkView, Codec, Dtype, Encoder, Shape};
/// # let shape = Shape { layers: 1, kv_heads: 1, head_dim: 8, tokens: 16, dtype: Dtype::Bf16 };
/// # let (plane, mut chunk) = (vec![0; shape.plane_bytes()], Vec::new());
/// # Encoder::new(Codec::Int4, 3).encode_chunk(&[7; 32], &shape, |_, _| &plane, &mut chunk)?;
/// let view = ChunkView::parse(&chunk)?;
/// for (index, entry) in view.planes().enumerate() {
///     println!("plane {index}: {} bytes at {}", entry.bytes, entry.offset);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct ChunkView<'a> {
    fixed: FixedHeader,
    table: &'a [u8],
}

impl<'a> ChunkView<'a> {
    /// Bytes that header and table of a chunk take, from its first [`FIXED_HEADER_BYTES`] bytes: how much to fetch
    /// before [`parse`](Self::parse) can succeed.
    ///
    /// # Errors
    /// Too few bytes, a wrong magic or version, or sizes that contradict each other. The rest is not yet checked.
    pub fn announced_header_bytes(first: &[u8]) -> Result<usize, FormatError> {
        format::announced_header_bytes(first)
    }

    /// Checks the header and table at the front of `bytes`; what follows them is not looked at.
    ///
    /// # Errors
    /// Whatever is wrong first: too few bytes, magic, version, checksum, shape, or an entry that is unknown, out of
    /// order or out of bounds.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FormatError> {
        let (fixed, header) = format::read_header(bytes)?;
        let table = &header[FIXED_HEADER_BYTES..];
        let mut end = header.len() as u64;
        for (plane, entry) in table.chunks_exact(ENTRY_BYTES).enumerate() {
            let entry = format::read_entry(plane, entry, &fixed.shape)?;
            end = format::check_place(plane, &entry, end, fixed.chunk_bytes)?;
        }
        if end != fixed.chunk_bytes {
            return Err(FormatError::Size { field: "chunk_bytes", got: fixed.chunk_bytes, expected: end });
        }
        Ok(Self { fixed, table })
    }

    /// The chunk's key.
    #[must_use]
    pub fn key(&self) -> &[u8; 32] {
        &self.fixed.key
    }

    /// The chunk's shape.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.fixed.shape
    }

    /// Bytes of the whole encoded chunk: header, table and planes.
    #[must_use]
    pub fn chunk_bytes(&self) -> u64 {
        self.fixed.chunk_bytes
    }

    /// Bytes of header and table.
    #[must_use]
    pub fn header_bytes(&self) -> usize {
        FIXED_HEADER_BYTES + self.table.len()
    }

    /// The entry of one plane, or `None` beyond the last.
    #[must_use]
    pub fn plane(&self, index: usize) -> Option<PlaneEntry> {
        let start = index.checked_mul(ENTRY_BYTES)?;
        let entry = self.table.get(start..start.checked_add(ENTRY_BYTES)?)?;
        // `parse` has read every entry once, so this gives `Some`.
        format::read_entry(index, entry, &self.fixed.shape).ok()
    }

    /// The entries of all planes, in order.
    #[must_use]
    pub fn planes(&self) -> Planes<'a> {
        Planes { view: *self, next: 0 }
    }
}

/// Iterator over the entries of a [`ChunkView`], in the order of the planes.
#[derive(Debug, Clone)]
pub struct Planes<'a> {
    view: ChunkView<'a>,
    next: usize,
}

impl Iterator for Planes<'_> {
    type Item = PlaneEntry;

    fn next(&mut self) -> Option<PlaneEntry> {
        let entry = self.view.plane(self.next)?;
        self.next += 1;
        Some(entry)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.view.shape().planes() - self.next;
        (left, Some(left))
    }
}

impl ExactSizeIterator for Planes<'_> {}

/// Calls `f` with the index and the entry of every plane, in order, once the whole header has been checked.
///
/// # Errors
/// As [`ChunkView::parse`]; then `f` is not called at all.
pub fn plane_table(header: &[u8], mut f: impl FnMut(usize, PlaneEntry)) -> Result<Shape, FormatError> {
    let view = ChunkView::parse(header)?;
    view.planes().enumerate().for_each(|(index, entry)| f(index, entry));
    Ok(*view.shape())
}

/// The header and table of an encoded chunk, owned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkHeader {
    /// The chunk's key.
    pub key: [u8; 32],
    /// The chunk's shape.
    pub shape: Shape,
    /// Bytes of the whole encoded chunk.
    pub chunk_bytes: u64,
    /// One entry for each plane; index = layer * 2, plus 1 for V.
    pub planes: Vec<PlaneEntry>,
}

impl ChunkHeader {
    /// Bytes of header and table of a chunk of so many planes.
    #[must_use]
    pub const fn header_bytes(planes: usize) -> usize {
        format::header_bytes(planes)
    }

    /// Checks and copies the header and table at the front of `bytes`.
    ///
    /// # Errors
    /// As [`ChunkView::parse`].
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let view = ChunkView::parse(bytes)?;
        Ok(Self {
            key: *view.key(),
            shape: *view.shape(),
            chunk_bytes: view.chunk_bytes(),
            planes: view.planes().collect(),
        })
    }
}
