//! The header and table of an encoded chunk.
#![no_main]
#![allow(dead_code)]

#[path = "../../compress/tests/fuzzed/mod.rs"]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::chunk(data));
