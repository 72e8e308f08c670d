//! What `shadowserve doctor` finds out about GPUDirect: every step towards a NIC that writes to GPU memory that can be taken here.

use std::path::Path;
use std::sync::Arc;

use dpdk::{DeviceMemory, DevicePool, Eal, OpenPort, Port, PortConfig, SplitPools};
use gpu_dma::cuda::Cuda;
use gpu_dma::{DeviceIndex, Driver, ReceiveMemory};
use hugepages::DeviceWritable;

use crate::doctor::{Finding, graded};

/// A port that fills buffers without a look at them.
pub(crate) const NULL_PORT: &str = "net_null9";

/// Buffers that are made to try.
const BUFFERS: u32 = 256;
const BUFFER_BYTES: u16 = 2048;

pub(crate) fn finding(eal: &Result<Eal, String>, port: Option<&str>) -> Finding {
    let (mut steps, mut is_good) = (Vec::new(), true);
    let mut take = |step: Result<String, String>| {
        is_good &= step.is_ok();
        steps.push(step.unwrap_or_else(|why| why));
    };
    match (gpu_memory(), eal) {
        (Ok((memory, what)), Ok(eal)) => {
            take(Ok(what));
            match DeviceMemory::register(eal, memory) {
                Ok(registered) => {
                    take(buffers(eal, &registered));
                    if let Some(port) = port {
                        take(of_port(eal, port, Some(&registered)));
                    }
                }
                Err(error) => take(Err(error.to_string())),
            }
        }
        (memory, Ok(eal)) => {
            take(memory.map(|(_, what)| what));
            if let Some(port) = port {
                take(of_port(eal, port, None));
            }
        }
        (_, Err(error)) => take(Err(error.clone())),
    }
    take(Ok(peer_memory()));
    if port.is_none() {
        steps.push("no port was looked at (--port)".to_owned());
    }
    Finding {
        name: "gpudirect",
        grade: graded(is_good),
        found: steps.join("; "),
        advice: "packets are received into host memory, and planes copied to the GPU, which needs none of this",
    }
}

/// GPU memory that a NIC may be let write to.
fn gpu_memory() -> Result<(Arc<ReceiveMemory>, String), String> {
    let cuda = Cuda::open(|number| number == 0).map_err(|error| error.to_string())?;
    if cuda.devices().is_empty() {
        return Err("no GPU".to_owned());
    }
    let driver: Arc<dyn Driver> = Arc::new(cuda);
    let bytes = usize::from(BUFFER_BYTES) * usize::try_from(BUFFERS).unwrap_or(0);
    let memory =
        ReceiveMemory::allocate(&driver, DeviceIndex(0), bytes).map_err(|error| error.to_string())?;
    let exported = if memory.dma_buf().is_some() {
        "is exported as a dma-buf"
    } else {
        "cannot be exported as a dma-buf"
    };
    Ok((Arc::new(memory), format!("GPU memory {exported}")))
}

/// Makes packet buffers in it, and has a driver hand them out that does not look at them.
fn buffers(eal: &Eal, memory: &DeviceMemory) -> Result<String, String> {
    let tail = DevicePool::new(eal, "gpudirect", memory, 0, BUFFERS, BUFFER_BYTES);
    let tail = tail.map_err(|error| error.to_string())?;
    let probe = Port::probe(eal, NULL_PORT).map_err(|error| error.to_string())?;
    memory.map(&probe).map_err(|error| error.to_string())?;
    let pools = SplitPools { head: None, tail, at_bytes: 0 };
    let config = PortConfig { rx_queues: 0, ..PortConfig::default() };
    let OpenPort { mut split_rx, .. } =
        Port::open_split(eal, NULL_PORT, &config, &[], &[pools]).map_err(|error| error.to_string())?;
    let received = split_rx.first_mut().map_or(0, |queue| {
        queue.receive();
        std::iter::from_fn(|| queue.take()).filter(|packet| packet.tail.is_some()).count()
    });
    if received == 0 {
        return Err("no driver hands out packet buffers in it".to_owned());
    }
    Ok(format!("DPDK knows it, and packet buffers in it were handed out by {}", probe.driver()))
}

/// What the port can do, and whether its driver takes the memory.
fn of_port(eal: &Eal, name: &str, memory: Option<&DeviceMemory>) -> Result<String, String> {
    let probe = Port::probe(eal, name).map_err(|error| error.to_string())?;
    probe.can_split(2).map_err(|error| format!("{name}: {error}"))?;
    let Some(memory) = memory else {
        return Ok(format!("{name}: {} can split packets and checks UDP checksums", probe.driver()));
    };
    memory.map(&probe).map_err(|error| format!("{name}: {error}"))?;
    Ok(format!("{name}: {} splits packets, checks UDP checksums and takes the memory", probe.driver()))
}

/// By this module the kernel lets a NIC write to GPU memory that is named by its address.
fn peer_memory() -> String {
    let is_loaded = Path::new("/sys/module/nvidia_peermem").exists();
    format!("the kernel module nvidia_peermem is {}loaded", if is_loaded { "" } else { "not " })
}
