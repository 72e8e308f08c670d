//! A store and a data plane as processes, joined by net_memif on ordinary pages, for tests that treat them as a user
//! would: started, asked, killed.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use client::{Client, ClientConfig, Namespace};
use compress::{Codec, Dtype};
use serde_json::Value;
use store::kv_file::{self, KvFile, SequenceShape};
use tempfile::TempDir;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_shadowserve");

/// How long anything may take on a busy machine before the test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The data plane's side of its wire: its own packet buffers are the shared memory.
const LENDS: &str = "client,zero-copy=yes";

/// Packet buffers of a data plane that are out while nothing goes on: those that lie in the receive ring for the store to write into, a burst that was
/// sent last, and the transmit side's spare.
pub(crate) const MBUFS_AT_REST: u64 = 1024 + 32 + 1;

/// A folder with sockets and files, and what runs in it.
pub(crate) struct Cluster {
    pub(crate) store: Option<Process>,
    pub(crate) dataplane: Option<Process>,
    /// Between the two.
    pub(crate) proxy: Option<Process>,
    codec: Codec,
    net: Net,
    /// Last, so that the processes end before their files go.
    folder: TempDir,
}

/// How store and data plane reach each other.
#[derive(Clone, Copy)]
pub(crate) struct Net {
    pub(crate) plane_ip: &'static str,
    pub(crate) store_ip: &'static str,
    pub(crate) store: &'static str,
    /// Flags of both, beside those.
    pub(crate) flags: &'static [&'static str],
    /// Further arguments of the virtual devices.
    pub(crate) device: &'static str,
    /// The store's end of the wire, if it is another than the data plane's.
    pub(crate) store_socket: &'static str,
    /// Instead of shared memory: devices of data plane and store, and the network namespaces that they are in.
    pub(crate) kernel: Option<[(&'static str, &'static str); 2]>,
}

impl Net {
    pub(crate) const DEFAULT: Net = Net {
        plane_ip: "10.99.0.2/24",
        store_ip: "10.99.0.1/24",
        store: "10.99.0.1:4791",
        flags: &[],
        device: "",
        store_socket: "memif.sock",
        kernel: None,
    };
}

/// A running `shadowserve`.
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

impl Cluster {
    /// A data plane with extra flags; no store yet.
    pub(crate) fn new(codec: Codec, flags: &[&str]) -> Self {
        Self::on(Net::DEFAULT, codec, flags)
    }

    /// The same on another network.
    pub(crate) fn on(net: Net, codec: Codec, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut cluster = Self { folder, codec, net, store: None, dataplane: None, proxy: None };
        cluster.start_dataplane(flags);
        cluster
    }

    /// A data plane and a store that holds `file`.
    pub(crate) fn with_store(codec: Codec, file: &Path) -> Self {
        let mut cluster = Self::new(codec, &[]);
        cluster.start_store(file);
        cluster
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("control.sock")
    }

    fn port(&self, number: u32, role: &str, socket: &str) -> String {
        let (socket, more) = (self.path(socket), self.net.device);
        format!(
            "net_memif{number},id={number},role={role},socket={},socket-abstract=no{more}",
            socket.display()
        )
    }

    /// Puts a proxy with these flags between data plane and store.
    pub(crate) fn start_proxy(&mut self, flags: &[&str]) {
        let ports = [self.port(0, "server", "memif.sock"), self.port(1, "server", self.net.store_socket)];
        let mut arguments = vec!["fault-proxy", "--no-huge", "--idle-sleep-us", "10"];
        arguments.extend(["--port", &ports[0], "--port", &ports[1]]);
        arguments.extend(flags);
        self.proxy = Some(Process::start(&arguments, self.path("proxy.log")));
    }

    /// Puts a switch between the data plane and so many stores, which [`Cluster::store_at`] starts.
    pub(crate) fn start_switch(&mut self, stores: u32) {
        let to_store = |number: u32| self.port(number, "server", &format!("store{number}.sock"));
        let ports: Vec<String> =
            std::iter::once(self.port(0, "server", "memif.sock")).chain((1..=stores).map(to_store)).collect();
        let mut arguments = vec!["fault-proxy", "--no-huge", "--idle-sleep-us", "10"];
        arguments.extend(ports.iter().flat_map(|port| ["--port", port.as_str()]));
        self.proxy = Some(Process::start(&arguments, self.path("proxy.log")));
    }

    /// Store `number`, from 1, at a switch.
    pub(crate) fn store_at(&self, number: u32, ip: &str, flags: &[&str]) -> Process {
        let port = self.port(number, "client", &format!("store{number}.sock"));
        let arguments = ["store", "--no-huge", "--idle-sleep-us", "20", "--ip", ip, "--port", &port];
        let arguments = [&arguments[..], &["--codec", self.codec.name(), "--lcores", "1"], flags].concat();
        Process::start(&arguments, self.path(&format!("store{number}.log")))
    }

    pub(crate) fn start_dataplane(&mut self, flags: &[&str]) {
        let (port, socket) = (self.port(0, LENDS, "memif.sock"), self.socket());
        let (port, namespace) = self
            .net
            .kernel
            .map_or((port, None), |[(device, namespace), _]| (device.to_owned(), Some(namespace)));
        let mut arguments =
            vec!["dataplane", "--no-huge", "--idle-sleep-us", "20", "--ip", self.net.plane_ip];
        let socket_text = socket.to_string_lossy();
        arguments.extend(["--port", &port, "--store", self.net.store, "--socket", &socket_text]);
        if !flags.contains(&"--lcores") {
            arguments.extend(["--lcores", "rx@0,decode@0,dma@0"]);
        }
        arguments.extend(self.net.flags);
        arguments.extend(flags);
        self.dataplane = Some(Process::start_in(namespace, &arguments, self.path("dataplane.log")));
        let config = ClientConfig::new(self.namespace());
        let dataplane = self.dataplane.as_mut().unwrap();
        wait_until("the data plane listens", || {
            dataplane.check();
            Client::connect(&socket, &config).is_ok()
        });
    }

    pub(crate) fn start_store(&mut self, file: &Path) {
        self.start_store_with_queues(file, "1");
    }

    /// One queue on each of `cpus`.
    pub(crate) fn start_store_with_queues(&mut self, file: &Path, cpus: &str) {
        self.start_store_with(file, cpus, &[]);
    }

    /// With more flags.
    pub(crate) fn start_store_with(&mut self, file: &Path, cpus: &str, flags: &[&str]) {
        let file = file.to_string_lossy();
        self.start_any_store(cpus, &[&["--load", &file], flags].concat());
    }

    /// One that has loaded nothing, unless `flags` say so.
    pub(crate) fn start_any_store(&mut self, cpus: &str, flags: &[&str]) {
        // Both ends of a wire have one number. Without a proxy it is the data plane's.
        let at_proxy = self.net.store_socket != Net::DEFAULT.store_socket;
        let role = if at_proxy { "client" } else { "server" };
        let port = self.port(u32::from(at_proxy), role, self.net.store_socket);
        let (port, namespace) = self
            .net
            .kernel
            .map_or((port, None), |[_, (device, namespace)]| (device.to_owned(), Some(namespace)));
        let arguments = [
            "store",
            "--no-huge",
            "--idle-sleep-us",
            "20",
            "--ip",
            self.net.store_ip,
            "--port",
            &port,
            "--codec",
            self.codec.name(),
            "--lcores",
            cpus,
        ];
        let arguments = [&arguments, self.net.flags, flags].concat();
        self.store = Some(Process::start_in(namespace, &arguments, self.path("store.log")));
    }

    /// A client in this process, once the store answers.
    pub(crate) fn client(&self) -> Client {
        Client::connect(self.socket(), &ClientConfig::new(self.namespace())).unwrap()
    }

    pub(crate) fn namespace(&self) -> Namespace {
        Namespace {
            model: "default".into(),
            layout: "nhd".into(),
            codec: self.codec.name().into(),
            ..Namespace::default()
        }
    }

    /// Waits until the store answers lookups of `tokens`.
    pub(crate) fn wait_for_store(&self, client: &Client, tokens: &[i32]) {
        wait_until("the store answers", || client.lookup(tokens, Duration::from_millis(300)).is_ok());
    }

    /// Runs `shadowserve save` against this data plane.
    pub(crate) fn save(&self, flags: &[&str]) -> Output {
        let socket = self.socket();
        Command::new(PROGRAM)
            .args(["save", "--socket", &socket.to_string_lossy(), "--codec", self.codec.name(), "--json"])
            .args(flags)
            .output()
            .unwrap()
    }

    /// Runs `shadowserve fetch` against this data plane.
    pub(crate) fn fetch(&self, flags: &[&str]) -> Output {
        let socket = self.socket();
        Command::new(PROGRAM)
            .args(["fetch", "--socket", &socket.to_string_lossy(), "--codec", self.codec.name()])
            .args(flags)
            .output()
            .unwrap()
    }
}

impl Process {
    fn start(arguments: &[&str], log: PathBuf) -> Self {
        Self::start_in(None, arguments, log)
    }

    /// In a network namespace, if there is one.
    fn start_in(namespace: Option<&str>, arguments: &[&str], log: PathBuf) -> Self {
        let output = std::fs::File::create(&log).unwrap();
        let mut command = match namespace {
            None => Command::new(PROGRAM),
            Some(namespace) => {
                // It becomes the program, under the same process id.
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace, PROGRAM]);
                command
            }
        };
        command.args(arguments).stdin(Stdio::null());
        command.stdout(output.try_clone().unwrap()).stderr(output);
        Self { child: command.spawn().unwrap(), log }
    }

    /// Fails the test if the process has ended.
    pub(crate) fn check(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("ended with {status}:\n{}", self.log_text());
        }
    }

    pub(crate) fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its open descriptors.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// Its mappings.
    pub(crate) fn maps(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/maps", self.child.id())).unwrap()
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; the process must end in order.
    pub(crate) fn terminate(mut self) -> String {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "ended with {status}:\n{}", self.log_text());
        self.log_text()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.log.display(), self.log_text());
        }
    }
}

/// Polls until `reached`, or fails the test.
pub(crate) fn wait_until(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !reached() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The sample that the repository carries.
pub(crate) fn sample() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("perf/samples/smollm2-135m-kv-640.safetensors")
}

pub(crate) fn sample_tokens() -> Vec<i32> {
    KvFile::open(&sample()).unwrap().tokens().to_vec()
}

/// Writes a KV cache of varied values, for sizes that the sample does not have. Returns its tokens.
pub(crate) fn write_kv(path: &Path, layers: u16, tokens: usize) -> Vec<i32> {
    let shape = SequenceShape { layers, tokens, kv_heads: 2, head_dim: 16, dtype: Dtype::Bf16 };
    let value = |index: usize| {
        let angle = f32::from(u16::try_from(index % 60_000).unwrap());
        u16::try_from(angle.sin().to_bits() >> 16).unwrap().to_le_bytes()
    };
    let k: Vec<u8> = (0..shape.tensor_bytes() / 2).flat_map(value).collect();
    let v: Vec<u8> = (0..shape.tensor_bytes() / 2).flat_map(|index| value(index * 7 + 3)).collect();
    let ids: Vec<i32> = (0..).take(tokens).collect();
    kv_file::write(path, shape, &k, &v, &ids).unwrap();
    ids
}

/// The data plane's statistics.
pub(crate) fn stats(client: &Client) -> Value {
    serde_json::from_str(&client.stats().unwrap()).unwrap()
}
