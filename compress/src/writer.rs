//! A chunk that is written plane by plane, into memory of fixed size.

use crate::format::{self, FixedHeader, PlaneEntry, header_bytes};
use crate::{EncodeError, Encoder, MAX_PLANES, Shape, max_encoded_bytes, plane_of};

/// Why a plane was not added to a chunk. The chunk is of no use then: begin another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The plane can't be encoded.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The memory does not hold the chunk.
    #[error("the encoded chunk exceeds the {capacity_bytes} bytes that there are for it")]
    Full {
        /// The writer's memory.
        capacity_bytes: usize,
    },
}

/// Writes one chunk after the other into the same memory, a plane at a time; allocates nothing after
/// [`new`](ChunkWriter::new) (beyond what the encoder does on its first plane of a size).
///
/// ```
/// # use compress::{ChunkView, ChunkWriter, Codec, Dtype, Encoder, Shape};
/// # let shape = Shape { layers: 1, kv_heads: 1, head_dim: 8, tokens: 16, dtype: Dtype::Bf16 };
/// # let plane = vec![0; shape.plane_bytes()];
/// let mut encoder = Encoder::new(Codec::Int4, 3);
/// let mut writer = ChunkWriter::new(1 << 20);
/// writer.begin(&[7; 32], &shape)?;
/// while writer.next_plane().is_some() {
///     writer.add_plane(&mut encoder, &plane)?;
/// }
/// assert_eq!(ChunkView::parse(writer.bytes())?.key(), &[7; 32]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ChunkWriter {
    key: [u8; 32],
    shape: Option<Shape>,
    entries: Vec<PlaneEntry>,
    bytes: Vec<u8>,
    capacity_bytes: usize,
}

impl ChunkWriter {
    /// A writer of chunks of at most `capacity_bytes`, header included.
    #[must_use]
    pub fn new(capacity_bytes: usize) -> ChunkWriter {
        let (entries, bytes) = (Vec::with_capacity(MAX_PLANES), Vec::with_capacity(capacity_bytes));
        ChunkWriter { key: [0; 32], shape: None, entries, bytes, capacity_bytes }
    }

    /// Begins a chunk; what was there is gone.
    ///
    /// # Errors
    /// When the shape breaks the format's limits, or not even the header fits.
    pub fn begin(&mut self, key: &[u8; 32], shape: &Shape) -> Result<(), WriteError> {
        self.entries.clear();
        self.bytes.clear();
        self.shape = None;
        shape.check().map_err(EncodeError::Shape)?;
        let header_bytes = header_bytes(shape.planes());
        if header_bytes > self.capacity_bytes {
            return Err(WriteError::Full { capacity_bytes: self.capacity_bytes });
        }
        self.bytes.resize(header_bytes, 0);
        (self.key, self.shape) = (*key, Some(*shape));
        Ok(())
    }

    /// Index of the plane to be added next; `None` if there is no chunk, or it is whole.
    #[must_use]
    pub fn next_plane(&self) -> Option<usize> {
        let planes = self.shape?.planes();
        (self.entries.len() < planes).then_some(self.entries.len())
    }

    /// Encodes the next plane: `[tokens, kv_heads, head_dim]` row-major, little-endian elements of the shape's type. With the
    /// last one the header is written too.
    ///
    /// # Errors
    /// When the plane can't be encoded, or there might be no room for it: the largest that its codec can make of it must
    /// fit. There is no chunk then.
    ///
    /// # Panics
    /// When there is no next plane.
    pub fn add_plane(&mut self, encoder: &mut Encoder, plane: &[u8]) -> Result<(), WriteError> {
        let shape = self.shape.expect("a chunk was begun");
        let (layer, side) = plane_of(self.next_plane().expect("the chunk is not whole"));
        let needed = max_encoded_bytes(plane.len());
        if self.bytes.len() + needed > self.capacity_bytes {
            self.shape = None;
            return Err(WriteError::Full { capacity_bytes: self.capacity_bytes });
        }
        match encoder.write_plane(&shape, layer, side, plane, &mut self.bytes) {
            Ok(entry) => self.entries.push(entry),
            Err(error) => {
                self.shape = None;
                return Err(error.into());
            }
        }
        if self.next_plane().is_none() {
            let header = FixedHeader { key: self.key, shape, chunk_bytes: self.bytes.len() as u64 };
            format::write_header(&header, &self.entries, &mut self.bytes);
        }
        Ok(())
    }

    /// Whether all planes were added.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.shape.is_some() && self.next_plane().is_none()
    }

    /// The encoded chunk, once it is whole; until then what there is of it.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes of its header and table.
    #[must_use]
    pub fn header_bytes(&self) -> usize {
        self.shape.map_or(0, |shape| header_bytes(shape.planes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Codec, Dtype, Side};

    const SHAPE: Shape = Shape { layers: 2, kv_heads: 2, head_dim: 8, tokens: 40, dtype: Dtype::Bf16 };

    fn plane(index: usize) -> Vec<u8> {
        (0..SHAPE.plane_bytes())
            .map(|at| if at % 2 == 0 { (at * 7 + index).to_le_bytes()[0] } else { 0x3f })
            .collect()
    }

    #[test]
    fn plane_by_plane_is_the_same_as_all_at_once() {
        let mut writer = ChunkWriter::new(1 << 16);
        for codec in Codec::ALL {
            let mut encoder = Encoder::new(codec, 1);
            let planes: Vec<Vec<u8>> = (0..SHAPE.planes()).map(plane).collect();
            let mut expected = Vec::new();
            let at = |layer: u16, side: Side| planes[crate::plane_index(layer, side)].as_slice();
            encoder.encode_chunk(&[3; 32], &SHAPE, at, &mut expected).unwrap();
            writer.begin(&[3; 32], &SHAPE).unwrap();
            while let Some(index) = writer.next_plane() {
                assert!(!writer.is_whole());
                writer.add_plane(&mut encoder, &planes[index]).unwrap();
            }
            assert!(writer.is_whole());
            assert_eq!(writer.bytes(), expected, "{codec}");
        }
    }

    #[test]
    fn what_does_not_fit_or_cannot_be_encoded_is_refused_and_the_memory_stays() {
        let mut encoder = Encoder::new(Codec::Raw, 1);
        let capacity = header_bytes(SHAPE.planes()) + 3 * max_encoded_bytes(SHAPE.plane_bytes());
        let mut writer = ChunkWriter::new(capacity);
        assert_eq!(ChunkWriter::new(8).begin(&[0; 32], &SHAPE), Err(WriteError::Full { capacity_bytes: 8 }));
        writer.begin(&[0; 32], &SHAPE).unwrap();
        let added: Vec<bool> = (0..4)
            .map_while(|index| {
                writer.next_plane()?;
                Some(writer.add_plane(&mut encoder, &plane(index)).is_ok())
            })
            .collect();
        assert!(added.ends_with(&[false]) && added.len() >= 3, "{added:?}");
        assert!(!writer.is_whole() && writer.next_plane().is_none());
        assert!(writer.bytes.capacity() == capacity, "it never grew");
        writer.begin(&[0; 32], &SHAPE).unwrap();
        let not_finite = [0x80, 0x7f].repeat(SHAPE.elements_per_plane());
        let refused = writer.add_plane(&mut Encoder::new(Codec::Int4, 1), &not_finite);
        assert!(matches!(refused, Err(WriteError::Encode(EncodeError::NotFinite { .. }))));
    }
}
