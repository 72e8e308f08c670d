//! What a stranger sees: help, refusals that say what to do, and `doctor`.

use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_shadowserve")).args(arguments).output().unwrap()
}

/// What the program says on standard error when it refuses.
fn refusal(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(!output.status.success(), "{arguments:?} was not refused");
    assert!(output.stdout.is_empty(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn help_gives_every_flag_a_line_a_unit_and_a_default() {
    for command in ["store", "dataplane", "fetch", "demo", "doctor"] {
        let output = run(&[command, "--help"]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && text.contains("Usage: shadowserve"), "{text}");
    }
    let dataplane = String::from_utf8(run(&["dataplane", "--help"]).stdout).unwrap();
    let dataplane = dataplane.split_whitespace().collect::<Vec<_>>().join(" ");
    for expected in [
        "--lcores <STAGE@CPUS,...>",
        "[default: rx@0,decode@0,dma@0]",
        "--slot-kib <KIB>",
        "--mbufs <COUNT>",
        "--hedge-percent <PERCENT>",
    ] {
        assert!(dataplane.contains(expected), "{expected} is not in\n{dataplane}");
    }
}

#[test]
fn refusals_name_what_is_wrong_and_what_to_do() {
    let dataplane = |extra: &[&str]| {
        let mut arguments = vec![
            "dataplane",
            "--no-huge",
            "--port",
            "net_null0",
            "--ip",
            "10.0.0.2/24",
            "--store",
            "10.0.0.1:4791",
        ];
        arguments.extend(extra);
        refusal(&arguments)
    };
    for (text, expected) in [
        (dataplane(&["--lcores", "rx@0,decode@0"]), "no CPU runs stage dma"),
        (dataplane(&["--lcores", "rx@4000,decode@0,dma@0"]), "CPU 4000"),
        (dataplane(&["--store", "10.9.9.9:4791"]), "--gateway"),
        (dataplane(&["--ip", "10.0.0.2"]), "10.0.0.2/24"),
        (dataplane(&["--slots", "0"]), "--slots is 0"),
        (dataplane(&["--mbufs", "100"]), "--mbufs 100 is too little"),
        (dataplane(&["--mtu", "300"]), "--mtu 300 is too small"),
        (dataplane(&["--hedge-percent", "101"]), "'--hedge-percent <PERCENT>': 101 is not in 0..=100"),
        (dataplane(&["--socket", "/nonexistent/folder/s.sock"]), "/nonexistent/folder/s.sock"),
        (
            refusal(&[
                "dataplane",
                "--no-huge",
                "--port",
                "net_none0",
                "--ip",
                "10.0.0.2/24",
                "--store",
                "10.0.0.1:1",
            ]),
            "net_none0",
        ),
        (
            refusal(&[
                "store",
                "--load",
                "/nonexistent.safetensors",
                "--port",
                "net_null0",
                "--ip",
                "10.0.0.1/24",
            ]),
            "/nonexistent.safetensors",
        ),
        (
            refusal(&[
                "store",
                "--load",
                "x",
                "--codec",
                "int6",
                "--port",
                "net_null0",
                "--ip",
                "10.0.0.1/24",
            ]),
            "raw, lossless, int8",
        ),
        (refusal(&["fetch", "--tokens-from", "/nonexistent.safetensors"]), "/nonexistent.safetensors"),
        (refusal(&["demo", "--input", "/nonexistent.safetensors"]), "/nonexistent.safetensors"),
        (refusal(&["store", "--config", "/nonexistent.toml"]), "/nonexistent.toml"),
    ] {
        assert!(text.contains(expected), "{expected} is not in\n{text}");
    }
    let nobody = refusal(&["fetch", "--tokens-from", &sample(), "--socket", "/tmp/no-data-plane-here.sock"]);
    assert!(nobody.contains("shadowserve dataplane --socket"), "{nobody}");
}

fn sample() -> String {
    format!("{}/perf/samples/smollm2-135m-kv-640.safetensors", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn doctor_says_what_there_is() {
    let output = run(&["doctor", "--json"]);
    assert!(output.status.success());
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["dpdk"]["found"].as_str().unwrap().starts_with("DPDK "));
    let drivers = report["drivers"]["found"].as_str().unwrap();
    for driver in [
        "net_mlx5",
        "net_memif",
        "net_ring",
        "net_virtio",
        "net_ena",
        "net_ice",
        "net_i40e",
        "net_ixgbe",
        "net_af_packet",
        "net_af_xdp",
        "net_tap",
        "net_null",
        "net_pcap",
        "net_vhost",
        "compress_zlib",
        "compress_isal",
        "compress_mlx5",
    ] {
        assert!(drivers.contains(driver), "{driver} is not linked: {drivers}");
    }
    let compress = report["compress"]["found"].as_str().unwrap();
    assert!(
        compress.contains("compress_zlib: deflate (window 2^8 to 2^15") && compress.contains("compress_mlx5")
    );
    if dpdk::isal_available() {
        assert!(compress.contains("compress_isal: deflate (window 2^15, chains in and out"), "{compress}");
    }
    for name in ["hugepages", "numa", "isolated cores", "cpu", "cuda"] {
        assert!(report[name]["found"].is_string(), "{name}");
    }
}

#[test]
fn the_demo_in_one_process_needs_nothing() {
    let output = run(&["demo", "--in-process", "--json", "--repeat", "2"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_str(&text).expect("one JSON object and nothing else");
    assert_eq!((report["verified"].as_bool(), report["mismatched_planes"].as_u64()), (Some(true), Some(0)));
}

/// Starts the program with both outputs going into a pipe that nobody reads any more after `bytes`; returns how it ended.
fn run_unread(arguments: &[&str], bytes: usize) -> std::process::ExitStatus {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_shadowserve"));
    command.args(arguments).stdin(std::process::Stdio::null());
    command.stdout(writer.try_clone().unwrap()).stderr(writer);
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut read = vec![0; bytes];
    std::io::Read::read_exact(&mut reader, &mut read).unwrap();
    drop(reader);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if std::time::Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{arguments:?} does not end when nobody reads it");
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn the_demo_ends_when_nobody_reads_it() {
    let status = run_unread(&["demo", "--in-process", "--repeat", "2"], 10);
    assert_eq!(status.code(), Some(1), "its report could not be printed, and nothing panicked: {status}");
}

#[test]
fn sending_is_measured_over_memif_in_one_process() {
    let output = run(&["bench", "tx", "--no-huge", "--bursts", "20", "--memory-mib", "4"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_str(&text).expect("one JSON object");
    assert_eq!(report["driver"], "net_memif");
    assert!(report["attached_to_copied"].as_f64().is_some_and(|ratio| ratio > 0.0), "{report}");
}
