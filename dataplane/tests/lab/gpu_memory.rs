//! GPU memory of a fake driver's: caches of pages and a ring, what is asked to come there, and what then must be there.

use std::time::Duration;

use client::{
    ChunkPlace, Client, DeviceUuid, ElementType, GpuAllocation, IpcHandle, LayerBase, PageStrides, PagedKv,
    PagesRequest, PlaneBase, RingConfig, RingRequest,
};
use gpu_dma::testing::FakeDriver;

use super::chunks::{CHUNK_TOKENS, Library, SHAPE};

/// A cache `[layers, 2, pages, ..]` on one of the fake's GPUs.
pub(crate) fn cache(fake: &FakeDriver, device: u8, page_tokens: u16, hnd: bool) -> PagedKv {
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

/// All of the library, from the first token on.
pub(crate) fn chunks(library: &Library) -> Vec<ChunkPlace> {
    let mut offset = 0;
    let place = |(key, &tokens): (&protocol::Key, &u16)| {
        let place = ChunkPlace { key: key.0, tokens, offset };
        offset += u64::from(tokens);
        place
    };
    library.keys.iter().zip(&CHUNK_TOKENS).map(place).collect()
}

/// Asks for all of the library.
pub(crate) fn request<'a>(cache: &'a client::PagedCache, library: &Library) -> PagesRequest<'a> {
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
pub(crate) fn expected(kv: &PagedKv, library: &Library) -> Vec<u8> {
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

/// What the cache holds.
pub(crate) fn contents(fake: &FakeDriver, kv: &PagedKv) -> Vec<u8> {
    fake.contents(&kv.allocations[0].handle.bytes())
}

/// A ring that is smaller than a fetch of the library, and what was taken out of it.
pub(crate) struct SmallRing {
    ring: client::GpuRing,
    handle: [u8; 64],
    seen: Vec<(u32, u32)>,
}

impl SmallRing {
    /// On the fake's first GPU.
    pub(crate) fn register(client: &Client, fake: &FakeDriver) -> Self {
        let (entry_bytes, entries) = (32 << 10, 3);
        let bytes = entry_bytes * u64::from(entries);
        let handle = fake.allocate(0, bytes);
        let allocation = GpuAllocation { handle: IpcHandle::new(handle), bytes };
        let (device, element) = (DeviceUuid([1; 16]), ElementType::Bf16);
        let config = RingConfig { device, allocation, offset: 0, entry_bytes, entries, element };
        Self { ring: client.register_ring(&config).unwrap(), handle, seen: Vec::new() }
    }

    /// Asks for all of the library.
    pub(crate) fn request(&self, library: &Library) -> RingRequest<'_> {
        RingRequest {
            ring: &self.ring,
            shape: SHAPE,
            chunks: chunks(library),
            timeout: Duration::from_secs(20),
            progress: false,
        }
    }

    /// Takes out what there is of a fetch, and compares every byte.
    pub(crate) fn take(&mut self, fake: &FakeDriver, library: &Library, fetch: u64) {
        while let Some(entry) = self.ring.peek().unwrap() {
            let holds = entry.holds;
            let plane = &library.planes[holds.chunk as usize][holds.plane as usize];
            let at = usize::try_from(entry.offset).unwrap();
            assert!(holds.delivered && holds.fetch == fetch);
            assert!(fake.contents(&self.handle)[at..at + holds.bytes as usize] == **plane);
            self.seen.push((holds.chunk, holds.plane));
            self.ring.release();
        }
    }

    /// Every plane of the library was taken, once.
    pub(crate) fn assert_all(mut self) {
        self.seen.sort_unstable();
        let all = (0..3).flat_map(|chunk| (0..SHAPE.planes()).map(move |plane| (chunk, plane)));
        assert_eq!(self.seen, all.collect::<Vec<_>>(), "every plane once");
    }
}
