//! One direction of a link: rate, delay, a finite queue, and everything that can go wrong on a wire.

use std::collections::VecDeque;

use serde::Serialize;

use crate::packet::WIRE_OVERHEAD_BYTES;
use crate::random::{MILLION, Random};

/// Which packets a link loses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum Loss {
    /// None.
    #[default]
    None,
    /// Each alone, so many of a million.
    Random(u32),
    /// Gilbert and Elliott's two states: nothing is lost in the good one; chances per packet, of a million.
    Burst {
        /// From good to bad.
        enter: u32,
        /// From bad to good.
        leave: u32,
        /// Lost while bad.
        lost: u32,
    },
}

impl Loss {
    /// Bursts that last `burst` packets on average, of which half are lost, so that `per_million` are lost overall.
    pub fn bursts(per_million: u32, burst: u32) -> Loss {
        let leave = MILLION / burst;
        let bad = u64::from(per_million) * 2;
        let enter = bad * u64::from(leave) / (u64::from(MILLION) - bad);
        Loss::Burst { enter: u32::try_from(enter).unwrap_or(MILLION), leave, lost: MILLION / 2 }
    }
}

/// What a link does to packets. Chances are of a million.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Faults {
    /// Which are lost.
    pub loss: Loss,
    /// Arrive twice.
    pub duplicated: u32,
    /// Arrive up to `reorder_nanos` late, so that others overtake them.
    pub reordered: u32,
    /// How late at most.
    pub reorder_nanos: u64,
    /// Have a bit flipped that the UDP checksum finds: the receiver drops them.
    pub corrupted: u32,
    /// Have a bit flipped that no checksum of the network finds.
    pub damaged: u32,
    /// Every packet is late by up to this, in order.
    pub jitter_nanos: u64,
    /// Nothing arrives.
    pub cut: bool,
}

/// A link without faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LinkConfig {
    /// Bits per second, preamble and gap included.
    pub bits_per_second: u64,
    /// Propagation delay.
    pub delay_nanos: u64,
    /// Bytes that may wait; one more and the packet is dropped.
    pub buffer_bytes: u64,
    /// Packets that find more bytes than this waiting are marked.
    pub mark_bytes: u64,
    /// Larger UDP payloads are dropped without a word: a path's MTU where no ICMP message comes through.
    pub carries_bytes: u32,
}

impl LinkConfig {
    /// A link with a buffer that is never full and marks nothing.
    pub fn new(gbps: u64, delay_nanos: u64) -> LinkConfig {
        LinkConfig {
            bits_per_second: gbps * 1_000_000_000,
            delay_nanos,
            buffer_bytes: u64::MAX,
            mark_bytes: u64::MAX,
            carries_bytes: u32::MAX,
        }
    }
}

/// Why a packet was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drop {
    /// The loss model.
    Loss,
    /// No room in the link's or the switch's buffer.
    Buffer,
    /// A link or a pair of hosts is cut.
    Cut,
    /// A flipped bit that the receiver's UDP checksum found.
    Corrupted,
    /// The receiving host is down.
    Down,
    /// The receiving host's ring was full.
    Ring,
    /// Larger than the path carries.
    TooBig,
}

/// Kinds of drops.
pub const DROPS: usize = 7;

/// What becomes of a packet that was given to a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It does not arrive.
    Dropped(Drop),
    /// It arrives.
    Arrives {
        /// When.
        at: u64,
        /// Whether it leaves its place in the order.
        overtaken: bool,
        /// Whether the queue was long.
        marked: bool,
        /// Whether a bit of it was flipped.
        damaged: bool,
        /// When a copy of it arrives.
        copy_at: Option<u64>,
    },
}

/// One direction of a link.
#[derive(Debug)]
pub struct Link {
    config: LinkConfig,
    /// What goes wrong; may be changed at any time.
    pub faults: Faults,
    /// Picoseconds of queue that `buffer_bytes` and `mark_bytes` are.
    buffer_picos: u64,
    mark_picos: u64,
    /// When the last bit of everything accepted has left, picoseconds.
    busy_until_picos: u64,
    /// Latest arrival in order.
    last_at: u64,
    /// Whether the burst loss model is in its bad state.
    is_bad: bool,
    /// Packets under way, in order: when each arrives.
    pub(crate) in_order: VecDeque<(u64, u32)>,
    /// Bytes accepted.
    pub bytes: u64,
    /// Largest queue seen, picoseconds.
    peak_picos: u64,
}

const PICOS_PER_NANO: u64 = 1000;
const BIT_PICOS_PER_SECOND: u128 = 8_000_000_000_000;

impl Link {
    /// An idle link.
    pub fn new(config: LinkConfig) -> Link {
        let picos = |bytes: u64| {
            let picos = u128::from(bytes) * BIT_PICOS_PER_SECOND / u128::from(config.bits_per_second);
            u64::try_from(picos).unwrap_or(u64::MAX)
        };
        Link {
            config,
            faults: Faults::default(),
            buffer_picos: picos(config.buffer_bytes),
            mark_picos: picos(config.mark_bytes),
            busy_until_picos: 0,
            last_at: 0,
            is_bad: false,
            in_order: VecDeque::new(),
            bytes: 0,
            peak_picos: 0,
        }
    }

    /// Changes what the link carries.
    pub fn set_carries(&mut self, bytes: u32) {
        self.config.carries_bytes = bytes;
    }

    /// Rate, delay and buffer.
    pub fn config(&self) -> &LinkConfig {
        &self.config
    }

    /// Time that `bytes` take on the wire, picoseconds.
    #[inline]
    fn picos(&self, bytes: u32) -> u64 {
        // Rounded up, so that no link is faster than its rate; 10^5 bytes at most keep this within 64 bits.
        (u64::from(bytes) * 8_000_000_000_000).div_ceil(self.config.bits_per_second)
    }

    /// Nanoseconds until everything accepted has left.
    #[inline]
    pub fn backlog_nanos(&self, now: u64) -> u64 {
        self.busy_until_picos.saturating_sub(now * PICOS_PER_NANO) / PICOS_PER_NANO
    }

    /// Bytes that wait or are being sent.
    pub fn backlog_bytes(&self, now: u64) -> u64 {
        let picos = self.busy_until_picos.saturating_sub(now * PICOS_PER_NANO);
        let bytes = u128::from(picos) * u128::from(self.config.bits_per_second) / BIT_PICOS_PER_SECOND;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// Largest queue seen, in nanoseconds of the link's time.
    pub fn peak_nanos(&self) -> u64 {
        self.peak_picos / PICOS_PER_NANO
    }

    /// When everything accepted has left, nanoseconds, rounded up.
    pub fn free_at(&self) -> u64 {
        self.busy_until_picos.div_ceil(PICOS_PER_NANO)
    }

    /// Takes a packet in.
    #[inline]
    pub fn transmit(&mut self, now: u64, bytes: u32, random: &mut Random) -> Fate {
        if bytes > self.config.carries_bytes.saturating_add(WIRE_OVERHEAD_BYTES) {
            return Fate::Dropped(Drop::TooBig);
        }
        let now_picos = now * PICOS_PER_NANO;
        let begin = self.busy_until_picos.max(now_picos);
        let end = begin + self.picos(bytes);
        let queue = end - now_picos;
        if queue > self.buffer_picos {
            return Fate::Dropped(Drop::Buffer);
        }
        self.peak_picos = self.peak_picos.max(queue);
        // What is lost on the wire has occupied it.
        self.busy_until_picos = end;
        self.bytes += u64::from(bytes);
        if self.faults == Faults::default() {
            let at = end.div_ceil(PICOS_PER_NANO) + self.config.delay_nanos;
            self.last_at = self.last_at.max(at);
            let marked = begin - now_picos > self.mark_picos;
            return Fate::Arrives {
                at: self.last_at,
                overtaken: false,
                marked,
                damaged: false,
                copy_at: None,
            };
        }
        self.transmit_badly(end, begin - now_picos > self.mark_picos, random)
    }

    fn transmit_badly(&mut self, end_picos: u64, marked: bool, random: &mut Random) -> Fate {
        let faults = self.faults;
        if faults.cut {
            return Fate::Dropped(Drop::Cut);
        }
        if self.loses(random) {
            return Fate::Dropped(Drop::Loss);
        }
        if random.chance(faults.corrupted) {
            return Fate::Dropped(Drop::Corrupted);
        }
        let sent_at = end_picos.div_ceil(PICOS_PER_NANO) + self.config.delay_nanos;
        let jitter = if faults.jitter_nanos > 0 { random.below(faults.jitter_nanos + 1) } else { 0 };
        let overtaken = random.chance(faults.reordered);
        let at = if overtaken {
            sent_at + jitter + random.between(1, faults.reorder_nanos.max(1))
        } else {
            self.last_at = self.last_at.max(sent_at + jitter);
            self.last_at
        };
        let damaged = random.chance(faults.damaged);
        let copy_at = random
            .chance(faults.duplicated)
            .then(|| at + random.below(faults.reorder_nanos.max(faults.jitter_nanos) + 1));
        Fate::Arrives { at, overtaken, marked, damaged, copy_at }
    }

    fn loses(&mut self, random: &mut Random) -> bool {
        match self.faults.loss {
            Loss::None => false,
            Loss::Random(per_million) => random.chance(per_million),
            Loss::Burst { enter, leave, lost } => {
                self.is_bad = if self.is_bad { !random.chance(leave) } else { random.chance(enter) };
                self.is_bad && random.chance(lost)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_leave_at_the_links_rate_to_the_picosecond() {
        let mut link = Link::new(LinkConfig::new(400, 1000));
        let mut random = Random::new(1);
        let mut last = 0;
        for _ in 0..1_000_000 {
            let Fate::Arrives { at, .. } = link.transmit(0, 1530, &mut random) else { panic!("no faults") };
            last = at;
        }
        // 1530 bytes at 400 Gbps are 30.6 ns.
        assert_eq!(last, 30_600_000 + 1000);
    }

    #[test]
    fn a_full_buffer_drops_and_a_long_queue_marks() {
        let config = LinkConfig { buffer_bytes: 10_000, mark_bytes: 5000, ..LinkConfig::new(10, 0) };
        let mut link = Link::new(config);
        let mut random = Random::new(1);
        let fates: Vec<Fate> = (0..12).map(|_| link.transmit(0, 1000, &mut random)).collect();
        let marked = |fate: &Fate| matches!(fate, Fate::Arrives { marked: true, .. });
        let dropped = |fate: &Fate| *fate == Fate::Dropped(Drop::Buffer);
        assert_eq!(fates.iter().filter(|fate| marked(fate)).count(), 4);
        assert_eq!(fates.iter().position(marked), Some(6));
        assert_eq!(fates.iter().filter(|fate| dropped(fate)).count(), 2);
        assert_eq!(link.backlog_bytes(0), 10_000);
        assert_eq!(link.backlog_bytes(4000), 5000);
        assert!(!dropped(&link.transmit(800, 1000, &mut random)));
    }

    #[test]
    fn losses_are_as_many_as_asked_for_and_come_in_bursts() {
        for (loss, runs) in [(Loss::Random(10_000), false), (Loss::bursts(10_000, 20), true)] {
            let mut link = Link::new(LinkConfig::new(10, 0));
            link.faults.loss = loss;
            let mut random = Random::new(7);
            let lost: Vec<bool> = (0..1_000_000)
                .map(|_| link.transmit(0, 1, &mut random) == Fate::Dropped(Drop::Loss))
                .collect();
            let count = lost.iter().filter(|lost| **lost).count();
            assert!((9000..11_000).contains(&count), "{loss:?}: {count}");
            let pairs = lost.windows(2).filter(|pair| pair[0] && pair[1]).count();
            assert_eq!(pairs > 2000, runs, "{loss:?}: {pairs} pairs");
        }
    }
}
