//! A byte range being pulled, cut into segments.

use crate::reason::DropReason;

use super::index::PathIndex;

/// Invariants: no segment below `cursor` is wanted; `in_flight` segments are marked as asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    /// From whom.
    pub(crate) path: PathIndex,
    /// Where in its chunk it begins, and its length, bytes.
    pub(crate) offset: u64,
    pub(crate) bytes: u32,
    pub(crate) segment_bytes: u16,
    /// Segments of the range, and bytes of the last.
    pub(crate) segments: u32,
    last_bytes: u32,
    /// Segments that are here.
    pub(crate) arrived: u32,
    pub(super) cursor: u32,
    pub(super) in_flight: u32,
    /// Segments below were asked for at least once.
    pub(crate) asked: u32,
}

impl Span {
    pub(super) const NONE: Span = Span {
        path: PathIndex(0),
        offset: 0,
        bytes: 0,
        segment_bytes: 0,
        segments: 0,
        last_bytes: 0,
        arrived: 0,
        cursor: 0,
        in_flight: 0,
        asked: 0,
    };

    /// `bytes` from `offset` on, of which nothing is here.
    pub(super) fn new(path: PathIndex, offset: u64, bytes: u32, segment_bytes: u16) -> Span {
        assert!(bytes > 0 && segment_bytes > 0, "a range has bytes");
        let segments = bytes.div_ceil(u32::from(segment_bytes));
        let last_bytes = bytes - (segments - 1) * u32::from(segment_bytes);
        Span { path, offset, bytes, segment_bytes, segments, last_bytes, ..Span::NONE }
    }

    /// The bytes of a segment, if `bytes` have come for it.
    #[inline]
    pub(super) fn check(&self, segment: u32, bytes: usize) -> Result<u32, DropReason> {
        if segment >= self.segments {
            return Err(DropReason::BadSegment);
        }
        let is_last = segment + 1 == self.segments;
        let expected = if is_last { self.last_bytes } else { u32::from(self.segment_bytes) };
        if bytes == expected as usize { Ok(expected) } else { Err(DropReason::BadLength) }
    }

    /// Whether every segment is here.
    #[inline]
    pub(crate) fn is_whole(&self) -> bool {
        self.arrived == self.segments
    }
}
