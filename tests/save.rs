//! Saves through real processes: what comes back, what is refused and why, what dies in between, and nothing leaked.

mod cluster;

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use client::{Client, Codec as ClientCodec, NotSavedReason, Outcome, Region, SaveReport, SaveRequest};
use compress::{Codec, Side};
use serde_json::Value;
use store::kv_file::KvFile;

use cluster::{
    Cluster, MBUFS_AT_REST, PATIENCE, PROGRAM, sample, sample_tokens, stats, wait_until, write_kv,
};

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text)
        .unwrap_or_else(|error| panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr)))
}

/// What a store counted, from its log; it has ended.
fn store_report(log: &str) -> Value {
    let line = log.lines().rev().find(|line| line.starts_with('{')).expect("--json prints a line at the end");
    serde_json::from_str(line).unwrap()
}

fn sum(report: &Value, field: &str) -> u64 {
    report["queues"].as_array().unwrap().iter().map(|queue| queue["put"][field].as_u64().unwrap()).sum()
}

#[test]
fn what_is_saved_is_what_another_client_fetches() {
    let sample = sample();
    let sample_text = sample.to_string_lossy();
    for codec in Codec::ALL {
        let mut cluster = Cluster::new(codec, &[]);
        cluster.start_any_store("0", &["--memory-mib", "16", "--json"]);
        cluster.wait_for_store(&cluster.client(), &sample_tokens());
        let output = cluster.save(&["--input", &sample_text]);
        let report = json(&output);
        assert!(output.status.success(), "{codec}: {report} {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!((&report["outcome"], &report["stored"]), (&"done".into(), &3.into()), "{report}");
        let output = cluster.fetch(&["--tokens-from", &sample_text, "--verify", "--json"]);
        let report = json(&output);
        assert!(output.status.success(), "{codec}: {report}");
        assert_eq!((&report["verified"], &report["chunks"]), (&true.into(), &3.into()));
        // Once more: a lookup finds all of it, and nothing moves; with --all the store says so itself.
        assert_eq!(json(&cluster.save(&["--input", &sample_text]))["already_stored"], 3);
        let again = json(&cluster.save(&["--input", &sample_text, "--all"]));
        assert_eq!((&again["stored"], &again["already_stored"]), (&0.into(), &3.into()));
        let counted = store_report(&cluster.store.take().unwrap().terminate());
        assert_eq!((sum(&counted, "stored"), sum(&counted, "already_stored")), (3, 3), "{counted}");
        assert_eq!(counted["chunks"]["held"], 3);
    }
}

#[test]
fn a_profile_says_how_what_is_saved_is_encoded() {
    let mut cluster = Cluster::new(Codec::Int4, &[]);
    cluster.start_any_store("0", &["--memory-mib", "16"]);
    cluster.wait_for_store(&cluster.client(), &sample_tokens());
    let (profile, other) = (cluster.path("profile.toml"), cluster.path("other.toml"));
    let text = "# K of the first layer as it is.\nlayers = 4\nkv_heads = 3\nhead_dim = 64\n[k]\n0 = \"raw\"\n\
                \"1-3\" = \"int5\"\n[v]\n\"0-3\" = \"cachegen:32@0.5\"\n";
    std::fs::write(&profile, text).unwrap();
    std::fs::write(&other, text.replace("head_dim = 64", "head_dim = 128")).unwrap();
    let (sample, socket) = (sample(), cluster.socket());
    let run = |command: &str, file: &str, profile: &Path, flags: &[&str]| {
        let mut program = Command::new(PROGRAM);
        program
            .arg(command)
            .arg("--socket")
            .arg(&socket)
            .arg("--profile")
            .arg(profile)
            .arg(file)
            .arg(&sample);
        program.arg("--json").args(flags).output().unwrap()
    };
    let report = json(&run("save", "--input", &profile, &[]));
    assert_eq!((&report["outcome"], &report["stored"]), (&"done".into(), &3.into()), "{report}");
    // Each plane is what the reference makes of it with the profile's codec.
    let report = json(&run("fetch", "--tokens-from", &profile, &["--verify"]));
    assert_eq!((&report["verified"], &report["chunks"]), (&true.into(), &3.into()), "{report}");
    // Under another name they are not found, and a profile for another model is refused.
    assert!(!cluster.fetch(&["--tokens-from", &sample.to_string_lossy(), "--json"]).status.success());
    let refused = run("save", "--input", &other, &[]);
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("the profile is for 4 layers with 3 heads of 128")
    );
}

/// A client that saves one sequence again and again under other names: each time with other tokens.
struct Saver<'a> {
    client: &'a Client,
    region: Region,
    file: KvFile,
    codec: ClientCodec,
}

impl<'a> Saver<'a> {
    fn new(client: &'a Client, path: &Path) -> Self {
        let file = KvFile::open(path).unwrap();
        let region = client.register(2 * file.shape().tensor_bytes()).unwrap();
        let (shape, mut plane) = (file.shape(), Vec::new());
        for at in 0..shape.chunks() * usize::from(shape.layers) {
            let (chunk, layer) = (at / usize::from(shape.layers), at % usize::from(shape.layers));
            for (tensor, side) in [Side::K, Side::V].into_iter().enumerate() {
                file.read_plane(chunk, u16::try_from(layer).unwrap(), side, &mut plane).unwrap();
                let row = layer * shape.tokens + chunk * 256;
                region
                    .arena()
                    .copy_in(tensor * shape.tensor_bytes() + row * shape.row_bytes(), &plane)
                    .unwrap();
            }
        }
        Self { client, region, file, codec: ClientCodec::Int4 }
    }

    fn tokens(&self, number: usize) -> Vec<i32> {
        let number = i32::try_from(number).unwrap();
        self.file.tokens().iter().map(|token| token + 1000 * number).collect()
    }

    fn request(&self, number: usize, timeout: Duration) -> SaveRequest<'_> {
        let shape = self.file.shape();
        let told = client::Shape {
            layers: shape.layers,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            dtype: client::Dtype::Bf16,
        };
        let keys = self.client.keys(&self.tokens(number));
        let mut request = SaveRequest::sequence(&self.region, told, self.codec, &keys, shape.tokens).unwrap();
        request.timeout = timeout;
        request
    }

    fn save(&self, number: usize, timeout: Duration) -> SaveReport {
        self.client.save(&self.request(number, timeout)).unwrap().finish().unwrap()
    }

    fn is_stored(&self, number: usize) -> bool {
        self.client.lookup(&self.tokens(number), PATIENCE).unwrap().is_whole()
    }
}

#[test]
fn a_full_store_evicts_and_one_full_of_pinned_chunks_says_so() {
    let mut cluster = Cluster::new(Codec::Int4, &[]);
    let path = cluster.path("kv.safetensors");
    // One chunk of about 650 KiB encoded: three of them fill two MiB.
    write_kv(&path, 64, 256);
    cluster.start_any_store("0", &["--memory-mib", "2", "--json"]);
    let client = cluster.client();
    let saver = Saver::new(&client, &path);
    cluster.wait_for_store(&client, &saver.tokens(0));
    for number in 0..40 {
        let report = saver.save(number, PATIENCE);
        assert_eq!((report.outcome, report.stored), (Outcome::Done, 1), "{}", report.message);
        assert!(saver.is_stored(number), "what was just saved is there");
    }
    let there = (0..40).filter(|number| saver.is_stored(*number)).count();
    assert!((2..40).contains(&there), "{there} of 40 chunks are there");
    let report = store_report(&cluster.store.take().unwrap().terminate());
    let chunks = &report["chunks"];
    assert_eq!((&chunks["held"], &chunks["stored"]), (&there.into(), &40.into()), "{report}");
    assert_eq!(chunks["evicted"].as_u64(), Some(40 - there as u64), "{report}");
    assert_eq!(sum(&report, "stored"), 40);

    // The same memory, filled by what is pinned.
    let pinned = cluster.path("pinned.safetensors");
    write_kv(&pinned, 64, 3 * 256);
    cluster.start_any_store("0", &["--memory-mib", "2", "--load", &pinned.to_string_lossy(), "--pin-loaded"]);
    cluster.wait_for_store(&client, &saver.tokens(0));
    // Three chunks of int4 leave less than one of int8 takes.
    let saver = Saver { codec: ClientCodec::Int8, ..saver };
    for number in 1..9 {
        let report = saver.save(number, PATIENCE);
        assert_eq!((report.outcome, report.not_saved.len()), (Outcome::Failed, 1));
        assert_eq!(report.not_saved[0].reason, NotSavedReason::StoreFull);
        assert!(report.message.contains("pinned"), "{}", report.message);
    }
    let whole = write_kv(&cluster.path("again.safetensors"), 64, 3 * 256);
    assert!(client.lookup(&whole, PATIENCE).unwrap().is_whole(), "what is pinned stays");
}

#[test]
fn a_store_that_takes_nothing_or_too_little_says_why() {
    let mut cluster = Cluster::new(Codec::Int4, &["--save-chunk-mib", "1"]);
    let path = cluster.path("kv.safetensors");
    let tokens = write_kv(&path, 2, 300);
    cluster.start_store(&path);
    let client = cluster.client();
    cluster.wait_for_store(&client, &tokens);
    let saver = Saver::new(&client, &path);
    let report = saver.save(1, PATIENCE);
    assert_eq!((report.outcome, report.stored), (Outcome::Failed, 0));
    let missed: Vec<(u32, NotSavedReason)> =
        report.not_saved.iter().map(|missed| (missed.chunk, missed.reason)).collect();
    assert_eq!(missed, [(0, NotSavedReason::StoreClosed), (1, NotSavedReason::StoreClosed)]);
    assert!(report.message.contains("--memory-mib"), "{}", report.message);

    // Larger than the data plane's buffers; and what no quantizer can take.
    let large = cluster.path("large.safetensors");
    write_kv(&large, 128, 256);
    let saver = Saver::new(&client, &large);
    let mut request = saver.request(2, PATIENCE);
    request.codec = ClientCodec::Raw.into();
    let report = client.save(&request).unwrap().finish().unwrap();
    assert_eq!(report.not_saved[0].reason, NotSavedReason::TooLarge, "{report:?}");
    saver.region.arena().copy_in(0, &[0x80, 0x7f]).unwrap();
    assert_eq!(saver.save(3, PATIENCE).not_saved[0].reason, NotSavedReason::NotEncodable);

    let mut none = Cluster::new(Codec::Int4, &["--save-chunks", "0"]);
    none.start_any_store("0", &["--memory-mib", "1"]);
    let client = none.client();
    let saver = Saver::new(&client, &path);
    let refused = client.save(&saver.request(1, PATIENCE)).unwrap().finish().unwrap_err().to_string();
    assert!(refused.contains("--save-chunks"), "{refused}");
}

#[test]
fn a_store_killed_in_the_midst_of_a_save_fails_it_by_its_deadline_and_names_the_chunks() {
    let mut cluster = Cluster::new(Codec::Int4, &[]);
    let path = cluster.path("kv.safetensors");
    write_kv(&path, 64, 12 * 256);
    cluster.start_any_store("0", &["--memory-mib", "64"]);
    let client = cluster.client();
    let saver = Saver::new(&client, &path);
    cluster.wait_for_store(&client, &saver.tokens(0));
    let timeout = Duration::from_millis(1500);
    let mut request = saver.request(1, timeout);
    // The same chunks under many names, so that it takes long enough to be met in the midst.
    for number in 2..60 {
        request.chunks.extend(saver.request(number, timeout).chunks);
    }
    let chunks = request.chunks.len();
    let save = client.save(&request).unwrap();
    wait_until("some are stored", || stats(&client)["save"]["offers"]["stored"].as_u64() >= Some(3));
    cluster.store.take().unwrap().kill();
    let report = save.finish().unwrap();
    assert_eq!(report.outcome, Outcome::Failed);
    assert!(report.stored >= 3);
    assert_eq!(report.stored as usize + report.not_saved.len(), chunks, "each is stored or named");
    assert!(report.not_saved.is_sorted_by_key(|missed| missed.chunk));
    let expected = [NotSavedReason::Deadline, NotSavedReason::StoreUnreachable];
    assert!(report.not_saved.iter().all(|missed| expected.contains(&missed.reason)), "{report:?}");
    wait_until("every buffer is back", || stats(&client)["save"]["buffers_free"] == 4);

    // Another store: the next save works.
    cluster.start_any_store("0", &["--memory-mib", "64"]);
    cluster.wait_for_store(&client, &saver.tokens(0));
    assert_eq!(saver.save(1, PATIENCE).outcome, Outcome::Done);
    assert!(saver.is_stored(1));
}

#[test]
fn a_save_that_is_dropped_or_whose_client_dies_lets_go_of_everything() {
    let mut cluster = Cluster::new(Codec::Int4, &[]);
    let path = cluster.path("kv.safetensors");
    write_kv(&path, 64, 12 * 256);
    cluster.start_any_store("0", &["--memory-mib", "64"]);
    let watcher = cluster.client();
    {
        let client = cluster.client();
        let saver = Saver::new(&client, &path);
        cluster.wait_for_store(&client, &saver.tokens(0));
        let mut save = client.save(&saver.request(1, PATIENCE)).unwrap();
        save.cancel().unwrap();
        let report = save.finish().unwrap();
        assert!(matches!(report.outcome, Outcome::Cancelled | Outcome::Done), "{report:?}");
        drop(client.save(&saver.request(2, PATIENCE)).unwrap());
        // And one that is under way when its client goes.
        std::mem::forget(client.save(&saver.request(3, PATIENCE)).unwrap());
    }
    wait_until("every buffer is back", || stats(&watcher)["save"]["buffers_free"] == 4);
    wait_until("its memory is unmapped", || {
        !cluster.dataplane.as_ref().unwrap().maps().contains("shadowserve-region")
    });
}

#[test]
fn thousands_of_saves_leak_nothing_and_the_counts_add_up() {
    let mut cluster = Cluster::new(Codec::Int4, &[]);
    let path = cluster.path("kv.safetensors");
    write_kv(&path, 2, 32);
    cluster.start_any_store("0", &["--memory-mib", "1", "--json"]);
    let client = cluster.client();
    let saver = Saver::new(&client, &path);
    cluster.wait_for_store(&client, &saver.tokens(0));
    let save = |number| {
        let report = saver.save(number, PATIENCE);
        assert_eq!((report.outcome, report.stored), (Outcome::Done, 1), "{number}: {report:?}");
    };
    (0..100).for_each(save);
    let descriptors = |cluster: &Cluster| {
        (cluster.dataplane.as_ref().unwrap().descriptors(), cluster.store.as_ref().unwrap().descriptors())
    };
    let before = descriptors(&cluster);
    (100..2000).for_each(save);
    assert_eq!(descriptors(&cluster), before, "open descriptors of data plane and store");
    let told = stats(&client);
    let (encode, offers) = (&told["save"]["encode"], &told["save"]["offers"]);
    assert_eq!(told["save"]["buffers_free"], 4);
    assert_eq!((&encode["chunks_encoded"], &encode["chunks_failed"]), (&2000.into(), &0.into()));
    assert_eq!((&offers["begun"], &offers["failed"]), (&2000.into(), &0.into()), "{told}");
    assert_eq!(offers["stored"].as_u64().unwrap() + offers["already_stored"].as_u64().unwrap(), 2000);
    wait_until("every packet buffer is back", || {
        stats(&client)["memory"]["mbufs_in_use"].as_u64() <= Some(MBUFS_AT_REST)
    });
    let counters = &stats(&client)["counters"];
    let dropped: u64 = counters["dropped"].as_object().unwrap().values().filter_map(Value::as_u64).sum();
    let number = |name: &str| counters[name].as_u64().unwrap();
    assert_eq!(
        number("rx_packets"),
        number("rx_neighbour")
            + number("rx_icmp")
            + number("segments_accepted")
            + number("control_accepted")
            + dropped,
        "{counters}"
    );
    let report = store_report(&cluster.store.take().unwrap().terminate());
    let chunks = &report["chunks"];
    let field = |name: &str| chunks[name].as_u64().unwrap();
    assert_eq!(field("stored"), 2000);
    assert_eq!(field("held") + field("evicted"), 2000, "{report}");
    assert_eq!(field("under_way"), 0);
    // A chunk of 2 layers takes one page.
    assert_eq!(field("memory_bytes") - field("free_bytes"), field("held") * 4096, "{report}");
    let begun = sum(&report, "begun");
    assert_eq!(
        begun,
        sum(&report, "stored") + sum(&report, "declined") + sum(&report, "refused") + sum(&report, "dropped")
    );
}
