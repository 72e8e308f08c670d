//! Real store and data plane processes over networks of other kinds than the usual: IPv6, a VLAN, jumbo frames, and one that loses,
//! repeats, damages, reorders and delays packets (the `fault-proxy` between them), and the kernel's. Whatever the network does, what is delivered
//! is right.

mod cluster;

use std::process::Command;
use std::time::Duration;

use compress::Codec;
use serde_json::Value;

use cluster::{Cluster, Net, PATIENCE, sample, sample_tokens, stats, wait_until};

/// Starts everything, fetches the sample several times, compares every plane; returns the data plane's counters.
fn fetch_all(cluster: &mut Cluster, repeat: &str, flags: &[&str]) -> Value {
    cluster.start_store_with(&sample(), "1", flags);
    let client = cluster.client();
    cluster.wait_for_store(&client, &sample_tokens());
    let sample = sample();
    let output = cluster.fetch(&[
        "--tokens-from",
        &sample.to_string_lossy(),
        "--verify",
        "--repeat",
        repeat,
        "--json",
    ]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text} {}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_str(&text).expect("one JSON object");
    assert_eq!(report["verified"], true);
    stats(&client)["counters"].clone()
}

fn count(counters: &Value, name: &str) -> u64 {
    counters[name].as_u64().unwrap_or_else(|| panic!("no {name} in {counters:#}"))
}

#[test]
fn ipv6_is_spoken_without_given_mac_addresses() {
    let net = Net { plane_ip: "fd00::2/64", store_ip: "fd00::1/64", store: "[fd00::1]:4791", ..Net::DEFAULT };
    let mut cluster = Cluster::on(net, Codec::Int8, &[]);
    let counters = fetch_all(&mut cluster, "3", &[]);
    assert!(count(&counters, "rx_neighbour") > 0, "the store was found by neighbour discovery");
}

#[test]
fn a_vlan_carries_everything_and_strangers_hear_nothing() {
    let net = Net { flags: &["--vlan", "77"], ..Net::DEFAULT };
    let mut cluster = Cluster::on(net, Codec::Int8, &[]);
    let counters = fetch_all(&mut cluster, "3", &[]);
    assert_eq!(count(&counters["dropped"], "foreign_vlan"), 0);

    // A store in no VLAN is not heard, and does not hear.
    let mut cluster = Cluster::on(Net::DEFAULT, Codec::Int8, &["--vlan", "77"]);
    cluster.start_store(&sample());
    let client = cluster.client();
    assert!(client.lookup(&sample_tokens(), Duration::from_millis(500)).is_err());
}

#[test]
fn jumbo_frames_and_both_ways_of_sending_them() {
    let net = Net { flags: &["--mtu", "9000"], device: ",bsize=9216", ..Net::DEFAULT };
    for zero_copy in ["on", "off"] {
        let mut cluster = Cluster::on(net, Codec::Raw, &[]);
        let counters = fetch_all(&mut cluster, "3", &["--zero-copy", zero_copy]);
        // 30 KiB planes of 256 tokens in segments of 8,928 bytes.
        assert!(count(&counters, "rx_bytes") / count(&counters, "rx_packets") > 4000, "{counters:#}");
    }
}

#[test]
fn a_bad_network_delivers_only_what_is_right() {
    let cases: [(&str, &[&str]); 3] = [
        ("lost", &["--loss", "0.01"]),
        ("reordered", &["--reorder", "0.05", "--duplicate", "0.02", "--delay-us", "100"]),
        ("corrupted", &["--corrupt", "0.0003", "--loss", "0.02", "--reorder", "0.02", "--duplicate", "0.01"]),
    ];
    for (seed, (what, faults)) in (1..).zip(cases) {
        let net = Net { store_socket: "store.sock", ..Net::DEFAULT };
        let mut cluster = Cluster::on(net, Codec::Raw, &[]);
        cluster.start_proxy(&[faults, &["--seed", &seed.to_string()]].concat());
        let counters = fetch_all(&mut cluster, "5", &[]);
        let log = cluster.proxy.take().unwrap().terminate();
        let done: Value = serde_json::from_str(log.lines().last().unwrap()).expect("one JSON object");
        for way in ["a_to_b", "b_to_a"] {
            assert!(count(&done[way], "received") > 0, "{log}");
        }
        let faulty = count(&done["b_to_a"], what);
        assert!(faulty > 0, "{what}: {log}");
        // What the proxy says, the data plane has seen: nothing else loses packets here but a ring that is full.
        let duplicates = count(&done["b_to_a"], "duplicated");
        let dropped = &counters["dropped"];
        let seen = count(dropped, "duplicate") + count(dropped, "stale");
        assert!(seen >= duplicates / 2, "{duplicates} sent twice, {seen} seen: {counters:#}");
        if what == "corrupted" {
            let found = count(&counters, "planes_corrupt")
                + dropped.as_object().unwrap().values().filter_map(Value::as_u64).sum::<u64>();
            assert!(found > 0, "damage is found: {counters:#}");
        }
    }
}

/// Two network namespaces with a veth pair between them; removed when dropped.
struct Namespaces {
    plane: &'static str,
    store: &'static str,
}

impl Namespaces {
    const PLANE_DEVICE: &'static str = "ss-plane";
    const STORE_DEVICE: &'static str = "ss-store";

    /// Or why there are none.
    fn new() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("network namespaces need root".to_owned());
        }
        let name =
            |end: &str| Box::leak(format!("shadowserve-{end}-{}", std::process::id()).into_boxed_str());
        let namespaces = Self { plane: name("plane"), store: name("store") };
        let Self { plane, store } = namespaces;
        let (a, b) = (Self::PLANE_DEVICE, Self::STORE_DEVICE);
        for command in [
            format!("netns add {plane}"),
            format!("netns add {store}"),
            format!("link add {a} netns {plane} type veth peer name {b} netns {store}"),
            format!("-n {plane} link set {a} up"),
            format!("-n {store} link set {b} up"),
        ] {
            ip(&command)?;
        }
        Ok(namespaces)
    }

    fn net(&self, driver: &str) -> Net {
        let device = |device: &str| &*Box::leak(format!("net_{driver}0,iface={device}").into_boxed_str());
        let plane = (device(Self::PLANE_DEVICE), self.plane);
        let store = (device(Self::STORE_DEVICE), self.store);
        Net { kernel: Some([plane, store]), ..Net::DEFAULT }
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for namespace in [self.plane, self.store] {
            let _ = ip(&format!("netns del {namespace}"));
        }
    }
}

fn run(program: &str, arguments: &str) -> Result<(), String> {
    let output = Command::new(program).args(arguments.split(' ')).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    let said = || String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.success() { Ok(()) } else { Err(format!("{program} {arguments}: {}", said())) }
}

fn ip(arguments: &str) -> Result<(), String> {
    run("ip", arguments)
}

/// Through the kernel: packet sockets on a veth pair, then with a queueing discipline that loses packets, then XDP sockets where there are
/// some; and the errors of a kernel that has the store's address but no store.
#[test]
fn kernel_namespaces() {
    let namespaces = match Namespaces::new() {
        Ok(namespaces) => namespaces,
        Err(why) => return println!("skipped: kernel namespaces: {why}"),
    };
    let mut cluster = Cluster::on(namespaces.net("af_packet"), Codec::Int4, &[]);
    fetch_all(&mut cluster, "2", &[]);
    drop(cluster);

    let store = (namespaces.store, Namespaces::STORE_DEVICE);
    match run("ip", &format!("netns exec {} tc qdisc add dev {} root netem loss 1%", store.0, store.1)) {
        Ok(()) => {
            let mut cluster = Cluster::on(namespaces.net("af_packet"), Codec::Raw, &[]);
            fetch_all(&mut cluster, "5", &[]);
            drop(cluster);
            run("ip", &format!("netns exec {} tc qdisc del dev {} root", store.0, store.1)).unwrap();
        }
        Err(why) => println!("skipped: loss by the kernel: {why}"),
    }

    let known = std::fs::read_to_string("/proc/net/protocols").unwrap_or_default();
    if known.lines().any(|line| line.starts_with("XDP ")) {
        let mut cluster = Cluster::on(namespaces.net("af_xdp"), Codec::Int4, &[]);
        fetch_all(&mut cluster, "2", &[]);
    } else {
        println!("skipped: XDP sockets: this kernel has none");
    }

    ip(&format!("-n {} addr add 10.99.0.1/24 dev {}", store.0, store.1)).unwrap();
    ip(&format!("-n {} addr add fd00::1/64 dev {} nodad", store.0, store.1)).unwrap();
    let v4 = namespaces.net("af_packet");
    let v6 = Net { plane_ip: "fd00::2/64", store_ip: "fd00::1/64", store: "[fd00::1]:4791", ..v4 };
    for net in [v4, v6] {
        nobody_listens(net);
    }
}

/// The kernel has the store's address, and no store: it says so, and lookups end with that long before their time is over.
fn nobody_listens(net: Net) {
    let cluster = Cluster::on(net, Codec::Int4, &[]);
    let client = cluster.client();
    wait_until("the kernel says that nobody listens", || {
        let error = client.lookup(&sample_tokens(), PATIENCE).expect_err("there is no store");
        error.to_string().contains("ICMP")
    });
    assert!(count(&stats(&client)["counters"], "rx_icmp") > 0);
}
