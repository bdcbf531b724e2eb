//! JSON of any kind.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::json(input));
