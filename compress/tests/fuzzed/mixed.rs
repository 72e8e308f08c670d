//! Whole chunks whose planes have each their own codec: encoded, then damaged.

use compress::{
    ChunkHeader, Codec, Compression, Dtype, ENTRY_BYTES, EncodeError, Encoder, FIXED_HEADER_BYTES, OutDtype,
    PlaneCodec, PlaneEntry, Shape, crc32c, plane_index, reference,
};

use super::input::Input;
use super::plane::{MAX_PLANE_BYTES, check_plane};

/// The input chooses shape, the codec of each plane, the elements, and what becomes of the chunk. What encodes must decode, in every output type as the
/// reference says; what was damaged afterwards, checksums put right or not, must too or be refused.
pub(crate) fn mixed(data: &[u8]) {
    let mut input = Input(data);
    let choice = input.byte();
    let shape = Shape {
        layers: 1 + u16::from(choice & 1),
        kv_heads: 1 + u16::from(choice >> 1 & 1),
        head_dim: [8, 64, 4, 24][usize::from(choice >> 2 & 3)],
        tokens: 1 + u16::from(input.byte()) % 24,
        dtype: if choice & 16 == 0 { Dtype::Bf16 } else { Dtype::F16 },
    };
    let codecs: Vec<PlaneCodec> = (0..shape.planes()).map(|_| plane_codec(&mut input)).collect();
    let (how, out_scale, piece_bytes) = (input.byte(), input.u32(), 1 + usize::from(input.byte()));
    let damages = [(); 3].map(|()| (usize::from(input.u16()), input.byte()));
    let planes: Vec<Vec<u8>> = (0..shape.planes()).map(|_| elements(&shape, &mut input, how)).collect();

    let mut chunk = Vec::new();
    let mut encoder = Encoder::mixed(move |layer, side| codecs[plane_index(layer, side)], 1);
    match encoder.encode_chunk(&[7; 32], &shape, |layer, side| &planes[plane_index(layer, side)], &mut chunk)
    {
        Ok(()) => {}
        Err(error) => {
            let named = matches!(error, EncodeError::NotFinite { .. } | EncodeError::Layout(_));
            assert!(named && chunk.is_empty(), "{error}");
            return;
        }
    }
    let header = ChunkHeader::parse(&chunk).expect("what the encoder writes");
    for (index, entry) in header.planes.iter().enumerate() {
        let encoded = place(entry).and_then(|range| chunk.get(range)).expect("what the encoder writes");
        let decoded =
            reference::decode_plane(&shape, entry, encoded, shape.dtype).expect("what the encoder writes");
        assert!(!entry.codec.is_exact() || decoded == planes[index], "{} is not exact", entry.codec);
    }
    let out_dtypes = out_dtypes(how, out_scale);
    check_planes(&chunk, out_dtypes, piece_bytes);
    for (at, flipped) in damages {
        let at = at % chunk.len();
        chunk[at] ^= flipped;
    }
    if how & 1 != 0 {
        mend(&mut chunk, &header);
    }
    check_planes(&chunk, out_dtypes, piece_bytes);
}

/// An output type for each plane in turn.
fn out_dtypes(how: u8, out_scale: u32) -> [OutDtype; 3] {
    let fp8 = OutDtype::Fp8E4M3 { scale: f32::from_bits(out_scale) };
    let mut out_dtypes = [OutDtype::Bf16, OutDtype::F16, fp8];
    out_dtypes.rotate_left(usize::from(how >> 3) % 3);
    out_dtypes
}

fn plane_codec(input: &mut Input<'_>) -> PlaneCodec {
    let codec = Codec::ALL[input.below(Codec::ALL.len())];
    let compression = Compression::ALL[input.below(Compression::ALL.len())];
    let bins = input.byte();
    let bins = if codec == Codec::CacheGen && bins.is_multiple_of(2) { bins.max(4) } else { bins };
    PlaneCodec { codec, compression, bins, step_milli: u16::from(input.byte()) << 4 }
}

/// A plane's bytes; finite unless bits 1 and 2 of `how` are zero.
fn elements(shape: &Shape, input: &mut Input<'_>, how: u8) -> Vec<u8> {
    let mut bytes = input.cycle(shape.plane_bytes());
    input.take(1);
    if how & 6 != 0 {
        for element in bytes.chunks_exact_mut(2) {
            if !shape.dtype.widen(u16::from_le_bytes([element[0], element[1]])).is_finite() {
                element[1] &= 0xbf;
            }
        }
    }
    bytes
}

fn place(entry: &PlaneEntry) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(entry.offset).ok()?;
    Some(start..start.checked_add(usize::try_from(entry.bytes).ok()?)?)
}

/// Every plane of a chunk whose header parses, as far as it is there.
fn check_planes(chunk: &[u8], out_dtypes: [OutDtype; 3], piece_bytes: usize) {
    let Ok(header) = ChunkHeader::parse(chunk) else { return };
    if header.shape.plane_bytes() > MAX_PLANE_BYTES {
        return;
    }
    for (entry, out_dtype) in header.planes.iter().zip(out_dtypes.into_iter().cycle()) {
        let Some(encoded) = place(entry).and_then(|range| chunk.get(range)) else { continue };
        check_plane(&header.shape, entry, encoded, piece_bytes, out_dtype);
    }
}

/// Puts the checksums right, of planes where they lay before the damage.
fn mend(chunk: &mut [u8], before: &ChunkHeader) {
    for (index, entry) in before.planes.iter().enumerate() {
        let Some(crc) = place(entry).and_then(|range| chunk.get(range)).map(crc32c) else { continue };
        chunk[FIXED_HEADER_BYTES + index * ENTRY_BYTES + 12..][..4].copy_from_slice(&crc.to_le_bytes());
    }
    let header_bytes = ChunkHeader::header_bytes(before.planes.len());
    chunk[92..96].fill(0);
    let crc = crc32c(&chunk[..header_bytes]);
    chunk[92..96].copy_from_slice(&crc.to_le_bytes());
}
