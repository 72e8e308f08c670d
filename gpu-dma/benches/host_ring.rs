//! Copying planes to the host ring, against other ways to move the same bytes: all in one run, compare within it.
//!
//! The source is one slot, warm as a decoder leaves it; the destination moves through 64 MiB, so that it is cold as in
//! a large ring. `memcpy` is the yardstick: the same copy between memory of this process, seen by the compiler.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gpu_dma::{ChunkShape, HeadOrder, Layout, Placement};
use hugepages::{Arena, ArenaConfig, OutOfBounds, PageChoice, Slot, Slots};

const REGION_BYTES: usize = 64 << 20;

fn arena(name: &str, bytes: usize) -> Arena {
    Arena::new(ArenaConfig { name, bytes, page: PageChoice::Huge2M, numa_node: None }).expect("memory")
}

#[cfg(target_arch = "x86_64")]
mod other_ways {
    /// `rep movsb`, which fast-string CPUs also do without fetching the destination.
    ///
    /// # Safety
    ///
    /// Both ranges are valid and disjoint.
    pub(crate) unsafe fn rep_movsb(to: *mut u8, from: &[u8]) {
        // SAFETY: by this function's contract.
        unsafe {
            std::arch::asm!(
                "rep movsb",
                inout("rcx") from.len() => _, inout("rdi") to => _, inout("rsi") from.as_ptr() => _,
                options(nostack, preserves_flags)
            );
        }
    }
}

struct Memory {
    region: Arc<Arena>,
    private: Slot,
    decoded: Slot,
}

fn memory() -> Memory {
    let own = |name, bytes| Slots::new(arena(name, bytes), bytes).expect("one slot").take().remove(0);
    let region = Arc::new(arena("bench-region", REGION_BYTES));
    println!("destination: {}; {}", region.page_size(), region.fallback_reason().unwrap_or("as asked"));
    let mut decoded = own("bench-slot", 2 << 20);
    decoded.as_mut_slice().fill(7);
    Memory { region, private: own("bench-private", REGION_BYTES), decoded }
}

/// The layouts that a client may ask for, all without gaps, so that every way covers the whole region.
fn layouts(shape: &ChunkShape) -> [(&'static str, Layout); 3] {
    let nhd = Layout::contiguous(shape, HeadOrder::Nhd).expect("small");
    let k_beside_v = Layout { token: 2 * shape.token_bytes(), side: shape.token_bytes(), ..nhd };
    let hnd = Layout::contiguous(shape, HeadOrder::Hnd).expect("small");
    [("whole planes", nhd), ("token by token", k_beside_v), ("head by head", hnd)]
}

fn planes(c: &mut Criterion, memory: &mut Memory, name: &str, shape: ChunkShape) {
    let Memory { region, private, decoded } = memory;
    let plane_bytes = usize::try_from(shape.plane_bytes()).expect("64 bits");
    let source = &decoded.as_slice()[..plane_bytes];
    let private = private.as_mut_slice();
    let starts = || (0..REGION_BYTES / plane_bytes).map(move |n| n * plane_bytes).cycle();
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Bytes(shape.plane_bytes()));

    let mut at = starts();
    group.bench_function("memcpy", |b| {
        b.iter(|| {
            let start = at.next().expect("endless");
            black_box(&mut private[start..start + plane_bytes]).copy_from_slice(black_box(source));
        });
    });
    #[cfg(target_arch = "x86_64")]
    group.bench_function("rep movsb", |b| {
        b.iter(|| {
            let to = private[at.next().expect("endless")..][..plane_bytes].as_mut_ptr();
            // SAFETY: `plane_bytes` bytes of `private`.
            unsafe { other_ways::rep_movsb(to, black_box(source)) };
        });
    });
    let region_bytes = u64::try_from(region.bytes()).expect("64 bits");
    for (name, layout) in layouts(&shape) {
        let chunks = region_bytes / (2 * shape.plane_bytes());
        let mut at = (0..chunks).flat_map(|chunk| [(chunk, 0), (chunk, 1)]).cycle();
        group.bench_function(format!("host ring, {name}"), |b| {
            b.iter(|| {
                let (chunk, plane) = at.next().expect("endless");
                let base = chunk * 2 * shape.plane_bytes();
                let placement = Placement::new(layout, shape, base, region_bytes).expect("in range");
                gpu_dma::deliver(region, &placement, plane, black_box(source)).expect("in range");
            });
        });
    }
    group.finish();
}

/// From which length on a copy past the cache pays, the fence at its end included.
fn lengths(c: &mut Criterion, memory: &mut Memory) {
    type Copy = fn(&Arena, usize, &[u8]) -> Result<(), OutOfBounds>;
    let ways: [(&str, Copy); 2] = [("cached", Arena::copy_in), ("streaming", Arena::copy_in_streaming)];
    for bytes in [2 << 10, 4 << 10, 8 << 10, 16 << 10, 64 << 10] {
        let mut group = c.benchmark_group(format!("{} KiB pieces", bytes >> 10));
        group.throughput(Throughput::Bytes(512 << 10));
        for (name, copy) in ways {
            let mut at = (0..REGION_BYTES / bytes).map(|n| n * bytes).cycle();
            let pieces = &memory.decoded.as_slice()[..512 << 10];
            group.bench_function(name, |b| {
                b.iter(|| {
                    for piece in pieces.chunks_exact(bytes) {
                        copy(&memory.region, at.next().expect("endless"), black_box(piece))
                            .expect("in range");
                    }
                });
            });
        }
        group.finish();
    }
}

fn bench(c: &mut Criterion) {
    let mut memory = memory();
    for (name, kv_heads, head_dim) in [("98304 B", 3, 64), ("512 KiB", 8, 128)] {
        planes(c, &mut memory, name, ChunkShape { layers: 1, tokens: 256, kv_heads, head_dim });
    }
    lengths(c, &mut memory);
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30).measurement_time(std::time::Duration::from_secs(2));
    targets = bench
}
criterion_main!(benches);
