//! Replays the corpus of the fuzz target.

mod fuzzed;
#[path = "../../fuzz/replay.rs"]
mod replay;

use store::kv_file;

#[test]
fn kv_files() {
    replay::replay("kv_file", fuzzed::kv_file);
}
