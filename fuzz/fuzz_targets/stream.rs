#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| x_manager::fuzz::stream(bytes));
