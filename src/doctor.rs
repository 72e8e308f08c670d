//! `shadowserve doctor`

use std::process::ExitCode;

use clap::Args;
use dpdk::{CompressDev, Eal, EalConfig, LogLevel};
use serde_json::{Map, Value, json};

use crate::gpudirect;
use crate::out::print_line;

#[derive(Debug, Args)]
pub(crate) struct Flags {
    /// Print one JSON object on standard output
    #[arg(long)]
    json: bool,
    /// Look at this port too, without opening it: a PCI address or a virtual device (0000:03:00.0, net_null0)
    #[arg(long, value_name = "DEVICE")]
    port: Option<String>,
}

/// How a finding bears on running here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Grade {
    /// As it should be.
    Good,
    /// Runs, but slower or with less.
    Lacking,
}

/// One thing that was looked at.
pub(crate) struct Finding {
    pub(crate) name: &'static str,
    pub(crate) grade: Grade,
    pub(crate) found: String,
    /// What to do about it, if it lacks something.
    pub(crate) advice: &'static str,
}

pub(crate) fn run(flags: &Flags) -> anyhow::Result<ExitCode> {
    let eal = start_eal(flags.port.as_deref());
    let findings = [
        dpdk(),
        drivers(),
        compress_devices(&eal),
        hugepages(),
        numa(),
        isolated_cores(),
        cpu_features(),
        cuda(),
        gpudirect::finding(&eal, flags.port.as_deref()),
    ];
    if flags.json {
        print_line!("{}", to_json(&findings))?;
        return Ok(ExitCode::SUCCESS);
    }
    for Finding { name, grade, found, advice } in &findings {
        let mark = if *grade == Grade::Good { "ok  " } else { "note" };
        print_line!("{mark}  {name:<15} {found}")?;
        if *grade == Grade::Lacking {
            print_line!("{:<22} -> {advice}", "")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn to_json(findings: &[Finding]) -> Value {
    let entries = findings.iter().map(|Finding { name, grade, found, advice }| {
        let lacking = *grade == Grade::Lacking;
        let advice = if lacking { json!(advice) } else { Value::Null };
        ((*name).to_owned(), json!({ "ok": !lacking, "found": found, "advice": advice }))
    });
    Value::Object(entries.collect::<Map<_, _>>())
}

pub(crate) fn graded(good: bool) -> Grade {
    if good { Grade::Good } else { Grade::Lacking }
}

fn dpdk() -> Finding {
    Finding { name: "dpdk", grade: Grade::Good, found: dpdk::version(), advice: "" }
}

fn drivers() -> Finding {
    let mut drivers = dpdk::drivers();
    drivers.sort();
    Finding {
        name: "drivers",
        grade: graded(!drivers.is_empty()),
        found: drivers.join(" "),
        advice: "this binary was linked without drivers: build it again with `make build`",
    }
}

/// An environment to try things in. One that is to look at a port may touch its bus.
fn start_eal(port: Option<&str>) -> Result<Eal, String> {
    let config = EalConfig {
        huge: false,
        memory_mib: Some(64),
        file_prefix: format!("shadowserve-doctor-{}", std::process::id()),
        log_level: LogLevel::Error,
        vdevs: vec![gpudirect::NULL_PORT.into()],
        extra: if port.is_some() { Vec::new() } else { vec!["--no-pci".into()] },
        ..EalConfig::default()
    };
    Eal::start(&config).map_err(|error| error.to_string())
}

/// What the linked compression drivers can do; those of hardware cannot be asked without its address.
fn compress_devices(eal: &Result<Eal, String>) -> Finding {
    let advice = "planes are decompressed on the lcores; for compress_isal: apt-get install libisal2";
    let finding = |grade, found| Finding { name: "compress", grade, found, advice };
    let eal = match eal {
        Ok(eal) => eal,
        Err(error) => return finding(Grade::Lacking, error.clone()),
    };
    let mut all_work = true;
    let told: Vec<String> = dpdk::drivers()
        .iter()
        .filter(|driver| driver.starts_with("compress_"))
        .map(|driver| match driver.as_str() {
            "compress_mlx5" => "compress_mlx5: give a BlueField's PCI address to --compress-dev".to_owned(),
            name => CompressDev::probe(eal, name).map_or_else(
                |error| {
                    all_work = false;
                    format!("{name}: {error}")
                },
                |capabilities| format!("{name}: {capabilities}"),
            ),
        })
        .collect();
    finding(graded(all_work && !told.is_empty()), told.join("; "))
}

fn hugepages() -> Finding {
    let pools = hugepages::status();
    let reserved: Vec<String> = pools
        .iter()
        .filter(|pool| pool.total_pages > 0)
        .map(|pool| {
            format!(
                "node {}: {} of {} pages of {} MiB free",
                pool.node,
                pool.free_pages,
                pool.total_pages,
                pool.page_bytes >> 20
            )
        })
        .collect();
    let free = pools.iter().any(|pool| pool.free_pages > 0);
    Finding {
        name: "hugepages",
        grade: graded(free),
        found: if reserved.is_empty() { "none reserved".into() } else { reserved.join("; ") },
        advice: "as root: HUGEMEM_MIB=1024 hugepages/setup.sh config (or run with --no-huge, slower)",
    }
}

fn numa() -> Finding {
    let nodes = std::fs::read_to_string("/sys/devices/system/node/online").unwrap_or_else(|_| "0".into());
    let nodes = nodes.trim().to_owned();
    let one = nodes == "0";
    Finding {
        name: "numa",
        grade: graded(one),
        found: format!("nodes {nodes}"),
        advice: "take lcores and hugepages of the node that the NIC and the GPU are on: see docs/HUGEPAGES.md",
    }
}

fn isolated_cores() -> Finding {
    let isolated = std::fs::read_to_string("/sys/devices/system/cpu/isolated").unwrap_or_default();
    let isolated = isolated.trim().to_owned();
    Finding {
        name: "isolated cores",
        grade: graded(!isolated.is_empty()),
        found: if isolated.is_empty() { "none".into() } else { isolated },
        advice: "the kernel may interrupt polling lcores: boot with isolcpus=CPUS nohz_full=CPUS and name them in --lcores",
    }
}

/// What the decoders can use.
fn cpu_features() -> Finding {
    #[cfg(target_arch = "x86_64")]
    let features = [
        ("sse4.2", std::is_x86_feature_detected!("sse4.2")),
        ("avx2", std::is_x86_feature_detected!("avx2")),
        ("avx512f", std::is_x86_feature_detected!("avx512f")),
        ("avx512bw", std::is_x86_feature_detected!("avx512bw")),
    ];
    #[cfg(target_arch = "aarch64")]
    let features = [
        ("neon", std::arch::is_aarch64_feature_detected!("neon")),
        ("crc", std::arch::is_aarch64_feature_detected!("crc")),
        ("sve", std::arch::is_aarch64_feature_detected!("sve")),
    ];
    let found: Vec<&str> = features.iter().filter(|feature| feature.1).map(|feature| feature.0).collect();
    Finding {
        name: "cpu",
        grade: graded(features[..2].iter().all(|feature| feature.1)),
        found: format!("{} ({})", std::env::consts::ARCH, found.join(" ")),
        advice: "without vector and CRC instructions decoding is several times slower",
    }
}

fn cuda() -> Finding {
    let found = gpu_dma::cuda::probe();
    Finding {
        name: "cuda",
        grade: graded(matches!(&found, Ok(devices) if !devices.is_empty())),
        found: match found {
            Ok(devices) if devices.is_empty() => "driver present, no GPU".into(),
            Ok(devices) => devices.join("; "),
            Err(reason) => reason.to_string(),
        },
        advice: "planes go to host memory, which needs no GPU; for GPU memory install NVIDIA's driver",
    }
}
