//! Replays the corpus of the fuzz target.

mod fuzzed;
#[path = "../../fuzz/replay.rs"]
mod replay;

use replay::replay;

#[test]
fn control() {
    replay("control", fuzzed::message);
}
