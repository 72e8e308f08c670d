//! The queues of a port, each for one lcore.

use std::sync::Arc;

use crate::burst::Burst;
use crate::port::PortInner;

/// A receive queue.
#[derive(Debug)]
pub struct RxQueue {
    id: u16,
    queue: u16,
    /// A peer in another process may take the shared memory away at any time.
    memif: bool,
    /// Keeps the device running.
    _port: Arc<PortInner>,
}

/// A transmit queue.
#[derive(Debug)]
pub struct TxQueue {
    id: u16,
    queue: u16,
    /// A peer in another process may take the shared memory away at any time.
    memif: bool,
    /// Keeps the device running.
    _port: Arc<PortInner>,
}

impl RxQueue {
    pub(crate) fn new(port: &Arc<PortInner>, queue: u16) -> Self {
        Self { id: port.id(), queue, memif: port.is_memif(), _port: Arc::clone(port) }
    }

    /// Index of this queue.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.queue
    }

    /// Appends received packets to `burst`, up to its free room, and returns how many. Some drivers receive nothing into a room of less
    /// than 4, so come with an empty burst.
    #[inline]
    pub fn receive(&mut self, burst: &mut Burst) -> usize {
        let (spare, room) = burst.spare();
        let room = u16::try_from(room).unwrap_or(0);
        let receive = if self.memif { dpdk_sys::shim_memif_rx_burst } else { dpdk_sys::shim_rx_burst };
        // SAFETY: the port is started and lives; this handle is the queue's only one, borrowed exclusively; `spare` has that room.
        let received = usize::from(unsafe { receive(self.id, self.queue, spare, room) });
        // SAFETY: the device wrote that many packets, which are nobody else's.
        unsafe { burst.grow(received) };
        received
    }
}

impl TxQueue {
    pub(crate) fn new(port: &Arc<PortInner>, queue: u16) -> Self {
        Self { id: port.id(), queue, memif: port.is_memif(), _port: Arc::clone(port) }
    }

    /// Index of this queue.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.queue
    }

    /// Sends from the front of `burst` what the device takes, and returns how many; the rest stays in the burst.
    #[inline]
    pub fn send(&mut self, burst: &mut Burst) -> usize {
        let (mbufs, count) = burst.as_raw();
        if count == 0 {
            return 0;
        }
        let send = if self.memif { dpdk_sys::shim_memif_tx_burst } else { dpdk_sys::shim_tx_burst };
        // SAFETY: the port is started and lives; this handle is the queue's only one, borrowed exclusively; there are `count` mbufs.
        let sent = usize::from(unsafe { send(self.id, self.queue, mbufs, count) });
        // SAFETY: the device took the first `sent`.
        unsafe { burst.forget_front(sent) };
        sent
    }

    /// Frees the mbufs of packets that are sent by now, without waiting for the queue to need the room. Returns false if the driver cannot.
    pub fn free_sent(&mut self) -> bool {
        // SAFETY: as in `send`.
        unsafe { dpdk_sys::rte_eth_tx_done_cleanup(self.id, self.queue, 0) >= 0 }
    }
}
