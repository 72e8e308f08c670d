//! What a serving lcore and the keeper's thread say to each other, through rings of fixed size that neither waits for.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use crossbeam_queue::ArrayQueue;
use hugepages::Block;
use protocol::Key;
use protocol::put::{Declined, Intake, PutVerdict};

use crate::check::{Fault, check};
use crate::keeper::{Keeper, Room};

/// How long a chunk waits for memory that is being let go before its data plane is told to come again.
const ROOM_PATIENCE: Duration = Duration::from_millis(20);

/// From a lcore. An intake has at most one ask under way.
#[derive(Debug)]
pub(crate) enum Ask {
    /// Find memory.
    Reserve { intake: Intake, key: Key, bytes: u32 },
    /// Check a chunk that arrived, and make it visible.
    Check { intake: Intake, key: Key, header_bytes: u32, block: Block },
    /// It will not arrive. Not answered.
    Release { key: Key, block: Block },
}

/// To a lcore.
#[derive(Debug)]
pub(crate) enum Answer {
    Reserved { intake: Intake, key: Key, memory: Result<Block, Declined> },
    Checked { intake: Intake, verdict: PutVerdict, damaged: Option<Damaged> },
}

/// Damaged places that are told apart; the last stands for all that follow, too.
const WRONG_RANGES: usize = 6;

/// The memory of a chunk that is to be pulled again, and what of it is wrong.
#[derive(Debug)]
pub(crate) struct Damaged {
    pub(crate) key: Key,
    pub(crate) block: Block,
    /// In order; the last covers all that there was no room for.
    pub(crate) wrong: ArrayVec<Range<u64>, WRONG_RANGES>,
}

impl Damaged {
    fn new(key: Key, block: Block, found: Vec<Range<u64>>) -> Damaged {
        let mut wrong: ArrayVec<Range<u64>, WRONG_RANGES> = ArrayVec::new();
        for range in found {
            if wrong.is_full() {
                wrong[WRONG_RANGES - 1].end = range.end;
            } else {
                wrong.push(range);
            }
        }
        Damaged { key, block, wrong }
    }
}

/// The rings between one lcore and the keeper.
#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) asks: ArrayQueue<Ask>,
    pub(crate) answers: ArrayQueue<Answer>,
}

impl Exchange {
    /// Rings that never fill, for so many intakes.
    pub(crate) fn new(intakes: u16) -> Exchange {
        // Of each intake one ask, and the release of one before it.
        let capacity = 2 * usize::from(intakes).max(1);
        Exchange { asks: ArrayQueue::new(capacity), answers: ArrayQueue::new(capacity) }
    }
}

/// A chunk that waits for memory.
struct Waiting {
    queue: usize,
    intake: Intake,
    key: Key,
    bytes: u32,
    since: Instant,
}

/// The keeper's side of all exchanges.
pub(crate) struct Desk<'a> {
    pub(crate) keeper: &'a mut Keeper,
    exchanges: Vec<Arc<Exchange>>,
    waiting: Vec<Waiting>,
}

impl<'a> Desk<'a> {
    pub(crate) fn new(keeper: &'a mut Keeper, exchanges: Vec<Arc<Exchange>>) -> Desk<'a> {
        Desk { keeper, exchanges, waiting: Vec::new() }
    }

    /// Takes what lcores ask; returns how much that was, with what still waits.
    pub(crate) fn poll(&mut self) -> usize {
        let mut work = self.waiting.len();
        for waiting in std::mem::take(&mut self.waiting) {
            self.reserve(waiting);
        }
        for queue in 0..self.exchanges.len() {
            while let Some(ask) = self.exchanges[queue].asks.pop() {
                work += 1;
                self.take(queue, ask);
            }
        }
        self.keeper.tend();
        work
    }

    fn take(&mut self, queue: usize, ask: Ask) {
        match ask {
            Ask::Reserve { intake, key, bytes } => {
                self.reserve(Waiting { queue, intake, key, bytes, since: Instant::now() });
            }
            Ask::Check { intake, key, header_bytes, block } => {
                let answer = self.check(intake, key, header_bytes, block);
                self.answer(queue, answer);
            }
            Ask::Release { key, block } => self.keeper.release(&key, block),
        }
    }

    fn reserve(&mut self, waiting: Waiting) {
        let Waiting { queue, intake, key, bytes, since } = waiting;
        let memory = match self.keeper.reserve(&key, bytes) {
            Room::Block(block) => Ok(block),
            Room::Declined(why) => Err(why),
            Room::Soon if since.elapsed() > ROOM_PATIENCE => Err(Declined::Busy),
            Room::Soon => return self.waiting.push(waiting),
        };
        self.answer(queue, Answer::Reserved { intake, key, memory });
    }

    fn check(&mut self, intake: Intake, key: Key, header_bytes: u32, block: Block) -> Answer {
        match check(block.as_slice(), &key, header_bytes) {
            Ok(info) => {
                self.keeper.publish(key, block, info, false);
                Answer::Checked { intake, verdict: PutVerdict::Stored, damaged: None }
            }
            Err(Fault::Corrupt(wrong)) => Answer::Checked {
                intake,
                verdict: PutVerdict::Corrupt,
                damaged: Some(Damaged::new(key, block, wrong)),
            },
            Err(Fault::Bad) => {
                self.keeper.release(&key, block);
                Answer::Checked { intake, verdict: PutVerdict::BadChunk, damaged: None }
            }
        }
    }

    fn answer(&self, queue: usize, answer: Answer) {
        let answered = self.exchanges[queue].answers.push(answer);
        assert!(answered.is_ok(), "the ring has room for an answer to every ask");
    }
}
