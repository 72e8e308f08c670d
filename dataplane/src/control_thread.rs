//! The control thread: clients, their commands and completions, heartbeats, metrics, and the ordered end.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use control::{BEAT_INTERVAL_MS, Command, Completion, GpuMemory, Listener, Sent, ServerSession, SocketEvent};
use dpdk::Eal;
use hugepages::Arena;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{debug, info, warn};

use crate::fetches::{Fetches, Owner, RegionMemory};
use crate::gpu::Gpus;
use crate::metrics;
use crate::pipeline::Pipeline;
use crate::save::saves::Saves;

/// Bounds of the sleep between looks while fetches are under way. The lcores make no system calls, hence cannot wake
/// the thread; the longer the youngest fetch has been under way, the less it matters when its end is seen, and the fewer
/// looks disturb lcores that share their CPU with this thread.
const SHORTEST_SLEEP_NS: u64 = 20_000;
const LONGEST_SLEEP_NS: u64 = 500_000;
/// The sleep is this fraction of the youngest fetch's age: what it adds to a fetch's time at most.
const AGE_OVER_SLEEP: u64 = 16;
/// How long it sleeps at most while nothing is: clients' doorbells and sockets wake it.
const IDLE_SLEEP: Duration = Duration::from_millis(50);
/// Age of a client's heartbeat at which it is noted as stalled.
const STALLED_AFTER: Duration = Duration::from_secs(3);
/// How long fetches have to end when the data plane is told to stop.
const GRACE: Duration = Duration::from_secs(2);

/// One client.
struct Client {
    session: ServerSession,
    /// Completions that found its ring full, oldest first.
    unsent: VecDeque<Completion>,
    stalled: bool,
    /// Its GPU memory, open, by the region's number.
    gpu: BTreeMap<u32, RegionMemory>,
}

/// The control thread's state.
pub(crate) struct ControlThread<'a> {
    pub(crate) listener: Listener,
    pub(crate) pipeline: &'a Pipeline,
    pub(crate) fetches: Fetches,
    saves: Saves,
    gpus: &'a Gpus,
    clients: BTreeMap<u64, Client>,
    next_session: u64,
    /// Commands that asked for statistics.
    stats_for: Vec<Owner>,
    last_beat_ns: u64,
}

impl<'a> ControlThread<'a> {
    pub(crate) fn new(
        listener: Listener,
        pipeline: &'a Pipeline,
        (fetches, saves): (Fetches, Saves),
        gpus: &'a Gpus,
    ) -> Self {
        Self {
            listener,
            pipeline,
            fetches,
            saves,
            gpus,
            clients: BTreeMap::new(),
            next_session: 0,
            stats_for: Vec::new(),
            last_beat_ns: 0,
        }
    }

    /// Serves clients until `stop`, then ends what is under way as cancelled.
    pub(crate) fn run(&mut self, eal: &Eal, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) && self.lcores_run(eal) && self.gpus_work() {
            self.pass(true);
            self.sleep();
        }
        info!("stopping: what is under way ends as cancelled");
        self.fetches.cancel(|_| true);
        self.saves.cancel(|_| true);
        let last_ns = self.pipeline.clock.now_ns() + u64::try_from(GRACE.as_nanos()).unwrap_or(u64::MAX);
        while !(self.fetches.idle() && self.saves.idle()) && self.pipeline.clock.now_ns() < last_ns {
            self.pass(false);
            std::thread::sleep(Duration::from_nanos(SHORTEST_SLEEP_NS));
        }
        self.pass(false);
    }

    /// A lcore that ended before it was told to has panicked; what it was doing cannot be finished.
    fn lcores_run(&self, eal: &Eal) -> bool {
        let all = (0..self.pipeline.lcores.len()).all(|worker| eal.is_running(worker));
        if !all {
            warn!("an lcore has ended unexpectedly; the data plane stops");
        }
        all
    }

    /// After some errors no call on a GPU succeeds any more, and what is in its memory is unknown.
    fn gpus_work(&self) -> bool {
        let lost = self.gpus.health.lost();
        if let Some(error) = lost {
            warn!("a GPU is lost ({error}); the data plane stops: start it again");
        }
        lost.is_none()
    }

    fn pass(&mut self, accepting: bool) {
        let now_ns = self.pipeline.clock.now_ns();
        if accepting {
            self.accept();
        }
        let sessions: Vec<u64> = self.clients.keys().copied().collect();
        for number in sessions {
            if let Err(reason) = self.serve(now_ns, number, accepting) {
                self.let_go(number, &reason);
            }
        }
        for (owner, completion) in self.fetches.poll(now_ns) {
            self.complete(owner, completion);
        }
        for (owner, completion) in self.saves.poll(now_ns) {
            self.complete(owner, completion);
        }
        for (owner, progress) in self.fetches.progress() {
            self.offer(owner, &progress);
        }
        self.answer_stats();
        self.beat();
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            Ok(Some(mut session)) => {
                session.set_sleeping(false);
                self.next_session += 1;
                let client =
                    Client { session, unsent: VecDeque::new(), stalled: false, gpu: BTreeMap::new() };
                self.clients.insert(self.next_session, client);
            }
            Ok(None) => {}
            Err(error) => warn!("a client could not be taken: {error}"),
        }
    }

    /// Reads a client's socket and commands. The error is why the client is to be let go.
    fn serve(&mut self, now_ns: u64, number: u64, accepting: bool) -> Result<(), String> {
        let Some(client) = self.clients.get_mut(&number) else { return Ok(()) };
        client.session.set_sleeping(false);
        for event in client.session.handle_socket().map_err(|error| error.to_string())? {
            match event {
                SocketEvent::Attached { name } => {
                    info!("client {number} ({name}, process {}) attached", client.session.pid());
                }
                SocketEvent::RegionRegistered { id, arena } => {
                    debug!("client {number} registered region {id}, {} bytes", arena.bytes());
                }
                SocketEvent::GpuOffered { token, memory, words } => {
                    client.open_gpu(number, self.gpus, token, memory, words)?;
                }
                SocketEvent::Closed { reason } => return Err(reason),
            }
        }
        client.send_unsent()?;
        while accepting && client.unsent.is_empty() {
            let Some(command) = client.session.next_command().map_err(|error| error.to_string())? else {
                break;
            };
            let owner = Owner { session: number, command: command.id() };
            match command {
                Command::Stats { .. } => {
                    self.stats_for.push(owner);
                    self.fetches.ask_latencies();
                }
                Command::Unregister { id, region } => {
                    client.gpu.remove(&region);
                    client.complete(Completion::Unregistered { id })?;
                }
                Command::Fetch { region, .. } => {
                    let host = client.session.region(region).map(Arc::clone).map(RegionMemory::Host);
                    let region = host.or_else(|| client.gpu.get(&region).cloned());
                    self.fetches.admit(now_ns, number, command, region);
                }
                Command::Save { region, .. } => {
                    let host = client.session.region(region).map(Arc::clone).map(RegionMemory::Host);
                    let region = host.or_else(|| client.gpu.get(&region).cloned());
                    self.saves.admit(now_ns, number, &command, region.as_ref());
                }
                Command::Cancel { .. } => {
                    self.saves.cancel(|of| of == owner);
                    self.fetches.admit(now_ns, number, command, None);
                }
                Command::Lookup { .. } => {
                    self.fetches.admit(now_ns, number, command, None);
                }
            }
        }
        Ok(())
    }

    fn let_go(&mut self, number: u64, reason: &str) {
        info!("client {number} is gone ({reason}): its fetches end as cancelled");
        self.clients.remove(&number);
        self.stats_for.retain(|owner| owner.session != number);
        self.fetches.cancel(|owner| owner.session == number);
        self.saves.cancel(|owner| owner.session == number);
    }

    /// Tells a client of an end; kept if its ring is full. Ends of clients that are gone are dropped.
    fn complete(&mut self, owner: Owner, completion: Completion) {
        let Some(client) = self.clients.get_mut(&owner.session) else { return };
        if let Err(reason) = client.complete(completion) {
            self.let_go(owner.session, &reason);
        }
    }

    /// Tells a client of progress, unless its ring is full.
    fn offer(&mut self, owner: Owner, progress: &Completion) {
        let Some(client) = self.clients.get_mut(&owner.session) else { return };
        if client.unsent.is_empty()
            && let Err(error) = client.session.complete(progress)
        {
            self.let_go(owner.session, &error.to_string());
        }
    }

    fn answer_stats(&mut self) {
        if self.stats_for.is_empty() {
            return;
        }
        let Some(latencies) = self.fetches.latencies() else { return };
        let json =
            metrics::report(self.pipeline, self.gpus, &self.saves, latencies, self.clients.len()).to_string();
        for owner in std::mem::take(&mut self.stats_for) {
            self.complete(owner, Completion::Stats { id: owner.command, json: json.clone() });
        }
    }

    fn beat(&mut self) {
        let now_ns = control::now_ns();
        if now_ns.saturating_sub(self.last_beat_ns) < BEAT_INTERVAL_MS * 1_000_000 {
            return;
        }
        self.last_beat_ns = now_ns;
        let mut silent = Vec::new();
        for (&number, client) in &mut self.clients {
            client.session.beat(now_ns);
            let alive = client.session.peer_alive(now_ns, STALLED_AFTER);
            if !alive && !client.session.is_attached() {
                silent.push(number);
            } else if alive == client.stalled {
                client.stalled = !alive;
                if !alive {
                    warn!("client {number} (process {}) has stopped beating", client.session.pid());
                }
            }
        }
        for number in silent {
            self.let_go(number, "it did not finish its handshake");
        }
    }

    /// Sleeps until a client wants something, or until it is time to look at what the lcores have done.
    fn sleep(&mut self) {
        let mut timeout = if self.fetches.idle() && self.saves.idle() && self.stats_for.is_empty() {
            IDLE_SLEEP
        } else {
            let age_ns = self.pipeline.clock.now_ns().saturating_sub(self.fetches.youngest_ns());
            Duration::from_nanos((age_ns / AGE_OVER_SLEEP).clamp(SHORTEST_SLEEP_NS, LONGEST_SLEEP_NS))
        };
        for client in self.clients.values_mut() {
            if !client.session.set_sleeping(true) {
                timeout = Duration::ZERO;
            }
        }
        let mut fds = vec![PollFd::from_borrowed_fd(self.listener.fd(), PollFlags::IN)];
        for client in self.clients.values() {
            fds.push(PollFd::from_borrowed_fd(client.session.fd(), PollFlags::IN));
            fds.push(PollFd::from_borrowed_fd(client.session.doorbell_fd(), PollFlags::IN));
        }
        let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(timeout.subsec_nanos()) };
        // An interrupted sleep is as good as a finished one.
        let _ = poll(&mut fds, Some(&timeout));
    }
}

impl Client {
    /// Opens GPU memory that the client lends and tells it. The error is that of its socket.
    fn open_gpu(
        &mut self,
        number: u64,
        gpus: &Gpus,
        token: u64,
        memory: GpuMemory,
        words: Option<Arc<Arena>>,
    ) -> Result<(), String> {
        let opened = gpus.open(&memory, words);
        let answer = opened.as_ref().map(|_| memory).map_err(ToString::to_string);
        if let Err(reason) = &answer {
            info!("client {number}: GPU memory refused: {reason}");
        }
        let region = self.session.answer_gpu(token, answer).map_err(|error| error.to_string())?;
        if let (Some(region), Ok(opened)) = (region, opened) {
            debug!("client {number} registered GPU region {region}");
            self.gpu.insert(region, opened);
        }
        Ok(())
    }

    fn complete(&mut self, completion: Completion) -> Result<(), String> {
        self.unsent.push_back(completion);
        self.send_unsent()
    }

    fn send_unsent(&mut self) -> Result<(), String> {
        while let Some(completion) = self.unsent.front() {
            match self.session.complete(completion) {
                Ok(Sent::Sent) => drop(self.unsent.pop_front()),
                Ok(Sent::Full) => break,
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    }
}
