#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| containerd_shim_x::fuzz::journal(bytes));
