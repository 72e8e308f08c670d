//! What happens next.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Something that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Due {
    /// The first packet of a link's queue arrives at the link's end.
    Link(u32),
    /// A packet that was reordered arrives at the end of a link.
    Packet {
        /// Which link.
        link: u32,
        /// Which packet.
        packet: u32,
    },
    /// A host's turn.
    Host(u32),
    /// The next of the scenario's actions.
    Action,
}

/// Events by time; events of one time in the order in which they were put in, so that a run depends on its
/// seed alone.
#[derive(Debug, Default)]
pub struct Queue {
    heap: BinaryHeap<Reverse<(u64, u64, Due)>>,
    sequence: u64,
}

impl Queue {
    /// Puts an event in.
    #[inline]
    pub fn push(&mut self, at: u64, due: Due) {
        self.sequence += 1;
        self.heap.push(Reverse((at, self.sequence, due)));
    }

    /// Takes the next event out.
    #[inline]
    pub fn pop(&mut self) -> Option<(u64, Due)> {
        self.heap.pop().map(|Reverse((at, _, due))| (at, due))
    }

    /// When the next event is due.
    #[inline]
    pub fn next_at(&self) -> Option<u64> {
        self.heap.peek().map(|Reverse((at, _, _))| *at)
    }
}
