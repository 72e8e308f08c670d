//! The header and table of an encoded chunk.
#![no_main]

#[path = "../../compress/tests/fuzzed/mod.rs"]
#[allow(dead_code, unused_imports)]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::chunk(data));
