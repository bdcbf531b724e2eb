//! Expressions of policies and selectors.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::expressions(input));
