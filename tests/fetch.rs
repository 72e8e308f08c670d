//! Fetches through real processes: every codec, several clients, partial prefixes, and nothing leaked.

mod cluster;

use std::time::Duration;

use client::{ChunkPlace, FetchRequest, Layout, MissingReason, Outcome};
use compress::Codec;
use serde_json::Value;
use store::kv_file::KvFile;

use cluster::{Cluster, MBUFS_AT_REST, PATIENCE, sample, sample_tokens, stats, wait_until, write_kv};

#[test]
fn every_codec_arrives_as_it_must() {
    for codec in Codec::ALL {
        let cluster = Cluster::with_store(codec, &sample());
        let client = cluster.client();
        cluster.wait_for_store(&client, &sample_tokens());
        let (sample, out) = (sample(), cluster.path("out.safetensors"));
        let sample_text = sample.to_string_lossy();
        let output = cluster.fetch(&[
            "--tokens-from",
            &sample_text,
            "--out",
            &out.to_string_lossy(),
            "--verify",
            "--repeat",
            "3",
            "--json",
        ]);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{codec}: {text} {}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_str(&text).expect("one JSON object and nothing else");
        assert_eq!(report["verified"], true);
        assert_eq!((&report["chunks"], &report["planes"]), (&Value::from(3), &Value::from(24)));
        assert_eq!(report["raw_bytes"], 4 * 2 * 640 * 3 * 64 * 2);
        for field in
            ["encoded_bytes", "ratio", "seconds", "goodput_gbps", "delivered_gbps", "mismatched_planes"]
        {
            assert!(report[field].is_number(), "{codec}: {field} is {}", report[field]);
        }
        assert!(report["counters"]["planes_delivered"].as_u64() >= Some(72));
        assert!(report["stages"]["decode"]["p99_us"].is_number());
        if codec.is_exact() {
            assert_same_kv(&sample, &out);
        }
    }
}

fn assert_same_kv(left: &std::path::Path, right: &std::path::Path) {
    let (left, right) = (KvFile::open(left).unwrap(), KvFile::open(right).unwrap());
    assert_eq!((left.shape(), left.tokens()), (right.shape(), right.tokens()));
    let (mut of_left, mut of_right) = (Vec::new(), Vec::new());
    for chunk in 0..left.shape().chunks() {
        for layer in 0..left.shape().layers {
            for side in [compress::Side::K, compress::Side::V] {
                left.read_plane(chunk, layer, side, &mut of_left).unwrap();
                right.read_plane(chunk, layer, side, &mut of_right).unwrap();
                assert_eq!(of_left, of_right, "chunk {chunk}, layer {layer}, {side}");
            }
        }
    }
}

#[test]
fn stages_on_lcores_of_their_own_and_several_queues_deliver_the_same() {
    for lcores in ["rx@0,decode@1,dma@0", "rx@0+1,decode@0+1,dma@1", "rx@1,decode@0+1,dma@0+1"] {
        let mut cluster = Cluster::new(Codec::Int8, &["--lcores", lcores]);
        cluster.start_store_with_queues(&sample(), if lcores.starts_with("rx@0+1") { "0+1" } else { "1" });
        let client = cluster.client();
        cluster.wait_for_store(&client, &sample_tokens());
        let output = cluster.fetch(&[
            "--tokens-from",
            &sample().to_string_lossy(),
            "--verify",
            "--repeat",
            "5",
            "--json",
        ]);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{lcores}: {text} {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn several_clients_fetch_at_once() {
    let cluster = Cluster::with_store(Codec::Int4, &sample());
    let tokens = sample_tokens();
    cluster.wait_for_store(&cluster.client(), &tokens);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let client = cluster.client();
                let prefix = client.lookup(&tokens, PATIENCE).unwrap();
                let region = client.register(prefix.sequence_bytes().unwrap()).unwrap();
                for _ in 0..5 {
                    let mut request = FetchRequest::sequence(&prefix, &region).unwrap();
                    request.timeout = PATIENCE;
                    let report = client.fetch(&request).unwrap().finish().unwrap();
                    assert_eq!(report.outcome, Outcome::Done, "{}", report.message);
                    assert_eq!(report.progress.planes, 24);
                }
            });
        }
    });
}

#[test]
fn of_a_prefix_that_is_partly_stored_the_stored_part_arrives() {
    let cluster = Cluster::with_store(Codec::Int4, &sample());
    let client = cluster.client();
    let mut tokens = sample_tokens();
    cluster.wait_for_store(&client, &tokens);
    // Two chunks as stored, then tokens that nobody has seen.
    tokens.truncate(512);
    tokens.extend(0..256);
    let prefix = client.lookup(&tokens, PATIENCE).unwrap();
    assert_eq!((prefix.tokens, prefix.chunks.len(), prefix.is_whole()), (512, 2, false));

    let shape = prefix.shape.unwrap();
    let layout = Layout::sequence(&shape, 768);
    let region = client.register(usize::try_from(shape.chunk_bytes(256) * 3).unwrap()).unwrap();
    let keys = client.keys(&tokens);
    let chunks = keys.iter().zip(0..).map(|(key, chunk)| ChunkPlace {
        key: key.0,
        tokens: 256,
        offset: chunk * 256 * shape.token_bytes(),
    });
    let request = FetchRequest {
        region: &region,
        shape,
        layout,
        out_dtype: shape.dtype,
        chunks: chunks.collect(),
        timeout: PATIENCE,
        progress: false,
    };
    let report = client.fetch(&request).unwrap().finish().unwrap();
    assert_eq!(report.outcome, Outcome::Failed);
    assert_eq!(report.progress.planes, 16, "both stored chunks arrived");
    let missing: Vec<_> = report.missing.iter().map(|missing| (missing.chunk, missing.reason)).collect();
    assert_eq!(missing, [(2, MissingReason::NotStored)]);
    assert!(report.message.contains("1 of 3 chunks"), "{}", report.message);
}

#[test]
fn requests_that_cannot_be_are_refused_with_the_reason() {
    let cluster = Cluster::with_store(Codec::Int4, &sample());
    let client = cluster.client();
    cluster.wait_for_store(&client, &sample_tokens());
    let prefix = client.lookup(&sample_tokens(), PATIENCE).unwrap();
    let region = client.register(prefix.sequence_bytes().unwrap()).unwrap();
    let mut request = FetchRequest::sequence(&prefix, &region).unwrap();
    request.shape.layers = 200;
    request.layout = Layout::sequence(&request.shape, 640);
    request.chunks.truncate(1);
    let large = client.register(200 * 2 * 640 * 384).unwrap();
    request.region = &large;
    let refused = client.fetch(&request).unwrap().finish().unwrap_err().to_string();
    assert!(refused.contains("--max-layers"), "{refused}");
    // One that only the stored chunk contradicts ends failed, and says so.
    let mut request = FetchRequest::sequence(&prefix, &region).unwrap();
    request.shape.kv_heads = 2;
    request.timeout = PATIENCE;
    let report = client.fetch(&request).unwrap().finish().unwrap();
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(report.missing.iter().all(|missing| missing.reason == MissingReason::ShapeMismatch));
}

/// How many fetches to make; `make soak` asks for 100,000.
fn fetches() -> usize {
    std::env::var("SHADOWSERVE_FETCHES").map_or(2_000, |count| count.parse().expect("a number"))
}

#[test]
fn nothing_leaks() {
    let mut cluster = Cluster::new(Codec::Int4, &[]);
    let path = cluster.path("small.safetensors");
    let tokens = write_kv(&path, 2, 32);
    cluster.start_store(&path);
    let client = cluster.client();
    cluster.wait_for_store(&client, &tokens);
    let prefix = client.lookup(&tokens, PATIENCE).unwrap();
    let region = client.register(prefix.sequence_bytes().unwrap()).unwrap();
    let descriptors = |process: &cluster::Process| process.descriptors();
    let fetch = || {
        let mut request = FetchRequest::sequence(&prefix, &region).unwrap();
        request.timeout = PATIENCE;
        let report = client.fetch(&request).unwrap().finish().unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{}", report.message);
    };
    (0..100).for_each(|_| fetch());
    let before =
        (descriptors(cluster.dataplane.as_ref().unwrap()), descriptors(cluster.store.as_ref().unwrap()));
    (0..fetches()).for_each(|_| fetch());
    let after =
        (descriptors(cluster.dataplane.as_ref().unwrap()), descriptors(cluster.store.as_ref().unwrap()));
    assert_eq!(before, after, "open descriptors of data plane and store");
    wait_until("every buffer is back", || {
        let memory = &stats(&client)["memory"];
        memory["mbufs_in_use"].as_u64() <= Some(MBUFS_AT_REST) && memory["slots_free"] == memory["slots"]
    });
    let counters = &stats(&client)["counters"];
    assert_eq!(counters["planes_arrived"], counters["planes_delivered"]);
    std::thread::sleep(Duration::from_millis(1));
}
