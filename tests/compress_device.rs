//! Planes through compression devices, in real processes and in one: everything arrives as it must, and who decompressed what is counted.

mod cluster;

use std::process::Command;

use compress::{Codec, Dtype};
use serde_json::Value;
use store::kv_file::{self, SequenceShape};

use cluster::{Cluster, PROGRAM, sample, sample_tokens};

/// Planes of the sample.
const PLANES: u64 = 24;

fn demo(flags: &[&str]) -> Value {
    let report = demo_of(flags);
    assert_eq!(report["planes"].as_u64(), Some(PLANES));
    report
}

/// Fetches three times through store and data plane in one process; every plane is compared.
fn demo_of(flags: &[&str]) -> Value {
    let output = Command::new(PROGRAM)
        .args(["demo", "--in-process", "--json", "--repeat", "3"])
        .args(flags)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{flags:?}: {text}\n{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_str(&text).expect("one JSON object and nothing else");
    assert_eq!(report["verified"].as_bool(), Some(true), "{report}");
    assert_eq!(report["memory"]["slots_free"], report["memory"]["slots"]);
    report
}

fn count(report: &Value, name: &str) -> u64 {
    report["compress_device"]["counters"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {report}"))
}

#[test]
fn devices_decompress_every_quantized_plane() {
    let isal = dpdk::isal_available();
    if !isal {
        println!("SKIPPED compress_isal: libisal.so.2 is not installed (apt-get install libisal2)");
    }
    let devices: &[&str] = if isal { &["compress_isal", "compress_zlib"] } else { &["compress_zlib"] };
    for device in devices {
        for codec in ["int4", "int5", "cachegen"] {
            let report = demo(&["--codec", codec, "--compression", "deflate", "--compress-dev", device]);
            assert_eq!(count(&report, "planes_by_device"), 3 * PLANES, "{device}, {codec}");
            for name in ["planes_not_deflate", "planes_too_large", "planes_device_failed", "planes_refused"] {
                assert_eq!(count(&report, name), 0, "{device}, {codec}: {name}");
            }
        }
    }
}

#[test]
fn what_no_device_knows_is_decoded_by_the_core() {
    for flags in
        [["--codec", "int4", "--compression", "zstd"], ["--codec", "lossless", "--compression", "deflate"]]
    {
        let report = demo(&[&flags[..], &["--compress-dev", "compress_zlib"]].concat());
        assert_eq!(count(&report, "planes_not_deflate"), 3 * PLANES, "{flags:?}");
        assert_eq!(count(&report, "planes_by_device"), 0);
    }
    let report = demo(&["--compression", "deflate"]);
    assert_eq!(report["compress_device"], Value::Null);
}

/// Sections of 72 KiB, where `compress_zlib` gives 64 KiB at most.
#[test]
fn what_is_too_large_for_the_device_is_decoded_by_the_core() {
    let shape = SequenceShape { layers: 2, tokens: 300, kv_heads: 9, head_dim: 64, dtype: Dtype::Bf16 };
    // The upper half of a float is its bfloat16.
    let element = |at: usize| ((at % 97) as f32 - (at % 13) as f32).to_be_bytes();
    let plane: Vec<u8> =
        (0..shape.tensor_bytes() / 2).map(element).flat_map(|[high, low, ..]| [low, high]).collect();
    let tokens: Vec<i32> = (0..300).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wide.safetensors");
    kv_file::write(&path, shape, &plane, &plane, &tokens).unwrap();
    let flags = ["--codec", "int8", "--compression", "deflate", "--compress-dev", "compress_zlib", "--input"];
    let report = demo_of(&[&flags[..], &[&path.to_string_lossy()]].concat());
    // The second chunk's planes, of 44 tokens, fit.
    assert_eq!(report["planes"], 8);
    assert_eq!((count(&report, "planes_too_large"), count(&report, "planes_by_device")), (3 * 4, 3 * 4));
    for name in ["planes_not_deflate", "planes_device_failed", "planes_refused"] {
        assert_eq!(count(&report, name), 0, "{name}");
    }
}

#[test]
fn what_the_device_fails_at_is_decoded_by_the_core() {
    for (every, failed) in [(1, 3 * PLANES), (3, PLANES), (50, 1)] {
        let device = format!("compress_zlib,fail_every={every}");
        // One decode lcore, since each counts for itself.
        let flags =
            ["--compression", "deflate", "--lcores", "rx@0,decode@0,dma@0", "--compress-dev", &device];
        let report = demo(&flags);
        assert_eq!(count(&report, "planes_device_failed"), failed, "every {every}");
        assert_eq!(count(&report, "planes_by_device"), 3 * PLANES - failed, "every {every}");
        for name in ["planes_not_deflate", "planes_too_large", "planes_refused"] {
            assert_eq!(count(&report, name), 0, "{name}");
        }
    }
    let wrong = Command::new(PROGRAM)
        .args(["demo", "--in-process", "--compress-dev", "compress_zlib,fail_every=never"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&wrong.stderr);
    assert!(!wrong.status.success() && text.contains("fail_every is how many planes"), "{text}");
}

#[test]
fn several_lcores_have_a_queue_pair_each_and_processes_end_in_order() {
    let lcores = "rx@0,decode@0+1,dma@1";
    let mut cluster = Cluster::new(Codec::Int4, &["--lcores", lcores, "--compress-dev", "compress_zlib"]);
    cluster.start_store_with(&sample(), "1", &["--compression", "deflate"]);
    let client = cluster.client();
    cluster.wait_for_store(&client, &sample_tokens());
    let output = cluster.fetch(&[
        "--tokens-from",
        &sample().to_string_lossy(),
        "--verify",
        "--repeat",
        "20",
        "--json",
    ]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text} {}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["verified"], true);
    assert_eq!(count(&report, "planes_by_device"), 20 * PLANES);
    drop(client);
    let log = cluster.dataplane.take().unwrap().terminate();
    assert!(log.contains("compression device compress_zlib: deflate"), "{log}");
}

#[test]
fn a_data_plane_without_its_device_does_not_start() {
    let output = Command::new(PROGRAM)
        .args(["demo", "--in-process", "--compress-dev", "compress_none"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("compress_none"), "{text}");
}
