//! Why a port was not opened.

use std::ffi::c_int;

use crate::eal::AttachError;

/// Why a port was not opened.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// No such port.
    #[error(
        "there is no port {port:?}; there are: {known}. A PCI device must be bound to vfio-pci (or be an mlx5), a virtual one be \
         given with --vdev"
    )]
    NoSuchPort {
        /// The name asked for.
        port: String,
        /// Names of the ports that exist.
        known: String,
    },
    /// It was named with arguments, or is a PCI device that was not probed at start, and cannot be had.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// It is open already.
    #[error("port {0:?} is already open")]
    AlreadyOpen(String),
    /// One pool per receive queue is needed.
    #[error(
        "port {port:?} has {rx_queues} receive queues but was given {pools} pools: one for each is needed"
    )]
    WrongPools {
        /// The port.
        port: String,
        /// Receive queues asked for.
        rx_queues: u16,
        /// Pools given.
        pools: usize,
    },
    /// The device has not so many queues.
    #[error("port {port:?} has at most {most} {what} queues, {asked} were asked for")]
    TooManyQueues {
        /// The port.
        port: String,
        /// "receive" or "transmit".
        what: &'static str,
        /// Queues asked for.
        asked: u16,
        /// What the device has.
        most: u16,
    },
    /// The device cannot have this MTU.
    #[error("port {port:?} takes an MTU from {least} to {most} bytes, not {asked}")]
    BadMtu {
        /// The port.
        port: String,
        /// MTU asked for.
        asked: u16,
        /// The device's smallest.
        least: u16,
        /// The device's largest.
        most: u16,
    },
    /// Packets do not fit the pool's buffers and the device cannot use several for one.
    #[error(
        "port {port:?} cannot split a packet over buffers: an MTU of {mtu} makes frames of {frame_bytes} bytes, the pool's buffers take \
         {buffer_bytes}. Use a larger data room or a smaller MTU"
    )]
    BuffersTooSmall {
        /// The port.
        port: String,
        /// MTU asked for.
        mtu: u16,
        /// What a buffer takes.
        buffer_bytes: u32,
        /// What a frame can have.
        frame_bytes: u32,
    },
    /// A shared-memory port cannot be trusted with frames larger than its buffers.
    #[error(
        "port {port:?}: an MTU of {mtu} makes frames of {frame_bytes} bytes, its shared buffers take {bsize}: add bsize={frame_bytes} (or \
         more) to the arguments of the side with role=client"
    )]
    MemifBuffersTooSmall {
        /// The port.
        port: String,
        /// MTU asked for.
        mtu: u16,
        /// What a shared buffer takes.
        bsize: u32,
        /// What a frame can have.
        frame_bytes: u32,
    },
    /// The server of a shared-memory port would not see the mbufs.
    #[error("port {port:?} cannot lend its mbufs: {why}. Leave zero-copy=yes out of its arguments")]
    CannotLend {
        /// The port.
        port: String,
        /// What is in the way.
        why: &'static str,
    },
    /// The driver refused.
    #[error("port {port:?}: {step} failed: {reason}")]
    Failed {
        /// The port.
        port: String,
        /// What was being done.
        step: &'static str,
        /// DPDK's message.
        reason: String,
    },
}

/// Turns a driver's answer into an error that names what was being done.
pub(crate) fn check(port: &str, step: &'static str, code: c_int) -> Result<(), PortError> {
    if code >= 0 {
        return Ok(());
    }
    Err(PortError::Failed { port: port.to_owned(), step, reason: crate::error_text(code) })
}
