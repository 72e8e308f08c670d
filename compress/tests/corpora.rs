//! Replays the corpora of the fuzz targets.

mod fuzzed;
#[path = "../../fuzz/replay.rs"]
mod replay;

use compress::Compression;

use replay::replay;

#[test]
fn chunk() {
    replay("chunk", fuzzed::chunk);
}

#[test]
fn plane_none() {
    replay("plane_none", |data| fuzzed::plane(Compression::None, data));
}

#[test]
fn plane_zstd() {
    replay("plane_zstd", |data| fuzzed::plane(Compression::Zstd, data));
}

#[test]
fn plane_deflate() {
    replay("plane_deflate", |data| fuzzed::plane(Compression::Deflate, data));
}

#[test]
fn plane_sliced() {
    replay("plane_sliced", |data| fuzzed::plane(Compression::Sliced, data));
}
