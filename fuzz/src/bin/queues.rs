//! The program that libFuzzer drives: see [`fuzz::queues`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::queues::run(bytes));
