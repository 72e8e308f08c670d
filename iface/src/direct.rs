//! Receiving into device memory: a second receive queue and UDP port for each queue.
//!
//! What comes to that port are DATA messages alone. Their headers, up to and with that of the message, land in host memory, the segments in the
//! memory of a device (a GPU), where no code here can read them. So the NIC must have found the UDP checksum right, or the segment is not taken.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use dpdk::{
    Checksum, DEVICE_PAGE_BYTES, DeviceBuffer, DeviceMemory, DevicePool, Eal, ExternalError, HEADROOM_BYTES,
    Mbuf, Pool, PoolError, Port, PortError, SplitPacket, SplitPools, SplitUnfit,
};
use hugepages::DeviceWritable;
use protocol::frame::{self, HardwareChecks, Incoming, Peer, max_segment_bytes};
use protocol::reason::DropReason;
use protocol::time::Instant;
use protocol::wire::ethernet;
use protocol::wire::message::DATA_HEADER_BYTES;

use crate::config::IfaceConfig;
use crate::link::Link;
use crate::steer::PortMap;

/// Why a port cannot receive into device memory.
#[derive(Debug, thiserror::Error)]
pub enum DirectError {
    /// there is no such port
    #[error(transparent)]
    Port(#[from] PortError),
    /// its driver cannot
    #[error(transparent)]
    Unfit(#[from] SplitUnfit),
    /// DPDK or the driver does not take the memory
    #[error(transparent)]
    Memory(#[from] ExternalError),
}

/// Device memory that the port of a configuration may write to.
#[derive(Debug)]
pub struct Direct {
    memory: DeviceMemory,
}

/// Numbers the pools of the process.
static NEXT_POOL: AtomicU32 = AtomicU32::new(0);

/// Bytes of one buffer: the largest segment, and the headroom that drivers leave.
fn room_bytes(config: &IfaceConfig) -> u16 {
    (max_segment_bytes(config.mtu, &config.address.ip) + HEADROOM_BYTES).next_multiple_of(64)
}

/// Bytes of a packet before its segment.
fn head_bytes(config: &IfaceConfig) -> usize {
    let link_bytes = ethernet::header_bytes(config.vlan) - ethernet::HEADER_BYTES;
    frame::header_bytes(&config.address.ip) + link_bytes + DATA_HEADER_BYTES
}

impl Direct {
    /// Device memory that the port's queues need, bytes.
    #[must_use]
    pub fn memory_bytes(config: &IfaceConfig) -> usize {
        queue_bytes(config) * usize::from(config.queues)
    }

    /// Finds out whether the port can receive into `memory`, and tells DPDK and the driver of it. Of memory that the CPU can write to it plays the
    /// NIC's part.
    ///
    /// # Errors
    /// What stands in the way.
    pub fn prepare(
        eal: &Eal,
        config: &IfaceConfig,
        memory: Arc<dyn DeviceWritable>,
    ) -> Result<Self, DirectError> {
        let probe = Port::probe(eal, &config.device)?;
        if !memory.is_cpu_memory() {
            probe.can_split(config.queues.saturating_mul(2))?;
        }
        let memory = DeviceMemory::register(eal, memory)?;
        memory.map(&probe)?;
        Ok(Self { memory })
    }

    /// The pools of each queue's second half; `heads` are the queues' own.
    pub(crate) fn pools(
        &self,
        eal: &Eal,
        config: &IfaceConfig,
        heads: &[Pool],
    ) -> Result<Vec<SplitPools>, PoolError> {
        let at_bytes = u16::try_from(head_bytes(config)).unwrap_or(u16::MAX);
        let pools = heads.iter().enumerate().map(|(queue, head)| {
            let name = format!("direct{}", NEXT_POOL.fetch_add(1, Relaxed));
            let first = queue * queue_bytes(config);
            let tail = DevicePool::new(eal, &name, &self.memory, first, config.mbufs, room_bytes(config))?;
            Ok(SplitPools { head: Some(head.clone()), tail, at_bytes })
        });
        pools.collect()
    }

    /// Has the device bring each queue's second port to its second queue; why not, if it does not.
    pub(crate) fn steer(&self, port: &Port, config: &IfaceConfig, ports: &PortMap) -> Result<(), String> {
        if self.memory.is_cpu_memory() {
            return Ok(());
        }
        if let Some(refused) = port.split_refused() {
            return Err(refused.to_string());
        }
        for queue in 0..config.queues {
            let Some(udp_port) = ports.direct_port(queue) else { continue };
            port.steer(config.address.ip.is_ipv6(), udp_port, config.queues + queue)
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

/// One queue's part of the memory.
fn queue_bytes(config: &IfaceConfig) -> usize {
    let mbufs = usize::try_from(config.mbufs).unwrap_or(usize::MAX);
    mbufs.saturating_mul(room_bytes(config).into()).next_multiple_of(DEVICE_PAGE_BYTES)
}

/// A datagram for us that came to the queue's second half.
#[derive(Debug)]
pub struct DirectDatagram {
    /// Who sent it.
    pub from: Peer,
    /// Which of our UDP ports it came to.
    pub to_port: u16,
    /// Whether a router marked it as having met congestion (ECN).
    pub marked: bool,
    /// The payload, or the header of a DATA message whose segment is in `segment`.
    pub mbuf: Mbuf,
    /// Where the segment lies; `None` if the whole payload is in `mbuf`.
    pub segment: Option<DeviceBuffer>,
    /// Whether the UDP checksum was there, and found right. If not, nobody knows what is in `segment`.
    pub is_verified: bool,
}

impl Link {
    /// Whether this queue receives into device memory too.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Buffers of device memory that are out.
    #[must_use]
    pub fn direct_pool(&self) -> Option<DevicePool> {
        self.direct.as_ref().map(|queue| queue.tail_pool().clone())
    }

    /// Receives one burst from the queue's second half, as [`Link::receive`] does from the first.
    pub fn receive_direct(
        &mut self,
        now_ns: u64,
        mut deliver: impl FnMut(DirectDatagram) -> Result<(), DropReason>,
    ) -> usize {
        let Some(queue) = &mut self.direct else { return 0 };
        let received = queue.receive();
        if received == 0 {
            return 0;
        }
        let now = Instant::from_nanos(now_ns);
        self.counters.rx_packets.add(received as u64);
        while let Some(packet) = self.direct.as_mut().and_then(dpdk::SplitRxQueue::take) {
            self.counters.rx_bytes.add(packet.total_bytes() as u64);
            let taken = match self.accept_direct(now, packet) {
                Ok(Some(datagram)) => {
                    self.counters.rx_datagrams.add(1);
                    deliver(datagram)
                }
                Ok(None) => Ok(()),
                Err(reason) => Err(reason),
            };
            if let Err(reason) = taken {
                self.counters.dropped.add(reason);
            }
        }
        received
    }

    fn accept_direct(
        &mut self,
        now: Instant,
        packet: SplitPacket,
    ) -> Result<Option<DirectDatagram>, DropReason> {
        let total_bytes = packet.total_bytes();
        let (Some(mut mbuf), segment) = (packet.head, packet.tail) else {
            // Headers that cannot be read, or no buffer was free.
            return Err(DropReason::Truncated);
        };
        if mbuf.segment_count() > 1 {
            return Err(DropReason::BadLength);
        }
        let sum = mbuf.l4_checksum();
        if sum == Checksum::Bad {
            return Err(DropReason::BadUdpChecksum);
        }
        // What lies in device memory cannot be summed here: whether the device has, is told apart below.
        let checks = HardwareChecks {
            ip_good: mbuf.ip_checksum() == Checksum::Good,
            udp_good: segment.is_some() || sum == Checksum::Good,
        };
        let parsed = frame::parse_chain(mbuf.data(), std::iter::empty(), total_bytes, &self.local, checks)?;
        let Incoming::Datagram { from, to_port, marked, payload } = parsed else {
            self.take_note(now, &parsed, mbuf);
            return Ok(None);
        };
        let has_checksum = mbuf.data()[payload.start - 2..payload.start] != [0, 0];
        let is_verified = has_checksum && (segment.is_none() || sum == Checksum::Good);
        if segment.is_none() {
            mbuf.trim_back(total_bytes - payload.end);
        } else if mbuf.data().len() != payload.start + DATA_HEADER_BYTES || payload.end != total_bytes {
            // The device cuts where it was told to, and nothing follows the datagram.
            return Err(DropReason::BadLength);
        }
        mbuf.trim_front(payload.start);
        if marked {
            self.counters.rx_marked.add(1);
        }
        Ok(Some(DirectDatagram { from, to_port, marked, mbuf, segment, is_verified }))
    }
}
