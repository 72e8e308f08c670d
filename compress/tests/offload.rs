//! Decoding in steps, with a device played by this program that answers late, in any order, and sometimes not at all; and Deflate streams that somebody
//! forged.

mod planes;

use compress::{
    ChunkView, Codec, Compression, DecodeError, Decoder, Dtype, Encoder, FrameError, Offload, PlaneCodec,
    PlaneEntry, Section, Shape, Untaken, crc32c, plane_index,
};
use libdeflater::{CompressionLvl, Compressor, Decompressor};
use planes::Planes;
use proptest::prelude::*;

/// A plane on its way: its entry, and its encoded bytes in pieces.
type Plane = (PlaneEntry, Vec<Vec<u8>>);

/// Finishes planes in an order that `order` gives, failing those whose turn it says.
struct Late {
    held: Vec<(Plane, Section)>,
    order: Vec<(prop::sample::Index, bool)>,
    turn: usize,
}

impl Offload<Plane> for Late {
    fn takes(&self, section: &Section) -> Result<(), Untaken> {
        if section.compression == Compression::Deflate { Ok(()) } else { Err(Untaken::Compression) }
    }

    fn has_room(&self) -> bool {
        self.held.len() < 3
    }

    fn submit(&mut self, plane: Plane, section: &Section) -> Result<(), Plane> {
        self.held.push((plane, *section));
        Ok(())
    }

    fn flush(&mut self) {}

    fn in_flight(&self) -> usize {
        self.held.len()
    }

    fn finish(&mut self, done: impl FnOnce(Plane, Option<&[u8]>)) -> bool {
        let (which, fails) = self.order[self.turn % self.order.len()];
        self.turn += 1;
        let (plane, section) = self.held.swap_remove(which.index(self.held.len()));
        let encoded = plane.1.concat();
        assert_eq!(section.start + section.compressed_bytes, encoded.len());
        let mut bytes = vec![0; section.bytes];
        let got = Decompressor::new().deflate_decompress(&encoded[section.start..], &mut bytes);
        assert_eq!(got, Ok(section.bytes));
        done(plane, (!fails).then_some(&bytes));
        true
    }
}

/// Decodes all planes of a chunk as a decode lcore does, in whatever order they come, and compares each with what the decoder makes of it alone.
fn decode_all(shape: &Shape, chunk: &[u8], piece_bytes: usize, late: &mut Late) -> usize {
    let entries: Vec<PlaneEntry> = ChunkView::parse(chunk).unwrap().planes().collect();
    let mut by_device = 0;
    let mut decoder = Decoder::new(shape.plane_bytes());
    let encoded = |entry: &PlaneEntry| {
        let start = usize::try_from(entry.offset).unwrap();
        &chunk[start..][..usize::try_from(entry.bytes).unwrap()]
    };
    let check = |decoder: &mut Decoder, entry: &PlaneEntry, out: &[u8]| {
        let mut alone = vec![0; shape.plane_bytes()];
        decoder.decode(shape, entry, encoded(entry), Dtype::Bf16, &mut alone).unwrap();
        assert!(out == alone, "plane at {}", entry.offset);
    };
    let mut finish = |late: &mut Late, decoder: &mut Decoder| {
        late.finish(|(entry, pieces), section| {
            let mut out = vec![0; shape.plane_bytes()];
            let pieces = pieces.iter().map(Vec::as_slice);
            match section {
                Some(section) => {
                    by_device += 1;
                    decoder
                        .decode_decompressed(shape, &entry, pieces, section, Dtype::Bf16, &mut out)
                        .unwrap();
                }
                None => decoder.decode_segments(shape, &entry, pieces, Dtype::Bf16, &mut out).unwrap(),
            }
            check(decoder, &entry, &out);
        })
    };
    for entry in &entries {
        while !late.has_room() {
            assert!(finish(late, &mut decoder));
        }
        let pieces: Vec<Vec<u8>> = encoded(entry).chunks(piece_bytes).map(<[u8]>::to_vec).collect();
        Decoder::check_segments(pieces.iter().map(Vec::as_slice), entry).unwrap();
        let section = entry.section(shape).unwrap().filter(|section| late.takes(section).is_ok());
        if let Some(section) = section {
            assert!(late.submit((*entry, pieces), &section).is_ok());
        }
    }
    while late.in_flight() > 0 {
        assert!(finish(late, &mut decoder));
    }
    by_device
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn planes_decompressed_elsewhere_decode_as_those_decompressed_here(
        codec in prop::sample::select(&Codec::ALL[..]),
        // Fewer, and a section may be too short to be worth compressing.
        tokens in 40_u16..80,
        piece_bytes in 1_usize..3000,
        order in prop::collection::vec((any::<prop::sample::Index>(), prop::bool::weighted(0.2)), 1..9),
    ) {
        let planes = Planes::synthetic(3, 2, 64, tokens);
        let plane_codec = PlaneCodec { compression: Compression::Deflate, ..codec.into() };
        let mut chunk = Vec::new();
        let plane = |layer, side| planes.bytes[plane_index(layer, side)].as_slice();
        Encoder::new(plane_codec, 1).encode_chunk(&[0; 32], &planes.shape, plane, &mut chunk).unwrap();
        let mut late = Late { held: Vec::new(), order, turn: 0 };
        let by_device = decode_all(&planes.shape, &chunk, piece_bytes, &mut late);
        let entries = ChunkView::parse(&chunk).unwrap().planes();
        let sections = entries.filter(|entry| entry.section(&planes.shape).unwrap().is_some()).count();
        prop_assert_eq!(late.turn, sections);
        prop_assert!(codec != Codec::Int4 || sections == planes.shape.planes());
        prop_assert!(!codec.is_exact() || sections == 0);
        let good_turns = (0..late.turn).filter(|turn| !late.order[turn % late.order.len()].1).count();
        prop_assert_eq!(by_device, good_turns);
    }
}

const SHAPE: Shape = Shape { layers: 1, kv_heads: 2, head_dim: 64, tokens: 32, dtype: Dtype::Bf16 };
const SECTION_BYTES: usize = 2 * 64 * 32 / 2;
const SCALE_BYTES: usize = 4 * 2 * 64;
const CANARY: u8 = 0xa5;

fn deflate(bytes: &[u8], level: i32) -> Vec<u8> {
    let mut compressor = Compressor::new(CompressionLvl::new(level).unwrap());
    let mut out = vec![0; compressor.deflate_compress_bound(bytes.len())];
    let length = compressor.deflate_compress(bytes, &mut out).unwrap();
    out.truncate(length);
    out
}

/// An `int4` plane with right scales and checksum around whatever section.
fn forged(section: &[u8]) -> (PlaneEntry, Vec<u8>) {
    let planes = Planes::synthetic(1, SHAPE.kv_heads, SHAPE.head_dim, SHAPE.tokens);
    let plane_codec = PlaneCodec { compression: Compression::Deflate, ..Codec::Int4.into() };
    let mut chunk = Vec::new();
    let plane = |layer, side| planes.bytes[plane_index(layer, side)].as_slice();
    Encoder::new(plane_codec, 1).encode_chunk(&[0; 32], &SHAPE, plane, &mut chunk).unwrap();
    let entry = ChunkView::parse(&chunk).unwrap().plane(0).unwrap();
    let start = usize::try_from(entry.offset).unwrap();
    let mut encoded = chunk[start..][..SCALE_BYTES].to_vec();
    encoded.extend_from_slice(section);
    let bytes = u32::try_from(encoded.len()).unwrap();
    (PlaneEntry { bytes, crc32c: crc32c(&encoded), ..entry }, encoded)
}

fn decode(section: &[u8]) -> Result<(), DecodeError> {
    let (entry, encoded) = forged(section);
    let mut out = vec![CANARY; SHAPE.plane_bytes()];
    let decoded = Decoder::new(SHAPE.plane_bytes()).decode(&SHAPE, &entry, &encoded, Dtype::Bf16, &mut out);
    let slowly = compress::reference::decode_plane(&SHAPE, &entry, &encoded, Dtype::Bf16);
    match &decoded {
        Ok(()) => assert_eq!(slowly.as_ref(), Ok(&out)),
        Err(error) => {
            assert_eq!(slowly.as_ref().err(), Some(error));
            assert!(out.iter().all(|&byte| byte == CANARY), "{error}, but something was written");
        }
    }
    decoded
}

#[test]
fn forged_deflate_streams_are_named() {
    let codes: Vec<u8> = (0..SECTION_BYTES).map(|i| u8::try_from(i * i % 7).unwrap() * 0x11).collect();
    let good = deflate(&codes, 9);
    assert_eq!(decode(&good), Ok(()));
    let frame = |error| Err(DecodeError::Frame(error));
    for length in 1..good.len() {
        assert_eq!(decode(&good[..length]), frame(FrameError::Deflate), "cut to {length}");
    }
    let size = |got_bytes| FrameError::DeflateSize { got_bytes, expected_bytes: SECTION_BYTES };
    assert_eq!(decode(&deflate(&codes[1..], 9)), frame(size(Some(SECTION_BYTES - 1))));
    assert_eq!(decode(&deflate(&[&codes[..], &[0]].concat(), 9)), frame(size(None)));
    // A megabyte of zeros in a kilobyte: more than a thousand times what it must hold.
    let bomb = deflate(&vec![0; 1 << 20], 9);
    assert!(bomb.len() < SECTION_BYTES);
    assert_eq!(decode(&bomb), frame(size(None)));
    assert_eq!(decode(&deflate(&[], 9)), frame(size(Some(0))));
    assert_eq!(decode(&[0xff; 100]), frame(FrameError::Deflate));
    let empty_blocks = [0, 0, 0, 0xff, 0xff].repeat(100);
    assert_eq!(decode(&empty_blocks), frame(FrameError::Deflate), "stored blocks of nothing, and no end");
    let (entry, _) = forged(&good);
    let refused = DecodeError::EncodedBytes {
        codec: entry.codec,
        bytes: u32::try_from(SCALE_BYTES + SECTION_BYTES + 1).unwrap(),
        min_bytes: SCALE_BYTES + 1,
        max_bytes: SCALE_BYTES + SECTION_BYTES,
    };
    assert_eq!(decode(&vec![0; SECTION_BYTES + 1]), Err(refused));
}

#[test]
fn what_was_decompressed_elsewhere_must_fit() {
    let (entry, encoded) = forged(&deflate(&[0x21; SECTION_BYTES], 1));
    let mut decoder = Decoder::new(SHAPE.plane_bytes());
    let mut out = vec![CANARY; SHAPE.plane_bytes()];
    let section = entry.section(&SHAPE).unwrap().expect("compressed");
    assert_eq!((section.start, section.bytes), (SCALE_BYTES, SECTION_BYTES));
    assert_eq!(section.compressed_bytes, encoded.len() - SCALE_BYTES);
    for got_bytes in [0, SECTION_BYTES - 1, SECTION_BYTES + 1] {
        let bytes = vec![0; got_bytes];
        let decoded =
            decoder.decode_decompressed(&SHAPE, &entry, [encoded.as_slice()], &bytes, Dtype::Bf16, &mut out);
        assert_eq!(decoded, Err(DecodeError::Decompressed { got_bytes, expected_bytes: SECTION_BYTES }));
    }
    let bytes = [0x21; SECTION_BYTES];
    let short = &encoded[..SCALE_BYTES - 1];
    let decoded = decoder.decode_decompressed(&SHAPE, &entry, [short], &bytes, Dtype::Bf16, &mut out);
    let expected_bytes = entry.bytes;
    assert_eq!(decoded, Err(DecodeError::Length { got_bytes: SCALE_BYTES - 1, expected_bytes }));
    let mut nan = encoded.clone();
    nan[..2].copy_from_slice(&[0xff, 0x7f]);
    let decoded =
        decoder.decode_decompressed(&SHAPE, &entry, [nan.as_slice()], &bytes, Dtype::Bf16, &mut out);
    assert!(matches!(decoded, Err(DecodeError::Scale { group: 0, .. })), "{decoded:?}");
    assert!(out.iter().all(|&byte| byte == CANARY));
    let pieces = encoded.chunks(7);
    assert_eq!(decoder.decode_decompressed(&SHAPE, &entry, pieces, &bytes, Dtype::Bf16, &mut out), Ok(()));
}

#[test]
fn checksums_are_found_over_pieces() {
    let (entry, mut encoded) = forged(&deflate(&[0x43; SECTION_BYTES], 1));
    for piece_bytes in [1, 2, 7, 100, 10_000] {
        assert_eq!(Decoder::check_segments(encoded.chunks(piece_bytes), &entry), Ok(()));
    }
    let short = Decoder::check_segments([&encoded[1..]], &entry);
    assert!(matches!(short, Err(DecodeError::Length { .. })));
    encoded[3] ^= 1;
    assert!(matches!(Decoder::check_segments([encoded.as_slice()], &entry), Err(DecodeError::Crc { .. })));
}
