//! The decoder of one codec: the one whose name the target has.
#![no_main]

#[path = "../../compress/tests/fuzzed/mod.rs"]
#[allow(dead_code, unused_imports)]
mod fuzzed;

use std::sync::LazyLock;

use compress::Codec;

static CODEC: LazyLock<Codec> =
    LazyLock::new(|| env!("CARGO_BIN_NAME").parse().expect("a target for each codec"));

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::plane(*CODEC, data));
