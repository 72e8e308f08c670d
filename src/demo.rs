//! `shadowserve demo`: the whole of it on one machine, checked plane by plane.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use client::{Client, ClientConfig, LookupError, Outcome, Prefix};
use compress::Codecs;
use dataplane::{Placement, StageKind};
use dpdk::{Eal, EalConfig, Port};
use hugepages::PageChoice;
use iface::IfaceConfig;
use protocol::Namespace;
use protocol::put::AcceptConfig;
use store::keeper::Keeper;
use store::kv_file::KvFile;
use store::load::LoadConfig;

use crate::dataplane::{DEFAULT_HEDGE_PERCENT, DEFAULT_QUEUE_TOLERANCE_US};
use crate::fetch::Run;
use crate::flags::{CodecFlags, STORE_UDP_PORT};
use crate::out::{print_line, say};
use crate::verify::Expected;

/// Real KV to fetch when no file is given; `perf/samples/ORIGIN.md` says where it comes from.
pub(crate) const SAMPLE: &[u8] = include_bytes!("../perf/samples/smollm2-135m-kv-640.safetensors");

/// Free hugepage memory that the two processes need, in MiB.
const HUGEPAGES_NEEDED_MIB: u64 = 512;

const STORE_IP: &str = "10.99.0.1/24";
const DATA_PLANE_IP: &str = "10.99.0.2/24";

/// How long everything may take to start, encoding included.
const START_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(crate) struct Flags {
    /// KV cache to fetch [default: a sample inside this program]
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    #[command(flatten)]
    codec: CodecFlags,
    /// Compression device of the data plane: compress_isal, compress_zlib or a BlueField's PCI address
    #[arg(long, value_name = "DEVICE")]
    compress_dev: Option<String>,
    /// Where to write what arrived
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// How often to fetch; each is checked, and the median is reported
    #[arg(long, value_name = "COUNT", default_value_t = 10)]
    repeat: usize,
    /// Which CPU runs which stage of the data plane [default: from the CPUs there are]
    #[arg(long, value_name = "STAGE@CPUS,...")]
    lcores: Option<Placement>,
    /// CPU of the store [default: from the CPUs there are]
    #[arg(long, value_name = "CPU")]
    store_lcore: Option<usize>,
    /// Run store and data plane inside this process, joined by net_ring, without root or hugepages
    #[arg(long)]
    in_process: bool,
    /// Print one JSON object on standard output and nothing else there
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(flags: &Flags) -> anyhow::Result<ExitCode> {
    let folder = tempfile::Builder::new().prefix("shadowserve-").tempdir().context("a temporary folder")?;
    let input = match &flags.input {
        Some(path) => path.clone(),
        None => {
            let path = folder.path().join("sample.safetensors");
            std::fs::write(&path, SAMPLE).with_context(|| path.display().to_string())?;
            path
        }
    };
    let file = KvFile::open(&input)?;
    let codecs = flags.codec.codecs()?;
    let shape = file.shape();
    codecs.check(shape.layers, shape.kv_heads, shape.head_dim)?;
    let expected = Expected::new(&file, &codecs)?;
    let stage = Stage::new(flags, codecs, &input, folder.path())?;
    let why_not = flags.in_process.then(|| "--in-process".to_owned()).or_else(why_not_two_processes);
    let system: Box<dyn System> = match why_not {
        None => {
            stage.say("a store process and a data plane process, joined by net_memif");
            Box::new(TwoProcesses::start(&stage)?)
        }
        Some(reason) => {
            stage.say(&format!("one process, store and data plane joined by net_ring ({reason}): slower"));
            Box::new(OneProcess::start(&stage)?)
        }
    };
    let outcome = fetch(flags, &stage, system.as_ref(), &file, &expected);
    match (outcome, system.stop()) {
        (outcome, Ok(())) => outcome,
        (Ok(_), Err(error)) => Err(error),
        // Why store or data plane ended says more than that they did.
        (Err(error), Err(cause)) => Err(cause.context(error)),
    }
}

/// Where the demo plays.
struct Stage<'a> {
    input: &'a Path,
    folder: &'a Path,
    socket: PathBuf,
    codecs: Codecs,
    /// The flags that tell a store of it.
    codec_arguments: Vec<String>,
    compress_dev: Option<String>,
    placement: Placement,
    store_cpu: usize,
    quiet: bool,
}

impl<'a> Stage<'a> {
    fn new(flags: &Flags, codecs: Codecs, input: &'a Path, folder: &'a Path) -> anyhow::Result<Self> {
        let cpus = allowed_cpus()?;
        let store_cpu = flags.store_lcore.unwrap_or(*cpus.last().context("no CPU may be used")?);
        let placement = match &flags.lcores {
            Some(placement) => placement.clone(),
            None => placement_for(&cpus)?,
        };
        let socket = folder.join("control.sock");
        let codec_arguments = flags.codec.arguments();
        let compress_dev = flags.compress_dev.clone();
        let quiet = flags.json;
        Ok(Self { input, folder, socket, codecs, codec_arguments, compress_dev, placement, store_cpu, quiet })
    }

    fn say(&self, text: &str) {
        if !self.quiet {
            say!("{text}; data plane {}, store on CPU {}", self.placement, self.store_cpu);
        }
    }

    fn namespace(&self) -> Namespace {
        Namespace {
            model: "demo".into(),
            layout: "nhd".into(),
            codec: self.codecs.name(),
            ..Namespace::default()
        }
    }
}

/// Rx and dma on one CPU each and decoders on the rest, when there are that many; the last is the store's.
fn placement_for(cpus: &[usize]) -> anyhow::Result<Placement> {
    let text = match cpus {
        [] => bail!("no CPU may be used"),
        [first] | [first, _] => format!("rx@{first},decode@{first},dma@{first}"),
        [first, second, _] => format!("rx@{first},dma@{first},decode@{second}"),
        [first, second, decoders @ .., _] => {
            let decoders: Vec<String> = decoders.iter().take(4).map(usize::to_string).collect();
            format!("rx@{first},dma@{second},decode@{}", decoders.join("+"))
        }
    };
    Ok(text.parse()?)
}

fn allowed_cpus() -> anyhow::Result<Vec<usize>> {
    let set = rustix::thread::sched_getaffinity(None).context("the CPUs of this process")?;
    Ok((0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect())
}

/// What keeps the demo from running two processes over memif.
fn why_not_two_processes() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".into());
    }
    let free_mib: u64 =
        hugepages::status().iter().map(|pool| (pool.free_pages * pool.page_bytes) >> 20).sum();
    (free_mib < HUGEPAGES_NEEDED_MIB).then(|| {
        format!(
            "{free_mib} MiB of hugepages are free, {HUGEPAGES_NEEDED_MIB} are needed: hugepages/setup.sh config"
        )
    })
}

/// A store and a data plane that run.
trait System {
    /// Why it no longer runs.
    fn fault(&self) -> Option<String>;
    /// Ends it in order.
    fn stop(self: Box<Self>) -> anyhow::Result<()>;
}

fn fetch(
    flags: &Flags,
    stage: &Stage<'_>,
    system: &dyn System,
    file: &KvFile,
    expected: &Expected,
) -> anyhow::Result<ExitCode> {
    let (client, prefix) = connect(stage, system, file.tokens())?;
    let region = client.register(prefix.sequence_bytes().context("the prefix has no size")?)?;
    let timeout = Duration::from_secs(30);
    let run = Run { client: &client, prefix: &prefix, region: &region, timeout, bar: !flags.json };
    let (report, last) = run.fetch(&stage.codecs, flags.repeat, Some(expected))?;
    if let Some(out) = &flags.out {
        run.write(out, file.tokens())?;
    }
    if flags.json {
        print_line!("{}", report.to_json())?;
    } else {
        report.print()?;
    }
    let mismatched = report.mismatched_planes.unwrap_or(u64::MAX);
    if last.outcome != Outcome::Done || mismatched > 0 {
        say!("FAILED: {mismatched} planes differ from what the codec must give. {}", last.message);
        return Ok(ExitCode::FAILURE);
    }
    if !flags.json {
        print_line!("verified: all {} planes of {} fetches, bit for bit", report.planes, report.times.len())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Connects as soon as the data plane listens and looks up until the store answers.
fn connect(stage: &Stage<'_>, system: &dyn System, tokens: &[i32]) -> anyhow::Result<(Client, Prefix)> {
    let deadline = Instant::now() + START_TIMEOUT;
    let check = || match system.fault() {
        Some(fault) => bail!(fault),
        None if Instant::now() > deadline => bail!("store and data plane did not start within a minute"),
        None => Ok(()),
    };
    while !stage.socket.exists() {
        check()?;
        std::thread::sleep(Duration::from_millis(10));
    }
    let client = Client::connect(&stage.socket, &ClientConfig::new(stage.namespace()))?;
    loop {
        match client.lookup(tokens, Duration::from_millis(500)) {
            Ok(prefix) if prefix.is_whole() => return Ok((client, prefix)),
            Ok(prefix) => bail!("the store has only {} of {} tokens", prefix.tokens, tokens.len()),
            Err(LookupError::Failed(_)) => check().with_context(|| client.stats().unwrap_or_default())?,
            Err(error) => {
                check()?;
                return Err(error.into());
            }
        }
    }
}

/// Store and data plane as processes of their own, joined by memif.
struct TwoProcesses {
    store: Process,
    dataplane: Process,
}

impl TwoProcesses {
    fn start(stage: &Stage<'_>) -> anyhow::Result<Self> {
        let memif = |role: &str| {
            format!(
                "net_memif0,role={role},socket={}/memif.sock,socket-abstract=no,bsize=2048,rsize=9",
                stage.folder.display()
            )
        };
        // The store writes into the data plane's own packet buffers. As many queues at both ends: memif joins queue to queue.
        let queues = stage.placement.count(StageKind::Rx);
        let store_cpu = vec![stage.store_cpu.to_string(); queues].join("+");
        let placement = stage.placement.to_string();
        let (input, port) = (stage.input.to_string_lossy(), memif("server"));
        let mut arguments = vec!["--load", &input, "--model", "demo", "--lcores", &store_cpu];
        arguments.extend(["--ip", STORE_IP, "--port", &port]);
        arguments.extend(stage.codec_arguments.iter().map(String::as_str));
        let store = Process::start("store", stage, &arguments)?;
        let store_address = format!("10.99.0.1:{STORE_UDP_PORT}");
        let socket = stage.socket.to_string_lossy();
        let port = memif("client,zero-copy=yes");
        let mut arguments = vec!["--lcores", &placement, "--ip", DATA_PLANE_IP, "--port", &port];
        arguments.extend(["--store", &store_address, "--socket", &socket]);
        arguments.extend(stage.compress_dev.iter().flat_map(|device| ["--compress-dev", device.as_str()]));
        let dataplane = Process::start("dataplane", stage, &arguments)?;
        Ok(Self { store, dataplane })
    }
}

impl System for TwoProcesses {
    fn fault(&self) -> Option<String> {
        self.store.fault().or_else(|| self.dataplane.fault())
    }

    fn stop(self: Box<Self>) -> anyhow::Result<()> {
        let Self { store, dataplane } = *self;
        dataplane.stop().and(store.stop())
    }
}

/// A child process of this program.
struct Process {
    name: &'static str,
    child: std::cell::RefCell<Child>,
    log: PathBuf,
}

impl Process {
    fn start(name: &'static str, stage: &Stage<'_>, arguments: &[&str]) -> anyhow::Result<Self> {
        let log = stage.folder.join(format!("{name}.log"));
        let output = std::fs::File::create(&log).with_context(|| log.display().to_string())?;
        let program = std::env::current_exe().context("this program's path")?;
        // Polling without pause would starve this process where it shares CPUs with them.
        let child = Command::new(program)
            .arg(name)
            .args(arguments)
            .args(["--idle-sleep-us", "20"])
            .stdin(std::process::Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("shadowserve {name}"))?;
        Ok(Self { name, child: child.into(), log })
    }

    fn fault(&self) -> Option<String> {
        let status = self.child.borrow_mut().try_wait().ok()??;
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        Some(format!("shadowserve {} ended ({status}); it said:\n{log}", self.name))
    }

    /// Asks it to end and waits.
    fn stop(self) -> anyhow::Result<()> {
        if let Some(fault) = self.fault() {
            bail!(fault);
        }
        let child = &mut *self.child.borrow_mut();
        let pid =
            i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw).context("its number")?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let status = child.wait()?;
        if !status.success() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            bail!("shadowserve {} ended badly ({status}); it said:\n{log}", self.name);
        }
        Ok(())
    }
}

impl Drop for Process {
    /// Leaves no process behind when the demo fails half way.
    fn drop(&mut self) {
        let child = &mut *self.child.borrow_mut();
        if let Ok(None) = child.try_wait() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Store and data plane as threads of this process, joined by net_ring.
struct OneProcess {
    store: JoinHandle<anyhow::Result<()>>,
    dataplane: JoinHandle<anyhow::Result<()>>,
    stop: Arc<AtomicBool>,
}

/// Packet buffers per queue: fewer than usual, since ordinary pages are slow to set up.
const IN_PROCESS_MBUFS: u32 = 8192;

impl OneProcess {
    fn start(stage: &Stage<'_>) -> anyhow::Result<Self> {
        let queues = u16::try_from(stage.placement.count(StageKind::Rx))?;
        let mut lcores: Vec<usize> = stage.placement.cpus().collect();
        let first_store_worker = lcores.len();
        lcores.extend(std::iter::repeat_n(stage.store_cpu, usize::from(queues)));
        let eal = Arc::new(Eal::start(&EalConfig {
            lcores,
            file_prefix: format!("shadowserve-{}", std::process::id()),
            huge: false,
            memory_mib: Some(192 * u32::from(queues)),
            ..EalConfig::default()
        })?);
        let (store_port, dataplane_port) = Port::ring_pair_with(&eal, "demo", queues, 2048)?;
        let iface = |device: String, address: &str, udp_port| -> anyhow::Result<IfaceConfig> {
            Ok(IfaceConfig {
                device,
                address: address.parse()?,
                vlan: None,
                udp_port,
                mtu: 1500,
                queues,
                rx_descriptors: 1024,
                tx_descriptors: 1024,
                mbufs: IN_PROCESS_MBUFS,
                rss: None,
            })
        };
        let idle_sleep = Duration::from_micros(20);
        let store_config = store::Config {
            iface: iface(store_port, STORE_IP, STORE_UDP_PORT)?,
            first_worker: first_store_worker,
            idle_sleep,
            zero_copy: store::ZeroCopy::Auto,
            accept: AcceptConfig::default(),
        };
        let mut keeper = Keeper::load(&LoadConfig {
            files: vec![stage.input.into()],
            namespace: stage.namespace(),
            codecs: stage.codecs.clone(),
            level: compress::DEFAULT_ZSTD_LEVEL,
            memory_bytes: None,
            pin: false,
            pages: PageChoice::Base,
            share: None,
        })?;
        let config = dataplane::Config {
            iface: iface(dataplane_port, DATA_PLANE_IP, 4800)?,
            placement: stage.placement.clone(),
            stores: vec![format!("10.99.0.1:{STORE_UDP_PORT}").parse()?],
            replicas: 1,
            store_mac: None,
            gateway: None,
            socket: stage.socket.clone(),
            group: None,
            slots: stage.placement.default_slots(),
            slot_bytes: 1 << 20,
            pages: PageChoice::Base,
            compress_dev: stage.compress_dev.clone(),
            window_segments: Some(512),
            link_mbps: 0,
            queue_tolerance: Duration::from_micros(DEFAULT_QUEUE_TOLERANCE_US),
            schedule: protocol::Schedule::default(),
            max_fetches: 16,
            max_chunks: 4096,
            max_layers: 128,
            rto_min: Duration::from_millis(5),
            hedge_percent: DEFAULT_HEDGE_PERCENT,
            idle_sleep,
            gpu: dataplane::GpuConfig::default(),
            save: dataplane::SaveConfig::NONE,
        };
        let stop = Arc::new(AtomicBool::new(false));
        let (store_eal, store_stop) = (Arc::clone(&eal), Arc::clone(&stop));
        let store = std::thread::spawn(move || {
            store::run(&store_eal, &store_config, &mut keeper, &store_stop)?;
            Ok(())
        });
        let dataplane_stop = Arc::clone(&stop);
        let dataplane = std::thread::spawn(move || Ok(dataplane::run(&eal, &config, &dataplane_stop)?));
        Ok(Self { store, dataplane, stop })
    }
}

impl System for OneProcess {
    fn fault(&self) -> Option<String> {
        let ended = self.store.is_finished() || self.dataplane.is_finished();
        ended.then(|| "store or data plane ended".to_owned())
    }

    fn stop(self: Box<Self>) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let join = |thread: JoinHandle<anyhow::Result<()>>| {
            thread.join().unwrap_or_else(|_| bail!("a thread of the demo panicked (see above)"))
        };
        join(self.dataplane).and(join(self.store))
    }
}
