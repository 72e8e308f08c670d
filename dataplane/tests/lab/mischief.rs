//! What happens to the store's packets on their way, and what comes between them.

use protocol::reason::DropReason;
use protocol::wire::message::PullRange;

use super::chunks::Library;
use super::forgery::{self, DATA_FORGERIES, FORGERIES};
use super::frames::{self, Frame, HEADERS};
use super::ledger::Fates;
use super::random::Random;
use super::{Lab, Rates};

impl Lab {
    /// Sends one of the store's packets, or does to it what the rates say.
    pub(super) fn send(&mut self, mut frame: Frame, rates: &Rates, library: &Library, random: &mut Random) {
        if random.chance(rates.forge) {
            self.forge(&frame.bytes, library, random);
        }
        if random.chance(rates.error) {
            self.inject_error(&frame.bytes, library, random);
        }
        if random.chance(rates.poison) {
            self.poison(&frame.bytes, library, random);
        }
        if random.chance(rates.lose) {
            return;
        }
        let original = frame.clone();
        if random.chance(rates.flip) {
            let bit = random.below(frame.bytes.len() * 8);
            frame.bytes[bit / 8] ^= 1 << (bit % 8);
        } else if random.chance(rates.split) {
            frame.split = Some(random.below(frame.bytes.len()));
        } else if random.chance(rates.no_checksum) {
            frame.bytes[40..42].fill(0);
        } else if random.chance(rates.pad) {
            let padded = frame.bytes.len() + random.below(500);
            frame.bytes.resize(padded, random.byte());
        }
        if random.chance(rates.vlan) {
            frame.bytes = frames::tagged(&frame.bytes, 0);
            frame.split = frame.split.map(|at| at.max(1));
        }
        self.put(&frame, library);
        if random.chance(rates.duplicate) {
            self.put(&original, library);
        }
        if random.chance(rates.late) {
            self.late.push(original);
        }
    }

    /// Sends a packet cut at every length, and with its message cut at every length.
    pub(super) fn cut(&mut self, frame: &[u8], library: &Library) {
        for bytes in 0..frame.len() {
            let fates = self.put(&frame[..bytes].to_vec().into(), library);
            let reason = if bytes < 34 { DropReason::Truncated } else { DropReason::BadIpLength };
            assert_eq!(fates, Fates::dropped(reason), "cut at {bytes}");
        }
        let message = &frame[HEADERS..];
        for bytes in 0..message.len() {
            let fates = self.put(&frames::with_payload(frame, &message[..bytes]).into(), library);
            let is_short =
                [DropReason::Truncated, DropReason::BadLength].map(Fates::dropped).contains(&fates);
            assert!(is_short, "message cut at {bytes}: {fates:?}");
        }
    }

    /// The range of a DATA message that is being received.
    fn range_of(&self, frame: &[u8]) -> Option<PullRange> {
        self.ledger.receiving(frames::data_tag(frame)?)
    }

    fn forge(&mut self, frame: &[u8], library: &Library, random: &mut Random) {
        let of_data = self.range_of(frame).is_some() && random.chance(400);
        let (name, forge) = random.pick(if of_data { DATA_FORGERIES } else { FORGERIES });
        let (bytes, reason) = forge(random, frame);
        if *name == "ARP request of a stranger" {
            self.arp_requests += 1;
        }
        let is_other_tag = frames::data_tag(&bytes).is_some_and(|tag| !self.ledger.knows(tag));
        let fates = self.put(&bytes.into(), library);
        if let Some(reason) = reason {
            assert_eq!(fates, Fates::dropped(reason), "{name} is dropped as {reason:?}");
        }
        if *name == "tag of a later generation" && is_other_tag {
            assert_eq!(fates, Fates::dropped(DropReason::Stale), "{name}");
        }
        if *name == "one bit flipped" {
            assert!(!fates.has(Fates::NEIGHBOUR), "a flip makes no ARP");
        }
    }

    /// Sends a wrong payload under right checksums, as often as the data plane must bear: its limit is 3 for a range.
    fn poison(&mut self, frame: &[u8], library: &Library, random: &mut Random) {
        let Some(range) = self.range_of(frame) else { return };
        let times = self.poisons.entry((range.handle, range.offset)).or_default();
        if *times == 3 {
            return;
        }
        *times += 1;
        let mut bytes = frame.to_vec();
        for _ in 0..=random.below(4) {
            let at = HEADERS + 32 + random.below(frame.len() - HEADERS - 32);
            bytes[at] ^= random.change();
        }
        frames::seal(&mut bytes);
        self.put(&bytes.into(), library);
    }

    /// Sends an ERROR that has a chunk looked up again, as often as the data plane must bear: its limit is 3 for a
    /// chunk, and a restart of the store takes one.
    fn inject_error(&mut self, frame: &[u8], library: &Library, random: &mut Random) {
        let Some(range) = self.range_of(frame) else { return };
        let times = self.errors.entry(range.handle).or_default();
        if *times == 2 {
            return;
        }
        *times += 1;
        let code = u8::try_from(random.below(3) + 1).unwrap();
        self.put(&forgery::error_for(frame, code).into(), library);
    }

    /// Sends what was kept back; the fetch is over, so that all of it must be dropped.
    pub(super) fn send_late(&mut self, library: &Library) {
        for frame in std::mem::take(&mut self.late) {
            let fates = self.put(&frame, library);
            assert_eq!(fates, Fates::dropped(DropReason::Stale));
        }
        self.wire.flush();
    }
}
