//! Waking a peer that sleeps, and only then.
//!
//! Each side has one flag word in shared memory, written by itself to say what it wants to be woken for, and one
//! end of a socket pair, on which the other side's ring arrives as a byte. A side that is busy leaves its flag
//! zero and costs its peer one load per message; a system call is made only when somebody sleeps.
//!
//! The race to exclude: the consumer sees an empty ring and goes to sleep while the producer puts something in
//! and sees no sleeper. Dekker's pattern excludes it. Both sides first store, then fence, then load what the
//! other stores:
//!
//! ```text
//! consumer: flag = DATA      fence(SeqCst)   ring empty?     -> sleep, else stay
//! producer: cursor += frame  fence(SeqCst)   flag has DATA?  -> ring the bell
//! ```
//!
//! Sequentially consistent fences are totally ordered. Whichever fence is second, its side's load sees what the
//! other stored, so at least one of them notices. Noticing twice is harmless: the bell is level-triggered and
//! whoever wakes looks at the ring. The same holds the other way round for a producer that waits for space.
//!
//! Why a socket pair and not an eventfd: passing an eventfd shares its open file description, and with it
//! O_NONBLOCK. A hostile peer could clear that flag and fill the counter, and the next ring would block this
//! process for ever. Each end of a socket pair has a description of its own, and its hang-up is seen too.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use hugepages::Arena;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// Wake me when there is something to receive.
pub const WANT_DATA: u64 = 1;
/// Wake me when there is room to send.
pub const WANT_SPACE: u64 = 2;

/// Reads per [`Doorbell::clear`]; a peer that rings faster than this is met again at the next poll.
const CLEAR_READS: usize = 4;

/// One side's end of the bell: wakes the peer, is woken by the peer.
#[derive(Debug)]
pub struct Doorbell {
    arena: Arc<Arena>,
    own_flag_at: usize,
    peer_flag_at: usize,
    line: Arc<OwnedFd>,
}

/// A connected pair of lines, one for each side.
///
/// # Errors
/// Whatever `socketpair` answers, in practice only that no file descriptors are left.
pub fn line_pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

impl Doorbell {
    /// A bell with the flag words at these offsets of the arena, multiples of 8, and one end of a line.
    /// `None` when the offsets are not in the arena.
    #[must_use]
    pub fn new(
        arena: Arc<Arena>,
        own_flag_at: usize,
        peer_flag_at: usize,
        line: Arc<OwnedFd>,
    ) -> Option<Self> {
        arena.atomic_u64(own_flag_at)?;
        arena.atomic_u64(peer_flag_at)?;
        Some(Self { arena, own_flag_at, peer_flag_at, line })
    }

    /// Becomes readable when the peer rings.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.line.as_fd()
    }

    /// Says that this side wants to be woken for `wants`, then orders that before whatever is loaded next:
    /// the caller must look at the rings again before it sleeps.
    pub fn want(&self, wants: u64) {
        if let Some(flag) = self.arena.atomic_u64(self.own_flag_at) {
            flag.fetch_or(wants, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }

    /// Takes a wish back. The peer may have rung already.
    pub fn forgo(&self, wants: u64) {
        if let Some(flag) = self.arena.atomic_u64(self.own_flag_at) {
            flag.fetch_and(!wants, Ordering::Relaxed);
        }
    }

    /// Wakes the peer if it wants to be woken for `what`; to be called after the cursor has been published.
    pub fn notify(&self, what: u64) {
        fence(Ordering::SeqCst);
        let Some(flag) = self.arena.atomic_u64(self.peer_flag_at) else { return };
        // The load keeps the common case, nobody sleeps, free of a locked instruction on a contended line.
        if flag.load(Ordering::Relaxed) & what != 0 && flag.fetch_and(!what, Ordering::Relaxed) & what != 0 {
            self.ring();
        }
    }

    /// Wakes the peer whether it sleeps or not.
    pub fn ring(&self) {
        // A full line means that the peer has been rung and not looked yet; a closed one that it is gone,
        // which the session's socket reports. Neither is an error here.
        let _ = rustix::net::send(&self.line, &[1], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }

    /// Takes back the rings that have arrived, so that [`Doorbell::fd`] is quiet again. Look at the rings of
    /// messages after this, not before.
    pub fn clear(&self) {
        let mut rings = [0_u8; 256];
        for _ in 0..CLEAR_READS {
            match rustix::net::recv(&self.line, &mut rings, RecvFlags::DONTWAIT) {
                Ok((_, taken)) if taken == rings.len() => {}
                _ => return,
            }
        }
    }
}
