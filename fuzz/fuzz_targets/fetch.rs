//! The data plane's engine.
#![no_main]

#[path = "../../protocol/tests/fuzzed/mod.rs"]
#[allow(dead_code, unused_imports)]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::fetch(data));
