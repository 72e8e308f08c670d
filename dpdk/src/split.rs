//! Receive queues that put a packet's headers into host memory and what follows them into device memory.
//!
//! A NIC does that itself (DPDK's "buffer split": two pools per queue, cut at a fixed length), and tells whether the UDP checksum was right,
//! since nobody else can read what it covers. Where there is no such NIC, and the device memory is a stand-in that the CPU can write, the CPU plays
//! its part, so that everything behind the queue is the same.

use std::ptr::NonNull;

use crate::burst::Burst;
use crate::device_memory::{DeviceBuffer, DevicePool};
use crate::mbuf::{Mbuf, field};
use crate::pool::Pool;
use crate::queue::RxQueue;

/// Where a queue's packets go.
#[derive(Clone, Debug)]
pub struct SplitPools {
    /// The first `at_bytes` bytes of each packet. Without, whole packets go to `tail`, and nobody reads them.
    pub head: Option<Pool>,
    /// The rest.
    pub tail: DevicePool,
    /// Bytes before the rest.
    pub at_bytes: u16,
}

/// A received packet.
#[derive(Debug)]
pub struct SplitPacket {
    /// Its first bytes, in host memory: all of it if there is no `tail`. `None` if the device put all of it into device memory.
    pub head: Option<Mbuf>,
    /// The rest.
    pub tail: Option<DeviceBuffer>,
}

impl SplitPacket {
    /// Bytes of the packet.
    #[inline]
    #[must_use]
    pub fn total_bytes(&self) -> usize {
        self.head.as_ref().map_or(0, Mbuf::total_bytes) + self.tail.as_ref().map_or(0, DeviceBuffer::bytes)
    }
}

/// A receive queue whose packets are cut in two.
#[derive(Debug)]
pub struct SplitRxQueue {
    queue: RxQueue,
    tail: DevicePool,
    /// Where the CPU cuts packets, if it is to.
    cut_at: Option<usize>,
    received: Burst,
}

impl SplitRxQueue {
    pub(crate) fn new(queue: RxQueue, tail: DevicePool, cut_at: Option<usize>) -> Self {
        Self { queue, tail, cut_at, received: Burst::new() }
    }

    /// Index of this queue.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.queue.index()
    }

    /// The device memory.
    #[must_use]
    pub fn tail_pool(&self) -> &DevicePool {
        &self.tail
    }

    /// Receives a burst, to be taken by [`SplitRxQueue::take`]; returns how many packets there are.
    #[inline]
    pub fn receive(&mut self) -> usize {
        self.queue.receive(&mut self.received);
        self.received.len()
    }

    /// Takes the next packet of the burst.
    #[inline]
    pub fn take(&mut self) -> Option<SplitPacket> {
        let packet = self.received.pop_front()?;
        Some(match self.cut_at {
            None => separate(packet, &self.tail),
            Some(at) => self.cut(packet, at),
        })
    }

    /// Does for `packet` what a NIC would have done: checks the UDP checksum, and puts the bytes from `at` on into device memory. A packet for which no
    /// buffer is free, or that does not fit one, is lost.
    #[cold]
    fn cut(&self, mut packet: Mbuf, at: usize) -> SplitPacket {
        if packet.segment_count() > 1 {
            return SplitPacket { head: None, tail: None };
        }
        // SAFETY: one mbuf, which is ours.
        unsafe { dpdk_sys::shim_check_udp(packet.as_raw().as_ptr()) };
        let Some(bytes) = packet.data().get(at..).filter(|bytes| !bytes.is_empty()) else {
            return SplitPacket { head: Some(packet), tail: None };
        };
        let count = bytes.len();
        let length = u16::try_from(count).ok().filter(|&length| length <= self.tail.room_bytes());
        let (Some(length), Some(buffer)) = (length, self.tail.alloc()) else {
            return SplitPacket { head: None, tail: None };
        };
        let raw = buffer.as_raw();
        field!(raw, SHIM_MBUF_DATA_OFF as u16 = 0);
        field!(raw, SHIM_MBUF_DATA_LEN as u16 = length);
        field!(raw, SHIM_MBUF_PKT_LEN as u32 = u32::from(length));
        let to = field!(raw, SHIM_MBUF_BUF_ADDR as *mut u8);
        // SAFETY: the buffer has room for them, is the CPU's memory (or packets would not be cut here), and was just taken: nobody else uses it, and
        // there are no references to it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, count) };
        packet.trim_back(count);
        SplitPacket { head: Some(packet), tail: Some(buffer) }
    }
}

/// Takes the device's half, if there is one, off a packet as the driver gave it. Of a chain of more parts than were asked for nothing is left.
#[inline]
fn separate(packet: Mbuf, tail: &DevicePool) -> SplitPacket {
    let raw = packet.into_raw();
    let is_device = |mbuf: NonNull<dpdk_sys::rte_mbuf>| {
        field!(mbuf, SHIM_MBUF_POOL as *mut dpdk_sys::rte_mempool) == tail.pool().raw()
    };
    if is_device(raw) {
        if field!(raw, SHIM_MBUF_NB_SEGS as u16) == 1 {
            // SAFETY: a single mbuf of a pool of device memory that nobody else has.
            return SplitPacket { head: None, tail: Some(unsafe { DeviceBuffer::from_raw(raw) }) };
        }
        return free(raw);
    }
    let Some(next) = NonNull::new(field!(raw, SHIM_MBUF_NEXT as *mut dpdk_sys::rte_mbuf)) else {
        // SAFETY: as the driver gave it, one buffer of host memory.
        return SplitPacket { head: Some(unsafe { Mbuf::from_raw(raw) }), tail: None };
    };
    if !is_device(next) {
        // SAFETY: as above, and whatever drivers chain behind a buffer of host memory is host memory, but for what they were given `tail` for.
        return SplitPacket { head: Some(unsafe { Mbuf::from_raw(raw) }), tail: None };
    }
    if field!(raw, SHIM_MBUF_NB_SEGS as u16) != 2 {
        return free(raw);
    }
    let bytes = field!(raw, SHIM_MBUF_DATA_LEN as u16);
    field!(raw, SHIM_MBUF_NEXT as *mut dpdk_sys::rte_mbuf = std::ptr::null_mut());
    field!(raw, SHIM_MBUF_NB_SEGS as u16 = 1);
    field!(raw, SHIM_MBUF_PKT_LEN as u32 = u32::from(bytes));
    // SAFETY: the chain was taken apart: each half is a single mbuf that nobody else has, the second one of a pool of device memory.
    unsafe { SplitPacket { head: Some(Mbuf::from_raw(raw)), tail: Some(DeviceBuffer::from_raw(next)) } }
}

#[cold]
fn free(raw: NonNull<dpdk_sys::rte_mbuf>) -> SplitPacket {
    // SAFETY: a chain that nobody else has.
    unsafe { dpdk_sys::shim_mbuf_free(raw.as_ptr()) };
    SplitPacket { head: None, tail: None }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hugepages::DeviceWritable;

    use super::*;
    use crate::device_memory::DeviceMemory;
    use crate::pool::PoolConfig;
    use crate::{Eal, EalConfig};

    /// Memory that is only ever addressed.
    #[derive(Debug)]
    struct Nowhere;

    // SAFETY: nobody has these addresses, and nothing touches them here.
    unsafe impl DeviceWritable for Nowhere {
        fn address(&self) -> usize {
            1 << 46
        }

        fn bytes(&self) -> usize {
            64 << 10
        }

        fn is_cpu_memory(&self) -> bool {
            false
        }
    }

    fn chain(first: NonNull<dpdk_sys::rte_mbuf>, second: NonNull<dpdk_sys::rte_mbuf>) -> Mbuf {
        // SAFETY: two mbufs that nobody else has become one chain, which is given to one owner.
        unsafe {
            assert_eq!(dpdk_sys::shim_mbuf_chain(first.as_ptr(), second.as_ptr()), 0);
            Mbuf::from_raw(first)
        }
    }

    /// What a driver that splits packets gives: each part becomes what it is, and goes back to where it came from. In unit tests because nobody
    /// else can make such a chain.
    #[test]
    fn packets_from_a_nic_are_taken_apart() {
        let config = EalConfig {
            file_prefix: format!("split-{}", std::process::id()),
            huge: false,
            memory_mib: Some(64),
            extra: vec!["--no-pci".to_owned()],
            ..EalConfig::default()
        };
        let eal = Eal::start(&config).expect("the EAL starts");
        let pool_config = PoolConfig { mbufs: 63, cache: 0, ..PoolConfig::default() };
        let pool = Pool::new(&eal, "heads", pool_config).expect("a pool");
        let memory = DeviceMemory::register(&eal, Arc::new(Nowhere)).expect("DPDK notes it");
        let tail = DevicePool::new(&eal, "tails", &memory, 0, 32, 2048).expect("a pool");
        let head = |bytes: usize| {
            let mut mbuf = pool.alloc().expect("a buffer");
            mbuf.append(bytes).expect("room").fill(9);
            mbuf.into_raw()
        };
        let device = |bytes: u16| {
            let buffer = tail.alloc().expect("a buffer");
            let raw = buffer.as_raw();
            std::mem::forget(buffer);
            field!(raw, SHIM_MBUF_DATA_LEN as u16 = bytes);
            field!(raw, SHIM_MBUF_PKT_LEN as u32 = u32::from(bytes));
            raw
        };
        let split = separate(chain(head(74), device(1440)), &tail);
        assert_eq!(split.total_bytes(), 1514);
        let (first, rest) = (split.head.expect("headers"), split.tail.expect("a segment"));
        assert_eq!((first.data(), first.total_bytes(), first.segment_count()), (&[9; 74][..], 74, 1));
        assert_eq!(rest.bytes(), 1440);
        assert!((1 << 46..(1 << 46) + (64 << 10)).contains(&rest.address()));
        drop(first);
        assert_eq!((pool.in_use(), tail.in_use()), (0, 1));
        drop(rest);
        // SAFETY: mbufs that nobody else has.
        let (short, whole) = unsafe { (Mbuf::from_raw(head(60)), Mbuf::from_raw(device(600))) };
        let short = separate(short, &tail);
        assert!(short.tail.is_none() && short.head.is_some_and(|head| head.total_bytes() == 60));
        let whole = separate(whole, &tail);
        assert!(whole.head.is_none() && whole.tail.is_some_and(|tail| tail.bytes() == 600));
        let host = separate(chain(head(74), head(100)), &tail);
        assert!(host.tail.is_none() && host.head.is_some_and(|head| head.segment_count() == 2));
        let more = separate(chain(chain(head(74), device(1440)).into_raw(), device(10)), &tail);
        assert!(more.head.is_none() && more.tail.is_none(), "in more parts than were asked for");
        let odd = separate(chain(device(1440), head(74)), &tail);
        assert!(odd.head.is_none() && odd.tail.is_none(), "in the wrong order");
        assert_eq!((pool.in_use(), tail.in_use()), (0, 0), "every buffer is back");
    }
}
