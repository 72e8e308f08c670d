//! Replays the corpora of the fuzz targets.

mod fuzzed;
#[path = "../../fuzz/replay.rs"]
mod replay;

use replay::replay;

#[test]
fn control() {
    replay("control", fuzzed::message);
}

#[test]
fn shared() {
    replay("shared", fuzzed::shared);
}
