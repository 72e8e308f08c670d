//! Chunks on their way in, on one serving lcore: packets to the engine and their bytes to their place, memory and verdicts
//! from the keeper.

use std::sync::Arc;

use hugepages::Block;
use iface::Counter;
use protocol::frame::Peer;
use protocol::put::{AcceptConfig, AcceptCounters, AcceptEngine, AcceptEvent, Intake, Taken};
use protocol::reason::DropReason;
use protocol::{Instant, Key};
use serde_json::{Value, json};

use crate::chunks::Chunks;
use crate::exchange::{Answer, Ask, Damaged, Exchange};

macro_rules! put_counts {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// The engine's counts, for other threads to read.
        #[derive(Debug, Default)]
        pub struct PutCounts { $($(#[doc = $doc])+ pub $name: Counter,)+ }

        impl PutCounts {
            fn mirror(&self, counts: &AcceptCounters) {
                $(self.$name.set(counts.$name);)+
            }

            /// All counts by name.
            #[must_use]
            pub fn to_json(&self) -> Value {
                json!({ $(stringify!($name): self.$name.get(),)+ })
            }
        }
    };
}

put_counts! {
    /// OFFERs accepted.
    offers,
    /// Segments placed.
    segments,
    /// Their payload.
    segment_bytes,
    /// ERRORs accepted.
    errors,
    /// Chunks for which memory was asked.
    begun,
    /// Chunks stored.
    stored,
    /// Chunks that were stored before.
    already_stored,
    /// Declined for want of memory, or since they were stored.
    declined,
    /// Refused after checking.
    refused,
    /// Given up.
    dropped,
    /// Times found corrupt.
    corrupt,
    /// PULLs sent.
    pulls,
    /// Segments asked for the first time.
    segments_asked,
    /// Segments asked for again.
    segments_asked_again,
    /// Segments given up as lost.
    segments_lost,
    /// Of those, that came after all.
    segments_late,
    /// Times that the last segment under way of a data plane was asked for again because nothing came.
    tail_probes,
    /// Times that everything under way of one data plane was given up as lost.
    timeouts,
}

/// The intakes of one lcore.
pub(crate) struct Intakes {
    engine: AcceptEngine,
    /// By slot of the intake; away while the keeper has it.
    memory: Box<[Option<(Key, Block)>]>,
    exchange: Arc<Exchange>,
    counts: Arc<PutCounts>,
}

impl Intakes {
    pub(crate) fn new(config: AcceptConfig, exchange: Arc<Exchange>, counts: Arc<PutCounts>) -> Intakes {
        let memory = (0..config.max_intakes).map(|_| None).collect();
        Intakes { engine: AcceptEngine::new(config), memory, exchange, counts }
    }

    /// Takes in a datagram for which [`AcceptEngine::takes`] is true.
    #[inline]
    pub(crate) fn take(
        &mut self,
        now: Instant,
        (from, marked): (Peer, bool),
        payload: &[u8],
        chunks: &Chunks,
    ) -> Result<(), DropReason> {
        let taken = self.engine.handle_datagram(now, from, marked, payload, |key| chunks.contains(key))?;
        let Taken::Segment { intake, offset, data } = taken else { return Ok(()) };
        let Some((_, block)) = &mut self.memory[intake.slot()] else {
            unreachable!("an intake that is being pulled has its memory here");
        };
        // The engine has checked that the segment lies within the chunk.
        let begin = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(place) =
            begin.checked_add(data.len()).and_then(|end| block.as_mut_slice().get_mut(begin..end))
        {
            place.copy_from_slice(&payload[data]);
        }
        Ok(())
    }

    /// Whether [`Intakes::poll_transmit`] has something to send.
    pub(crate) fn wants_to_send(&self) -> bool {
        self.engine.wants_to_send()
    }

    /// Takes the keeper's answers, lets time pass, and asks the keeper for what is needed. Returns how much that was.
    pub(crate) fn poll(&mut self, now: Instant) -> usize {
        let mut work = 0;
        while let Some(answer) = self.exchange.answers.pop() {
            work += 1;
            self.take_answer(now, answer);
        }
        self.engine.handle_timeout(now);
        while let Some(event) = self.engine.poll_event() {
            work += 1;
            self.take_event(event);
        }
        self.counts.mirror(self.engine.counters());
        work
    }

    fn take_answer(&mut self, now: Instant, answer: Answer) {
        match answer {
            Answer::Reserved { intake, key, memory } => match memory {
                Ok(block) => {
                    if self.engine.reserved(now, intake, Ok(())) {
                        self.memory[intake.slot()] = Some((key, block));
                    } else {
                        self.ask(Ask::Release { key, block });
                    }
                }
                Err(why) => {
                    self.engine.reserved(now, intake, Err(why));
                }
            },
            Answer::Checked { intake, verdict, damaged } => {
                for wrong in damaged.iter().flat_map(|damaged| &damaged.wrong) {
                    self.engine.mark_corrupt(intake, wrong.clone());
                }
                let goes_on = self.engine.verdict(now, intake, verdict);
                match damaged {
                    Some(Damaged { key, block, .. }) if goes_on => {
                        self.memory[intake.slot()] = Some((key, block));
                    }
                    Some(Damaged { key, block, .. }) => self.ask(Ask::Release { key, block }),
                    None => {}
                }
            }
        }
    }

    fn take_event(&mut self, event: AcceptEvent) {
        match event {
            AcceptEvent::Reserve { intake, key, bytes } => self.ask(Ask::Reserve { intake, key, bytes }),
            AcceptEvent::Arrived { intake, header_bytes, .. } => {
                let (key, block) = self.take_memory(intake);
                self.ask(Ask::Check { intake, key, header_bytes, block });
            }
            AcceptEvent::Dropped { intake } => {
                let (key, block) = self.take_memory(intake);
                self.ask(Ask::Release { key, block });
            }
        }
    }

    fn take_memory(&mut self, intake: Intake) -> (Key, Block) {
        let Some(memory) = self.memory[intake.slot()].take() else {
            unreachable!("an intake that is being pulled has its memory here");
        };
        memory
    }

    fn ask(&self, ask: Ask) {
        let asked = self.exchange.asks.push(ask);
        assert!(asked.is_ok(), "the ring has room for every ask that can be under way");
    }

    /// Writes the next message.
    pub(crate) fn poll_transmit(&mut self, now: Instant, out: &mut [u8]) -> Option<(Peer, usize)> {
        self.engine.poll_transmit(now, out)
    }
}
