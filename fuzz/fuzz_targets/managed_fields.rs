//! Managed fields, sent and stored.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::managed_fields(input));
