//! Running closures on worker lcores.

use std::any::Any;
use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Why a closure was not launched. The closure is dropped.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// No such worker.
    #[error("there is no worker {worker}: the EAL was started with {workers}")]
    NoSuchWorker {
        /// The worker asked for, counted from 0.
        worker: usize,
        /// Workers that exist.
        workers: usize,
    },
    /// It still runs its last closure.
    #[error("worker {0} is still running: wait for it first")]
    Busy(usize),
    /// The message to the worker's thread failed.
    #[error("worker {worker} could not be told to start: {reason}")]
    Failed {
        /// The worker asked for.
        worker: usize,
        /// DPDK's message.
        reason: String,
    },
}

/// A worker's closure panicked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("worker {worker} panicked: {message}")]
pub struct WorkerPanicked {
    /// The worker, counted from 0.
    pub worker: usize,
    /// What it said.
    pub message: String,
}

/// What is known of one worker. Locked by whoever launches, so that two cannot launch at once, and by the worker when it panics.
#[derive(Debug, Default)]
pub(crate) struct Worker {
    launching: Mutex<()>,
    panic: Mutex<Option<String>>,
}

struct Task {
    run: Box<dyn FnOnce() + Send>,
    worker: Arc<Worker>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The EAL's number of a worker: the main lcore is 0.
fn lcore_id(worker: usize) -> Option<u32> {
    u32::try_from(worker).ok()?.checked_add(1)
}

pub(crate) fn launch(
    workers: &[Arc<Worker>],
    index: usize,
    run: Box<dyn FnOnce() + Send>,
) -> Result<(), LaunchError> {
    let missing = LaunchError::NoSuchWorker { worker: index, workers: workers.len() };
    let (Some(worker), Some(lcore)) = (workers.get(index), lcore_id(index)) else { return Err(missing) };
    let _one_at_a_time = lock(&worker.launching);
    *lock(&worker.panic) = None;
    let task = Box::into_raw(Box::new(Task { run, worker: Arc::clone(worker) }));
    // SAFETY: the lcore exists; `task` is a Task that the worker's thread takes over, unless the call fails.
    let code = unsafe { dpdk_sys::rte_eal_remote_launch(Some(run_task), task.cast(), lcore) };
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the call failed, so nobody else has the pointer made above.
    drop(unsafe { Box::from_raw(task) });
    Err(if code == -rustix::io::Errno::BUSY.raw_os_error() {
        LaunchError::Busy(index)
    } else {
        LaunchError::Failed { worker: index, reason: crate::error_text(code) }
    })
}

pub(crate) fn wait(workers: &[Arc<Worker>], index: usize) -> Result<(), WorkerPanicked> {
    let (Some(worker), Some(lcore)) = (workers.get(index), lcore_id(index)) else { return Ok(()) };
    // SAFETY: the lcore exists.
    unsafe { dpdk_sys::rte_eal_wait_lcore(lcore) };
    match lock(&worker.panic).take() {
        Some(message) => Err(WorkerPanicked { worker: index, message }),
        None => Ok(()),
    }
}

pub(crate) fn is_running(index: usize) -> bool {
    // SAFETY: takes any number below RTE_MAX_LCORE, which the number of workers is.
    lcore_id(index)
        .is_some_and(|lcore| unsafe { dpdk_sys::rte_eal_get_lcore_state(lcore) } == dpdk_sys::RUNNING)
}

/// Runs on the worker's thread. A panic stops here: unwinding into C would be undefined.
unsafe extern "C" fn run_task(task: *mut c_void) -> c_int {
    // SAFETY: `launch` made this pointer from a Box<Task> and gave it up.
    let Task { run, worker } = *unsafe { Box::from_raw(task.cast::<Task>()) };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
        *lock(&worker.panic) = Some(panic_message(panic.as_ref()));
        // The payload's own drop might panic again.
        std::mem::forget(panic);
        return -1;
    }
    0
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}
