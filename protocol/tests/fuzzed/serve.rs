//! Requests to a store's engine.

use protocol::wire::message::MAX_CONTROL_BYTES;
use protocol::{ChunkInfo, ChunkSource, Instant, Key, ServeEngine};

use super::{message, peer, small};

/// One chunk of this many bytes.
struct Shelf(u64);

const HANDLE: u32 = 3;

impl ChunkSource for Shelf {
    fn find(&self, key: &Key) -> Option<ChunkInfo> {
        (key.0[0] == 9).then(|| ChunkInfo { handle: HANDLE, chunk_bytes: self.0, ..Default::default() })
    }

    fn chunk_bytes(&self, handle: u32) -> Option<u64> {
        (handle == HANDLE).then_some(self.0)
    }
}

/// Datagrams for a store's engine, one after the other: a byte that says from whom and of which type, a byte of length, and so many bytes. What the
/// engine then sends lies within the chunk and ends.
pub(crate) fn serve(data: &[u8]) {
    let shelf = Shelf(100_000);
    let config = small(0);
    let most_bytes = config.max_pending_bytes;
    let mut engine = ServeEngine::new(config);
    let mut rest = data;
    let mut now = Instant::ZERO;
    let mut out = vec![0; 9000];
    while let [kind, length, tail @ ..] = rest {
        let (bytes, after) = tail.split_at(tail.len().min(usize::from(*length)));
        rest = after;
        let _ = engine.handle_datagram(now, peer(kind >> 4), &message(*kind, bytes), &shelf);
        assert!(engine.pending_bytes() <= most_bytes);
        if kind & 0x40 == 0 {
            continue;
        }
        now = Instant::from_nanos(now.nanos() + 1_000_000);
        // Some of what there is to send; a segment has at least a byte.
        for _ in 0..64 {
            let Some(transmit) = engine.poll_transmit(now, &mut out) else { break };
            assert!(transmit.header_bytes <= out.len().max(MAX_CONTROL_BYTES));
            if let Some((handle, range)) = transmit.payload {
                assert!(handle == HANDLE && range.start < range.end && range.end as u64 <= shelf.0);
            }
        }
    }
}
