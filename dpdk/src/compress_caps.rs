//! What a compression device can do.

use std::ffi::CStr;
use std::fmt;

/// A compression algorithm that DPDK knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CompressAlgorithm {
    /// RFC 1951.
    Deflate,
    /// RFC 2395.
    Lzs,
    /// LZ4, from DPDK 23.03 on.
    Lz4,
}

impl CompressAlgorithm {
    /// Every algorithm.
    pub const ALL: [Self; 3] = [Self::Deflate, Self::Lzs, Self::Lz4];

    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Deflate => "deflate",
            Self::Lzs => "lzs",
            Self::Lz4 => "lz4",
        }
    }

    fn number(self) -> dpdk_sys::shim_comp_algorithm {
        match self {
            Self::Deflate => dpdk_sys::SHIM_COMP_DEFLATE,
            Self::Lzs => dpdk_sys::SHIM_COMP_LZS,
            Self::Lz4 => dpdk_sys::SHIM_COMP_LZ4,
        }
    }
}

/// What a device can do with one algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressCapability {
    /// The algorithm.
    pub algorithm: CompressAlgorithm,
    /// Base-2 logarithms of the smallest and the largest window.
    pub window_log2: (u8, u8),
    features: u64,
}

impl CompressCapability {
    fn has(&self, feature: u32) -> bool {
        self.features & u64::from(feature) != 0
    }

    /// Whether it reads a chain of `source` mbufs and writes one of `destination`.
    #[must_use]
    pub fn takes_chains(&self, source: usize, destination: usize) -> bool {
        match (source > 1, destination > 1) {
            (false, false) => true,
            (true, true) => self.has(dpdk_sys::RTE_COMP_FF_OOP_SGL_IN_SGL_OUT),
            (true, false) => self.has(dpdk_sys::RTE_COMP_FF_OOP_SGL_IN_LB_OUT),
            (false, true) => self.has(dpdk_sys::RTE_COMP_FF_OOP_LB_IN_SGL_OUT),
        }
    }

    /// Whether operations that are under way at once may share what describes them to the device.
    #[must_use]
    pub fn shares_xforms(&self) -> bool {
        self.has(dpdk_sys::RTE_COMP_FF_SHAREABLE_PRIV_XFORM)
    }

    /// Checksums of the decompressed bytes that it can compute: "crc32", "adler32", "crc32+adler32". None is CRC32C.
    #[must_use]
    pub fn checksums(&self) -> Vec<&'static str> {
        let all = [
            (dpdk_sys::RTE_COMP_FF_CRC32_CHECKSUM, "crc32"),
            (dpdk_sys::RTE_COMP_FF_ADLER32_CHECKSUM, "adler32"),
            (dpdk_sys::RTE_COMP_FF_CRC32_ADLER32_CHECKSUM, "crc32+adler32"),
        ];
        all.into_iter().filter(|&(feature, _)| self.has(feature)).map(|(_, name)| name).collect()
    }
}

impl fmt::Display for CompressCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (least, most) = self.window_log2;
        write!(f, "{} (window 2^{least}", self.algorithm.name())?;
        if most != least {
            write!(f, " to 2^{most}")?;
        }
        let chains = match (self.takes_chains(2, 1), self.takes_chains(1, 2), self.takes_chains(2, 2)) {
            (_, _, true) => "chains in and out",
            (true, true, false) => "chains in or out",
            (true, false, false) => "chains in",
            (false, true, false) => "chains out",
            (false, false, false) => "no chains",
        };
        write!(f, ", {chains}")?;
        for checksum in self.checksums() {
            write!(f, ", {checksum}")?;
        }
        write!(f, ")")
    }
}

/// What a device says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompressCapabilities {
    /// Its driver: `compress_isal`, `mlx5_pci`.
    pub driver: String,
    /// Whether the work is done by hardware, not by the lcore that enqueues or dequeues.
    pub hardware: bool,
    /// Most queue pairs; `None` for no limit.
    pub max_queue_pairs: Option<u16>,
    /// Its algorithms.
    pub algorithms: Vec<CompressCapability>,
}

impl CompressCapabilities {
    /// What it can do with an algorithm; `None` if it does not have it.
    #[must_use]
    pub fn of(&self, algorithm: CompressAlgorithm) -> Option<CompressCapability> {
        self.algorithms.iter().copied().find(|found| found.algorithm == algorithm)
    }
}

impl fmt::Display for CompressCapabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.algorithms.is_empty() {
            return write!(f, "no algorithm");
        }
        for (index, algorithm) in self.algorithms.iter().enumerate() {
            write!(f, "{}{algorithm}", if index > 0 { ", " } else { "" })?;
        }
        write!(f, "{}", if self.hardware { ", hardware" } else { ", software" })
    }
}

/// Asks device `id`, which exists.
pub(crate) fn capabilities(id: u8) -> CompressCapabilities {
    let mut info = dpdk_sys::rte_compressdev_info::default();
    // SAFETY: the device exists; the structure is written or stays 0.
    unsafe { dpdk_sys::rte_compressdev_info_get(id, &raw mut info) };
    let driver = if info.driver_name.is_null() {
        String::new()
    } else {
        // SAFETY: a constant string of the driver.
        unsafe { CStr::from_ptr(info.driver_name) }.to_string_lossy().into_owned()
    };
    let ask = |algorithm: CompressAlgorithm| {
        let mut found = dpdk_sys::shim_comp_capability::default();
        // SAFETY: the device exists; the structure is written when there is something to say.
        let has = unsafe { dpdk_sys::shim_comp_capability(id, algorithm.number(), &raw mut found) } == 1;
        has.then_some(CompressCapability {
            algorithm,
            window_log2: (found.window_log2_min, found.window_log2_max),
            features: found.features,
        })
    };
    CompressCapabilities {
        driver,
        hardware: info.feature_flags & u64::from(dpdk_sys::RTE_COMPDEV_FF_HW_ACCELERATED) != 0,
        max_queue_pairs: Some(info.max_nb_queue_pairs).filter(|&most| most > 0),
        algorithms: CompressAlgorithm::ALL.into_iter().filter_map(ask).collect(),
    }
}
