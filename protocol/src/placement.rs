//! Which stores hold a chunk: rendezvous hashing (Thaler and Ravishankar, IEEE/ACM ToN 1998) over a list of stores.
//!
//! Every store has a weight for every key, and the chunk is kept by the `replicas` stores of the greatest weights. Who
//! knows the list knows the places, in whatever order the list is written. A store that is added takes its share from
//! all the others alike, and nothing else moves.

use crate::fetch::StoreIndex;
use crate::key::Key;

/// Most stores that keep one chunk.
pub const MAX_REPLICAS: usize = 8;

const ID_CONTEXT: &str = "shadowserve store id, version 1";

/// The number by which a store is placed: of its name, on which store and data plane must agree to the letter. The
/// address and port as printed (`10.0.0.1:4791`) serve.
pub fn store_id(name: &str) -> u64 {
    let hash = blake3::derive_key(ID_CONTEXT, name.as_bytes());
    first_word(&hash)
}

fn first_word(bytes: &[u8; 32]) -> u64 {
    bytes.first_chunk().map_or(0, |word| u64::from_le_bytes(*word))
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): every bit of the result depends on every bit of the input.
const fn mix(word: u64) -> u64 {
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

/// A list of stores, and how many of them keep each chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Mixed ids, by store index.
    ids: Box<[u64]>,
    replicas: usize,
}

/// Stores that should hold a chunk, the first to be asked first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidates {
    stores: [StoreIndex; MAX_REPLICAS],
    len: usize,
}

impl Candidates {
    /// One store and no other.
    pub const fn one(store: StoreIndex) -> Candidates {
        Candidates { stores: [store; MAX_REPLICAS], len: 1 }
    }

    /// In the order in which they are to be asked.
    pub fn as_slice(&self) -> &[StoreIndex] {
        &self.stores[..self.len]
    }
}

/// A placement that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// No stores, or more than an index can name.
    #[error("{0} stores are outside 1 to 65,535")]
    Stores(usize),
    /// More replicas than stores, or none, or more than are allowed.
    #[error(
        "{replicas} replicas over {stores} stores: give at least 1, and at most the stores there are and {MAX_REPLICAS}"
    )]
    Replicas {
        /// Asked for.
        replicas: usize,
        /// Stores listed.
        stores: usize,
    },
    /// The same store twice.
    #[error("store number {0} is listed twice (stores count from 0)")]
    Twice(usize),
}

impl Placement {
    /// Stores of the given ids ([`store_id`]), each chunk kept by `replicas` of them.
    ///
    /// # Errors
    /// If there are too few or too many stores, or one is listed twice.
    pub fn new(ids: &[u64], replicas: usize) -> Result<Placement, PlacementError> {
        if ids.is_empty() || ids.len() > usize::from(u16::MAX) {
            return Err(PlacementError::Stores(ids.len()));
        }
        if replicas == 0 || replicas > ids.len() || replicas > MAX_REPLICAS {
            return Err(PlacementError::Replicas { replicas, stores: ids.len() });
        }
        if let Some(again) = (1..ids.len()).find(|at| ids[..*at].contains(&ids[*at])) {
            return Err(PlacementError::Twice(again));
        }
        Ok(Placement { ids: ids.iter().map(|id| mix(*id)).collect(), replicas })
    }

    /// How many stores there are.
    pub fn stores(&self) -> usize {
        self.ids.len()
    }

    /// How many stores keep each chunk.
    pub fn replicas(&self) -> usize {
        self.replicas
    }

    /// The stores that should hold the chunk `key`.
    pub fn candidates(&self, key: &Key) -> Candidates {
        let word = first_word(&key.0);
        let mut best = [(0_u64, StoreIndex(0)); MAX_REPLICAS];
        let mut len = 0;
        for (store, id) in (0..=u16::MAX).zip(&self.ids) {
            let entry = (mix(word ^ id), StoreIndex(store));
            let place = best[..len].partition_point(|other| other.0 >= entry.0);
            if place < self.replicas {
                len = (len + 1).min(self.replicas);
                best.copy_within(place..len - 1, place + 1);
                best[place] = entry;
            }
        }
        Candidates { stores: best.map(|(_, store)| store), len }
    }

    /// Whether `store` should hold the chunk `key`.
    pub fn holds(&self, store: StoreIndex, key: &Key) -> bool {
        self.candidates(key).as_slice().contains(&store)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(number: u64) -> Key {
        let mut key = Key([7; 32]);
        key.0[..8].copy_from_slice(&number.to_le_bytes());
        key
    }

    proptest! {
        /// The stores of the greatest weights, by sorting all of them.
        #[test]
        fn candidates_equal_a_sort(ids in proptest::collection::hash_set(any::<u64>(), 1..40), replicas in 1_usize..9, number in any::<u64>()) {
            let ids: Vec<u64> = ids.into_iter().collect();
            let replicas = replicas.min(ids.len());
            let placement = Placement::new(&ids, replicas).unwrap();
            let mut sorted: Vec<(u64, usize)> = ids.iter().enumerate().map(|(at, id)| (mix(number ^ mix(*id)), at)).collect();
            sorted.sort_by_key(|(weight, _)| std::cmp::Reverse(*weight));
            let twin: Vec<usize> = sorted.iter().take(replicas).map(|(_, at)| *at).collect();
            let candidates = placement.candidates(&key(number));
            let found: Vec<usize> = candidates.as_slice().iter().map(|store| usize::from(store.0)).collect();
            prop_assert_eq!(found, twin);
        }

        /// What moves when a store is added moves to it, and is about its share.
        #[test]
        fn an_added_store_takes_its_share_and_nothing_else_moves(ids in proptest::collection::hash_set(any::<u64>(), 2..20), replicas in 1_usize..4) {
            let ids: Vec<u64> = ids.into_iter().collect();
            let (before, replicas) = (&ids[..ids.len() - 1], replicas.min(ids.len() - 1));
            let old = Placement::new(before, replicas).unwrap();
            let new = Placement::new(&ids, replicas).unwrap();
            let added = StoreIndex(u16::try_from(before.len()).unwrap());
            let mut taken = 0;
            for number in 0..2000 {
                let (was, is) = (old.candidates(&key(number)), new.candidates(&key(number)));
                let others: Vec<_> = is.as_slice().iter().filter(|store| **store != added).collect();
                prop_assert!(others.iter().all(|store| was.as_slice().contains(store)), "only the new store gains");
                taken += usize::from(new.holds(added, &key(number)));
            }
            let fair = 2000 * replicas / ids.len();
            prop_assert!(taken.abs_diff(fair) < 60 + fair / 3, "{taken} where {fair} are its share");
        }
    }

    #[test]
    fn the_order_of_the_list_does_not_matter_and_ids_are_stable() {
        let names = ["10.0.0.1:4791", "10.0.0.2:4791", "10.0.0.3:4791"];
        let ids = names.map(store_id);
        let (forward, backward) =
            (Placement::new(&ids, 2).unwrap(), Placement::new(&[ids[2], ids[1], ids[0]], 2).unwrap());
        for number in 0..100 {
            let name = |store: &StoreIndex, turn: bool| {
                let at = usize::from(store.0);
                names[if turn { 2 - at } else { at }]
            };
            let there: Vec<_> =
                forward.candidates(&key(number)).as_slice().iter().map(|s| name(s, false)).collect();
            let back: Vec<_> =
                backward.candidates(&key(number)).as_slice().iter().map(|s| name(s, true)).collect();
            assert_eq!(there, back);
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert_eq!(Placement::new(&[], 1), Err(PlacementError::Stores(0)));
        assert_eq!(Placement::new(&[1], 2), Err(PlacementError::Replicas { replicas: 2, stores: 1 }));
        assert_eq!(Placement::new(&[1, 2], 0), Err(PlacementError::Replicas { replicas: 0, stores: 2 }));
        assert_eq!(Placement::new(&[1, 2, 1], 1), Err(PlacementError::Twice(2)));
    }
}
