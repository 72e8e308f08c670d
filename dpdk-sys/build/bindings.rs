//! Which of DPDK's declarations are bound.

use super::Dpdk;
use std::path::Path;

const FUNCTIONS: &[&str] = &[
    "shim_.*",
    "rte_(version|strerror|eal_.*|dev_.*|lcore_.*|get_main_lcore|get_next_lcore|socket_.*|log_.*|openlog_stream)",
    "rte_(get_tsc_hz|delay_us_block|malloc_.*|free|mem_.*)",
    "rte_(mempool|pktmbuf|mbuf|ring)_.*",
    "rte_extmem_(un)?register",
    "rte_mcfg_get_single_file_segments",
    "rte_eth_.*",
    "rte_compressdev_.*|rte_comp_.*",
];

const TYPES: &[&str] = &[
    "shim_.*",
    "rte_mbuf",
    "rte_mbuf_ext_shared_info",
    "rte_pktmbuf_extmem",
    "rte_iova_mode",
    "rte_mempool",
    "rte_ring",
    "rte_eth_.*",
    "rte_comp_.*",
    "rte_compressdev_.*",
    "rte_lcore_.*",
];

const VARIABLES: &[&str] = &[
    "SHIM_.*",
    "RTE_(VERSION|MAX_LCORE|PKTMBUF_HEADROOM|MEMPOOL_CACHE_MAX_SIZE|MBUF_MAX_NB_SEGS|LOG_.*)",
    "RTE_ETH(ER)?_.*",
    "RTE_MBUF_F_.*",
    "RTE_IOVA_.*",
    "RTE_COMP(DEV)?_.*",
    "RING_F_.*",
    "SOCKET_ID_ANY|LCORE_ID_ANY",
];

/// Types that Rust cannot lay out (bit fields that are packed and aligned at once). None is reached through these bindings.
const OPAQUE: &[&str] =
    &["rte_arp_hdr", "rte_arp_ipv4", "rte_l2tpv2_combined_msg_hdr", "rte_gtp_psc_generic_hdr"];

/// Gives flags of 64-bit words that type in every release: by their values some would be `u32`, and which ones changes.
#[derive(Debug)]
struct WideFlags;

impl bindgen::callbacks::ParseCallbacks for WideFlags {
    fn int_macro(&self, name: &str, _value: i64) -> Option<bindgen::callbacks::IntKind> {
        let prefixes = ["RTE_MBUF_F_", "RTE_ETH_RX_OFFLOAD_", "RTE_ETH_TX_OFFLOAD_", "RTE_ETH_RSS_"];
        prefixes.iter().any(|prefix| name.starts_with(prefix)).then_some(bindgen::callbacks::IntKind::U64)
    }
}

pub(crate) fn generate(dpdk: &Dpdk, out: &Path) {
    let mut builder = bindgen::Builder::default()
        .header("shim/shim.h")
        .clang_args(&dpdk.cflags)
        .rust_edition(bindgen::RustEdition::Edition2024)
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .derive_default(true)
        .generate_comments(false)
        .parse_callbacks(Box::new(WideFlags))
        .layout_tests(true)
        // Most flags are `RTE_BIT64(n)` or contain casts, which only a compiler can evaluate.
        .clang_macro_fallback()
        .clang_macro_fallback_build_dir(out);
    for pattern in FUNCTIONS {
        builder = builder.allowlist_function(pattern);
    }
    for pattern in TYPES {
        builder = builder.allowlist_type(pattern);
    }
    for pattern in VARIABLES {
        builder = builder.allowlist_var(pattern);
    }
    for pattern in OPAQUE {
        builder = builder.opaque_type(pattern);
    }
    let bindings = builder.generate().unwrap_or_else(|error| {
        panic!(
            "cannot bind DPDK {}: {error}. Is libclang installed (apt-get install libclang-dev)?",
            dpdk.version
        )
    });
    bindings.write_to_file(out.join("bindings.rs")).expect("OUT_DIR is writable");
}
