//! Whether a chunk that was put is what it should be, before anybody can see it.

use std::ops::Range;

use compress::{ChunkView, FormatError};
use protocol::{ChunkInfo, Key};

/// What is wrong with a chunk.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Damaged on the way, in these places, in their order.
    Corrupt(Vec<Range<u64>>),
    /// Intact, and not what was offered.
    Bad,
}

/// Checks the header's checksum, the format, that the header names `key` and the sizes offered, and the checksum of every
/// plane. Returns what lookups are to be told, without a handle.
pub(crate) fn check(bytes: &[u8], key: &Key, header_bytes: u32) -> Result<ChunkInfo, Fault> {
    let view = ChunkView::parse(bytes).map_err(|error| match error {
        // Before the checksum is known to be right, nothing else that is wrong means anything.
        FormatError::Truncated { .. }
        | FormatError::Magic(_)
        | FormatError::Version(_)
        | FormatError::Size { .. }
        | FormatError::HeaderCrc { .. } => {
            Fault::Corrupt(std::iter::once(0..u64::from(header_bytes)).collect())
        }
        _ => Fault::Bad,
    })?;
    let chunk_bytes = bytes.len() as u64;
    if *view.key() != key.0
        || view.chunk_bytes() != chunk_bytes
        || view.header_bytes() as u64 != u64::from(header_bytes)
    {
        return Err(Fault::Bad);
    }
    let is_wrong = |range: &Range<u64>, crc32c: u32| {
        let range = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
        let plane = range.and_then(|(start, end)| bytes.get(start..end));
        plane.is_none_or(|plane| compress::crc32c(plane) != crc32c)
    };
    let wrong: Vec<Range<u64>> = view
        .planes()
        .map(|entry| (entry.offset..entry.offset + u64::from(entry.bytes), entry.crc32c))
        .filter(|(range, crc32c)| is_wrong(range, *crc32c))
        .map(|(range, _)| range)
        .collect();
    if !wrong.is_empty() {
        return Err(Fault::Corrupt(wrong));
    }
    Ok(chunk_info(&view, header_bytes))
}

fn chunk_info(view: &ChunkView<'_>, header_bytes: u32) -> ChunkInfo {
    let shape = view.shape();
    ChunkInfo {
        handle: 0,
        header_bytes,
        chunk_bytes: view.chunk_bytes(),
        tokens: shape.tokens,
        layers: shape.layers,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        dtype: shape.dtype.wire(),
        codec: view.plane(0).map_or(0, |plane| plane.codec.wire()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use compress::{Codec, Dtype, Encoder, Shape};

    fn encoded() -> (Key, Vec<u8>, u32) {
        let shape = Shape { layers: 2, kv_heads: 1, head_dim: 8, tokens: 16, dtype: Dtype::Bf16 };
        let plane: Vec<u8> = (0..shape.plane_bytes()).map(|at| [at.to_le_bytes()[0], 0x3f][at % 2]).collect();
        let (key, mut bytes) = (Key([7; 32]), Vec::new());
        Encoder::new(Codec::Int4, 1).encode_chunk(&key.0, &shape, |_, _| &plane, &mut bytes).unwrap();
        let header_bytes = ChunkView::parse(&bytes).unwrap().header_bytes();
        (key, bytes, u32::try_from(header_bytes).unwrap())
    }

    #[test]
    fn an_intact_chunk_passes_and_another_name_or_size_does_not() {
        let (key, bytes, header_bytes) = encoded();
        let info = check(&bytes, &key, header_bytes).unwrap();
        assert_eq!((info.layers, info.tokens, info.chunk_bytes), (2, 16, bytes.len() as u64));
        assert_eq!(check(&bytes, &Key([8; 32]), header_bytes), Err(Fault::Bad));
        assert_eq!(check(&bytes, &key, header_bytes - 1), Err(Fault::Bad));
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(check(&longer, &key, header_bytes), Err(Fault::Bad));
    }

    #[test]
    fn every_flipped_bit_is_found_where_it_is() {
        let (key, bytes, header_bytes) = encoded();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            let Err(Fault::Corrupt(wrong)) = check(&damaged, &key, header_bytes) else {
                panic!("damage at {at} passed as intact or as sent");
            };
            assert!(
                wrong.iter().any(|range| range.contains(&(at as u64))),
                "damage at {at}, found {wrong:?}"
            );
        }
    }
}
