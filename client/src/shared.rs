//! What the calling threads and the session's own thread share: the session, and what is under way.
//!
//! One mutex guards it all; nobody holds it while sleeping. The session's thread ([`crate::dispatch`]) moves
//! completions into [`Pending`] entries and notifies; callers wait on the condition variable.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use control::{ClientSession, Command, Completion, RegionReply, RingError, Sent};

use crate::config::ClientConfig;
use crate::fetch::Progress;
use crate::lost::Lost;
use crate::region::Memory;

pub(crate) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Regions to be unregistered: numbers left here by dropped regions, taken by whoever sends next. A lock of
    /// its own, since a region may be dropped while the state is locked.
    retired: Mutex<Vec<u32>>,
    pub(crate) config: ClientConfig,
    pid: u32,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("config", &self.config).finish_non_exhaustive()
    }
}

#[derive(Debug)]
pub(crate) struct State {
    /// Gone when `lost` is set.
    pub(crate) session: Option<ClientSession>,
    pub(crate) lost: Option<Lost>,
    pending: HashMap<u64, Pending>,
    registering: HashMap<u64, Registering>,
    next_id: u64,
}

/// What a command that is under way expects as its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Lookup,
    Fetch,
    Save,
    Unregister,
    Stats,
}

/// The memory that a fetch writes to: kept mapped and registered until the fetch ends.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) memory: Arc<Memory>,
    /// What of it the fetch may write.
    pub(crate) written: Written,
}

/// A part of a region's memory.
#[derive(Debug)]
pub(crate) enum Written {
    /// From the lowest to the highest byte.
    Bytes(Range<u64>),
    /// These pages, in ascending order.
    Pages(Vec<u32>),
    /// Entries of a ring, which say what they hold: fetches do not get in each other's way.
    Entries,
}

impl Written {
    fn overlaps(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Bytes(one), Self::Bytes(other)) => one.start < other.end && other.start < one.end,
            (Self::Pages(one), Self::Pages(other)) => {
                one.iter().any(|page| other.binary_search(page).is_ok())
            }
            _ => false,
        }
    }
}

/// One command under way, or answered and not yet asked for.
#[derive(Debug)]
pub(crate) struct Pending {
    kind: Kind,
    progress: Progress,
    answer: Option<(Completion, Instant)>,
    target: Option<Target>,
    /// Nobody will ask for the answer: forget the entry when it comes.
    abandoned: bool,
}

/// A registration that was asked for.
#[derive(Debug, PartialEq, Eq)]
enum Registering {
    UnderWay,
    Answered(Result<u32, String>),
    /// Nobody waits any more: the region is to be unregistered when it comes.
    Abandoned,
}

/// Why waiting gave nothing.
#[derive(Debug)]
pub(crate) enum Unanswered {
    Lost(Lost),
    TimedOut,
}

/// Why a command was not sent.
#[derive(Debug)]
pub(crate) enum NotSent {
    Lost(Lost),
    /// The ring was full until the deadline.
    Full,
    TooLong(RingError),
}

impl From<Lost> for NotSent {
    fn from(lost: Lost) -> Self {
        Self::Lost(lost)
    }
}

pub(crate) type Guard<'a> = MutexGuard<'a, State>;

impl Shared {
    pub(crate) fn new(session: ClientSession, config: ClientConfig) -> Self {
        let state = State {
            session: Some(session),
            lost: None,
            pending: HashMap::new(),
            registering: HashMap::new(),
            next_id: 1,
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            retired: Mutex::new(Vec::new()),
            config,
            pid: std::process::id(),
        }
    }

    /// Whether this is a child of the process that connected. Its session's thread was not forked with it, and
    /// the mutex may be locked for ever.
    pub(crate) fn is_forked(&self) -> bool {
        std::process::id() != self.pid
    }

    /// Locks the state.
    pub(crate) fn lock(&self) -> Result<Guard<'_>, Lost> {
        if self.is_forked() {
            return Err(Lost::Forked);
        }
        // A thread that panicked while it held the lock left at worst an entry that nobody waits for.
        Ok(self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn notify(&self) {
        self.changed.notify_all();
    }

    /// Waits until `found` gives something, the session is lost, or the deadline passes.
    pub(crate) fn wait_for<'a, T>(
        &'a self,
        mut state: Guard<'a>,
        deadline: Option<Instant>,
        mut found: impl FnMut(&mut State) -> Option<T>,
    ) -> (Guard<'a>, Result<T, Unanswered>) {
        loop {
            // What has been answered is answered, even if the session has been lost since.
            if let Some(value) = found(&mut state) {
                return (state, Ok(value));
            }
            if let Some(lost) = state.lost.clone() {
                return (state, Err(Unanswered::Lost(lost)));
            }
            match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(left) if left.is_zero() => return (state, Err(Unanswered::TimedOut)),
                Some(left) => {
                    let woken = self.changed.wait_timeout(state, left);
                    state = woken.unwrap_or_else(PoisonError::into_inner).0;
                }
                None => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Sends a command that [`State::begin`] has entered, waiting for room until the deadline. A command that is
    /// not sent leaves no entry.
    pub(crate) fn send<'a>(
        &'a self,
        state: Guard<'a>,
        command: &Command,
        deadline: Option<Instant>,
    ) -> (Guard<'a>, Result<(), NotSent>) {
        let (mut state, result) = self.wait_for(state, deadline, |state| state.try_send(command));
        let result = match result {
            Ok(result) => result,
            Err(Unanswered::Lost(lost)) => Err(NotSent::Lost(lost)),
            Err(Unanswered::TimedOut) => Err(NotSent::Full),
        };
        if result.is_err() && !matches!(command, Command::Cancel { .. }) {
            state.pending.remove(&command.id());
        }
        (state, result)
    }

    /// Leaves a region to be unregistered.
    pub(crate) fn retire(&self, region: u32) {
        if !self.is_forked() {
            self.retired.lock().unwrap_or_else(PoisonError::into_inner).push(region);
        }
    }

    /// Sends what [`Shared::retire`] has gathered, as far as there is room.
    pub(crate) fn flush_retired(&self, state: &mut State) {
        let retired = || self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        // Not held while sending: losing the session lets go of memory, which comes back to this list.
        let mut regions = std::mem::take(&mut *retired());
        while let Some(&region) = regions.last() {
            let id = state.begin(Kind::Unregister, None);
            match state.try_send(&Command::Unregister { id, region }) {
                Some(Ok(())) => {
                    state.abandon(id);
                    regions.pop();
                }
                // No room: later. No session: the data plane has dropped its regions with it.
                _ => {
                    state.pending.remove(&id);
                    break;
                }
            }
        }
        if !regions.is_empty() {
            retired().append(&mut regions);
        }
    }
}

impl State {
    /// Enters a command and gives it its id.
    pub(crate) fn begin(&mut self, kind: Kind, target: Option<Target>) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let entry = Pending { kind, progress: Progress::default(), answer: None, target, abandoned: false };
        self.pending.insert(id, entry);
        id
    }

    /// `None` if there is no room now.
    fn try_send(&mut self, command: &Command) -> Option<Result<(), NotSent>> {
        let session = self.session.as_mut()?;
        match session.send(command) {
            Ok(Sent::Sent) => Some(Ok(())),
            Ok(Sent::Full) => None,
            Err(error @ RingError::TooLong { .. }) => Some(Err(NotSent::TooLong(error))),
            Err(error) => {
                self.lose(Lost::Broken(error.to_string()));
                None
            }
        }
    }

    /// Takes a command's answer, if it is there.
    pub(crate) fn take_answer(&mut self, id: u64) -> Option<(Completion, Instant)> {
        self.pending.get(&id)?.answer.as_ref()?;
        self.pending.remove(&id)?.answer
    }

    pub(crate) fn has_answer(&self, id: u64) -> bool {
        self.pending.get(&id).is_some_and(|entry| entry.answer.is_some())
    }

    pub(crate) fn progress(&self, id: u64) -> Option<Progress> {
        self.pending.get(&id).map(|entry| entry.progress)
    }

    /// Nobody will ask for this answer. The entry stays until it comes, and with it a fetch's target.
    pub(crate) fn abandon(&mut self, id: u64) {
        match self.pending.get_mut(&id) {
            Some(entry) if entry.answer.is_none() && self.lost.is_none() => entry.abandoned = true,
            _ => drop(self.pending.remove(&id)),
        }
    }

    /// Whether a fetch that its owner has dropped may still write to this part of the region.
    pub(crate) fn is_written_by_abandoned(&self, memory: &Arc<Memory>, written: &Written) -> bool {
        self.pending.values().filter(|entry| entry.abandoned).any(|entry| {
            entry
                .target
                .as_ref()
                .is_some_and(|target| Arc::ptr_eq(&target.memory, memory) && target.written.overlaps(written))
        })
    }

    pub(crate) fn is_unregistering(&self) -> bool {
        self.pending.values().any(|entry| entry.kind == Kind::Unregister)
    }

    /// Files a completion. An error says how it broke the protocol.
    pub(crate) fn file(&mut self, completion: Completion) -> Result<(), Lost> {
        let id = completion.id();
        let Some(entry) = self.pending.get_mut(&id) else {
            return Err(Lost::Broken(format!(
                "it answered {id}, which was never asked or has been answered"
            )));
        };
        let expected = match &completion {
            Completion::LookedUp { .. } | Completion::LookupFailed { .. } => entry.kind == Kind::Lookup,
            Completion::Progress { .. } | Completion::Ended { .. } => entry.kind == Kind::Fetch,
            Completion::Saved { .. } => entry.kind == Kind::Save,
            Completion::Unregistered { .. } => entry.kind == Kind::Unregister,
            Completion::Stats { .. } => entry.kind == Kind::Stats,
            Completion::Refused { .. } => true,
        };
        if !expected || entry.answer.is_some() {
            return Err(Lost::Broken(format!("{id} got an answer that does not belong to it")));
        }
        if let Completion::Progress { planes, encoded_bytes, delivered_bytes, .. } = completion {
            entry.progress = Progress { planes, encoded_bytes, delivered_bytes };
            return Ok(());
        }
        entry.target = None;
        entry.answer = Some((completion, Instant::now()));
        if entry.abandoned {
            self.pending.remove(&id);
        }
        Ok(())
    }

    pub(crate) fn begin_registering(&mut self) -> u64 {
        let token = self.next_id;
        self.next_id += 1;
        self.registering.insert(token, Registering::UnderWay);
        token
    }

    /// Files an answer about a region; gives the region back if nobody waits for it.
    pub(crate) fn file_region(&mut self, reply: RegionReply) -> Result<Option<u32>, Lost> {
        match self.registering.get_mut(&reply.token) {
            Some(slot @ Registering::UnderWay) => {
                *slot = Registering::Answered(reply.result);
                Ok(None)
            }
            Some(Registering::Abandoned) => {
                self.registering.remove(&reply.token);
                Ok(reply.result.ok())
            }
            _ => Err(Lost::Broken("it answered a registration that was never asked for".to_owned())),
        }
    }

    pub(crate) fn take_registered(&mut self, token: u64) -> Option<Result<u32, String>> {
        match self.registering.remove(&token)? {
            Registering::Answered(result) => Some(result),
            waiting => {
                self.registering.insert(token, waiting);
                None
            }
        }
    }

    /// Nobody will ask for this region.
    pub(crate) fn abandon_registering(&mut self, token: u64) {
        self.registering.insert(token, Registering::Abandoned);
    }

    /// The request did not leave.
    pub(crate) fn forget_registering(&mut self, token: u64) {
        self.registering.remove(&token);
    }

    /// Ends the session. What was under way stays unanswered; its memory is let go.
    pub(crate) fn lose(&mut self, why: Lost) {
        self.session = None;
        self.lost.get_or_insert(why);
        self.pending.retain(|_, entry| {
            entry.target = None;
            !entry.abandoned
        });
    }
}
