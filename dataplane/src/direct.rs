//! GPUDirect: planes of the `raw` codec, whose bytes are those of the pages, are received into GPU memory and copied from there.
//!
//! Their PULLs go out from a UDP port of their own, so that the answers come to a receive queue of their own ([`iface::direct`]). Everything else, lookups,
//! headers, planes of other codecs, uses the ordinary port, so the CPU never needs to read what is in GPU memory. A plane that has come to both is pulled
//! again, to host memory.

use std::sync::Arc;

use compress::{ChunkView, Codec, OutDtype};
use dpdk::{DevicePool, Eal};
use gpu_dma::{DeviceIndex, NicUnfit, PagedMemory, ReceiveMemory, SlotOrder};
use iface::{Counter, Direct, DirectDatagram, DirectError};
use protocol::reason::DropReason;
use protocol::time::Instant;
use protocol::wire::message::{self, Message};
use protocol::{Accepted, FetchEngine, StoreIndex};

use crate::chunk_layout::EncodedChunks;
use crate::config::Config;
use crate::gpu::Gpus;
use crate::job::{FetchShared, FetchTarget, PlaneJob, PlaneOutcome, Route};
use crate::rx::{Parts, PlaneCounters, Planes};

/// Whether planes are to be received into GPU memory where that can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GpuDirect {
    /// Never.
    #[default]
    Off,
    /// If port, driver and GPU can; otherwise all are received into host memory.
    Auto,
    /// Or the data plane does not start.
    On,
}

/// Why no plane is received into GPU memory.
#[derive(Debug, thiserror::Error)]
pub enum NoGpuDirect {
    /// there is no GPU to deliver to
    #[error("no GPU is delivered to: see --gpu")]
    NoGpu,
    /// the GPU cannot
    #[error(transparent)]
    Gpu(#[from] NicUnfit),
    /// the port cannot
    #[error(transparent)]
    Port(#[from] DirectError),
    /// the driver refused the queues, or to steer packets to them
    #[error("{0}")]
    Refused(String),
}

/// GPU memory that a port may write to.
pub(crate) struct Prepared {
    pub(crate) memory: Arc<ReceiveMemory>,
    pub(crate) port: Direct,
}

/// What of a configuration's wish can be had.
///
/// # Errors
/// Why nothing, if it is to be on or else not to start.
pub(crate) fn prepare(
    eal: &Eal,
    config: &Config,
    gpus: &Gpus,
) -> Result<Result<Option<Prepared>, NoGpuDirect>, NoGpuDirect> {
    if config.gpu.direct == GpuDirect::Off {
        return Ok(Ok(None));
    }
    match try_to(eal, config, gpus) {
        Err(reason) if config.gpu.direct == GpuDirect::On => Err(reason),
        tried => Ok(tried.map(Some)),
    }
}

fn try_to(eal: &Eal, config: &Config, gpus: &Gpus) -> Result<Prepared, NoGpuDirect> {
    let driver = gpus.config.driver.as_ref().ok_or(NoGpuDirect::NoGpu)?;
    if driver.devices().is_empty() {
        return Err(NoGpuDirect::NoGpu);
    }
    let bytes = Direct::memory_bytes(&config.iface);
    let memory = Arc::new(ReceiveMemory::allocate(driver, DeviceIndex(0), bytes)?);
    let port = Direct::prepare(eal, &config.iface, memory.clone())?;
    Ok(Prepared { memory, port })
}

/// What one queue counts. Of the planes that `planes_direct` counts, those that failed count among the queue's others too.
#[derive(Debug, Default)]
pub(crate) struct DirectCounters {
    /// Planes received into GPU memory and handed to a sink.
    pub(crate) planes: Counter,
    /// Planes that came to both memories, and were pulled again.
    pub(crate) mixed: Counter,
    /// Packets without a UDP checksum, or whose checksum the NIC did not check; their store's planes go to host memory since.
    pub(crate) unverified: Counter,
}

impl DirectCounters {
    pub(crate) fn named(&self) -> [(&'static str, &Counter); 3] {
        [
            ("planes_direct", &self.planes),
            ("planes_mixed", &self.mixed),
            ("packets_unverified", &self.unverified),
        ]
    }
}

/// One queue's share.
pub(crate) struct DirectQueue {
    pub(crate) device: DeviceIndex,
    /// The UDP port that answers come to.
    pub(crate) port: u16,
    /// Which stores are asked so.
    pub(crate) stores: Vec<bool>,
    pub(crate) counters: Arc<DirectCounters>,
    pub(crate) pool: DevicePool,
}

impl DirectQueue {
    /// Whether the answer to `pull`, if it is one, which is about to be sent to `store`, is to come to GPU memory. Decided once for each plane.
    pub(crate) fn wants(
        &self,
        engine: &FetchEngine<EncodedChunks>,
        planes: &mut Planes,
        parts: &mut Parts,
        store: StoreIndex,
        pull: &[u8],
    ) -> bool {
        let Ok(Message::Pull(pull)) = Message::new_checked(pull) else { return false };
        let tag = pull.range.tag;
        let Some((transfer, fetch, chunk, plane, header)) = engine.plane_of(tag) else { return false };
        let Some(job) = &mut planes.0[transfer.slot()] else { return false };
        if let Some(route) = job.route.filter(|route| route.tag == tag) {
            return route.is_direct;
        }
        let chunk = usize::try_from(chunk).unwrap_or(usize::MAX);
        let is_direct = self.stores[usize::from(store.0)]
            && parts.fetch(fetch).is_some_and(|part| self.suits(&part.fetch, chunk, plane.into(), header));
        job.route = Some(Route { tag, store, is_direct });
        is_direct
    }

    /// Whether a plane's bytes are those that its pages are to hold, and these are in our GPU.
    fn suits(&self, fetch: &FetchShared, chunk: usize, plane: usize, header: &[u8]) -> bool {
        let is_here = match &fetch.target {
            FetchTarget::Host { .. } => false,
            FetchTarget::Pages { memory, .. } => memory.device() == self.device && in_order(memory),
            FetchTarget::Ring(memory) => memory.device() == self.device,
        };
        let Some(view) = ChunkView::parse(header).ok().filter(|_| is_here) else { return false };
        let shape = view.shape();
        fetch.expects(chunk, shape)
            && fetch.out_dtype(plane) == OutDtype::from(shape.dtype)
            && view.plane(plane).is_some_and(|entry| {
                entry.codec == Codec::Raw && usize::try_from(entry.bytes) == Ok(shape.plane_bytes())
            })
    }

    /// Takes in a segment that lies in GPU memory: of a plane that was asked for so, and of no other, whoever sends it.
    pub(crate) fn take(
        &mut self,
        engine: &mut FetchEngine<EncodedChunks>,
        planes: &mut Planes,
        counters: &PlaneCounters,
        now_ns: u64,
        store: StoreIndex,
        datagram: DirectDatagram,
    ) -> Result<(), DropReason> {
        let DirectDatagram { marked, mbuf, segment, is_verified, .. } = datagram;
        let Some(buffer) = segment else { return Err(DropReason::BadLength) };
        let tag = message::data_header(mbuf.data()).map(|data| data.tag).ok_or(DropReason::BadType)?;
        // Of what is not being received the engine says why it is dropped.
        if let Some((transfer, ..)) = engine.plane_of(tag) {
            let job = planes.0[transfer.slot()].as_deref_mut();
            let route =
                job.and_then(|job| job.route.as_mut()).filter(|route| route.tag == tag && route.is_direct);
            let route = route.ok_or(DropReason::ForeignPort)?;
            if !is_verified {
                // What else is asked of this store comes to host memory; what was asked already is asked again once it counts as lost.
                route.is_direct = false;
                self.stores[usize::from(store.0)] = false;
                self.counters.unverified.add(1);
                return Err(DropReason::BadUdpChecksum);
            }
        }
        let now = Instant::from_nanos(now_ns);
        let accepted = engine.handle_data_header(now, store, marked, mbuf.data(), buffer.bytes())?;
        let Accepted::Segment { transfer, segment, .. } = accepted else { return Err(DropReason::BadType) };
        counters.segments_accepted.add(1);
        let job = planes.receiving(transfer, now_ns);
        let segment = usize::try_from(segment).unwrap_or(usize::MAX);
        job.buffers[segment] = Some(buffer);
        job.buffer_count += 1;
        Ok(())
    }

    /// Makes a plane of the segments of a job, of which at least one lies in GPU memory. Afterwards its outcome is still pending, or the plane is to be pulled again.
    pub(crate) fn gather(&mut self, job: &mut PlaneJob) {
        let segments = job.segment_count;
        let is_whole = job.buffer_count == segments && fill(job);
        if is_whole {
            self.counters.planes.add(1);
            return;
        }
        self.counters.mixed.add(1);
        if let Some(route) = job.route {
            self.stores[usize::from(route.store.0)] = false;
        }
        job.outcome = PlaneOutcome::Corrupt;
        job.drop_segments();
    }
}

/// Lists a job's buffers for the sink; whether all of them fit together to a plane.
fn fill(job: &mut PlaneJob) -> bool {
    let Some(received) = &mut job.received else { return false };
    let mut buffers = job.buffers[..job.segment_count].iter().flatten();
    let Some(first) = buffers.clone().next() else { return false };
    received.begin(first.bytes() as u64);
    let all = buffers.all(|buffer| received.push(buffer.address(), buffer.bytes() as u64));
    job.decoded_bytes = usize::try_from(received.bytes()).unwrap_or(usize::MAX);
    all && job.entry.is_some_and(|entry| u64::from(entry.bytes) == received.bytes())
}

/// Pages that take planes in the order in which they are stored. Others would take a copy for each head's vector.
fn in_order(memory: &PagedMemory) -> bool {
    memory.order() == SlotOrder::Tokens
}
