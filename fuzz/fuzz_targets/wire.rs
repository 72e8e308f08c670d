//! Frames and messages.
#![no_main]
#![allow(dead_code)]

#[path = "../../protocol/tests/fuzzed/mod.rs"]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::wire(data));
