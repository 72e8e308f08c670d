//! Decoding one plane compressed with zstd, from its encoded bytes to 16-bit elements, beside bare zstd over the same frames.
//!
//! `cargo bench -p compress` uses synthetic planes in the shape of Llama-3.1-8B; `SHADOWSERVE_KV=FILE` takes the first
//! chunk of a `.safetensors` file (`k`, `v`: `[layers, tokens, kv_heads, head_dim]`, BF16 or F16) instead.
//! Throughput is decoded bytes per second. `fused` is what the data plane runs: linearize, CRC32C, decompress,
//! dequantize; `bare zstd` only decompresses the plane's frames. Compare within one run, never against stored numbers.

#[path = "../tests/planes/mod.rs"]
mod planes;

use compress::{ChunkView, Codec, Compression, Decoder, Dtype, Encoder, PlaneCodec, PlaneEntry, plane_index};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use planes::Planes;
use planes::bare::{self, SEGMENT_BYTES};
use zstd_safe::DCtx;

/// An encoded chunk, cut as the data plane meets it.
struct Encoded {
    chunk: Vec<u8>,
    entries: Vec<PlaneEntry>,
}

impl Encoded {
    fn new(codec: Codec, planes: &Planes) -> Self {
        let mut chunk = Vec::new();
        let codec = PlaneCodec { compression: Compression::Zstd, ..codec.into() };
        Encoder::new(codec, compress::DEFAULT_ZSTD_LEVEL)
            .encode_chunk(
                &[0; 32],
                &planes.shape,
                |layer, side| &planes.bytes[plane_index(layer, side)],
                &mut chunk,
            )
            .expect("benchmark planes are finite");
        let entries = ChunkView::parse(&chunk).expect("what the encoder writes parses").planes().collect();
        Self { chunk, entries }
    }

    fn encoded(&self, entry: &PlaneEntry) -> &[u8] {
        let start = usize::try_from(entry.offset).expect("a chunk in memory");
        &self.chunk[start..][..usize::try_from(entry.bytes).expect("a chunk in memory")]
    }
}

fn decode(c: &mut Criterion) {
    let planes = Planes::from_environment().unwrap_or_else(|| Planes::synthetic(4, 8, 128, 256));
    let shape = planes.shape;
    println!("planes: {}, {} of {} KiB", planes.origin, shape.planes(), shape.plane_bytes() >> 10);
    let mut group = c.benchmark_group("decode");
    group.throughput(Throughput::Bytes((shape.planes() * shape.plane_bytes()) as u64));
    let mut decoder = Decoder::new(shape.plane_bytes());
    let mut zstd = DCtx::create();
    let mut scratch = vec![1_u8; shape.plane_bytes()];
    let mut out = vec![1_u8; shape.planes() * shape.plane_bytes()];
    for codec in Codec::ALL {
        let encoded = Encoded::new(codec, &planes);
        let ratio = (shape.planes() * shape.plane_bytes()) as f64 / encoded.chunk.len() as f64;
        println!("{codec}: ratio {ratio:.3}");
        let sections: Vec<_> = encoded
            .entries
            .iter()
            .map(|entry| bare::sections(&shape, entry, encoded.encoded(entry)))
            .collect();
        group.bench_function(BenchmarkId::new("bare zstd", codec), |b| {
            b.iter(|| {
                sections.iter().for_each(|sections| bare::decompress(&mut zstd, sections, &mut scratch))
            });
        });
        group.bench_function(BenchmarkId::new("linearize and CRC32C", codec), |b| {
            b.iter(|| {
                for entry in &encoded.entries {
                    let segments = encoded.encoded(entry).chunks(SEGMENT_BYTES);
                    decoder.linearize_checked(segments, entry).expect("what the encoder wrote");
                }
            });
        });
        for out_dtype in [Dtype::Bf16, Dtype::F16] {
            if codec.is_exact() && out_dtype != shape.dtype {
                continue;
            }
            group.bench_function(BenchmarkId::new(format!("fused to {out_dtype}"), codec), |b| {
                b.iter(|| {
                    for (entry, out) in encoded.entries.iter().zip(out.chunks_exact_mut(shape.plane_bytes()))
                    {
                        let segments = encoded.encoded(entry).chunks(SEGMENT_BYTES);
                        decoder
                            .decode_segments(&shape, entry, segments, out_dtype, out)
                            .expect("what the encoder wrote");
                    }
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
