//! A data plane that delivers to GPUs, on a driver without a GPU: where planes land, and what happens when a client dies in
//! mid-copy or a GPU is lost.

#[allow(dead_code, unused_imports, reason = "each test binary uses its part")]
mod lab;

use std::sync::Arc;
use std::time::{Duration, Instant};

use client::{
    ChunkPlace, Client, ClientConfig, DeviceUuid, ElementType, Fetch, FetchReport, GpuAllocation, IpcHandle,
    LayerBase, MissingReason, Outcome, PageStrides, PagedKv, PagesRequest, PlaneBase, RingConfig,
    RingRequest,
};
use compress::Codec;
use dataplane::{GpuConfig, RunError};
use gpu_dma::testing::{FakeDriver, Pace};
use gpu_dma::{Driver, GpuSinkConfig};
use protocol::Namespace;

use lab::chunks::{CHUNK_TOKENS, Library, SHAPE};
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

/// A cache `[layers, 2, pages, ..]` on one of the fake's GPUs.
fn cache(fake: &FakeDriver, device: u8, page_tokens: u16, hnd: bool) -> PagedKv {
    let (heads, dim, element) = (SHAPE.kv_heads, SHAPE.head_dim, ElementType::Bf16);
    let strides = if hnd {
        PageStrides::hnd(page_tokens, heads, dim, element)
    } else {
        PageStrides::nhd(page_tokens, heads, dim, element)
    };
    let pages = 2 * u64::try_from(Library::tokens()).unwrap().div_ceil(page_tokens.into());
    let plane = |n: u64| PlaneBase::new(0, n * pages * strides.page);
    let bytes = u64::from(SHAPE.planes()) * pages * strides.page;
    let handle = IpcHandle::new(fake.allocate(usize::from(device), bytes));
    PagedKv {
        device: DeviceUuid([device + 1; 16]),
        allocations: vec![GpuAllocation { handle, bytes }],
        element,
        page_tokens,
        pages: u32::try_from(pages).unwrap(),
        kv_heads: heads,
        head_dim: dim,
        k: strides,
        v: strides,
        layers: (0..u64::from(SHAPE.layers))
            .map(|layer| LayerBase { k: plane(2 * layer), v: plane(2 * layer + 1) })
            .collect(),
    }
}

/// Every second page, from the last one down.
fn table(kv: &PagedKv) -> Vec<u32> {
    (0..kv.pages).rev().step_by(2).collect()
}

fn chunks(library: &Library) -> Vec<ChunkPlace> {
    let mut offset = 0;
    let place = |(key, &tokens): (&protocol::Key, &u16)| {
        let place = ChunkPlace { key: key.0, tokens, offset };
        offset += u64::from(tokens);
        place
    };
    library.keys.iter().zip(&CHUNK_TOKENS).map(place).collect()
}

fn request<'a>(cache: &'a client::PagedCache, library: &Library) -> PagesRequest<'a> {
    PagesRequest {
        cache,
        shape: SHAPE,
        table: table(cache.kv()),
        chunks: chunks(library),
        timeout: Duration::from_secs(20),
        progress: false,
    }
}

/// What the cache must hold, element by element; zero where nothing was to go.
fn expected(kv: &PagedKv, library: &Library) -> Vec<u8> {
    let mut memory = vec![0; usize::try_from(kv.allocations[0].bytes).unwrap()];
    let (table, head_bytes) = (table(kv), usize::from(SHAPE.head_dim) * 2);
    let mut first = 0;
    for (planes, &tokens) in library.planes.iter().zip(&CHUNK_TOKENS) {
        for (plane, bytes) in planes.iter().enumerate() {
            let layer = &kv.layers[plane / 2];
            let (base, strides) = if plane.is_multiple_of(2) { (layer.k, kv.k) } else { (layer.v, kv.v) };
            for (row, vector) in bytes.chunks_exact(head_bytes).enumerate() {
                let heads = usize::from(SHAPE.kv_heads);
                let (token, head) = (first + row / heads, row % heads);
                let size = usize::from(kv.page_tokens);
                let place = [
                    (u64::from(table[token / size]), strides.page),
                    ((token % size) as u64, strides.token),
                    (head as u64, strides.head),
                ];
                let at = base.offset + place.iter().map(|(index, stride)| index * stride).sum::<u64>();
                let at = usize::try_from(at).unwrap();
                memory[at..at + head_bytes].copy_from_slice(vector);
            }
        }
        first += usize::from(tokens);
    }
    memory
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

fn contents(fake: &FakeDriver, kv: &PagedKv) -> Vec<u8> {
    fake.contents(&kv.allocations[0].handle.bytes())
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
    let (entry_bytes, entries) = (32 << 10, 3);
    let handle = fake.allocate(0, entry_bytes * u64::from(entries));
    let allocation =
        GpuAllocation { handle: IpcHandle::new(handle), bytes: entry_bytes * u64::from(entries) };
    let (device, element) = (DeviceUuid([1; 16]), ElementType::Bf16);
    let config = RingConfig { device, allocation, offset: 0, entry_bytes, entries, element };
    let ring = lab.client().register_ring(&config).unwrap();
    let request = RingRequest {
        ring: &ring,
        shape: SHAPE,
        chunks: chunks(library),
        timeout: Duration::from_secs(20),
        progress: false,
    };
    lab.fresh_store();
    let fetch = lab.client().fetch_ring(&request).unwrap();
    let id = fetch.id();
    let mut seen = Vec::new();
    let mut take = || {
        while let Some(entry) = ring.peek().unwrap() {
            let holds = entry.holds;
            let plane = &library.planes[holds.chunk as usize][holds.plane as usize];
            let at = usize::try_from(entry.offset).unwrap();
            assert!(holds.delivered && holds.fetch == id);
            assert!(fake.contents(&handle)[at..at + holds.bytes as usize] == **plane);
            seen.push((holds.chunk, holds.plane));
            ring.release();
        }
    };
    let report = follow(lab, library, fetch, &mut take);
    take();
    assert_eq!(report.outcome, Outcome::Done, "{report:?}");
    seen.sort_unstable();
    let all = (0..3).flat_map(|chunk| (0..SHAPE.planes()).map(move |plane| (chunk, plane)));
    assert_eq!(seen, all.collect::<Vec<_>>(), "every plane once");
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
