//! What is known of a port before it is opened.

use std::ffi::CStr;
use std::fmt;
use std::sync::Arc;

use crate::eal::{Eal, EalInner};
use crate::port::Port;
use crate::port_config::{RSS_UDP, RX_UDP};
use crate::port_error::PortError;
use crate::port_setup::{find, info};

/// A port's device and what of it bears on receiving into device memory.
pub struct PortProbe {
    driver: String,
    device: *mut dpdk_sys::rte_device,
    is_virtual: bool,
    splits: bool,
    checks_udp: bool,
    spreads: bool,
    max_rx_queues: u16,
    _eal: Arc<EalInner>,
}

/// Why a port cannot receive into device memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SplitUnfit {
    /// It is no hardware.
    #[error("{driver} is a virtual device: it receives with the CPU, which cannot write to the memory")]
    Virtual {
        /// The driver.
        driver: String,
    },
    /// Headers and data would land together.
    #[error(
        "{driver} cannot put headers and data into different memory (RTE_ETH_RX_OFFLOAD_BUFFER_SPLIT, 2 pools)"
    )]
    NoSplit {
        /// The driver.
        driver: String,
    },
    /// Nobody could check what the CPU cannot read.
    #[error("{driver} does not check UDP checksums (RTE_ETH_RX_OFFLOAD_UDP_CKSUM), and nobody else could")]
    NoChecksum {
        /// The driver.
        driver: String,
    },
    /// Other packets could not be kept away from those queues.
    #[error("{driver} has no RSS table that would keep other packets away from the queues")]
    NoSpread {
        /// The driver.
        driver: String,
    },
    /// Each queue needs a second one.
    #[error("{driver} has {most} receive queues, and {asked} are needed: two for each rx lcore")]
    TooManyQueues {
        /// The driver.
        driver: String,
        /// What is needed.
        asked: u16,
        /// What it has.
        most: u16,
    },
}

impl Port {
    /// Looks at a port that is not open; `name` is as for [`Port::open`], and the device is attached likewise.
    ///
    /// # Errors
    /// When there is no such port.
    pub fn probe(eal: &Eal, name: &str) -> Result<PortProbe, PortError> {
        let id = find(eal, name)?;
        let info = info(id, name)?;
        // SAFETY: the names of driver and bus are constant strings, the device exists.
        let (driver, bus) = unsafe {
            (CStr::from_ptr(info.driver_name), CStr::from_ptr(dpdk_sys::shim_device_bus(info.device)))
        };
        Ok(PortProbe {
            driver: driver.to_string_lossy().into_owned(),
            device: info.device,
            is_virtual: bus.to_bytes() == b"vdev",
            // SAFETY: only reads the structure.
            splits: unsafe { dpdk_sys::shim_splits_packets(&raw const info, 2) } != 0,
            checks_udp: info.rx_offload_capa & RX_UDP != 0,
            spreads: info.flow_type_rss_offloads & RSS_UDP != 0 && info.reta_size > 0,
            max_rx_queues: info.max_rx_queues,
            _eal: Arc::clone(eal.inner()),
        })
    }
}

impl PortProbe {
    /// Name of the driver.
    #[must_use]
    pub fn driver(&self) -> &str {
        &self.driver
    }

    /// Whether it is no hardware.
    #[must_use]
    pub fn is_virtual(&self) -> bool {
        self.is_virtual
    }

    /// Whether the device can receive into device memory, with `queues` receive queues in all.
    ///
    /// # Errors
    /// What it lacks.
    pub fn can_split(&self, queues: u16) -> Result<(), SplitUnfit> {
        let driver = self.driver.clone();
        if self.is_virtual {
            return Err(SplitUnfit::Virtual { driver });
        }
        if !self.splits {
            return Err(SplitUnfit::NoSplit { driver });
        }
        if !self.checks_udp {
            return Err(SplitUnfit::NoChecksum { driver });
        }
        if !self.spreads {
            return Err(SplitUnfit::NoSpread { driver });
        }
        if queues > self.max_rx_queues {
            return Err(SplitUnfit::TooManyQueues { driver, asked: queues, most: self.max_rx_queues });
        }
        Ok(())
    }

    pub(crate) fn device(&self) -> *mut dpdk_sys::rte_device {
        self.device
    }
}

impl fmt::Debug for PortProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortProbe").field("driver", &self.driver).finish_non_exhaustive()
    }
}
