//! The decode stage: packets of a plane to the decoded plane in a slot, in one pass over cache-resident scratch. A compression device may take the
//! decompression; what it cannot do is done here.

use std::sync::Arc;

use compress::{DecodeError, Decoder, Offload, Section, Untaken};
use dpdk::Ring;
use gpu_dma::paged;
use hugepages::Slot;
use iface::{Clock, Counter, Stage};

use crate::job::{PlaneJob, PlaneOutcome};
use crate::offload::DeviceOffload;

/// The rings that join a decode stage to the rest.
pub(crate) struct DecodeRings {
    /// Planes to decode, from every queue.
    pub(crate) planes: Ring<Box<PlaneJob>>,
    /// Decoded planes.
    pub(crate) decoded: Ring<Box<PlaneJob>>,
    /// Where each queue takes back planes that cannot be decoded.
    pub(crate) returned: Vec<Ring<Box<PlaneJob>>>,
    /// Free slots.
    pub(crate) slots: Ring<Box<Slot>>,
}

/// Who decompressed the planes of one decode lcore, where there is a device. Each plane that the lcore is done with has counted in one of
/// `planes_by_device`, `planes_not_deflate`, `planes_too_large`, `planes_device_failed` and `planes_refused`.
#[derive(Debug, Default)]
pub(crate) struct OffloadCounters {
    /// The device.
    pub(crate) by_device: Counter,
    /// The core: no section, or one of a compression that the device does not know.
    pub(crate) not_deflate: Counter,
    /// The core: the section is larger than the device takes or gives.
    pub(crate) too_large: Counter,
    /// The core, after the device had failed.
    pub(crate) device_failed: Counter,
    /// Nobody: checksum or shape is wrong, which is found before the device is asked.
    pub(crate) refused: Counter,
    /// Times that the device took fewer planes than it was offered; they were offered again.
    pub(crate) enqueue_refused: Counter,
}

impl OffloadCounters {
    /// Every counter with its name.
    pub(crate) fn named(&self) -> [(&'static str, &Counter); 6] {
        [
            ("planes_by_device", &self.by_device),
            ("planes_not_deflate", &self.not_deflate),
            ("planes_too_large", &self.too_large),
            ("planes_device_failed", &self.device_failed),
            ("planes_refused", &self.refused),
            ("enqueue_refused", &self.enqueue_refused),
        ]
    }
}

/// A compression device and how it is used.
pub(crate) struct DecodeDevice {
    pub(crate) offload: DeviceOffload,
    /// Planes handed to it in one go. A software device works while it is being handed them, so it gets one, as a decoder takes one at a time.
    pub(crate) burst: usize,
    pub(crate) counters: Arc<OffloadCounters>,
}

/// A decoder and what it needs to put planes in the order of pages.
pub(crate) struct PlaneDecoder {
    decoder: Decoder,
    /// A decoded plane before it is put in that order; in cache, as everything here.
    unordered: Vec<u8>,
}

impl PlaneDecoder {
    pub(crate) fn new(slot_bytes: usize) -> Self {
        Self { decoder: Decoder::new(slot_bytes), unordered: vec![0; slot_bytes] }
    }
}

/// One decoder.
pub(crate) struct DecodeStage {
    pub(crate) decoder: PlaneDecoder,
    pub(crate) device: Option<DecodeDevice>,
    pub(crate) rings: DecodeRings,
    pub(crate) clock: Clock,
}

impl Stage for DecodeStage {
    /// Decodes one plane, so that a lcore that also receives is soon back at its queue. Without a free slot planes
    /// wait in their ring, and what they hold back is credit: the engines ask the stores for less. So they do while the device has all that it
    /// takes.
    fn poll(&mut self, _now_ns: u64) -> usize {
        let finished = self.finish_one();
        finished + self.take_up()
    }
}

impl DecodeStage {
    /// Takes up a plane, or a burst of them for the device.
    fn take_up(&mut self) -> usize {
        let burst = self.device.as_ref().map_or(1, |device| device.burst);
        let mut taken = 0;
        while taken < burst && !self.rings.planes.is_empty() {
            if self.device.as_ref().is_some_and(|device| !device.offload.has_room()) {
                break;
            }
            let Some(slot) = self.rings.slots.dequeue() else { break };
            let Some(mut job) = self.rings.planes.dequeue() else {
                self.give_back(slot);
                break;
            };
            taken += 1;
            job.times.decode_begin_ns = self.clock.now_ns();
            match self.offer(job) {
                None => self.give_back(slot),
                Some(job) => {
                    self.decode(job, slot);
                    break;
                }
            }
        }
        if let Some(device) = &mut self.device {
            device.offload.flush();
            device.counters.enqueue_refused.add(std::mem::take(&mut device.offload.refused));
        }
        taken
    }

    /// Hands a plane to the device, if there is one that can do it; its checksum is found to be right first. Returns a plane that is to be decoded here.
    fn offer(&mut self, mut job: Box<PlaneJob>) -> Option<Box<PlaneJob>> {
        let Some(device) = &mut self.device else { return Some(job) };
        let section = match section_for(&device.offload, &job) {
            Ok(section) => section,
            Err(reason) => {
                match reason {
                    Untaken::Compression => device.counters.not_deflate.add(1),
                    Untaken::TooLarge => device.counters.too_large.add(1),
                }
                return Some(job);
            }
        };
        if let Some(outcome) = refusal(&job) {
            device.counters.refused.add(1);
            job.outcome = outcome;
            self.send_back(job);
            return None;
        }
        match device.offload.submit(job, &section) {
            Ok(()) => None,
            Err(job) => {
                device.counters.too_large.add(1);
                Some(job)
            }
        }
    }

    /// Takes a plane that the device is done with and makes elements of it.
    fn finish_one(&mut self) -> usize {
        let Some(device) = &mut self.device else { return 0 };
        if device.offload.in_flight() == 0 {
            return 0;
        }
        let Some(mut slot) = self.rings.slots.dequeue() else { return 0 };
        let (decoder, counters) = (&mut self.decoder, &device.counters);
        let mut finished = None;
        device.offload.finish(|mut job, section| {
            job.outcome = match section {
                Some(section) => {
                    counters.by_device.add(1);
                    decode_into(decoder, &mut job, &mut slot, Some(section))
                }
                None => {
                    counters.device_failed.add(1);
                    decode_into(decoder, &mut job, &mut slot, None)
                }
            };
            finished = Some(job);
        });
        match finished {
            Some(job) => {
                self.send_on(job, slot);
                1
            }
            None => {
                self.give_back(slot);
                0
            }
        }
    }

    fn decode(&mut self, mut job: Box<PlaneJob>, mut slot: Box<Slot>) {
        job.outcome = decode_into(&mut self.decoder, &mut job, &mut slot, None);
        self.send_on(job, slot);
    }

    fn send_on(&self, mut job: Box<PlaneJob>, slot: Box<Slot>) {
        if job.outcome != PlaneOutcome::Pending {
            self.give_back(slot);
            return self.send_back(job);
        }
        job.drop_segments();
        job.times.decode_end_ns = self.clock.now_ns();
        job.slot = Some(slot);
        assert!(self.rings.decoded.enqueue(job).is_ok(), "the rings have room for every job");
    }

    fn send_back(&self, mut job: Box<PlaneJob>) {
        job.drop_segments();
        job.times.decode_end_ns = self.clock.now_ns();
        let queue = job.queue;
        assert!(self.rings.returned[queue].enqueue(job).is_ok(), "the rings have room for every job");
    }

    /// Another decoder may be waiting for a slot that this one turned out not to need.
    fn give_back(&self, slot: Box<Slot>) {
        assert!(self.rings.slots.enqueue(slot).is_ok(), "the ring has room for every slot");
    }
}

/// What of a plane the device is to decompress. A plane that cannot be decoded at all is for the decoder to refuse.
fn section_for(offload: &DeviceOffload, job: &PlaneJob) -> Result<Section, Untaken> {
    let (Some(shape), Some(entry)) = (&job.shape, &job.entry) else { return Err(Untaken::Compression) };
    let section = entry.section(shape).ok().flatten().ok_or(Untaken::Compression)?;
    offload.takes(&section)?;
    Ok(section)
}

/// How a plane ends that the device need not be asked about.
fn refusal(job: &PlaneJob) -> Option<PlaneOutcome> {
    let (Some(shape), Some(entry), Some(fetch)) = (&job.shape, &job.entry, &job.fetch) else {
        return Some(PlaneOutcome::Undecodable);
    };
    if !fetch.expects(job.chunk, shape) {
        return Some(PlaneOutcome::OtherShape);
    }
    Decoder::check_segments(job.pieces(), entry).err().map(|error| outcome_of(&error))
}

fn outcome_of(error: &DecodeError) -> PlaneOutcome {
    match error {
        DecodeError::Crc { .. } | DecodeError::Length { .. } => PlaneOutcome::Corrupt,
        _ => PlaneOutcome::Undecodable,
    }
}

/// [`PlaneOutcome::Pending`] if the slot now holds the decoded plane. `section` is what a device made of the plane's section.
fn decode_into(
    PlaneDecoder { decoder, unordered }: &mut PlaneDecoder,
    job: &mut PlaneJob,
    slot: &mut Slot,
    section: Option<&[u8]>,
) -> PlaneOutcome {
    let (Some(shape), Some(entry), Some(fetch)) = (&job.shape, &job.entry, &job.fetch) else {
        return PlaneOutcome::Undecodable;
    };
    if !fetch.expects(job.chunk, shape) {
        return PlaneOutcome::OtherShape;
    }
    let out_dtype = fetch.out_dtype(job.plane);
    let bytes = shape.elements_per_plane() * out_dtype.bytes();
    let (Some(slot), Some(unordered)) = (slot.as_mut_slice().get_mut(..bytes), unordered.get_mut(..bytes))
    else {
        return PlaneOutcome::Undecodable;
    };
    let by_page = fetch.by_page(job.chunk);
    let out = if by_page.is_some() { &mut *unordered } else { &mut *slot };
    // Past the caches only where no CPU reads them next: `docs/CODEC.md` has the measurement.
    decoder.set_streaming_stores(fetch.only_dma_reads() && by_page.is_none());
    let decoded = match section {
        None => decoder.decode_segments(shape, entry, job.pieces(), out_dtype, out),
        Some(section) => decoder.decode_decompressed(shape, entry, job.pieces(), section, out_dtype, out),
    };
    match decoded {
        Ok(()) => {
            if let Some((memory, first_token)) = by_page {
                paged::by_page(memory.kv(), first_token, shape.tokens, unordered, slot);
            }
            job.decoded_bytes = bytes;
            PlaneOutcome::Pending
        }
        Err(error) => outcome_of(&error),
    }
}
