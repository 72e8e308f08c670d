//! What travels between the stages: one [`PlaneJob`] per plane in flight, and per queue one [`FetchPart`] of each
//! fetch. Both are made before they are needed and go round in rings, so no stage allocates or shares.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use compress::{Dtype, OutDtype, PlaneEntry, Shape};
use control::{ElementType, MissingReason};
use dpdk::{Burst, DeviceBuffer, Mbuf};
use gpu_dma::{
    ChunkShape as SinkShape, Destination, PagedMemory, Placement, ReceiveMemory, Received, RingMemory,
    SlotOrder,
};
use hugepages::{Arena, Slot};
use protocol::{ChunkFailure, ChunkInfo, ChunkShape, Key, LookupOutcome, StoreIndex, TransferId};

use crate::latency::{Latencies, PlaneTimes};

/// What one fetch wants, shared read-only by every stage, and how far it has come.
pub(crate) struct FetchShared {
    /// Where its planes go.
    pub(crate) target: FetchTarget,
    /// What the client calls it.
    pub(crate) command: u64,
    /// Its chunks, in the order that the client named them.
    pub(crate) chunks: Vec<ChunkTarget>,
    /// Progress, for whoever wants to know.
    pub(crate) progress: Progress,
}

impl FetchShared {
    /// Whether a chunk as stored has the shape that the client made room for.
    pub(crate) fn expects(&self, chunk: usize, stored: &Shape) -> bool {
        self.chunks.get(chunk).is_some_and(|target| {
            let expected = &target.shape;
            (expected.layers, expected.tokens, expected.kv_heads, expected.head_dim)
                == (stored.layers, stored.tokens, stored.kv_heads, stored.head_dim)
        })
    }

    /// Where the planes of a chunk go.
    pub(crate) fn destination(&self, chunk: usize) -> Destination {
        let ChunkTarget { shape, place } = self.chunks[chunk];
        match (&self.target, place) {
            (FetchTarget::Host { region, .. }, Place::At(placement)) => {
                Destination::Host { region: Arc::clone(region), placement }
            }
            (FetchTarget::Pages { memory, table }, Place::FirstToken(first_token)) => Destination::Pages {
                memory: Arc::clone(memory),
                table: Arc::clone(table),
                first_token,
                tokens: shape.tokens,
            },
            (FetchTarget::Ring(memory), Place::Next) => Destination::Ring {
                memory: Arc::clone(memory),
                fetch: self.command,
                chunk: u32::try_from(chunk).unwrap_or(u32::MAX),
                shape,
            },
            _ => unreachable!("a fetch is planned for one kind of memory"),
        }
    }

    /// The element type that the client wants of a plane.
    pub(crate) fn out_dtype(&self, plane: usize) -> OutDtype {
        match &self.target {
            FetchTarget::Host { dtype, .. } => OutDtype::from(*dtype),
            FetchTarget::Pages { memory, .. } => {
                let layer = memory.kv().layers.get(plane / 2);
                let base = layer.map(|layer| if plane.is_multiple_of(2) { layer.k } else { layer.v });
                out_dtype(memory.kv().element, base.map_or(1.0, |base| base.scale.get()))
            }
            FetchTarget::Ring(memory) => out_dtype(memory.ring().element, 1.0),
        }
    }

    /// Whether nothing but a DMA engine reads the slots of this fetch's planes.
    pub(crate) fn only_dma_reads(&self) -> bool {
        !matches!(self.target, FetchTarget::Host { .. })
    }

    /// The cache and the chunk's first token in its page table, if a decoded plane is to be put in the order of pages.
    pub(crate) fn by_page(&self, chunk: usize) -> Option<(&PagedMemory, u64)> {
        match (&self.target, self.chunks.get(chunk)?.place) {
            (FetchTarget::Pages { memory, .. }, Place::FirstToken(first))
                if memory.order() == SlotOrder::Pages =>
            {
                Some((memory, first))
            }
            _ => None,
        }
    }
}

fn out_dtype(element: ElementType, scale: f32) -> OutDtype {
    match element {
        ElementType::Bf16 => OutDtype::Bf16,
        ElementType::F16 => OutDtype::F16,
        ElementType::Fp8E4m3 => OutDtype::Fp8E4M3 { scale },
    }
}

/// The memory that a fetch fills.
#[derive(Debug, Clone)]
pub(crate) enum FetchTarget {
    /// Shared with this machine's CPUs, and the element type to write there.
    Host { region: Arc<Arena>, dtype: Dtype },
    /// A paged KV cache, and the pages of this fetch; checked against each other.
    Pages { memory: Arc<PagedMemory>, table: Arc<[u32]> },
    /// A ring.
    Ring(Arc<RingMemory>),
}

/// One chunk of a fetch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChunkTarget {
    /// Its extents.
    pub(crate) shape: SinkShape,
    /// Where its planes go; checked against the target.
    pub(crate) place: Place,
}

/// A chunk's place in the memory of its fetch.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    /// In host memory.
    At(Placement),
    /// In pages: its first token, counted from the page table's start.
    FirstToken(u64),
    /// In a ring: wherever there is room.
    Next,
}

/// Counts that the receive lcores add to as planes are delivered.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    planes: AtomicU32,
    encoded_bytes: AtomicU64,
    delivered_bytes: AtomicU64,
}

impl Progress {
    pub(crate) fn add_plane(&self, encoded_bytes: u64, delivered_bytes: u64) {
        self.planes.fetch_add(1, Relaxed);
        self.encoded_bytes.fetch_add(encoded_bytes, Relaxed);
        self.delivered_bytes.fetch_add(delivered_bytes, Relaxed);
    }

    /// Planes, encoded bytes, delivered bytes.
    pub(crate) fn get(&self) -> (u32, u64, u64) {
        (self.planes.load(Relaxed), self.encoded_bytes.load(Relaxed), self.delivered_bytes.load(Relaxed))
    }
}

/// How a plane's way through decoding and delivery ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum PlaneOutcome {
    /// Still under way.
    #[default]
    Pending,
    /// Every byte is at its place in the sink.
    Delivered,
    /// The checksum or length is wrong: worth fetching again.
    Corrupt,
    /// The checksum is right but the plane cannot be decoded: fetching again would not help.
    Undecodable,
    /// The chunk holds another number of tokens than the client made room for.
    OtherShape,
    /// Decoded, and could not be copied to where it was to go.
    NotDelivered,
}

/// A plane on its way from the packets to the sink. There is one for every transfer that a queue can have under
/// way; it goes rx -> decode -> dma -> rx and is never freed.
#[derive(Default)]
pub(crate) struct PlaneJob {
    /// The queue it returns to.
    pub(crate) queue: usize,
    /// The transfer that the queue's engine knows it by.
    pub(crate) transfer: Option<TransferId>,
    /// Its fetch, while it has one.
    pub(crate) fetch: Option<Arc<FetchShared>>,
    /// Its chunk within the fetch.
    pub(crate) chunk: usize,
    /// Its plane within the chunk.
    pub(crate) plane: usize,
    /// The chunk's shape.
    pub(crate) shape: Option<Shape>,
    /// How it is encoded.
    pub(crate) entry: Option<PlaneEntry>,
    /// The packets, by segment, trimmed to their data; `None` beyond those of this plane.
    pub(crate) segments: Box<[Option<Mbuf>]>,
    /// Packets of this plane, once all have arrived.
    pub(crate) segment_count: usize,
    /// Those of them, chained, that a compression device reads or has read.
    pub(crate) tail: Option<Mbuf>,
    /// Of a plane that is received into GPU memory: its segments, and how many there are. Without GPUDirect there is room for none.
    pub(crate) buffers: Box<[Option<DeviceBuffer>]>,
    pub(crate) buffer_count: usize,
    /// The same plane as a sink takes it.
    pub(crate) received: Option<Box<Received>>,
    /// Where its segments were asked to come to.
    pub(crate) route: Option<Route>,
    /// The decoded plane, between decode and dma.
    pub(crate) slot: Option<Box<Slot>>,
    /// Bytes of the decoded plane.
    pub(crate) decoded_bytes: usize,
    /// How it ended.
    pub(crate) outcome: PlaneOutcome,
    /// When it passed what.
    pub(crate) times: PlaneTimes,
}

impl PlaneJob {
    /// A job of queue `queue` with room for planes of `max_segments` packets.
    pub(crate) fn new(queue: usize, max_segments: usize) -> Box<Self> {
        let segments = (0..max_segments).map(|_| None).collect();
        Box::new(Self { queue, segments, ..Self::default() })
    }

    /// Gives it room for the segments of a plane in GPU memory.
    pub(crate) fn receive_into(&mut self, memory: &Arc<ReceiveMemory>) {
        let most = self.segments.len();
        self.buffers = (0..most).map(|_| None).collect();
        self.received = Some(Box::new(Received::new(Arc::clone(memory), most)));
    }

    /// The encoded plane, piece by piece.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        let packets = self.segments[..self.segment_count].iter().flatten().flat_map(Mbuf::segments);
        packets.chain(self.tail.iter().flat_map(Mbuf::segments))
    }

    /// Chains the packets from the one that holds byte `start` of the encoded plane on and takes them out, with where in the first of them that
    /// byte lies. `None`, and nothing is changed, if there is no such byte or the packets are too many for a chain.
    pub(crate) fn take_tail(&mut self, start: usize) -> Option<(Mbuf, usize)> {
        let mut offset = start;
        let mut packets = self.segments[..self.segment_count].iter().flatten();
        let first = packets.position(|packet| {
            let is_here = offset < packet.total_bytes();
            offset -= if is_here { 0 } else { packet.total_bytes() };
            is_here
        })?;
        if self.segment_count - first > usize::from(u16::MAX) {
            return None;
        }
        // From the back: a chain is appended to a single buffer, whose end need not be looked for.
        let mut tail: Option<Mbuf> = None;
        for packet in self.segments[first..self.segment_count].iter_mut().rev() {
            let Some(mut packet) = packet.take() else { continue };
            if let Some(rest) = tail {
                assert!(packet.chain(rest).is_ok(), "no more buffers than a chain can have");
            }
            tail = Some(packet);
        }
        tail.map(|tail| (tail, offset))
    }

    /// Gives the packets back to their pool: those of the plane if it is whole, else whatever arrived.
    pub(crate) fn drop_segments(&mut self) {
        self.tail = None;
        if self.buffer_count > 0 {
            self.buffers.iter_mut().for_each(|buffer| *buffer = None);
            self.buffer_count = 0;
        }
        let end = if self.segment_count > 0 { self.segment_count } else { self.segments.len() };
        let mut burst = Burst::new();
        for mbuf in self.segments[..end].iter_mut().filter_map(Option::take) {
            // There is room: it is emptied whenever it is full.
            let _ = burst.push(mbuf);
            if burst.is_full() {
                burst.clear();
            }
        }
        self.segment_count = 0;
    }
}

/// What was decided when a plane's first segments were asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route {
    /// The tag that it is pulled under.
    pub(crate) tag: u32,
    /// The store that it is pulled from.
    pub(crate) store: StoreIndex,
    /// Whether it is to be received into GPU memory.
    pub(crate) is_direct: bool,
}

/// What the control thread and a queue say to each other. The queue answers every message by sending it back, filled
/// in, so that only the control thread allocates and frees.
#[expect(clippy::large_enum_variant, reason = "always boxed, and few at a time")]
pub(crate) enum QueueMessage {
    /// Fetch this queue's share; comes back when it has ended.
    Fetch(FetchPart),
    /// Look up; comes back with the answer.
    Lookup(LookupPart),
    /// Cancel a fetch; comes back at once, the fetch itself when it has ended.
    CancelFetch(PartId),
    /// Cancel a lookup, likewise.
    CancelLookup(PartId),
    /// Exchange the histograms for these.
    Latencies(Latencies),
}

/// The control thread's name for a fetch or lookup: the slot it takes in every queue, and a number that no other
/// that ever had the slot shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PartId(pub(crate) u64);

impl PartId {
    pub(crate) fn new(slot: usize, serial: u64) -> Self {
        Self((serial << 16) | slot as u64)
    }

    pub(crate) fn slot(self) -> usize {
        let [low, high, ..] = self.0.to_le_bytes();
        usize::from(u16::from_le_bytes([low, high]))
    }
}

/// The share of a fetch that one queue carries out.
pub(crate) struct FetchPart {
    pub(crate) id: PartId,
    /// When it must have ended, in nanoseconds of the data plane's clock.
    pub(crate) deadline_ns: u64,
    /// What is wanted.
    pub(crate) fetch: Arc<FetchShared>,
    /// The keys, in the order of the chunks.
    pub(crate) keys: Vec<Key>,
    /// The shape that the client expects.
    pub(crate) expect: ChunkShape,
    /// Chunks that did not arrive whole through this queue; room for all of them from the start.
    pub(crate) missing: Vec<(u32, MissingReason)>,
    /// Whether it was cancelled.
    pub(crate) cancelled: bool,
}

impl FetchPart {
    /// Notes every chunk as missing for `reason`.
    pub(crate) fn miss_all(&mut self, reason: MissingReason) {
        self.missing.clear();
        self.missing.extend((0..).take(self.keys.len()).map(|chunk| (chunk, reason)));
    }
}

/// A lookup.
pub(crate) struct LookupPart {
    pub(crate) id: PartId,
    /// When it must have ended, in nanoseconds of the data plane's clock.
    pub(crate) deadline_ns: u64,
    /// The keys, in the order of the chunks.
    pub(crate) keys: Vec<Key>,
    /// Filled in by the queue.
    pub(crate) answer: Option<LookupAnswer>,
}

/// What the store said.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LookupAnswer {
    /// How the lookup ended.
    pub(crate) outcome: LookupOutcome,
    /// Leading keys that are stored.
    pub(crate) found: u32,
    /// Encoded bytes of those chunks.
    pub(crate) encoded_bytes: u64,
    /// The last of those chunks.
    pub(crate) last: Option<ChunkInfo>,
}

/// Numbers that the receive stage gives to [`protocol::Verdict::Rejected`].
pub(crate) const REJECTED_UNDECODABLE: u8 = 0;
/// The chunk holds another number of tokens than expected.
pub(crate) const REJECTED_SHAPE: u8 = 1;
/// The sink could not put the plane in its place.
pub(crate) const REJECTED_BY_SINK: u8 = 2;

/// The client's word for why a chunk is missing.
pub(crate) fn missing_reason(failure: ChunkFailure) -> MissingReason {
    match failure {
        ChunkFailure::NotStored => MissingReason::NotStored,
        ChunkFailure::Deadline => MissingReason::Deadline,
        ChunkFailure::Unreachable => MissingReason::StoreUnreachable,
        ChunkFailure::Corrupt => MissingReason::Corrupt,
        ChunkFailure::ShapeMismatch | ChunkFailure::Rejected(REJECTED_SHAPE) => MissingReason::ShapeMismatch,
        ChunkFailure::Rejected(REJECTED_BY_SINK) => MissingReason::NotDelivered,
        ChunkFailure::BadHeader
        | ChunkFailure::TooLarge
        | ChunkFailure::Refused(_)
        | ChunkFailure::Rejected(_) => MissingReason::Undecodable,
        ChunkFailure::Cancelled => MissingReason::Cancelled,
    }
}
