//! The steps from a port's name to a device that can be started.

use std::ffi::{CStr, CString};
use std::ptr;

use dpdk_sys::rte_eth_dev_info;

use crate::eal::Eal;
use crate::pool::Pool;
use crate::port_config::{Plan, PortConfig, RX_SCATTER};
use crate::port_error::{PortError, check};
use crate::rss::{MICROSOFT_KEY, Rss};
use crate::split::SplitPools;

pub(crate) fn find(eal: &Eal, name: &str) -> Result<u16, PortError> {
    let device = name.split(',').next().unwrap_or(name);
    if let Some(id) = by_name(device).or_else(|| by_number(device)) {
        return Ok(id);
    }
    let is_pci = device.contains(':') && device.contains('.');
    if is_pci || device != name {
        eal.attach(name)?;
        if let Some(id) = by_name(device) {
            return Ok(id);
        }
    }
    let known: Vec<String> =
        (0..u16::MAX).take_while(|&id| id < MAX_PORTS).filter(|&id| exists(id)).map(port_name).collect();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    Err(PortError::NoSuchPort { port: name.to_owned(), known })
}

/// Ports that DPDK has room for; far more than any build is made with.
const MAX_PORTS: u16 = 1024;

fn exists(id: u16) -> bool {
    // SAFETY: accepts any number.
    unsafe { dpdk_sys::rte_eth_dev_is_valid_port(id) == 1 }
}

fn by_number(name: &str) -> Option<u16> {
    name.parse().ok().filter(|&id| exists(id))
}

fn by_name(name: &str) -> Option<u16> {
    let name = CString::new(name).ok()?;
    let mut id = 0;
    // SAFETY: reads a C string, writes a number.
    let code = unsafe { dpdk_sys::rte_eth_dev_get_port_by_name(name.as_ptr(), &raw mut id) };
    (code == 0).then_some(id)
}

pub(crate) fn port_name(id: u16) -> String {
    let mut name = [0_u8; 256];
    // SAFETY: writes at most RTE_ETH_NAME_MAX_LEN (64) bytes, or nothing.
    unsafe { dpdk_sys::rte_eth_dev_get_name_by_port(id, name.as_mut_ptr().cast()) };
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    String::from_utf8_lossy(&name[..end]).into_owned()
}

pub(crate) fn info(id: u16, name: &str) -> Result<rte_eth_dev_info, PortError> {
    let mut info = rte_eth_dev_info::default();
    // SAFETY: the port exists; the structure is written or stays as it is.
    check(name, "asking for the device's limits", unsafe {
        dpdk_sys::rte_eth_dev_info_get(id, &raw mut info)
    })?;
    Ok(info)
}

/// What follows the name in the device's arguments.
pub(crate) fn device_arguments(device: *mut dpdk_sys::rte_device) -> String {
    // SAFETY: the device of an existing port.
    let arguments = unsafe { dpdk_sys::shim_device_arguments(device) };
    if arguments.is_null() {
        return String::new();
    }
    // SAFETY: a C string that lives as long as the device.
    unsafe { CStr::from_ptr(arguments) }.to_string_lossy().into_owned()
}

/// Configures the device. Returns the RSS key that it was given; one that refuses it keeps its own.
pub(crate) fn configure(
    id: u16,
    name: &str,
    config: &PortConfig,
    info: &rte_eth_dev_info,
    plan: &Plan,
) -> Result<Option<Vec<u8>>, PortError> {
    let step = "configuring the device";
    // SAFETY: the port exists and is not started; what the structure points to outlives the call.
    let apply =
        |conf| unsafe { dpdk_sys::rte_eth_dev_configure(id, config.rx_queues, config.tx_queues, conf) };
    let mut conf = plan.conf;
    if plan.capabilities.rss && info.hash_key_size > 0 {
        let mut key: Vec<u8> =
            MICROSOFT_KEY.iter().copied().cycle().take(usize::from(info.hash_key_size)).collect();
        conf.rx_adv_conf.rss_conf.rss_key = key.as_mut_ptr();
        conf.rx_adv_conf.rss_conf.rss_key_len = info.hash_key_size;
        if apply(&raw const conf) == 0 {
            return Ok(Some(key));
        }
        conf.rx_adv_conf.rss_conf.rss_key = ptr::null_mut();
        conf.rx_adv_conf.rss_conf.rss_key_len = 0;
    }
    check(name, step, apply(&raw const conf))?;
    Ok(None)
}

/// Sets up all queues. If the driver refuses to split packets, those queues are set up like the others, and the result is why.
pub(crate) fn set_up_queues(
    id: u16,
    name: &str,
    config: &PortConfig,
    info: &rte_eth_dev_info,
    plan: &Plan,
    (pools, split): (&[Pool], &[SplitPools]),
) -> Result<Option<PortError>, PortError> {
    let (mut rx_descriptors, mut tx_descriptors) = (config.rx_descriptors, config.tx_descriptors);
    // SAFETY: the port is configured; the numbers are brought into its limits.
    let code = unsafe {
        dpdk_sys::rte_eth_dev_adjust_nb_rx_tx_desc(id, &raw mut rx_descriptors, &raw mut tx_descriptors)
    };
    check(name, "choosing the number of descriptors", code)?;
    // SAFETY: the port exists.
    let node = unsafe { dpdk_sys::rte_eth_dev_socket_id(id) };
    #[expect(clippy::cast_sign_loss, reason = "C passes SOCKET_ID_ANY, which is -1, as unsigned")]
    let node = node as u32;
    let mut refused = None;
    for (queue, pools) in (0..config.rx_queues).skip(pools.len() - split.len()).zip(split) {
        let mut parts = [
            rx_part(pools.head.as_ref().unwrap_or(pools.tail.pool()), pools.at_bytes),
            // As much as its buffers take.
            rx_part(pools.tail.pool(), 0),
        ];
        let mut conf = info.default_rxconf;
        conf.offloads = plan.conf.rxmode.offloads | RX_SCATTER | dpdk_sys::RTE_ETH_RX_OFFLOAD_BUFFER_SPLIT;
        conf.rx_seg = parts.as_mut_ptr();
        conf.rx_nseg = 2;
        // SAFETY: the queue exists; the port holds the pools; the parts are read before the call returns.
        let code = unsafe {
            dpdk_sys::rte_eth_rx_queue_setup(
                id,
                queue,
                rx_descriptors,
                node,
                &raw const conf,
                ptr::null_mut(),
            )
        };
        if let Err(error) = check(name, "setting up a receive queue that splits packets", code) {
            refused = Some(error);
            break;
        }
    }
    let plain = pools.len() - if refused.is_none() { split.len() } else { 0 };
    for (queue, pool) in (0..config.rx_queues).zip(&pools[..plain]) {
        let mut conf = info.default_rxconf;
        conf.offloads = plan.conf.rxmode.offloads;
        // SAFETY: the queue exists; the port holds the pool.
        let code = unsafe {
            dpdk_sys::rte_eth_rx_queue_setup(id, queue, rx_descriptors, node, &raw const conf, pool.raw())
        };
        check(name, "setting up a receive queue", code)?;
    }
    for queue in 0..config.tx_queues {
        let mut conf = info.default_txconf;
        conf.offloads = plan.conf.txmode.offloads;
        // SAFETY: the queue exists.
        let code =
            unsafe { dpdk_sys::rte_eth_tx_queue_setup(id, queue, tx_descriptors, node, &raw const conf) };
        check(name, "setting up a transmit queue", code)?;
    }
    Ok(refused)
}

fn rx_part(pool: &Pool, length: u16) -> dpdk_sys::rte_eth_rxseg {
    let split = dpdk_sys::rte_eth_rxseg_split { mp: pool.raw(), length, offset: 0, proto_hdr: 0 };
    dpdk_sys::rte_eth_rxseg { split }
}

/// Leaves the queues from `queues` on out of the table by which the device spreads packets.
pub(crate) fn keep_away(id: u16, name: &str, info: &rte_eth_dev_info, queues: u16) -> Result<(), PortError> {
    let group = usize::try_from(dpdk_sys::RTE_ETH_RETA_GROUP_SIZE).unwrap_or(64);
    let mut groups =
        vec![dpdk_sys::rte_eth_rss_reta_entry64::default(); usize::from(info.reta_size).div_ceil(group)];
    let entries = groups.iter_mut().flat_map(|entries| {
        entries.mask = u64::MAX;
        &mut entries.reta
    });
    entries.zip((0..queues).cycle()).for_each(|(entry, queue)| *entry = queue);
    // SAFETY: the port is configured; there are as many groups as `reta_size` entries need.
    let code = unsafe { dpdk_sys::rte_eth_dev_rss_reta_update(id, groups.as_mut_ptr(), info.reta_size) };
    check(name, "keeping other packets away from the queues that split packets", code)
}

/// Reads back key and indirection table. A device that does not tell its key has the one that it was given.
pub(crate) fn read_rss(id: u16, info: &rte_eth_dev_info, given: Option<Vec<u8>>) -> Option<Rss> {
    let mut key = vec![0_u8; usize::from(info.hash_key_size)];
    let mut conf = dpdk_sys::rte_eth_rss_conf {
        rss_key: key.as_mut_ptr(),
        rss_key_len: info.hash_key_size,
        ..Default::default()
    };
    // SAFETY: the port is started; at most `rss_key_len` bytes are written.
    let told = unsafe { dpdk_sys::rte_eth_dev_rss_hash_conf_get(id, &raw mut conf) } == 0
        && key.iter().any(|&byte| byte != 0);
    let key = if told { key } else { given? };
    let group = dpdk_sys::RTE_ETH_RETA_GROUP_SIZE as usize;
    let mut groups =
        vec![dpdk_sys::rte_eth_rss_reta_entry64::default(); usize::from(info.reta_size).div_ceil(group)];
    groups.iter_mut().for_each(|entries| entries.mask = u64::MAX);
    // SAFETY: there are as many groups as `reta_size` entries need.
    let code = unsafe { dpdk_sys::rte_eth_dev_rss_reta_query(id, groups.as_mut_ptr(), info.reta_size) };
    if code != 0 {
        return None;
    }
    let entries = groups.iter().flat_map(|entries| entries.reta).take(usize::from(info.reta_size));
    Some(Rss { key, reta: entries.collect() })
}
