//! The environment: started once, torn down when nothing uses it any more.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString, OsStr, c_char, c_int};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use crate::eal_args::{EalConfig, EalError};
use crate::lcore::{self, LaunchError, Worker, WorkerPanicked};
use crate::ring_ports::SharedRings;

/// DPDK's environment. Start it first, drop it last; what was made with it keeps it alive.
pub struct Eal {
    inner: Arc<EalInner>,
}

/// What everything made with the environment holds on to.
pub(crate) struct EalInner {
    workers: Vec<Arc<Worker>>,
    /// Numbers of the ports that are open: a port is handed out once.
    pub(crate) open_ports: Mutex<HashSet<u16>>,
    /// Numbers of the compression devices that are open.
    pub(crate) open_compress: Mutex<HashSet<u8>>,
    /// The rings behind ports made by [`crate::Port::ring_pair`], by port name.
    pub(crate) ring_ports: Mutex<HashMap<String, Arc<SharedRings>>>,
}

/// Why a device was not attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The arguments hold a NUL byte.
    #[error("device arguments {0:?} hold a NUL byte")]
    BadArgument(String),
    /// A shared-memory port cannot lend its mbufs.
    #[error(
        "device {0}: zero-copy=yes needs memory that lies in one file: name the device when the program starts, or start the EAL with \
         --single-file-segments"
    )]
    ManyFiles(String),
    /// No driver took it.
    #[error(
        "device {device} was not attached: {reason}. Is its driver linked (`shadowserve doctor`) and are its arguments right?"
    )]
    Attach {
        /// What was asked for.
        device: String,
        /// DPDK's message.
        reason: String,
    },
    /// It exists no more, or its driver refuses.
    #[error("device {device} was not detached: {reason}")]
    Detach {
        /// What was asked for.
        device: String,
        /// DPDK's message.
        reason: String,
    },
}

static STARTED: AtomicBool = AtomicBool::new(false);

impl Eal {
    /// Starts DPDK. The calling thread becomes the main lcore and floats over every CPU that the process may use, as do threads
    /// that it starts later; worker `i` runs on a thread of its own, pinned to `config.lcores[i]`.
    ///
    /// With hugepages and no `--file-prefix` among `extra`, hugepages are anonymous, so that none stay behind whatever happens; otherwise
    /// files of the same prefix that a dead process left are removed first. No NIC is touched until its port is opened, unless `extra`
    /// says which (`-a`). Standard output is closed to DPDK while it starts, its messages go to standard error.
    ///
    /// # Errors
    /// See [`EalError`]; after one of its last three variants, the process cannot try again.
    pub fn start(config: &EalConfig) -> Result<Eal, EalError> {
        let allowed = allowed_cpus().map_err(EalError::Affinity)?;
        let arguments = config.arguments(&allowed)?;
        if STARTED.swap(true, Ordering::SeqCst) {
            return Err(EalError::AlreadyStarted);
        }
        if config.huge {
            crate::hugefiles::remove_stale(config.effective_file_prefix());
        }
        config.vdevs.iter().for_each(|device| crate::memif::remove_stale_socket(device));
        init(&arguments, config.huge)?;
        let inner = EalInner {
            workers: config.lcores.iter().map(|_| Arc::default()).collect(),
            open_ports: Mutex::default(),
            open_compress: Mutex::default(),
            ring_ports: Mutex::default(),
        };
        Ok(Eal { inner: Arc::new(inner) })
    }

    /// Runs `f` on worker `worker`, counted from 0, and returns at once.
    ///
    /// # Errors
    /// When there is no such worker or it is busy.
    pub fn launch<F: FnOnce() + Send + 'static>(&self, worker: usize, f: F) -> Result<(), LaunchError> {
        lcore::launch(&self.inner.workers, worker, Box::new(f))
    }

    /// Waits until worker `worker` has nothing to run. Returns at once if it never had, or if there is no such worker.
    ///
    /// # Errors
    /// When its last closure panicked; said once.
    pub fn wait(&self, worker: usize) -> Result<(), WorkerPanicked> {
        lcore::wait(&self.inner.workers, worker)
    }

    /// Whether worker `worker` runs a closure.
    #[must_use]
    pub fn is_running(&self, worker: usize) -> bool {
        worker < self.workers() && lcore::is_running(worker)
    }

    /// Number of workers.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.inner.workers.len()
    }

    /// Adds a device after the start: `net_memif1,role=server` as in `--vdev`, or a PCI address. Returns the name to open its port by.
    ///
    /// # Errors
    /// When no driver takes it.
    pub fn attach(&self, device: &str) -> Result<String, AttachError> {
        let arguments = CString::new(device).map_err(|_| AttachError::BadArgument(device.to_owned()))?;
        // SAFETY: reads the configuration of the environment, which is up.
        if crate::memif::shares_mbufs(device) && !unsafe { dpdk_sys::rte_mcfg_get_single_file_segments() } {
            return Err(AttachError::ManyFiles(device.to_owned()));
        }
        crate::memif::remove_stale_socket(device);
        // SAFETY: reads a NUL-terminated string.
        let code = unsafe { dpdk_sys::rte_dev_probe(arguments.as_ptr()) };
        if code != 0 {
            return Err(AttachError::Attach { device: device.to_owned(), reason: crate::error_text(code) });
        }
        Ok(device.split(',').next().unwrap_or(device).to_owned())
    }

    pub(crate) fn inner(&self) -> &Arc<EalInner> {
        &self.inner
    }
}

impl fmt::Debug for Eal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Eal").field("workers", &self.workers()).finish_non_exhaustive()
    }
}

impl Drop for Eal {
    /// Waits for the workers: what they run may use what is about to go.
    fn drop(&mut self) {
        for worker in 0..self.workers() {
            // A panic that nobody asked about has been printed by the panic hook.
            let _ = self.wait(worker);
        }
    }
}

impl EalInner {
    /// Whether no lcore but the caller's own can be inside a DPDK call: no worker runs, and the caller is the main lcore.
    pub(crate) fn is_quiet(&self) -> bool {
        // SAFETY: reads a thread-local variable.
        let here = unsafe { dpdk_sys::shim_lcore_id() };
        here == 0 && !(0..self.workers.len()).any(lcore::is_running)
    }
}

impl Drop for EalInner {
    fn drop(&mut self) {
        self.ring_ports.get_mut().map(HashMap::clear).unwrap_or_default();
        // On a worker (the Eal was forgotten) this would tear the worker down under itself.
        if (0..self.workers.len()).any(lcore::is_running) {
            return;
        }
        // SAFETY: the environment is up; the path is a constant string from its start on.
        let folder = unsafe { CStr::from_ptr(dpdk_sys::rte_eal_get_runtime_dir()) }.to_owned();
        // SAFETY: everything that was made with the environment held a reference to this and is gone, and no worker runs.
        unsafe { dpdk_sys::shim_eal_cleanup() };
        // The EAL makes a folder for its files and leaves it. Without shared configuration it is empty; where it is not, it stays.
        let _ = std::fs::remove_dir(OsStr::from_bytes(folder.as_bytes()));
    }
}

/// CPUs in the calling thread's affinity mask.
fn allowed_cpus() -> std::io::Result<Vec<usize>> {
    let set = rustix::thread::sched_getaffinity(None)?;
    Ok((0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect())
}

fn init(arguments: &[CString], huge: bool) -> Result<(), EalError> {
    // The EAL permutes the array and keeps pointers to the strings: give it copies that live on.
    let mut pointers: Vec<*mut c_char> =
        arguments.iter().map(|argument| argument.clone().into_raw()).collect();
    let count = c_int::try_from(pointers.len()).unwrap_or(c_int::MAX);
    pointers.push(std::ptr::null_mut());
    let mut log = vec![0_u8; 16 * 1024];
    // SAFETY: `count` strings and a null, writable, never freed; `log` is writable for its length. STARTED makes this the only call.
    let outcome = unsafe {
        dpdk_sys::shim_eal_init(count, pointers.leak().as_mut_ptr(), log.as_mut_ptr().cast(), log.len())
    };
    let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
    let log = String::from_utf8_lossy(&log[..end]).trim().to_owned();
    if outcome >= 0 {
        log.lines().filter(|line| !is_harmless(line)).for_each(|line| eprintln!("{line}"));
        return Ok(());
    }
    Err(explain(-outcome, log, arguments, huge))
}

/// Warnings that a start which went well prints all the same: of page sizes that nobody reserved, and of the requests between processes that
/// are switched off with the files they go by.
fn is_harmless(line: &str) -> bool {
    line.contains("hugepages reported on node") || line.contains("Failed to register mp action callback")
}

fn explain(errno: c_int, log: String, arguments: &[CString], huge: bool) -> EalError {
    let reason = crate::error_text(errno);
    let errno = Errno::from_raw_os_error(errno);
    let says = |text: &str| log.to_lowercase().contains(text);
    if matches!(errno, Errno::ACCESS | Errno::PERM) || says("permission denied") || says("not permitted") {
        return EalError::NotPermitted { reason, log };
    }
    if huge
        && (says("no free hugepages")
            || says("hugepage information")
            || says("cannot init memory")
            || errno == Errno::NOMEM)
    {
        return EalError::NoHugepages { log };
    }
    let line = arguments.iter().map(|argument| argument.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let log = if log.is_empty() { "nothing".to_owned() } else { log };
    EalError::Failed { reason, arguments: line, log }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_say_what_to_do() {
        let explain = |errno: Errno, log: &str, huge| {
            explain(errno.raw_os_error(), log.to_owned(), &[c"x".to_owned()], huge).to_string()
        };
        let none = explain(Errno::NOMEM, "EAL: No free hugepages reported in hugepages-2048kB", true);
        assert!(none.contains("hugepages/setup.sh config") && none.contains("hugepages-2048kB"), "{none}");
        let denied = explain(Errno::NOMEM, "open '/dev/hugepages/rtemap_0' failed: Permission denied", true);
        assert!(denied.contains("run as root") && denied.contains("rtemap_0"), "{denied}");
        let ordinary = explain(Errno::NOMEM, "", false);
        assert!(ordinary.contains("Cannot allocate memory") && ordinary.contains("`x`"), "{ordinary}");
        let wrong = explain(Errno::INVAL, "EAL: invalid parameter", true);
        assert!(wrong.contains("Invalid argument") && wrong.contains("invalid parameter"), "{wrong}");
    }
}
