//! What the sinks are measured against (`shadowserve bench gpu`): the same copies, started in a bare loop from lists made
//! beforehand.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hugepages::Slot;

use crate::copies::{CopyList, Run};
use crate::driver::{DeviceIndex, Driver, DriverError};
use crate::memory::{PagedMemory, RingMemory};
use crate::paged;
use crate::received::Received;

/// How to measure.
#[derive(Clone, Copy, Debug)]
pub struct Loop {
    /// For how long.
    pub duration: Duration,
    /// Streams, used in turn.
    pub streams: usize,
    /// Pieces in a list.
    pub batch_pieces: usize,
    /// Lists under way per stream.
    pub batches_per_stream: usize,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    /// Bytes copied.
    pub bytes: u64,
    /// Pieces.
    pub copies: u64,
    /// From the first start to the last end.
    pub elapsed: Duration,
    /// Of it, what the calls that start copies took.
    pub busy: Duration,
}

/// Whole chunks of planes from `slots`, one after the other, to the pages of `tables`, likewise.
///
/// # Errors
/// When the driver refuses.
pub fn pages(
    driver: &dyn Driver,
    memory: &PagedMemory,
    slots: &[Box<Slot>],
    tables: &[Arc<[u32]>],
    measure: &Loop,
) -> Result<Done, DriverError> {
    let kv = memory.kv();
    let planes = u32::try_from(2 * kv.layers.len()).unwrap_or(u32::MAX);
    let (mut lists, mut list, mut number) = (Vec::new(), CopyList::default(), 0_u32);
    while lists.len() < 16 && !slots.is_empty() {
        let plane = number % planes;
        let (slot, table) = (&slots[number as usize % slots.len()], &tables[number as usize % tables.len()]);
        let base = memory.base(plane).unwrap_or(0);
        let tokens = u16::try_from(table.len() * usize::from(kv.page_tokens)).unwrap_or(u16::MAX);
        assert!(paged::plane_bytes(kv, tokens) <= slot.bytes() as u64, "a plane fits a slot");
        assert!(table.iter().all(|&page| page < kv.pages), "tables name pages that there are");
        paged::runs(kv, plane, table, 0, tokens, memory.order(), |run| {
            list.push(Run { to: base + run.to, from: slot.addr() as u64 + run.from, ..run });
        });
        list.close();
        number = number.wrapping_add(1);
        if list.len() >= measure.batch_pieces {
            lists.push(std::mem::take(&mut list));
        }
    }
    run(driver, memory.device(), &lists, measure)
}

/// Puts the first bytes of a slot, whose memory is registered, where a plane's pieces are, as a NIC would, and waits for it.
///
/// # Errors
/// When the driver refuses.
pub fn play_nic(driver: &dyn Driver, slot: &Slot, plane: &Received) -> Result<(), DriverError> {
    let (bytes, device) = (plane.bytes().min(slot.bytes() as u64), plane.device());
    let mut list = CopyList::default();
    plane.parts(Run::row(0, 0, bytes), |part| {
        list.push(Run::row(part.from, slot.addr() as u64 + part.to, part.bytes));
        list.close();
    });
    let stream = driver.create_stream(device)?;
    // SAFETY: the slot is borrowed until the copies have ended, which is waited for; its memory is registered, or the driver refuses it. The pieces lie in
    // memory that the plane holds.
    let done = unsafe { driver.copy_pieces(device, stream, &list, 0..list.to.len()) };
    let done = done.and(driver.synchronize(device, stream));
    driver.destroy_stream(device, stream);
    done
}

/// All of `slots`, which lie one behind the other, as one copy to the start of a ring.
///
/// # Errors
/// When the driver refuses.
pub fn one_large_copy(
    driver: &dyn Driver,
    memory: &RingMemory,
    slots: &[Box<Slot>],
    measure: &Loop,
) -> Result<Done, DriverError> {
    let mut slots: Vec<&Slot> = slots.iter().map(|slot| &**slot).collect();
    slots.sort_unstable_by_key(|slot| slot.addr());
    let ring_bytes = u64::from(memory.ring().entries) * memory.ring().entry_bytes;
    let (mut list, mut at) = (CopyList::default(), 0);
    for slot in slots {
        let bytes = slot.bytes() as u64;
        if at + bytes <= ring_bytes {
            list.push(Run::row(memory.entry_address(0) + at, slot.addr() as u64, bytes));
            at += bytes;
        }
    }
    run(driver, memory.device(), &[list], measure)
}

/// Starts the lists in turn. All of them lie in slots and memory that the callers above borrow.
fn run(
    driver: &dyn Driver,
    device: DeviceIndex,
    lists: &[CopyList],
    measure: &Loop,
) -> Result<Done, DriverError> {
    let streams: Vec<_> =
        (0..measure.streams).map(|_| driver.create_stream(device)).collect::<Result<_, _>>()?;
    let events = measure.streams * measure.batches_per_stream;
    let mut events: Vec<_> = (0..events).map(|_| driver.create_event(device)).collect::<Result<_, _>>()?;
    let (mut flying, mut done, mut number) = (VecDeque::new(), Done::default(), 0);
    let begun = Instant::now();
    let mut failed = None;
    while failed.is_none() && (begun.elapsed() < measure.duration || !flying.is_empty()) {
        if begun.elapsed() < measure.duration
            && let Some(event) = events.pop()
        {
            let turn = Instant::now();
            let (list, stream) = (&lists[number % lists.len()], streams[number % streams.len()]);
            number += 1;
            // SAFETY: sources and destinations are slots and GPU memory that the callers borrow until this function
            // returns, and it returns after the last event, or after each stream was waited for.
            let started = unsafe { driver.copy_pieces(device, stream, list, 0..list.to.len()) };
            failed = started.and_then(|()| driver.record(device, event, stream)).err();
            done.busy += turn.elapsed();
            flying.push_back(event);
            done.bytes += list.bytes.iter().map(|&bytes| bytes as u64).sum::<u64>();
            done.copies += list.to.len() as u64;
            continue;
        }
        let Some(&event) = flying.front() else { continue };
        match driver.query(device, event) {
            Ok(true) => events.extend(flying.pop_front()),
            Ok(false) => {}
            Err(error) => failed = Some(error),
        }
    }
    done.elapsed = begun.elapsed();
    for stream in streams {
        let _ = driver.synchronize(device, stream);
        driver.destroy_stream(device, stream);
    }
    events.into_iter().chain(flying).for_each(|event| driver.destroy_event(device, event));
    failed.map_or(Ok(done), Err)
}
