//! Makes everything that the stages need, from the budgets of the configuration, and places the stages on lcores.
//! After [`Pipeline::build`] nothing on the data path is allocated.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arrayvec::ArrayVec;
use compress::Decoder;
use dpdk::{
    CompressDev, CompressError, CompressQueue, DevicePool, Eal, LaunchError, Pool, Port, Ring, RingError,
    RingMode,
};
use gpu_dma::{DriverError, ReceiveMemory, Sinks, Sources};
use hugepages::{Arena, ArenaConfig, ArenaError, PageSize, Slot, Slots, SlotsError};
use iface::{Clock, LcoreControl, LcoreCounters, LinkCounters, NextHop, Opened, Stage, StopOnDrop, lcore};
use protocol::frame::max_segment_bytes;
use protocol::paths::Paths;
use protocol::put::{OfferConfig, OfferEngine};
use protocol::wire::message::MAX_CONTROL_BYTES;
use protocol::{FetchConfig, FetchEngine, ServeConfig};

use crate::chunk_layout::EncodedChunks;
use crate::config::{Config, ConfigError};
use crate::decode::{DecodeDevice, DecodeRings, DecodeStage, OffloadCounters, PlaneDecoder};
use crate::direct::{self, DirectCounters, DirectQueue, GpuDirect, NoGpuDirect, Prepared};
use crate::dma::{DmaRings, DmaStage};
use crate::fetch_counts::FetchCounts;
use crate::fetches::{FetchLimits, Fetches, QueueEnds};
use crate::gpu::Gpus;
use crate::job::PlaneJob;
use crate::latency::Latencies;
use crate::offload::{DeviceOffload, device_config, fault_of};
use crate::placement::StageKind;
use crate::rx::{Parts, PlaneCounters, Planes, RxRings, RxStage, StoreAddress};
use crate::save::encode::{EncodeCounters, EncodeRings, EncodeStage, STAGING_SLOTS};
use crate::save::job::SaveJob;
use crate::save::offers::{OfferCounts, Offers};
use crate::save::saves::{SaveLimits, Saves};

/// Why the pipeline could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// the configuration contradicts itself
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// the protocol engine refuses its budgets
    #[error(transparent)]
    Engine(#[from] protocol::ConfigError),
    /// the port could not be opened
    #[error(transparent)]
    Port(#[from] iface::OpenError),
    /// the slots' memory could not be had
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// the slots could not be cut
    #[error(transparent)]
    Slots(#[from] SlotsError),
    /// a ring could not be made
    #[error(transparent)]
    Ring(#[from] RingError),
    /// the compression device could not be opened
    #[error(transparent)]
    Compress(#[from] CompressError),
    /// a GPU could not be made ready
    #[error("the GPU cannot be used: {0}; --gpu none does without")]
    Gpu(#[from] DriverError),
    /// planes cannot be received into GPU memory, and were to be
    #[error("--gpudirect on: {0}; --gpudirect auto does without where it must")]
    Direct(#[from] NoGpuDirect),
    /// an lcore could not be started
    #[error(transparent)]
    Launch(#[from] LaunchError),
}

/// The data plane's budgets, worked out from the configuration.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    queues: u16,
    segment_bytes: u16,
    /// Segments that our own port allows, if the path carries them.
    max_segment_bytes: u16,
    max_plane_bytes: u32,
    plane_segments: u32,
    /// Planes that a queue can have under way.
    pub(crate) active_planes: u16,
    /// Packets that a queue's planes may hold.
    memory_segments: u32,
    window_segments: u32,
}

/// What the control thread can see of one queue.
pub(crate) struct QueueView {
    pub(crate) link: Arc<LinkCounters>,
    pub(crate) planes: Arc<PlaneCounters>,
    pub(crate) fetch: Arc<FetchCounts>,
    pub(crate) offers: Arc<OfferCounts>,
    pub(crate) pool: Pool,
    /// Where it receives into GPU memory.
    pub(crate) direct: Option<(Arc<DirectCounters>, DevicePool)>,
}

/// Whether planes are received into GPU memory.
pub(crate) enum DirectState {
    /// It was not asked for.
    Off,
    /// They are.
    On,
    /// They are not, and why.
    Refused(String),
}

/// What the control thread can see of one lcore.
pub(crate) struct LcoreView {
    pub(crate) cpu: usize,
    pub(crate) stages: Vec<StageKind>,
    pub(crate) counters: Arc<LcoreCounters>,
}

/// A running pipeline.
pub(crate) struct Pipeline {
    pub(crate) port: Port,
    pub(crate) queues: Vec<QueueView>,
    pub(crate) lcores: Vec<LcoreView>,
    pub(crate) slots: Ring<Box<Slot>>,
    pub(crate) slot_count: usize,
    pub(crate) slot_bytes: usize,
    pub(crate) slot_pages: PageSize,
    pub(crate) slot_fallback: Option<String>,
    pub(crate) decode_backlog: Ring<Box<PlaneJob>>,
    pub(crate) scratch_bytes: usize,
    pub(crate) clock: Clock,
    /// The compression device, and what each decode lcore counts about it.
    pub(crate) compress_dev: Option<CompressDev>,
    pub(crate) offloads: Vec<Arc<OffloadCounters>>,
    /// What each decode lcore counts of what it encodes; none if nothing is saved.
    pub(crate) encoders: Vec<Arc<EncodeCounters>>,
    pub(crate) direct: DirectState,
    stop: StopOnDrop,
}

impl Budget {
    pub(crate) fn new(config: &Config) -> Result<Self, ConfigError> {
        for (name, value) in [
            ("slots", config.slots),
            ("slot-kib", config.slot_bytes),
            ("window", config.window_segments.map_or(1, |window| window as usize)),
            ("max-fetches", usize::from(config.max_fetches)),
            ("max-chunks", config.max_chunks as usize),
            ("max-layers", usize::from(config.max_layers)),
        ] {
            if value == 0 {
                return Err(ConfigError::Zero(name));
            }
        }
        let ip = &config.iface.address.ip;
        let largest_segment_bytes = max_segment_bytes(config.iface.mtu, ip);
        let segment_bytes = max_segment_bytes(config.iface.mtu.min(PLAIN_MTU), ip);
        let payload = usize::from(config.iface.mtu).saturating_sub(48);
        if payload < MAX_CONTROL_BYTES || segment_bytes == 0 {
            return Err(ConfigError::Mtu { mtu: config.iface.mtu, least: MAX_CONTROL_BYTES + 48 });
        }
        let queues = config.iface.queues;
        // An encoded plane may be a little larger than a decoded one: scales, and frames that did not shrink.
        let max_plane_bytes =
            u32::try_from(config.slot_bytes + config.slot_bytes / 16 + 4096).unwrap_or(u32::MAX);
        let plane_segments = max_plane_bytes.div_ceil(u32::from(segment_bytes));
        // What the device's rings and each lcore's pool cache can hold is not there for planes.
        let rx_rings = if config.gpu.direct == GpuDirect::Off { 1 } else { 2 };
        let reserved =
            rx_rings * u32::from(config.iface.rx_descriptors) + u32::from(config.iface.tx_descriptors) + 512;
        let needed = reserved + 2 * plane_segments;
        if config.iface.mbufs < needed {
            return Err(ConfigError::Mbufs {
                mbufs: config.iface.mbufs,
                needed,
                slot_kib: config.slot_bytes / 1024,
            });
        }
        Ok(Self {
            queues,
            segment_bytes,
            max_segment_bytes: largest_segment_bytes,
            max_plane_bytes,
            plane_segments,
            active_planes: 256,
            memory_segments: config.iface.mbufs - reserved,
            window_segments: config
                .window_segments
                .map_or(u32::MAX, |window| window.div_ceil(u32::from(queues)))
                .min(config.iface.mbufs - reserved),
        })
    }

    fn engine(&self, config: &Config, queue: u16, seed: u32) -> FetchConfig {
        FetchConfig {
            queue,
            queues: self.queues,
            max_fetches: config.max_fetches,
            max_lookups: MAX_LOOKUPS,
            max_chunks_per_fetch: config.max_chunks,
            active_planes: self.active_planes,
            max_planes_per_chunk: config.max_layers * 2,
            max_plane_bytes: self.max_plane_bytes,
            max_header_bytes: u32::try_from(compress::header_bytes(usize::from(config.max_layers) * 2))
                .unwrap_or(u32::MAX),
            segment_bytes: self.segment_bytes,
            window_segments: self.window_segments,
            memory_segments: self.memory_segments,
            link_mbps: config.link_mbps / u32::from(self.queues),
            queue_tolerance: config.queue_tolerance,
            schedule: config.schedule,
            rto_min: config.rto_min,
            hedge_percent: config.hedge_percent,
            stores: u16::try_from(config.stores.len()).unwrap_or(u16::MAX),
            seed,
            ..FetchConfig::default()
        }
    }
}

/// Every path is taken to carry IP packets of this size; larger ones are tried first.
const PLAIN_MTU: u16 = 1500;

/// Lookups carried out at once; more wait.
pub(crate) const MAX_LOOKUPS: u16 = 64;

/// The rings between the stages. Each has room for twice what can ever be in it: a ring with relaxed tails counts what a
/// lcore is in the midst of taking out as still there, up to an eighth of its size.
pub(crate) struct Rings {
    pub(crate) decode: Ring<Box<PlaneJob>>,
    decoded: Ring<Box<PlaneJob>>,
    pub(crate) returned: Vec<Ring<Box<PlaneJob>>>,
    strays: Vec<Ring<dpdk::Mbuf>>,
    slots: Ring<Box<Slot>>,
    pub(crate) save: SaveRings,
}

/// The rings between the stages of saves.
pub(crate) struct SaveRings {
    /// To the encoders.
    chunks: Ring<Box<SaveJob>>,
    /// To each queue.
    encoded: Vec<Ring<Box<SaveJob>>>,
    /// To the control thread.
    returned: Ring<Box<SaveJob>>,
}

impl Rings {
    pub(crate) fn new(eal: &Eal, budget: &Budget, config: &Config, jobs: u32) -> Result<Self, RingError> {
        // Lcores may share CPUs, and then one must not wait for another that is not running.
        let many = RingMode::Relaxed;
        let per_queue = |name: &'static str| {
            (0..budget.queues).map(move |queue| Ring::new(eal, &format!("{name}{queue}"), 2 * jobs, many))
        };
        Ok(Self {
            decode: Ring::new(eal, "decode", 2 * jobs, many)?,
            decoded: Ring::new(eal, "decoded", 2 * jobs, many)?,
            returned: per_queue("returned").collect::<Result<_, _>>()?,
            strays: (0..budget.queues)
                .map(|queue| Ring::new(eal, &format!("strays{queue}"), 1024, many))
                .collect::<Result<_, _>>()?,
            slots: Ring::new(eal, "slots", entries(2 * config.slots).max(64), many)?,
            save: SaveRings::new(eal, budget.queues, config.save.chunks)?,
        })
    }
}

impl SaveRings {
    fn new(eal: &Eal, queues: u16, chunks: u16) -> Result<Self, RingError> {
        let ring = |name: &str| Ring::new(eal, name, (2 * u32::from(chunks)).max(64), RingMode::Relaxed);
        Ok(Self {
            chunks: ring("save")?,
            encoded: (0..queues).map(|queue| ring(&format!("encoded{queue}"))).collect::<Result<_, _>>()?,
            returned: ring("saved")?,
        })
    }
}

impl Pipeline {
    /// Opens the port, makes pools, rings, slots and stages, and starts the lcores.
    pub(crate) fn build(
        eal: &Eal,
        config: &Config,
        gpus: &Gpus,
    ) -> Result<(Self, Fetches, Saves), BuildError> {
        let budget = Budget::new(config)?;
        let (stores, hops) = stores_of(config)?;
        let peers: Vec<_> = stores.iter().map(|store| (store.ip, store.port)).collect();
        let prepared = direct::prepare(eal, config, gpus)?;
        let usable = prepared.as_ref().ok().and_then(Option::as_ref);
        let opened =
            iface::open_direct(eal, &config.iface, &peers, &hops, usable.map(|usable| &usable.port))?;
        let direct = direct_state(config, &prepared, opened.direct_refused.as_deref())?;

        let jobs = u32::from(budget.active_planes) * u32::from(budget.queues);
        let rings = Rings::new(eal, &budget, config, jobs)?;
        let Filled { slot_pages, slot_fallback, staging } = fill_slots(config, gpus, &rings.slots)?;
        let limits = FetchLimits {
            fetches: usize::from(config.max_fetches),
            lookups: usize::from(MAX_LOOKUPS),
            chunks_per_fetch: config.max_chunks as usize,
            plane_bytes: config.slot_bytes,
            planes_per_chunk: usize::from(config.max_layers) * 2,
        };
        let clock = Clock::start();
        let builder = StageBuilder { eal, config, budget, limits, stores, rings: &rings, clock, gpus };
        let Opened { port, links, pools, ports, .. } = opened;
        let (mut rx_stages, mut ends, mut queues) = (Vec::new(), Vec::new(), Vec::new());
        for (queue, (link, pool)) in (0..).zip(links.into_iter().zip(pools)) {
            let link_counters = Arc::clone(link.counters());
            let memory = usable.map(|usable| &usable.memory);
            let (stage, queue_ends) = builder.rx(queue, link, ports.clone(), memory)?;
            let planes = Arc::clone(&stage.counters);
            let direct =
                stage.direct.as_ref().map(|direct| (Arc::clone(&direct.counters), direct.pool.clone()));
            queues.push(QueueView {
                link: link_counters,
                planes,
                fetch: Arc::clone(&stage.fetch_counts),
                offers: stage.offers.counts(),
                pool,
                direct,
            });
            rx_stages.push(stage);
            ends.push(queue_ends);
        }
        let scratch_bytes = Decoder::new(config.slot_bytes).scratch_bytes();
        let stop = StopOnDrop(Arc::new(AtomicBool::new(false)));
        let lcore_control = LcoreControl { stop: Arc::clone(&stop.0), clock, idle_sleep: config.idle_sleep };
        let (compress_dev, devices, offloads) = builder.devices()?;
        let encoders = builder.encoders(staging)?;
        let encode_counters = encoders.iter().map(|stage| Arc::clone(&stage.counters)).collect();
        let lcores = builder.launch(rx_stages, devices, encoders, &lcore_control)?;
        let pipeline = Self {
            port,
            queues,
            lcores,
            slots: rings.slots.clone(),
            slot_count: config.slots,
            slot_bytes: config.slot_bytes,
            slot_pages,
            slot_fallback,
            decode_backlog: rings.decode.clone(),
            scratch_bytes,
            clock,
            compress_dev,
            offloads,
            encoders: encode_counters,
            direct,
            stop,
        };
        let save_limits = SaveLimits {
            chunks: usize::from(config.save.chunks),
            chunk_bytes: config.save.chunk_bytes,
            plane_bytes: limits.plane_bytes,
            planes_per_chunk: limits.planes_per_chunk,
        };
        let saves = Saves::new(save_limits, rings.save.chunks.clone(), rings.save.returned.clone());
        Ok((pipeline, Fetches::new(ends, limits), saves))
    }

    /// Stops every lcore and waits for it; drops what the stages own. Returns whether all ended in order.
    pub(crate) fn stop(&self, eal: &Eal) -> bool {
        self.stop.0.store(true, Ordering::Relaxed);
        (0..self.lcores.len()).map(|worker| eal.wait(worker).is_ok()).fold(true, |all, ended| all & ended)
    }
}

/// What becomes of the wish for GPUDirect, now that the port is open.
fn direct_state(
    config: &Config,
    prepared: &Result<Option<Prepared>, NoGpuDirect>,
    refused: Option<&str>,
) -> Result<DirectState, NoGpuDirect> {
    Ok(match (prepared, refused) {
        (Ok(None), _) => DirectState::Off,
        (Ok(Some(_)), None) => DirectState::On,
        (Ok(Some(_)), Some(why)) if config.gpu.direct == GpuDirect::On => {
            return Err(NoGpuDirect::Refused(why.to_owned()));
        }
        (Ok(Some(_)), Some(why)) => DirectState::Refused(why.to_owned()),
        (Err(reason), _) => DirectState::Refused(reason.to_string()),
    })
}

/// The stores, and the neighbours through which they are reached.
pub(crate) fn stores_of(config: &Config) -> Result<(Vec<StoreAddress>, Vec<NextHop>), ConfigError> {
    let next_hops = config.next_hops()?;
    let stores = config.stores.iter().zip(&next_hops).map(|(store, next_hop)| StoreAddress {
        ip: store.ip(),
        port: store.port(),
        next_hop: *next_hop,
    });
    let mut hops: Vec<NextHop> = Vec::new();
    for ip in &next_hops {
        if hops.iter().all(|hop| hop.ip != *ip) {
            hops.push(NextHop { ip: *ip, mac: config.store_mac });
        }
    }
    Ok((stores.collect(), hops))
}

fn fill_slots(config: &Config, gpus: &Gpus, ring: &Ring<Box<Slot>>) -> Result<Filled, BuildError> {
    let staging = match config.save.chunks {
        0 => 0,
        _ => STAGING_SLOTS * config.placement.count(StageKind::Decode),
    };
    let slot_bytes = config.slot_bytes.next_multiple_of(hugepages::SLOT_ALIGN_BYTES);
    let arena = Arena::new(ArenaConfig {
        name: "slots",
        bytes: (config.slots + staging) * slot_bytes,
        page: config.pages,
        numa_node: None,
    })?;
    let mut slots = Slots::new(gpus.pin(arena)?, slot_bytes)?;
    let mut made = slots.take().into_iter();
    for slot in made.by_ref().take(config.slots) {
        assert!(ring.enqueue(Box::new(slot)).is_ok(), "the ring was made for every slot");
    }
    Ok(Filled {
        slot_pages: slots.page_size(),
        slot_fallback: slots.fallback_reason().map(str::to_owned),
        staging: made.take(staging).collect(),
    })
}

/// What [`fill_slots`] made, beside the slots that it put into their ring.
struct Filled {
    slot_pages: PageSize,
    slot_fallback: Option<String>,
    /// Slots for planes that are saved: those of fetches are not touched.
    staging: Vec<Slot>,
}

/// Makes stages.
pub(crate) struct StageBuilder<'a> {
    pub(crate) eal: &'a Eal,
    pub(crate) config: &'a Config,
    pub(crate) budget: Budget,
    pub(crate) limits: FetchLimits,
    pub(crate) stores: Vec<StoreAddress>,
    pub(crate) rings: &'a Rings,
    pub(crate) clock: Clock,
    pub(crate) gpus: &'a Gpus,
}

impl StageBuilder<'_> {
    pub(crate) fn rx(
        &self,
        queue: u16,
        link: iface::Link,
        ports: iface::steer::PortMap,
        memory: Option<&Arc<ReceiveMemory>>,
    ) -> Result<(RxStage, QueueEnds), BuildError> {
        let entries = entries(Fetches::ring_entries(&self.limits));
        let (to_queue, messages) = Ring::spsc(self.eal, &format!("messages{queue}"), entries)?;
        let (answers, from_queue) = Ring::spsc(self.eal, &format!("answers{queue}"), entries)?;
        let index = usize::from(queue);
        let direct = self.direct(queue, &link, &ports, memory);
        let new_job = || {
            let mut job = PlaneJob::new(index, self.budget.plane_segments as usize);
            if let Some(memory) = memory.filter(|_| direct.is_some()) {
                job.receive_into(memory);
            }
            Some(job)
        };
        let ends = QueueEnds { messages: to_queue, answers: from_queue };
        let stage = RxStage {
            queue,
            ports,
            stores: self.stores.clone(),
            macs: vec![None; self.stores.len()],
            paths: Paths::new(
                self.store_count(),
                self.budget.segment_bytes,
                self.budget.max_segment_bytes,
                seed(),
            ),
            link,
            engine: FetchEngine::with_placement(
                self.budget.engine(self.config, queue, seed()),
                self.config.store_placement()?,
                EncodedChunks,
            )?,
            rings: RxRings {
                decode: self.rings.decode.clone(),
                decoded: self.rings.decoded.clone(),
                returned: self.rings.returned[index].clone(),
                messages,
                answers,
                strays: self.rings.strays[index].clone(),
                strays_of: self.rings.strays.clone(),
            },
            planes: Planes((0..self.budget.active_planes).map(|_| new_job()).collect()),
            parts: Parts((0..self.limits.fetches + self.limits.lookups).map(|_| None).collect()),
            latencies: Latencies::default(),
            counters: Arc::default(),
            fetch_counts: Arc::default(),
            offers: self.offers(index)?,
            direct,
        };
        Ok((stage, ends))
    }

    /// A queue's receiving into `memory`, if its link does that.
    fn direct(
        &self,
        queue: u16,
        link: &iface::Link,
        ports: &iface::steer::PortMap,
        memory: Option<&Arc<ReceiveMemory>>,
    ) -> Option<DirectQueue> {
        Some(DirectQueue {
            device: memory?.device(),
            port: ports.direct_port(queue)?,
            stores: vec![true; self.stores.len()],
            counters: Arc::default(),
            pool: link.direct_pool()?,
        })
    }

    fn store_count(&self) -> u16 {
        u16::try_from(self.stores.len()).unwrap_or(u16::MAX)
    }

    /// What offers encoded chunks on one queue.
    fn offers(&self, queue: usize) -> Result<Offers, BuildError> {
        let serve = ServeConfig {
            epoch: epoch(),
            max_pending_pulls: 256,
            max_pending_replies: 64,
            max_requesters: u16::try_from(self.stores.len()).unwrap_or(u16::MAX).max(16),
            max_segment_bytes: self.budget.max_segment_bytes,
            ..ServeConfig::default()
        };
        let engine = OfferEngine::new(OfferConfig {
            max_offers: self.config.save_offers()?,
            stores: self.store_count(),
            segment_bytes: self.budget.segment_bytes,
            rto_min: self.config.rto_min,
            rto_max: MAX_OFFER_RTO,
            serve,
            seed: seed(),
        });
        let SaveRings { encoded, returned, .. } = &self.rings.save;
        let placement = self.config.store_placement()?;
        let (encoded, returned) = (encoded[queue].clone(), returned.clone());
        Ok(Offers::new(engine, placement, self.config.save.chunks, encoded, returned))
    }

    /// One encoder per decode lcore, if anything is saved.
    fn encoders(&self, staging: Vec<Slot>) -> Result<Vec<EncodeStage<Sources<usize>>>, BuildError> {
        let mut staging = staging.into_iter();
        let mut encoders = Vec::new();
        loop {
            let free: ArrayVec<Box<Slot>, STAGING_SLOTS> =
                staging.by_ref().take(STAGING_SLOTS).map(Box::new).collect();
            if !free.is_full() {
                return Ok(encoders);
            }
            encoders.push(EncodeStage {
                source: self.gpus.source()?,
                encoder: compress::Encoder::new(compress::Codec::Raw, self.config.save.zstd_level),
                rings: EncodeRings {
                    decode: self.rings.decode.clone(),
                    chunks: self.rings.save.chunks.clone(),
                    encoded: self.rings.save.encoded.clone(),
                    returned: self.rings.save.returned.clone(),
                },
                clock: self.clock,
                counters: Arc::default(),
                free,
                read: [None, None],
                done: ArrayVec::new(),
                job: None,
                next_read: 0,
            });
        }
    }

    /// Opens the compression device, with a queue pair for each decode lcore.
    #[expect(clippy::type_complexity, reason = "three things that are made at once and go different ways")]
    fn devices(
        &self,
    ) -> Result<(Option<CompressDev>, Vec<DecodeDevice>, Vec<Arc<OffloadCounters>>), BuildError> {
        let Some(device) = &self.config.compress_dev else { return Ok((None, Vec::new(), Vec::new())) };
        let (name, fail_every) = fault_of(device)?;
        let lcores = u16::try_from(self.config.placement.count(StageKind::Decode)).unwrap_or(u16::MAX);
        let config = device_config(lcores, self.config.slot_bytes);
        let (dev, queues): (_, Vec<CompressQueue<Box<PlaneJob>>>) =
            CompressDev::open(self.eal, name, &config)?;
        let burst = if dev.capabilities().hardware { 8 } else { 1 };
        let device = |queue| {
            let offload = DeviceOffload::new(&dev, queue, fail_every);
            DecodeDevice { offload, burst, counters: Arc::default() }
        };
        let devices: Vec<DecodeDevice> = queues.into_iter().map(device).collect();
        let counters = devices.iter().map(|device| Arc::clone(&device.counters)).collect();
        Ok((Some(dev), devices, counters))
    }

    fn decode(&self, device: Option<DecodeDevice>) -> DecodeStage {
        DecodeStage {
            decoder: PlaneDecoder::new(self.config.slot_bytes),
            device,
            rings: DecodeRings {
                planes: self.rings.decode.clone(),
                decoded: self.rings.decoded.clone(),
                returned: self.rings.returned.clone(),
                slots: self.rings.slots.clone(),
            },
            clock: self.clock,
        }
    }

    fn dma(&self) -> Result<DmaStage<Sinks<Box<PlaneJob>>>, BuildError> {
        Ok(DmaStage {
            sink: Sinks::new(self.gpus.sink()?),
            rings: DmaRings {
                decoded: self.rings.decoded.clone(),
                returned: self.rings.returned.clone(),
                slots: self.rings.slots.clone(),
            },
            clock: self.clock,
            offered: ArrayVec::new(),
            finished: ArrayVec::new(),
        })
    }

    /// Gives every lcore its stages and starts it.
    fn launch(
        &self,
        rx_stages: Vec<RxStage>,
        devices: Vec<DecodeDevice>,
        encoders: Vec<EncodeStage<Sources<usize>>>,
        control: &LcoreControl,
    ) -> Result<Vec<LcoreView>, BuildError> {
        let mut rx_stages = rx_stages.into_iter();
        let mut devices = devices.into_iter();
        let mut encoders = encoders.into_iter();
        let mut lcores = Vec::new();
        for (worker, (cpu, kinds)) in self.config.placement.lcores().enumerate() {
            let mut stages: Vec<Box<dyn Stage>> = Vec::new();
            for kind in kinds {
                stages.push(match kind {
                    StageKind::Rx => Box::new(rx_stages.next().expect("one queue was made per rx stage")),
                    StageKind::Decode => Box::new(self.decode(devices.next())),
                    StageKind::Dma => Box::new(self.dma()?),
                });
            }
            // Behind everything else that the lcore does.
            for _ in kinds.iter().filter(|kind| **kind == StageKind::Decode) {
                stages.extend(encoders.next().map(|stage| Box::new(stage) as Box<dyn Stage>));
            }
            let counters = Arc::<LcoreCounters>::default();
            let (control, of_lcore) = (control.clone(), Arc::clone(&counters));
            self.eal.launch(worker, move || lcore::run(&mut stages, &control, &of_lcore))?;
            lcores.push(LcoreView { cpu, stages: kinds.to_vec(), counters });
        }
        Ok(lcores)
    }
}

/// Entries of a ring that holds `items`; a number too large for a ring is refused where the ring is made.
fn entries(items: usize) -> u32 {
    u32::try_from(items).unwrap_or(u32::MAX)
}

/// Longest time after which an offer without an answer is repeated.
const MAX_OFFER_RTO: Duration = Duration::from_millis(200);

/// Differs between any two runs, and is not zero.
fn epoch() -> u64 {
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1)
}

/// A number that differs from run to run.
fn seed() -> u32 {
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    time.subsec_nanos() ^ std::process::id().rotate_left(16)
}
