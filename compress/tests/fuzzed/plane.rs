//! The decoder, one plane at a time.

use std::cell::RefCell;

use compress::{
    Codec, Compression, DecodeError, Decoder, Dtype, Isa, OutDtype, PlaneEntry, Quantizer, Shape, crc32c,
    reference,
};

use super::input::Input;

const CANARY: u8 = 0xa5;
const GUARD_BYTES: usize = 64;

/// Largest plane that [`plane`] makes.
pub(super) const MAX_PLANE_BYTES: usize = 2 * 24 * 3 * 64;

thread_local! {
    /// For each instruction set of this CPU one decoder for all inputs, and one that decompresses in place: what one leaves in it must not change what the next gives. The best comes first.
    static DECODERS: RefCell<Vec<Decoder>> = RefCell::new({
        let mut decoders: Vec<_> =
            Isa::supported().map(|isa| Decoder::new(MAX_PLANE_BYTES).with_isa(isa)).collect();
        decoders.reverse();
        decoders.push(Decoder::new(MAX_PLANE_BYTES).with_in_place(true));
        decoders
    });
}

/// One plane with this codec: the input chooses compression, shape, entry and payload; the section is what the input says, or that compressed, or that
/// compressed and damaged. The checksum is right unless the input wants it wrong.
pub(crate) fn plane(codec: Codec, data: &[u8]) {
    let mut input = Input(data);
    let compression = Compression::ALL[input.below(Compression::ALL.len())];
    let choice = input.byte();
    let shape = Shape {
        layers: 1,
        kv_heads: 1 + u16::from(choice >> 6) % 3,
        head_dim: [4, 8, 64, 6, 16, 24, 40, 5][usize::from(input.byte() & 7)],
        tokens: 1 + u16::from(input.byte()) % 24,
        dtype: if choice & 1 == 0 { Dtype::Bf16 } else { Dtype::F16 },
    };
    let quantizer = Quantizer::from_wire(choice >> 1 & 3).expect("2 bits");
    let scale_dtype =
        [None, Some(Dtype::Bf16), Some(Dtype::F16), Some(shape.dtype)][usize::from(choice >> 3 & 3)];
    let bins = input.byte();
    let mode = input.byte();
    let damage = (usize::from(input.u16()), input.byte());
    let scale_bits = input.u32();
    let piece_bytes = 1 + usize::from(input.byte());
    let out_dtype = match mode >> 6 {
        0 => OutDtype::Bf16,
        1 => OutDtype::F16,
        2 => OutDtype::Fp8E4M3 { scale: f32::from_bits(scale_bits) },
        _ => shape.dtype.into(),
    };
    let mut entry =
        PlaneEntry { offset: 0, bytes: 0, crc32c: 0, codec, quantizer, scale_dtype, compression, bins };
    let Some(encoded) = payload(&shape, &entry, &input, mode, damage) else { return };
    entry.bytes = u32::try_from(encoded.len()).expect("small");
    entry.crc32c = crc32c(&encoded) ^ u32::from(mode & 63 == 63);
    check_plane(&shape, &entry, &encoded, piece_bytes, out_dtype);
}

/// The encoded bytes of a plane; `None` if the entry can describe no plane of this shape. `mode`: bits 0 and 1 say what the section is (as it is; as it
/// is, cut; compressed; compressed and damaged), bit 2 whether scales are kept finite.
fn payload(
    shape: &Shape,
    entry: &PlaneEntry,
    input: &Input<'_>,
    mode: u8,
    damage: (usize, u8),
) -> Option<Vec<u8>> {
    // An empty plane is refused with the sizes that there may be.
    let (min_bytes, max_bytes) = match entry.section(shape) {
        Err(DecodeError::EncodedBytes { min_bytes, max_bytes, .. }) => (min_bytes, max_bytes),
        Err(_) => return None,
        Ok(_) => panic!("a plane of no bytes"),
    };
    let cut = damage.0 % (max_bytes + 8);
    let mut encoded = match (entry.codec, mode & 3) {
        (_, 0) => input.0[..input.0.len().min(max_bytes + 8)].to_vec(),
        (_, 1) => input.cycle(cut),
        (Codec::Raw, _) => input.cycle(max_bytes),
        (Codec::Lossless, _) => {
            let half = shape.plane_bytes() / 2;
            let both = input.cycle(2 * half);
            let [high, low] = [&both[..half], &both[half..]].map(|part| compressed(entry.compression, part));
            let length = u32::try_from(high.len()).expect("small").to_le_bytes();
            [&length[..], &high, &low].concat()
        }
        _ => {
            let front = if entry.compression == Compression::None { max_bytes } else { min_bytes - 1 };
            let all = input.cycle(max_bytes);
            [&all[..front], &compressed(entry.compression, &all[front..])].concat()
        }
    };
    if mode & 4 != 0 && !entry.codec.is_exact() {
        // The upper byte of each scale and offset, as far as there are any: below the exponents of infinities.
        let scales = (min_bytes - 1).min(encoded.len());
        encoded[..scales].iter_mut().skip(1).step_by(2).for_each(|byte| *byte &= 0xbb);
    }
    if mode & 3 == 3 && !encoded.is_empty() {
        let at = damage.0 % encoded.len();
        encoded[at] ^= damage.1;
    }
    Some(encoded)
}

/// `bytes` as a writer would have them in a section.
fn compressed(compression: Compression, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0; bytes.len() + 1024];
    let length = match compression {
        Compression::None => return bytes.to_vec(),
        Compression::Zstd => zstd_safe::compress(&mut out[..], bytes, 1).expect("room"),
        Compression::Deflate => libdeflater::Compressor::new(libdeflater::CompressionLvl::fastest())
            .deflate_compress(bytes, &mut out)
            .expect("room"),
        // The encoder's own: no other writes it.
        Compression::Sliced => return compress::kernels::sliced(bytes),
    };
    out.truncate(length);
    if length < bytes.len() { out } else { bytes.to_vec() }
}

/// A way to decode the plane in question.
type Decode<'a> = &'a mut dyn FnMut(&mut Decoder, &mut [u8]) -> Result<(), DecodeError>;

pub(super) fn check_plane(
    shape: &Shape,
    entry: &PlaneEntry,
    encoded: &[u8],
    piece_bytes: usize,
    out_dtype: OutDtype,
) {
    let out_bytes = shape.elements_per_plane() * out_dtype.bytes();
    let slowly = reference::decode_plane(shape, entry, encoded, out_dtype);
    let run = |at: usize, decode: Decode<'_>| {
        let mut buffer = vec![CANARY; out_bytes + 2 * GUARD_BYTES];
        let out = &mut buffer[GUARD_BYTES..][..out_bytes];
        let decoded = DECODERS.with_borrow_mut(|decoders| decode(&mut decoders[at], out));
        let (front, rest) = buffer.split_at(GUARD_BYTES);
        let (out, back) = rest.split_at(out_bytes);
        assert!(front.iter().chain(back).all(|&byte| byte == CANARY), "written outside the destination");
        match decoded {
            Ok(()) => assert_eq!(slowly.as_deref(), Ok(out), "not what the reference says"),
            Err(error) => {
                assert!(slowly.is_err(), "{error}, where the reference decodes");
                assert!(out.iter().all(|&byte| byte == CANARY), "{error}, but something was written");
                assert!(!error.to_string().is_empty());
            }
        }
    };
    for at in 0..DECODERS.with_borrow(Vec::len) {
        run(at, &mut |decoder, out| decoder.decode(shape, entry, encoded, out_dtype, out));
    }
    run(0, &mut |decoder, out| {
        decoder.decode_segments(shape, entry, encoded.chunks(piece_bytes), out_dtype, out)
    });
    let checked = Decoder::check_segments(encoded.chunks(piece_bytes), entry);
    assert_eq!(checked.is_ok(), crc32c(encoded) == entry.crc32c);
    let Ok(Some(section)) = entry.section(shape) else { return };
    if checked.is_ok()
        && let Some(bytes) = decompressed(entry.compression, &encoded[section.start..], section.bytes)
    {
        run(0, &mut |decoder, out| {
            let pieces = encoded.chunks(piece_bytes);
            decoder.decode_decompressed(shape, entry, pieces, &bytes, out_dtype, out)
        });
    }
}

/// What a device would make of a section that decodes.
fn decompressed(compression: Compression, section: &[u8], bytes: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; bytes];
    let length = match compression {
        Compression::None => return None,
        // A device is asked for one frame that says its size: the decoder's own checks are stricter than the library.
        Compression::Zstd | Compression::Sliced => return None,
        Compression::Deflate => {
            libdeflater::Decompressor::new().deflate_decompress(section, &mut out).ok()?
        }
    };
    (length == bytes).then_some(out)
}
