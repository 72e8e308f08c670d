//! What the environment is started with, and what can be wrong with it.

use std::ffi::CString;

/// How the EAL is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EalConfig {
    /// Workers: the CPU that worker `i` is pinned to. Several workers may share a CPU.
    pub lcores: Vec<usize>,
    /// Tells DPDK processes of one machine apart; letters, digits, `-` and `_`.
    pub file_prefix: String,
    /// Take memory from hugepages. Without, ordinary pages are used: slower, no NIC can reach them, no privilege is needed.
    pub huge: bool,
    /// MiB reserved at start. `None` takes hugepages as they are needed, or 256 MiB of ordinary pages.
    pub memory_mib: Option<u32>,
    /// Virtual devices, as in `--vdev`: `net_memif0,role=client,socket=/run/memif.sock`.
    pub vdevs: Vec<String>,
    /// Arguments that go to the EAL as they are (what follows `--` on our command line).
    pub extra: Vec<String>,
    /// Least severe messages of DPDK that are shown, on standard error.
    pub log_level: LogLevel,
}

impl Default for EalConfig {
    fn default() -> Self {
        Self {
            lcores: Vec::new(),
            file_prefix: "shadowserve".to_owned(),
            huge: true,
            memory_mib: None,
            vdevs: Vec::new(),
            extra: Vec::new(),
            log_level: LogLevel::default(),
        }
    }
}

/// Severity of DPDK's messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogLevel {
    /// Failures only.
    Error,
    /// What may need attention.
    #[default]
    Warning,
    /// Significant normal events.
    Notice,
    /// What is found and set up at start.
    Info,
    /// Everything.
    Debug,
}

impl LogLevel {
    fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Notice => "notice",
            Self::Info => "info",
            Self::Debug => "debug",
        }
    }
}

/// Why the EAL did not start.
#[derive(Debug, thiserror::Error)]
pub enum EalError {
    /// A second start.
    #[error("the EAL was already started in this process; DPDK can be started once")]
    AlreadyStarted,
    /// A worker is to be pinned to a CPU that the process may not use.
    #[error(
        "worker {worker} is to run on CPU {cpu}, but this process may use only CPUs {allowed} (see taskset, cpuset and isolcpus)"
    )]
    CpuNotAllowed {
        /// Index into [`EalConfig::lcores`].
        worker: usize,
        /// The CPU asked for.
        cpu: usize,
        /// CPUs of the process, as in "0-3,8".
        allowed: String,
    },
    /// More workers than DPDK was built for.
    #[error("{asked} workers asked for, this DPDK allows {most}")]
    TooManyWorkers {
        /// Workers asked for.
        asked: usize,
        /// What DPDK has room for beside the main lcore.
        most: usize,
    },
    /// A name that cannot be part of a file name.
    #[error("file prefix {0:?} may hold only letters, digits, '-' and '_', and must not be empty")]
    BadFilePrefix(String),
    /// An argument with a NUL byte in it.
    #[error("the EAL argument {0:?} holds a NUL byte")]
    BadArgument(String),
    /// Hugepages are asked for and none is free.
    #[error(
        "no free hugepages: reserve some as root with `hugepages/setup.sh config` (`make demo` does it too), or run without hugepages, \
         which is slower and reaches no NIC. DPDK says: {log}"
    )]
    NoHugepages {
        /// DPDK's own messages.
        log: String,
    },
    /// The user may not do what the EAL needs.
    #[error(
        "DPDK may not use what it needs ({reason}): run as root, or give the user access to the hugetlbfs mount, /dev/vfio and the \
         runtime folder (XDG_RUNTIME_DIR or /tmp/dpdk), or run without hugepages. DPDK says: {log}"
    )]
    NotPermitted {
        /// The system's message.
        reason: String,
        /// DPDK's own messages.
        log: String,
    },
    /// The CPU list could not be read.
    #[error("cannot read which CPUs this process may use: {0}")]
    Affinity(#[source] std::io::Error),
    /// Anything else.
    #[error("the EAL did not start ({reason}) with the arguments `{arguments}`. DPDK says: {log}")]
    Failed {
        /// The system's message.
        reason: String,
        /// The arguments that it was given.
        arguments: String,
        /// DPDK's own messages.
        log: String,
    },
}

/// MiB of ordinary pages when the configuration does not say.
const DEFAULT_MIB_WITHOUT_HUGEPAGES: u32 = 256;

/// No device has this address. Named as the only one allowed, it keeps the EAL from taking every NIC that it has a driver for: a port is
/// taken when it is opened.
const NO_DEVICE: &str = "0000:00:00.0";

impl EalConfig {
    /// Whether the EAL keeps its hugepages out of the file system.
    pub(crate) fn in_memory(&self) -> bool {
        self.huge && (self.has_extra(&["--in-memory"]) || !self.has_extra(&["--file-prefix", "--huge-dir"]))
    }

    /// The prefix in effect: one among the extra arguments wins.
    pub(crate) fn effective_file_prefix(&self) -> &str {
        let mut extra = self.extra.iter();
        while let Some(argument) = extra.next() {
            match argument.split_once('=') {
                Some(("--file-prefix", prefix)) => return prefix,
                None if argument == "--file-prefix" => {
                    return extra.next().map_or(&self.file_prefix, |prefix| prefix);
                }
                _ => {}
            }
        }
        &self.file_prefix
    }

    /// Checks the configuration and makes the EAL's command line of it. `allowed` are the CPUs of the process.
    pub(crate) fn arguments(&self, allowed: &[usize]) -> Result<Vec<CString>, EalError> {
        let most = usize::try_from(dpdk_sys::RTE_MAX_LCORE).unwrap_or(usize::MAX) - 1;
        if self.lcores.len() > most {
            return Err(EalError::TooManyWorkers { asked: self.lcores.len(), most });
        }
        for (worker, &cpu) in self.lcores.iter().enumerate() {
            if !allowed.contains(&cpu) {
                return Err(EalError::CpuNotAllowed { worker, cpu, allowed: cpu_list(allowed) });
            }
        }
        let prefix_byte = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if self.file_prefix.is_empty() || !self.file_prefix.bytes().all(prefix_byte) {
            return Err(EalError::BadFilePrefix(self.file_prefix.clone()));
        }
        let mut arguments = vec!["shadowserve".to_owned(), format!("--log-level={}", self.log_level.name())];
        arguments.push(format!("--lcores={}", lcore_map(&self.lcores, allowed)));
        arguments.extend(self.memory_arguments());
        if !self.has_extra(&["--file-prefix"]) {
            arguments.push(format!("--file-prefix={}", self.file_prefix));
        }
        if !self.has_extra(&["--telemetry"]) {
            arguments.push("--no-telemetry".to_owned());
        }
        if !self.has_extra(&["-a", "--allow", "-b", "--block", "--no-pci"]) {
            arguments.push(format!("--allow={NO_DEVICE}"));
        }
        arguments.extend(self.vdevs.iter().map(|vdev| format!("--vdev={vdev}")));
        arguments.extend(self.extra.iter().cloned());
        let to_c =
            |argument: String| CString::new(argument.clone()).map_err(|_| EalError::BadArgument(argument));
        arguments.into_iter().map(to_c).collect()
    }

    fn memory_arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        let mut mib = self.memory_mib;
        if !self.huge {
            // With --no-huge, --in-memory is refused; --no-shconf is what is left of it.
            arguments.extend(["--no-huge".to_owned(), "--no-shconf".to_owned()]);
            mib = mib.or(Some(DEFAULT_MIB_WITHOUT_HUGEPAGES));
        } else if self.in_memory() && !self.has_extra(&["--in-memory"]) {
            arguments.push("--in-memory".to_owned());
        }
        if self.shares_mbufs() && !self.has_extra(&["--single-file-segments"]) {
            arguments.push("--single-file-segments".to_owned());
        }
        if let Some(mib) = mib.filter(|_| !self.has_extra(&["-m", "--socket-mem"])) {
            arguments.push(format!("-m{mib}"));
        }
        arguments
    }

    /// Whether a device is made at start that needs all memory in one file.
    fn shares_mbufs(&self) -> bool {
        let of_extra = self.extra.iter().map(|argument| argument.strip_prefix("--vdev=").unwrap_or(argument));
        self.vdevs.iter().map(String::as_str).chain(of_extra).any(crate::memif::shares_mbufs)
    }

    /// Whether one of these options is among the extra arguments, as `--name`, `--name=value`, `-x` or `-xvalue`.
    fn has_extra(&self, names: &[&str]) -> bool {
        self.extra.iter().any(|argument| {
            names.iter().any(|name| match argument.strip_prefix(name) {
                Some(rest) => rest.is_empty() || rest.starts_with('=') || !name.starts_with("--"),
                None => false,
            })
        })
    }
}

/// The main lcore floats over every CPU of the process: the EAL gives its affinity to all threads that are started later.
fn lcore_map(workers: &[usize], allowed: &[usize]) -> String {
    let mut map = format!("0@({})", cpu_list(allowed));
    for (worker, cpu) in workers.iter().enumerate() {
        map.push_str(&format!(",{}@{cpu}", worker + 1));
    }
    map
}

/// Writes sorted CPU numbers as ranges: "0-3,8".
fn cpu_list(cpus: &[usize]) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for &cpu in cpus {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    let text = |(first, last)| if first == last { format!("{first}") } else { format!("{first}-{last}") };
    ranges.into_iter().map(text).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(config: &EalConfig) -> String {
        let arguments = config.arguments(&[0, 1, 2, 3, 8]).expect("valid configuration");
        arguments.iter().map(|argument| argument.to_str().expect("text")).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn main_lcore_floats_and_workers_are_pinned() {
        let config = EalConfig { lcores: vec![1, 1, 8], ..EalConfig::default() };
        assert!(line(&config).contains("--lcores=0@(0-3,8),1@1,2@1,3@8"), "{}", line(&config));
    }

    #[test]
    fn hugepages_stay_out_of_the_file_system_unless_asked() {
        assert!(line(&EalConfig::default()).contains("--in-memory"));
        let shared =
            EalConfig { extra: vec!["--file-prefix".into(), "other".into()], ..EalConfig::default() };
        assert!(!line(&shared).contains("--in-memory"));
        assert_eq!(shared.effective_file_prefix(), "other");
        let both =
            EalConfig { extra: vec!["--file-prefix=x".into(), "--in-memory".into()], ..EalConfig::default() };
        assert_eq!(line(&both).matches("--in-memory").count(), 1);
        assert_eq!(both.effective_file_prefix(), "x");
    }

    #[test]
    fn ordinary_pages_need_a_size_and_refuse_in_memory() {
        let config = EalConfig { huge: false, ..EalConfig::default() };
        assert!(line(&config).contains("--no-huge --no-shconf -m256"), "{}", line(&config));
        let sized = EalConfig { memory_mib: Some(64), ..config.clone() };
        assert!(line(&sized).contains("-m64"));
        let extra = EalConfig { extra: vec!["-m".into(), "32".into()], ..config };
        assert!(!line(&extra).contains("-m256"));
    }

    #[test]
    fn mbufs_that_are_shared_lie_in_one_file() {
        let with = |vdev: &str, extra: &[&str]| {
            let extra = extra.iter().map(|&argument| argument.to_owned()).collect();
            line(&EalConfig { vdevs: vec![vdev.to_owned()], extra, ..EalConfig::default() })
        };
        let flag = "--single-file-segments";
        assert!(with("net_memif0,role=client,zero-copy=yes", &[]).contains(flag));
        assert!(with("net_null0", &["--vdev", "net_memif0,zero-copy=yes"]).contains(flag));
        assert!(with("net_null0", &["--vdev=net_memif0,zero-copy=yes"]).contains(flag));
        assert!(!with("net_memif0,role=server,zero-copy=yes", &[]).contains(flag));
        assert_eq!(with("net_memif0,zero-copy=yes", &[flag]).matches(flag).count(), 1);
    }

    #[test]
    fn no_device_is_taken_unless_named() {
        assert!(line(&EalConfig::default()).contains("--allow=0000:00:00.0"));
        let allowed = EalConfig { extra: vec!["-a".into(), "0000:03:00.0".into()], ..EalConfig::default() };
        assert!(!line(&allowed).contains("--allow=0000:00:00.0"));
    }

    #[test]
    fn mistakes_are_named() {
        let error = |config: EalConfig| config.arguments(&[0, 1]).expect_err("invalid").to_string();
        let cpu = error(EalConfig { lcores: vec![0, 7], ..EalConfig::default() });
        assert!(cpu.contains("worker 1") && cpu.contains("CPU 7") && cpu.contains("0-1"), "{cpu}");
        assert!(error(EalConfig { lcores: vec![0; 4096], ..EalConfig::default() }).contains("4096 workers"));
        assert!(error(EalConfig { file_prefix: "a/b".into(), ..EalConfig::default() }).contains("a/b"));
        assert!(error(EalConfig { vdevs: vec!["x\0".into()], ..EalConfig::default() }).contains("NUL"));
    }
}
