//! Replays the corpora of the fuzz targets.

mod fuzzed;

use std::path::Path;

use compress::Compression;

fn replay(target: &str, run: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut inputs = 0;
    for file in std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = file.unwrap().path();
        println!("{}", path.display());
        run(&std::fs::read(&path).unwrap());
        inputs += 1;
    }
    assert!(inputs > 0, "{} is empty", folder.display());
}

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
