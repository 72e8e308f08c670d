//! Two ports joined back to back by rings, for tests and for a store and a data plane in one process.

use std::ffi::CString;
use std::ptr::NonNull;
use std::sync::{Arc, PoisonError};

use dpdk_sys::{rte_mbuf, rte_ring};

use crate::eal::EalInner;
use crate::port_error::{PortError, check};
use crate::ring::create;

/// The rings of a pair of ports. They outlive both; packets that are still in them then are freed.
#[derive(Debug)]
pub(crate) struct SharedRings {
    rings: Vec<NonNull<rte_ring>>,
}

// SAFETY: only the last owner touches them, by when no port uses them any more.
unsafe impl Send for SharedRings {}
// SAFETY: as above.
unsafe impl Sync for SharedRings {}

impl Drop for SharedRings {
    fn drop(&mut self) {
        for ring in &self.rings {
            let mut mbuf: *mut rte_mbuf = std::ptr::null_mut();
            // SAFETY: both ports are closed, so the mbufs in the ring are nobody else's; the ring is freed once.
            unsafe {
                while dpdk_sys::shim_ring_dequeue_burst(ring.as_ptr(), (&raw mut mbuf).cast(), 1) == 1 {
                    dpdk_sys::shim_mbuf_free(mbuf);
                }
                dpdk_sys::rte_ring_free(ring.as_ptr());
            }
        }
    }
}

/// Makes the ports `net_ring_<name>a` and `net_ring_<name>b`.
pub(crate) fn make(
    eal: &EalInner,
    name: &str,
    queues: u16,
    entries: u32,
) -> Result<(String, String), PortError> {
    let failed = |reason: String| PortError::Failed {
        port: name.to_owned(),
        step: "making a pair of ring ports",
        reason,
    };
    if queues == 0 || queues > 16 {
        return Err(failed(format!("{queues} queues were asked for, a ring port has 1 to 16")));
    }
    let mut rings = SharedRings { rings: Vec::new() };
    for direction in ["ab", "ba"] {
        for queue in 0..queues {
            // A queue has one lcore at each end.
            let flags = dpdk_sys::RING_F_SP_ENQ | dpdk_sys::RING_F_SC_DEQ;
            let ring = create(&format!("{name}_{direction}{queue}"), entries, flags);
            rings.rings.push(ring.map_err(|error| failed(error.to_string()))?);
        }
    }
    let (a_to_b, b_to_a) = rings.rings.split_at(usize::from(queues));
    let a = port_on(&format!("{name}a"), b_to_a, a_to_b)?;
    let b = port_on(&format!("{name}b"), a_to_b, b_to_a)?;
    let rings = Arc::new(rings);
    let mut registered = eal.ring_ports.lock().unwrap_or_else(PoisonError::into_inner);
    registered.insert(a.clone(), Arc::clone(&rings));
    registered.insert(b.clone(), rings);
    Ok((a, b))
}

fn port_on(
    name: &str,
    receive: &[NonNull<rte_ring>],
    send: &[NonNull<rte_ring>],
) -> Result<String, PortError> {
    let step = "making a ring port";
    let failed = |reason: &str| PortError::Failed { port: name.to_owned(), step, reason: reason.to_owned() };
    let c_name = CString::new(name).map_err(|_| failed("a NUL byte in the name"))?;
    let count = u32::try_from(receive.len()).map_err(|_| failed("too many queues"))?;
    // SAFETY: `count` rings each way, which outlive the port; the name and the arrays are copied. 0 is a NUMA node that always exists.
    let id = unsafe {
        dpdk_sys::rte_eth_from_rings(
            c_name.as_ptr(),
            receive.as_ptr().cast_mut().cast(),
            count,
            send.as_ptr().cast_mut().cast(),
            count,
            0,
        )
    };
    // SAFETY: reads a thread-local variable.
    check(name, step, if id < 0 { -unsafe { dpdk_sys::shim_errno() }.max(1) } else { id })?;
    Ok(format!("net_ring_{name}"))
}
