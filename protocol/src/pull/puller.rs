//! The puller: what may be asked for now, and the PULLs that ask.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use crate::time::{Instant, nanos_of};
use crate::wire::message::{self, MAX_PULL_RUNS, PullRange, Run};

use super::asks::{Ask, Asks};
use super::bits;
use super::index::{AskIndex, Index, PathIndex, SpanIndex};
use super::link::Link;
use super::pace::Pacer;
use super::path::Path;
use super::segments::{self, Word};
use super::span::Span;

/// Most PULLs under way: enough for 400 Gbit/s over 10 ms in PULLs of 64 segments.
const MAX_ASKS: u32 = 8192;
/// A PULL covers 64 segments, so it has at most half as many runs.
const PULL_RUNS: usize = 32;
const _: () = assert!(PULL_RUNS <= MAX_PULL_RUNS);

/// What a puller is made from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budgets {
    /// Peers that may be pulled from.
    pub(crate) paths: usize,
    /// Byte ranges that may be pulled at once, and the most segments of one.
    pub(crate) spans: usize,
    pub(crate) span_segments: u32,
    /// The usual segment's bytes.
    pub(crate) segment_bytes: u16,
    /// Most segments under way.
    pub(crate) window_segments: u32,
    /// PULLs that may be under way are no more than this, as there is no more to ask for.
    pub(crate) memory_segments: u32,
    /// Rate of the link, Mbit/s; 0 if it is to be measured.
    pub(crate) link_mbps: u32,
    /// Delay that is not taken for a queue.
    pub(crate) queue_tolerance: Duration,
    pub(crate) rto_min: Duration,
    pub(crate) rto_max: Duration,
    pub(crate) seed: u32,
}

/// What a segment that arrived says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub(crate) segment: u32,
    pub(crate) bytes: usize,
    /// The PULL that it answers, and how long that had waited at the peer, nanoseconds.
    pub(crate) sequence: u32,
    pub(crate) waited_ns: u32,
    /// It met congestion (ECN).
    pub(crate) is_marked: bool,
}

/// What became of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TakenIn {
    pub(crate) is_whole: bool,
    /// It had been given up as lost.
    pub(crate) is_late: bool,
    /// The round trip, if it was measured, nanoseconds.
    pub(crate) round_trip: Option<u64>,
}

/// Whether to ask for segments of a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Worth {
    /// None is wanted.
    Nothing,
    /// The link's credit is not worth a packet: nobody else should have it.
    Waits,
    /// The peer's window is not, or the peer is busy.
    Later,
    /// So many.
    Segments(u32),
}

/// A PULL that was written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Requested {
    /// Bytes of the message.
    pub(crate) len: usize,
    /// Segments that it names for the first time, and that were asked for before.
    pub(crate) asked: u32,
    pub(crate) again: u32,
}

/// What was done about a path of which nothing was heard for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TimedOut {
    /// It was not that long.
    No,
    /// The last segment was given up, so that the answer shows what else is missing.
    Probed,
    /// So many were given up: all. Then whether the peer is silent since.
    All(u32, bool),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Puller {
    pub(super) paths: Box<[Path]>,
    /// A path of which nothing is known.
    new_path: Path,
    pub(super) spans: Box<[Span]>,
    /// For each span, its segments, and by which PULL each was asked for last.
    pub(super) words: Box<[Word]>,
    pub(super) asked_by: Box<[AskIndex]>,
    pub(super) span_words: usize,
    pub(super) asks: Asks,
    /// PULLs of which something was given up, for the owner to know; never more than there are.
    pub(super) given_up: VecDeque<AskIndex>,
    pub(super) link: Link,
    pub(super) pacer: Pacer,
    /// Whether a window met congestion in this round of the link.
    pub(super) congested: bool,
    pub(super) tolerance_ns: u64,
    window_segments: u32,
    pub(super) in_flight: u32,
    /// Nothing is late before.
    next_timeout: Instant,
    /// Nothing is sent before, though it could be.
    paced_until: Instant,
}

impl Puller {
    /// A puller with nothing under way. All memory is allocated here.
    pub(crate) fn new(budgets: &Budgets) -> Puller {
        let span_words = bits::words(budgets.span_segments);
        let asks = budgets.window_segments.min(budgets.memory_segments).clamp(64, MAX_ASKS) as usize;
        let path = Path::new(nanos_of(budgets.rto_min), nanos_of(budgets.rto_max));
        let link = Link::new(budgets.link_mbps, budgets.segment_bytes, budgets.window_segments);
        let mut pacer = Pacer::UNPACED;
        let (rate, wire_bytes) = link.pace();
        pacer.set_rate(rate, wire_bytes, link.burst());
        Puller {
            paths: vec![path; budgets.paths].into(),
            new_path: path,
            spans: vec![Span::NONE; budgets.spans].into(),
            words: vec![Word::default(); budgets.spans * span_words].into(),
            asked_by: vec![AskIndex(0); budgets.spans * span_words * 64].into(),
            span_words,
            asks: Asks::new(asks, budgets.seed),
            given_up: VecDeque::with_capacity(asks),
            link,
            pacer,
            congested: false,
            tolerance_ns: nanos_of(budgets.queue_tolerance),
            window_segments: budgets.window_segments,
            in_flight: 0,
            next_timeout: Instant::FAR,
            paced_until: Instant::FAR,
        }
    }

    #[inline]
    pub(crate) fn path(&self, path: PathIndex) -> &Path {
        &self.paths[path.at()]
    }

    #[inline]
    pub(crate) fn path_mut(&mut self, path: PathIndex) -> &mut Path {
        &mut self.paths[path.at()]
    }

    #[inline]
    pub(crate) fn span(&self, span: SpanIndex) -> &Span {
        &self.spans[span.at()]
    }

    /// Segments under way over all paths.
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight
    }

    pub(crate) fn link(&self) -> &Link {
        &self.link
    }

    /// The usual segment's size has changed.
    pub(crate) fn set_segment_bytes(&mut self, segment_bytes: u16) {
        self.link.set_segment_bytes(segment_bytes);
    }

    /// Segments that may be asked for along a path as things are: its window, within the link's credit.
    pub(crate) fn window_of(&self, path: PathIndex) -> u32 {
        self.paths[path.at()].window.limit().min(self.link.cap())
    }

    /// Begins to pull `bytes` from `offset` on, of which nothing is here.
    pub(crate) fn begin(
        &mut self,
        span: SpanIndex,
        path: PathIndex,
        (offset, bytes): (u64, u32),
        segment_bytes: u16,
    ) {
        assert_eq!(self.spans[span.at()].in_flight, 0, "what was pulled before is not under way");
        let begun = Span::new(path, offset, bytes, segment_bytes);
        assert!(bits::words(begun.segments) <= self.span_words, "the range was checked before");
        let words = self.words_of(span);
        self.words[words].fill(Word::default());
        self.spans[span.at()] = begun;
    }

    /// Makes sure that time is let pass by `at`.
    #[inline]
    pub(crate) fn arm(&mut self, at: Instant) {
        self.next_timeout = self.next_timeout.min(at);
    }

    /// When to let time pass, or to try to send again; [`Instant::FAR`] for never.
    #[inline]
    pub(crate) fn poll_timeout(&self) -> Instant {
        self.next_timeout.min(self.paced_until)
    }

    /// Whether something is late, so that every path is to be looked at; what is not late yet is to be armed again.
    #[inline]
    pub(crate) fn is_due(&mut self, now: Instant) -> bool {
        if now >= self.paced_until {
            self.paced_until = Instant::FAR;
        }
        let is_due = now >= self.next_timeout;
        if is_due {
            self.next_timeout = Instant::FAR;
        }
        is_due
    }

    /// Whether anything may be asked for now, for the pace; a timeout comes when it may.
    #[inline]
    pub(crate) fn is_paced(&mut self, now: Instant) -> bool {
        let is_paced = self.pacer.next() > now;
        if is_paced {
            self.paced_until = self.pacer.next();
        }
        is_paced
    }

    /// Counts the answer to another request, as of one segment.
    pub(crate) fn spend_one(&mut self, now: Instant) {
        self.pacer.spend(now, 1);
    }

    /// Whether the link has credit, and there is room for another PULL; asked when something is wanted.
    pub(crate) fn has_credit(&mut self) -> bool {
        let has_credit = self.may_ask();
        if !has_credit {
            self.link.is_full();
        }
        has_credit && self.asks.has_room()
    }

    /// Segments that may be asked of a peer.
    pub(crate) fn room_of(&self, now: Instant, path: PathIndex) -> u32 {
        self.paths[path.at()].room(now, self.link.cap(), self.link.pull())
    }

    /// How many of `wanted` segments to ask a peer for; none while its window has not room enough to be worth a packet.
    pub(crate) fn worth_of(&self, now: Instant, path: PathIndex, wanted: u32) -> Option<u32> {
        let (room, in_flight) = (self.room_of(now, path), self.paths[path.at()].in_flight);
        // A window of less than two PULLs is asked for in halves.
        let wanted = wanted.min((room + in_flight).div_ceil(2));
        let is_worth = room > 0 && (room >= wanted || in_flight == 0);
        is_worth.then_some(wanted.min(room))
    }

    /// Whether to ask for segments of a span now, while the link has credit.
    pub(crate) fn worth(&mut self, now: Instant, index: SpanIndex) -> Worth {
        let Span { path, cursor, segments, .. } = self.spans[index.at()];
        let words = &self.words[index.at() * self.span_words..(index.at() + 1) * self.span_words];
        let first = segments::next_wanted(words, cursor, segments);
        self.spans[index.at()].cursor = first;
        if first == segments {
            return Worth::Nothing;
        }
        let wanted = segments::wanted_from(words, first, segments).count_ones().min(self.link.pull());
        // Credit comes back a segment at a time: wait until it is worth a packet.
        let room = self.link.cap() - self.in_flight;
        if room < wanted && self.in_flight > 0 {
            self.link.is_full();
            return Worth::Waits;
        }
        self.worth_of(now, path, wanted).map_or(Worth::Later, |budget| Worth::Segments(budget.min(room)))
    }

    /// Segments that may be asked for of a span, without a thought of whether they are worth a packet.
    pub(crate) fn budget(&self, now: Instant, index: SpanIndex) -> u32 {
        let room = self.room_of(now, self.spans[index.at()].path);
        (self.link.cap() - self.in_flight).min(room).min(self.link.pull())
    }

    /// Whether the link has credit.
    pub(crate) fn may_ask(&self) -> bool {
        self.in_flight < self.link.cap()
    }

    /// Begins a path anew, to another peer; nothing is under way along it.
    pub(crate) fn forget(&mut self, path: PathIndex) {
        let path = &mut self.paths[path.at()];
        assert!(path.in_flight == 0 && path.users == 0, "nobody uses it");
        *path = self.new_path;
    }

    /// Whether segments of a span are wanted.
    pub(crate) fn is_wanted(&self, index: SpanIndex) -> bool {
        let Span { cursor, segments, .. } = self.spans[index.at()];
        segments::next_wanted(&self.words[self.words_of(index)], cursor, segments) < segments
    }

    /// Whether a segment of a span is under way.
    #[cfg(test)]
    pub(super) fn is_asked_for(&self, index: SpanIndex, segment: u32) -> bool {
        let (word, bit) = segments::place(segment);
        self.words[self.words_of(index)][word].asked & bit != 0
    }

    /// Whether everything of a span was asked for, for all that is known without a search.
    pub(crate) fn is_asked(&self, index: SpanIndex) -> bool {
        let span = &self.spans[index.at()];
        span.cursor >= span.segments
    }

    /// Writes a PULL for at most `budget` wanted segments of a span, within 64 from its cursor on. The chunk has this handle, in this
    /// epoch; its segments come back under `tag`.
    pub(crate) fn pull(
        &mut self,
        now: Instant,
        index: SpanIndex,
        budget: u32,
        (tag, handle, epoch): (u32, u32, u64),
        out: &mut [u8],
    ) -> Option<Requested> {
        let range = self.words_of(index);
        let span = &mut self.spans[index.at()];
        let words = &mut self.words[range];
        let base = segments::next_wanted(words, span.cursor, span.segments);
        span.cursor = base;
        if budget == 0 || base == span.segments || !self.asks.has_room() {
            return None;
        }
        let asked = segments::lowest(segments::wanted_from(words, base, span.segments), budget);
        let mut runs = [Run::default(); PULL_RUNS];
        let runs_len = runs_of(base, asked, &mut runs);
        let Span { offset, bytes, segment_bytes, .. } = *span;
        let range = PullRange { tag, handle, epoch, offset, bytes, segment_bytes };
        let path = &mut self.paths[span.path.at()];
        let ask = self.asks.push(&mut path.asks, now, span.path, index, (base, asked));
        let sequence = self.asks.get(ask).sequence;
        let written =
            message::emit_pull(out, &range, self.link.peer_pace_mbps(), sequence, &runs[..runs_len]);
        let len = written.expect("a buffer for any message holds a PULL");
        segments::set_asked(words, base, asked);
        let first = index.at() * self.span_words * 64 + base as usize;
        let end = 64 - asked.leading_zeros();
        self.asked_by[first..first + end as usize]
            .iter_mut()
            .enumerate()
            .filter(|(bit, _)| asked >> bit & 1 == 1)
            .for_each(|(_, by)| *by = ask);
        let count = asked.count_ones();
        // Bits below are of segments that were asked for before.
        let before = span.asked.saturating_sub(base);
        let again = if before >= 64 { count } else { (asked & ((1 << before) - 1)).count_ones() };
        span.asked = span.asked.max(base + end);
        span.cursor = base + end;
        span.in_flight += count;
        if path.in_flight == 0 {
            path.timeout_at = now.plus_nanos(path.timeout());
        }
        path.in_flight += count;
        self.in_flight += count;
        let timeout_at = path.timeout_at;
        self.arm(timeout_at);
        self.pacer.spend(now, count);
        assert!(self.in_flight <= self.window_segments, "the budget was within the window");
        Some(Requested { len, asked: count - again, again })
    }

    /// The span of a PULL that is under way along a path, by its number.
    pub(crate) fn under_way(&self, sequence: u32, path: PathIndex) -> Option<SpanIndex> {
        self.asks.under_way(sequence, path).map(|ask| self.asks.get(ask).span)
    }

    /// Gives up all that is under way of a span, without a thought of asking for it again.
    pub(crate) fn leave(&mut self, index: SpanIndex) {
        let (first, segments) = (index.at() * self.span_words * 64, self.spans[index.at()].segments);
        let mut at = 0;
        while self.spans[index.at()].in_flight > 0 {
            let words = &self.words[self.words_of(index)];
            let segment = segments::next_asked(words, at, segments);
            assert!(segment < segments, "what is under way is marked as asked for");
            let ask = self.asked_by[first + segment as usize];
            let outstanding = self.asks.get(ask).outstanding;
            self.withdraw(ask, outstanding);
            at = segment + 1;
        }
    }

    /// Gives up what a PULL still brings of `mask`: it is wanted again, before what was not asked for yet.
    pub(super) fn give_up(&mut self, ask: AskIndex, mask: u64) -> u32 {
        let Ask { span, base, .. } = *self.asks.get(ask);
        self.withdraw(ask, mask);
        let span = &mut self.spans[span.at()];
        span.cursor = span.cursor.min(base + mask.trailing_zeros());
        self.given_up.push_back(ask);
        mask.count_ones()
    }

    /// Takes segments that a PULL still brings out of the window.
    fn withdraw(&mut self, ask: AskIndex, mask: u64) {
        let Ask { span: index, path, base, .. } = *self.asks.get(ask);
        let words = self.words_of(index);
        segments::clear_asked(&mut self.words[words], base, mask);
        let count = mask.count_ones();
        self.spans[index.at()].in_flight -= count;
        self.in_flight -= count;
        let path = &mut self.paths[path.at()];
        path.in_flight -= count;
        self.asks.take(&mut path.asks, ask, mask);
    }

    /// Has the segments that hold any of `bytes` of a span, which were wrong, wanted again.
    pub(crate) fn lose(&mut self, index: SpanIndex, bytes: Range<u64>) {
        let words = self.words_of(index);
        let span = &mut self.spans[index.at()];
        let size = u64::from(span.segment_bytes);
        let end = bytes.end.min(u64::from(span.bytes)).div_ceil(size);
        for segment in bytes.start / size..end {
            let segment = u32::try_from(segment).expect("below the span's segments");
            let (word, bit) = segments::place(segment);
            let word = &mut self.words[words.clone()][word];
            if word.arrived & bit != 0 {
                word.arrived &= !bit;
                span.arrived -= 1;
                span.cursor = span.cursor.min(segment);
            }
        }
    }

    pub(super) fn words_of(&self, span: SpanIndex) -> Range<usize> {
        span.at() * self.span_words..(span.at() + 1) * self.span_words
    }
}

/// Writes the segments `base` + bits of `mask` as runs; returns how many.
fn runs_of(base: u32, mask: u64, runs: &mut [Run; PULL_RUNS]) -> usize {
    let (mut left, mut len) = (mask, 0);
    while left != 0 {
        let begin = left.trailing_zeros();
        let count = (left >> begin).trailing_ones();
        runs[len] = Run { first: base + begin, count: u16::try_from(count).expect("at most 64") };
        len += 1;
        left = if begin + count == 64 { 0 } else { left >> (begin + count) << (begin + count) };
    }
    len
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_name_each_bit_once_in_order(mask in any::<u64>(), dense in any::<bool>(), base in 0_u32..1000) {
            let mask = if dense { mask | mask << 1 } else { mask };
            let mut runs = [Run::default(); PULL_RUNS];
            let len = runs_of(base, mask, &mut runs);
            let named: Vec<u32> =
                runs[..len].iter().flat_map(|run| run.first..run.first + u32::from(run.count)).collect();
            let twin: Vec<u32> = (0..64).filter(|bit| mask >> bit & 1 == 1).map(|bit| base + bit).collect();
            prop_assert_eq!(named, twin);
        }
    }
}
