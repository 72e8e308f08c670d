//! A scenario: who is there, how they are connected, what happens when; and the world made of it.

use std::rc::Rc;

use crate::baseline::fixed::{FixedConfig, FixedReceiver, FixedSender};
use crate::baseline::tcp::{TcpConfig, TcpReceiver, TcpSender};
use crate::content::Catalogue;
use crate::host::{Deed, Host, Order};
use crate::link::{Faults, LinkConfig};
use crate::net::{Net, SwitchConfig, Way};
use crate::plane::{PlaneConfig, PlaneHost};
use crate::random::Random;
use crate::store::{StoreConfig, StoreHost};
use crate::world::{Action, Bounds, Lcore, World};

/// Which design's engines stand at both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Design {
    /// `protocol::FetchEngine` and `protocol::ServeEngine`.
    Ours,
    /// A fixed window per fetch and timeouts.
    FixedWindow,
    /// A congestion window that losses halve.
    TcpLike,
}

impl Design {
    /// All of them.
    pub const ALL: [Design; 3] = [Design::Ours, Design::FixedWindow, Design::TcpLike];

    /// As on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            Design::Ours => "ours",
            Design::FixedWindow => "fixed-window",
            Design::TcpLike => "tcp-like",
        }
    }
}

/// A data plane and its link.
#[derive(Clone, Copy, Debug)]
pub struct PlaneSpec {
    /// From it, and to it.
    pub up: LinkConfig,
    /// See above.
    pub down: LinkConfig,
    /// Engine and decoders.
    pub config: PlaneConfig,
    /// Receive side.
    pub lcore: Lcore,
}

/// A store and its link.
#[derive(Clone, Debug)]
pub struct StoreSpec {
    /// From it, and to it.
    pub up: LinkConfig,
    /// See above.
    pub down: LinkConfig,
    /// Engine.
    pub config: StoreConfig,
    /// Receive side.
    pub lcore: Lcore,
    /// Chunks that it does not hold.
    pub lacks: Vec<u32>,
}

/// What the chunks of a run look like.
#[derive(Clone, Copy, Debug)]
pub struct ChunkSpec {
    /// How many there are.
    pub count: u32,
    /// Layers of each.
    pub layers: u16,
    /// Bytes of a plane: least, most.
    pub plane_bytes: (u32, u32),
}

/// Everything that a run is made of. Hosts are numbered: data planes first, then stores.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Seed of the run.
    pub seed: u64,
    /// Which engines.
    pub design: Design,
    /// Data planes.
    pub planes: Vec<PlaneSpec>,
    /// Stores.
    pub stores: Vec<StoreSpec>,
    /// The switch between them.
    pub switch: SwitchConfig,
    /// The chunks.
    pub chunks: ChunkSpec,
    /// Window of the baselines, segments per fetch.
    pub baseline_window: u32,
    /// What is wrong from the beginning.
    pub faults: Vec<(u32, Way, Faults)>,
    /// What happens, in any order.
    pub actions: Vec<(u64, Action)>,
    /// What may not happen.
    pub bounds: Bounds,
}

impl Scenario {
    /// The host that is store `number`.
    pub fn store(&self, number: u32) -> u32 {
        u32::try_from(self.planes.len()).expect("few hosts") + number
    }

    /// Adds a fetch.
    pub fn fetch(&mut self, at: u64, plane: u32, order: Order) {
        self.actions.push((at, Action::Host(plane, Deed::Fetch(order))));
    }

    /// Adds faults to both ways of a host's link.
    pub fn faults_both(&mut self, host: u32, faults: Faults) {
        self.faults.extend([(host, Way::Up, faults), (host, Way::Down, faults)]);
    }

    /// The world in which it happens.
    pub fn build(&self) -> World {
        let mut random = Random::new(self.seed);
        let ChunkSpec { count, layers, plane_bytes } = self.chunks;
        let catalogue = Catalogue::new(count, layers, plane_bytes, &mut random);
        let links: Vec<(LinkConfig, LinkConfig)> = self
            .planes
            .iter()
            .map(|plane| (plane.up, plane.down))
            .chain(self.stores.iter().map(|store| (store.up, store.down)))
            .collect();
        let mut net = Net::new(random.word(), &links, self.switch);
        for (host, way, faults) in &self.faults {
            net.set_faults(*host, *way, *faults);
        }
        let mut hosts = Vec::new();
        for (id, plane) in (0..).zip(&self.planes) {
            hosts.push((self.receiver(id, plane, &catalogue), plane.lcore));
        }
        for (number, store) in (0..).zip(&self.stores) {
            hosts.push((self.sender(self.store(number), store, &catalogue), store.lcore));
        }
        let mut actions = self.actions.clone();
        actions.sort_by_key(|action| action.0);
        World::new(net, hosts, actions, self.bounds)
    }

    fn tcp(&self, segment_bytes: u32) -> TcpConfig {
        TcpConfig { segment_bytes, rto_min_nanos: BASELINE_RTO_NANOS, window_segments: self.baseline_window }
    }

    fn receiver(&self, id: u32, plane: &PlaneSpec, catalogue: &Rc<Catalogue>) -> Box<dyn Host> {
        let segment_bytes = u32::from(plane.config.fetch.segment_bytes);
        let catalogue = Rc::clone(catalogue);
        match self.design {
            Design::Ours => {
                let config = PlaneConfig { first_store: self.store(0), ..plane.config };
                Box::new(PlaneHost::new(id, config, catalogue))
            }
            Design::FixedWindow => {
                let config = FixedConfig {
                    window_segments: self.baseline_window,
                    segment_bytes,
                    rto_min_nanos: BASELINE_RTO_NANOS,
                };
                Box::new(FixedReceiver::new(id, config, catalogue))
            }
            Design::TcpLike => Box::new(TcpReceiver::new(id, self.tcp(segment_bytes), catalogue)),
        }
    }

    fn sender(&self, id: u32, store: &StoreSpec, catalogue: &Rc<Catalogue>) -> Box<dyn Host> {
        let segment_bytes = u32::from(self.planes[0].config.fetch.segment_bytes);
        let ring_bytes = store.config.ring_bytes;
        match self.design {
            Design::Ours => {
                let mut held = vec![true; catalogue.chunks.len()];
                store.lacks.iter().for_each(|chunk| held[*chunk as usize] = false);
                Box::new(StoreHost::new(id, store.config, Rc::clone(catalogue), held))
            }
            Design::FixedWindow => Box::new(FixedSender::new(id, segment_bytes, ring_bytes)),
            Design::TcpLike => Box::new(TcpSender::new(id, self.tcp(segment_bytes), ring_bytes)),
        }
    }
}

/// Least timeout of the baselines: that of the first version of ours.
const BASELINE_RTO_NANOS: u64 = 2_000_000;
