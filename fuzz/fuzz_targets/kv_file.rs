//! KV caches in files. The module alone: the rest of the store links DPDK.
#![no_main]

#[path = "../../store/src/kv_file.rs"]
#[allow(dead_code, unused_imports)]
mod kv_file;

#[path = "../../store/tests/fuzzed/mod.rs"]
#[allow(dead_code, unused_imports)]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::kv_file(data));
