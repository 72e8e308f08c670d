//! Replays the corpus of the fuzz target.

mod fuzzed;
#[path = "../../fuzz/replay.rs"]
mod replay;

#[test]
fn places() {
    replay::replay("places", fuzzed::places);
}
