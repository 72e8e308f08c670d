//! GPU memory as the client describes it, and fetches into it, against a data plane that only notes what it is asked.

#[allow(dead_code, reason = "each test binary uses its part")]
mod fake;

use client::{
    Codec, CommandError, DeviceUuid, ElementType, FetchError, GpuAllocation, IpcHandle, LayerBase, Outcome,
    PageStrides, PagedKv, PagesRequest, PlaneBase, Prefix, RegisterError, RequestError, RingConfig,
    RingRequest, SaveCodec, SaveError, SavePagesRequest,
};
use fake::{FakeDataPlane, GPU, SHAPE, WAIT, tokens, until};

const ALLOCATION: GpuAllocation = GpuAllocation { handle: handle(), bytes: 1 << 20 };

const fn handle() -> IpcHandle {
    IpcHandle::from_halves([[3; 32], [4; 32]])
}

fn cache(device: DeviceUuid) -> PagedKv {
    let strides = PageStrides::nhd(16, SHAPE.kv_heads, SHAPE.head_dim, ElementType::Bf16);
    PagedKv {
        device,
        allocations: vec![ALLOCATION],
        element: ElementType::Bf16,
        page_tokens: 16,
        pages: 100,
        kv_heads: SHAPE.kv_heads,
        head_dim: SHAPE.head_dim,
        k: strides,
        v: strides,
        layers: (0..u64::from(SHAPE.layers))
            .map(|layer| LayerBase {
                k: PlaneBase::new(0, layer * 200 * strides.page),
                v: PlaneBase::new(0, (layer * 200 + 100) * strides.page),
            })
            .collect(),
    }
}

fn stored(fake: &FakeDataPlane, client: &client::Client, count: i32) -> Prefix {
    fake.store(&tokens(count));
    client.lookup(&tokens(count), WAIT).unwrap()
}

#[test]
fn a_prefix_goes_to_the_pages_of_its_table() {
    let fake = FakeDataPlane::start();
    let client = fake.connect();
    let prefix = stored(&fake, &client, 600);
    let cache = client.register_pages(cache(GPU)).unwrap();
    let table: Vec<u32> = (0..38).map(|page| (page * 7) % 100).collect();
    let request = PagesRequest::prefix(&prefix, &cache, table.clone()).unwrap();
    let mut fetch = client.fetch_pages(&request).unwrap();
    assert_eq!(fetch.wait(WAIT).unwrap().outcome, Outcome::Done);
    let request = PagesRequest::suffix(&prefix, &cache, table.clone(), 2).unwrap();
    assert_eq!(client.fetch_pages(&request).unwrap().finish().unwrap().outcome, Outcome::Done);
    let asked = fake.manners.paged.lock().unwrap().clone();
    assert!(asked.iter().all(|(pages, _)| *pages == table));
    let places = |index: usize| asked[index].1.iter().map(|c| (c.offset, c.tokens)).collect::<Vec<_>>();
    assert_eq!(places(0), [(0, 256), (256, 256), (512, 88)]);
    assert_eq!(places(1), [(512, 88)]);
}

#[test]
fn pages_are_saved_chunk_by_chunk_and_what_cannot_be_is_refused_before_it_leaves() {
    let fake = FakeDataPlane::start();
    let client = fake.connect();
    let bf16 = client.register_pages(cache(GPU)).unwrap();
    let (keys, table) = (client.keys(&tokens(600)), vec![5; 38]);
    let request = |cache, table| SavePagesRequest::sequence(cache, Codec::Int4, &keys, 600, table);
    let mut saved = request(&bf16, table.clone()).unwrap();
    let places: Vec<_> = saved.chunks.iter().map(|chunk| (chunk.offset, chunk.tokens)).collect();
    assert_eq!(places, [(0, 256), (256, 256), (512, 88)]);
    assert_eq!((saved.shape, &saved.table), (SHAPE, &table));
    let report = client.save_pages(&saved).unwrap().finish().unwrap();
    assert_eq!((report.outcome, report.stored), (Outcome::Done, 3));
    assert!(client.lookup(&tokens(600), WAIT).unwrap().is_whole());

    let none = SavePagesRequest::sequence(&bf16, Codec::Int4, &[], 0, table.clone()).unwrap_err();
    assert_eq!(none, RequestError::NoTokens);
    let short = request(&bf16, vec![5; 37]).unwrap_err();
    assert_eq!(short, RequestError::Table { pages: 37, tokens: 600 });
    let more = SavePagesRequest::sequence(&bf16, Codec::Int4, &keys, 769, vec![5; 49]).unwrap_err();
    assert_eq!(more, RequestError::TooMany { chunks: 3 });
    let fp8 = PagedKv { element: ElementType::Fp8E4m3, ..cache(GPU) };
    let fp8 = client.register_pages(fp8).unwrap();
    assert_eq!(
        request(&fp8, table.clone()).unwrap_err(),
        RequestError::Element { element: ElementType::Fp8E4m3 }
    );
    // A profile that is longer than any can be, and a page that there is not.
    saved.codec = SaveCodec::Profile { id: "profile-00".into(), text: " ".repeat((64 << 10) + 1) };
    let error = client.save_pages(&saved).unwrap_err();
    assert!(matches!(error, SaveError::Invalid(CommandError::Profile { bytes: 65_537 })), "{error}");
    let wrong = request(&bf16, vec![100; 38]).unwrap();
    assert!(matches!(client.save_pages(&wrong), Err(SaveError::Invalid(_))));
}

#[test]
fn tables_that_do_not_fit_are_refused_before_they_leave() {
    let fake = FakeDataPlane::start();
    let client = fake.connect();
    let prefix = stored(&fake, &client, 600);
    let cache = client.register_pages(cache(GPU)).unwrap();
    let short = PagesRequest::prefix(&prefix, &cache, vec![0; 37]).unwrap_err();
    assert_eq!(short, RequestError::Table { pages: 37, tokens: 600 });
    assert_eq!(PagesRequest::suffix(&prefix, &cache, vec![0; 38], 3).unwrap_err(), RequestError::Empty);
    let wrong = PagesRequest::prefix(&prefix, &cache, vec![100; 38]).unwrap();
    let error = client.fetch_pages(&wrong).unwrap_err();
    assert!(matches!(error, FetchError::Invalid(_)), "{error}");
    let other = fake.connect();
    let request = PagesRequest::prefix(&prefix, &cache, vec![0; 38]).unwrap();
    assert!(matches!(other.fetch_pages(&request), Err(FetchError::ForeignRegion)));
    assert!(fake.manners.paged.lock().unwrap().is_empty());
}

#[test]
fn memory_that_the_data_plane_cannot_open_is_refused_with_its_reason() {
    let fake = FakeDataPlane::start();
    let client = fake.connect();
    let error = client.register_pages(cache(DeviceUuid([0; 16]))).unwrap_err();
    assert!(error.to_string().contains("no such GPU"), "{error}");
    let wrong = PagedKv { pages: 1 << 20, ..cache(GPU) };
    assert!(matches!(client.register_pages(wrong), Err(RegisterError::Gpu(_))));
}

#[test]
fn pages_of_a_dropped_fetch_stay_reserved_until_its_end() {
    use std::sync::atomic::Ordering;
    let fake = FakeDataPlane::start();
    let mut config = fake::config();
    config.drop_wait = std::time::Duration::ZERO;
    let client = client::Client::connect(fake.path(), &config).unwrap();
    let prefix = stored(&fake, &client, 16);
    let cache = client.register_pages(cache(GPU)).unwrap();
    fake.manners.hold.store(true, Ordering::SeqCst);
    fake.manners.deaf.store(true, Ordering::SeqCst);
    let request = |page| PagesRequest::prefix(&prefix, &cache, vec![page]).unwrap();
    drop(client.fetch_pages(&request(5)).unwrap());
    assert!(matches!(client.fetch_pages(&request(5)), Err(FetchError::RegionBusy)));
    fake.manners.hold.store(false, Ordering::SeqCst);
    let report = client.fetch_pages(&request(6)).unwrap().finish().unwrap();
    assert_eq!(report.outcome, Outcome::Done, "other pages are free");
}

#[test]
fn a_ring_gives_planes_in_order_and_is_revoked_when_dropped() {
    let fake = FakeDataPlane::start();
    let client = fake.connect();
    let prefix = stored(&fake, &client, 300);
    let planes = u32::try_from(prefix.chunks.len()).unwrap() * SHAPE.planes();
    let config = RingConfig {
        device: GPU,
        allocation: ALLOCATION,
        offset: 256,
        entry_bytes: 4096,
        entries: 16,
        element: ElementType::Bf16,
    };
    let ring = client.register_ring(&config).unwrap();
    let mut fetch = client.fetch_ring(&RingRequest::prefix(&prefix, &ring).unwrap()).unwrap();
    assert_eq!(fetch.wait(WAIT).unwrap().outcome, Outcome::Done);
    for number in 0..planes {
        let entry = ring.peek().unwrap().expect("a filled entry");
        assert_eq!((entry.holds.fetch, entry.offset), (fetch.id(), 256 + u64::from(number % 16) * 4096));
        assert_eq!(
            (entry.holds.chunk, entry.holds.plane),
            (number / SHAPE.planes(), number % SHAPE.planes())
        );
        ring.release();
    }
    assert_eq!(ring.peek(), Ok(None));
    let entry_too_small = RingConfig { entry_bytes: 256, ..config };
    let small = client.register_ring(&entry_too_small).unwrap();
    let request = RingRequest::prefix(&prefix, &small).unwrap();
    assert!(matches!(client.fetch_ring(&request), Err(FetchError::Invalid(_))));
    drop((ring, small));
    until("both are gone", || client.register_ring(&config).is_ok());
    assert!(matches!(
        client.register_ring(&RingConfig { entries: 1 << 20, ..config }),
        Err(RegisterError::Ring(_))
    ));
}
