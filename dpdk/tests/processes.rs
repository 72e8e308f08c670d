//! What takes several processes: shared-memory ports between two, starting without privileges, cleaning up after one that was killed.
//!
//! Without a harness: this program starts itself again in the roles below.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use dpdk::{Burst, Eal, EalConfig, Pool, PoolConfig, Port, PortConfig, RxQueue, TxQueue};

/// Packets that the client sends; far more than the ring between the two holds.
const PACKETS: usize = 200_000;

/// The side of a shared-memory port whose own mbufs are the shared memory.
const LENDS: &str = "client,zero-copy=yes";

/// Long enough for a busy machine; nothing waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["role:memif-sender", pages, side, socket] => memif_sender(pages == "huge", side, socket),
        ["role:memif-receiver", pages, side, socket] => memif_receiver(pages == "huge", side, socket),
        ["role:memif-busy", side, socket] => memif_busy(side, socket),
        ["role:start", pages, prefix] => start_and_wait(pages == "huge", prefix, &[]),
        ["role:start-with-files", prefix] => start_and_wait(true, prefix, &["--file-prefix", prefix]),
        _ => scenarios(),
    }
}

fn scenarios() {
    let hugepages = free_hugepages() >= 128;
    // SAFETY: has no preconditions.
    let root = rustix::process::geteuid().is_root();
    let run = |name: &str, scenario: fn(), skip: Option<&str>| match skip {
        Some(reason) => println!("skipped: {name}: {reason}"),
        None => {
            scenario();
            println!("ok: {name}");
        }
    };
    let no_root = (!root).then_some("needs root to become a user");
    let no_pages = (!hugepages).then_some("no free hugepages");
    let no_files = (!hugepages || mount().is_none()).then_some("needs free hugepages and a hugetlbfs mount");
    let driver_as_it_is =
        cfg!(feature = "shared").then_some("the shared driver unmaps what lcores are using (docs/DPDK.md)");
    let no_pages_or_fault = no_pages.or(driver_as_it_is);
    run("memif between two processes without hugepages", || memif_pair(false, "client", "server"), None);
    run("memif between two processes with hugepages", || memif_pair(true, "client", "server"), no_pages);
    run("into lent mbufs without hugepages", || memif_pair(false, "server", LENDS), driver_as_it_is);
    run("into lent mbufs with hugepages", || memif_pair(true, "server", LENDS), no_pages_or_fault);
    run("out of lent mbufs", || memif_pair(false, LENDS, "server"), driver_as_it_is);
    run("a memif server outlives killed clients", || killed_peers("server", "client"), driver_as_it_is);
    run("a memif client outlives killed servers", || killed_peers("client", "server"), driver_as_it_is);
    run(
        "a client that lends mbufs outlives killed servers",
        || killed_peers(LENDS, "server"),
        driver_as_it_is,
    );
    run("without privileges and hugepages", unprivileged_start, no_root);
    run("an unprivileged start with hugepages says what to do", unprivileged_huge, no_root);
    run("files of a killed process are removed", killed, no_files);
}

fn free_hugepages() -> u64 {
    let text =
        fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// This program again, in another role.
fn myself(role: &[&str]) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("a program knows its path"));
    command.args(role).stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

fn said(child: &mut Child) -> String {
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().expect("piped")).read_line(&mut line).expect("readable");
    line.trim().to_owned()
}

fn ended_well(mut child: Child) {
    drop(child.stdin.take());
    let status = child.wait().expect("a child");
    assert!(status.success(), "{status}");
}

fn memif(eal: &Eal, pool: &Pool) -> (Port, RxQueue, TxQueue) {
    let (port, mut rx, mut tx) =
        Port::open(eal, "net_memif0", &PortConfig::default(), std::slice::from_ref(pool)).expect("opens");
    let start = Instant::now();
    while !port.link_up() {
        assert!(start.elapsed() < PATIENCE, "the peer did not come");
        std::thread::yield_now();
    }
    (port, rx.remove(0), tx.remove(0))
}

fn config(huge: bool, prefix: &str) -> EalConfig {
    EalConfig {
        file_prefix: prefix.to_owned(),
        huge,
        memory_mib: Some(48),
        extra: vec!["--no-pci".to_owned()],
        ..EalConfig::default()
    }
}

fn memif_eal(huge: bool, side: &str, socket: &str) -> Eal {
    memif_eal_with(huge, side, socket, vec![])
}

fn memif_eal_with(huge: bool, side: &str, socket: &str, lcores: Vec<usize>) -> Eal {
    let vdev = format!("net_memif0,role={side},socket={socket},socket-abstract=no");
    let config =
        EalConfig { lcores, vdevs: vec![vdev], ..config(huge, &format!("memif-{}", std::process::id())) };
    Eal::start(&config).unwrap_or_else(|error| panic!("{side}: {error}"))
}

fn memif_pool(eal: &Eal) -> Pool {
    Pool::new(eal, "memif", PoolConfig { mbufs: 2047, ..PoolConfig::default() }).expect("a pool fits")
}

fn memif_pair(huge: bool, sender: &str, receiver: &str) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let socket = folder.path().join("memif.sock");
    let socket = socket.to_str().expect("text");
    let pages = if huge { "huge" } else { "ordinary" };
    let mut receiver = myself(&["role:memif-receiver", pages, receiver, socket]).spawn().expect("starts");
    let sender = myself(&["role:memif-sender", pages, sender, socket]).spawn().expect("starts");
    assert_eq!(said(&mut receiver), "all received");
    ended_well(sender);
    ended_well(receiver);
}

/// What packet `index` holds: its index, then bytes that follow from it, in different lengths.
fn fill(bytes: &mut [u8], index: usize) {
    bytes.fill(index.to_le_bytes()[0]);
    bytes[..8].copy_from_slice(&index.to_le_bytes());
}

fn length(index: usize) -> usize {
    8 + index % 1400
}

fn memif_receiver(huge: bool, side: &str, socket: &str) {
    let eal = memif_eal(huge, side, socket);
    let pool = memif_pool(&eal);
    let (port, mut rx, tx) = memif(&eal, &pool);
    let (mut burst, mut index, mut expected) = (Burst::new(), 0, [0; 1408]);
    let start = Instant::now();
    while index < PACKETS {
        if rx.receive(&mut burst) == 0 {
            assert!(start.elapsed() < PATIENCE, "packet {index} did not come");
            std::thread::yield_now();
        }
        for mbuf in burst.drain() {
            let expected = &mut expected[..length(index)];
            fill(expected, index);
            assert!(mbuf.data() == expected, "packet {index} is not what was sent");
            index += 1;
        }
    }
    assert_eq!(port.stats().rx_packets, PACKETS as u64);
    drop((port, rx, tx));
    assert_eq!(pool.in_use(), 0);
    println!("all received");
    std::io::stdin().read_to_end(&mut Vec::new()).expect("readable");
}

fn memif_sender(huge: bool, side: &str, socket: &str) {
    let eal = memif_eal(huge, side, socket);
    let pool = memif_pool(&eal);
    let (port, rx, mut tx) = memif(&eal, &pool);
    let mut burst = Burst::new();
    for index in 0..PACKETS {
        let mut mbuf = loop {
            match pool.alloc() {
                Some(mbuf) => break mbuf,
                None => std::thread::yield_now(),
            }
        };
        fill(mbuf.append(length(index)).expect("room"), index);
        burst.push(mbuf).expect("room");
        while burst.is_full() || (index + 1 == PACKETS && !burst.is_empty()) {
            if tx.send(&mut burst) == 0 {
                std::thread::yield_now();
            }
        }
    }
    // What is in the shared ring is lost when a side leaves.
    std::io::stdin().read_to_end(&mut Vec::new()).expect("readable");
    drop((port, rx, tx));
    assert_eq!(pool.in_use(), 0);
}

/// Starts an EAL, says how it went, and keeps it until standard input closes.
fn start_and_wait(huge: bool, prefix: &str, extra: &[&str]) {
    let mut config = config(huge, prefix);
    config.extra.extend(extra.iter().map(|&argument| argument.to_owned()));
    match Eal::start(&config) {
        Ok(eal) => {
            let pool = memif_pool(&eal);
            println!("started with {} mbufs", pool.available());
            std::io::stdin().read_to_end(&mut Vec::new()).expect("readable");
        }
        Err(error) => println!("{error}"),
    }
}

/// The user and group `nobody`.
const NOBODY: u32 = 65534;

/// Starts a role as a user without rights. `None` if that user may not read this program.
fn as_nobody(role: &[&str]) -> Option<Child> {
    let started = myself(role).uid(NOBODY).gid(NOBODY).env_remove("XDG_RUNTIME_DIR").spawn();
    if let Err(error) = &started {
        println!("  (not tried: {error}: {:?} is not for everybody)", std::env::current_exe());
    }
    started.ok()
}

fn unprivileged_start() {
    let Some(mut child) = as_nobody(&["role:start", "ordinary", "nobody"]) else { return };
    assert_eq!(said(&mut child), "started with 2047 mbufs");
    ended_well(child);
}

fn unprivileged_huge() {
    let Some(mut child) = as_nobody(&["role:start", "huge", "nobody"]) else { return };
    let line = said(&mut child);
    // Anonymous hugepages need no privilege where the system has some free.
    let fine = ["started with", "hugepages/setup.sh config", "run as root"];
    assert!(fine.iter().any(|text| line.contains(text)), "{line}");
    ended_well(child);
}

fn mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    let line =
        mounts.lines().find(|line| line.split(' ').nth(2) == Some("hugetlbfs") && !line.contains("1024M"))?;
    line.split(' ').nth(1).map(PathBuf::from)
}

fn files_of(prefix: &str) -> usize {
    let entries = fs::read_dir(mount().expect("checked before")).expect("readable");
    entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix)).count()
}

fn killed() {
    let prefix = format!("killed-{}", std::process::id());
    let mut child = myself(&["role:start-with-files", &prefix]).spawn().expect("starts");
    assert_eq!(said(&mut child), "started with 2047 mbufs");
    let living = files_of(&prefix);
    assert!(living > 0, "hugepages that are shared by name are files");
    dpdk_start(&prefix);
    assert_eq!(files_of(&prefix), living, "those of a living process are left alone");
    child.kill().expect("killed");
    child.wait().expect("ended");
    assert_eq!(files_of(&prefix), living, "a killed process leaves its files");
    dpdk_start(&prefix);
    assert_eq!(files_of(&prefix), 0, "the next start removes them");
}

/// Starts and ends an EAL whose own hugepages are no files.
fn dpdk_start(prefix: &str) {
    let mut child = myself(&["role:start", "huge", prefix]).spawn().expect("starts");
    assert_eq!(said(&mut child), "started with 2047 mbufs");
    ended_well(child);
}

/// One side is killed, again and again, while both send and receive as fast as they can; the other goes on.
fn killed_peers(surviving: &str, killed: &str) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let socket = folder.path().join("memif.sock");
    let socket = socket.to_str().expect("text");
    let mut survivor = myself(&["role:memif-busy", surviving, socket]).spawn().expect("starts");
    let mut lines = BufReader::new(survivor.stdout.take().expect("piped")).lines().map_while(Result::ok);
    for _ in 0..5 {
        let mut peer = myself(&["role:memif-busy", killed, socket]).spawn().expect("starts");
        assert_eq!(lines.next().as_deref(), Some("up"));
        assert_eq!(lines.next().as_deref(), Some("receives"));
        std::thread::sleep(Duration::from_millis(100));
        peer.kill().expect("killed");
        peer.wait().expect("ended");
        assert_eq!(lines.next().as_deref(), Some("down"));
    }
    drop(survivor.stdin.take());
    assert_eq!(lines.next().as_deref(), Some("0 mbufs in use"));
    let status = survivor.wait().expect("a child");
    assert!(status.success(), "{status}");
}

/// Sends and receives until standard input closes, and tells when the link changes and when the first packets have come over it.
fn memif_busy(side: &str, socket: &str) {
    let eal = memif_eal_with(false, side, socket, vec![cpus()[0], cpus()[cpus().len() - 1]]);
    let pool = memif_pool(&eal);
    let (port, mut rx, mut tx) =
        Port::open(&eal, "net_memif0", &PortConfig::default(), std::slice::from_ref(&pool)).expect("opens");
    static STOP: AtomicBool = AtomicBool::new(false);
    static RECEIVED: AtomicUsize = AtomicUsize::new(0);
    let (mut rx, mut tx, mbufs) = (rx.remove(0), tx.remove(0), pool.clone());
    let receive = move || {
        let mut burst = Burst::new();
        while !STOP.load(Ordering::Relaxed) {
            RECEIVED.fetch_add(rx.receive(&mut burst), Ordering::Relaxed);
            burst.clear();
        }
    };
    let send = move || {
        let mut burst = Burst::new();
        while !STOP.load(Ordering::Relaxed) {
            if burst.is_empty() && mbufs.alloc_burst(&mut burst, 32) {
                burst.iter_mut().for_each(|mbuf| assert!(mbuf.append(1400).is_some()));
            }
            tx.send(&mut burst);
        }
    };
    eal.launch(0, receive).expect("idle");
    eal.launch(1, send).expect("idle");
    let ended = std::thread::spawn(|| std::io::stdin().read_to_end(&mut Vec::new()));
    let (mut up, mut told) = (false, false);
    while !ended.is_finished() {
        if port.link_up() != up {
            up = !up;
            println!("{}", if up { "up" } else { "down" });
            RECEIVED.store(0, Ordering::Relaxed);
            told = false;
        }
        if up && !told && RECEIVED.load(Ordering::Relaxed) > 0 {
            println!("receives");
            told = true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    STOP.store(true, Ordering::Relaxed);
    (0..2).for_each(|worker| eal.wait(worker).expect("no panic"));
    drop(port);
    println!("{} mbufs in use", pool.in_use());
}

fn cpus() -> Vec<usize> {
    let set = rustix::thread::sched_getaffinity(None).expect("readable");
    (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
}
