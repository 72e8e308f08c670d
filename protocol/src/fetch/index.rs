//! Index types of the engine's tables, and lists threaded through them.

use crate::pull::index;
pub(super) use crate::pull::{Index, SpanIndex as TransferIndex};

index! {
    /// A fetch under way.
    JobIndex,
    /// A lookup under way.
    LookupIndex,
    /// A chunk being looked up or pulled.
    ChunkIndex,
    /// A key that is looked up: one per chunk slot first, then those of each lookup.
    QueryIndex,
    /// A LOOKUP message: a few of each store, one store behind the other.
    RequestIndex,
}

/// First in, first out, threaded through a table of links: an entry is in at most one list per table.
#[derive(Clone, Copy, Debug)]
pub(super) struct List<I> {
    head: Option<I>,
    tail: Option<I>,
}

/// For each entry of a table, the one behind it in its list.
pub(super) type Links<I> = Box<[Option<I>]>;

impl<I: Index> List<I> {
    pub(super) const EMPTY: List<I> = List { head: None, tail: None };

    #[inline]
    pub(super) fn front(&self) -> Option<I> {
        self.head
    }

    /// The entry behind `entry`.
    #[inline]
    pub(super) fn behind(links: &Links<I>, entry: I) -> Option<I> {
        links[entry.at()]
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.head.is_none()
    }

    pub(super) fn push_back(&mut self, links: &mut Links<I>, entry: I) {
        links[entry.at()] = None;
        match self.tail {
            Some(tail) => links[tail.at()] = Some(entry),
            None => self.head = Some(entry),
        }
        self.tail = Some(entry);
    }

    pub(super) fn push_front(&mut self, links: &mut Links<I>, entry: I) {
        links[entry.at()] = self.head;
        self.head = Some(entry);
        if self.tail.is_none() {
            self.tail = Some(entry);
        }
    }

    pub(super) fn pop_front(&mut self, links: &mut Links<I>) -> Option<I> {
        let head = self.head?;
        self.head = links[head.at()].take();
        if self.head.is_none() {
            self.tail = None;
        }
        Some(head)
    }

    /// Takes `entry` out, wherever it is; walks the list, so not for the path of every packet.
    pub(super) fn remove(&mut self, links: &mut Links<I>, entry: I) {
        if self.head == Some(entry) {
            self.pop_front(links);
            return;
        }
        let mut before = self.head;
        while let Some(current) = before {
            if links[current.at()] == Some(entry) {
                links[current.at()] = links[entry.at()].take();
                if self.tail == Some(entry) {
                    self.tail = Some(current);
                }
                return;
            }
            before = links[current.at()];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        #[test]
        fn list_equals_a_deque(steps in proptest::collection::vec((0_u8..4, 0_u16..12), 0..200)) {
            let mut links: Links<ChunkIndex> = vec![None; 12].into();
            let mut list = List::EMPTY;
            let mut twin = VecDeque::new();
            for (step, entry) in steps {
                let present = twin.contains(&entry);
                match step {
                    0 if !present => { list.push_back(&mut links, ChunkIndex(entry)); twin.push_back(entry); }
                    1 if !present => { list.push_front(&mut links, ChunkIndex(entry)); twin.push_front(entry); }
                    2 => { prop_assert_eq!(list.pop_front(&mut links).map(|e| e.0), twin.pop_front()); }
                    3 => { list.remove(&mut links, ChunkIndex(entry)); twin.retain(|e| *e != entry); }
                    _ => {}
                }
                prop_assert_eq!(list.front().map(|e| e.0), twin.front().copied());
                prop_assert_eq!(list.is_empty(), twin.is_empty());
            }
        }
    }
}
