//! What each codec costs and gives: ratio, error, and the time of decoding beside that of bare zstd.
//!
//! `cargo run --release -p compress --example measure [FILE.safetensors]`; without a file, synthetic planes in the
//! shape of Llama-3.1-8B. Prints a table; the figures of `docs/FORMAT.md` come from here. Times are the least of many
//! repetitions per plane, one beside the other, so that another load on the machine disturbs them little.

#[path = "../tests/planes/mod.rs"]
mod planes;

use std::time::{Duration, Instant};

use compress::{ChunkView, Codec, Decoder, Dtype, Encoder, Shape, Side, plane_index, plane_of};
use planes::Planes;
use planes::bare::{self, SEGMENT_BYTES};
use zstd_safe::DCtx;

const REPETITIONS: usize = 40;
/// Destinations written in turn, as a ring of slots is.
const SLOTS: usize = 64;

/// Sums over all planes of one codec.
#[derive(Default)]
struct Sums {
    raw_bytes: usize,
    encoded_bytes: usize,
    planes: u32,
    /// Sum of the planes' relative RMS errors, K and V.
    errors: [f64; 2],
    bare: Duration,
    linearize: Duration,
    fused: Duration,
    fused_f16: Duration,
}

fn main() {
    let chunks = match std::env::args().nth(1) {
        Some(path) => {
            let file = std::fs::read(&path).unwrap_or_else(|error| panic!("can't read {path}: {error}"));
            Planes::from_safetensors(&path, &file)
        }
        None => vec![Planes::synthetic(4, 8, 128, 256)],
    };
    println!("machine: {}", machine());
    println!("planes: {}, {:?}", chunks[0].origin, chunks[0].shape);
    println!(
        "codec     ratio   error K   error V | us per plane: bare zstd  linearize+crc  fused bf16  fused f16 | \
         bare/fused  fused GB/s out  Gbps in"
    );
    for codec in Codec::ALL {
        let mut sums = Sums::default();
        chunks.iter().for_each(|planes| measure(codec, planes, &mut sums));
        report(codec, &sums);
    }
}

fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(std::env::consts::ARCH);
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {cpus} CPUs", model.trim_start_matches(['\t', ':', ' ']))
}

fn measure(codec: Codec, planes: &Planes, sums: &mut Sums) {
    let shape = planes.shape;
    let mut chunk = Vec::new();
    let level = std::env::var("ZSTD_LEVEL").ok().and_then(|level| level.parse().ok());
    Encoder::new(codec, level.unwrap_or(compress::DEFAULT_ZSTD_LEVEL))
        .encode_chunk(&[0; 32], &shape, |layer, side| &planes.bytes[plane_index(layer, side)], &mut chunk)
        .unwrap_or_else(|error| panic!("{codec}: {error}"));
    sums.raw_bytes += shape.planes() * shape.plane_bytes();
    sums.encoded_bytes += chunk.len();
    let mut decoder = Decoder::new(shape.plane_bytes());
    let mut zstd = DCtx::create();
    let mut scratch = vec![1_u8; shape.plane_bytes()];
    let mut slots = vec![vec![1_u8; shape.plane_bytes()]; SLOTS];
    let view = ChunkView::parse(&chunk).expect("what the encoder writes parses");
    for (index, entry) in view.planes().enumerate() {
        let start = usize::try_from(entry.offset).expect("a chunk in memory");
        let encoded = &chunk[start..][..usize::try_from(entry.bytes).expect("a chunk in memory")];
        let sections = bare::sections(&shape, &entry, encoded);
        let segments = || encoded.chunks(SEGMENT_BYTES);
        let mut least = [Duration::MAX; 4];
        for repetition in 0..REPETITIONS {
            let out = &mut slots[repetition % SLOTS];
            take(&mut least[0], || bare::decompress(&mut zstd, &sections, &mut scratch));
            take(&mut least[1], || decoder.linearize_checked(segments(), &entry).expect("intact"));
            if !codec.is_exact() {
                take(&mut least[3], || {
                    decoder.decode_segments(&shape, &entry, segments(), Dtype::F16, out).expect("intact");
                });
            }
            let out = &mut slots[(repetition + 32) % SLOTS];
            take(&mut least[2], || {
                decoder.decode_segments(&shape, &entry, segments(), shape.dtype, out).expect("intact");
            });
            if repetition == 0 {
                let side = usize::from(plane_of(index).1 == Side::V);
                sums.errors[side] += relative_error(&shape, &planes.bytes[index], out);
            }
        }
        sums.planes += 1;
        sums.bare += least[0];
        sums.linearize += least[1];
        sums.fused += least[2];
        sums.fused_f16 += if codec.is_exact() { Duration::ZERO } else { least[3] };
    }
}

fn take(least: &mut Duration, work: impl FnOnce()) {
    let start = Instant::now();
    work();
    *least = start.elapsed().min(*least);
}

/// RMS of the error over RMS of the elements.
fn relative_error(shape: &Shape, before: &[u8], after: &[u8]) -> f64 {
    let value = |bytes: &[u8]| {
        let bits = u16::from_le_bytes([bytes[0], bytes[1]]);
        match shape.dtype {
            Dtype::Bf16 => half::bf16::from_bits(bits).to_f64(),
            Dtype::F16 => half::f16::from_bits(bits).to_f64(),
        }
    };
    let (mut error, mut power) = (0.0, 0.0);
    for (before, after) in before.chunks_exact(2).zip(after.chunks_exact(2)) {
        error += (value(before) - value(after)).powi(2);
        power += value(before).powi(2);
    }
    (error / power).sqrt()
}

fn report(codec: Codec, sums: &Sums) {
    let us = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(sums.planes);
    let seconds = sums.fused.as_secs_f64();
    let bytes = |bytes: usize| f64::from(u32::try_from(bytes).expect("a file of less than 4 GiB"));
    println!(
        "{codec:8} {:6.3}  {:8.5}  {:8.5} | {:23.1}  {:13.1}  {:10.1}  {:9.1} | {:10.3}  {:14.2}  {:7.2}",
        bytes(sums.raw_bytes) / bytes(sums.encoded_bytes),
        sums.errors[0] * 2.0 / f64::from(sums.planes),
        sums.errors[1] * 2.0 / f64::from(sums.planes),
        us(sums.bare),
        us(sums.linearize),
        us(sums.fused),
        us(sums.fused_f16),
        sums.bare.as_secs_f64() / seconds,
        bytes(sums.raw_bytes) / seconds / 1e9,
        bytes(sums.encoded_bytes) * 8.0 / seconds / 1e9,
    );
}
