//! Where planes go: layouts, pages, page tables.
#![no_main]

#[path = "../../gpu-dma/tests/fuzzed/mod.rs"]
#[allow(dead_code, unused_imports)]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::places(data));
