//! Lists of copies, and how they are made fewer. Pure arithmetic on addresses.

use std::ops::Range;

/// Rows shorter than this, if there are several, are copied as one strided copy. NVIDIA's driver (seen with 580, H100) has the
/// CPU copy shorter pieces of a batch, at 4 to 10 GB/s; a strided copy of two rows of 16 KiB goes at 9.5, of four at 16.
pub const STRIDED_BELOW_BYTES: u64 = 32 << 10;

/// Longest pitch that a strided copy takes (`CU_DEVICE_ATTRIBUTE_MAX_PITCH`).
pub const MAX_PITCH_BYTES: u64 = (1 << 31) - 1;

/// Equal rows of bytes at equal distances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Address of the first row at the destination.
    pub to: u64,
    /// Address of the first row at the source.
    pub from: u64,
    /// Bytes of a row.
    pub bytes: u64,
    /// Rows.
    pub rows: u64,
    /// From a row to the next at the destination, bytes; of no meaning if there is one row.
    pub to_pitch: u64,
    /// The same at the source.
    pub from_pitch: u64,
}

impl Run {
    /// One row.
    #[must_use]
    pub fn row(to: u64, from: u64, bytes: u64) -> Self {
        Self { to, from, bytes, rows: 1, to_pitch: bytes, from_pitch: bytes }
    }

    /// Whether a strided copy can do it.
    pub(crate) fn strided(&self) -> bool {
        let pitch = |pitch: u64| (self.bytes..=MAX_PITCH_BYTES).contains(&pitch);
        pitch(self.to_pitch) && pitch(self.from_pitch)
    }
}

/// Copies to be started together: pieces, in three lists as drivers want them, and strided copies. Filling it does not
/// allocate once it has grown to its usual size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyList {
    /// Destination addresses of the pieces.
    pub to: Vec<u64>,
    /// Their source addresses.
    pub from: Vec<u64>,
    /// Their lengths.
    pub bytes: Vec<usize>,
    /// Copies of several rows.
    pub strided: Vec<Run>,
    /// Pieces before this one are not added to: they belong to another transfer.
    closed: usize,
}

impl CopyList {
    /// With room for `pieces`.
    #[must_use]
    pub fn with_capacity(pieces: usize) -> Self {
        Self {
            to: Vec::with_capacity(pieces),
            from: Vec::with_capacity(pieces),
            bytes: Vec::with_capacity(pieces),
            strided: Vec::with_capacity(pieces),
            closed: 0,
        }
    }

    /// Copies in the list.
    #[must_use]
    pub fn len(&self) -> usize {
        self.to.len() + self.strided.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Removes all.
    pub fn clear(&mut self) {
        self.truncate(0, 0);
        self.closed = 0;
    }

    /// Removes what was added since the list had `pieces` pieces and `strided` strided copies.
    pub fn truncate(&mut self, pieces: usize, strided: usize) {
        self.to.truncate(pieces);
        self.from.truncate(pieces);
        self.bytes.truncate(pieces);
        self.strided.truncate(strided);
    }

    /// Later runs are not joined with those so far, so that the copies of one transfer can be started without another's.
    /// Returns how many pieces and strided copies there are.
    pub fn close(&mut self) -> (usize, usize) {
        self.closed = self.to.len();
        (self.closed, self.strided.len())
    }

    /// Makes strided copies of pieces since the last [`close`](CopyList::close) that are shorter than
    /// [`STRIDED_BELOW_BYTES`] and evenly spaced; two, one behind the other on both sides, always are.
    pub fn group(&mut self) {
        let (mut at, mut kept, end) = (self.closed, self.closed, self.to.len());
        while at < end {
            let Some(run) = self.evenly_spaced(at..end).next() else { break };
            let rows = usize::try_from(run.rows).unwrap_or(usize::MAX);
            if rows > 1 && run.bytes < STRIDED_BELOW_BYTES {
                self.strided.push(run);
            } else {
                for from in at..at + rows {
                    (self.to[kept], self.from[kept], self.bytes[kept]) =
                        (self.to[from], self.from[from], self.bytes[from]);
                    kept += 1;
                }
            }
            at += rows;
        }
        self.truncate(kept, self.strided.len());
    }

    /// Adds a run: to the piece before it if it goes on where that one ends, else as one strided copy or as pieces.
    pub fn push(&mut self, run: Run) {
        if run.rows > 1 && run.bytes < STRIDED_BELOW_BYTES && run.strided() {
            self.strided.push(run);
            return;
        }
        for row in 0..run.rows {
            self.push_row(run.to + row * run.to_pitch, run.from + row * run.from_pitch, run.bytes);
        }
    }

    fn push_row(&mut self, to: u64, from: u64, bytes: u64) {
        let length = usize::try_from(bytes).unwrap_or(usize::MAX);
        if self.to.len() > self.closed
            && let (Some(last_to), Some(last_from), Some(last)) =
                (self.to.last(), self.from.last(), self.bytes.last_mut())
            && last_to + *last as u64 == to
            && last_from + *last as u64 == from
        {
            *last += length;
            return;
        }
        self.to.push(to);
        self.from.push(from);
        self.bytes.push(length);
    }

    /// The pieces of `range` as few runs as can be: equal pieces at equal distances become rows of one run. For drivers
    /// without batched copies.
    pub fn evenly_spaced(&self, range: Range<usize>) -> impl Iterator<Item = Run> + '_ {
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let piece = |index: usize| Run::row(self.to[index], self.from[index], self.bytes[index] as u64);
            let mut run = piece(at);
            at += 1;
            while at < range.end {
                let next = piece(at);
                let (Some(to_pitch), Some(from_pitch)) =
                    (next.to.checked_sub(run.to), next.from.checked_sub(run.from))
                else {
                    break;
                };
                let expected = if run.rows == 1 {
                    Run { to_pitch, from_pitch, ..run }
                } else {
                    let (to_pitch, from_pitch) = (to_pitch / run.rows, from_pitch / run.rows);
                    Run { to_pitch, from_pitch, ..run }
                };
                let continues = next.bytes == run.bytes
                    && expected.strided()
                    && run.to + run.rows * expected.to_pitch == next.to
                    && run.from + run.rows * expected.from_pitch == next.from
                    && (run.rows == 1
                        || (expected.to_pitch, expected.from_pitch) == (run.to_pitch, run.from_pitch));
                if !continues {
                    break;
                }
                run = Run { rows: run.rows + 1, ..expected };
                at += 1;
            }
            Some(run)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Every byte that runs copy: destination to source.
    fn bytes(runs: impl IntoIterator<Item = Run>) -> BTreeMap<u64, u64> {
        let each = |run: Run| {
            (0..run.rows).flat_map(move |row| {
                (0..run.bytes)
                    .map(move |at| (run.to + row * run.to_pitch + at, run.from + row * run.from_pitch + at))
            })
        };
        runs.into_iter().flat_map(each).collect()
    }

    fn runs() -> impl Strategy<Value = Vec<Run>> {
        let run = (0..64u64, 0..64u64, 1..5u64, 1..4u64, 0..3u64, 0..3u64).prop_map(
            |(to, from, bytes, rows, to_gap, from_gap)| Run {
                to: to * 16,
                from: from * 16,
                bytes: bytes * 4,
                rows,
                to_pitch: bytes * 4 + to_gap * 4,
                from_pitch: bytes * 4 + from_gap * 4,
            },
        );
        prop::collection::vec(run, 0..12)
    }

    /// Pieces as pages give them: equal, and often evenly spaced.
    fn pieces() -> impl Strategy<Value = Vec<Run>> {
        (1..4u64, prop::collection::vec(0..12u64, 0..24)).prop_map(|(bytes, pages)| {
            let from = (0..).map(|index| 1000 + index * bytes);
            pages.iter().zip(from).map(|(page, from)| Run::row(page * bytes * 2, from, bytes)).collect()
        })
    }

    proptest! {
        /// Nothing is lost or moved by joining and choosing; the twin counts bytes.
        #[test]
        fn lists_copy_the_same_bytes(runs in runs(), closes in any::<bool>(), groups in any::<bool>()) {
            let mut list = CopyList::default();
            let mut twin = BTreeMap::new();
            for &run in &runs {
                list.push(run);
                twin.extend(bytes([run]));
                if groups {
                    list.group();
                }
                if closes {
                    prop_assert_eq!(list.close(), (list.to.len(), list.strided.len()));
                }
            }
            let of_list = |list: &CopyList| {
                let rows = (0..list.to.len()).map(|i| Run::row(list.to[i], list.from[i], list.bytes[i] as u64));
                let strided = list.strided.clone();
                // Two copies to one place may change places: only the places are compared then.
                bytes(rows.chain(strided)).into_keys().collect::<Vec<_>>()
            };
            prop_assert_eq!(of_list(&list), twin.into_keys().collect::<Vec<_>>());
        }

        #[test]
        fn grouping_moves_no_byte(pieces in pieces(), closed in any::<prop::sample::Index>()) {
            let mut list = CopyList::default();
            let closed = closed.index(pieces.len() + 1);
            for (index, &piece) in pieces.iter().enumerate() {
                if index == closed {
                    list.close();
                }
                list.push(piece);
            }
            let rows = |list: &CopyList| {
                let rows =
                    (0..list.to.len()).map(|i| Run::row(list.to[i], list.from[i], list.bytes[i] as u64));
                let mut all: Vec<(u64, u64)> =
                    rows.chain(list.strided.clone()).flat_map(|run| bytes([run])).collect();
                all.sort_unstable();
                all
            };
            let before = rows(&list);
            let pieces = list.to.len();
            list.group();
            prop_assert_eq!(rows(&list), before);
            let strided: u64 = list.strided.iter().map(|run| run.rows).sum();
            prop_assert_eq!(list.to.len() + usize::try_from(strided).unwrap(), pieces);
        }

        #[test]
        fn evenly_spaced_pieces_become_rows(pieces in pieces()) {
            let mut list = CopyList::default();
            for &piece in &pieces {
                list.push(piece);
                list.close();
            }
            let grouped: Vec<Run> = list.evenly_spaced(0..list.to.len()).collect();
            let in_order = |runs: &[Run]| {
                runs.iter().flat_map(|&run| bytes([run])).collect::<Vec<_>>()
            };
            prop_assert_eq!(in_order(&grouped), in_order(&pieces));
            prop_assert!(grouped.iter().all(|run| run.rows == 1 || run.strided()));
        }
    }

    #[test]
    fn pages_in_a_row_are_one_piece_and_every_second_page_is_one_run() {
        let mut list = CopyList::default();
        (0..16).for_each(|page| list.push(Run::row(page * 32_768, (1 << 30) | (page * 32_768), 32_768)));
        assert_eq!((list.to.len(), list.bytes[0]), (1, 16 * 32_768));
        list.clear();
        (0..16).for_each(|page| list.push(Run::row(page * 65_536, page * 32_768, 32_768)));
        let grouped: Vec<Run> = list.evenly_spaced(0..16).collect();
        let run = Run { rows: 16, to_pitch: 65_536, ..Run::row(0, 0, 32_768) };
        assert_eq!((list.to.len(), grouped), (16, vec![run]));
    }

    #[test]
    fn short_rows_are_strided_and_long_ones_pieces() {
        let mut list = CopyList::default();
        let short = Run { to: 0, from: 0, bytes: 256, rows: 8, to_pitch: 4096, from_pitch: 2048 };
        list.push(short);
        list.push(Run { to: 1 << 20, bytes: 32 << 10, to_pitch: 64 << 10, from_pitch: 32 << 10, ..short });
        list.group();
        assert_eq!((list.strided.len(), list.to.len(), list.len()), (1, 8, 9));
        list.truncate(3, 0);
        assert_eq!((list.strided.len(), list.to.len(), list.is_empty()), (0, 3, false));
    }
}
