//! PULLs under way, in the order in which each peer was asked.
//!
//! A record outlives its PULL until its slot is used again, oldest first, so that a segment which comes late still
//! finds when it was asked for.

use std::collections::VecDeque;

use crate::time::Instant;

use super::index::{AskIndex, Index, PathIndex, SpanIndex};
use super::tag;

/// A PULL: up to 64 segments of one span.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask {
    /// Its number on the wire: the slot, and the generation of its use.
    pub(crate) sequence: u32,
    /// Its place among all PULLs of this puller, from 1.
    pub(crate) order: u64,
    pub(crate) sent_at: Instant,
    pub(crate) path: PathIndex,
    pub(crate) span: SpanIndex,
    /// Its first segment.
    pub(crate) base: u32,
    /// Of the 64 segments from `base`, those under way; none when it is over.
    pub(crate) outstanding: u64,
    /// Whether nothing of it has arrived.
    pub(crate) is_untouched: bool,
    before: Option<AskIndex>,
    behind: Option<AskIndex>,
}

/// The PULLs of one path that are under way, oldest first.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AskList {
    first: Option<AskIndex>,
    last: Option<AskIndex>,
}

impl AskList {
    /// The PULL that has been under way for longest.
    #[inline]
    pub(crate) fn oldest(&self) -> Option<AskIndex> {
        self.first
    }

    /// The PULL sent last.
    pub(crate) fn newest(&self) -> Option<AskIndex> {
        self.last
    }
}

/// All PULLs of a puller.
#[derive(Debug)]
pub(crate) struct Asks {
    table: Box<[Ask]>,
    free: VecDeque<AskIndex>,
    last_order: u64,
}

impl Asks {
    pub(crate) fn new(capacity: usize, seed: u32) -> Asks {
        let blank = |slot: usize| Ask {
            sequence: tag::first(u16::try_from(slot).expect("checked by Puller::new"), seed),
            order: 0,
            sent_at: Instant::ZERO,
            path: PathIndex(0),
            span: SpanIndex(0),
            base: 0,
            outstanding: 0,
            is_untouched: false,
            before: None,
            behind: None,
        };
        Asks {
            table: (0..capacity).map(blank).collect(),
            free: AskIndex::all(capacity).collect(),
            last_order: 0,
        }
    }

    /// Whether another PULL can be sent.
    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// The place in the order of the PULL sent last.
    pub(crate) fn last_order(&self) -> u64 {
        self.last_order
    }

    #[inline]
    pub(crate) fn get(&self, index: AskIndex) -> &Ask {
        &self.table[index.at()]
    }

    /// The record of a number that a peer has sent, if it is still there.
    #[inline]
    pub(crate) fn find(&self, sequence: u32) -> Option<&Ask> {
        self.table.get(usize::from(tag::slot_of(sequence))).filter(|ask| ask.sequence == sequence)
    }

    /// A PULL along `path` that is under way, by its number.
    pub(crate) fn under_way(&self, sequence: u32, path: PathIndex) -> Option<AskIndex> {
        let ask = self.find(sequence)?;
        (ask.outstanding != 0 && ask.path == path).then(|| AskIndex(tag::slot_of(sequence)))
    }

    /// Notes that a PULL for `outstanding` segments from `base` on is sent along the path of `list`.
    pub(crate) fn push(
        &mut self,
        list: &mut AskList,
        now: Instant,
        path: PathIndex,
        span: SpanIndex,
        (base, outstanding): (u32, u64),
    ) -> AskIndex {
        assert!(outstanding & 1 == 1, "a PULL begins with a segment that it asks for");
        let index = self.free.pop_front().expect("the caller has seen a free record");
        self.last_order += 1;
        self.table[index.at()] = Ask {
            sequence: tag::next(self.table[index.at()].sequence),
            order: self.last_order,
            sent_at: now,
            path,
            span,
            base,
            outstanding,
            is_untouched: true,
            before: list.last,
            behind: None,
        };
        match list.last {
            Some(last) => self.table[last.at()].behind = Some(index),
            None => list.first = Some(index),
        }
        list.last = Some(index);
        index
    }

    /// Takes the segments of `mask`, which arrived, out of a PULL under way.
    #[inline]
    pub(crate) fn arrived(&mut self, list: &mut AskList, index: AskIndex, mask: u64) {
        self.table[index.at()].is_untouched = false;
        self.take(list, index, mask);
    }

    /// Takes the segments of `mask` out of a PULL under way, arrived or given up; with the last the PULL is over.
    #[inline]
    pub(crate) fn take(&mut self, list: &mut AskList, index: AskIndex, mask: u64) {
        let ask = &mut self.table[index.at()];
        assert!(ask.outstanding & mask == mask, "only what is under way is taken");
        ask.outstanding &= !mask;
        if ask.outstanding == 0 {
            self.end(list, index);
        }
    }

    fn end(&mut self, list: &mut AskList, index: AskIndex) {
        let Ask { before, behind, .. } = self.table[index.at()];
        match before {
            Some(before) => self.table[before.at()].behind = behind,
            None => list.first = behind,
        }
        match behind {
            Some(behind) => self.table[behind.at()].before = before,
            None => list.last = before,
        }
        self.free.push_back(index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A tail probe says nothing of whether the path carries the PULL's segments.
    #[test]
    fn only_an_arrival_touches_a_pull() {
        let mut asks = Asks::new(1, 1);
        let mut list = AskList::default();
        let index = asks.push(&mut list, Instant::ZERO, PathIndex(0), SpanIndex(0), (5, 0b111));
        asks.take(&mut list, index, 0b100);
        assert!(asks.get(index).is_untouched);
        asks.arrived(&mut list, index, 0b10);
        assert!(!asks.get(index).is_untouched);
    }

    proptest! {
        /// The list against a plain vector: pushed at the end, taken anywhere.
        #[test]
        fn order_is_kept(steps in proptest::collection::vec((any::<bool>(), 0_usize..8), 0..200)) {
            let mut asks = Asks::new(6, 1);
            let mut list = AskList::default();
            let mut twin: Vec<(AskIndex, u64)> = Vec::new();
            for (push, at) in steps {
                if push && asks.has_room() {
                    let index = asks.push(&mut list, Instant::ZERO, PathIndex(0), SpanIndex(0), (5, 0b11));
                    let ask = asks.get(index);
                    prop_assert!(twin.last().is_none_or(|(_, order)| *order < ask.order));
                    prop_assert_eq!(asks.find(ask.sequence).map(|ask| ask.order), Some(ask.order));
                    twin.push((index, ask.order));
                } else if !twin.is_empty() {
                    let (index, order) = twin[at % twin.len()];
                    let sequence = asks.get(index).sequence;
                    asks.take(&mut list, index, 0b10);
                    prop_assert_eq!(asks.get(index).outstanding, 1);
                    asks.take(&mut list, index, 0b1);
                    twin.retain(|entry| entry.1 != order);
                    prop_assert!(asks.find(sequence).is_some(), "a record outlives its PULL");
                }
                let mut forward = Vec::new();
                let mut next = list.oldest();
                while let Some(index) = next {
                    forward.push((index, asks.get(index).order));
                    next = asks.get(index).behind;
                }
                prop_assert_eq!(&forward, &twin);
                prop_assert_eq!(list.newest(), twin.last().map(|entry| entry.0));
                prop_assert_eq!(asks.has_room(), twin.len() < 6);
            }
        }
    }
}
