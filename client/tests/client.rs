//! The client against a data plane that is well, partly stocked, slow, silent, dead or lying.

mod fake;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use client::{
    Client, ClientConfig, ConnectError, FetchError, FetchRequest, Layout, LookupError, Lost, Missing,
    MissingReason, Outcome, Prefix, Region, RegisterError, RequestError, SaveError, SaveRequest, StatsError,
};
use control::handshake::{FromDataPlane, datagram};
use control::socket::Stream;
use control::{Completion, Limits};
use hugepages::{Arena, ArenaConfig, PageChoice};

use fake::{FakeDataPlane, SHAPE, WAIT, config, heads, listen_raw, tokens, until};

fn look_up(client: &Client, count: i32) -> Prefix {
    client.lookup(&tokens(count), WAIT).unwrap()
}

fn region_for(client: &Client, prefix: &Prefix) -> Region {
    client.register(prefix.sequence_bytes().unwrap()).unwrap()
}

/// A region of ordinary pages and so of just this size, wherever the tests run.
fn small_region(client: &Client, bytes: usize) -> Result<Region, RegisterError> {
    let config = ArenaConfig { name: "small", bytes, page: PageChoice::Base, numa_node: None };
    client.register_arena(Arena::new(config).unwrap())
}

fn verify(region: &Region, request: &FetchRequest<'_>, missing: &[Missing]) {
    for (index, place) in request.chunks.iter().enumerate() {
        let arrived = !missing.iter().any(|missing| missing.chunk as usize == index);
        for (at, mut expected) in heads(&request.layout, &request.shape, place) {
            let mut found = vec![0; expected.len()];
            region.copy_out(at, &mut found).unwrap();
            if !arrived {
                expected.fill(0);
            }
            assert_eq!(found, expected, "chunk {index} at {at}");
        }
    }
}

fn is_lost<T: std::fmt::Debug>(result: Result<T, FetchError>, why: &Lost) {
    match result {
        Err(FetchError::Lost(lost)) if lost == *why => {}
        other => panic!("expected {why:?}: {other:?}"),
    }
}

#[test]
fn a_stored_prefix_arrives() {
    let fake = FakeDataPlane::start();
    fake.store(&tokens(1000));
    let client = fake.connect();
    // 1100 tokens are 4 whole chunks and a part; of the stored 1000, only the 3 whole ones are a prefix.
    let prefix = look_up(&client, 1100);
    assert_eq!((prefix.chunks.len(), prefix.tokens, prefix.asked_chunks), (3, 768, 5));
    assert!(!prefix.is_whole());
    let prefix = look_up(&client, 1000);
    assert_eq!((prefix.chunks.len(), prefix.tokens, prefix.asked_chunks), (4, 1000, 4));
    assert!(prefix.is_whole());
    assert_eq!(prefix.shape, Some(SHAPE));

    let region = region_for(&client, &prefix);
    let mut request = FetchRequest::sequence(&prefix, &region).unwrap();
    request.progress = true;
    let mut fetch = client.fetch(&request).unwrap();
    let report = fetch.wait(WAIT).unwrap();
    assert_eq!(report.outcome, Outcome::Done);
    assert_eq!(report.progress.planes, 4 * 6);
    assert_eq!(report.progress.delivered_bytes, prefix.sequence_bytes().unwrap() as u64);
    assert_eq!(fetch.progress(), report.progress);
    assert_eq!(fetch.poll().unwrap(), Some(report), "the same report again");
    verify(&region, &request, &[]);

    let larger = client.register(2 * prefix.sequence_bytes().unwrap()).unwrap();
    let request = FetchRequest::chunked(&prefix, &larger, 64).unwrap();
    assert_eq!(client.fetch(&request).unwrap().finish().unwrap().outcome, Outcome::Done);
    verify(&larger, &request, &[]);
    assert!(client.stats().unwrap().contains("planes"));
}

#[test]
fn nothing_stored_is_no_error() {
    let fake = FakeDataPlane::start();
    let client = fake.connect();
    let prefix = look_up(&client, 1000);
    assert!(prefix.is_empty() && !prefix.is_whole());
    let region = client.register(4096).unwrap();
    assert_eq!(FetchRequest::sequence(&prefix, &region).unwrap_err(), RequestError::Empty);
    assert!(look_up(&client, 0).is_empty());
}

#[test]
fn what_is_missing_is_reported_and_the_rest_arrives() {
    let fake = FakeDataPlane::start();
    fake.store(&tokens(1024));
    let client = fake.connect();
    let prefix = look_up(&client, 1024);
    let region = region_for(&client, &prefix);
    fake.manners.stored.lock().unwrap().remove(&prefix.chunks[2].key.0);
    let request = FetchRequest::sequence(&prefix, &region).unwrap();
    let report = client.fetch(&request).unwrap().finish().unwrap();
    assert_eq!(report.outcome, Outcome::Failed);
    assert_eq!(report.missing, [Missing { chunk: 2, reason: MissingReason::NotStored }]);
    assert!(!report.message.is_empty());
    verify(&region, &request, &report.missing);
}

#[test]
fn many_clients_and_many_fetches_at_once() {
    let fake = FakeDataPlane::start();
    fake.store(&tokens(600));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let client = fake.connect();
                // One client, used from several threads.
                std::thread::scope(|scope| {
                    for _ in 0..4 {
                        scope.spawn(|| {
                            let prefix = look_up(&client, 600);
                            let region = region_for(&client, &prefix);
                            for _ in 0..20 {
                                let request = FetchRequest::sequence(&prefix, &region).unwrap();
                                let report = client.fetch(&request).unwrap().finish().unwrap();
                                assert_eq!(report.outcome, Outcome::Done);
                            }
                            verify(&region, &FetchRequest::sequence(&prefix, &region).unwrap(), &[]);
                        });
                    }
                });
            });
        }
    });
    until("regions are gone with their clients", || fake.manners.regions.load(Ordering::SeqCst) == 0);
}

#[test]
fn requests_that_cannot_be_are_refused_before_they_leave() {
    let fake = FakeDataPlane::start();
    fake.store(&tokens(512));
    let (client, other) = (fake.connect(), fake.connect());
    let prefix = look_up(&client, 512);
    let small = small_region(&client, 4096).unwrap();
    let error = FetchRequest::sequence(&prefix, &small).unwrap_err();
    assert!(matches!(error, RequestError::TooSmall { .. }), "{error}");
    let region = small_region(&client, prefix.sequence_bytes().unwrap()).unwrap();
    let good = FetchRequest::sequence(&prefix, &region).unwrap();
    let error = other.fetch(&good).unwrap_err();
    assert!(matches!(error, FetchError::ForeignRegion), "{error}");
    let mut bad = good.clone();
    bad.chunks[1].offset += 2;
    assert!(matches!(client.fetch(&bad).unwrap_err(), FetchError::Invalid(_)));
    let mut bad = good.clone();
    bad.layout = Layout { token: 1, ..bad.layout };
    let error = client.fetch(&bad).unwrap_err().to_string();
    assert!(error.contains("stride"), "{error}");
    let mut bad = good.clone();
    bad.timeout = Duration::ZERO;
    assert!(matches!(client.fetch(&bad).unwrap_err(), FetchError::Invalid(_)));
    let error = client.lookup(&tokens(1), Duration::ZERO).unwrap_err();
    assert!(matches!(error, LookupError::Invalid(_)), "{error}");
    let error = client.lookup(&vec![0; 256 * 4096 + 1], WAIT).unwrap_err();
    assert!(matches!(error, LookupError::TooLong { .. }), "{error}");
}

#[test]
fn what_the_data_plane_refuses() {
    let limits = Limits { commands: 1, regions: 1, ..Limits::default() };
    let fake = FakeDataPlane::with_limits(limits);
    fake.store(&tokens(256));
    let client = fake.connect();
    let prefix = look_up(&client, 256);
    let region = region_for(&client, &prefix);
    let error = client.register(4096).unwrap_err();
    assert!(matches!(&error, RegisterError::Refused { reason } if reason.contains("1 regions")), "{error}");
    fake.manners.hold.store(true, Ordering::SeqCst);
    let request = FetchRequest::sequence(&prefix, &region).unwrap();
    let held = client.fetch(&request).unwrap();
    let mut second = client.fetch(&request).unwrap();
    let error = second.wait(WAIT).unwrap_err();
    assert!(matches!(&error, FetchError::Refused { reason } if reason.contains("1 commands")), "{error}");
    let again = second.poll().unwrap_err();
    assert!(matches!(again, FetchError::Refused { .. }), "{again}");
    assert!(matches!(client.stats(), Err(StatsError::Refused(_))));
    drop(held);
    assert!(client.stats().is_ok());
}

#[test]
fn a_cancelled_fetch_ends_cancelled() {
    let fake = FakeDataPlane::start();
    fake.store(&tokens(256));
    fake.manners.hold.store(true, Ordering::SeqCst);
    let client = fake.connect();
    let prefix = look_up(&client, 256);
    let region = region_for(&client, &prefix);
    let mut fetch = client.fetch(&FetchRequest::sequence(&prefix, &region).unwrap()).unwrap();
    assert!(fetch.poll().unwrap().is_none());
    let error = fetch.wait(Duration::from_millis(20)).unwrap_err();
    assert!(matches!(error, FetchError::StillUnderWay { waited_ms: 20 }), "{error}");
    fetch.cancel().unwrap();
    assert_eq!(fetch.wait(WAIT).unwrap().outcome, Outcome::Cancelled);
    fetch.cancel().unwrap();
}

#[test]
fn a_dropped_fetch_reserves_its_memory_until_it_has_ended() {
    let fake = FakeDataPlane::start();
    fake.store(&tokens(256));
    fake.manners.hold.store(true, Ordering::SeqCst);
    let mut config = config();
    config.drop_wait = Duration::from_millis(20);
    let client = Client::connect(fake.path(), &config).unwrap();
    let prefix = look_up(&client, 256);
    let bytes = prefix.sequence_bytes().unwrap();
    let region = client.register(2 * bytes.next_multiple_of(4096)).unwrap();
    let request = FetchRequest::sequence(&prefix, &region).unwrap();

    // Heeded: the drop returns after the end.
    drop(client.fetch(&request).unwrap());
    assert!(client.fetch(&request).is_ok());

    // Not heeded: the place stays taken, another one in the same region is free.
    fake.manners.deaf.store(true, Ordering::SeqCst);
    drop(client.fetch(&request).unwrap());
    assert!(matches!(client.fetch(&request), Err(FetchError::RegionBusy)));
    let elsewhere = FetchRequest::chunked(&prefix, &region, bytes as u64).unwrap();
    fake.manners.hold.store(false, Ordering::SeqCst);
    assert_eq!(client.fetch(&elsewhere).unwrap().finish().unwrap().outcome, Outcome::Done);
    // The region outlives its owner for as long as the fetch may write to it.
    drop(region);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(fake.manners.regions.load(Ordering::SeqCst), 1);
}

#[test]
fn a_dropped_region_is_unregistered() {
    let limits = Limits { regions: 1, ..Limits::default() };
    let fake = FakeDataPlane::with_limits(limits);
    let client = fake.connect();
    for _ in 0..50 {
        let region = small_region(&client, 4096).expect("the one before is gone");
        drop(region.clone());
        assert_eq!(region.bytes(), 4096);
    }
    until("the last is gone", || fake.manners.regions.load(Ordering::SeqCst) == 0);
}

#[test]
fn more_commands_than_fit_wait_for_room() {
    let limits = Limits { commands: 1_000_000, ..Limits::default() };
    let fake = FakeDataPlane::with_limits(limits);
    let sequence = tokens(256 * 200);
    fake.store(&sequence);
    let client = fake.connect();
    let prefix = client.lookup(&sequence, WAIT).unwrap();
    let region = region_for(&client, &prefix);
    // 200 chunks are 8 KB of command: the ring holds 128 of them, and the data plane takes one a millisecond.
    fake.manners.per_ms.store(1, Ordering::SeqCst);
    fake.manners.hold.store(true, Ordering::SeqCst);
    let mut request = FetchRequest::sequence(&prefix, &region).unwrap();
    request.timeout = Duration::from_secs(60);
    let mut fetches: Vec<_> = (0..400).map(|_| client.fetch(&request).unwrap()).collect();
    for fetch in &mut fetches {
        fetch.cancel().unwrap();
    }
    for fetch in &mut fetches {
        assert_eq!(fetch.wait(Duration::from_secs(60)).unwrap().outcome, Outcome::Cancelled);
    }
}

#[test]
fn a_data_plane_that_takes_nothing_is_full() {
    let fake = FakeDataPlane::start();
    let sequence = tokens(256 * 200);
    fake.store(&sequence);
    let client = fake.connect();
    let prefix = client.lookup(&sequence, WAIT).unwrap();
    let region = region_for(&client, &prefix);
    fake.manners.hold.store(true, Ordering::SeqCst);
    fake.manners.stopped.store(true, Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(50));
    let mut request = FetchRequest::sequence(&prefix, &region).unwrap();
    request.timeout = Duration::from_millis(50);
    let mut fetches = Vec::new();
    let error = loop {
        match client.fetch(&request) {
            Ok(fetch) => fetches.push(fetch),
            Err(error) => break error,
        }
        assert!(fetches.len() < 1000);
    };
    assert!(matches!(error, FetchError::Full), "{error}");
    assert!(fetches.len() > 50);
    fake.manners.stopped.store(false, Ordering::SeqCst);
    for mut fetch in fetches {
        fetch.cancel().unwrap();
        assert_eq!(fetch.wait(WAIT).unwrap().outcome, Outcome::Cancelled);
    }
}

#[test]
fn a_killed_data_plane_is_noticed_at_once() {
    let mut fake = FakeDataPlane::start();
    fake.store(&tokens(256));
    fake.manners.hold.store(true, Ordering::SeqCst);
    let client = fake.connect();
    let prefix = look_up(&client, 256);
    let region = region_for(&client, &prefix);
    let request = FetchRequest::sequence(&prefix, &region).unwrap();
    let mut fetch = client.fetch(&request).unwrap();
    let waiting = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| fetch.wait(Duration::from_secs(60)));
        std::thread::sleep(Duration::from_millis(50));
        let killed = Instant::now();
        fake.kill();
        let result = waiting.join().unwrap();
        assert!(killed.elapsed() < WAIT, "within a second on an idle machine");
        result
    });
    is_lost(waiting, &Lost::HungUp);
    assert_eq!(client.lost(), Some(Lost::HungUp));
    is_lost(client.fetch(&request), &Lost::HungUp);
    assert!(matches!(client.lookup(&tokens(1), WAIT), Err(LookupError::Lost(Lost::HungUp))));
    assert!(matches!(client.register(4096), Err(RegisterError::Lost(Lost::HungUp))));
    is_lost(fetch.poll(), &Lost::HungUp);
    drop(fetch);
    let mut bytes = [0; 8];
    region.copy_out(0, &mut bytes).expect("the memory is still there");
}

#[test]
fn a_heartbeat_that_stands_still_is_noticed() {
    let fake = FakeDataPlane::start();
    let limit = Duration::from_millis(1500);
    let client = Client::connect(fake.path(), &ClientConfig { heartbeat_limit: limit, ..config() }).unwrap();
    // Longer than the limit: a session in which nothing happens is not lost.
    std::thread::sleep(Duration::from_millis(2000));
    assert_eq!(client.lost(), None);
    fake.manners.heartless.store(true, Ordering::SeqCst);
    until("the client notices", || client.lost().is_some());
    assert_eq!(client.lost(), Some(Lost::Silent { limit_ms: 1500 }));
    // The data plane sees the client hang up.
    until("the client is gone", || client.stats().is_err());
}

#[test]
fn a_client_that_goes_takes_its_fetches_along() {
    let fake = FakeDataPlane::start();
    fake.store(&tokens(256));
    fake.manners.hold.store(true, Ordering::SeqCst);
    let client = fake.connect();
    let prefix = look_up(&client, 256);
    let region = region_for(&client, &prefix);
    let mut fetch = client.fetch(&FetchRequest::sequence(&prefix, &region).unwrap()).unwrap();
    assert!(client.stats().is_ok(), "the fetch has been taken");
    let begun = Instant::now();
    drop(client);
    assert!(begun.elapsed() < WAIT);
    is_lost(fetch.wait(WAIT), &Lost::Dropped);
    until("the data plane cancels it", || fake.manners.orphans.load(Ordering::SeqCst) == 1);
}

#[test]
fn lies_end_the_session() {
    let never_asked = Completion::Unregistered { id: 999_999 };
    // The first command of each client gets id 1: an answer of the wrong kind, and two answers.
    let wrong_kind = Completion::LookupFailed { id: 1, message: String::new() };
    for nonsense in [never_asked, wrong_kind] {
        let raw = tempfile::tempdir().unwrap();
        let path = raw.path().join("liar.sock");
        let listener = listen_raw(&path);
        let liar = std::thread::spawn(move || lie(&listener, &nonsense));
        let client = Client::connect(&path, &config()).unwrap();
        let error = client.stats().unwrap_err();
        assert!(matches!(&error, StatsError::Lost(Lost::Broken(_))), "{error}");
        assert!(error.to_string().contains("broke the protocol"), "{error}");
        drop(client);
        liar.join().unwrap();
    }
}

/// A data plane that answers the first command with whatever it is told to.
fn lie(listener: &std::os::fd::OwnedFd, completion: &Completion) {
    use control::doorbell::line_pair;
    use control::session::{Endpoint, Sent, Side, create};
    use std::os::fd::AsFd;

    let stream = Stream::new(rustix::net::accept(listener).unwrap());
    let mut bytes = Vec::new();
    until("hello", || stream.receive(&mut bytes).unwrap().is_some());
    let (memory, (ours, theirs)) = (create().unwrap(), line_pair().unwrap());
    let welcome = datagram(&FromDataPlane::Welcome { name: "liar".to_owned() });
    stream.send(&welcome, &[memory.fd(), theirs.as_fd()]).unwrap();
    until("attached", || stream.receive(&mut bytes).unwrap().is_some());
    let mut endpoint = Endpoint::new(memory, Side::DataPlane, ours.into()).unwrap();
    until("a command", || endpoint.receive(&mut bytes).unwrap());
    control::codec::encode(completion, &mut bytes);
    assert_eq!(endpoint.send(&bytes), Ok(Sent::Sent));
    until("the client hangs up", || stream.receive(&mut bytes).is_err());
}

#[test]
fn hostile_welcomes_are_named() {
    let memory = |bytes| {
        let config = ArenaConfig { name: "hostile", bytes, page: PageChoice::Base, numa_node: None };
        Arena::new(config).unwrap()
    };
    let welcome = datagram(&FromDataPlane::Welcome { name: "hostile".to_owned() });
    let blank = memory(control::session::SESSION_BYTES);
    let short = memory(4096);
    let cases: [(&[u8], usize, &Arena, &str); 6] = [
        (b"HTTP/1.1 400 Bad Request", 0, &blank, "does not speak"),
        (&welcome[..8], 0, &blank, "malformed"),
        (&welcome, 0, &blank, "does not speak"),
        (&welcome, 1, &blank, "does not speak"),
        (&welcome, 2, &short, "4096 bytes"),
        (&welcome, 2, &blank, "magic 0x0"),
    ];
    for (answer, fds, arena, expected) in cases {
        let raw = tempfile::tempdir().unwrap();
        let path = raw.path().join("hostile.sock");
        let listener = listen_raw(&path);
        let error = std::thread::scope(|scope| {
            let client = scope.spawn(|| Client::connect(&path, &config()).unwrap_err());
            let stream = Stream::new(rustix::net::accept(&listener).unwrap());
            stream.send(answer, &[arena.fd(), arena.fd()][..fds]).unwrap();
            client.join().unwrap()
        });
        let ConnectError::Attach(error) = error else { panic!("{error}") };
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn spinning_finds_the_same() {
    let fake = FakeDataPlane::start();
    fake.store(&tokens(300));
    let mut config = config();
    config.spin = Duration::from_millis(5);
    let client = Client::connect(fake.path(), &config).unwrap();
    let prefix = look_up(&client, 300);
    let region = region_for(&client, &prefix);
    for _ in 0..100 {
        let request = FetchRequest::sequence(&prefix, &region).unwrap();
        let mut fetch = client.fetch(&request).unwrap();
        assert_eq!(fetch.wait(WAIT).unwrap().outcome, Outcome::Done);
    }
}

#[test]
fn clients_can_be_shared() {
    fn assert_shared<T: Send + Sync>() {}
    assert_shared::<Client>();
    assert_shared::<Region>();
    assert_shared::<client::Fetch>();
}

fn save_request<'a>(client: &Client, region: &'a Region, count: i32) -> SaveRequest<'a> {
    let tokens = tokens(count);
    let keys = client.keys(&tokens);
    SaveRequest::sequence(region, SHAPE, client::Codec::Int4, &keys, tokens.len()).unwrap()
}

#[test]
fn what_was_saved_is_found() {
    let fake = FakeDataPlane::start();
    let client = fake.connect();
    let region = client.register(1 << 20).unwrap();
    assert!(look_up(&client, 600).is_empty());
    let report = client.save(&save_request(&client, &region, 600)).unwrap().finish().unwrap();
    assert_eq!((report.outcome, report.stored, report.already_stored), (Outcome::Done, 3, 0));
    assert!(look_up(&client, 600).is_whole());
    let report = client.save(&save_request(&client, &region, 600)).unwrap().finish().unwrap();
    assert_eq!((report.outcome, report.stored, report.already_stored), (Outcome::Done, 0, 3));
    // What contradicts itself does not leave this process.
    let keys = client.keys(&tokens(600));
    let small = small_region(&client, 4096).unwrap();
    let refused = SaveRequest::sequence(&small, SHAPE, client::Codec::Int4, &keys, 600);
    assert!(matches!(refused, Err(RequestError::TooSmall { .. })), "{refused:?}");
    assert!(matches!(
        SaveRequest::sequence(&region, SHAPE, client::Codec::Int4, &[], 0),
        Err(RequestError::NoTokens)
    ));
    let mut outside = save_request(&client, &region, 600);
    outside.chunks[2].offset = region.bytes() as u64;
    assert!(matches!(client.save(&outside), Err(SaveError::Invalid(_))));
    let other = fake.connect();
    assert!(matches!(other.save(&save_request(&client, &region, 600)), Err(SaveError::ForeignRegion)));
}

#[test]
fn a_save_is_waited_for_cancelled_and_dropped() {
    let fake = FakeDataPlane::start();
    let client = fake.connect();
    let region = client.register(1 << 20).unwrap();
    fake.manners.hold.store(true, Ordering::SeqCst);
    let mut save = client.save(&save_request(&client, &region, 600)).unwrap();
    assert!(matches!(save.wait(Duration::ZERO), Err(SaveError::StillUnderWay { .. })));
    save.cancel().unwrap();
    drop(save);
    drop(client.save(&save_request(&client, &region, 300)).unwrap());
    fake.manners.hold.store(false, Ordering::SeqCst);
    let report = client.save(&save_request(&client, &region, 600)).unwrap().finish().unwrap();
    assert_eq!(report.outcome, Outcome::Done);
}
