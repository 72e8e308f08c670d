//! Several store processes behind a switch: what is saved lies on the stores that placement names, and is fetched from any of them.

mod cluster;

use std::process::Output;

use compress::Codec;
use protocol::{Placement, store_id};
use serde_json::Value;

use cluster::{Cluster, Net, Process, sample, sample_tokens, wait_until};

const STORES: [&str; 2] = ["10.99.0.1:4791", "10.99.0.3:4791"];
const IPS: [&str; 2] = ["10.99.0.1/24", "10.99.0.3/24"];
const NET: Net = Net { store: "10.99.0.1:4791,10.99.0.3:4791", ..Net::DEFAULT };

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text)
        .unwrap_or_else(|error| panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr)))
}

/// A data plane that keeps each chunk on so many stores, and the stores.
fn start(replicas: &str) -> (Cluster, [Process; 2]) {
    let mut cluster = Cluster::on(NET, Codec::Int4, &["--replicas", replicas]);
    cluster.start_switch(2);
    let flags = ["--memory-mib", "16", "--json"];
    let stores = [cluster.store_at(1, IPS[0], &flags), cluster.store_at(2, IPS[1], &flags)];
    (cluster, stores)
}

/// Waits until a lookup that asks every store is answered.
fn wait_for_stores(cluster: &Cluster) {
    let client = cluster.client();
    cluster.wait_for_store(&client, &sample_tokens());
}

/// Saves the sample, all of it whatever lookups say.
fn save(cluster: &Cluster) -> Value {
    let output = cluster.save(&["--input", &sample().to_string_lossy(), "--all", "--timeout-ms", "60000"]);
    let report = json(&output);
    assert!(output.status.success(), "{report} {}", String::from_utf8_lossy(&output.stderr));
    report
}

fn fetch_and_verify(cluster: &Cluster) {
    let output = cluster.fetch(&["--tokens-from", &sample().to_string_lossy(), "--verify", "--json"]);
    let report = json(&output);
    assert!(output.status.success(), "{report} {}", String::from_utf8_lossy(&output.stderr));
    assert_eq!((&report["verified"], &report["chunks"]), (&true.into(), &3.into()));
}

/// Chunks that a store held when it ended in order.
fn held(store: Process) -> u64 {
    let log = store.terminate();
    let line = log.lines().rev().find(|line| line.starts_with('{')).expect("--json prints a line at the end");
    let report: Value = serde_json::from_str(line).unwrap();
    report["chunks"]["held"].as_u64().unwrap()
}

#[test]
fn every_store_that_is_to_keep_a_chunk_gets_it_and_serves_it_alone() {
    let (cluster, [first, second]) = start("2");
    wait_for_stores(&cluster);
    let report = save(&cluster);
    assert_eq!((&report["stored"], &report["fewer_copies"]), (&3.into(), &Value::Array(vec![])), "{report}");
    fetch_and_verify(&cluster);
    assert_eq!(held(first), 3);
    fetch_and_verify(&cluster);
    // The first store comes back with nothing, and is given its copies again.
    let first = cluster.store_at(1, IPS[0], &["--memory-mib", "16", "--json"]);
    wait_until("the first store has its copies again", || {
        save(&cluster)["fewer_copies"] == Value::Array(vec![])
    });
    assert_eq!(held(second), 3);
    fetch_and_verify(&cluster);
    assert_eq!(held(first), 3);
}

#[test]
fn a_chunk_lies_where_placement_says_and_nowhere_else() {
    let (cluster, stores) = start("1");
    wait_for_stores(&cluster);
    let placement = Placement::new(&STORES.map(store_id), 1).unwrap();
    let keys = cluster.client().keys(&sample_tokens());
    let mut placed = [0; 2];
    for key in &keys {
        placed[usize::from(placement.candidates(key).as_slice()[0].0)] += 1;
    }
    assert_eq!(save(&cluster)["stored"], 3);
    fetch_and_verify(&cluster);
    assert_eq!(stores.map(held), placed);
}

#[test]
fn a_store_that_is_gone_costs_copies_and_no_chunks() {
    let (cluster, [first, second]) = start("2");
    wait_for_stores(&cluster);
    first.kill();
    let report = save(&cluster);
    assert_eq!((&report["outcome"], &report["stored"]), (&"done".into(), &3.into()), "{report}");
    let fewer = report["fewer_copies"].as_array().unwrap();
    assert_eq!(fewer.len(), 3, "{report}");
    for chunk in fewer {
        assert_eq!((&chunk["copies"], &chunk["replicas"]), (&1.into(), &2.into()), "{report}");
    }
    fetch_and_verify(&cluster);
    assert_eq!(held(second), 3);
}
