//! What a simulated machine is to the world around it.

use crate::net::Net;
use crate::record::Records;

/// A fetch, lookup or save that a data plane is to make.
#[derive(Clone, Debug)]
pub struct Order {
    /// Names it in the run.
    pub id: u64,
    /// The host that holds its chunks, or none: each chunk is on the stores that the data plane's placement says.
    /// (Of a save: the hosts that each chunk is offered to; none, and each goes to the first of those stores.)
    pub stores: Vec<u32>,
    /// Its chunks, by number in the run.
    pub chunks: std::ops::Range<u32>,
    /// Time that it has.
    pub deadline_nanos: u64,
}

/// Something that happens to one host.
#[derive(Clone, Debug)]
pub enum Deed {
    /// Starts a fetch.
    Fetch(Order),
    /// Asks how much of the prefix that the order names is stored.
    Lookup(Order),
    /// Offers chunks to stores.
    Save(Order),
    /// Ends a fetch, lookup or save early.
    Cancel(u64),
    /// Dies: forgets everything, answers nothing.
    Crash,
    /// Comes back with another epoch and other handles.
    Restart,
    /// Forgets a chunk.
    Forget(u32),
    /// Its clock jumps forwards.
    ClockJump(u64),
    /// Its decoders take this long per plane from now on.
    DecodeNanos(u64),
}

/// A simulated machine. Between two turns packets gather in its receive ring.
pub trait Host {
    /// One turn of its loop: takes in the packets of `rx` (the caller frees them), sends through `net`, and says when
    /// it must have its next turn if no packet comes before.
    fn turn(&mut self, net: &mut Net, records: &mut Records, rx: &[u32]) -> Option<u64>;

    /// Something happens to it. The turn that follows is the caller's to give.
    fn befall(&mut self, net: &mut Net, records: &mut Records, deed: Deed);

    /// Whether it takes packets.
    fn is_up(&self) -> bool {
        true
    }

    /// Panics if anything is left over now that nothing more happens.
    fn assert_quiet(&self) {}

    /// Names and values to show after a run.
    fn counters(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
}
