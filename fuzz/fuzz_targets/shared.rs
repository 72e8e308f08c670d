//! Memory that client and data plane share.
#![no_main]

#[path = "../../control/tests/fuzzed/mod.rs"]
#[allow(dead_code, unused_imports)]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::shared(data));
