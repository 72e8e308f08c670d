//! Replays the corpora of the fuzz targets.

mod fuzzed;
#[path = "../../fuzz/replay.rs"]
mod replay;

use replay::replay;

#[test]
fn wire() {
    replay("wire", fuzzed::wire);
}

#[test]
fn serve() {
    replay("serve", fuzzed::serve);
}

#[test]
fn fetch() {
    replay("fetch", fuzzed::fetch);
}

#[test]
fn put() {
    replay("put", fuzzed::put);
}
