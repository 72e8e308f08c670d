//! A data plane that keeps its chunks in its head: the real control side, and a formula for the bytes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use client::{Client, ClientConfig, Codec, Dtype, Layout, Missing, MissingReason, Namespace, Outcome, Shape};
use control::{
    ChunkPlace, Command, Completion, DeviceUuid, GpuMemory, Limits, Listener, NotSaved, RingDescriptor,
    RingProducer, Sent, ServerSession, SocketEvent, Target, now_ns,
};
use hugepages::Arena;
use rustix::event::{PollFd, PollFlags, Timespec};

pub(crate) const SHAPE: Shape = Shape { layers: 3, kv_heads: 2, head_dim: 4, dtype: Dtype::Bf16 };
/// The only GPU there is.
pub(crate) const GPU: DeviceUuid = DeviceUuid([6; 16]);
pub(crate) const WAIT: Duration = Duration::from_secs(10);

/// How the data plane behaves; changed by the tests while it runs.
#[derive(Default)]
pub(crate) struct Manners {
    /// Chunks that are stored, and how many tokens each holds.
    pub(crate) stored: Mutex<HashMap<[u8; 32], u16>>,
    /// Fetches are taken and not ended.
    pub(crate) hold: AtomicBool,
    /// Cancels are not heeded.
    pub(crate) deaf: AtomicBool,
    /// The heartbeat stands still.
    pub(crate) heartless: AtomicBool,
    /// The whole process stands still.
    pub(crate) stopped: AtomicBool,
    /// Only this many commands are taken from the ring per millisecond; 0 for no limit.
    pub(crate) per_ms: AtomicUsize,
    /// Sent instead of any answer to statistics.
    pub(crate) nonsense: Mutex<Vec<Completion>>,
    /// Fetches that were cancelled because their client was gone.
    pub(crate) orphans: AtomicUsize,
    /// Fetches into pages: the table and the chunks of each.
    pub(crate) paged: Mutex<Vec<(Vec<u32>, Vec<ChunkPlace>)>>,
    /// Regions that exist now.
    pub(crate) regions: AtomicUsize,
}

pub(crate) struct FakeDataPlane {
    pub(crate) manners: Arc<Manners>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    directory: tempfile::TempDir,
}

impl FakeDataPlane {
    pub(crate) fn start() -> Self {
        Self::with_limits(Limits::default())
    }

    pub(crate) fn with_limits(limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (manners, stop) = (Arc::new(Manners::default()), Arc::new(AtomicBool::new(false)));
        let listener =
            Listener::bind(directory.path().join("dp.sock"), 0o660, None).unwrap().with_limits(limits);
        let (theirs, stopping) = (Arc::clone(&manners), Arc::clone(&stop));
        let thread = std::thread::spawn(move || serve(&listener, &theirs, &stopping));
        Self { manners, stop, thread: Some(thread), directory }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("dp.sock")
    }

    pub(crate) fn connect(&self) -> Client {
        Client::connect(self.path(), &config()).unwrap()
    }

    /// Stores the chunks of a sequence, as a client in [`config`]'s namespace names them.
    pub(crate) fn store(&self, tokens: &[i32]) {
        let keys = protocol::key::chain(&config().namespace, tokens);
        let mut stored = self.manners.stored.lock().unwrap();
        for (key, tokens) in keys.iter().zip(tokens.chunks(256)) {
            stored.insert(key.0, u16::try_from(tokens.len()).unwrap());
        }
    }

    /// Ends the data plane as a kill would: sockets close, nothing is said.
    pub(crate) fn kill(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for FakeDataPlane {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) fn config() -> ClientConfig {
    let namespace = Namespace { model: "fake".into(), codec: "int4".into(), ..Namespace::default() };
    // Machines that run tests are busy: only the tests of the heartbeat are strict about it.
    ClientConfig { heartbeat_limit: WAIT, ..ClientConfig::new(namespace) }
}

pub(crate) fn tokens(count: i32) -> Vec<i32> {
    (0..count).collect()
}

/// Waits until something holds.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let limit = Instant::now() + WAIT;
    while !holds() {
        assert!(Instant::now() < limit, "not within {WAIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The byte at one place of one chunk.
pub(crate) fn byte(key: &[u8; 32], plane: u32, token: u64, head: u64, at: u64) -> u8 {
    let mixed = u64::from(key[0]) * 31 + u64::from(plane) * 17 + token * 7 + head * 5 + at;
    mixed.to_le_bytes()[0]
}

struct Session {
    session: ServerSession,
    regions: HashMap<u32, Arc<Arena>>,
    rings: HashMap<u32, RingProducer>,
    held: Vec<u64>,
    held_saves: Vec<u64>,
    unsent: Vec<Completion>,
}

fn serve(listener: &Listener, manners: &Manners, stop: &AtomicBool) {
    let mut sessions: Vec<Session> = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        if manners.stopped.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        while let Some(session) = listener.accept().unwrap() {
            sessions.push(Session {
                session,
                regions: HashMap::new(),
                rings: HashMap::new(),
                held: vec![],
                held_saves: vec![],
                unsent: vec![],
            });
        }
        sessions.retain_mut(|session| session.pass(manners));
        let regions = sessions.iter().map(|session| session.regions.len()).sum();
        manners.regions.store(regions, Ordering::SeqCst);
        if sessions.iter_mut().all(|session| session.session.set_sleeping(true)) {
            let mut fds = vec![PollFd::from_borrowed_fd(listener.fd(), PollFlags::IN)];
            for session in &sessions {
                fds.push(PollFd::from_borrowed_fd(session.session.fd(), PollFlags::IN));
                fds.push(PollFd::from_borrowed_fd(session.session.doorbell_fd(), PollFlags::IN));
            }
            // Short, so that the tests' switches work soon; the wake-ups do not depend on it.
            let limit = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
            let _ = rustix::event::poll(&mut fds, Some(&limit));
        }
    }
}

impl Session {
    /// One look at a session; whether it goes on.
    fn pass(&mut self, manners: &Manners) -> bool {
        self.session.set_sleeping(false);
        let events = self.session.handle_socket().expect("the client is sound");
        for event in events {
            match event {
                SocketEvent::Attached { .. } => {}
                SocketEvent::RegionRegistered { id, arena } => drop(self.regions.insert(id, arena)),
                SocketEvent::GpuOffered { token, memory, words } => {
                    let unknown = memory.device() != GPU;
                    let opened = if unknown { Err("no such GPU".to_owned()) } else { Ok(memory.clone()) };
                    let region = self.session.answer_gpu(token, opened).expect("the client reads");
                    if let (Some(region), GpuMemory::Ring(ring), Some(words)) = (region, memory, words) {
                        // A client that has dropped the ring meanwhile has revoked it.
                        if let Ok(producer) = RingProducer::new(words, ring.entries, ring.generation) {
                            self.rings.insert(region, producer);
                        }
                    }
                }
                SocketEvent::Closed { .. } => {
                    manners.orphans.fetch_add(self.held.len(), Ordering::SeqCst);
                    return false;
                }
            }
        }
        if !manners.heartless.load(Ordering::SeqCst) {
            self.session.beat(now_ns());
        }
        let limit = manners.per_ms.load(Ordering::SeqCst);
        for taken in 0.. {
            if limit > 0 && taken == limit {
                std::thread::sleep(Duration::from_millis(1));
                break;
            }
            let Some(command) = self.session.next_command().expect("the client is sound") else { break };
            self.handle(command, manners);
        }
        while let Some(completion) = self.unsent.first() {
            match self.session.complete(completion).unwrap() {
                Sent::Sent => drop(self.unsent.remove(0)),
                Sent::Full => break,
            }
        }
        true
    }

    fn handle(&mut self, command: Command, manners: &Manners) {
        match command {
            Command::Lookup { id, keys, .. } => self.unsent.push(look_up(id, &keys, manners)),
            Command::Fetch { id, .. } if manners.hold.load(Ordering::SeqCst) => self.held.push(id),
            Command::Fetch { id, region, to: Target::Ring, shape, chunks, .. } => {
                self.fill(id, region, &shape, &chunks);
            }
            Command::Fetch { id, to: Target::Pages { table }, shape, chunks, .. } => {
                let planes = shape.planes() * u32::try_from(chunks.len()).unwrap();
                manners.paged.lock().unwrap().push((table, chunks));
                self.unsent.push(ended(id, Outcome::Done, planes, 0, vec![]));
            }
            Command::Fetch {
                id, region, to: Target::Host { layout, .. }, shape, chunks, progress, ..
            } => {
                let region = Arc::clone(&self.regions[&region]);
                self.fetch(id, &region, &layout, &shape, &chunks, progress, manners);
            }
            Command::Save { id, .. } if manners.hold.load(Ordering::SeqCst) => {
                self.held.push(id);
                self.held_saves.push(id);
            }
            Command::Save { id, chunks, .. } => {
                // What is known is stored already, and becomes known.
                let mut stored = manners.stored.lock().unwrap();
                let fresh =
                    chunks.iter().filter(|place| stored.insert(place.key, place.tokens).is_none()).count();
                let fresh = u32::try_from(fresh).unwrap();
                let already_stored = u32::try_from(chunks.len()).unwrap() - fresh;
                self.unsent.push(saved(id, Outcome::Done, fresh, already_stored, vec![]));
            }
            Command::Cancel { id } => {
                let Some(at) = self.held.iter().position(|&held| held == id) else { return };
                if !manners.deaf.load(Ordering::SeqCst) {
                    self.held.remove(at);
                    self.unsent.push(if self.held_saves.contains(&id) {
                        saved(id, Outcome::Cancelled, 0, 0, vec![])
                    } else {
                        ended(id, Outcome::Cancelled, 0, 0, vec![])
                    });
                }
            }
            Command::Unregister { id, region } => {
                self.regions.remove(&region);
                self.rings.remove(&region);
                self.unsent.push(Completion::Unregistered { id });
            }
            Command::Stats { id } => {
                let nonsense = std::mem::take(&mut *manners.nonsense.lock().unwrap());
                if nonsense.is_empty() {
                    self.unsent.push(Completion::Stats { id, json: "{\"planes\":1}".to_owned() });
                }
                self.unsent.extend(nonsense);
            }
        }
    }

    /// Fills a ring with every plane there is; what it has no room for counts as lost.
    fn fill(&mut self, id: u64, region: u32, shape: &Shape, chunks: &[ChunkPlace]) {
        let ring = &self.rings[&region];
        let mut planes = 0;
        for (chunk, place) in (0..).zip(chunks) {
            for plane in 0..shape.planes() {
                let Ok(Some(sequence)) = ring.claim() else { continue };
                let bytes = u32::try_from(shape.plane_bytes(place.tokens)).unwrap();
                let delivered = true;
                ring.publish(sequence, &RingDescriptor { fetch: id, chunk, plane, bytes, delivered });
                planes += 1;
            }
        }
        self.unsent.push(ended(id, Outcome::Done, planes, 0, vec![]));
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of a command, once, in a test")]
    fn fetch(
        &mut self,
        id: u64,
        region: &Arena,
        layout: &Layout,
        shape: &Shape,
        chunks: &[ChunkPlace],
        progress: bool,
        manners: &Manners,
    ) {
        let stored = manners.stored.lock().unwrap();
        let (mut missing, mut planes, mut bytes) = (vec![], 0, 0);
        for (index, place) in chunks.iter().enumerate() {
            if stored.get(&place.key) != Some(&place.tokens) {
                let chunk = u32::try_from(index).unwrap();
                missing.push(Missing { chunk, reason: MissingReason::NotStored });
                continue;
            }
            write_chunk(region, layout, shape, place);
            planes += shape.planes();
            bytes += shape.chunk_bytes(place.tokens);
            if progress {
                let (encoded_bytes, delivered_bytes) = (bytes / 4, bytes);
                self.unsent.push(Completion::Progress { id, planes, encoded_bytes, delivered_bytes });
            }
        }
        let outcome = if missing.is_empty() { Outcome::Done } else { Outcome::Failed };
        self.unsent.push(ended(id, outcome, planes, bytes, missing));
    }
}

fn saved(
    id: u64,
    outcome: Outcome,
    stored: u32,
    already_stored: u32,
    not_saved: Vec<NotSaved>,
) -> Completion {
    let message = if not_saved.is_empty() { String::new() } else { "as told".to_owned() };
    Completion::Saved {
        id,
        outcome,
        stored,
        already_stored,
        encoded_bytes: 0,
        not_saved,
        fewer_copies: vec![],
        message,
    }
}

fn look_up(id: u64, keys: &[[u8; 32]], manners: &Manners) -> Completion {
    let stored = manners.stored.lock().unwrap();
    let chunks: Vec<u16> = keys.iter().map_while(|key| stored.get(key)).copied().collect();
    let found = u32::try_from(chunks.len()).unwrap();
    let last_tokens = chunks.last().copied().unwrap_or(0);
    let encoded_bytes = chunks.iter().map(|&tokens| SHAPE.chunk_bytes(tokens) / 4).sum();
    let (shape, codec) = if found > 0 { (Some(SHAPE), Some(Codec::Int4)) } else { (None, None) };
    Completion::LookedUp { id, found, last_tokens, encoded_bytes, shape, codec }
}

fn ended(id: u64, outcome: Outcome, planes: u32, bytes: u64, missing: Vec<Missing>) -> Completion {
    let message =
        if outcome == Outcome::Done { String::new() } else { "not everything is stored".to_owned() };
    Completion::Ended {
        id,
        outcome,
        planes,
        encoded_bytes: bytes / 4,
        delivered_bytes: bytes,
        missing,
        message,
    }
}

/// Every head of every token of every plane, one by one.
pub(crate) fn heads(
    layout: &Layout,
    shape: &Shape,
    place: &ChunkPlace,
) -> impl Iterator<Item = (usize, Vec<u8>)> {
    let (layout, shape, place) = (*layout, *shape, *place);
    (0..shape.planes()).flat_map(move |plane| {
        (0..u64::from(place.tokens)).flat_map(move |token| {
            (0..u64::from(shape.kv_heads)).map(move |head| {
                let at =
                    place.offset + layout.plane_offset(plane) + token * layout.token + head * layout.head;
                let bytes = (0..shape.head_bytes()).map(|i| byte(&place.key, plane, token, head, i));
                (usize::try_from(at).unwrap(), bytes.collect())
            })
        })
    })
}

fn write_chunk(region: &Arena, layout: &Layout, shape: &Shape, place: &ChunkPlace) {
    for (at, bytes) in heads(layout, shape, place) {
        region.copy_in(at, &bytes).unwrap();
    }
}

/// A socket at which nothing is as it should be.
pub(crate) fn listen_raw(path: &Path) -> std::os::fd::OwnedFd {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let socket = socket.unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&socket, 8).unwrap();
    socket
}
