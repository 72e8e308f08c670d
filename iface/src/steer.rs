//! Which UDP port belongs to which queue.
//!
//! A NIC spreads packets over its receive queues by a Toeplitz hash of addresses and ports (receive-side scaling).
//! So that answers reach the lcore that asked, each queue uses a local port whose hash leads back to it. Devices
//! without such a hash, and answers that stray all the same, are handled by looking up the port's queue here and
//! passing the packet on.

use std::net::IpAddr;

use dpdk::Rss;

/// UDP ports reserved per queue, among which one that hashes to the queue is looked for. With `q` queues the chance
/// that none of `64 * q` does is below `e^-64`.
const CANDIDATES_PER_QUEUE: u16 = 64;

/// The local UDP ports of a port's queues.
#[derive(Debug, Clone)]
pub struct PortMap {
    first_port: u16,
    /// Queue of each port from `first_port` on; `None` for a port that no queue uses.
    queue_of: Vec<Option<u16>>,
    /// Port of each queue.
    port_of: Vec<u16>,
    /// A second port of each queue, or none.
    direct_port_of: Vec<u16>,
}

impl PortMap {
    /// One port per queue, counted up from `first_port`.
    #[must_use]
    pub fn consecutive(first_port: u16, queues: u16) -> Self {
        let port_of: Vec<u16> = (0..queues).map(|queue| first_port.wrapping_add(queue)).collect();
        let queue_of = (0..queues).map(Some).collect();
        Self { first_port, queue_of, port_of, direct_port_of: Vec::new() }
    }

    /// The same with a second port for each queue, behind all others: what comes to it is to be received into device memory.
    #[must_use]
    pub fn with_direct_ports(mut self) -> Self {
        let queues = u16::try_from(self.port_of.len()).unwrap_or(u16::MAX);
        for queue in 0..queues {
            self.direct_port_of.push(self.first_port.wrapping_add(self.span()));
            self.queue_of.push(Some(queue));
        }
        self
    }

    /// The second port of `queue`, if it has one.
    #[must_use]
    pub fn direct_port(&self, queue: u16) -> Option<u16> {
        self.direct_port_of.get(usize::from(queue)).copied()
    }

    /// Ports such that what `peer` sends from `peer_port` to `local` reaches each queue's own lcore.
    #[must_use]
    pub fn steered(
        first_port: u16,
        queues: u16,
        rss: &Rss,
        peer: IpAddr,
        peer_port: u16,
        local: IpAddr,
    ) -> Self {
        let span = queues.saturating_mul(CANDIDATES_PER_QUEUE).min(u16::MAX - first_port);
        let mut port_of = vec![None; usize::from(queues)];
        let mut queue_of = vec![None; usize::from(span)];
        for candidate in 0..span {
            let port = first_port + candidate;
            let Some(queue) = rss.queue_for(peer, local, peer_port, port) else { continue };
            if let Some(slot @ None) = port_of.get_mut(usize::from(queue)) {
                *slot = Some(port);
                queue_of[usize::from(candidate)] = Some(queue);
            }
        }
        match port_of.into_iter().collect::<Option<Vec<u16>>>() {
            Some(port_of) => Self { first_port, queue_of, port_of, direct_port_of: Vec::new() },
            None => Self::consecutive(first_port, queues),
        }
    }

    /// The first port of the range.
    #[must_use]
    pub fn first_port(&self) -> u16 {
        self.first_port
    }

    /// Ports in the range, used or not.
    #[must_use]
    pub fn span(&self) -> u16 {
        u16::try_from(self.queue_of.len()).unwrap_or(u16::MAX)
    }

    /// The queue that uses `port`, if one does.
    #[inline]
    #[must_use]
    pub fn queue(&self, port: u16) -> Option<u16> {
        *self.queue_of.get(usize::from(port.wrapping_sub(self.first_port)))?
    }

    /// The port that `queue` uses.
    ///
    /// # Panics
    /// When there is no such queue.
    #[must_use]
    pub fn port(&self, queue: u16) -> u16 {
        self.port_of[usize::from(queue)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consecutive_ports_map_both_ways() {
        let map = PortMap::consecutive(4791, 3);
        for queue in 0..3 {
            assert_eq!(map.queue(map.port(queue)), Some(queue));
        }
        assert_eq!((map.queue(4790), map.queue(4794), map.span()), (None, None, 3));
    }

    #[test]
    fn direct_ports_lie_behind_all_others() {
        let map = PortMap::consecutive(4800, 2).with_direct_ports();
        assert_eq!(
            (map.direct_port(0), map.direct_port(1), map.direct_port(2)),
            (Some(4802), Some(4803), None)
        );
        assert_eq!(
            (map.queue(4800), map.queue(4803), map.queue(4804), map.span()),
            (Some(0), Some(1), None, 4)
        );
        assert_eq!(PortMap::consecutive(4800, 2).direct_port(0), None);
    }

    #[test]
    fn steered_ports_hash_to_their_queue() {
        let rss = Rss {
            key: (0..40_u8).map(|i| i.wrapping_mul(7) + 3).collect(),
            reta: (0..128).map(|i| i % 5).collect(),
        };
        let (peer, local) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let map = PortMap::steered(9000, 5, &rss, peer, 4791, local);
        for queue in 0..5 {
            assert_eq!(rss.queue_for(peer, local, 4791, map.port(queue)), Some(queue));
            assert_eq!(map.queue(map.port(queue)), Some(queue));
        }
    }
}
