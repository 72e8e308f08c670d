//! The store's engine.
#![no_main]
#![allow(dead_code)]

#[path = "../../protocol/tests/fuzzed/mod.rs"]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::serve(data));
