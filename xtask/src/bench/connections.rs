//! Connections a second by rdma_cm, set against those of TCP.

use std::{
    io::Read,
    net::{Ipv4Addr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use xtask::{
    bed::{Bed, free_port},
    process::Job,
};

use super::ratios::Measurement;

const LIMIT: Duration = Duration::from_secs(120);
const CONNECTIONS: u32 = 1000;

/// All steps of `cmtime`, from a new id to its destruction, against a TCP connection that is made, accepted and
/// closed.
pub(super) fn measure(bed: &Bed) -> Result<Measurement> {
    let before = tcp()?;
    let ours = rdma_cm(bed)?;
    let tcp = (before + tcp()?) / 2.0;
    Ok(Measurement { figure: ours / tcp, from: format!("{ours:.0} of {tcp:.0} a second") })
}

fn rdma_cm(bed: &Bed) -> Result<f64> {
    let port = free_port()?;
    let words = |address: &str| {
        let text = format!("cmtime {address} {} -c {CONNECTIONS} -p {port}", bed.server.address);
        text.split(' ').map(str::to_owned).collect::<Vec<_>>()
    };
    let server = bed.start_cm_server(&words("-b"), port, LIMIT)?;
    let client = Job::spawn(bed.command(&bed.client, &words("-s")), LIMIT)?.wait()?;
    // It serves for ever.
    server.stop(Duration::from_secs(2))?;
    client.success()?;
    let total = total(&client.stdout);
    ensure!(total > 0.0, "no steps were measured:\n{}", client.stdout);
    Ok(f64::from(CONNECTIONS) / (total / 1e3))
}

/// The milliseconds of all steps: of a line such as `connect      :   343.32  304.55 ...` the first number.
fn total(stdout: &str) -> f64 {
    let steps = stdout.lines().filter_map(|line| line.split_once(':')?.1.split_whitespace().next());
    steps.filter_map(|number| number.parse::<f64>().ok()).sum()
}

/// Connections a second, one after the other.
fn tcp() -> Result<f64> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen")?;
    let address = listener.local_addr()?;
    let server = thread::spawn(move || listener.incoming().take(CONNECTIONS as usize).flatten().count());
    let start = Instant::now();
    for _ in 0..CONNECTIONS {
        // Its end shows that it was accepted; else the queue of those that were not would fill up.
        let ended = TcpStream::connect(address)?.read(&mut [0; 1])?;
        ensure!(ended == 0, "somebody else listens at {address}");
    }
    let rate = f64::from(CONNECTIONS) / start.elapsed().as_secs_f64();
    let accepted = server.join().unwrap_or_default();
    ensure!(accepted == CONNECTIONS as usize, "{accepted} connections were accepted");
    Ok(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_of_cmtime_are_summed() {
        let text = "connecting\nstep              total ms     max ms     min us  us / conn\n\
                    resolve route:       36.03      15.80      87.00     360.27\n\
                    connect      :      343.32     304.55   23170.00    3433.23\n";
        assert!((total(text) - 379.35).abs() < 1e-9);
    }
}
