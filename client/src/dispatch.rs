//! The session's own thread: it takes completions as they come, writes the heartbeat, and notices the data
//! plane's end. It exists so that a serving process that is busy elsewhere neither holds up the data plane nor
//! looks dead to it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use control::{BEAT_INTERVAL_MS, now_ns};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::lost::Lost;
use crate::shared::{Shared, State};

/// Completions taken under one lock, so that callers get their turn.
const COMPLETIONS_PER_PASS: usize = 256;

/// Runs until the session is lost.
pub(crate) fn run(shared: &Arc<Shared>, fds: &[OwnedFd; 2]) {
    while let Some(asleep) = pass(shared) {
        if asleep {
            sleep(fds);
        }
    }
}

/// One look at everything. `None` when the session is over, else whether to sleep.
fn pass(shared: &Shared) -> Option<bool> {
    let mut state = shared.lock().ok()?;
    shared.flush_retired(&mut state);
    let result = look(&mut state, shared);
    if let Err(lost) = &result {
        state.lose(lost.clone());
    }
    // Also wakes those who wait for room in the command ring: the doorbell rings for that, too.
    shared.notify();
    state.lost.is_none().then_some(result.unwrap_or(false))
}

fn look(state: &mut State, shared: &Shared) -> Result<bool, Lost> {
    let Some(session) = &mut state.session else { return Ok(false) };
    session.set_sleeping(false);
    session.beat(now_ns());
    let (mut reply, mut socket_error) = (None, None);
    match session.handle_socket() {
        Ok(message) => reply = message,
        // Look at the completions first: what ended before the data plane did has ended.
        Err(error) => socket_error = Some(Lost::from(error)),
    }
    let more = drain(state)?;
    if let Some(reply) = reply
        && let Some(region) = state.file_region(reply)?
    {
        shared.retire(region);
    }
    if let Some(lost) = socket_error {
        return Err(lost);
    }
    let Some(session) = &mut state.session else { return Ok(false) };
    let limit = shared.config.heartbeat_limit;
    if !session.peer_alive(now_ns(), limit) {
        return Err(Lost::Silent { limit_ms: limit.as_millis() });
    }
    Ok(!more && session.set_sleeping(true))
}

/// Files the completions that have arrived; whether there may be more.
pub(crate) fn drain(state: &mut State) -> Result<bool, Lost> {
    for _ in 0..COMPLETIONS_PER_PASS {
        let Some(session) = &mut state.session else { return Ok(false) };
        match session.next_completion()? {
            Some(completion) => state.file(completion)?,
            None => return Ok(false),
        }
    }
    Ok(true)
}

/// Sleeps until the data plane rings or hangs up, at most one heartbeat.
fn sleep([socket, doorbell]: &[OwnedFd; 2]) {
    let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::new(doorbell, PollFlags::IN)];
    let limit = Timespec { tv_sec: 0, tv_nsec: i64::try_from(BEAT_INTERVAL_MS).unwrap_or(100) * 1_000_000 };
    // An error here, such as a signal, only means another look.
    let _ = rustix::event::poll(&mut fds, Some(&limit));
}
