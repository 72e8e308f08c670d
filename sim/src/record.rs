//! What became of each fetch.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

/// How a fetch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum End {
    /// All of it arrived.
    Done,
    /// Some of it did not.
    Failed,
    /// On request.
    Cancelled,
}

/// What a fetch was to do and did.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// The data plane.
    pub plane: u32,
    /// When it was started.
    pub started_at: u64,
    /// When and how it ended.
    pub ended: Option<(u64, End)>,
    /// Encoded bytes wanted.
    pub bytes: u64,
    /// Bytes delivered.
    pub delivered: u64,
}

/// What a lookup was to find and found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// Chunks asked about.
    pub asked: u32,
    /// How it ended, and how many leading chunks were found.
    pub ended: Option<(End, u32)>,
}

/// What a save was to do and did.
#[derive(Clone, Debug, Serialize)]
pub struct Saved {
    /// The data plane.
    pub plane: u32,
    /// When it was started.
    pub started_at: u64,
    /// When the last of its offers ended.
    pub ended: Option<u64>,
    /// Offers that have not ended: one for each chunk and store.
    pub left: u32,
    /// Of those that have, which the store says it has, and which not.
    pub stored: u32,
    /// See above.
    pub refused: u32,
    /// Bytes of chunks that a store says it has.
    pub bytes: u64,
}

/// All fetches of a run, and how many bytes had arrived when.
#[derive(Debug, Default)]
pub struct Records {
    /// By the order's id.
    pub fetches: BTreeMap<u64, Record>,
    /// Saves, by the order's id.
    pub saves: BTreeMap<u64, Saved>,
    /// Chunks that a host was ever seen to hold, of those that were offered to it.
    pub held: BTreeSet<(u32, u32)>,
    /// Lookups, by the order's id.
    pub lookups: BTreeMap<u64, Answer>,
    /// Payload that was taken in, by host: each byte once.
    pub taken_in: BTreeMap<u32, u64>,
    /// Fetches that have not ended.
    pub under_way: u64,
    /// Grows whenever a fetch comes nearer to its end.
    pub progress: u64,
}

impl Records {
    /// A fetch begins.
    pub fn started(&mut self, id: u64, plane: u32, now: u64, bytes: u64) {
        let record = Record { plane, started_at: now, ended: None, bytes, delivered: 0 };
        assert!(self.fetches.insert(id, record).is_none(), "fetch {id} was started twice");
        self.under_way += 1;
    }

    /// Bytes of a fetch were delivered.
    pub fn delivered(&mut self, id: u64, bytes: u64) {
        let record = self.fetches.get_mut(&id).expect("only fetches that were started deliver");
        assert!(record.ended.is_none(), "fetch {id} delivers after its end");
        record.delivered += bytes;
        self.progress += 1;
        assert!(record.delivered <= record.bytes, "fetch {id} delivers more than it wanted");
    }

    /// Payload arrived that the host did not have.
    #[inline]
    pub fn took_in(&mut self, host: u32, bytes: u64) {
        *self.taken_in.entry(host).or_default() += bytes;
        self.progress += 1;
    }

    /// A save begins, of so many offers.
    pub fn save_started(&mut self, id: u64, plane: u32, now: u64, offers: u32) {
        let save =
            Saved { plane, started_at: now, ended: None, left: offers, stored: 0, refused: 0, bytes: 0 };
        assert!(offers > 0 && self.saves.insert(id, save).is_none(), "save {id} was started twice");
    }

    /// An offer of a save ended; `stored` are the chunk's bytes if the store says that it has them.
    pub fn offer_ended(&mut self, id: u64, now: u64, stored: Option<u64>) {
        let save = self.saves.get_mut(&id).expect("only saves that were started end");
        assert!(save.left > 0 && save.ended.is_none(), "save {id}: each offer ends once");
        save.left -= 1;
        save.stored += u32::from(stored.is_some());
        save.refused += u32::from(stored.is_none());
        save.bytes += stored.unwrap_or(0);
        save.ended = (save.left == 0).then_some(now);
        self.progress += 1;
    }

    /// A fetch ended.
    pub fn ended(&mut self, id: u64, now: u64, end: End) {
        let record = self.fetches.get_mut(&id).expect("only fetches that were started end");
        assert!(record.ended.is_none(), "fetch {id} ended twice");
        record.ended = Some((now, end));
        if end == End::Done {
            assert_eq!(record.delivered, record.bytes, "fetch {id} is done with something missing");
        }
        self.under_way -= 1;
        self.progress += 1;
    }
}
