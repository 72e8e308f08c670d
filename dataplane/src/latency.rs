//! Where a plane's time goes: latency histograms that travel between a lcore and the control thread so that neither ever waits for the other.

use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};

/// The parts of a plane's way whose time is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Span {
    /// First packet of a plane to its last.
    Receive,
    /// Last packet to the moment a decoder takes the plane up.
    DecodeWait,
    /// Linearizing, checking, decompressing and dequantizing.
    Decode,
    /// Decoded to the moment the copy to the sink begins.
    DmaWait,
    /// The copy to the sink.
    Dma,
    /// First packet to delivered.
    Total,
}

impl Span {
    /// Every span, in the order a plane passes them.
    pub(crate) const ALL: [Self; 6] =
        [Self::Receive, Self::DecodeWait, Self::Decode, Self::DmaWait, Self::Dma, Self::Total];

    /// The name used in `--json`.
    #[must_use]
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Receive => "receive",
            Self::DecodeWait => "decode_wait",
            Self::Decode => "decode",
            Self::DmaWait => "dma_wait",
            Self::Dma => "dma",
            Self::Total => "total",
        }
    }
}

/// Longest time a histogram tells apart, in nanoseconds: one minute.
const LONGEST_NS: u64 = 60_000_000_000;

/// When a plane passed each point of its way, in nanoseconds of the data plane's clock.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct PlaneTimes {
    /// First packet received.
    pub(crate) first_packet_ns: u64,
    /// Last packet received.
    pub(crate) arrived_ns: u64,
    /// Taken up by a decoder.
    pub(crate) decode_begin_ns: u64,
    /// Decoded into its slot.
    pub(crate) decode_end_ns: u64,
    /// Copy to the sink begun.
    pub(crate) dma_begin_ns: u64,
    /// Copy to the sink complete.
    pub(crate) dma_end_ns: u64,
}

impl PlaneTimes {
    fn span_ns(&self, span: Span) -> u64 {
        let (begin, end) = match span {
            Span::Receive => (self.first_packet_ns, self.arrived_ns),
            Span::DecodeWait => (self.arrived_ns, self.decode_begin_ns),
            Span::Decode => (self.decode_begin_ns, self.decode_end_ns),
            Span::DmaWait => (self.decode_end_ns, self.dma_begin_ns),
            Span::Dma => (self.dma_begin_ns, self.dma_end_ns),
            Span::Total => (self.first_packet_ns, self.dma_end_ns),
        };
        end.saturating_sub(begin)
    }
}

/// One histogram per [`Span`], in nanoseconds. Recording does not allocate.
#[derive(Debug, Clone)]
pub(crate) struct Latencies {
    spans: [Histogram<u64>; Span::ALL.len()],
}

impl Default for Latencies {
    fn default() -> Self {
        let empty = Histogram::new_with_bounds(1, LONGEST_NS, 2).expect("constant bounds are valid");
        Self { spans: std::array::from_fn(|_| empty.clone()) }
    }
}

impl Latencies {
    /// Records one delivered plane; times over a minute count as a minute.
    pub(crate) fn record(&mut self, times: &PlaneTimes) {
        for (histogram, span) in self.spans.iter_mut().zip(Span::ALL) {
            histogram.saturating_record(times.span_ns(span));
        }
    }

    /// Adds what `other` recorded.
    pub(crate) fn merge(&mut self, other: &Self) {
        for (into, from) in self.spans.iter_mut().zip(&other.spans) {
            into.add(from).expect("histograms of equal bounds add up");
        }
    }

    /// `{"decode": {"p50_us": .., "p99_us": .., "count": ..}, ..}`
    #[must_use]
    pub(crate) fn to_json(&self) -> Value {
        let us = |ns: u64| ns_to_us(ns);
        let spans = self.spans.iter().zip(Span::ALL).map(|(histogram, span)| {
            let summary = json!({
                "p50_us": us(histogram.value_at_quantile(0.5)),
                "p99_us": us(histogram.value_at_quantile(0.99)),
                "count": histogram.len(),
            });
            (span.name().to_owned(), summary)
        });
        Value::Object(spans.collect::<Map<_, _>>())
    }
}

#[expect(clippy::cast_precision_loss, reason = "a latency needs no more than 53 bits")]
fn ns_to_us(ns: u64) -> f64 {
    (ns as f64 / 10.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_add_up_and_merge() {
        let times = PlaneTimes {
            first_packet_ns: 1_000,
            arrived_ns: 11_000,
            decode_begin_ns: 12_000,
            decode_end_ns: 42_000,
            dma_begin_ns: 43_000,
            dma_end_ns: 53_000,
        };
        let (mut left, mut right) = (Latencies::default(), Latencies::default());
        left.record(&times);
        right.record(&times);
        left.merge(&right);
        let json = left.to_json();
        assert_eq!(json["total"]["count"], 2);
        let total = json["total"]["p50_us"].as_f64().unwrap();
        assert!((51.5..52.6).contains(&total), "{total}");
    }

    #[test]
    fn an_unfinished_plane_counts_as_zero_not_as_ages() {
        let mut latencies = Latencies::default();
        latencies.record(&PlaneTimes { first_packet_ns: 5, ..PlaneTimes::default() });
        assert_eq!(latencies.to_json()["total"]["p99_us"], 0.0);
    }
}
