//! What a damaged or hostile chunk does: a named error, no panic, and not a byte written.

use compress::{
    ChunkHeader, ChunkView, Codec, Compression, DecodeError, Decoder, Dtype, EncodeError, Encoder,
    FormatError, FrameError, LayoutError, OutDtype, PlaneCodec, PlaneEntry, Quantizer, Shape, ShapeError,
    Side, crc32c, plane_index, reference,
};
use proptest::prelude::*;

const SHAPE: Shape = Shape { layers: 2, kv_heads: 2, head_dim: 16, tokens: 32, dtype: Dtype::Bf16 };
const CANARY: u8 = 0xa5;

/// A plane whose codes are skewed, so that they are compressed.
fn plane() -> Vec<u8> {
    let value = |element: u16| if element.is_multiple_of(61) { 3.0 } else { f32::from(element % 5) * 0.01 };
    (0..1024).flat_map(|element| half::bf16::from_f32(value(element)).to_le_bytes()).collect()
}

fn chunk(codec: impl Into<PlaneCodec>) -> Vec<u8> {
    let (plane, mut chunk) = (plane(), Vec::new());
    Encoder::new(codec, 1).encode_chunk(&[9; 32], &SHAPE, |_, _| &plane, &mut chunk).unwrap();
    chunk
}

/// The first plane of a chunk: its entry and its bytes.
fn first_plane(codec: impl Into<PlaneCodec>) -> (PlaneEntry, Vec<u8>) {
    let chunk = chunk(codec);
    let entry = ChunkHeader::parse(&chunk).unwrap().planes[0];
    let start = usize::try_from(entry.offset).unwrap();
    (entry, chunk[start..start + usize::try_from(entry.bytes).unwrap()].to_vec())
}

/// A chunk's header changed by `change`, its checksum made right again.
fn forged(change: impl FnOnce(&mut Vec<u8>)) -> Result<ChunkHeader, FormatError> {
    let mut chunk = chunk(Codec::Int4);
    change(&mut chunk);
    seal(&mut chunk);
    ChunkHeader::parse(&chunk)
}

fn seal(chunk: &mut [u8]) {
    let header_bytes = ChunkHeader::header_bytes(4);
    chunk[92..96].fill(0);
    let crc = crc32c(&chunk[..header_bytes]);
    chunk[92..96].copy_from_slice(&crc.to_le_bytes());
}

/// An entry for these bytes, all else as `entry` says.
fn entry_for(entry: &PlaneEntry, encoded: &[u8]) -> PlaneEntry {
    PlaneEntry { bytes: u32::try_from(encoded.len()).unwrap(), crc32c: crc32c(encoded), ..*entry }
}

/// Decodes in one piece and in segments; both must agree, and leave the destination alone unless they succeed.
fn decode(shape: &Shape, entry: &PlaneEntry, encoded: &[u8]) -> Result<Vec<u8>, DecodeError> {
    let mut decoder = Decoder::new(shape.plane_bytes());
    let mut buffer = vec![CANARY; shape.plane_bytes() + 128];
    let end = buffer.len() - 64;
    let whole = decoder.decode(shape, entry, encoded, Dtype::Bf16, &mut buffer[64..end]);
    assert!(whole.is_ok() || buffer[64..end].iter().all(|&byte| byte == CANARY), "{whole:?} wrote");
    let decoded = buffer[64..end].to_vec();
    buffer[64..end].fill(CANARY);
    let pieces = decoder.decode_segments(shape, entry, encoded.chunks(7), Dtype::Bf16, &mut buffer[64..end]);
    assert_eq!(pieces.is_ok(), whole.is_ok(), "{pieces:?} {whole:?}");
    assert!(pieces.is_ok() || buffer[64..end].iter().all(|&byte| byte == CANARY), "{pieces:?} wrote");
    assert!(
        buffer[..64].iter().chain(&buffer[end..]).all(|&byte| byte == CANARY),
        "written beyond the destination"
    );
    whole.map(|()| decoded)
}

#[test]
fn a_header_cut_anywhere_is_refused() {
    let chunk = chunk(Codec::Int4);
    let header_bytes = ChunkHeader::header_bytes(SHAPE.planes());
    for cut in 0..header_bytes {
        let needed_bytes = if cut < 96 { 96 } else { header_bytes };
        let truncated = FormatError::Truncated { needed_bytes, got_bytes: cut };
        assert_eq!(ChunkHeader::parse(&chunk[..cut]), Err(truncated));
    }
    assert!(ChunkHeader::parse(&chunk[..header_bytes]).is_ok(), "the payload is not needed");
}

#[test]
fn a_header_with_any_bit_flipped_is_refused() {
    let mut chunk = chunk(Codec::Lossless);
    for bit in 0..ChunkHeader::header_bytes(SHAPE.planes()) * 8 {
        chunk[bit / 8] ^= 1 << (bit % 8);
        assert!(ChunkView::parse(&chunk).is_err(), "bit {bit}");
        assert!(compress::plane_table(&chunk, |_, _| panic!("called on a bad header")).is_err());
        chunk[bit / 8] ^= 1 << (bit % 8);
    }
    assert!(ChunkView::parse(&chunk).is_ok());
}

#[test]
fn forged_fixed_fields_are_named() {
    let parse = |at: usize, bytes: &[u8]| forged(|chunk| chunk[at..at + bytes.len()].copy_from_slice(bytes));
    assert_eq!(parse(0, b"NOTACHUN"), Err(FormatError::Magic(*b"NOTACHUN")));
    assert_eq!(parse(8, &[1, 0]), Err(FormatError::Version(1)));
    assert_eq!(parse(10, &[23, 0]), Err(FormatError::Size { field: "entry_bytes", got: 23, expected: 24 }));
    assert_eq!(
        parse(12, &[0xff; 4]),
        Err(FormatError::Size { field: "header_bytes", got: 0xffff_ffff, expected: 192 })
    );
    assert_eq!(parse(60, &[5]), Err(FormatError::Size { field: "planes", got: 5, expected: 4 }));
    assert_eq!(parse(54, &[1, 1]), Err(ShapeError::Tokens(257).into()));
    assert_eq!(parse(54, &[0, 0]), Err(ShapeError::Zero("token count").into()));
    assert_eq!(parse(50, &[0xff; 4]), Err(ShapeError::PlaneBytes(32 * 65535 * 65535 * 2).into()));
    assert_eq!(parse(56, &[7]), Err(FormatError::Dtype(7)));
    assert_eq!(parse(57, &[1]), Err(FormatError::Reserved));
    assert_eq!(parse(91, &[1]), Err(FormatError::Reserved));
    assert_eq!(parse(64, &[0xff; 8]), Err(FormatError::ChunkBytes(u64::MAX)));
    assert_eq!(parse(64, &[1, 0, 0, 0, 0, 0, 0, 0]), Err(FormatError::ChunkBytes(1)));
    // As many layers as 16 bits hold: refused before the table is looked for.
    let layers = |chunk: &mut Vec<u8>| {
        chunk[48..50].fill(0xff);
        chunk[60..64].copy_from_slice(&(65535_u32 * 2).to_le_bytes());
    };
    assert_eq!(forged(layers), Err(ShapeError::Layers(65535).into()));
    let chunk = chunk(Codec::Int4);
    let expected = chunk.len() as u64;
    assert_eq!(
        parse(64, &(expected + 1).to_le_bytes()),
        Err(FormatError::Size { field: "chunk_bytes", got: expected + 1, expected })
    );
}

#[test]
fn forged_entries_are_named() {
    // The second plane's entry.
    const AT: usize = 96 + 24;
    let entries = ChunkHeader::parse(&chunk(Codec::Int4)).unwrap().planes;
    let parse = |at: usize, bytes: &[u8]| {
        forged(|chunk| chunk[AT + at..AT + at + bytes.len()].copy_from_slice(bytes))
    };
    let (plane, &PlaneEntry { offset, bytes, .. }) = (1, &entries[1]);
    let chunk_bytes = chunk(Codec::Int4).len() as u64;
    let (previous_end, before) = (offset, offset - 1);
    assert_eq!(
        parse(0, &before.to_le_bytes()),
        Err(FormatError::Overlap { plane, offset: before, previous_end })
    );
    assert_eq!(parse(0, &[0; 8]), Err(FormatError::Overlap { plane, offset: 0, previous_end }));
    assert_eq!(
        parse(0, &[0xff; 8]),
        Err(FormatError::OutOfBounds { plane, offset: u64::MAX, bytes, chunk_bytes })
    );
    let late = chunk_bytes - 1;
    let error = FormatError::OutOfBounds { plane, offset: late, bytes, chunk_bytes };
    assert_eq!(parse(0, &late.to_le_bytes()), Err(error));
    // A gap is no error by itself, but the next plane is then overlapped.
    let moved = offset + 1;
    assert!(matches!(parse(0, &moved.to_le_bytes()), Err(FormatError::Overlap { plane: 2, .. })));
    for bytes in [0, 128, u32::MAX] {
        let named = parse(8, &bytes.to_le_bytes());
        assert!(
            matches!(named, Err(FormatError::PlaneBytes { plane: 1, codec: Codec::Int4, bytes: b, .. }) if b == bytes)
        );
    }
    let unknown = |field, got| Err(FormatError::Entry { plane, field, got });
    assert_eq!(parse(16, &[7]), unknown("codec", 7));
    assert_eq!(parse(17, &[4]), unknown("quantizer", 4));
    assert_eq!(parse(18, &[9]), unknown("scale type", 9));
    assert_eq!(parse(19, &[99]), unknown("compression", 99));
    let layout = |source| Err(FormatError::Layout { plane, source });
    assert_eq!(parse(18, &[0]), layout(LayoutError::ScaleDtype { codec: Codec::Int4, present: false }));
    assert_eq!(parse(16, &[0]), layout(LayoutError::ScaleDtype { codec: Codec::Raw, present: true }));
    let (codec, quantizer) = (Codec::Int4, Quantizer::None);
    assert_eq!(parse(17, &[0]), layout(LayoutError::Quantizer { codec, quantizer }));
    let quantizer = Quantizer::PerToken;
    assert_eq!(parse(17, &[3]), layout(LayoutError::Quantizer { codec, quantizer }));
    assert_eq!(parse(20, &[16]), layout(LayoutError::Bins { codec, bins: 16 }));
    let (codec, compression) = (Codec::Raw, Codec::Int4.default_compression());
    assert_eq!(parse(16, &[0, 0, 0]), layout(LayoutError::Compression { codec, compression }));
    for bins in [0, 2, 31, 255] {
        let codec = Codec::CacheGen;
        assert_eq!(parse(16, &[6, 3, 1, 1, bins]), layout(LayoutError::Bins { codec, bins }));
    }
    assert_eq!(parse(23, &[1]), Err(FormatError::Reserved));
}

#[test]
fn scales_that_outgrow_the_plane_are_refused() {
    // One token with a scale per channel: two bytes of scale, two of offset, half a byte of code for every element.
    let shape = Shape { tokens: 1, ..SHAPE };
    let entry = PlaneEntry {
        offset: 0,
        bytes: 100,
        crc32c: 0,
        codec: Codec::Int4,
        quantizer: Quantizer::PerChannel,
        scale_dtype: Some(Dtype::F16),
        compression: Compression::Zstd,
        bins: 0,
    };
    assert_eq!(
        decode(&shape, &entry, &[0; 100]),
        Err(LayoutError::Outgrows { bytes: 144, plane_bytes: 64 }.into())
    );
}

#[test]
fn damaged_payloads_fail_their_checksum() {
    for codec in Codec::ALL {
        let (entry, mut encoded) = first_plane(codec);
        for byte in 0..encoded.len() {
            encoded[byte] ^= 0x10;
            assert!(
                matches!(decode(&SHAPE, &entry, &encoded), Err(DecodeError::Crc { .. })),
                "{codec}, byte {byte}"
            );
            encoded[byte] ^= 0x10;
        }
        for cut in 0..encoded.len() {
            let error = DecodeError::Length { got_bytes: cut, expected_bytes: entry.bytes };
            assert_eq!(decode(&SHAPE, &entry, &encoded[..cut]), Err(error));
        }
        encoded.extend([0; 1000]);
        assert!(matches!(decode(&SHAPE, &entry, &encoded), Err(DecodeError::Length { .. })));
    }
}

#[test]
fn forged_payloads_decode_as_the_reference_or_not_at_all() {
    let zstd = PlaneCodec { compression: Compression::Zstd, ..Codec::Int4.into() };
    for codec in Codec::ALL.map(PlaneCodec::from).into_iter().chain([zstd]) {
        let (entry, mut encoded) = first_plane(codec);
        for bit in 0..encoded.len() * 8 {
            encoded[bit / 8] ^= 1 << (bit % 8);
            let entry = entry_for(&entry, &encoded);
            if let Ok(decoded) = decode(&SHAPE, &entry, &encoded) {
                let expected = reference::decode_plane(&SHAPE, &entry, &encoded, Dtype::Bf16);
                assert_eq!(Ok(decoded), expected, "{codec}, bit {bit}");
            }
            encoded[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

/// An `int4` plane with this section behind its scales and offsets, said to be compressed with zstd.
fn with_section(section: &[u8]) -> Result<Vec<u8>, DecodeError> {
    let (entry, encoded) = first_plane(PlaneCodec { compression: Compression::Zstd, ..Codec::Int4.into() });
    let encoded = [&encoded[..4 * SHAPE.channels()], section].concat();
    decode(&SHAPE, &entry_for(&entry, &encoded), &encoded)
}

fn frame(bytes: &[u8], with_size: bool) -> Vec<u8> {
    let mut context = zstd_safe::CCtx::create();
    context.set_parameter(zstd_safe::CParameter::ContentSizeFlag(with_size)).unwrap();
    let mut frame = Vec::with_capacity(1000);
    context.compress2(&mut frame, bytes).unwrap();
    frame
}

#[test]
fn forged_frames_are_named() {
    let expected_bytes = SHAPE.elements_per_plane() / 2;
    assert!(with_section(&frame(&vec![3; expected_bytes], true)).is_ok());
    let sized = |got_bytes| Err(FrameError::ContentSize { got_bytes, expected_bytes }.into());
    // RFC 8878: magic, descriptor (single segment, content size of eight bytes), content size.
    let mut gigabytes = vec![0x28, 0xb5, 0x2f, 0xfd, 0xe0];
    gigabytes.extend((64_u64 << 30).to_le_bytes());
    gigabytes.extend([1, 0, 0]);
    assert_eq!(with_section(&gigabytes), sized(Some(64 << 30)));
    assert_eq!(with_section(&frame(&vec![3; expected_bytes - 1], true)), sized(Some(511)));
    assert_eq!(with_section(&frame(&vec![3; expected_bytes + 1], true)), sized(Some(513)));
    assert_eq!(with_section(&frame(&vec![3; expected_bytes], false)), sized(None));
    assert_eq!(with_section(b"(\xb5/\xfd"), sized(None));
    assert_eq!(with_section(b"no frame"), Err(FrameError::Magic.into()));
    // A skippable frame, then the right one.
    let skippable =
        [&[0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0], frame(&vec![3; expected_bytes], true).as_slice()].concat();
    assert_eq!(with_section(&skippable), Err(FrameError::Magic.into()));
    let whole = frame(&vec![3; expected_bytes], true);
    let twice = [whole.as_slice(), frame(&[], true).as_slice()].concat();
    let (frame_bytes, section_bytes) = (whole.len(), twice.len());
    assert_eq!(with_section(&twice), Err(FrameError::Trailing { frame_bytes, section_bytes }.into()));
    assert!(matches!(with_section(&whole[..whole.len() - 1]), Err(DecodeError::Frame(FrameError::Zstd(_)))));
}

#[test]
fn lossless_sections_must_fit() {
    let (entry, mut encoded) = first_plane(Codec::Lossless);
    for length in [u32::MAX, entry.bytes - 3] {
        encoded[..4].copy_from_slice(&length.to_le_bytes());
        let error = decode(&SHAPE, &entry_for(&entry, &encoded), &encoded).unwrap_err();
        assert!(matches!(error, DecodeError::SectionLength { section_bytes, .. } if section_bytes == length));
    }
    // Longer than what it would decompress to.
    let encoded = [&1025_u32.to_le_bytes(), vec![0; 1030].as_slice()].concat();
    let error = FrameError::Outgrown { got_bytes: 1025, expected_bytes: 1024 };
    assert_eq!(decode(&SHAPE, &entry_for(&entry, &encoded), &encoded), Err(error.into()));
}

#[test]
fn scales_and_offsets_that_give_no_finite_element_are_refused() {
    for codec in [Codec::Int8, Codec::Int5, Codec::Int4, Codec::Int3] {
        let (scale, offset) = (2 * 3, 2 * SHAPE.channels() + 2 * 3);
        let scales = [0x7fc0_u16, 0x7f80, 0xff80, 0x7f7f, 0x7c00].map(|bits| (scale, bits));
        let offsets = [0x7f80, 0xff80, 0xffff].map(|bits| (offset, bits));
        for (at, bits) in scales.into_iter().chain(offsets) {
            let (entry, mut encoded) = first_plane(codec);
            encoded[at..at + 2].copy_from_slice(&bits.to_le_bytes());
            let entry = entry_for(&entry, &encoded);
            let got = decode(&SHAPE, &entry, &encoded);
            let expected = reference::decode_plane(&SHAPE, &entry, &encoded, Dtype::Bf16);
            assert_eq!(got, expected, "{codec} {at} {bits:04x}");
            // 2^121 times 31 is a bfloat16, times 255 it is not.
            if codec == Codec::Int8 || bits != 0x7c00 {
                assert!(
                    matches!(got, Err(DecodeError::Scale { group: 3, .. })),
                    "{codec} {at} {bits:04x}: {got:?}"
                );
            }
        }
    }
}

#[test]
fn wrong_destinations_are_refused() {
    let (entry, encoded) = first_plane(Codec::Raw);
    let plane_bytes = SHAPE.plane_bytes();
    let mut decoder = Decoder::new(plane_bytes);
    let mut out = vec![CANARY; plane_bytes + 1];
    for got_bytes in [0, plane_bytes - 1, plane_bytes + 1] {
        let error = DecodeError::OutBytes { got_bytes, expected_bytes: plane_bytes };
        assert_eq!(decoder.decode(&SHAPE, &entry, &encoded, Dtype::Bf16, &mut out[..got_bytes]), Err(error));
    }
    let error = DecodeError::OutDtype { codec: Codec::Raw, source_dtype: Dtype::Bf16, out_dtype: "f16" };
    assert_eq!(decoder.decode(&SHAPE, &entry, &encoded, Dtype::F16, &mut out[..plane_bytes]), Err(error));
    let mut small = Decoder::new(plane_bytes - 2);
    let error = DecodeError::TooLarge { plane_bytes, max_plane_bytes: plane_bytes - 2 };
    assert_eq!(small.decode(&SHAPE, &entry, &encoded, Dtype::Bf16, &mut out[..plane_bytes]), Err(error));
    assert!(small.linearize_checked([], &PlaneEntry { bytes: u32::MAX, ..entry }).is_err());
    assert!(out.iter().all(|&byte| byte == CANARY));
}

#[test]
fn scales_of_fp8_that_cannot_be_divided_by_are_refused() {
    for codec in [Codec::Int4, Codec::CacheGen] {
        let (entry, encoded) = first_plane(codec);
        let mut decoder = Decoder::new(SHAPE.plane_bytes());
        let mut out = vec![CANARY; SHAPE.elements_per_plane()];
        for scale in [0.0, -1.0, f32::INFINITY, f32::NAN, f32::MIN_POSITIVE / 2.0] {
            let out_dtype = OutDtype::Fp8E4M3 { scale };
            let error = DecodeError::OutScale { scale_bits: scale.to_bits() };
            assert_eq!(decoder.decode(&SHAPE, &entry, &encoded, out_dtype, &mut out), Err(error));
            assert_eq!(reference::decode_plane(&SHAPE, &entry, &encoded, out_dtype), Err(error));
        }
        assert!(out.iter().all(|&byte| byte == CANARY));
        let out_dtype = OutDtype::Fp8E4M3 { scale: 0.5 };
        assert_eq!(decoder.decode(&SHAPE, &entry, &encoded, out_dtype, &mut out), Ok(()));
    }
}

#[test]
fn a_plane_without_compression_has_one_length() {
    let plane_codec = PlaneCodec { compression: Compression::None, ..Codec::Int4.into() };
    let (plane, mut chunk) = (plane(), Vec::new());
    Encoder::new(plane_codec, 1).encode_chunk(&[9; 32], &SHAPE, |_, _| &plane, &mut chunk).unwrap();
    let entry = ChunkHeader::parse(&chunk).unwrap().planes[0];
    assert_eq!(entry.bytes, 4 * 32 + 512);
    for bytes in [entry.bytes - 1, entry.bytes + 1] {
        let shorter = PlaneEntry { bytes, ..entry };
        let refused = decode(&SHAPE, &shorter, &vec![0; usize::try_from(bytes).unwrap()]);
        assert!(matches!(refused, Err(DecodeError::EncodedBytes { min_bytes: 640, max_bytes: 640, .. })));
    }
}

#[test]
fn only_a_checked_plane_is_decoded() {
    let (entry, encoded) = first_plane(Codec::Int8);
    let mut decoder = Decoder::new(SHAPE.plane_bytes());
    let mut out = vec![CANARY; SHAPE.plane_bytes()];
    let not_linearized = Err(DecodeError::NotLinearized { expected_bytes: entry.bytes });
    assert_eq!(decoder.decode_linearized(&SHAPE, &entry, Dtype::Bf16, &mut out), not_linearized);
    decoder.linearize_checked([encoded.as_slice()], &entry).unwrap();
    let other = PlaneEntry { crc32c: !entry.crc32c, ..entry };
    assert_eq!(decoder.decode_linearized(&SHAPE, &other, Dtype::Bf16, &mut out), not_linearized);
    // A failed plane leaves nothing of the one before it.
    assert!(decoder.linearize_checked([&encoded[1..]], &entry).is_err());
    assert_eq!(decoder.decode_linearized(&SHAPE, &entry, Dtype::Bf16, &mut out), not_linearized);
    assert!(out.iter().all(|&byte| byte == CANARY));
    decoder.linearize_checked([encoded.as_slice()], &entry).unwrap();
    decoder.decode_linearized(&SHAPE, &entry, Dtype::Bf16, &mut out).unwrap();
    assert!(out.iter().any(|&byte| byte != CANARY));
}

#[test]
fn planes_that_cannot_be_encoded_are_named() {
    let good = plane();
    let encode = |codec, shape: &Shape, bad: &[u8], at: usize| {
        let mut out = vec![1, 2, 3];
        let plane = |layer, side| if plane_index(layer, side) == at { bad } else { good.as_slice() };
        let result = Encoder::new(codec, 1).encode_chunk(&[0; 32], shape, plane, &mut out);
        assert!(result.is_ok() || out.is_empty(), "something was left behind");
        result
    };
    for codec in [Codec::Int8, Codec::Int5, Codec::Int4, Codec::Int3, Codec::CacheGen] {
        for bits in [0x7f80_u16, 0xff80, 0x7fc0, 0xffff, 0x7f81] {
            let mut bad = good.clone();
            bad[200..202].copy_from_slice(&bits.to_le_bytes());
            let error = EncodeError::NotFinite { layer: 1, side: Side::V, element: 100 };
            assert_eq!(encode(codec, &SHAPE, &bad, 3), Err(error));
            assert_eq!(
                encode(Codec::Lossless, &SHAPE, &bad, 3),
                Ok(()),
                "exact codecs take every bit pattern"
            );
        }
    }
    let error = EncodeError::PlaneBytes { layer: 0, side: Side::K, got_bytes: 2047, expected_bytes: 2048 };
    assert_eq!(encode(Codec::Raw, &SHAPE, &good[..2047], 0), Err(error));
    let odd = Shape { kv_heads: 32, head_dim: 1, ..SHAPE };
    for (codec, multiple) in [(Codec::Int8, 2), (Codec::Int5, 8), (Codec::Int4, 2), (Codec::Int3, 8)] {
        let error = LayoutError::HeadDimMultiple { codec, multiple, head_dim: 1 };
        assert_eq!(encode(codec, &odd, &good, 9), Err(error.into()));
    }
    let small = Shape { kv_heads: 16, head_dim: 2, ..SHAPE };
    let error = LayoutError::SmallHeadDim { codec: Codec::Int8, head_dim: 2 };
    assert_eq!(encode(Codec::Int8, &small, &good, 9), Err(error.into()));
    assert_eq!(encode(Codec::Lossless, &odd, &good, 9), Ok(()));
    let long = Shape { tokens: 300, ..SHAPE };
    assert_eq!(encode(Codec::Raw, &long, &good, 9), Err(ShapeError::Tokens(300).into()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_header_with_a_right_checksum_parses_or_is_refused(
        changes in proptest::collection::vec((8_usize..192, any::<u8>()), 1..12),
    ) {
        let mut chunk = chunk(Codec::Int8);
        changes.iter().filter(|(at, _)| !(92..96).contains(at)).for_each(|&(at, byte)| chunk[at] = byte);
        seal(&mut chunk);
        if let Ok(header) = ChunkHeader::parse(&chunk) {
            let mut end = ChunkHeader::header_bytes(header.planes.len()) as u64;
            for entry in &header.planes {
                prop_assert!(entry.offset >= end && entry.bytes > 0);
                end = entry.offset + u64::from(entry.bytes);
            }
            prop_assert_eq!(end, header.chunk_bytes);
        }
    }

    #[test]
    fn any_payload_decodes_as_the_reference_or_not_at_all(
        codec in proptest::sample::select(&Codec::ALL),
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8),
        cut in proptest::option::of(any::<proptest::sample::Index>()),
    ) {
        let (entry, mut encoded) = first_plane(codec);
        if let Some(cut) = cut {
            encoded.truncate(cut.index(encoded.len()));
        }
        for (at, byte) in changes {
            let places = encoded.len();
            if places > 0 {
                encoded[at.index(places)] = byte;
            }
        }
        let entry = entry_for(&entry, &encoded);
        if let Ok(decoded) = decode(&SHAPE, &entry, &encoded) {
            prop_assert_eq!(Ok(decoded), reference::decode_plane(&SHAPE, &entry, &encoded, Dtype::Bf16));
        }
    }
}
