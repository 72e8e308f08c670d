//! Safe wrappers over DPDK: the environment ([`Eal`]) and its lcores, packet buffers ([`Pool`], [`Mbuf`], [`Burst`]), ports
//! ([`Port`], [`RxQueue`], [`TxQueue`], [`Rss`]), packets in the memory of other devices ([`DeviceMemory`], [`SplitRxQueue`]), rings between lcores ([`Ring`]) and compression devices ([`CompressDev`], [`CompressQueue`],
//! [`CompressOp`]).
//!
//! What a value owns, its drop returns: an [`Mbuf`] goes back to its pool, a [`Port`] stops its device, the last [`Ring`] handle drops
//! what is still in it. The environment outlives all of them: it is torn down when the [`Eal`] and everything made with it are gone.
//! Nothing on the packet path (receiving, sending, allocating and freeing mbufs, rings) allocates, locks, logs or calls the kernel.
//!
//! # What is not promised
//! - An EAL can be started once per process; DPDK cannot start a second one, not even after the first was dropped.
//! - A [`Pool`] dropped while its mbufs are still out stays allocated, and with it the environment, until the process ends.
//! - A device is trusted: what its driver writes into an mbuf's lengths and flags is believed, the packet's bytes are not.

mod burst;
mod compress;
mod compress_caps;
mod compress_error;
mod compress_memory;
mod compress_op;
mod compress_queue;
mod cycles;
mod device_memory;
mod drivers;
mod eal;
mod eal_args;
mod external;
mod hugefiles;
mod lcore;
mod mbuf;
mod memif;
mod pool;
mod port;
mod port_config;
mod port_error;
mod port_probe;
mod port_setup;
mod queue;
mod ring;
mod ring_ports;
mod rss;
mod split;

pub use burst::{BURST, Burst, Drain};
pub use compress::{CompressConfig, CompressDev};
pub use compress_caps::{CompressAlgorithm, CompressCapabilities, CompressCapability};
pub use compress_error::{CompressError, OpError, Unfit};
pub use compress_op::{CompressOp, Rejected};
pub use compress_queue::CompressQueue;
pub use cycles::{cycles, cycles_hz};
pub use device_memory::{DEVICE_PAGE_BYTES, DeviceBuffer, DeviceMemory, DevicePool};
pub use drivers::{drivers, isal_available, version};
pub use eal::{AttachError, Eal};
pub use eal_args::{EalConfig, EalError, LogLevel};
pub use external::{Attacher, ExternalError, ExternalMemory};
pub use lcore::{LaunchError, WorkerPanicked};
pub use mbuf::{Checksum, HEADROOM_BYTES, Mbuf, Segments};
pub use memif::lent_mbufs;
pub use pool::{Pool, PoolConfig, PoolError, PoolOrder};
pub use port::{OpenPort, Port, PortStats};
pub use port_config::{Capabilities, PortConfig};
pub use port_error::PortError;
pub use port_probe::{PortProbe, SplitUnfit};
pub use queue::{RxQueue, TxQueue};
pub use ring::{Ring, RingError, RingItem, RingMode, RingReceiver, RingSender};
pub use rss::Rss;
pub use split::{SplitPacket, SplitPools, SplitRxQueue};

/// DPDK's message for a negative return value or an errno.
pub(crate) fn error_text(code: i32) -> String {
    // SAFETY: rte_strerror accepts any number and returns a string that lives at least until this thread's next call.
    let text = unsafe { std::ffi::CStr::from_ptr(dpdk_sys::rte_strerror(code.saturating_abs())) };
    text.to_string_lossy().into_owned()
}
