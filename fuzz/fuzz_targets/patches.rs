//! Patches of all three sorts.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::patches(input));
