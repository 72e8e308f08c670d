//! What happens when a store, a data plane or a client dies.

mod cluster;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use client::{FetchError, FetchRequest, Lost, MissingReason, Outcome};
use compress::Codec;

use cluster::{
    Cluster, MBUFS_AT_REST, PATIENCE, PROGRAM, sample, sample_tokens, stats, wait_until, write_kv,
};

/// A KV cache that takes long enough to fetch for something to die meanwhile.
const LONG_TOKENS: usize = 8192;
const LONG_LAYERS: u16 = 24;

#[test]
fn a_killed_store_fails_the_fetch_by_its_deadline_and_may_come_back() {
    let mut cluster = Cluster::new(Codec::Raw, &["--window", "16"]);
    let path = cluster.path("long.safetensors");
    let tokens = write_kv(&path, LONG_LAYERS, LONG_TOKENS);
    cluster.start_store(&path);
    let client = cluster.client();
    cluster.wait_for_store(&client, &tokens);
    let prefix = client.lookup(&tokens, PATIENCE).unwrap();
    let region = client.register(prefix.sequence_bytes().unwrap()).unwrap();
    let mut request = FetchRequest::sequence(&prefix, &region).unwrap();
    request.timeout = Duration::from_secs(2);
    request.progress = true;
    let mut fetch = client.fetch(&request).unwrap();
    wait_until("some planes have arrived", || fetch.progress().planes > 0 || fetch.poll().unwrap().is_some());
    assert!(fetch.poll().unwrap().is_none(), "the fetch ended before the store could be killed");
    cluster.store.take().unwrap().kill();

    let report = fetch.wait(PATIENCE).unwrap();
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(!report.missing.is_empty() && report.missing.iter().all(|m| m.reason == MissingReason::Deadline));
    assert!(report.message.contains("chunks did not arrive"), "{}", report.message);
    assert!(client.lookup(&tokens, Duration::from_millis(200)).is_err(), "nobody is there to answer");

    cluster.start_store(&path);
    cluster.wait_for_store(&client, &tokens);
    request.timeout = PATIENCE;
    let report = client.fetch(&request).unwrap().finish().unwrap();
    assert_eq!(report.outcome, Outcome::Done, "{}", report.message);
    cluster.dataplane.as_mut().unwrap().check();
}

#[test]
fn a_killed_data_plane_is_an_error_within_a_second() {
    let mut cluster = Cluster::new(Codec::Int4, &[]);
    // No store: the fetch would wait for its deadline.
    let client = cluster.client();
    let path = cluster.path("kv.safetensors");
    let tokens = write_kv(&path, 2, 256);
    let killed = std::thread::scope(|scope| {
        let lookup = scope.spawn(|| {
            let error = client.lookup(&tokens, PATIENCE).unwrap_err();
            (error.to_string(), Instant::now())
        });
        std::thread::sleep(Duration::from_millis(200));
        cluster.dataplane.take().unwrap().kill();
        let killed = Instant::now();
        let (message, told) = lookup.join().unwrap();
        assert!(message.contains("the data plane has ended"), "{message}");
        told.duration_since(killed)
    });
    // Not a timed test: a second is what is promised, and the margin to the lookup's own minute is wide.
    assert!(killed < PATIENCE / 2, "the client was told after {killed:?}");
    assert_eq!(client.lost(), Some(Lost::HungUp));

    // The next data plane takes the place of the dead one, its socket file included.
    cluster.start_dataplane(&[]);
    assert!(stats(&cluster.client())["clients"].as_u64() >= Some(1));
}

#[test]
fn a_killed_client_leaves_nothing_behind() {
    let cluster = Cluster::with_store(Codec::Int4, &sample());
    let watcher = cluster.client();
    cluster.wait_for_store(&watcher, &sample_tokens());
    let (sample, socket) = (sample(), cluster.socket());
    let mut children: Vec<_> = (0..3)
        .map(|_| {
            let mut command = Command::new(PROGRAM);
            command
                .args(["fetch", "--repeat", "1000000", "--tokens-from"])
                .arg(&sample)
                .arg("--socket")
                .arg(&socket);
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        })
        .collect();
    wait_until("all three fetch", || {
        let stats = stats(&watcher);
        stats["clients"] == 4 && stats["counters"]["planes_delivered"].as_u64() > Some(200)
    });
    for child in &mut children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    wait_until("their memory is released", || {
        let stats = stats(&watcher);
        let memory = &stats["memory"];
        stats["clients"] == 1
            && memory["slots_free"] == memory["slots"]
            && memory["mbufs_in_use"].as_u64() <= Some(MBUFS_AT_REST)
    });
    wait_until("their regions are unmapped", || {
        let maps = cluster.dataplane.as_ref().unwrap().maps();
        maps.matches("shadowserve-region").count() == 0
    });
}

#[test]
fn sigterm_ends_fetches_as_cancelled_and_the_processes_in_order() {
    let mut cluster = Cluster::new(Codec::Raw, &["--window", "16"]);
    let path = cluster.path("long.safetensors");
    let tokens = write_kv(&path, LONG_LAYERS, LONG_TOKENS);
    cluster.start_store(&path);
    let client = cluster.client();
    cluster.wait_for_store(&client, &tokens);
    let prefix = client.lookup(&tokens, PATIENCE).unwrap();
    let region = client.register(prefix.sequence_bytes().unwrap()).unwrap();
    let mut request = FetchRequest::sequence(&prefix, &region).unwrap();
    request.timeout = PATIENCE;
    request.progress = true;
    let mut fetch = client.fetch(&request).unwrap();
    wait_until("some planes have arrived", || fetch.progress().planes > 0);
    cluster.dataplane.take().unwrap().terminate();
    match fetch.wait(PATIENCE) {
        Ok(report) => assert_eq!(report.outcome, Outcome::Cancelled, "{}", report.message),
        // Its end and the end of the session arrive together.
        Err(FetchError::Lost(Lost::HungUp)) => panic!("the fetch's end was lost"),
        Err(error) => panic!("{error}"),
    }
    assert!(!cluster.socket().exists(), "the control socket's file is gone");
    let counts = cluster.store.take().unwrap().terminate();
    assert!(counts.contains("ready"), "{counts}");
}

#[test]
fn a_client_can_cancel() {
    let mut cluster = Cluster::new(Codec::Raw, &["--window", "16"]);
    let path = cluster.path("long.safetensors");
    let tokens = write_kv(&path, LONG_LAYERS, LONG_TOKENS);
    cluster.start_store(&path);
    let client = cluster.client();
    cluster.wait_for_store(&client, &tokens);
    let prefix = client.lookup(&tokens, PATIENCE).unwrap();
    let region = client.register(prefix.sequence_bytes().unwrap()).unwrap();
    let mut request = FetchRequest::sequence(&prefix, &region).unwrap();
    request.timeout = PATIENCE;
    let mut fetch = client.fetch(&request).unwrap();
    fetch.cancel().unwrap();
    let report = fetch.wait(PATIENCE).unwrap();
    assert_eq!(report.outcome, Outcome::Cancelled);
    assert!(report.missing.iter().all(|missing| missing.reason == MissingReason::Cancelled));
    // What is left of it disturbs nobody.
    let report = client.fetch(&request).unwrap().finish().unwrap();
    assert_eq!(report.outcome, Outcome::Done, "{}", report.message);
}
