//! Memory that is lent to devices, whoever made it.

use std::fmt;
use std::os::fd::BorrowedFd;

/// Memory that a device may write to at any time, as a NIC does that receives into it.
///
/// # Safety
/// From [`address`](Self::address) on there are [`bytes`](Self::bytes) bytes that are the implementer's alone: from when it was made until
/// after it was dropped they stay allocated, and there is no reference to any of them. Both methods always answer the same.
pub unsafe trait DeviceWritable: Send + Sync + fmt::Debug {
    /// The address of the first byte: this process's if [`is_cpu_memory`](Self::is_cpu_memory), else the one that its device knows
    /// it by, which nothing else in this process has.
    fn address(&self) -> usize;

    /// Its size.
    fn bytes(&self) -> usize;

    /// It as a dma-buf that begins with its first byte, for drivers that are given memory so.
    fn dma_buf(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Whether the CPU can read and write it too.
    fn is_cpu_memory(&self) -> bool;
}
