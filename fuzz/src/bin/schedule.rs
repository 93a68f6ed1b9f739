//! The program that libFuzzer drives: see [`fuzz::schedule`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::schedule::run(bytes));
