//! Replays the corpora of the fuzz targets.

mod fuzzed;
#[path = "../../fuzz/replay.rs"]
mod replay;

use compress::Codec;

use replay::replay;

#[test]
fn chunk() {
    replay("chunk", fuzzed::chunk);
}

/// Each codec has a target of its name.
#[test]
fn planes() {
    for codec in Codec::ALL {
        replay(codec.name(), |data| fuzzed::plane(codec, data));
    }
}

#[test]
fn mixed() {
    replay("mixed", fuzzed::mixed);
}

#[test]
fn profile() {
    replay("profile", fuzzed::profile);
}
