//! The store's end of the wire: a port, polled by the test's own thread.

use std::time::{Duration, Instant};

use dpdk::{Burst, Eal, Pool, PoolConfig, Port, PortConfig, RxQueue, TxQueue};

use super::frames::Frame;

/// The store's end of the wire.
pub(crate) struct Wire {
    rx: RxQueue,
    tx: TxQueue,
    pub(crate) pool: Pool,
    _port: Port,
    sending: Burst,
}

impl Wire {
    pub(crate) fn open(eal: &Eal, device: &str) -> Self {
        let pool_config = PoolConfig { mbufs: 8191, ..PoolConfig::default() };
        let pool = Pool::new(eal, "wire", pool_config).unwrap();
        let (port, rx, tx) =
            Port::open(eal, device, &PortConfig::default(), std::slice::from_ref(&pool)).unwrap();
        let (rx, tx) = (rx.into_iter().next().unwrap(), tx.into_iter().next().unwrap());
        Self { rx, tx, pool, _port: port, sending: Burst::new() }
    }

    pub(crate) fn push(&mut self, frame: &Frame) {
        let mbuf = |bytes: &[u8]| {
            let mut mbuf = self.pool.alloc().expect("the wire's buffers come back");
            mbuf.append(bytes.len()).expect("a buffer holds any packet").copy_from_slice(bytes);
            mbuf
        };
        let (first, rest) = frame.bytes.split_at(frame.split.unwrap_or(frame.bytes.len()));
        let mut packet = mbuf(first);
        if frame.split.is_some() {
            packet.chain(mbuf(rest)).unwrap();
        }
        self.sending.push(packet).unwrap();
        if self.sending.is_full() {
            self.flush();
        }
    }

    pub(crate) fn flush(&mut self) {
        let deadline = Instant::now() + super::PATIENCE;
        while !self.sending.is_empty() {
            if self.tx.send(&mut self.sending) == 0 {
                assert!(Instant::now() < deadline, "the data plane takes no packets");
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    pub(crate) fn receive(&mut self) -> Vec<Vec<u8>> {
        let mut burst = Burst::new();
        self.rx.receive(&mut burst);
        burst.iter().map(|mbuf| mbuf.data().to_vec()).collect()
    }
}
