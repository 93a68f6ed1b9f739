//! A verbs program that checks from inside what the virtual RNIC promises; the whole-system tests run it.
//!
//! `freeflow-probe list` names its checks, `check NAME` performs one. `OK`, or `SKIP` and the reason, and exit code 0:
//! the promise holds, or could not be tried. Anything else is a failure, told on stderr. Every subcommand ends by
//! itself in bounded time.

mod across;
mod beside;
mod buffer;
mod cable;
mod cancel;
mod checks;
mod cm;
mod cq;
mod family;
mod fuse;
mod idle;
mod imports_view;
mod kills;
mod library;
mod meet;
mod outage;
mod pair;
mod qp;
mod registration;
mod ring;
mod stall;
mod stream;
mod tcp;
mod verbs;
mod xrc;

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, Result, bail};

use checks::{CHECKS, Skip};

/// How long a subcommand may take that says nothing else: many times what the longest takes on a quiet machine.
const LIMIT: Duration = Duration::from_secs(200);

const USAGE: &str = "\
usage: freeflow-probe list | check NAME | imports | open | hold COUNT | idle-qps COUNT | outage | cm-outage | stall | stream SECONDS
       freeflow-probe meet FOLDER OWN-NAME OTHER-NAME | exhaust | flood COUNT | registration BYTES
       freeflow-probe beside DEVICE GID-INDEX | xrc-second FILE RECEIVER SENDER
       freeflow-probe across FOLDER OWN-NAME OTHER-NAME SECONDS QPS TIMEOUT RETRIES
       freeflow-probe cable NAMESPACE NAMESPACE FILE SECONDS
       freeflow-probe tcp-echo PORT | tcp-exchange ADDRESS:PORT
       freeflow-probe kill-loop --rounds N --seed S";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    if words == ["list"] {
        CHECKS.iter().for_each(|(name, _)| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    match perform(&words) {
        Ok(()) => {
            println!("OK");
            ExitCode::SUCCESS
        }
        Err(error) => match error.downcast_ref::<Skip>() {
            Some(Skip(reason)) => {
                println!("SKIP {reason}");
                ExitCode::SUCCESS
            }
            None => {
                eprintln!("freeflow-probe: {error:#}");
                ExitCode::FAILURE
            }
        },
    }
}

fn perform(words: &[&str]) -> Result<()> {
    end_after(LIMIT);
    if !words.first().is_some_and(|word| word.starts_with("tcp-") || *word == "cable") {
        library::load()?;
    }
    match words {
        ["check", name] => {
            let check = CHECKS.iter().find(|(known, _)| known == name);
            check.with_context(|| format!("there is no check {name:?}; see `freeflow-probe list`"))?.1()
        }
        ["imports"] => imports_view::count(),
        ["open"] => verbs::Context::open().map(|_| ()),
        ["hold", count] => idle::hold(count.parse()?),
        ["idle-qps", count] => idle::qps(count.parse()?),
        ["meet", folder, own, other] => meet::meet(folder, own, other),
        ["flood", count] => idle::flood(count.parse()?),
        ["across", folder, own, other, seconds, qps, timeout, retries] => {
            let options = across::Options {
                time: Duration::from_secs_f64(seconds.parse()?),
                qps: qps.parse()?,
                timeout: timeout.parse()?,
                retry_cnt: retries.parse()?,
            };
            across::run(folder, own, other, &options)
        }
        ["cable", left, right, conditions, seconds] => {
            cable::run(left, right, conditions, Duration::from_secs(seconds.parse()?))
        }
        ["exhaust"] => meet::exhaust(),
        ["registration", len] => registration::measure(len.parse()?),
        ["outage"] => outage::survive(),
        ["tcp-echo", port] => tcp::echo(port.parse()?),
        ["tcp-exchange", address] => tcp::exchange(address.parse()?),
        ["cm-outage"] => outage::survive_by_name(),
        ["beside", device, gid_index] => beside::beside(device, gid_index.parse()?),
        ["stall"] => stall::run(),
        ["xrc-second", file, receiver, sender] => xrc::second(file, receiver.parse()?, sender.parse()?),
        ["stream", seconds] => stream::run(Duration::from_secs(seconds.parse()?)),
        ["kill-loop", "--rounds", rounds, "--seed", seed] => kills::run(rounds.parse()?, seed.parse()?),
        _ => bail!("{USAGE}"),
    }
}

/// Ends this process by SIGALRM: a probe that hangs is a failure, not a stuck test.
fn end_after(limit: Duration) {
    // SAFETY: nothing in this program handles SIGALRM, so it ends the process.
    unsafe { libc::alarm(limit.as_secs() as u32) };
}
