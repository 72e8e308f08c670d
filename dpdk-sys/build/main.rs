//! Generates the bindings, compiles the shim and names the libraries to link.

mod bindings;
mod link;

use std::env;
use std::path::PathBuf;
use std::process::Command;

/// What pkg-config says of the installed DPDK.
pub(crate) struct Dpdk {
    /// Compiler flags: include paths, the forced include of `rte_config.h`, the instruction set that its headers need.
    pub(crate) cflags: Vec<String>,
    /// Folder of `librte_*.a`.
    pub(crate) libdir: PathBuf,
    /// "22.11.11"
    pub(crate) version: String,
}

fn main() {
    for folder in ["build", "shim"] {
        println!("cargo:rerun-if-changed={folder}");
    }
    for variable in ["PKG_CONFIG_PATH", "PKG_CONFIG", "OBJCOPY"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let dpdk = Dpdk {
        cflags: pkg_config(&["--cflags", "libdpdk"]).split_whitespace().map(str::to_owned).collect(),
        libdir: PathBuf::from(pkg_config(&["--variable=libdir", "libdpdk"])),
        version: pkg_config(&["--modversion", "libdpdk"]),
    };
    check_version(&dpdk.version);
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    bindings::generate(&dpdk, &out);
    compile_shim(&dpdk);
    link::link(&dpdk, &out);
    println!("cargo:version={}", dpdk.version);
}

/// Whether this crate's feature of that name is on.
pub(crate) fn feature(name: &str) -> bool {
    env::var_os(format!("CARGO_FEATURE_{}", name.to_uppercase())).is_some()
}

/// Runs pkg-config and returns what it printed.
pub(crate) fn pkg_config(arguments: &[&str]) -> String {
    let program = env::var("PKG_CONFIG").unwrap_or_else(|_| "pkg-config".to_owned());
    let output = Command::new(&program).args(arguments).output().unwrap_or_else(|error| {
        panic!("cannot run {program} ({error}): apt-get install pkg-config libdpdk-dev")
    });
    assert!(
        output.status.success(),
        "DPDK is not installed (apt-get install libdpdk-dev), or PKG_CONFIG_PATH does not lead to libdpdk.pc: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("pkg-config prints text").trim().to_owned()
}

/// The bindings are tested with 22.11 and 24.11; older headers lack names that the shim uses.
fn check_version(version: &str) {
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let release = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    assert!(release >= (22, 11), "DPDK {version} is too old: 22.11 or newer is needed");
}

fn compile_shim(dpdk: &Dpdk) {
    let mut shim = cc::Build::new();
    // Interrupt handles, which memif.c needs, and all of compressdev have been "experimental" since 2021.
    shim.define("ALLOW_EXPERIMENTAL_API", None)
        .flag_if_supported("-Wno-address-of-packed-member")
        .opt_level(2)
        .file("shim/shim.c")
        .file("shim/compress.c")
        .file("shim/dma_buf.c")
        .file("shim/memif.c")
        .file("shim/memif_zero_copy.c");
    for flag in &dpdk.cflags {
        shim.flag(flag);
    }
    let linked_in = |name| feature(name) && !feature("shared");
    shim.file("shim/isal.c");
    if linked_in("isal") && dpdk.libdir.join("librte_compress_isal.a").exists() {
        shim.define("SHIM_ISAL_CALLS", None);
    }
    if linked_in("pcap") {
        shim.file("shim/pcap.c");
    }
    if linked_in("mlx5") {
        shim.file("shim/mlx5.c");
    }
    // Whole: nothing refers to the constructor in mlx5.c, or, before the drivers are linked, to the stand-ins in the others.
    shim.link_lib_modifier("+whole-archive").compile("dpdk_shim");
}
