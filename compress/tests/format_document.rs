//! The example of `docs/FORMAT.md` is what the encoder writes, and decodes to what the page says.

use compress::{ChunkView, Codec, Decoder, Dtype, Encoder, Shape, Side, crc32c};

const DOCUMENT: &str = include_str!("../../docs/FORMAT.md");

/// The bytes of the page's block marked `hex`: two digits each, up to the `|` of every line.
fn documented() -> Vec<u8> {
    let block = DOCUMENT.split("```hex\n").nth(1).unwrap().split("```").next().unwrap();
    let bytes = block.lines().flat_map(|line| line.split('|').next().unwrap_or("").split_whitespace());
    bytes.map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

fn bf16(values: [f32; 4]) -> Vec<u8> {
    values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect()
}

#[test]
fn the_documented_chunk_is_what_the_encoder_writes() {
    let shape = Shape { layers: 1, kv_heads: 1, head_dim: 4, tokens: 1, dtype: Dtype::Bf16 };
    let (k, v) = (bf16([0.0, 1.0, 2.0, 3.0]), bf16([-1.0, -0.5, 0.5, 1.0]));
    let key = std::array::from_fn(|byte| u8::try_from(byte).unwrap());
    let mut chunk = Vec::new();
    let plane = |_, side| if side == Side::K { k.as_slice() } else { v.as_slice() };
    Encoder::new(Codec::Int4, 1).encode_chunk(&key, &shape, plane, &mut chunk).unwrap();
    let expected = documented();
    assert_eq!(expected, chunk, "the encoder writes {chunk:02x?}");

    let view = ChunkView::parse(&expected).unwrap();
    let mut decoder = Decoder::new(shape.plane_bytes());
    let mut decode = |index: usize| {
        let entry = view.plane(index).unwrap();
        let start = usize::try_from(entry.offset).unwrap();
        let mut out = vec![0; shape.plane_bytes()];
        let encoded = &expected[start..start + usize::try_from(entry.bytes).unwrap()];
        decoder.decode(&shape, &entry, encoded, Dtype::Bf16, &mut out).unwrap();
        out
    };
    // 0.2 and 2/15 rounded up to bfloat16, times the codes.
    assert_eq!(decode(0), bf16([0.0, 5.0 * 0.200_195_31, 10.0 * 0.200_195_31, 15.0 * 0.200_195_31]));
    assert_eq!(
        decode(1),
        bf16([-1.0, 4.0 * 0.133_789_06 - 1.0, 11.0 * 0.133_789_06 - 1.0, 15.0 * 0.133_789_06 - 1.0])
    );
}

#[test]
fn the_documented_checksum_is_this_one() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}
