//! Why a compression device was not opened, and why it did not do what it was asked.

use std::ffi::c_int;

use crate::eal::AttachError;
use crate::pool::PoolError;

/// Why a compression device was not opened.
#[derive(Debug, thiserror::Error)]
pub enum CompressError {
    /// It is not there and no driver took it.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// A driver took it, but made no compression device of it.
    #[error(
        "{0:?} is no compression device: give compress_isal, compress_zlib or the PCI address of a BlueField"
    )]
    NotCompress(String),
    /// ISA-L's library is missing.
    #[error("{0:?} needs ISA-L: apt-get install libisal2, or take compress_zlib")]
    IsalMissing(String),
    /// It is open already.
    #[error("compression device {0:?} is already open")]
    AlreadyOpen(String),
    /// It cannot decompress Deflate as it is written here.
    #[error("compression device {name:?} cannot decompress Deflate with a window of 32 KiB; it has {found}")]
    NoDeflate {
        /// The device.
        name: String,
        /// What it has.
        found: String,
    },
    /// A number that no device can have.
    #[error("compression device {name:?}: {what}")]
    BadConfig {
        /// The device.
        name: String,
        /// What is wrong with which number.
        what: String,
    },
    /// The pool of ops or of destination mbufs could not be made.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// Too little memory.
    #[error(
        "no memory for the buffers of compression device {name:?} ({mib} MiB): reserve more hugepages \
         (`hugepages/setup.sh config`), or give the EAL more (-m)"
    )]
    NoMemory {
        /// The device.
        name: String,
        /// What its buffers take.
        mib: usize,
    },
    /// The driver refused.
    #[error("compression device {name:?}: {step} failed: {reason}")]
    Failed {
        /// The device.
        name: String,
        /// What was being done.
        step: &'static str,
        /// DPDK's message.
        reason: String,
    },
}

/// Turns a driver's answer into an error that names what was being done.
pub(crate) fn check(name: &str, step: &'static str, code: c_int) -> Result<(), CompressError> {
    if code >= 0 {
        return Ok(());
    }
    Err(CompressError::Failed { name: name.to_owned(), step, reason: crate::error_text(code) })
}

/// Why an op cannot take a source. Nothing was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// The device cannot read a chain, and the bytes fit no mbuf of their own.
    #[error("{bytes} bytes are more than the {most} that the device takes in one piece")]
    SourceTooLong {
        /// Bytes to decompress.
        bytes: usize,
        /// What a source buffer takes.
        most: usize,
    },
    /// More bytes are expected than a destination takes.
    #[error("{bytes} bytes are more than the {most} of a destination")]
    OutputTooLong {
        /// Bytes expected.
        bytes: usize,
        /// What a destination takes.
        most: usize,
    },
    /// Nothing to decompress, or the range does not start in the first buffer of the chain or does not reach its end.
    #[error("the range must start in the first buffer of the chain and end with it")]
    Range,
}

/// How an op failed. The destination's content is undefined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpError {
    /// It was not enqueued, or not yet dequeued.
    #[error("the op has not been processed")]
    NotProcessed,
    /// The device says that the bytes or the arguments are wrong.
    #[error("the device cannot decompress it (status {0})")]
    Device(u8),
    /// The stream goes on beyond the destination.
    #[error("the stream holds more bytes than it must")]
    OutOfSpace,
    /// The stream ended before or after it must.
    #[error("the stream holds {got_bytes} bytes, it must hold {expected_bytes}")]
    Length {
        /// What came out.
        got_bytes: usize,
        /// What was expected.
        expected_bytes: usize,
    },
}
