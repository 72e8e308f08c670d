//! A data plane that delivers to GPUs, on a driver without a GPU: where planes land, and what happens when a client dies in
//! mid-copy or a GPU is lost.

#[allow(dead_code, unused_imports, reason = "each test binary uses its part")]
mod lab;

use std::sync::Arc;
use std::time::{Duration, Instant};

use client::{Client, ClientConfig, DeviceUuid, Fetch, FetchReport, MissingReason, Outcome, PagedKv};
use compress::Codec;
use dataplane::{GpuConfig, RunError};
use gpu_dma::testing::{FakeDriver, Pace};
use gpu_dma::{Driver, GpuSinkConfig};
use protocol::Namespace;

use lab::chunks::Library;
use lab::gpu_memory::{SmallRing, cache, contents, expected, request};
use lab::random::Random;
use lab::{Lab, Rates, Round};

fn quiet(library: &Library) -> Round<'_> {
    Round {
        name: "gpu",
        seed: 1,
        library,
        rates: Rates::default(),
        twist: None,
        missing: &[],
        cut: 0,
        timeout: Duration::from_secs(20),
        cancel_after: None,
        restart_after: None,
        unreachable_after: None,
    }
}

/// Serves the store until a fetch has ended; `between` is called again and again meanwhile.
fn follow(lab: &mut Lab, library: &Library, mut fetch: Fetch, mut between: impl FnMut()) -> FetchReport {
    let (mut round, mut random) = (quiet(library), Random::new(1));
    let limit = Instant::now() + Duration::from_secs(30);
    loop {
        lab.serve(&mut round, &mut random);
        between();
        if let Some(report) = fetch.poll().unwrap() {
            return report;
        }
        assert!(Instant::now() < limit, "the fetch does not end");
    }
}

/// One test, because a process starts one EAL; the last part ends the data plane.
#[test]
fn planes_reach_gpus_and_what_goes_wrong_there_stays_there() {
    let library = Library::new(Codec::Int4.into(), 3);
    let fake = Arc::new(FakeDriver::new(2, Pace::Random(7)));
    let driver: Arc<dyn Driver> = fake.clone();
    let mut lab = Lab::start_with(GpuConfig {
        driver: Some(driver),
        sink: GpuSinkConfig::default(),
        ..GpuConfig::default()
    });
    assert_eq!(fake.registered(), 1, "the slots are registered from the start");
    pages(&mut lab, &fake, &library);
    ring(&mut lab, &fake, &library);
    refusals(&lab, &fake);
    a_client_dies(&mut lab, &fake, &library);
    pages(&mut lab, &fake, &library);
    a_gpu_is_lost(lab, &fake, &library);
}

fn pages(lab: &mut Lab, fake: &FakeDriver, library: &Library) {
    for (device, page_tokens, hnd) in [(0, 16, false), (1, 48, true), (0, 256, true)] {
        let kv = cache(fake, device, page_tokens, hnd);
        let cache = lab.client().register_pages(kv.clone()).unwrap();
        lab.fresh_store();
        let fetch = lab.client().fetch_pages(&request(&cache, library)).unwrap();
        let report = follow(lab, library, fetch, || ());
        assert_eq!(report.outcome, Outcome::Done, "{report:?}");
        assert!(contents(fake, &kv) == expected(&kv, library), "pages of {page_tokens}, HND: {hnd}");
    }
}

/// A ring smaller than the fetch, emptied as it fills.
fn ring(lab: &mut Lab, fake: &FakeDriver, library: &Library) {
    let mut ring = SmallRing::register(lab.client(), fake);
    lab.fresh_store();
    let fetch = lab.client().fetch_ring(&ring.request(library)).unwrap();
    let id = fetch.id();
    let report = follow(lab, library, fetch, || ring.take(fake, library, id));
    ring.take(fake, library, id);
    assert_eq!(report.outcome, Outcome::Done, "{report:?}");
    ring.assert_all();
}

fn refusals(lab: &Lab, fake: &FakeDriver) {
    let refuse = |kv: PagedKv| lab.client().register_pages(kv).unwrap_err().to_string();
    let kv = cache(fake, 0, 16, false);
    let other = PagedKv { device: DeviceUuid([7; 16]), ..kv.clone() };
    assert!(refuse(other).contains("does not use the GPU GPU-07070707"));
    let mut larger = kv.clone();
    larger.allocations[0].bytes += 1;
    assert!(refuse(larger).contains("and has"));
    fake.kill(&kv.allocations[0].handle.bytes());
    assert!(refuse(kv).contains("cannot be opened"));
}

/// Its memory stays until the last copy to it has ended; then it is let go, and others go on.
fn a_client_dies(lab: &mut Lab, fake: &FakeDriver, library: &Library) {
    fake.set_pace(Pace::ByHand);
    let kv = cache(fake, 1, 16, false);
    let handle = kv.allocations[0].handle.bytes();
    let victim = Client::connect(lab.socket(), &ClientConfig::new(Namespace::default())).unwrap();
    let cache = victim.register_pages(kv).unwrap();
    let starts = fake.starts();
    lab.fresh_store();
    let fetch = victim.fetch_pages(&request(&cache, library)).unwrap();
    let (mut round, mut random) = (quiet(library), Random::new(1));
    let limit = Instant::now() + Duration::from_secs(30);
    while fake.starts() == starts {
        lab.serve(&mut round, &mut random);
        assert!(Instant::now() < limit, "no copy begins");
    }
    // Hangs up first, as a process that is killed does: nothing waits for the fetch.
    drop(victim);
    drop((fetch, cache));
    for _ in 0..50 {
        lab.serve(&mut round, &mut random);
    }
    assert_eq!(fake.mapped(&handle), 1, "a copy to it is under way");
    fake.set_pace(Pace::Random(3));
    while fake.mapped(&handle) > 0 {
        lab.serve(&mut round, &mut random);
        assert!(Instant::now() < limit, "its memory stays mapped");
    }
}

fn a_gpu_is_lost(mut lab: Lab, fake: &FakeDriver, library: &Library) {
    fake.set_pace(Pace::ByHand);
    let cache = lab.client().register_pages(cache(fake, 0, 16, false)).unwrap();
    let starts = fake.starts();
    lab.fresh_store();
    let fetch = lab.client().fetch_pages(&request(&cache, library)).unwrap();
    let report = follow(&mut lab, library, fetch, || {
        if fake.starts() > starts {
            fake.break_device(0);
        }
    });
    assert_ne!(report.outcome, Outcome::Done, "{report:?}");
    let reasons = [MissingReason::NotDelivered, MissingReason::Cancelled];
    assert!(report.missing.iter().all(|missing| reasons.contains(&missing.reason)), "{report:?}");
    drop(cache);
    let ended = lab.end();
    assert!(matches!(ended, Err(RunError::Gpu(error)) if error.code == 700), "{ended:?}");
    assert_eq!(fake.registered(), 0, "the slots are unregistered at the end");
}
