//! One module per packet format. Each checks a packet once; what it returns cannot panic or lie outside it.
//!
//! Ethernet, ARP, IP and UDP are in network byte order; [`message`] and [`offer`], which are ours, are little-endian.

pub mod arp;
pub mod checksum;
pub mod ethernet;
pub mod icmp;
pub mod icmpv6;
pub mod ipv4;
pub mod ipv6;
pub mod message;
pub mod offer;
pub mod udp;

/// What an IP header says of congestion (RFC 3168).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Ecn {
    /// The sender does not answer marks, so that a router in need drops.
    #[default]
    NotCapable = 0,
    /// Marks are answered; in the experiments of RFC 9331 differently.
    Ect1 = 1,
    /// Marks are answered: what DATA is sent with.
    Ect0 = 2,
    /// A router's queue was long.
    CongestionExperienced = 3,
}

impl Ecn {
    /// The low two bits of the traffic class.
    #[inline]
    pub const fn from_bits(bits: u8) -> Ecn {
        match bits & 3 {
            0 => Ecn::NotCapable,
            1 => Ecn::Ect1,
            2 => Ecn::Ect0,
            _ => Ecn::CongestionExperienced,
        }
    }
}

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

/// Big-endian 32 bits from `at`.
#[inline(always)]
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(take(bytes, at))
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
