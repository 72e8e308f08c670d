//! Tells the protocol engine where the planes of a chunk lie, which only the chunk's format knows.

use compress::ChunkView;
use protocol::chunk::BadHeader;
use protocol::{ChunkInfo, ChunkLayout, Key, PlaneRange, PlaneRanges};

/// The format of crate `compress`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct EncodedChunks;

impl ChunkLayout for EncodedChunks {
    fn planes(
        &self,
        key: &Key,
        header: &[u8],
        info: &ChunkInfo,
        out: &mut PlaneRanges,
    ) -> Result<(), BadHeader> {
        let chunk = ChunkView::parse(header).map_err(|_| BadHeader)?;
        let shape = chunk.shape();
        let told = (info.layers, info.kv_heads, info.head_dim, info.tokens, info.dtype);
        let found = (shape.layers, shape.kv_heads, shape.head_dim, shape.tokens, shape.dtype.wire());
        if *chunk.key() != key.0 || told != found {
            return Err(BadHeader);
        }
        for entry in chunk.planes() {
            out.push(PlaneRange { offset: entry.offset, bytes: entry.bytes }).map_err(|_| BadHeader)?;
        }
        Ok(())
    }
}
