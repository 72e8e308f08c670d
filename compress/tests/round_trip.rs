//! Encoding and decoding, compared with the slow reference, over arbitrary shapes and values.

use compress::{
    ChunkHeader, ChunkView, Codec, Compression, DecodeError, Decoder, Dtype, Encoder, OutDtype, PlaneCodec,
    Shape, Side, plane_index, plane_of, reference,
};
use proptest::prelude::*;

/// Shapes that every codec takes, small enough for the reference.
fn shapes() -> impl Strategy<Value = Shape> {
    let dtype = prop_oneof![Just(Dtype::Bf16), Just(Dtype::F16)];
    let tokens = prop_oneof![1_u16..=20, Just(255), Just(256)];
    let head_dim =
        prop_oneof![(2_u16..=20).prop_map(|half| half * 2), (1_u16..=17).prop_map(|eighth| eighth * 8)];
    (1_u16..=2, 1_u16..=3, head_dim, tokens, dtype).prop_map(|(layers, kv_heads, head_dim, tokens, dtype)| {
        Shape { layers, kv_heads, head_dim, tokens, dtype }
    })
}

/// Bits of one finite element: ordinary values, zeros of both signs, subnormals, the largest, anything.
fn element(dtype: Dtype) -> impl Strategy<Value = u16> {
    let (one, exponent_mask, largest) = match dtype {
        Dtype::Bf16 => (0x3f80_u16, 0x7f80_u16, 0x7f7f_u16),
        Dtype::F16 => (0x3c00, 0x7c00, 0x7bff),
    };
    prop_oneof![
        8 => (one - 0x200..one + 0x200, any::<bool>()).prop_map(|(bits, sign)| bits | u16::from(sign) << 15),
        1 => prop_oneof![Just(0_u16), Just(0x8000), Just(1), Just(0x8001), Just(largest), Just(largest | 0x8000)],
        1 => any::<u16>().prop_map(move |bits| if bits & exponent_mask == exponent_mask { bits & 0x807f } else { bits }),
    ]
}

/// A shape with all planes of a chunk; each plane repeats a drawn pattern so that drawing stays cheap.
fn chunks() -> impl Strategy<Value = (Shape, Vec<Vec<u8>>)> {
    shapes().prop_flat_map(|shape| {
        let pattern = proptest::collection::vec(element(shape.dtype), 1..=97);
        let planes = proptest::collection::vec(pattern, shape.planes());
        planes.prop_map(move |patterns| {
            let plane = |pattern: &Vec<u16>| -> Vec<u8> {
                pattern
                    .iter()
                    .cycle()
                    .take(shape.elements_per_plane())
                    .flat_map(|bits| bits.to_le_bytes())
                    .collect()
            };
            (shape, patterns.iter().map(plane).collect())
        })
    })
}

fn codecs() -> impl Strategy<Value = PlaneCodec> {
    let codec = proptest::sample::select(&Codec::ALL);
    let compression = proptest::sample::select(&Compression::ALL);
    let bins = (2_u8..=127).prop_map(|half| half * 2);
    let any_bins = prop_oneof![Just(16), Just(32), bins];
    let step_milli = prop_oneof![Just(0), 1_u16..1500, any::<u16>()];
    (codec, compression, any_bins, any::<bool>(), step_milli).prop_map(
        |(codec, compression, bins, all_codes, step_milli)| {
            let bins = if all_codes && codec != Codec::CacheGen { 0 } else { bins };
            PlaneCodec { codec, compression, bins, step_milli }
        },
    )
}

/// Whether the codec packs eight dimensions together, or only two.
fn packs_eight(codec: PlaneCodec) -> bool {
    match codec.codec {
        Codec::Int5 | Codec::Int3 => true,
        Codec::CacheGen => (18..=32).contains(&codec.bins),
        _ => false,
    }
}

fn out_dtypes() -> impl Strategy<Value = OutDtype> {
    let scale = prop_oneof![Just(1.0), Just(0.02), 1e-6_f32..100.0];
    prop_oneof![
        Just(OutDtype::Bf16),
        Just(OutDtype::F16),
        scale.prop_map(|scale| OutDtype::Fp8E4M3 { scale }),
    ]
}

const CANARY: u8 = 0xa5;

/// Decodes one plane into the middle of a larger buffer and checks that nothing around it changed.
fn decode_between_canaries(
    decoder: &mut Decoder,
    shape: &Shape,
    entry: &compress::PlaneEntry,
    encoded: &[u8],
    segment_bytes: usize,
    out_dtype: OutDtype,
) -> Result<Vec<u8>, DecodeError> {
    let out_bytes = shape.elements_per_plane() * out_dtype.bytes();
    let mut buffer = vec![CANARY; out_bytes + 2 * 64];
    let out = &mut buffer[64..][..out_bytes];
    let result = decoder.decode_segments(shape, entry, encoded.chunks(segment_bytes), out_dtype, out);
    let decoded = out.to_vec();
    assert!(result.is_ok() || decoded.iter().all(|&byte| byte == CANARY), "{result:?}, but written");
    assert!(buffer[..64].iter().chain(&buffer[64 + decoded.len()..]).all(|&byte| byte == CANARY));
    result.map(|()| decoded)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    #[test]
    fn every_plane_arrives_as_the_reference_says(
        (shape, planes) in chunks(), codec in codecs(), key: [u8; 32], level in -5_i32..6, segment_bytes in 1_usize..2000,
        out_dtype in out_dtypes(), in_place: bool,
    ) {
        prop_assume!(shape.head_dim.is_multiple_of(8) || !packs_eight(codec));
        let mut chunk = vec![1, 2, 3];
        let plane = |layer, side| planes[plane_index(layer, side)].as_slice();
        Encoder::new(codec, level).encode_chunk(&key, &shape, plane, &mut chunk).unwrap();
        let view = ChunkView::parse(&chunk).unwrap();
        prop_assert_eq!((view.key(), view.shape(), view.chunk_bytes()), (&key, &shape, chunk.len() as u64));
        prop_assert_eq!(ChunkView::announced_header_bytes(&chunk[..96]).unwrap(), view.header_bytes());
        let owned = ChunkHeader::parse(&chunk[..view.header_bytes()]).unwrap();
        prop_assert!(view.planes().eq(owned.planes.iter().copied()) && view.planes().len() == shape.planes());

        let is_exact = codec.codec.is_exact();
        let out_dtype = if is_exact { shape.dtype.into() } else { out_dtype };
        let mut decoder = Decoder::new(shape.plane_bytes()).with_in_place(in_place);
        for (index, entry) in view.planes().enumerate() {
            let start = usize::try_from(entry.offset).unwrap();
            let encoded = &chunk[start..start + usize::try_from(entry.bytes).unwrap()];
            let (layer, side) = plane_of(index);
            let expected = compress::reference_decode(codec, &shape, layer, side, &planes[index], out_dtype);
            let decoded =
                decode_between_canaries(&mut decoder, &shape, &entry, encoded, segment_bytes, out_dtype);
            // FP8 with a scale that the elements are too large for.
            if let Err(reference::ReferenceError::Decode(error)) = expected {
                prop_assert!(matches!(out_dtype, OutDtype::Fp8E4M3 { .. }), "{}", error);
                prop_assert_eq!(decoded, Err(error));
                prop_assert_eq!(reference::decode_plane(&shape, &entry, encoded, out_dtype), Err(error));
                continue;
            }
            let expected = expected.unwrap();
            if is_exact {
                prop_assert_eq!(&expected, &planes[index]);
            }
            prop_assert_eq!(&decoded.unwrap(), &expected);
            let mut whole = vec![0; expected.len()];
            decoder.decode(&shape, &entry, encoded, out_dtype, &mut whole).unwrap();
            prop_assert_eq!(&whole, &expected);
            prop_assert_eq!(&reference::decode_plane(&shape, &entry, encoded, out_dtype).unwrap(), &expected);
        }
    }

    #[test]
    fn packed_codes_are_those_of_the_reference((shape, planes) in chunks(), codec in codecs(), v: bool) {
        prop_assume!(!codec.codec.is_exact() && (shape.head_dim.is_multiple_of(8) || !packs_eight(codec)));
        let side = if v { Side::V } else { Side::K };
        let quantized = reference::quantize(codec, &shape, side, &planes[0]).unwrap();
        let (plain, section) = reference::pack(codec, &shape, &quantized.codes);
        prop_assert_eq!(&reference::unpack(codec, &shape, &plain, &section), &quantized.codes);
    }
}

/// Each plane of a chunk by a codec of its own.
#[test]
fn a_chunk_may_mix_codecs() {
    let shape = Shape { layers: 4, kv_heads: 2, head_dim: 16, tokens: 40, dtype: Dtype::F16 };
    let plane: Vec<u8> = (0..shape.elements_per_plane())
        .flat_map(|element| half::f16::from_f64((element as f64 * 0.37).sin()).to_le_bytes())
        .collect();
    let codecs = |layer: u16, side: Side| {
        let compression = if side == Side::K { Compression::Zstd } else { Compression::None };
        let codec = Codec::ALL[usize::from(layer) * 2 % 7 + usize::from(side == Side::V && layer < 3)];
        PlaneCodec { codec, compression, bins: 16, step_milli: 0 }
    };
    let mut chunk = Vec::new();
    Encoder::mixed(codecs, 1).encode_chunk(&[0; 32], &shape, |_, _| &plane, &mut chunk).unwrap();
    let mut decoder = Decoder::new(shape.plane_bytes());
    for (index, entry) in ChunkView::parse(&chunk).unwrap().planes().enumerate() {
        let (layer, side) = plane_of(index);
        assert_eq!(entry.codec, codecs(layer, side).codec);
        let start = usize::try_from(entry.offset).unwrap();
        let encoded = &chunk[start..start + usize::try_from(entry.bytes).unwrap()];
        let mut out = vec![0; shape.plane_bytes()];
        decoder.decode(&shape, &entry, encoded, Dtype::F16, &mut out).unwrap();
        let expected =
            compress::reference_decode(codecs(layer, side), &shape, layer, side, &plane, Dtype::F16).unwrap();
        assert_eq!(out, expected, "{layer} {side} {}", entry.codec);
    }
}

/// The ends of the range, where spans and products leave `f32` unless care is taken.
#[test]
fn the_largest_elements_of_both_signs_stay_finite() {
    for (dtype, largest) in [(Dtype::Bf16, 0x7f7f_u16), (Dtype::F16, 0x7bff)] {
        let shape = Shape { layers: 1, kv_heads: 1, head_dim: 64, tokens: 32, dtype };
        for pattern in
            [[largest, largest | 0x8000], [largest, 0], [largest | 0x8000; 2], [0x8000, 0], [1, 0x8001]]
        {
            // Two tokens alike, then two of the other element, so that channels and rows both see the span.
            let element = |element: usize| pattern[(element / 128 + element % 2) % 2].to_le_bytes();
            let plane: Vec<u8> = (0..shape.elements_per_plane()).flat_map(element).collect();
            for codec in &Codec::ALL[2..] {
                let codec = *codec;
                let mut chunk = Vec::new();
                Encoder::new(codec, 1).encode_chunk(&[0; 32], &shape, |_, _| &plane, &mut chunk).unwrap();
                let mut decoder = Decoder::new(shape.plane_bytes());
                for (index, entry) in ChunkView::parse(&chunk).unwrap().planes().enumerate() {
                    let start = usize::try_from(entry.offset).unwrap();
                    let encoded = &chunk[start..start + usize::try_from(entry.bytes).unwrap()];
                    let decoded =
                        decode_between_canaries(&mut decoder, &shape, &entry, encoded, 1000, dtype.into())
                            .unwrap();
                    let (layer, side) = plane_of(index);
                    let expected =
                        compress::reference_decode(codec, &shape, layer, side, &plane, dtype).unwrap();
                    assert_eq!(decoded, expected);
                    let mask = if dtype == Dtype::Bf16 { 0x7f80 } else { 0x7c00 };
                    let finite = |bytes: &[u8]| u16::from_le_bytes([bytes[0], bytes[1]]) & mask != mask;
                    assert!(decoded.chunks(2).all(finite), "{codec} {dtype} {pattern:x?}");
                }
            }
        }
    }
}

/// No element is further from what arrives than half a scale and the rounding of the result.
#[test]
fn the_error_is_at_most_half_a_scale() {
    let shape = Shape { layers: 1, kv_heads: 2, head_dim: 64, tokens: 100, dtype: Dtype::Bf16 };
    let value =
        |element: usize| half::bf16::from_f64((element as f64 * 0.7).sin() * (1.0 + (element % 64) as f64));
    let values: Vec<half::bf16> = (0..shape.elements_per_plane()).map(value).collect();
    let plane: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let codecs = [Codec::Int8, Codec::Int5, Codec::Int4, Codec::Int3];
    for (codec, side) in codecs.iter().flat_map(|&codec| [(codec, Side::K), (codec, Side::V)]) {
        let decoded = compress::reference_decode(codec, &shape, 0, side, &plane, Dtype::Bf16).unwrap();
        let groups = reference::quantize(codec, &shape, side, &plane).unwrap().groups;
        for (element, (value, bytes)) in values.iter().zip(decoded.chunks(2)).enumerate() {
            let group = if side == Side::K { element % 128 } else { element / 64 };
            let scale = half::bf16::from_bits(groups[group].0).to_f64();
            let got = half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f64();
            let error = (got - value.to_f64()).abs();
            assert!(error <= scale / 2.0 + got.abs() / 256.0, "{codec} {side} {element}: {error} {scale}");
        }
    }
}
