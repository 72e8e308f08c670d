//! Which libraries are linked, and how.

use super::{Dpdk, feature, pkg_config};
use std::path::{Path, PathBuf};
use std::process::Command;

/// DPDK's own libraries and the drivers that need nothing but them. Those that only newer or only older releases have are skipped
/// where they are absent, as are drivers of other processor families.
const LIBRARIES: &[&str] = &[
    "log",
    "argparse",
    "kvargs",
    "telemetry",
    "eal",
    "ring",
    "rcu",
    "mempool",
    "mbuf",
    "net",
    "meter",
    "ethdev",
    "hash",
    "pci",
    "timer",
    "cryptodev",
    "security",
    "vhost",
    "dmadev",
    "gso",
    "stack",
    "compressdev",
    "bus_pci",
    "bus_vdev",
    "bus_auxiliary",
    "mempool_ring",
    "mempool_stack",
    "mempool_bucket",
    "common_iavf",
    "net_ice",
    "net_i40e",
    "net_ixgbe",
    "net_ena",
    "net_virtio",
    "net_vhost",
    "net_af_packet",
    "net_tap",
    "net_ring",
    "net_null",
    "compress_zlib",
];

/// The ones that every supported release has: their absence means a broken installation.
const REQUIRED: &[&str] =
    &["eal", "ethdev", "mbuf", "mempool", "ring", "compressdev", "bus_vdev", "mempool_ring", "net_ring"];

/// Feature, drivers it adds, libraries they need in the order the linker wants them.
const WITH_LIBRARIES: &[(&str, &[&str], &[&str])] = &[
    ("mlx5", &["common_mlx5", "net_mlx5", "compress_mlx5"], &["mlx5", "ibverbs", "nl-route-3", "nl-3"]),
    ("af_xdp", &["net_af_xdp"], &["xdp", "bpf", "elf"]),
    ("pcap", &["net_pcap"], &["pcap"]),
    ("isal", &["compress_isal"], &[]),
];

/// What DPDK's libraries themselves need.
const BASE: &[&str] = &["z", "numa", "bsd", "md"];

pub(crate) fn link(dpdk: &Dpdk, out: &Path) {
    println!("cargo:rustc-link-search=native={}", dpdk.libdir.display());
    if feature("shared") { shared() } else { statically(dpdk, out) }
}

/// The application side alone; EAL loads the drivers from the folder that libdpdk was built with. net_ring is named because
/// its `rte_eth_from_rings` is called directly.
fn shared() {
    for flag in pkg_config(&["--libs", "libdpdk"]).split_whitespace() {
        if let Some(library) = flag.strip_prefix("-l") {
            println!("cargo:rustc-link-lib=dylib={library}");
        } else if let Some(folder) = flag.strip_prefix("-L") {
            println!("cargo:rustc-link-search=native={folder}");
        }
    }
    println!("cargo:rustc-link-lib=dylib=rte_net_ring");
}

fn statically(dpdk: &Dpdk, out: &Path) {
    for library in LIBRARIES {
        dpdk_library(dpdk, library);
    }
    renamed(dpdk, out, "net_memif", MEMIF_CALLS);
    let mut needed = Vec::new();
    for (name, drivers, libraries) in WITH_LIBRARIES {
        if feature(name) {
            for driver in *drivers {
                match *driver {
                    "common_mlx5" => renamed(dpdk, out, driver, MLX5_CALLS),
                    _ => dpdk_library(dpdk, driver),
                }
            }
            needed.extend_from_slice(libraries);
        }
    }
    needed.extend_from_slice(BASE);
    for library in needed {
        external(dpdk, library);
    }
    for library in ["m", "dl", "pthread"] {
        println!("cargo:rustc-link-lib=dylib={library}");
    }
}

/// Links one of DPDK's libraries whole: drivers announce themselves in constructors that nothing refers to.
fn dpdk_library(dpdk: &Dpdk, name: &str) {
    if dpdk.libdir.join(format!("librte_{name}.a")).exists() {
        println!("cargo:rustc-link-lib=static:+whole-archive,-bundle=rte_{name}");
    } else {
        assert!(
            !REQUIRED.contains(&name),
            "librte_{name}.a is not in {}: install libdpdk-dev, or build with the feature `shared`",
            dpdk.libdir.display()
        );
    }
}

/// Libraries whose static form lacks parts where the archive holds this name. Debian 13's libelf asks for zstd, which the program may
/// have of its own, and for functions of elfutils that no package has as an archive.
const INCOMPLETE: &[(&str, &str)] = &[("elf", "ZSTD_createCCtx")];

/// Calls of the memif driver that reach `shim/memif.c` and `shim/memif_zero_copy.c`, which mend what it does, instead.
const MEMIF_CALLS: &[&str] = &[
    "munmap=shim_memif_unmap",
    "rte_intr_callback_register=shim_memif_register",
    "rte_intr_instance_free=shim_memif_intr_free",
    "rte_memseg_walk=shim_memif_walk",
    "rte_memseg_get_fd=shim_memif_segment_fd",
];

/// A call of the mlx5 drivers that reaches `shim/mlx5.c`, which registers GPU memory by its dma-buf, instead.
const MLX5_CALLS: &[&str] = &["ibv_reg_mr_iova2=shim_ibv_reg_mr_iova2"];

/// Links a driver with some of the functions that it calls renamed to ours.
fn renamed(dpdk: &Dpdk, out: &Path, name: &str, calls: &[&str]) {
    let archive = dpdk.libdir.join(format!("librte_{name}.a"));
    assert!(
        archive.exists(),
        "{} is missing: install libdpdk-dev, or build with the feature `shared`",
        archive.display()
    );
    let renamed = out.join(format!("libshim_{name}.a"));
    let program = std::env::var("OBJCOPY").unwrap_or_else(|_| "objcopy".to_owned());
    let status = Command::new(&program)
        .args(calls.iter().flat_map(|call| ["--redefine-sym", call]))
        .args([&archive, &renamed])
        .status()
        .unwrap_or_else(|error| panic!("cannot run {program} ({error}): apt-get install binutils"));
    assert!(status.success(), "{program} could not copy {}", archive.display());
    println!("cargo:rustc-link-search=native={}", out.display());
    println!("cargo:rustc-link-lib=static:+whole-archive,-bundle=shim_{name}");
}

/// Links another project's library: statically where it is installed so and whole, dynamically otherwise.
fn external(dpdk: &Dpdk, name: &str) {
    let archives = search_path(&dpdk.libdir).into_iter().map(|folder| folder.join(format!("lib{name}.a")));
    let Some(archive) = archives.into_iter().find(|archive| archive.exists()) else {
        println!(
            "cargo:warning=lib{name}.a is not installed: the binary will need lib{name}.so where it runs"
        );
        println!("cargo:rustc-link-lib=dylib={name}");
        return;
    };
    let lacks_parts = |(library, symbol): &(&str, &str)| *library == name && holds(&archive, symbol);
    if INCOMPLETE.iter().any(lacks_parts) {
        println!("cargo:rustc-link-lib=dylib={name}");
        return;
    }
    if let Some(folder) = archive.parent() {
        println!("cargo:rustc-link-search=native={}", folder.display());
    }
    println!("cargo:rustc-link-lib=static:-bundle={name}");
}

fn holds(archive: &Path, symbol: &str) -> bool {
    let bytes = std::fs::read(archive).unwrap_or_default();
    bytes.windows(symbol.len()).any(|window| window == symbol.as_bytes())
}

fn search_path(libdir: &Path) -> Vec<PathBuf> {
    let mut folders = vec![libdir.to_owned()];
    if let Ok(architecture) = std::env::var("CARGO_CFG_TARGET_ARCH") {
        folders.push(PathBuf::from(format!("/usr/lib/{architecture}-linux-gnu")));
    }
    folders
}
