//! A TCP ping-pong of 8 bytes: what kernel TCP takes where perftest measures latency.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv6Addr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

const ROUNDS: usize = 20_000;
const WARM_UP: usize = 1_000;
/// Either end gives up on a peer that is silent for so long.
const PATIENCE: Duration = Duration::from_secs(10);

/// Answers the pings of one client, then ends.
pub(crate) fn serve(port: u16) -> Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).context("cannot listen")?;
    let (mut stream, _) = listener.accept()?;
    prepare(&stream)?;
    let mut message = [0; 8];
    while stream.read_exact(&mut message).is_ok() {
        stream.write_all(&message)?;
    }
    Ok(())
}

/// Prints the typical (median) round trip in microseconds.
pub(crate) fn ping(address: IpAddr, port: u16) -> Result<()> {
    let mut stream = TcpStream::connect((address, port)).context("cannot connect")?;
    prepare(&stream)?;
    let mut message = [0; 8];
    let mut trips = Vec::with_capacity(ROUNDS);
    for round in 0..WARM_UP + ROUNDS {
        let start = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        if round >= WARM_UP {
            trips.push(start.elapsed());
        }
    }
    trips.sort();
    println!("{:.3}", trips[ROUNDS / 2].as_secs_f64() * 1e6);
    Ok(())
}

fn prepare(stream: &TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(())
}
