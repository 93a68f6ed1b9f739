//! Promise: whatever a hostile client does, the router refuses it or drops it, and nobody else notices.
//!
//! Clients that speak the protocol and write shared memory themselves, against a real router. After each case the
//! router lives, has not panicked, holds nothing of that client, and two bystanders' traffic went on without a fault
//! (`hostile/field.rs`).

mod common;

#[path = "hostile/bystander.rs"]
mod bystander;
#[path = "hostile/client.rs"]
mod client;
#[path = "hostile/direct.rs"]
mod direct;
#[path = "hostile/domains.rs"]
mod domains;
#[path = "hostile/field.rs"]
mod field;
#[path = "hostile/files.rs"]
mod files;
#[path = "hostile/handles.rs"]
mod handles;
#[path = "hostile/life.rs"]
mod life;
#[path = "hostile/manager.rs"]
mod manager;
#[path = "hostile/messages.rs"]
mod messages;
#[path = "hostile/noise.rs"]
mod noise;
#[path = "hostile/puppet.rs"]
mod puppet;
#[path = "hostile/races.rs"]
mod races;
#[path = "hostile/rig.rs"]
mod rig;
#[path = "hostile/sizes.rs"]
mod sizes;
#[path = "hostile/tenants.rs"]
mod tenants;
#[path = "hostile/unsealed.rs"]
mod unsealed;
#[path = "hostile/windows.rs"]
mod windows;
#[path = "hostile/words.rs"]
mod words;
#[path = "hostile/wqes.rs"]
mod wqes;

use std::process::ExitCode;

use field::Series;

fn main() -> ExitCode {
    if let Some(code) = puppet::play() {
        return code;
    }
    common::run("hostile", common::no_tree(), || {
        let cases = [
            messages::cases(),
            files::cases(),
            handles::cases(),
            domains::cases(),
            sizes::cases(),
            wqes::cases(),
            windows::cases(),
            words::cases(),
            races::cases(),
            life::cases(),
            direct::cases(),
            tenants::cases(),
            manager::cases(),
            unsealed::cases(),
        ];
        let cases: Vec<_> = cases.into_iter().flatten().collect();
        let (series, count) = (Series::default(), cases.len());
        let mut trials: Vec<_> = cases.into_iter().map(|case| series.trial(case)).collect();
        // Whoever names tests wants those alone.
        if std::env::args().skip(1).all(|argument| argument.starts_with("--")) {
            trials.push(series.count(count));
        }
        trials
    })
}
