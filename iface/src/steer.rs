//! Which UDP port a queue uses towards which store.
//!
//! A NIC spreads packets over its receive queues by a Toeplitz hash of addresses and ports (receive-side scaling).
//! So that answers reach the lcore that asked, each queue has a local port of its own for every store, whose hash together with that
//! store's address leads back to the queue. Devices without such a hash, and answers that stray all the same, are handled by looking the port's
//! queue up here and passing the packet on.

use std::net::IpAddr;

use dpdk::Rss;

/// UDP ports reserved per queue, among which one that hashes to the queue is looked for, for each store. With `q` queues the chance
/// that none of `64 * q` does is below `e^-64`.
const CANDIDATES_PER_QUEUE: u16 = 64;

/// The local UDP ports of a port's queues.
#[derive(Debug, Clone)]
pub struct PortMap {
    first_port: u16,
    /// How many ports from `first_port` on are ours, used or not, but for direct ones.
    span: u16,
    queues: usize,
    /// One row of `queues` ports for each store, or one for all. Ports differ within a row; rows may share some.
    ports: Box<[u16]>,
    /// Ports behind those, one for each queue whoever it talks to, or none.
    direct_ports: u16,
}

impl PortMap {
    /// One port per queue, counted up from `first_port`, whoever it talks to.
    #[must_use]
    pub fn consecutive(first_port: u16, queues: u16) -> Self {
        let ports = (0..queues).map(|queue| first_port.wrapping_add(queue)).collect();
        Self { first_port, span: queues, queues: usize::from(queues), ports, direct_ports: 0 }
    }

    /// The same with a second port for each queue, behind all others: what comes to it is to be received into device memory.
    #[must_use]
    pub fn with_direct_ports(self) -> Self {
        Self { direct_ports: u16::try_from(self.queues).unwrap_or(u16::MAX), ..self }
    }

    /// The second port of `queue`, if it has one.
    #[must_use]
    pub fn direct_port(&self, queue: u16) -> Option<u16> {
        (queue < self.direct_ports).then(|| self.first_port.wrapping_add(self.span).wrapping_add(queue))
    }

    /// Ports such that what each of `stores` sends from its address and port to `local` reaches each queue's own lcore.
    #[must_use]
    pub fn steered(first_port: u16, queues: u16, rss: &Rss, stores: &[(IpAddr, u16)], local: IpAddr) -> Self {
        let span = queues.saturating_mul(CANDIDATES_PER_QUEUE).min(u16::MAX - first_port);
        let row = |store: &(IpAddr, u16)| {
            let mut ports = vec![None; usize::from(queues)];
            for port in first_port..first_port + span {
                let queue = rss.queue_for(store.0, local, store.1, port);
                if let Some(slot @ None) = queue.and_then(|queue| ports.get_mut(usize::from(queue))) {
                    *slot = Some(port);
                }
            }
            ports.into_iter().collect::<Option<Vec<u16>>>()
        };
        match stores.iter().map(row).collect::<Option<Vec<_>>>() {
            Some(rows) if !rows.is_empty() => Self {
                first_port,
                span,
                queues: usize::from(queues),
                ports: rows.concat().into(),
                direct_ports: 0,
            },
            _ => Self::consecutive(first_port, queues),
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
        self.span.saturating_add(self.direct_ports)
    }

    /// The ports of all queues towards a store; the same for every store where the device does not tell how it steers.
    #[inline]
    fn row(&self, store: usize) -> &[u16] {
        let begin = store * self.queues;
        self.ports.get(begin..begin + self.queues).unwrap_or(&self.ports[..self.queues])
    }

    /// The queue that uses `port` towards `store`, if one does.
    #[inline]
    #[must_use]
    pub fn queue(&self, store: usize, port: u16) -> Option<u16> {
        match self.row(store).iter().position(|used| *used == port) {
            Some(queue) => u16::try_from(queue).ok(),
            None => Some(port.wrapping_sub(self.first_port.wrapping_add(self.span)))
                .filter(|queue| *queue < self.direct_ports),
        }
    }

    /// The port that `queue` uses towards `store`.
    ///
    /// # Panics
    /// When there is no such queue.
    #[inline]
    #[must_use]
    pub fn port(&self, store: usize, queue: u16) -> u16 {
        self.row(store)[usize::from(queue)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consecutive_ports_map_both_ways() {
        let map = PortMap::consecutive(4791, 3);
        for (store, queue) in (0..4).flat_map(|store| (0..3).map(move |queue| (store, queue))) {
            assert_eq!(map.queue(store, map.port(store, queue)), Some(queue));
            assert_eq!(map.port(store, queue), 4791 + queue);
        }
        assert_eq!((map.queue(0, 4790), map.queue(0, 4794), map.span()), (None, None, 3));
    }

    #[test]
    fn direct_ports_lie_behind_all_others() {
        let map = PortMap::consecutive(4800, 2).with_direct_ports();
        assert_eq!(
            (map.direct_port(0), map.direct_port(1), map.direct_port(2)),
            (Some(4802), Some(4803), None)
        );
        assert_eq!(
            (map.queue(0, 4800), map.queue(0, 4803), map.queue(0, 4804), map.span()),
            (Some(0), Some(1), None, 4)
        );
        assert_eq!(PortMap::consecutive(4800, 2).direct_port(0), None);
    }

    #[test]
    fn steered_ports_hash_to_their_queue_whichever_store_answers() {
        let rss = Rss {
            key: (0..40_u8).map(|i| i.wrapping_mul(7) + 3).collect(),
            reta: (0..128).map(|i| i % 5).collect(),
        };
        let stores: Vec<(IpAddr, u16)> = (1..40_u8)
            .map(|host| (IpAddr::from([10, 0, host / 8, host]), 4791 + u16::from(host % 3)))
            .collect();
        let local = "10.0.0.200".parse().unwrap();
        let map = PortMap::steered(9000, 5, &rss, &stores, local);
        for (store, (ip, port)) in stores.iter().enumerate() {
            for queue in 0..5 {
                let ours = map.port(store, queue);
                assert_eq!(rss.queue_for(*ip, local, *port, ours), Some(queue));
                assert_eq!(map.queue(store, ours), Some(queue));
                assert!(ours - map.first_port() < map.span());
            }
        }
        assert_eq!(map.queue(0, map.first_port() + map.span()), None);
    }

    #[test]
    fn a_device_whose_hash_reaches_only_some_queues_is_not_steered() {
        let rss = Rss { key: vec![1; 40], reta: vec![0, 1] };
        let stores = [("10.0.0.1".parse().unwrap(), 4791)];
        let map = PortMap::steered(9000, 3, &rss, &stores, "10.0.0.2".parse().unwrap());
        assert_eq!((0..3).map(|queue| map.port(0, queue)).collect::<Vec<_>>(), [9000, 9001, 9002]);
    }
}
