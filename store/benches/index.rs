//! What serving lcores pay to read an index that another thread may change, beside a plain `HashMap` and a `Vec`, which nobody
//! could change: looking a key up, and loading a chunk by its handle.
#![allow(missing_docs, reason = "a benchmark")]

use std::collections::HashMap;
use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use protocol::{ChunkInfo, ChunkSource, Key};
use store::keeper::Keeper;

const CHUNKS: usize = 10_000;

fn key(number: usize) -> Key {
    // Spread as BLAKE3 would.
    let mut state = number as u64 + 1;
    let mut key = Key([0; 32]);
    for word in key.0.chunks_exact_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.copy_from_slice(&(state ^ state >> 31).to_le_bytes());
    }
    key
}

fn index(criterion: &mut Criterion) {
    let keeper = Keeper::with_chunks((0..CHUNKS).map(key), 64).expect("40 MB of memory");
    let chunks = keeper.chunks();
    let handles: Vec<u32> =
        (0..CHUNKS).filter_map(|number| chunks.find(&key(number))).map(|info| info.handle).collect();
    let plain: HashMap<Key, ChunkInfo> =
        (0..CHUNKS).filter_map(|number| Some((key(number), chunks.find(&key(number))?))).collect();
    let bytes: Vec<Box<[u8]>> = (0..CHUNKS).map(|_| vec![1; 64].into()).collect();
    let keys: Vec<Key> = (0..CHUNKS).map(key).collect();
    let mut at = 0;
    let mut step = move || {
        at = (at + 7919) % CHUNKS;
        at
    };
    let mut group = criterion.benchmark_group("look a key up");
    group.bench_function("HashMap", |bench| bench.iter(|| black_box(plain.get(&keys[step()]))));
    group.bench_function("Chunks", |bench| bench.iter(|| black_box(chunks.find(&keys[step()]))));
    group.finish();
    let mut group = criterion.benchmark_group("bytes of a handle");
    group.bench_function("Vec", |bench| bench.iter(|| black_box(bytes[step()].len())));
    group.bench_function("Chunks", |bench| {
        bench.iter(|| black_box(chunks.load(handles[step()]).map(|chunk| chunk.bytes().len())));
    });
    // The same one again and again: what is left without misses of the cache.
    group.bench_function("Chunks, one handle", |bench| {
        bench.iter(|| black_box(chunks.load(handles[7]).map(|chunk| chunk.bytes().len())));
    });
    group.finish();
}

criterion_group!(benches, index);
criterion_main!(benches);
