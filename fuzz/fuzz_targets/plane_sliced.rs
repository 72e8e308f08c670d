//! The decoder of every codec, sections compressed as `sliced`.
#![no_main]
#![allow(dead_code)]

#[path = "../../compress/tests/fuzzed/mod.rs"]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::plane(compress::Compression::Sliced, data));
