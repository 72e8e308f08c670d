//! Encoding and decoding, compared with the slow reference, over arbitrary shapes and values.

use compress::{
    ChunkHeader, ChunkView, Codec, Decoder, Dtype, Encoder, Shape, Side, plane_index, plane_of, reference,
};
use proptest::prelude::*;

/// Shapes that every codec takes, small enough for the reference.
fn shapes() -> impl Strategy<Value = Shape> {
    let dtype = prop_oneof![Just(Dtype::Bf16), Just(Dtype::F16)];
    let tokens = prop_oneof![1_u16..=20, Just(255), Just(256)];
    (1_u16..=2, 1_u16..=3, 2_u16..=20, tokens, dtype).prop_map(
        |(layers, kv_heads, half_dim, tokens, dtype)| Shape {
            layers,
            kv_heads,
            head_dim: half_dim * 2,
            tokens,
            dtype,
        },
    )
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

fn codecs() -> impl Strategy<Value = Codec> {
    proptest::sample::select(&Codec::ALL)
}

const CANARY: u8 = 0xa5;

/// Decodes one plane into the middle of a larger buffer and checks that nothing around it changed.
fn decode_between_canaries(
    decoder: &mut Decoder,
    shape: &Shape,
    entry: &compress::PlaneEntry,
    encoded: &[u8],
    segment_bytes: usize,
    out_dtype: Dtype,
) -> Vec<u8> {
    let mut buffer = vec![CANARY; shape.plane_bytes() + 2 * 64];
    let out = &mut buffer[64..][..shape.plane_bytes()];
    decoder.decode_segments(shape, entry, encoded.chunks(segment_bytes), out_dtype, out).unwrap();
    let decoded = out.to_vec();
    assert!(buffer[..64].iter().chain(&buffer[64 + decoded.len()..]).all(|&byte| byte == CANARY));
    decoded
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_plane_arrives_as_the_reference_says(
        (shape, planes) in chunks(), codec in codecs(), key: [u8; 32], level in -5_i32..6, segment_bytes in 1_usize..2000,
        to_f16: bool,
    ) {
        let mut chunk = vec![1, 2, 3];
        let plane = |layer, side| planes[plane_index(layer, side)].as_slice();
        Encoder::new(codec, level).encode_chunk(&key, &shape, plane, &mut chunk).unwrap();
        let view = ChunkView::parse(&chunk).unwrap();
        prop_assert_eq!((view.key(), view.shape(), view.chunk_bytes()), (&key, &shape, chunk.len() as u64));
        prop_assert_eq!(ChunkView::announced_header_bytes(&chunk[..96]).unwrap(), view.header_bytes());
        let owned = ChunkHeader::parse(&chunk[..view.header_bytes()]).unwrap();
        prop_assert!(view.planes().eq(owned.planes.iter().copied()) && view.planes().len() == shape.planes());

        let out_dtype = if codec.is_exact() { shape.dtype } else if to_f16 { Dtype::F16 } else { Dtype::Bf16 };
        let mut decoder = Decoder::new(shape.plane_bytes());
        for (index, entry) in view.planes().enumerate() {
            let start = usize::try_from(entry.offset).unwrap();
            let encoded = &chunk[start..start + usize::try_from(entry.bytes).unwrap()];
            let (layer, side) = plane_of(index);
            let expected =
                compress::reference_decode(codec, &shape, layer, side, &planes[index], out_dtype).unwrap();
            if codec.is_exact() {
                prop_assert_eq!(&expected, &planes[index]);
            }
            let decoded =
                decode_between_canaries(&mut decoder, &shape, &entry, encoded, segment_bytes, out_dtype);
            prop_assert_eq!(&decoded, &expected);
            let mut whole = vec![0; shape.plane_bytes()];
            decoder.decode(&shape, &entry, encoded, out_dtype, &mut whole).unwrap();
            prop_assert_eq!(&whole, &expected);
            prop_assert_eq!(&reference::decode_plane(&shape, &entry, encoded, out_dtype).unwrap(), &expected);
        }
    }

    #[test]
    fn packed_codes_are_those_of_the_reference((shape, planes) in chunks(), int4: bool, v: bool) {
        let codec = if int4 { Codec::Int4 } else { Codec::Int8 };
        let side = if v { Side::V } else { Side::K };
        let quantized = reference::quantize(codec, &shape, side, &planes[0]).unwrap();
        let packed = reference::pack(codec, &shape, &quantized.codes);
        prop_assert_eq!(&reference::unpack(codec, &shape, &packed), &quantized.codes);
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
            for codec in [Codec::Int8, Codec::Int4] {
                let mut chunk = Vec::new();
                Encoder::new(codec, 1).encode_chunk(&[0; 32], &shape, |_, _| &plane, &mut chunk).unwrap();
                let mut decoder = Decoder::new(shape.plane_bytes());
                for (index, entry) in ChunkView::parse(&chunk).unwrap().planes().enumerate() {
                    let start = usize::try_from(entry.offset).unwrap();
                    let encoded = &chunk[start..start + usize::try_from(entry.bytes).unwrap()];
                    let decoded = decode_between_canaries(&mut decoder, &shape, &entry, encoded, 1000, dtype);
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
    for (codec, side) in
        [(Codec::Int8, Side::K), (Codec::Int8, Side::V), (Codec::Int4, Side::K), (Codec::Int4, Side::V)]
    {
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
