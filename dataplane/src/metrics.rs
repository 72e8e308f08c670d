//! One JSON object of everything that the data plane counts.

use serde_json::{Map, Value, json};

use crate::gpu::Gpus;
use crate::latency::Latencies;
use crate::pipeline::{DirectState, Pipeline};
use crate::save::saves::Saves;

/// The report behind `shadowserve fetch --json` and [`control::Command::Stats`]; names are stable, units in the names.
pub(crate) fn report(
    pipeline: &Pipeline,
    gpus: &Gpus,
    saves: &Saves,
    latencies: &Latencies,
    clients: usize,
) -> Value {
    json!({
        "uptime_s": pipeline.clock.now_ns() / 1_000_000_000,
        "clients": clients,
        "counters": counters(pipeline),
        "transport": transport(pipeline),
        "save": save(pipeline, saves),
        "gpu": gpu(gpus),
        "gpudirect": gpudirect(pipeline),
        "stages": latencies.to_json(),
        "memory": memory(pipeline),
        "lcores": lcores(pipeline),
        "port": port(pipeline),
        "compress_device": compress_device(pipeline),
    })
}

/// Counts added up over the queues.
fn counters(pipeline: &Pipeline) -> Value {
    let mut sums = Map::new();
    for queue in &pipeline.queues {
        for (name, counter) in queue.planes.named() {
            add(&mut sums, name, &json!(counter.get()));
        }
        if let Value::Object(link) = queue.link.to_json() {
            link.iter().for_each(|(name, value)| add(&mut sums, name, value));
        }
    }
    Value::Object(sums)
}

/// What was asked of stores, lost, and asked of replicas, added up over the queues.
fn transport(pipeline: &Pipeline) -> Value {
    let mut sums = Map::new();
    for (name, counter) in pipeline.queues.iter().flat_map(|queue| queue.fetch.named()) {
        add(&mut sums, name, &json!(counter.get()));
    }
    Value::Object(sums)
}

/// What was encoded and put, added up over lcores and queues; buffers that are free.
fn save(pipeline: &Pipeline, saves: &Saves) -> Value {
    let (mut encoders, mut offers) = (Map::new(), Map::new());
    for (name, counter) in pipeline.encoders.iter().flat_map(|counters| counters.named()) {
        add(&mut encoders, name, &json!(counter.get()));
    }
    for (name, counter) in pipeline.queues.iter().flat_map(|queue| queue.offers.named()) {
        add(&mut offers, name, &json!(counter.get()));
    }
    json!({ "encode": encoders, "offers": offers, "buffers_free": saves.free() })
}

/// `null` where no GPU is delivered to.
fn gpu(gpus: &Gpus) -> Value {
    let Some(driver) = &gpus.config.driver else { return Value::Null };
    let devices: Vec<Value> = driver
        .devices()
        .iter()
        .map(|device| json!({ "number": device.ordinal, "name": device.name, "memory_bytes": device.bytes }))
        .collect();
    let mut object = Map::new();
    object.insert("devices".into(), Value::Array(devices));
    object.insert("method".into(), driver.method().into());
    object.extend(gpus.health.named().map(|(name, count)| (name.to_owned(), count.into())));
    Value::Object(object)
}

/// `null` where it was not asked for.
fn gpudirect(pipeline: &Pipeline) -> Value {
    let refused = match &pipeline.direct {
        DirectState::Off => return Value::Null,
        DirectState::On => None,
        DirectState::Refused(why) => Some(why),
    };
    let (mut sums, mut buffers, mut in_use) = (Map::new(), 0, 0);
    for (counters, pool) in pipeline.queues.iter().filter_map(|queue| queue.direct.as_ref()) {
        for (name, counter) in counters.named() {
            add(&mut sums, name, &json!(counter.get()));
        }
        buffers += pool.capacity();
        in_use += pool.in_use();
    }
    json!({ "refused": refused, "counters": sums, "buffers": buffers, "buffers_in_use": in_use })
}

fn add(sums: &mut Map<String, Value>, name: &str, value: &Value) {
    match (sums.get_mut(name), value) {
        (None, _) => {
            sums.insert(name.to_owned(), value.clone());
        }
        (Some(Value::Object(sum)), Value::Object(more)) => {
            more.iter().for_each(|(name, value)| add(sum, name, value));
        }
        (Some(sum), more) => *sum = json!(sum.as_u64().unwrap_or(0) + more.as_u64().unwrap_or(0)),
    }
}

fn memory(pipeline: &Pipeline) -> Value {
    let mbufs: u32 = pipeline.queues.iter().map(|queue| queue.pool.capacity()).sum();
    let in_use: u32 = pipeline.queues.iter().map(|queue| queue.pool.in_use()).sum();
    json!({
        "mbufs": mbufs,
        "mbufs_in_use": in_use,
        "slots": pipeline.slot_count,
        "slot_bytes": pipeline.slot_bytes,
        "slots_free": pipeline.slots.len(),
        "slot_pages": pipeline.slot_pages.to_string(),
        "decode_scratch_bytes": pipeline.scratch_bytes,
        "decode_backlog_planes": pipeline.decode_backlog.len(),
        "resident_peak_kib": status_kib("VmHWM:"),
        "hugetlb_kib": status_kib("HugetlbPages:"),
    })
}

fn lcores(pipeline: &Pipeline) -> Value {
    let lcores = pipeline.lcores.iter().map(|lcore| {
        let stages: Vec<&str> = lcore.stages.iter().map(|stage| stage.name()).collect();
        json!({
            "cpu": lcore.cpu,
            "stages": stages,
            "busy_loops": lcore.counters.busy_loops.get(),
            "idle_loops": lcore.counters.idle_loops.get(),
            "busy_us": lcore.counters.busy_ns.get() / 1_000,
        })
    });
    Value::Array(lcores.collect())
}

fn port(pipeline: &Pipeline) -> Value {
    let stats = pipeline.port.stats();
    json!({
        "driver": pipeline.port.driver(),
        "link_up": pipeline.port.link_up(),
        "rx_packets": stats.rx_packets,
        "rx_bytes": stats.rx_bytes,
        "rx_missed": stats.rx_missed,
        "rx_errors": stats.rx_errors,
        "rx_nombuf": stats.rx_nombuf,
        "tx_packets": stats.tx_packets,
        "tx_bytes": stats.tx_bytes,
        "tx_errors": stats.tx_errors,
    })
}

/// Null without a device.
fn compress_device(pipeline: &Pipeline) -> Value {
    let Some(device) = &pipeline.compress_dev else { return Value::Null };
    let mut counts = Map::new();
    for counters in &pipeline.offloads {
        for (name, counter) in counters.named() {
            add(&mut counts, name, &json!(counter.get()));
        }
    }
    json!({
        "name": device.name(),
        "driver": device.capabilities().driver,
        "hardware": device.capabilities().hardware,
        "reads_chains": device.reads_chains(),
        "max_output_bytes": device.max_output_bytes(),
        "counters": counts,
    })
}

/// A size from the kernel's account of this process; 0 where it does not say. `VmHWM` is the most that it has had in
/// ordinary pages, `HugetlbPages` what it has in hugepages.
fn status_kib(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
