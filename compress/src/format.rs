//! The header and table of an encoded chunk, byte by byte. `docs/FORMAT.md` is the specification.

use std::ops::Range;

use serde::Serialize;

use crate::decoder::{DecodeError, check_entry};
use crate::offload::Section;
use crate::payload::{Layout, LayoutError};
use crate::{Codec, Compression, Dtype, MAX_PLANES, PlaneCodec, Quantizer, Shape, ShapeError, checksum};

/// First bytes of every encoded chunk.
pub const MAGIC: [u8; 8] = *b"SHDWKV\r\n";
/// The only version of the format there is.
pub const FORMAT_VERSION: u16 = 2;
/// Bytes in front of the table of planes.
pub const FIXED_HEADER_BYTES: usize = 96;
/// Bytes of one entry of the table.
pub const ENTRY_BYTES: usize = 24;
/// Bytes of the largest header with its table.
pub const MAX_HEADER_BYTES: usize = header_bytes(MAX_PLANES);
/// Bytes of the largest encoded chunk, header included: 16 GiB.
pub const MAX_CHUNK_BYTES: u64 = 16 << 30;

const VERSION: Range<usize> = 8..10;
const ENTRY_SIZE: Range<usize> = 10..12;
const HEADER_SIZE: Range<usize> = 12..16;
const KEY: Range<usize> = 16..48;
const LAYERS: Range<usize> = 48..50;
const KV_HEADS: Range<usize> = 50..52;
const HEAD_DIM: Range<usize> = 52..54;
const TOKENS: Range<usize> = 54..56;
const DTYPE: usize = 56;
const RESERVED_AFTER_DTYPE: Range<usize> = 57..60;
const PLANES: Range<usize> = 60..64;
const CHUNK_SIZE: Range<usize> = 64..72;
const RESERVED: Range<usize> = 72..92;
const HEADER_CRC: Range<usize> = 92..96;

/// Bytes of the header and table of a chunk of so many planes.
#[must_use]
pub const fn header_bytes(planes: usize) -> usize {
    FIXED_HEADER_BYTES + planes * ENTRY_BYTES
}

/// Where a plane's encoded bytes lie in the chunk, and how to decode them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PlaneEntry {
    /// Offset of the plane's first byte from the chunk's first byte.
    pub offset: u64,
    /// Encoded bytes.
    pub bytes: u32,
    /// CRC32C of the encoded bytes.
    pub crc32c: u32,
    /// How the elements are encoded.
    pub codec: Codec,
    /// Which elements share a scale.
    pub quantizer: Quantizer,
    /// Element type of the scales; `None` for the exact codecs.
    pub scale_dtype: Option<Dtype>,
    /// How sections are compressed.
    pub compression: Compression,
    /// Bins of `cachegen`; 0 for the other codecs.
    pub bins: u8,
}

/// Why bytes are not the header of an encoded chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Fewer bytes than the header takes.
    #[error("the chunk's header takes {needed_bytes} bytes, only {got_bytes} are there")]
    Truncated {
        /// Bytes that the header takes, as far as is known.
        needed_bytes: usize,
        /// Bytes there are.
        got_bytes: usize,
    },
    /// The first eight bytes are not [`MAGIC`].
    #[error("not an encoded chunk: it starts with {0:02x?}")]
    Magic([u8; 8]),
    /// Written by a version that this one can't read.
    #[error("the chunk has format version {0}, this program reads version {FORMAT_VERSION}: encode it again")]
    Version(u16),
    /// The header names another size than the one its number of planes gives.
    #[error("the chunk's header says {field} = {got}, it must be {expected}")]
    Size {
        /// The field.
        field: &'static str,
        /// What it says.
        got: u64,
        /// What it must say.
        expected: u64,
    },
    /// The header's checksum doesn't match: it was damaged on the way or at rest.
    #[error("the chunk's header has CRC32C {computed:08x}, it says {stored:08x}: it is damaged")]
    HeaderCrc {
        /// What the bytes give.
        computed: u32,
        /// What the header says.
        stored: u32,
    },
    /// The element type is unknown.
    #[error("the chunk has unknown element type {0}")]
    Dtype(u8),
    /// Bytes that must be zero are not.
    #[error("reserved bytes of the chunk's header are not zero")]
    Reserved,
    /// The shape breaks a limit.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The chunk is larger than the format allows, or smaller than its header.
    #[error("a chunk of {0} bytes: the format allows its header's size up to {MAX_CHUNK_BYTES}")]
    ChunkBytes(u64),
    /// An entry of the table holds a number without a meaning.
    #[error("plane {plane} has unknown {field} {got}")]
    Entry {
        /// Index of the plane.
        plane: usize,
        /// The field.
        field: &'static str,
        /// What it says.
        got: u8,
    },
    /// Codec, quantizer and shape don't go together.
    #[error("plane {plane}: {source}")]
    Layout {
        /// Index of the plane.
        plane: usize,
        /// What doesn't fit.
        source: LayoutError,
    },
    /// A plane's encoded size can't hold its parts.
    #[error("plane {plane} has {bytes} encoded bytes, {codec} takes {min_bytes} to {max_bytes}")]
    PlaneBytes {
        /// Index of the plane.
        plane: usize,
        /// Its codec.
        codec: Codec,
        /// What the entry says.
        bytes: u32,
        /// The least there can be.
        min_bytes: usize,
        /// The most there can be.
        max_bytes: usize,
    },
    /// A plane starts inside the header or the plane before it.
    #[error("plane {plane} starts at {offset}, before the end of what precedes it at {previous_end}")]
    Overlap {
        /// Index of the plane.
        plane: usize,
        /// Where it starts.
        offset: u64,
        /// Where it may start at the earliest.
        previous_end: u64,
    },
    /// A plane ends beyond the chunk.
    #[error(
        "plane {plane} starts at {offset} and has {bytes} bytes, beyond the chunk's end at {chunk_bytes}"
    )]
    OutOfBounds {
        /// Index of the plane.
        plane: usize,
        /// Where it starts.
        offset: u64,
        /// Its encoded bytes.
        bytes: u32,
        /// The chunk's bytes.
        chunk_bytes: u64,
    },
}

/// The fields in front of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FixedHeader {
    pub(crate) key: [u8; 32],
    pub(crate) shape: Shape,
    pub(crate) chunk_bytes: u64,
}

/// Copies a range of known length out of `bytes`; `range` lies within.
fn array<const N: usize>(bytes: &[u8], range: Range<usize>) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[range]);
    out
}

fn u16_at(bytes: &[u8], range: Range<usize>) -> u16 {
    u16::from_le_bytes(array(bytes, range))
}

fn u32_at(bytes: &[u8], range: Range<usize>) -> u32 {
    u32::from_le_bytes(array(bytes, range))
}

fn u64_at(bytes: &[u8], range: Range<usize>) -> u64 {
    u64::from_le_bytes(array(bytes, range))
}

/// How many bytes the header and table take, from the chunk's first [`FIXED_HEADER_BYTES`] bytes; nothing else is
/// checked but magic and version.
pub(crate) fn announced_header_bytes(first: &[u8]) -> Result<usize, FormatError> {
    let got_bytes = first.len();
    if got_bytes < FIXED_HEADER_BYTES {
        return Err(FormatError::Truncated { needed_bytes: FIXED_HEADER_BYTES, got_bytes });
    }
    let magic = array(first, 0..8);
    if magic != MAGIC {
        return Err(FormatError::Magic(magic));
    }
    let version = u16_at(first, VERSION);
    if version != FORMAT_VERSION {
        return Err(FormatError::Version(version));
    }
    let sizes = [
        ("entry_bytes", u64::from(u16_at(first, ENTRY_SIZE)), ENTRY_BYTES as u64),
        ("planes", u64::from(u32_at(first, PLANES)), u64::from(u16_at(first, LAYERS)) * 2),
    ];
    if let Some((field, got, expected)) = sizes.into_iter().find(|&(_, got, expected)| got != expected) {
        return Err(FormatError::Size { field, got, expected });
    }
    let layers = u16_at(first, LAYERS);
    if usize::from(layers) > MAX_PLANES / 2 {
        return Err(ShapeError::Layers(layers).into());
    }
    let expected = header_bytes(usize::from(layers) * 2);
    let got = u32_at(first, HEADER_SIZE);
    if u64::from(got) != expected as u64 {
        return Err(FormatError::Size { field: "header_bytes", got: got.into(), expected: expected as u64 });
    }
    Ok(expected)
}

/// CRC32C of the header and table with the checksum's own four bytes taken as zero.
fn header_crc(header: &[u8]) -> u32 {
    let crc = checksum::crc32c(&header[..HEADER_CRC.start]);
    let crc = checksum::crc32c_append(crc, &[0; 4]);
    checksum::crc32c_append(crc, &header[HEADER_CRC.end..])
}

/// Reads and checks everything in front of the table, the checksum over the table included. Returns the fields and
/// the bytes of header and table.
pub(crate) fn read_header(bytes: &[u8]) -> Result<(FixedHeader, &[u8]), FormatError> {
    let needed_bytes = announced_header_bytes(bytes)?;
    let header =
        bytes.get(..needed_bytes).ok_or(FormatError::Truncated { needed_bytes, got_bytes: bytes.len() })?;
    let (computed, stored) = (header_crc(header), u32_at(header, HEADER_CRC));
    if computed != stored {
        return Err(FormatError::HeaderCrc { computed, stored });
    }
    let reserved = [RESERVED_AFTER_DTYPE, RESERVED];
    if reserved.into_iter().any(|range| header[range].iter().any(|&byte| byte != 0)) {
        return Err(FormatError::Reserved);
    }
    let shape = Shape {
        layers: u16_at(header, LAYERS),
        kv_heads: u16_at(header, KV_HEADS),
        head_dim: u16_at(header, HEAD_DIM),
        tokens: u16_at(header, TOKENS),
        dtype: Dtype::from_wire(header[DTYPE]).ok_or(FormatError::Dtype(header[DTYPE]))?,
    };
    shape.check()?;
    let chunk_bytes = u64_at(header, CHUNK_SIZE);
    if chunk_bytes > MAX_CHUNK_BYTES || chunk_bytes < needed_bytes as u64 {
        return Err(FormatError::ChunkBytes(chunk_bytes));
    }
    Ok((FixedHeader { key: array(header, KEY), shape, chunk_bytes }, header))
}

/// Reads one entry of the table and checks it against the shape alone; its place is for [`check_place`].
pub(crate) fn read_entry(plane: usize, entry: &[u8], shape: &Shape) -> Result<PlaneEntry, FormatError> {
    let unknown = |field, got| FormatError::Entry { plane, field, got };
    let codec = Codec::from_wire(entry[16]).ok_or(unknown("codec", entry[16]))?;
    let quantizer = Quantizer::from_wire(entry[17]).ok_or(unknown("quantizer", entry[17]))?;
    let scale_dtype = match entry[18] {
        0 => None,
        number => Some(Dtype::from_wire(number).ok_or(unknown("scale type", number))?),
    };
    let compression = Compression::from_wire(entry[19]).ok_or(unknown("compression", entry[19]))?;
    let bins = entry[20];
    if entry[21..ENTRY_BYTES].iter().any(|&byte| byte != 0) {
        return Err(FormatError::Reserved);
    }
    let bytes = u32_at(entry, 8..12);
    let entry = PlaneEntry {
        offset: u64_at(entry, 0..8),
        bytes,
        crc32c: u32_at(entry, 12..16),
        codec,
        quantizer,
        scale_dtype,
        compression,
        bins,
    };
    let layout = entry.layout(shape).map_err(|source| FormatError::Layout { plane, source })?;
    let (min_bytes, max_bytes) = (layout.min_bytes, layout.max_bytes);
    if usize::try_from(bytes).is_ok_and(|bytes| (min_bytes..=max_bytes).contains(&bytes)) {
        Ok(entry)
    } else {
        Err(FormatError::PlaneBytes { plane, codec, bytes, min_bytes, max_bytes })
    }
}

impl PlaneEntry {
    /// Sizes of the plane's parts, or why the entry can't describe a plane of this shape.
    pub(crate) fn layout(&self, shape: &Shape) -> Result<Layout, LayoutError> {
        let present = self.scale_dtype.is_some();
        if present == self.codec.is_exact() {
            return Err(LayoutError::ScaleDtype { codec: self.codec, present });
        }
        if self.bins != 0 && self.codec != Codec::CacheGen {
            return Err(LayoutError::Bins { codec: self.codec, bins: self.bins });
        }
        let &Self { codec, compression, bins, .. } = self;
        Layout::new(shape, PlaneCodec { codec, compression, bins, step_milli: 0 }, self.quantizer)
    }

    /// The compressed section of the plane, if it has exactly one: `None` where it is stored, and for the exact codecs.
    ///
    /// # Errors
    /// When the entry can't describe a plane of this shape.
    pub fn section(&self, shape: &Shape) -> Result<Option<Section>, DecodeError> {
        let layout = check_entry(shape, self)?;
        let encoded_bytes = usize::try_from(self.bytes).unwrap_or(usize::MAX);
        let stored = encoded_bytes == layout.max_bytes || self.compression == Compression::None;
        if layout.codes.is_none() || stored {
            return Ok(None);
        }
        let start = layout.before_section();
        let compressed_bytes = encoded_bytes - start;
        Ok(Some(Section {
            compression: self.compression,
            start,
            compressed_bytes,
            bytes: layout.section_bytes,
        }))
    }

    /// The entry as it stands in a table.
    fn write(&self, out: &mut [u8]) {
        out[0..8].copy_from_slice(&self.offset.to_le_bytes());
        out[8..12].copy_from_slice(&self.bytes.to_le_bytes());
        out[12..16].copy_from_slice(&self.crc32c.to_le_bytes());
        out[16] = self.codec.wire();
        out[17] = self.quantizer.wire();
        out[18] = self.scale_dtype.map_or(0, Dtype::wire);
        out[19] = self.compression.wire();
        out[20] = self.bins;
        out[21..ENTRY_BYTES].fill(0);
    }
}

/// Checks that a plane starts at or after `previous_end` and ends within the chunk; returns where it ends.
pub(crate) fn check_place(
    plane: usize,
    entry: &PlaneEntry,
    previous_end: u64,
    chunk_bytes: u64,
) -> Result<u64, FormatError> {
    let &PlaneEntry { offset, bytes, .. } = entry;
    if offset < previous_end {
        return Err(FormatError::Overlap { plane, offset, previous_end });
    }
    match offset.checked_add(u64::from(bytes)) {
        Some(end) if end <= chunk_bytes => Ok(end),
        _ => Err(FormatError::OutOfBounds { plane, offset, bytes, chunk_bytes }),
    }
}

/// Writes header and table over the front of `out`, which has room for both. `entries` are as many as the shape has
/// planes.
pub(crate) fn write_header(header: &FixedHeader, entries: &[PlaneEntry], out: &mut [u8]) {
    let shape = &header.shape;
    let out = &mut out[..header_bytes(entries.len())];
    out[..FIXED_HEADER_BYTES].fill(0);
    out[0..8].copy_from_slice(&MAGIC);
    out[VERSION].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    let entry_bytes = u16::try_from(ENTRY_BYTES).expect("a constant that fits");
    out[ENTRY_SIZE].copy_from_slice(&entry_bytes.to_le_bytes());
    let size = u32::try_from(out.len()).expect("at most MAX_HEADER_BYTES");
    out[HEADER_SIZE].copy_from_slice(&size.to_le_bytes());
    out[KEY].copy_from_slice(&header.key);
    out[LAYERS].copy_from_slice(&shape.layers.to_le_bytes());
    out[KV_HEADS].copy_from_slice(&shape.kv_heads.to_le_bytes());
    out[HEAD_DIM].copy_from_slice(&shape.head_dim.to_le_bytes());
    out[TOKENS].copy_from_slice(&shape.tokens.to_le_bytes());
    out[DTYPE] = shape.dtype.wire();
    out[PLANES].copy_from_slice(&(u32::from(shape.layers) * 2).to_le_bytes());
    out[CHUNK_SIZE].copy_from_slice(&header.chunk_bytes.to_le_bytes());
    for (entry, place) in entries.iter().zip(out[FIXED_HEADER_BYTES..].chunks_exact_mut(ENTRY_BYTES)) {
        entry.write(place);
    }
    let crc = header_crc(out);
    out[HEADER_CRC].copy_from_slice(&crc.to_le_bytes());
}
