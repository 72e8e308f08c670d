//! A checked layout, and the copies that put a plane in its place.

use crate::layout::{Layout, LayoutError};
use crate::shape::ChunkShape;

/// A chunk's place in a region, checked by [`Layout::check`]: its arithmetic cannot overflow, and what it describes lies
/// within the region's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    layout: Layout,
    shape: ChunkShape,
    base: u64,
}

/// One run of bytes to copy, from the decoded plane to the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Offset in the region.
    pub to: u64,
    /// Offset in the decoded plane.
    pub from: u64,
    /// Length.
    pub bytes: u64,
}

/// The runs of one plane, in the order of the decoded plane; neighbours on both sides are one run. Every run has the
/// same length.
#[derive(Clone, Copy, Debug)]
pub struct Pieces {
    first: u64,
    bytes: u64,
    rows: u64,
    row_stride: u64,
    columns: u64,
    column_stride: u64,
    row: u64,
    column: u64,
}

impl Placement {
    /// Places a chunk of `shape` at `base` of a region of `region_bytes`.
    ///
    /// # Errors
    ///
    /// Those of [`Layout::check`].
    pub fn new(layout: Layout, shape: ChunkShape, base: u64, region_bytes: u64) -> Result<Self, LayoutError> {
        layout.check(&shape, base, region_bytes)?;
        Ok(Self { layout, shape, base })
    }

    /// The chunk's extents.
    #[must_use]
    pub fn shape(&self) -> &ChunkShape {
        &self.shape
    }

    /// The strides.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Offset of the chunk in the region.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.base
    }

    /// The copies that put plane `plane` (its index: `layer * 2`, plus 1 for V) in its place; `None` if the chunk has
    /// no such plane.
    #[must_use]
    pub fn pieces(&self, plane: u32) -> Option<Pieces> {
        if plane >= self.shape.planes() {
            return None;
        }
        let (layer, side) = (u64::from(plane / 2), u64::from(plane % 2));
        let first = self.base + layer * self.layout.layer + side * self.layout.side;
        let (tokens, heads) = (u64::from(self.shape.tokens), u64::from(self.shape.kv_heads));
        let (head_bytes, token_bytes) = (self.shape.head_bytes(), self.shape.token_bytes());
        let whole_tokens = heads == 1 || self.layout.head == head_bytes;
        let whole_plane = whole_tokens && (tokens == 1 || self.layout.token == token_bytes);
        let (bytes, rows, columns) = match (whole_plane, whole_tokens) {
            (true, _) => (self.shape.plane_bytes(), 1, 1),
            (_, true) => (token_bytes, tokens, 1),
            _ => (head_bytes, tokens, heads),
        };
        let (row_stride, column_stride) = (self.layout.token, self.layout.head);
        Some(Pieces { first, bytes, rows, row_stride, columns, column_stride, row: 0, column: 0 })
    }

    /// Where plane `plane` lies, if there is such a plane and it is one run of bytes.
    #[must_use]
    pub fn contiguous(&self, plane: u32) -> Option<Piece> {
        self.pieces(plane).filter(|pieces| pieces.len() == 1)?.next()
    }
}

impl Iterator for Pieces {
    type Item = Piece;

    #[inline]
    fn next(&mut self) -> Option<Piece> {
        if self.row == self.rows {
            return None;
        }
        let to = self.first + self.row * self.row_stride + self.column * self.column_stride;
        let from = (self.row * self.columns + self.column) * self.bytes;
        self.column += 1;
        if self.column == self.columns {
            (self.row, self.column) = (self.row + 1, 0);
        }
        Some(Piece { to, from, bytes: self.bytes })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = (self.rows - self.row) * self.columns - self.column;
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        (left, Some(left))
    }
}

impl ExactSizeIterator for Pieces {}
