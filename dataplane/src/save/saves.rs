//! Saves from the command to its completion, on the control thread: gives chunks to the encoders as there are buffers for
//! them, and gathers how each ended.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use compress::{Codec, Codecs, Dtype, PlaneCodec, Profile, Shape};
use control::{
    ChunkPlace, Command, Completion, FewerCopies, NotSaved, NotSavedReason, Outcome, SaveCodec, SaveFrom,
};
use dpdk::Ring;
use gpu_dma::{ChunkShape as PlaceShape, Layout, Origin, PagedMemory, Placement};
use hugepages::Arena;
use protocol::Key;

use crate::fetches::{Owner, RegionMemory};
use crate::save::job::{Copies, SaveChunk, SaveJob, SaveOutcome, SaveShared};

/// Limits on what is admitted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SaveLimits {
    /// Chunks being encoded or offered at once.
    pub(crate) chunks: usize,
    /// Bytes of an encoded chunk.
    pub(crate) chunk_bytes: usize,
    /// Bytes of a plane: those of a slot.
    pub(crate) plane_bytes: usize,
    /// Planes of a chunk.
    pub(crate) planes_per_chunk: usize,
}

/// One save.
struct Active {
    owner: Owner,
    shared: Arc<SaveShared>,
    /// The first chunk that was not sent out.
    next: usize,
    /// Chunks that are away.
    away: usize,
    stored: u32,
    already_stored: u32,
    encoded_bytes: u64,
    not_saved: Vec<NotSaved>,
    fewer_copies: Vec<FewerCopies>,
}

/// Everything under way.
pub(crate) struct Saves {
    limits: SaveLimits,
    /// Those with chunks to send out take turns.
    active: VecDeque<Active>,
    free: VecDeque<Box<SaveJob>>,
    chunks: Ring<Box<SaveJob>>,
    returned: Ring<Box<SaveJob>>,
    ended: Vec<(Owner, Completion)>,
}

impl Saves {
    pub(crate) fn new(limits: SaveLimits, chunks: Ring<Box<SaveJob>>, returned: Ring<Box<SaveJob>>) -> Self {
        let free = (0..limits.chunks).map(|_| SaveJob::new(limits.chunk_bytes)).collect();
        Self { limits, active: VecDeque::new(), free, chunks, returned, ended: Vec::new() }
    }

    /// Whether nothing is under way.
    pub(crate) fn idle(&self) -> bool {
        self.active.is_empty() && self.ended.is_empty()
    }

    /// Buffers that no chunk is in.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes up a [`Command::Save`] that `ServerSession` has checked; `region` is the memory that it names.
    pub(crate) fn admit(
        &mut self,
        now_ns: u64,
        session: u64,
        command: &Command,
        region: Option<&RegionMemory>,
    ) {
        let owner = Owner { session, command: command.id() };
        let planned = region
            .ok_or_else(|| "the region is gone".to_owned())
            .and_then(|region| self.plan(now_ns, command, region));
        match planned {
            Ok(shared) => self.active.push_back(Active {
                owner,
                shared: Arc::new(shared),
                next: 0,
                away: 0,
                stored: 0,
                already_stored: 0,
                encoded_bytes: 0,
                not_saved: Vec::new(),
                fewer_copies: Vec::new(),
            }),
            Err(reason) => self.ended.push((owner, Completion::Refused { id: owner.command, reason })),
        }
    }

    /// Checks a save against the budgets and works out where its planes are.
    fn plan(&self, now_ns: u64, command: &Command, region: &RegionMemory) -> Result<SaveShared, String> {
        let Command::Save { timeout_ms, from, shape, codec, chunks, .. } = command else {
            unreachable!("only saves are given to `admit`")
        };
        let SaveLimits { chunks: buffers, plane_bytes, planes_per_chunk, .. } = self.limits;
        if buffers == 0 {
            return Err("this data plane saves nothing: start it with --save-chunks 1 or more".to_owned());
        }
        if usize::from(shape.layers) * 2 > planes_per_chunk {
            return Err(format!(
                "{} layers exceed this data plane's limit of {}: start it with a larger --max-layers",
                shape.layers,
                planes_per_chunk / 2
            ));
        }
        let codecs = codecs_of(codec)?;
        codecs.check(shape.layers, shape.kv_heads, shape.head_dim).map_err(|error| error.to_string())?;
        let place = Place::of(region, from)?;
        let chunk = |at: &ChunkPlace| {
            let (layers, kv_heads, head_dim, tokens) =
                (shape.layers, shape.kv_heads, shape.head_dim, at.tokens);
            let dtype = match shape.dtype {
                control::Dtype::Bf16 => Dtype::Bf16,
                control::Dtype::F16 => Dtype::F16,
            };
            let encoded = Shape { layers, kv_heads, head_dim, tokens, dtype };
            if encoded.plane_bytes() > plane_bytes {
                return Err(format!(
                    "a plane of {} bytes exceeds this data plane's slots of {plane_bytes} bytes: start it with a larger \
                     --slot-kib",
                    encoded.plane_bytes()
                ));
            }
            let from = place.origin(PlaceShape { layers, tokens, kv_heads, head_dim }, at.offset)?;
            Ok(SaveChunk { key: Key(at.key), shape: encoded, from })
        };
        Ok(SaveShared {
            codecs,
            chunks: chunks.iter().map(chunk).collect::<Result<_, _>>()?,
            deadline_ns: now_ns.saturating_add(u64::from(*timeout_ms) * 1_000_000),
            cancelled: AtomicBool::new(false),
        })
    }

    /// Cancels what `whose` picks; each ends as usual, once no stage has a chunk of it.
    pub(crate) fn cancel(&mut self, whose: impl Fn(Owner) -> bool) {
        for active in self.active.iter().filter(|active| whose(active.owner)) {
            active.shared.cancelled.store(true, Relaxed);
        }
    }

    /// Gathers what came back, sends out what there are buffers for, and returns what has ended since the last call.
    pub(crate) fn poll(&mut self, now_ns: u64) -> Vec<(Owner, Completion)> {
        while let Some(job) = self.returned.dequeue() {
            self.take_back(job);
        }
        self.send_out(now_ns);
        let ended = &mut self.ended;
        self.active.retain(|active| {
            let has_ended = active.away == 0 && active.next == active.shared.chunks.len();
            if has_ended {
                ended.push((active.owner, active.completion()));
            }
            !has_ended
        });
        std::mem::take(&mut self.ended)
    }

    fn take_back(&mut self, mut job: Box<SaveJob>) {
        let Some(save) = job.save.take() else { unreachable!("a job that was sent out has a save") };
        if let Some(active) = self.active.iter_mut().find(|active| Arc::ptr_eq(&active.shared, &save)) {
            active.away -= 1;
            match job.outcome {
                SaveOutcome::Stored(copies) => {
                    if copies.stored > 0 {
                        active.stored += 1;
                        active.encoded_bytes += job.writer.bytes().len() as u64;
                    } else {
                        active.already_stored += 1;
                    }
                    active.fewer(job.chunk, copies);
                }
                SaveOutcome::Pending => unreachable!("a job comes back with its outcome"),
                SaveOutcome::NotSaved(reason) => active.miss(job.chunk, reason),
            }
        }
        self.free.push_back(job);
    }

    /// One chunk of each save in turn, so that a long one does not hold up a short one.
    fn send_out(&mut self, now_ns: u64) {
        for active in &mut self.active {
            if let Some(reason) = active.shared.is_over(now_ns) {
                let chunks = active.next..active.shared.chunks.len();
                active.next = chunks.end;
                chunks.for_each(|chunk| active.miss(chunk, reason));
            }
        }
        let mut without = 0;
        while without < self.active.len()
            && let Some(mut job) = self.free.pop_front()
        {
            let Some(mut active) = self.active.pop_front() else {
                self.free.push_back(job);
                break;
            };
            if active.next == active.shared.chunks.len() {
                without += 1;
                self.free.push_back(job);
            } else {
                without = 0;
                job.save = Some(Arc::clone(&active.shared));
                job.chunk = active.next;
                (job.copies, job.outcome) = (Copies::default(), SaveOutcome::Pending);
                active.next += 1;
                active.away += 1;
                assert!(self.chunks.enqueue(job).is_ok(), "the ring has room for every job");
            }
            self.active.push_back(active);
        }
    }
}

impl Active {
    fn miss(&mut self, chunk: usize, reason: NotSavedReason) {
        self.not_saved.push(NotSaved { chunk: u32::try_from(chunk).unwrap_or(u32::MAX), reason });
    }

    fn fewer(&mut self, chunk: usize, copies: Copies) {
        if let Some(reason) = copies.reason {
            let chunk = u32::try_from(chunk).unwrap_or(u32::MAX);
            let replicas = copies.made() + copies.failed;
            self.fewer_copies.push(FewerCopies { chunk, copies: copies.made(), replicas, reason });
        }
    }

    fn completion(&self) -> Completion {
        let (mut not_saved, mut fewer_copies) = (self.not_saved.clone(), self.fewer_copies.clone());
        not_saved.sort_unstable_by_key(|missed| missed.chunk);
        fewer_copies.sort_unstable_by_key(|fewer| fewer.chunk);
        let outcome = match not_saved.first() {
            None => Outcome::Done,
            Some(_) if self.shared.cancelled.load(Relaxed) => Outcome::Cancelled,
            Some(_) => Outcome::Failed,
        };
        let chunks = self.shared.chunks.len();
        let message = match (not_saved.first(), fewer_copies.first()) {
            (Some(first), _) => format!(
                "{} of {chunks} chunks were not saved, the first of them chunk {}: {}",
                not_saved.len(),
                first.chunk,
                first.reason
            ),
            (None, Some(first)) => format!(
                "{} of {chunks} chunks are on fewer stores than --replicas says, the first of them chunk {} on {} of {}: {}",
                fewer_copies.len(),
                first.chunk,
                first.copies,
                first.replicas,
                first.reason
            ),
            (None, None) => String::new(),
        };
        Completion::Saved {
            id: self.owner.command,
            outcome,
            stored: self.stored,
            already_stored: self.already_stored,
            encoded_bytes: self.encoded_bytes,
            not_saved,
            fewer_copies,
            message,
        }
    }
}

/// Where the chunks of a save are.
enum Place {
    Host { region: Arc<Arena>, layout: Layout },
    Pages { memory: Arc<PagedMemory>, table: Arc<[u32]> },
}

impl Place {
    fn of(region: &RegionMemory, from: &SaveFrom) -> Result<Self, String> {
        match (region, from) {
            (RegionMemory::Host(region), SaveFrom::Host { layout }) => {
                let control::Layout { layer, side, token, head } = *layout;
                Ok(Self::Host { region: Arc::clone(region), layout: Layout { layer, side, token, head } })
            }
            (RegionMemory::Pages(memory), SaveFrom::Pages { table }) => {
                Ok(Self::Pages { memory: Arc::clone(memory), table: table.as_slice().into() })
            }
            _ => Err("the region is of another kind than the save says".to_owned()),
        }
    }

    /// Of the chunk of this shape at `offset`. Pages were checked with the command (`control::check`).
    fn origin(&self, shape: PlaceShape, offset: u64) -> Result<Origin, String> {
        match self {
            Self::Host { region, layout } => {
                let placement = Placement::new(*layout, shape, offset, region.bytes() as u64)
                    .map_err(|fault| fault.to_string())?;
                Ok(Origin::Host { region: Arc::clone(region), placement })
            }
            Self::Pages { memory, table } => Ok(Origin::Pages {
                memory: Arc::clone(memory),
                table: Arc::clone(table),
                first_token: offset,
                tokens: shape.tokens,
            }),
        }
    }
}

/// What a save's planes are encoded with. A profile must be the one that the chunks' keys stand for.
fn codecs_of(codec: &SaveCodec) -> Result<Codecs, String> {
    match codec {
        SaveCodec::One(codec) => Ok(PlaneCodec::from(codec_of(*codec)).into()),
        SaveCodec::Profile { id, text } => {
            let profile = Profile::parse(text).map_err(|error| format!("the profile: {error}"))?;
            let found = profile.id();
            if *id != found {
                return Err(format!(
                    "the client's codec is {id:?} and its profile is {found:?}: a client that saves with this profile, and those that \
                     fetch, give the latter as their codec"
                ));
            }
            Ok(Codecs::Each(Arc::new(profile)))
        }
    }
}

fn codec_of(codec: control::Codec) -> Codec {
    match codec {
        control::Codec::Raw => Codec::Raw,
        control::Codec::Lossless => Codec::Lossless,
        control::Codec::Int8 => Codec::Int8,
        control::Codec::Int4 => Codec::Int4,
        control::Codec::Int5 => Codec::Int5,
        control::Codec::Int3 => Codec::Int3,
        control::Codec::CacheGen => Codec::CacheGen,
    }
}
