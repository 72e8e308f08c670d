//! The host side of a GPU ring: who fills which entry, and which have been used.
//!
//! ```text
//! offset      0  magic u64, version u64, entries u64     written once by the client
//! offset     64  generation u64                          written by the client; a change revokes the ring
//! offset    128  consumed u64                            written by the client
//! offset   4096  one descriptor of 32 bytes per entry    written by the data plane
//!
//! descriptor: | ready u64 | fetch u64 | chunk u32, plane u32 | bytes u32, delivered u32 |
//! ```
//!
//! Entries are filled in the order of their sequence numbers 0, 1, 2, ...; number `n` lies in entry `n % entries`. The
//! data plane claims a number when a plane's copy begins and, when it has ended, writes the descriptor and then
//! `ready = n + 1`, with Release. The client takes the numbers in order: it waits for `ready` of the entry at its own
//! cursor, reads the descriptor, uses the GPU memory, and then raises `consumed`. Copies may end in any order; what is
//! taken never does.
//!
//! Neither side believes the other: the data plane checks that `consumed` neither goes backwards nor passes what was
//! claimed, the client that a descriptor's bytes fit an entry.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hugepages::Arena;

use crate::gpu::MAX_RING_ENTRIES;

const MAGIC: u64 = u64::from_le_bytes(*b"SHSRING\0");
const MAGIC_AT: usize = 0;
const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 16;
const GENERATION_AT: usize = 64;
const CONSUMED_AT: usize = 128;
const DESCRIPTORS_AT: usize = 4096;
const DESCRIPTOR_BYTES: usize = 32;

/// Bytes of the memory that goes with a ring of `entries`.
#[must_use]
pub const fn ring_words_bytes(entries: u32) -> usize {
    DESCRIPTORS_AT + entries as usize * DESCRIPTOR_BYTES
}

/// What an entry holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingDescriptor {
    /// The fetch's id, as the client chose it.
    pub fetch: u64,
    /// Index into the fetch's chunks.
    pub chunk: u32,
    /// Plane of the chunk: `layer * 2`, plus 1 for V.
    pub plane: u32,
    /// Bytes of the plane, from the entry's start on.
    pub bytes: u32,
    /// Whether the bytes are there; if not, the entry is only to be passed over.
    pub delivered: bool,
}

/// Why a ring is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GpuRingError {
    /// The memory is no ring's.
    #[error("the memory that came with the ring is none of version {version} for {entries} entries", version = crate::VERSION)]
    Foreign {
        /// Entries expected.
        entries: u32,
    },
    /// The client wrote another generation: its GPU memory is no longer to be written to.
    #[error("the ring was revoked: its generation is {found} and no longer {registered}")]
    Revoked {
        /// At registration.
        registered: u64,
        /// Now.
        found: u64,
    },
    /// A cursor or descriptor that no correct peer writes.
    #[error("the ring's {what} {value:#x} is impossible: register another ring")]
    Corrupt {
        /// Which word.
        what: &'static str,
        /// As read.
        value: u64,
    },
}

fn word(arena: &Arena, at: usize) -> Option<&AtomicU64> {
    arena.atomic_u64(at)
}

fn entry_at(entries: u32, sequence: u64) -> usize {
    let entry = sequence % u64::from(entries);
    DESCRIPTORS_AT + usize::try_from(entry).unwrap_or(0) * DESCRIPTOR_BYTES
}

/// The data plane's side. Any number of threads may use it: a number is claimed by one of them.
#[derive(Debug)]
pub struct RingProducer {
    arena: Arc<Arena>,
    entries: u32,
    generation: u64,
    claimed: AtomicU64,
    /// The largest `consumed` seen.
    consumed: AtomicU64,
    corrupt: AtomicBool,
}

impl RingProducer {
    /// Takes a ring's memory.
    ///
    /// # Errors
    /// When the memory is not that of a ring of `entries` and `generation`.
    pub fn new(arena: Arc<Arena>, entries: u32, generation: u64) -> Result<Self, GpuRingError> {
        let read = |at| word(&arena, at).map_or(0, |word| word.load(Ordering::Relaxed));
        let foreign = GpuRingError::Foreign { entries };
        if entries == 0 || entries > MAX_RING_ENTRIES || arena.bytes() < ring_words_bytes(entries) {
            return Err(foreign);
        }
        let header = (read(MAGIC_AT), read(VERSION_AT), read(ENTRIES_AT));
        if header != (MAGIC, u64::from(crate::VERSION), u64::from(entries)) {
            return Err(foreign);
        }
        let found = read(GENERATION_AT);
        if found != generation {
            return Err(GpuRingError::Revoked { registered: generation, found });
        }
        let (claimed, consumed) = (AtomicU64::new(0), AtomicU64::new(0));
        Ok(Self { arena, entries, generation, claimed, consumed, corrupt: AtomicBool::new(false) })
    }

    /// Entries of the ring.
    #[must_use]
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Takes the next number, if its entry is free.
    ///
    /// # Errors
    /// When the client revoked or corrupted the ring: it stays so.
    pub fn claim(&self) -> Result<Option<u64>, GpuRingError> {
        let read = |at| word(&self.arena, at).map_or(0, |word| word.load(Ordering::Acquire));
        let found = read(GENERATION_AT);
        if found != self.generation {
            return Err(GpuRingError::Revoked { registered: self.generation, found });
        }
        let consumed = read(CONSUMED_AT);
        // Claimed is read after consumed, so that a consumed number was claimed before.
        let mut claimed = self.claimed.load(Ordering::Acquire);
        let seen = self.consumed.fetch_max(consumed, Ordering::Relaxed);
        if consumed > claimed || self.corrupt.load(Ordering::Relaxed) {
            self.corrupt.store(true, Ordering::Relaxed);
            return Err(GpuRingError::Corrupt { what: "consumed cursor", value: consumed });
        }
        let free_to = seen.max(consumed) + u64::from(self.entries);
        while claimed < free_to {
            match self.claimed.compare_exchange_weak(
                claimed,
                claimed + 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(number) => return Ok(Some(number)),
                Err(now) => claimed = now,
            }
        }
        Ok(None)
    }

    /// Which entry a number lies in.
    #[must_use]
    pub fn entry(&self, sequence: u64) -> u32 {
        u32::try_from(sequence % u64::from(self.entries)).unwrap_or(0)
    }

    /// Tells the client that a claimed number's copy has ended.
    pub fn publish(&self, sequence: u64, descriptor: &RingDescriptor) {
        let at = entry_at(self.entries, sequence);
        let RingDescriptor { fetch, chunk, plane, bytes, delivered } = *descriptor;
        let words =
            [fetch, u64::from(chunk) | u64::from(plane) << 32, u64::from(bytes) | u64::from(delivered) << 32];
        for (index, value) in (1..).zip(words) {
            if let Some(word) = word(&self.arena, at + 8 * index) {
                word.store(value, Ordering::Relaxed);
            }
        }
        if let Some(ready) = word(&self.arena, at) {
            ready.store(sequence + 1, Ordering::Release);
        }
    }
}

/// The client's side: one thread at a time.
#[derive(Debug)]
pub struct RingConsumer {
    arena: Arc<Arena>,
    entries: u32,
    entry_bytes: u64,
    generation: u64,
    next: u64,
}

impl RingConsumer {
    /// Makes a ring in `arena`, which has at least [`ring_words_bytes`].
    ///
    /// # Errors
    /// When it has less.
    pub fn create(
        arena: Arc<Arena>,
        entries: u32,
        entry_bytes: u64,
        generation: u64,
    ) -> Result<Self, GpuRingError> {
        if entries == 0 || entries > MAX_RING_ENTRIES || arena.bytes() < ring_words_bytes(entries) {
            return Err(GpuRingError::Foreign { entries });
        }
        let words = [
            (VERSION_AT, u64::from(crate::VERSION)),
            (ENTRIES_AT, u64::from(entries)),
            (GENERATION_AT, generation),
            (CONSUMED_AT, 0),
            (MAGIC_AT, MAGIC),
        ];
        for (at, value) in words {
            if let Some(word) = word(&arena, at) {
                word.store(value, Ordering::Release);
            }
        }
        Ok(Self { arena, entries, entry_bytes, generation, next: 0 })
    }

    /// The oldest entry that has been filled and not released: its index and what it holds.
    ///
    /// # Errors
    /// When the data plane wrote what no correct one writes.
    pub fn peek(&self) -> Result<Option<(u32, RingDescriptor)>, GpuRingError> {
        let at = entry_at(self.entries, self.next);
        let load = |index: usize, order| word(&self.arena, at + 8 * index).map_or(0, |word| word.load(order));
        let ready = load(0, Ordering::Acquire);
        if ready != self.next + 1 {
            let turn_before = (self.next + 1).saturating_sub(u64::from(self.entries));
            if ready == 0 || ready == turn_before {
                return Ok(None);
            }
            return Err(GpuRingError::Corrupt { what: "ready word", value: ready });
        }
        let [fetch, place, size] = [1, 2, 3].map(|index| load(index, Ordering::Relaxed));
        let halves = |word: u64| {
            let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
            (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
        };
        let ((chunk, plane), (bytes, delivered)) = (halves(place), halves(size));
        if u64::from(bytes) > self.entry_bytes || delivered > 1 {
            return Err(GpuRingError::Corrupt { what: "size word", value: size });
        }
        let entry = u32::try_from(self.next % u64::from(self.entries)).unwrap_or(0);
        let delivered = delivered == 1;
        Ok(Some((entry, RingDescriptor { fetch, chunk, plane, bytes, delivered })))
    }

    /// Gives the oldest entry back, once the GPU is done with it.
    pub fn release(&mut self) {
        self.next += 1;
        if let Some(word) = word(&self.arena, CONSUMED_AT) {
            word.store(self.next, Ordering::Release);
        }
    }

    /// Forbids any further copy into the ring. Copies under way go on: wait for the fetches' ends before the GPU memory
    /// is freed.
    pub fn revoke(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        if let Some(word) = word(&self.arena, GENERATION_AT) {
            word.store(self.generation, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use hugepages::{ArenaConfig, PageChoice};
    use proptest::prelude::*;

    use super::*;

    fn arena(entries: u32) -> Arc<Arena> {
        let bytes = ring_words_bytes(entries);
        Arc::new(
            Arena::new(ArenaConfig { name: "ring", bytes, page: PageChoice::Base, numa_node: None }).unwrap(),
        )
    }

    fn pair(entries: u32) -> (RingProducer, RingConsumer) {
        let arena = arena(entries);
        let consumer = RingConsumer::create(Arc::clone(&arena), entries, 4096, 7).unwrap();
        (RingProducer::new(arena, entries, 7).unwrap(), consumer)
    }

    fn descriptor(n: u64) -> RingDescriptor {
        let small = u32::try_from(n % 1000).unwrap();
        RingDescriptor {
            fetch: n,
            chunk: small,
            plane: small * 2,
            bytes: small,
            delivered: !n.is_multiple_of(3),
        }
    }

    proptest! {
        /// Copies end in any order; the twin is a queue. Nothing is taken before it was published, nothing twice, and
        /// no more is claimed than there are entries.
        #[test]
        fn numbers_are_taken_in_order(entries in 1..9u32, steps in prop::collection::vec((0..3u8, any::<prop::sample::Index>()), 0..200)) {
            let (producer, mut consumer) = pair(entries);
            let (mut claimed, mut taken, mut open) = (0u64, 0u64, Vec::new());
            for (what, which) in steps {
                match what {
                    0 => {
                        let free = claimed - taken < u64::from(entries);
                        prop_assert_eq!(producer.claim().unwrap(), free.then_some(claimed));
                        if free {
                            open.push(claimed);
                            claimed += 1;
                        }
                    }
                    1 if !open.is_empty() => {
                        let number = open.swap_remove(which.index(open.len()));
                        producer.publish(number, &descriptor(number));
                    }
                    _ => {
                        let ready = taken < claimed && !open.contains(&taken);
                        let expected = ready.then(|| (u32::try_from(taken % u64::from(entries)).unwrap(), descriptor(taken)));
                        prop_assert_eq!(consumer.peek().unwrap(), expected);
                        if ready {
                            consumer.release();
                            taken += 1;
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn hostile_words_are_named() {
        let (producer, mut consumer) = pair(2);
        let store = |at, value| word(&producer.arena, at).unwrap().store(value, Ordering::SeqCst);
        assert_eq!(producer.claim(), Ok(Some(0)));
        store(DESCRIPTORS_AT, 99);
        assert_eq!(consumer.peek(), Err(GpuRingError::Corrupt { what: "ready word", value: 99 }));
        producer.publish(0, &descriptor(0));
        store(DESCRIPTORS_AT + 24, 5000);
        assert_eq!(consumer.peek(), Err(GpuRingError::Corrupt { what: "size word", value: 5000 }));
        store(CONSUMED_AT, 2);
        let corrupt = Err(GpuRingError::Corrupt { what: "consumed cursor", value: 2 });
        assert_eq!(producer.claim(), corrupt);
        store(CONSUMED_AT, 0);
        assert!(producer.claim().is_err(), "a corrupt ring stays corrupt");

        let (producer, mut other) = pair(2);
        other.revoke();
        assert_eq!(producer.claim(), Err(GpuRingError::Revoked { registered: 7, found: 8 }));
        consumer.release();
        assert_eq!(
            RingProducer::new(arena(2), 2, 0).unwrap_err(),
            GpuRingError::Foreign { entries: 2 },
            "blank memory is no ring"
        );
        let words = arena(2);
        RingConsumer::create(Arc::clone(&words), 2, 64, 1).unwrap();
        assert!(RingProducer::new(Arc::clone(&words), 3, 1).is_err());
        assert!(RingProducer::new(Arc::clone(&words), 2, 2).is_err());
        assert!(RingProducer::new(words, u32::MAX, 1).is_err());
    }
}
