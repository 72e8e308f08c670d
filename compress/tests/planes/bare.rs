//! What decoding is measured against: zstd alone, over the frames of a plane.
#![allow(dead_code, reason = "the tests that share this folder don't measure")]

use std::hint::black_box;

use compress::{Codec, PlaneEntry, Quantizer, Shape};
use zstd_safe::DCtx;

/// Payload bytes of one packet on an ordinary link.
pub(crate) const SEGMENT_BYTES: usize = 1376;

/// The sections of a plane with the bytes each decompresses to, found as `docs/FORMAT.md` says.
pub(crate) fn sections<'a>(shape: &Shape, entry: &PlaneEntry, encoded: &'a [u8]) -> Vec<(&'a [u8], usize)> {
    let elements = shape.elements_per_plane();
    let groups = if entry.quantizer == Quantizer::PerChannel { shape.channels() } else { shape.head_rows() };
    match entry.codec {
        Codec::Raw => vec![(encoded, encoded.len())],
        Codec::Lossless => {
            let high = u32::from_le_bytes([encoded[0], encoded[1], encoded[2], encoded[3]]);
            let (high, low) = encoded[4..].split_at(usize::try_from(high).expect("a section in memory"));
            vec![(high, elements), (low, elements)]
        }
        Codec::Int8 => vec![(&encoded[groups * 4 + elements / 2..], elements / 2)],
        Codec::Int5 => vec![(&encoded[groups * 4 + elements / 8..], elements / 2)],
        Codec::Int4 => vec![(&encoded[groups * 4..], elements / 2)],
        Codec::Int3 => vec![(&encoded[groups * 4 + elements / 8..], elements / 4)],
        Codec::CacheGen => {
            let plain = if entry.bins > 16 { elements / 8 } else { 0 };
            vec![(&encoded[usize::from(shape.tokens) * 2 + plain..], elements / 2)]
        }
    }
}

/// Decompresses sections and does nothing else; stored ones are copied.
pub(crate) fn decompress(zstd: &mut DCtx<'_>, sections: &[(&[u8], usize)], scratch: &mut [u8]) {
    for &(section, bytes) in sections {
        if section.len() == bytes {
            scratch[..bytes].copy_from_slice(section);
        } else {
            zstd.decompress(&mut scratch[..bytes], section).expect("a frame that the encoder wrote");
        }
    }
    black_box(scratch);
}
