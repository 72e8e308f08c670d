//! Fetches and lookups from the command to its completion: splits each over the queues, gathers what they answer, ends
//! each exactly once.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use compress::Dtype;
use control::Target;
use control::{ChunkPlace, Command, Completion, Missing, MissingReason, Outcome};
use dpdk::{RingReceiver, RingSender};
use gpu_dma::{ChunkShape as SinkShape, Layout, PagedMemory, Placement, RingMemory};
use hugepages::Arena;
use protocol::{ChunkShape, Key, LookupOutcome};

use crate::job::{
    ChunkTarget, FetchPart, FetchShared, FetchTarget, LookupAnswer, LookupPart, PartId, Place, Progress,
    QueueMessage,
};
use crate::latency::Latencies;

/// The control thread's ends of the rings of one queue.
pub(crate) struct QueueEnds {
    pub(crate) messages: RingSender<Box<QueueMessage>>,
    pub(crate) answers: RingReceiver<Box<QueueMessage>>,
}

/// Who is to be told of the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    /// The session's number.
    pub(crate) session: u64,
    /// The id that the client gave its command.
    pub(crate) command: u64,
}

/// The memory of a region that a client registered.
#[derive(Debug, Clone)]
pub(crate) enum RegionMemory {
    Host(Arc<Arena>),
    Pages(Arc<PagedMemory>),
    Ring(Arc<RingMemory>),
}

/// Limits on what is admitted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FetchLimits {
    /// Fetches that the engines carry out at once.
    pub(crate) fetches: usize,
    /// Lookups likewise.
    pub(crate) lookups: usize,
    /// Chunks of one fetch.
    pub(crate) chunks_per_fetch: usize,
    /// Bytes of a decoded plane: those of a slot.
    pub(crate) plane_bytes: usize,
    /// Planes of a chunk.
    pub(crate) planes_per_chunk: usize,
}

/// A command that waits for the engines to have room.
struct Waiting {
    owner: Owner,
    deadline_ns: u64,
    work: Work,
}

enum Work {
    Fetch { shared: Arc<FetchShared>, keys: Vec<Key>, expect: ChunkShape, progress: bool },
    Lookup { keys: Vec<Key> },
}

/// A command that the engines carry out.
struct Active {
    id: PartId,
    owner: Owner,
    cancel_sent: bool,
    kind: Kind,
}

enum Kind {
    Fetch {
        shared: Arc<FetchShared>,
        /// Queues that have not answered yet.
        parts_left: usize,
        missing: BTreeMap<u32, MissingReason>,
        cancelled: bool,
        progress: bool,
        told_planes: u32,
    },
    Lookup,
}

/// Everything under way.
pub(crate) struct Fetches {
    queues: Vec<QueueEnds>,
    limits: FetchLimits,
    /// Fetches in the first `limits.fetches` slots, lookups in those after them.
    active: Vec<Option<Active>>,
    serial: u64,
    youngest_ns: u64,
    waiting: VecDeque<Waiting>,
    /// Histograms that queues have sent back since they were last taken.
    latencies: Latencies,
    latencies_due: usize,
    ended: Vec<(Owner, Completion)>,
}

impl Fetches {
    pub(crate) fn new(queues: Vec<QueueEnds>, limits: FetchLimits) -> Self {
        let slots = limits.fetches + limits.lookups;
        Self {
            queues,
            limits,
            active: (0..slots).map(|_| None).collect(),
            serial: 0,
            youngest_ns: 0,
            waiting: VecDeque::new(),
            latencies: Latencies::default(),
            latencies_due: 0,
            ended: Vec::new(),
        }
    }

    /// Messages that can be under way to or from one queue: of each slot its part and its cancel, and the histograms.
    pub(crate) fn ring_entries(limits: &FetchLimits) -> usize {
        2 * (limits.fetches + limits.lookups) + 1
    }

    /// Whether nothing is under way or waits.
    pub(crate) fn idle(&self) -> bool {
        self.waiting.is_empty() && self.active.iter().all(Option::is_none)
    }

    /// When the last command was taken up, in nanoseconds of the data plane's clock.
    pub(crate) fn youngest_ns(&self) -> u64 {
        self.youngest_ns
    }

    /// Takes up a command that `ServerSession` has checked; `region` is the memory that a fetch names.
    pub(crate) fn admit(
        &mut self,
        now_ns: u64,
        session: u64,
        command: Command,
        region: Option<RegionMemory>,
    ) {
        let owner = Owner { session, command: command.id() };
        self.youngest_ns = now_ns;
        let deadline_ns = |timeout_ms: u32| now_ns.saturating_add(u64::from(timeout_ms) * 1_000_000);
        match command {
            Command::Lookup { keys, timeout_ms, .. } => {
                let keys = keys.into_iter().map(Key).collect();
                let deadline_ns = deadline_ns(timeout_ms);
                self.waiting.push_back(Waiting { owner, deadline_ns, work: Work::Lookup { keys } });
            }
            Command::Fetch { id, timeout_ms, to, shape, chunks, progress, .. } => {
                let wanted = Wanted { command: id, to, shape, chunks: &chunks };
                match region
                    .ok_or_else(|| "the region is gone".to_owned())
                    .and_then(|region| self.plan(&region, wanted))
                {
                    Ok((shared, expect)) => {
                        let keys = chunks.iter().map(|chunk| Key(chunk.key)).collect();
                        let work = Work::Fetch { shared: Arc::new(shared), keys, expect, progress };
                        let deadline_ns = deadline_ns(timeout_ms);
                        self.waiting.push_back(Waiting { owner, deadline_ns, work });
                    }
                    Err(reason) => {
                        self.ended.push((owner, Completion::Refused { id: owner.command, reason }));
                    }
                }
            }
            Command::Cancel { .. } => self.cancel(|of| of == owner),
            Command::Save { .. } | Command::Unregister { .. } | Command::Stats { .. } => {
                unreachable!("the control thread answers these itself")
            }
        }
        self.start_waiting(now_ns);
    }

    /// Checks a fetch against the budgets and works out where its planes go.
    fn plan(&self, region: &RegionMemory, wanted: Wanted<'_>) -> Result<(FetchShared, ChunkShape), String> {
        let FetchLimits { chunks_per_fetch, plane_bytes, planes_per_chunk, .. } = self.limits;
        let Wanted { command, to, shape, chunks } = wanted;
        if chunks.len() > chunks_per_fetch {
            return Err(format!(
                "{} chunks in one fetch exceed this data plane's limit of {chunks_per_fetch}: split the fetch, or start \
                 the data plane with a larger --max-chunks",
                chunks.len()
            ));
        }
        if usize::from(shape.layers) * 2 > planes_per_chunk {
            return Err(format!(
                "{} layers exceed this data plane's limit of {}: start it with a larger --max-layers",
                shape.layers,
                planes_per_chunk / 2
            ));
        }
        let target = |place: &ChunkPlace| {
            let shape = SinkShape {
                layers: shape.layers,
                tokens: place.tokens,
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
            };
            if shape.plane_bytes() > plane_bytes as u64 {
                return Err(format!(
                    "a plane of {} bytes exceeds this data plane's slots of {plane_bytes} bytes: start it with a \
                     larger --slot-kib",
                    shape.plane_bytes()
                ));
            }
            let place = place_of(region, &to, shape, place)?;
            Ok(ChunkTarget { shape, place })
        };
        let chunks = chunks.iter().map(target).collect::<Result<Vec<_>, String>>()?;
        let target = match (region, to) {
            (RegionMemory::Host(region), Target::Host { out_dtype, .. }) => {
                let dtype = match out_dtype {
                    control::Dtype::Bf16 => Dtype::Bf16,
                    control::Dtype::F16 => Dtype::F16,
                };
                FetchTarget::Host { region: Arc::clone(region), dtype }
            }
            (RegionMemory::Pages(memory), Target::Pages { table }) => {
                FetchTarget::Pages { memory: Arc::clone(memory), table: table.into() }
            }
            (RegionMemory::Ring(memory), Target::Ring) => FetchTarget::Ring(Arc::clone(memory)),
            _ => return Err(OTHER_KIND.to_owned()),
        };
        let stored = match shape.dtype {
            control::Dtype::Bf16 => Dtype::Bf16,
            control::Dtype::F16 => Dtype::F16,
        };
        let expect = ChunkShape {
            layers: shape.layers,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            dtype: stored.wire(),
        };
        let shared = FetchShared { target, command, chunks, progress: Progress::default() };
        Ok((shared, expect))
    }

    /// Hands waiting commands to the queues while there is room; ends those whose deadline has passed.
    fn start_waiting(&mut self, now_ns: u64) {
        let mut still_waiting = VecDeque::new();
        while let Some(waiting) = self.waiting.pop_front() {
            if waiting.deadline_ns <= now_ns {
                self.end_unstarted(waiting, MissingReason::Deadline);
                continue;
            }
            match self.free_slot(&waiting.work) {
                Some(slot) => self.start(slot, waiting),
                None => still_waiting.push_back(waiting),
            }
        }
        self.waiting = still_waiting;
    }

    fn free_slot(&self, work: &Work) -> Option<usize> {
        let slots = match work {
            Work::Fetch { .. } => 0..self.limits.fetches,
            Work::Lookup { .. } => self.limits.fetches..self.active.len(),
        };
        slots.into_iter().find(|&slot| self.active[slot].is_none())
    }

    fn start(&mut self, slot: usize, Waiting { owner, deadline_ns, work }: Waiting) {
        self.serial += 1;
        let id = PartId::new(slot, self.serial);
        let kind = match work {
            Work::Fetch { shared, keys, expect, progress } => {
                for queue in &mut self.queues {
                    let part = FetchPart {
                        id,
                        deadline_ns,
                        fetch: Arc::clone(&shared),
                        missing: Vec::with_capacity(keys.len()),
                        keys: keys.clone(),
                        expect,
                        cancelled: false,
                    };
                    send(queue, QueueMessage::Fetch(part));
                }
                Kind::Fetch {
                    shared,
                    parts_left: self.queues.len(),
                    missing: BTreeMap::new(),
                    cancelled: false,
                    progress,
                    told_planes: 0,
                }
            }
            Work::Lookup { keys } => {
                // Lookups go round the queues.
                let index = slot % self.queues.len();
                let queue = &mut self.queues[index];
                send(queue, QueueMessage::Lookup(LookupPart { id, deadline_ns, keys, answer: None }));
                Kind::Lookup
            }
        };
        self.active[slot] = Some(Active { id, owner, cancel_sent: false, kind });
    }

    /// Ends a command that no queue has heard of.
    fn end_unstarted(&mut self, Waiting { owner, work, .. }: Waiting, reason: MissingReason) {
        let id = owner.command;
        let completion = match work {
            Work::Fetch { keys, .. } => {
                let outcome =
                    if reason == MissingReason::Cancelled { Outcome::Cancelled } else { Outcome::Failed };
                let chunks = 0..u32::try_from(keys.len()).unwrap_or(u32::MAX);
                let missing = chunks.map(|chunk| Missing { chunk, reason }).collect::<Vec<_>>();
                let message = end_message(outcome, &missing, keys.len());
                Completion::Ended {
                    id,
                    outcome,
                    planes: 0,
                    encoded_bytes: 0,
                    delivered_bytes: 0,
                    missing,
                    message,
                }
            }
            Work::Lookup { .. } => {
                Completion::LookupFailed { id, message: format!("the lookup ended: {reason}") }
            }
        };
        self.ended.push((owner, completion));
    }

    /// Cancels what `whose` picks; each ends as usual.
    pub(crate) fn cancel(&mut self, whose: impl Fn(Owner) -> bool) {
        let (picked, waiting) = self.waiting.drain(..).partition(|waiting| whose(waiting.owner));
        self.waiting = waiting;
        let picked: VecDeque<Waiting> = picked;
        for waiting in picked {
            self.end_unstarted(waiting, MissingReason::Cancelled);
        }
        for active in self.active.iter_mut().flatten() {
            if !whose(active.owner) || std::mem::replace(&mut active.cancel_sent, true) {
                continue;
            }
            match active.kind {
                Kind::Fetch { .. } => {
                    self.queues
                        .iter_mut()
                        .for_each(|queue| send(queue, QueueMessage::CancelFetch(active.id)));
                }
                Kind::Lookup => {
                    let index = active.id.slot() % self.queues.len();
                    let queue = &mut self.queues[index];
                    send(queue, QueueMessage::CancelLookup(active.id));
                }
            }
        }
    }

    /// Asks every queue for its histograms; [`Fetches::latencies`] has them some polls later.
    pub(crate) fn ask_latencies(&mut self) {
        if self.latencies_due == 0 {
            self.latencies_due = self.queues.len();
            for queue in &mut self.queues {
                send(queue, QueueMessage::Latencies(Latencies::default()));
            }
        }
    }

    /// All that was recorded until the queues last answered, once all have.
    pub(crate) fn latencies(&self) -> Option<&Latencies> {
        (self.latencies_due == 0).then_some(&self.latencies)
    }

    /// Fetches that want to be told of progress and have made some.
    pub(crate) fn progress(&mut self) -> Vec<(Owner, Completion)> {
        let mut news = Vec::new();
        for active in self.active.iter_mut().flatten() {
            if let Kind::Fetch { shared, progress: true, told_planes, .. } = &mut active.kind {
                let (planes, encoded_bytes, delivered_bytes) = shared.progress.get();
                if planes != *told_planes {
                    *told_planes = planes;
                    let id = active.owner.command;
                    news.push((
                        active.owner,
                        Completion::Progress { id, planes, encoded_bytes, delivered_bytes },
                    ));
                }
            }
        }
        news
    }

    /// Gathers what the queues have answered and returns what has ended since the last call.
    pub(crate) fn poll(&mut self, now_ns: u64) -> Vec<(Owner, Completion)> {
        for queue in 0..self.queues.len() {
            while let Some(message) = self.queues[queue].answers.dequeue() {
                match *message {
                    QueueMessage::Fetch(part) => self.take_part(part),
                    QueueMessage::Lookup(part) => self.take_lookup(&part),
                    QueueMessage::Latencies(latencies) => {
                        self.latencies.merge(&latencies);
                        self.latencies_due -= 1;
                    }
                    QueueMessage::CancelFetch(_) | QueueMessage::CancelLookup(_) => {}
                }
            }
        }
        self.start_waiting(now_ns);
        std::mem::take(&mut self.ended)
    }

    fn take_part(&mut self, part: FetchPart) {
        let slot = part.id.slot();
        let Some(Active { owner, kind: Kind::Fetch { shared, parts_left, missing, cancelled, .. }, .. }) =
            &mut self.active[slot]
        else {
            unreachable!("a queue answers only what it was sent");
        };
        for (chunk, reason) in part.missing {
            missing.entry(chunk).or_insert(reason);
        }
        *cancelled |= part.cancelled;
        *parts_left -= 1;
        if *parts_left > 0 {
            return;
        }
        let (planes, encoded_bytes, delivered_bytes) = shared.progress.get();
        let missing: Vec<Missing> =
            missing.iter().map(|(&chunk, &reason)| Missing { chunk, reason }).collect();
        let outcome = match (*cancelled, missing.is_empty()) {
            (true, _) => Outcome::Cancelled,
            (false, true) => Outcome::Done,
            (false, false) => Outcome::Failed,
        };
        let message = end_message(outcome, &missing, shared.chunks.len());
        let id = owner.command;
        let completion =
            Completion::Ended { id, outcome, planes, encoded_bytes, delivered_bytes, missing, message };
        self.ended.push((*owner, completion));
        self.active[slot] = None;
    }

    fn take_lookup(&mut self, part: &LookupPart) {
        let Some(active) = self.active[part.id.slot()].take() else {
            unreachable!("a queue answers only what it was sent");
        };
        let id = active.owner.command;
        let completion = match part.answer {
            Some(LookupAnswer { outcome: LookupOutcome::Done, found, encoded_bytes, last }) => {
                looked_up(id, found, encoded_bytes, last)
            }
            Some(LookupAnswer { outcome: LookupOutcome::Cancelled, .. }) => {
                Completion::LookupFailed { id, message: "the lookup was cancelled".into() }
            }
            Some(LookupAnswer { outcome: LookupOutcome::Unreachable, .. }) => Completion::LookupFailed {
                id,
                message: "no store can be reached, the network says (ICMP): see that one runs, and that --store names its \
                          address and port"
                    .into(),
            },
            Some(LookupAnswer { outcome: LookupOutcome::Deadline, .. }) | None => Completion::LookupFailed {
                id,
                message: "the store did not answer in time: see that it runs, that --store names it, and that the link \
                          is up"
                    .into(),
            },
        };
        self.ended.push((active.owner, completion));
    }
}

/// What a fetch command says, apart from its region.
struct Wanted<'a> {
    command: u64,
    to: Target,
    shape: control::Shape,
    chunks: &'a [ChunkPlace],
}

const OTHER_KIND: &str = "the region is of another kind than the fetch says";

/// Where a chunk lies in a region. Pages and entries were checked with the command (`control::check`).
fn place_of(
    region: &RegionMemory,
    to: &Target,
    shape: SinkShape,
    place: &ChunkPlace,
) -> Result<Place, String> {
    match (region, to) {
        (RegionMemory::Host(region), Target::Host { layout, .. }) => {
            let control::Layout { layer, side, token, head } = *layout;
            let layout = Layout { layer, side, token, head };
            Placement::new(layout, shape, place.offset, region.bytes() as u64)
                .map(Place::At)
                .map_err(|fault| fault.to_string())
        }
        (RegionMemory::Pages(_), Target::Pages { .. }) => Ok(Place::FirstToken(place.offset)),
        (RegionMemory::Ring(_), Target::Ring) => Ok(Place::Next),
        _ => Err(OTHER_KIND.to_owned()),
    }
}

fn looked_up(id: u64, found: u32, encoded_bytes: u64, last: Option<protocol::ChunkInfo>) -> Completion {
    let Some(info) = last.filter(|_| found > 0) else {
        return Completion::LookedUp {
            id,
            found: 0,
            last_tokens: 0,
            encoded_bytes: 0,
            shape: None,
            codec: None,
        };
    };
    let dtype = Dtype::from_wire(info.dtype).map(|dtype| match dtype {
        Dtype::Bf16 => control::Dtype::Bf16,
        Dtype::F16 => control::Dtype::F16,
    });
    let codec = compress::Codec::from_wire(info.codec).map(|codec| match codec {
        compress::Codec::Raw => control::Codec::Raw,
        compress::Codec::Lossless => control::Codec::Lossless,
        compress::Codec::Int8 => control::Codec::Int8,
        compress::Codec::Int5 => control::Codec::Int5,
        compress::Codec::Int4 => control::Codec::Int4,
        compress::Codec::Int3 => control::Codec::Int3,
        compress::Codec::CacheGen => control::Codec::CacheGen,
    });
    let (Some(dtype), Some(codec)) = (dtype, codec) else {
        let message =
            "the store's chunks have an element type or codec that this data plane does not know".into();
        return Completion::LookupFailed { id, message };
    };
    let shape =
        control::Shape { layers: info.layers, kv_heads: info.kv_heads, head_dim: info.head_dim, dtype };
    let (last_tokens, shape, codec) = (info.tokens, Some(shape), Some(codec));
    Completion::LookedUp { id, found, last_tokens, encoded_bytes, shape, codec }
}

/// What a person is told of a fetch's end.
fn end_message(outcome: Outcome, missing: &[Missing], chunks: usize) -> String {
    match (outcome, missing.first()) {
        (Outcome::Cancelled, _) => "the fetch was cancelled".into(),
        (_, None) => String::new(),
        (_, Some(first)) => {
            format!(
                "{} of {chunks} chunks did not arrive; chunk {}: {}",
                missing.len(),
                first.chunk,
                first.reason
            )
        }
    }
}

fn send(queue: &mut QueueEnds, message: QueueMessage) {
    let sent = queue.messages.enqueue(Box::new(message));
    assert!(sent.is_ok(), "the ring has room for every message that can be under way");
}
