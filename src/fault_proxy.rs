//! `shadowserve fault-proxy`: stands between ports and does to packets what bad networks do, for tests.
//!
//! Each packet that comes in at one port goes out at the other, or of several at that behind which its destination's MAC address was
//! seen, as at a switch; but for what the flags say, decided by a generator with a seed: lost, sent
//! twice, damaged in one bit, held back for a while, or held back longer so that others overtake it.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::process::ExitCode;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use clap::Args;
use dpdk::{Burst, Eal, EalConfig, Mbuf, Pool, PoolConfig, Port, PortConfig, RxQueue, TxQueue};
use serde_json::{Value, json};

use crate::flags::{self, EalFlags};
use crate::out::print_line;

/// Packets that may be held back in one direction; those beyond go on at once.
const HELD: usize = 4096;

#[derive(Debug, Args)]
pub(crate) struct Flags {
    /// The devices: two or more
    #[arg(long, value_name = "DEVICE", num_args = 1, required = true)]
    port: Vec<String>,
    /// Packets lost, of 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    loss: f64,
    /// Packets sent twice, of 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    duplicate: f64,
    /// Packets in which one bit is flipped, of 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    corrupt: f64,
    /// Packets held back for up to --reorder-us more than others, of 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    reorder: f64,
    /// Most time that a reordered packet is held back, in microseconds
    #[arg(long, value_name = "US", default_value_t = 500)]
    reorder_us: u64,
    /// Time that every packet is held back, in microseconds
    #[arg(long, value_name = "US", default_value_t = 0)]
    delay_us: u64,
    /// Decides which packets
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// CPU to run on
    #[arg(long, value_name = "CPU", default_value_t = 0)]
    lcore: usize,
    #[command(flatten)]
    eal: EalFlags,
}

fn share(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| format!("`{text}` is not a number"))?;
    if (0.0..=1.0).contains(&value) { Ok(value) } else { Err(format!("`{text}` is not from 0 to 1")) }
}

pub(crate) fn run(flags: &Flags) -> anyhow::Result<ExitCode> {
    if flags.port.len() < 2 {
        anyhow::bail!("--port: give it twice or more");
    }
    let stop = flags::stop_on_signals()?;
    let config = EalConfig { vdevs: flags.port.clone(), ..flags.eal.config([flags.lcore], "") };
    let eal = Eal::start(&config)?;
    let pool = Pool::new(&eal, "proxy", PoolConfig { mbufs: 16_384, ..PoolConfig::default() })?;
    let faults = Faults {
        loss: flags.loss,
        duplicate: flags.duplicate,
        corrupt: flags.corrupt,
        reorder: flags.reorder,
        reorder_ns: flags.reorder_us.saturating_mul(1000),
        delay_ns: flags.delay_us.saturating_mul(1000),
    };
    let (mut ways, mut outs) = (Vec::new(), Vec::new());
    for (number, device) in flags.port.iter().enumerate() {
        let (port, rx, tx) = open(&eal, device, &pool)?;
        let name = match (flags.port.len(), number) {
            (2, 0) => "a_to_b".to_owned(),
            (2, 1) => "b_to_a".to_owned(),
            _ => format!("from_{number}"),
        };
        ways.push(Way::new(name, number, rx, faults, flags.seed ^ (number as u64).wrapping_neg()));
        outs.push(Out { port, tx, sending: Burst::new() });
    }
    let mut hosts = Hosts::default();
    let start = Instant::now();
    while !stop.load(Relaxed) {
        let now_ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let work: usize = ways.iter_mut().map(|way| way.poll(now_ns, &pool, &mut hosts, &mut outs)).sum();
        if work == 0 && !flags.eal.idle_sleep().is_zero() {
            std::thread::sleep(flags.eal.idle_sleep());
        }
    }
    let report: serde_json::Map<String, Value> =
        ways.iter().map(|way| (way.name.clone(), way.counts.to_json())).collect();
    print_line!("{}", Value::Object(report))?;
    Ok(ExitCode::SUCCESS)
}

fn open(eal: &Eal, device: &str, pool: &Pool) -> anyhow::Result<(Port, RxQueue, TxQueue)> {
    let name = device.split(',').next().unwrap_or(device);
    let config = PortConfig { promiscuous: true, ..PortConfig::default() };
    let (port, mut rx, mut tx) = Port::open(eal, name, &config, std::slice::from_ref(pool))?;
    Ok((port, rx.remove(0), tx.remove(0)))
}

/// What may happen to a packet, and how often.
#[derive(Debug, Clone, Copy)]
struct Faults {
    loss: f64,
    duplicate: f64,
    corrupt: f64,
    reorder: f64,
    reorder_ns: u64,
    delay_ns: u64,
}

#[derive(Debug, Default)]
struct Counts {
    received: u64,
    lost: u64,
    duplicated: u64,
    corrupted: u64,
    reordered: u64,
    sent: u64,
}

impl Counts {
    fn to_json(&self) -> Value {
        let Self { received, lost, duplicated, corrupted, reordered, sent } = self;
        json!({
            "received": received, "lost": lost, "duplicated": duplicated, "corrupted": corrupted,
            "reordered": reordered, "sent": sent,
        })
    }
}

/// Where packets leave.
struct Out {
    port: Port,
    tx: TxQueue,
    sending: Burst,
}

impl Out {
    fn flush(&mut self) -> usize {
        let sent = self.tx.send(&mut self.sending);
        // What is for a host that has gone does not hold up the others.
        if self.sending.is_full() && !self.port.link_up() {
            self.sending.clear();
        }
        sent
    }
}

/// Behind which port a MAC address was seen.
#[derive(Default)]
struct Hosts(HashMap<[u8; 6], usize>);

impl Hosts {
    fn learn(&mut self, frame: &[u8], port: usize) {
        if let Some(source) = frame.get(6..12).and_then(|mac| mac.try_into().ok()) {
            self.0.insert(source, port);
        }
    }

    fn port(&self, frame: &[u8]) -> Option<usize> {
        self.0.get(frame.first_chunk::<6>()?).copied()
    }
}

/// What comes in at one port.
struct Way {
    name: String,
    /// The port's number.
    from: usize,
    rx: RxQueue,
    faults: Faults,
    random: Random,
    received: Burst,
    /// By when they may go on; packets of the same time in their order.
    held: BinaryHeap<Reverse<Held>>,
    serial: u64,
    counts: Counts,
}

/// A packet that is held back.
struct Held {
    until_ns: u64,
    serial: u64,
    mbuf: Mbuf,
}

impl Held {
    fn key(&self) -> (u64, u64) {
        (self.until_ns, self.serial)
    }
}

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Held {}

impl PartialOrd for Held {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Held {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl Way {
    fn new(name: String, from: usize, rx: RxQueue, faults: Faults, seed: u64) -> Self {
        Self {
            name,
            from,
            rx,
            faults,
            random: Random(seed),
            received: Burst::new(),
            held: BinaryHeap::with_capacity(HELD + 2 * dpdk::BURST),
            serial: 0,
            counts: Counts::default(),
        }
    }

    fn poll(&mut self, now_ns: u64, pool: &Pool, hosts: &mut Hosts, outs: &mut [Out]) -> usize {
        let mut work = 0;
        if self.held.len() < HELD {
            work += self.rx.receive(&mut self.received);
            while let Some(mbuf) = self.received.pop_front() {
                self.counts.received += 1;
                hosts.learn(mbuf.data(), self.from);
                self.take(now_ns, mbuf, pool);
            }
        }
        // As long as every port has room, wherever the next packet goes.
        while outs.iter().all(|out| !out.sending.is_full())
            && self.held.peek().is_some_and(|held| held.0.until_ns <= now_ns)
        {
            let Some(Reverse(held)) = self.held.pop() else { break };
            self.counts.sent += 1;
            self.forward(held.mbuf, pool, hosts, outs);
        }
        work + outs.iter_mut().map(Out::flush).sum::<usize>()
    }

    /// Sends a packet to where its destination is, or everywhere else if that is not known.
    fn forward(&self, mbuf: Mbuf, pool: &Pool, hosts: &Hosts, outs: &mut [Out]) {
        // There is room.
        if let Some(port) = hosts.port(mbuf.data()) {
            if port != self.from {
                let _ = outs[port].sending.push(mbuf);
            }
            return;
        }
        let mut others = outs.iter_mut().enumerate().filter(|(port, _)| *port != self.from);
        let Some((_, first)) = others.next() else { return };
        for (_, out) in others {
            if let Some(twin) = copy(&mbuf, pool) {
                let _ = out.sending.push(twin);
            }
        }
        let _ = first.sending.push(mbuf);
    }

    fn take(&mut self, now_ns: u64, mut mbuf: Mbuf, pool: &Pool) {
        let faults = self.faults;
        if self.random.chance(faults.loss) {
            self.counts.lost += 1;
            return;
        }
        if self.random.chance(faults.corrupt) {
            let bit = self.random.below(mbuf.data().len() as u64 * 8);
            if let Some(byte) = mbuf.data_mut().get_mut(usize::try_from(bit / 8).unwrap_or(0)) {
                *byte ^= 1 << (bit % 8);
                self.counts.corrupted += 1;
            }
        }
        if self.random.chance(faults.duplicate)
            && let Some(twin) = copy(&mbuf, pool)
        {
            self.counts.duplicated += 1;
            self.hold(now_ns, twin);
        }
        self.hold(now_ns, mbuf);
    }

    fn hold(&mut self, now_ns: u64, mbuf: Mbuf) {
        let mut until_ns = now_ns + self.faults.delay_ns;
        if self.random.chance(self.faults.reorder) {
            self.counts.reordered += 1;
            until_ns += self.random.below(self.faults.reorder_ns.max(1));
        }
        self.serial += 1;
        self.held.push(Reverse(Held { until_ns, serial: self.serial, mbuf }));
    }
}

fn copy(mbuf: &Mbuf, pool: &Pool) -> Option<Mbuf> {
    let mut twin = pool.alloc()?;
    twin.append(mbuf.data().len())?.copy_from_slice(mbuf.data());
    Some(twin)
}

/// SplitMix64 (Steele, Lea and Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to `bound`, which is not 0, without it.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn chance(&mut self, share: f64) -> bool {
        // 53 bits, as many as an f64 holds.
        #[expect(clippy::cast_precision_loss, reason = "53 bits are exact")]
        let uniform = (self.next() >> 11) as f64 / (1_u64 << 53) as f64;
        uniform < share
    }
}
