//! An EAL without hugepages, NICs or privileges, one per test process.

#![allow(dead_code, reason = "each test file uses a part of it")]

use dpdk::{Eal, EalConfig, Pool, PoolConfig};

/// Starts the EAL for a test file with these workers and virtual devices.
pub(crate) fn eal(lcores: Vec<usize>, vdevs: &[&str]) -> Eal {
    let config = EalConfig {
        lcores,
        file_prefix: format!("test-{}", std::process::id()),
        huge: false,
        memory_mib: Some(64),
        vdevs: vdevs.iter().map(|&vdev| vdev.to_owned()).collect(),
        extra: vec!["--no-pci".to_owned()],
        ..EalConfig::default()
    };
    Eal::start(&config).expect("the EAL starts without hugepages")
}

/// A small pool.
pub(crate) fn pool(eal: &Eal, name: &str, mbufs: u32) -> Pool {
    Pool::new(eal, name, PoolConfig { mbufs, cache: 0, ..PoolConfig::default() }).expect("a pool fits")
}
