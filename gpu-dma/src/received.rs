//! Planes that lie in GPU memory in the pieces in which packets brought them, and the memory that packets are received into.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use hugepages::DeviceWritable;

use crate::copies::Run;
use crate::driver::{DeviceIndex, Driver, ForNic, NicUnfit};

/// GPU memory that a NIC receives into.
#[derive(Debug)]
pub struct ReceiveMemory {
    driver: Arc<dyn Driver>,
    device: DeviceIndex,
    memory: ForNic,
    bytes: usize,
}

impl ReceiveMemory {
    /// Allocates `bytes`, rounded up to whole pages of the GPU's, 64 KiB.
    ///
    /// # Errors
    /// See [`NicUnfit`].
    pub fn allocate(driver: &Arc<dyn Driver>, device: DeviceIndex, bytes: usize) -> Result<Self, NicUnfit> {
        let bytes = bytes.max(1).next_multiple_of(64 << 10);
        let memory = driver.allocate_for_nic(device, bytes)?;
        Ok(Self { driver: Arc::clone(driver), device, memory, bytes })
    }

    /// The GPU.
    #[must_use]
    pub fn device(&self) -> DeviceIndex {
        self.device
    }

    fn holds(&self, address: u64, bytes: u64) -> bool {
        let first = address.checked_sub(self.memory.address);
        first.and_then(|first| first.checked_add(bytes)).is_some_and(|end| end <= self.bytes as u64)
    }
}

// SAFETY: allocated for this alone, until it is dropped; no reference to it is ever made.
unsafe impl DeviceWritable for ReceiveMemory {
    fn address(&self) -> usize {
        usize::try_from(self.memory.address).unwrap_or(usize::MAX)
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn dma_buf(&self) -> Option<BorrowedFd<'_>> {
        self.memory.dma_buf.as_ref().map(AsFd::as_fd)
    }

    fn is_cpu_memory(&self) -> bool {
        self.memory.is_cpu_memory
    }
}

impl Drop for ReceiveMemory {
    fn drop(&mut self) {
        self.driver.free_for_nic(self.device, &self.memory);
    }
}

/// A plane in pieces of GPU memory, in the order of its bytes; all but the last have one size. Filling it again does not allocate.
#[derive(Debug)]
pub struct Received {
    memory: Arc<ReceiveMemory>,
    addresses: Vec<u64>,
    piece_bytes: u64,
    bytes: u64,
}

impl Received {
    /// An empty one, with room for `pieces` pieces of `memory`.
    #[must_use]
    pub fn new(memory: Arc<ReceiveMemory>, pieces: usize) -> Self {
        Self { memory, addresses: Vec::with_capacity(pieces), piece_bytes: 1, bytes: 0 }
    }

    /// Removes all pieces; those that follow have `piece_bytes` each.
    pub fn begin(&mut self, piece_bytes: u64) {
        self.addresses.clear();
        (self.piece_bytes, self.bytes) = (piece_bytes.max(1), 0);
    }

    /// Adds a piece; false, and it is not added, if it is not all in the memory, or its size is not that of the others (the last one may be smaller).
    #[must_use]
    pub fn push(&mut self, address: u64, bytes: u64) -> bool {
        let fits = (1..=self.piece_bytes).contains(&bytes) && self.bytes.is_multiple_of(self.piece_bytes);
        if !fits || !self.memory.holds(address, bytes) {
            return false;
        }
        self.addresses.push(address);
        self.bytes += bytes;
        true
    }

    /// Bytes in all pieces.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The GPU that they are in.
    #[must_use]
    pub fn device(&self) -> DeviceIndex {
        self.memory.device
    }

    /// Cuts a run whose source is an offset in the plane where pieces end; each part's source is an address, and it is one row.
    ///
    /// # Panics
    /// If the run reaches beyond the plane.
    pub(crate) fn parts(&self, run: Run, mut each: impl FnMut(Run)) {
        for row in 0..run.rows {
            let (to, from) = (run.to + row * run.to_pitch, run.from + row * run.from_pitch);
            assert!(from + run.bytes <= self.bytes, "a run lies within its plane");
            let mut done = 0;
            while done < run.bytes {
                let (piece, skipped) = ((from + done) / self.piece_bytes, (from + done) % self.piece_bytes);
                let bytes = (self.piece_bytes - skipped).min(run.bytes - done);
                let address = self.addresses[usize::try_from(piece).unwrap_or(usize::MAX)];
                each(Run::row(to + done, address + skipped, bytes));
                done += bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::testing::{FakeDriver, Pace};

    proptest! {
        /// Every byte of a run comes from the byte of the plane that it should; the twin looks each one up.
        #[test]
        fn parts_are_the_runs_bytes(
            piece in 1..9_u64,
            places in prop::collection::vec(0..100_u64, 1..12),
            last in any::<prop::sample::Index>(),
            run in (0..50_u64, 1..7_u64, 1..4_u64, 0..5_u64, 0..5_u64),
            at in any::<prop::sample::Index>(),
        ) {
            let driver: Arc<dyn Driver> = Arc::new(FakeDriver::new(1, Pace::AtOnce));
            let memory = Arc::new(ReceiveMemory::allocate(&driver, DeviceIndex(0), 4096).unwrap());
            let base = memory.address() as u64;
            let mut plane = Received::new(Arc::clone(&memory), places.len());
            plane.begin(piece);
            let mut bytes = Vec::new();
            for (index, place) in places.iter().enumerate() {
                let is_last = index + 1 == places.len();
                let length = if is_last { 1 + last.index(usize::try_from(piece).unwrap()) as u64 } else { piece };
                prop_assert!(plane.push(base + place * 8, length));
                bytes.extend((0..length).map(|byte| base + place * 8 + byte));
            }
            let total = bytes.len() as u64;
            prop_assert_eq!(plane.bytes(), total);
            let (to, length, rows, gap, to_gap) = run;
            let length = length.min(total);
            let from_pitch = length + gap;
            let rows = rows.min((total - length) / from_pitch + 1);
            let most = total - length - (rows - 1) * from_pitch;
            let from = at.index(usize::try_from(most + 1).unwrap()) as u64;
            let run = Run { to, from, bytes: length, rows, to_pitch: length + to_gap, from_pitch };
            let mut twin = BTreeMap::new();
            for row in 0..rows {
                for byte in 0..length {
                    let source = bytes[usize::try_from(from + row * from_pitch + byte).unwrap()];
                    twin.insert(to + row * run.to_pitch + byte, source);
                }
            }
            let mut got = BTreeMap::new();
            plane.parts(run, |part| {
                assert_eq!(part.rows, 1);
                for byte in 0..part.bytes {
                    assert_eq!(got.insert(part.to + byte, part.from + byte), None, "no byte is copied twice");
                }
            });
            prop_assert_eq!(got, twin);
        }
    }

    #[test]
    fn what_is_not_in_the_memory_is_no_piece() {
        let driver: Arc<dyn Driver> = Arc::new(FakeDriver::new(1, Pace::AtOnce));
        let memory = Arc::new(ReceiveMemory::allocate(&driver, DeviceIndex(0), 1).unwrap());
        let (base, end) = (memory.address() as u64, memory.address() as u64 + (64 << 10));
        let mut plane = Received::new(memory, 4);
        plane.begin(8);
        assert!(!plane.push(base - 1, 8) && !plane.push(end - 7, 8) && !plane.push(u64::MAX, 8));
        assert!(!plane.push(base, 9) && !plane.push(base, 0), "sizes that a piece cannot have");
        assert!(plane.push(end - 8, 8) && plane.push(base, 3));
        assert!(!plane.push(base, 8), "a short piece is the last");
        assert_eq!(plane.bytes(), 11);
    }
}
