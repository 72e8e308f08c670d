//! DPDK's C interface as Rust sees it: generated bindings, a shim for what C defines inline, nothing else.
//!
//! Everything here is `unsafe` and undecorated; the `dpdk` crate wraps it. `build/link.rs` says what is linked.

// The lints that generated code cannot meet.
#[allow(
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    unsafe_op_in_unsafe_fn,
    unreachable_pub
)]
#[allow(clippy::all, clippy::undocumented_unsafe_blocks, clippy::cast_possible_truncation)]
#[allow(clippy::cast_sign_loss, clippy::cast_possible_wrap, unnecessary_transmutes)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

pub use bindings::*;

// An allowlist pattern that matches nothing gives empty bindings and a green build: name what must be there, in its right size.
const _: () = assert!(size_of::<rte_mbuf>() == 128);
const _: () = assert!(align_of::<rte_mbuf>() == 64);
const _: () = assert!(size_of::<rte_eth_stats>() >= 7 * 8);
const _: () = assert!(SHIM_MBUF_BUF_ADDR == 0 && SHIM_MBUF_POOL < 128 && SHIM_MBUF_NEXT == 64);

// Flags of 64-bit words have that type.
const _: u64 = RTE_MBUF_F_RX_IP_CKSUM_GOOD | RTE_ETH_RX_OFFLOAD_UDP_CKSUM | RTE_ETH_RSS_NONFRAG_IPV4_UDP;
