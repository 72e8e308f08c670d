//! One module per packet format. Each checks a packet once; what it returns cannot panic or lie outside it.
//!
//! Ethernet, ARP, IP and UDP are in network byte order; [`message`] and [`offer`], which are ours, are little-endian.

pub mod arp;
pub mod checksum;
pub mod ethernet;
pub mod ipv4;
pub mod ipv6;
pub mod message;
pub mod offer;
pub mod udp;

/// The `N` bytes from `at`, of a packet that the caller has found to be long enough for a fixed layout.
///
/// With constant `at` and a length known by then this compiles to a plain load.
#[inline(always)]
pub(crate) fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// Big-endian 16 bits from `at`.
#[inline(always)]
pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(take(bytes, at))
}

/// Little-endian 16 bits from `at`.
#[inline(always)]
pub(crate) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(take(bytes, at))
}

/// Little-endian 32 bits from `at`.
#[inline(always)]
pub(crate) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(take(bytes, at))
}

/// Little-endian 64 bits from `at`.
#[inline(always)]
pub(crate) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(take(bytes, at))
}
