//! Promise: no input is a finding: those that once were, and a fixed row of random ones. `cargo xtask fuzz` looks for
//! better ones.

use std::{fs, panic, path::Path};

/// Random inputs of each target.
const ROUNDS: u64 = 200;

/// A few steps of a linear congruential generator (Knuth's MMIX constants), the high byte of each.
fn random(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    let len = usize::from(next()) * 4;
    (0..len).map(|_| next()).collect()
}

fn check(target: &str, run: fn(&[u8])) {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    for entry in fs::read_dir(kept).into_iter().flatten() {
        let path = entry.expect("the corpus can be read").path();
        let bytes = fs::read(&path).expect("the corpus can be read");
        if let Err(finding) = panic::catch_unwind(|| run(&bytes)) {
            println!("{} is a finding", path.display());
            panic::resume_unwind(finding);
        }
    }
    for seed in 0..ROUNDS {
        if let Err(finding) = panic::catch_unwind(|| run(&random(seed))) {
            println!("random input {seed} is a finding");
            panic::resume_unwind(finding);
        }
    }
}

#[test]
fn no_message_harms_the_router() {
    check("control", fuzz::control::run);
}

#[test]
fn no_word_in_a_queue_harms_the_engine() {
    check("queues", fuzz::queues::run);
}

#[test]
fn no_order_of_things_breaks_what_verbs_promise() {
    check("schedule", fuzz::schedule::run);
}
