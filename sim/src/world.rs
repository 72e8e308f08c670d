//! Hosts, the network between them, and what happens to both, in the order of simulated time.

use serde::Serialize;

use crate::host::{Deed, Host};
use crate::link::{Drop, Faults};
use crate::net::{Net, Way};
use crate::queue::Due;
use crate::record::Records;

/// Something that the scenario does.
#[derive(Clone, Debug)]
pub enum Action {
    /// To one host.
    Host(u32, Deed),
    /// What goes wrong on a host's link changes.
    Link(u32, Way, Faults),
    /// The largest UDP payload that a host's link carries changes; what is larger is dropped without a word.
    Carries(u32, Way, u32),
    /// Two hosts cannot reach each other.
    Part(u32, u32),
    /// They can again.
    Heal(u32, u32),
    /// A host gets no turn for so long.
    Stall(u32, u64),
}

/// How a host's receive side behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Lcore {
    /// Least time between two turns.
    pub turn_nanos: u64,
    /// Packets that the receive ring holds.
    pub ring: usize,
}

impl Default for Lcore {
    fn default() -> Self {
        Lcore { turn_nanos: 1000, ring: 4096 }
    }
}

struct Slot {
    host: Box<dyn Host>,
    lcore: Lcore,
    ring: Vec<u32>,
    /// When its next turn is due; an event for another time is out of date.
    turn_at: u64,
    /// No turn before this.
    not_before: u64,
}

/// What may not happen in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Bounds {
    /// Events of the whole run.
    pub events: u64,
    /// While a fetch is under way and nothing is down, cut or stalled, something that it wants arrives, is delivered or is
    /// given up at least this often.
    pub progress_nanos: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds { events: 2_000_000_000, progress_nanos: 2_000_000_000 }
    }
}

/// A run.
pub struct World {
    /// The network.
    pub net: Net,
    /// What became of each fetch.
    pub records: Records,
    /// Events handled.
    pub events: u64,
    /// Prints what happens.
    pub trace: bool,
    hosts: Vec<Slot>,
    actions: std::vec::IntoIter<(u64, Action)>,
    bounds: Bounds,
    /// What there was of progress when last looked at, and since when there has been no more.
    progress: (u64, u64),
    /// Hosts down, links and pairs cut: while there are any, nothing need arrive.
    interrupted: bool,
    stalled_until: u64,
}

impl World {
    /// A world in which nothing has happened yet. `actions` are sorted by time.
    pub fn new(
        net: Net,
        hosts: Vec<(Box<dyn Host>, Lcore)>,
        actions: Vec<(u64, Action)>,
        bounds: Bounds,
    ) -> World {
        assert!(actions.is_sorted_by_key(|action| action.0));
        let hosts = hosts
            .into_iter()
            .map(|(host, lcore)| Slot { host, lcore, ring: Vec::new(), turn_at: u64::MAX, not_before: 0 })
            .collect();
        World {
            net,
            records: Records::default(),
            events: 0,
            trace: false,
            hosts,
            actions: actions.into_iter(),
            bounds,
            progress: (0, 0),
            interrupted: false,
            stalled_until: 0,
        }
    }

    /// Runs until nothing is left to happen; every invariant is checked on the way, and that nothing is left over.
    pub fn run(&mut self) {
        self.run_while(|_| true);
        assert_eq!(self.net.packets.under_way(), 0, "every packet was taken in or dropped");
        for slot in &self.hosts {
            slot.host.assert_quiet();
        }
        for (id, record) in &self.records.fetches {
            assert!(record.ended.is_some(), "fetch {id} has not ended");
        }
        for (id, save) in &self.records.saves {
            assert!(save.ended.is_some(), "save {id} has not ended");
        }
        for (id, answer) in &self.records.lookups {
            assert!(answer.ended.is_some(), "lookup {id} has not ended");
        }
        let counters = &self.net.counters;
        assert_eq!(
            counters.sent + counters.copies,
            counters.delivered + self.dropped_before_delivery(),
            "every packet was delivered or dropped for a reason"
        );
    }

    fn dropped_before_delivery(&self) -> u64 {
        let counters = &self.net.counters;
        counters.all_dropped() - counters.dropped[Drop::Down as usize] - counters.dropped[Drop::Ring as usize]
    }

    /// Runs while something is left to happen and `go_on` says so.
    pub fn run_while(&mut self, mut go_on: impl FnMut(&World) -> bool) {
        self.schedule_action();
        while go_on(self) {
            let Some((at, due)) = self.net.queue.pop() else { break };
            assert!(at >= self.net.now, "time goes forwards");
            self.net.now = at;
            self.events += 1;
            assert!(self.events < self.bounds.events, "the run does not end");
            self.handle(due);
        }
    }

    fn handle(&mut self, due: Due) {
        match due {
            Due::Link(link) => {
                let hosts = &mut self.hosts;
                self.net.link_due(link, |net, id| deliver(hosts, net, id));
            }
            Due::Packet { link, packet } => {
                let hosts = &mut self.hosts;
                self.net.arrived(link, packet, &mut |net: &mut Net, id| deliver(hosts, net, id));
            }
            Due::Host(host) => {
                if self.hosts[host as usize].turn_at == self.net.now {
                    self.turn(host);
                }
            }
            Due::Action => {
                let Some((_, action)) = self.actions.next() else { return };
                self.act(action);
                self.schedule_action();
            }
        }
    }

    fn schedule_action(&mut self) {
        if let Some((at, _)) = self.actions.as_slice().first() {
            let at = (*at).max(self.net.now);
            self.net.queue.push(at, Due::Action);
        }
    }

    fn act(&mut self, action: Action) {
        if self.trace {
            println!("{:>12} {action:?}", self.net.now);
        }
        let now = self.net.now;
        match action {
            Action::Host(host, deed) => {
                self.hosts[host as usize].host.befall(&mut self.net, &mut self.records, deed);
                wake(&mut self.hosts, &mut self.net, host);
            }
            Action::Link(host, way, faults) => self.net.set_faults(host, way, faults),
            Action::Carries(host, way, bytes) => self.net.set_carries(host, way, bytes),
            Action::Part(one, other) => {
                self.net.cut_pairs.insert((one.min(other), one.max(other)));
            }
            Action::Heal(one, other) => {
                self.net.cut_pairs.remove(&(one.min(other), one.max(other)));
            }
            Action::Stall(host, nanos) => {
                let slot = &mut self.hosts[host as usize];
                slot.not_before = slot.not_before.max(now + nanos);
                self.stalled_until = self.stalled_until.max(now + nanos);
            }
        }
        let hosts = 0..u32::try_from(self.hosts.len()).expect("hosts are numbered in 32 bits");
        let is_cut = |host| [Way::Up, Way::Down].iter().any(|way| self.net.link(host, *way).faults.cut);
        self.interrupted = !self.net.cut_pairs.is_empty()
            || self.hosts.iter().any(|slot| !slot.host.is_up())
            || hosts.into_iter().any(is_cut);
        self.progress = (self.records.progress, now);
    }

    fn turn(&mut self, host: u32) {
        let slot = &mut self.hosts[host as usize];
        let now = self.net.now;
        slot.turn_at = u64::MAX;
        slot.not_before = now + slot.lcore.turn_nanos;
        if self.trace {
            trace_ring(&self.net, host, &slot.ring);
        }
        let due = slot.host.turn(&mut self.net, &mut self.records, &slot.ring);
        for id in slot.ring.drain(..) {
            self.net.packets.give_back(id);
        }
        if let Some(due) = due {
            schedule(slot, &mut self.net, host, due);
        }
        self.check_progress();
    }

    /// No livelock: while a fetch is under way and nothing is wrong but what links lose, it comes nearer to its end.
    fn check_progress(&mut self) {
        let (progress, now) = (self.records.progress, self.net.now);
        let is_excused = self.interrupted || self.records.under_way == 0 || now < self.stalled_until;
        if progress != self.progress.0 || is_excused {
            self.progress = (progress, now);
        }
        let silence = now - self.progress.1;
        assert!(
            silence <= self.bounds.progress_nanos,
            "livelock: {} fetches under way, and none came nearer to its end for {silence} ns",
            self.records.under_way
        );
    }

    /// Counters of all hosts, summed by name.
    pub fn host_counters(&self) -> std::collections::BTreeMap<String, u64> {
        let mut sums = std::collections::BTreeMap::new();
        for (name, value) in self.hosts.iter().flat_map(|slot| slot.host.counters()) {
            *sums.entry(name).or_default() += value;
        }
        sums
    }
}

/// Makes sure that a host gets a turn at `due` or as soon after it as it may.
fn schedule(slot: &mut Slot, net: &mut Net, host: u32, due: u64) {
    let at = due.max(slot.not_before).max(net.now);
    if at < slot.turn_at {
        slot.turn_at = at;
        net.queue.push(at, Due::Host(host));
    }
}

fn wake(hosts: &mut [Slot], net: &mut Net, host: u32) {
    let now = net.now;
    schedule(&mut hosts[host as usize], net, host, now);
}

/// Puts a packet into its receiver's ring.
fn deliver(hosts: &mut [Slot], net: &mut Net, id: u32) {
    let host = net.packets.get(id).to;
    let slot = &mut hosts[host as usize];
    if !slot.host.is_up() {
        return net.drop_packet(id, Drop::Down);
    }
    if slot.ring.len() >= slot.lcore.ring {
        return net.drop_packet(id, Drop::Ring);
    }
    slot.ring.push(id);
    let now = net.now;
    schedule(slot, net, host, now);
}

fn trace_ring(net: &Net, host: u32, ring: &[u32]) {
    for id in ring {
        let packet = net.packets.get(*id);
        let head: Vec<u8> = packet.bytes.iter().take(24).copied().collect();
        println!(
            "{:>12} host {host} <- {} queue {} type {} tag {:08x} bytes {}{}",
            net.now,
            packet.from,
            packet.queue,
            head.get(5).copied().unwrap_or_default(),
            head.get(8..12).map_or(0, |tag| u32::from_le_bytes(tag.try_into().unwrap_or_default())),
            packet.bytes.len() + packet.tail_bytes as usize,
            if packet.marked { " marked" } else { "" },
        );
    }
}
