//! Promise: other people's programs run over verbs with nothing set by hand: UCX, libfabric, fio, qperf and Open MPI, as
//! Debian ships them. A program that is not installed is skipped, loudly.

mod common;

use std::{process::ExitCode, thread, time::Duration};

use anyhow::{Result, ensure};
use common::Stage;
use libtest_mimic::Trial;
use xtask::{
    bed::{Bed, free_port, start_server},
    process::{Job, Outcome, has_program},
};

const LIMIT: Duration = Duration::from_secs(60);

/// A program at both ends.
#[derive(Clone, Copy)]
struct Program {
    name: &'static str,
    /// The server's words; `PORT` stands for a free port.
    server: &'static [&'static str],
    /// The client's words; `ADDRESS` stands for where the server is.
    client: &'static [&'static str],
    /// How the server shows that it can be met.
    meets: Meeting,
    /// What the client prints when it has done what it was asked.
    proof: &'static str,
    /// How often it is run.
    times: u32,
    /// Whether the server ends by itself when the client has.
    server_ends: bool,
}

impl Program {
    /// The same, so many times, whose server ends by itself.
    fn until_the_end(self, times: u32) -> Self {
        Self { times, server_ends: true, ..self }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Meeting {
    /// It listens on the port by TCP.
    Tcp,
    /// It listens on the port by rdma_cm.
    Cm,
}

fn main() -> ExitCode {
    common::run("programs", common::no_tree(), || {
        let stage = Stage::new(|| Bed::on_one_host(common::tree()?));
        [ucx(), libfabric(), fio(), qperf()]
            .concat()
            .into_iter()
            .map(|program| trial(&stage, program))
            .chain(open_mpi().into_iter().map(|(name, words)| mpi_trial(&stage, name, words)))
            .collect()
    })
}

/// Open MPI over each of the libraries that it can use verbs through. By itself it takes UCX for certain vendors' devices
/// alone, so it is told to take any.
fn open_mpi() -> Vec<(&'static str, &'static [&'static str])> {
    vec![
        (
            "Open MPI over UCX",
            &[
                "--mca",
                "pml",
                "ucx",
                "--mca",
                "osc",
                "ucx",
                "--mca",
                "pml_ucx_tls",
                "any",
                "--mca",
                "pml_ucx_devices",
                "any",
                "-x",
                "UCX_TLS=rc_verbs,ud_verbs,self",
                "-x",
                "UCX_NET_DEVICES=ff0:1",
            ],
        ),
        (
            "Open MPI over libfabric",
            &[
                "--mca",
                "pml",
                "cm",
                "--mca",
                "mtl",
                "ofi",
                "--mca",
                "mtl_ofi_provider_include",
                "verbs;ofi_rxm",
            ],
        ),
    ]
}

fn mpi_trial(stage: &Stage, name: &'static str, options: &'static [&'static str]) -> Trial {
    const RANKS: usize = 2;
    stage.trial(name, move |bed| {
        if !has_program("mpirun") {
            common::skip(name, "mpirun is not installed");
            return Ok(());
        }
        let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/mpi.py");
        let ranks = RANKS.to_string();
        let begin = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", &ranks];
        let words: Vec<String> =
            [&begin, options, &["python3", program]].concat().into_iter().map(str::to_owned).collect();
        let outcome = Job::spawn(bed.command(&bed.client, &words), LIMIT)?.wait()?;
        let well = (0..RANKS).all(|rank| outcome.stdout.contains(&format!("rank {rank} of {RANKS}: well")));
        ensure!(outcome.succeeded() && well, "{}", outcome.report());
        Ok(())
    })
}

macro_rules! program {
    ($name:literal, $meets:ident, [$($server:literal),*], [$($client:literal),*], $proof:literal) => {
        Program { name: $name, server: &[$($server),*], client: &[$($client),*], meets: Meeting::$meets, proof: $proof, times: 1, server_ends: false }
    };
}

/// By its own choice of transports, and by each of those that verbs has.
fn ucx() -> Vec<Program> {
    vec![
        program!(
            "UCX tag_lat by its own choice",
            Tcp,
            ["ucx_perftest", "-p", "PORT", "-t", "tag_lat", "-n", "200"],
            ["ucx_perftest", "ADDRESS", "-p", "PORT", "-t", "tag_lat", "-n", "200"],
            "Final:"
        ),
        program!(
            "UCX put_bw over rc and ud",
            Tcp,
            [
                "env",
                "UCX_TLS=rc_verbs,ud_verbs",
                "ucx_perftest",
                "-p",
                "PORT",
                "-t",
                "ucp_put_bw",
                "-s",
                "65536",
                "-n",
                "200"
            ],
            [
                "env",
                "UCX_TLS=rc_verbs,ud_verbs",
                "ucx_perftest",
                "ADDRESS",
                "-p",
                "PORT",
                "-t",
                "ucp_put_bw",
                "-s",
                "65536",
                "-n",
                "200"
            ],
            "Final:"
        ),
        program!(
            "UCX tag_bw over ud",
            Tcp,
            [
                "env",
                "UCX_TLS=ud_verbs",
                "ucx_perftest",
                "-p",
                "PORT",
                "-t",
                "tag_bw",
                "-s",
                "4096",
                "-n",
                "200"
            ],
            [
                "env",
                "UCX_TLS=ud_verbs",
                "ucx_perftest",
                "ADDRESS",
                "-p",
                "PORT",
                "-t",
                "tag_bw",
                "-s",
                "4096",
                "-n",
                "200"
            ],
            "Final:"
        ),
    ]
}

/// Its own data check (`-c`) where it has one; what it uses of rdma_cm it finds out over TCP. By `ofi_rxm` several times:
/// one end leaves while the other still waits for its last message.
fn libfabric() -> Vec<Program> {
    vec![
        program!(
            "libfabric msg",
            Tcp,
            ["fi_pingpong", "-B", "PORT", "-p", "verbs", "-e", "msg", "-I", "20", "-c"],
            ["fi_pingpong", "-P", "PORT", "-p", "verbs", "-e", "msg", "-I", "20", "-c", "ADDRESS"],
            "1m"
        ),
        program!(
            "libfabric dgram",
            Tcp,
            ["fi_pingpong", "-B", "PORT", "-p", "verbs", "-e", "dgram", "-I", "20"],
            ["fi_pingpong", "-P", "PORT", "-p", "verbs", "-e", "dgram", "-I", "20", "ADDRESS"],
            "4k"
        ),
        program!(
            "libfabric rdm by rxm",
            Tcp,
            ["fi_pingpong", "-B", "PORT", "-p", "verbs;ofi_rxm", "-e", "rdm", "-I", "20", "-c"],
            ["fi_pingpong", "-P", "PORT", "-p", "verbs;ofi_rxm", "-e", "rdm", "-I", "20", "-c", "ADDRESS"],
            "1m"
        )
        .until_the_end(8),
        program!(
            "libfabric rdm by rxd",
            Tcp,
            ["fi_pingpong", "-B", "PORT", "-p", "verbs;ofi_rxd", "-e", "rdm", "-I", "20", "-c"],
            ["fi_pingpong", "-P", "PORT", "-p", "verbs;ofi_rxd", "-e", "rdm", "-I", "20", "-c", "ADDRESS"],
            "1m"
        ),
    ]
}

/// Not by SEND: fio asks for no RNR retries and posts its receives late, so that a fast device outruns it.
fn fio() -> Vec<Program> {
    vec![
        program!(
            "fio by RDMA WRITE",
            Cm,
            [
                "fio",
                "--name=s",
                "--ioengine=rdma",
                "--port=PORT",
                "--rw=read",
                "--bs=64k",
                "--size=4m",
                "--iodepth=4"
            ],
            [
                "fio",
                "--name=c",
                "--ioengine=rdma",
                "--port=PORT",
                "--rw=write",
                "--bs=64k",
                "--size=4m",
                "--iodepth=4",
                "--verb=write",
                "--hostname=ADDRESS"
            ],
            "io=4096KiB"
        ),
        program!(
            "fio by RDMA READ",
            Cm,
            [
                "fio",
                "--name=s",
                "--ioengine=rdma",
                "--port=PORT",
                "--rw=read",
                "--bs=64k",
                "--size=4m",
                "--iodepth=4"
            ],
            [
                "fio",
                "--name=c",
                "--ioengine=rdma",
                "--port=PORT",
                "--rw=write",
                "--bs=64k",
                "--size=4m",
                "--iodepth=4",
                "--verb=read",
                "--hostname=ADDRESS"
            ],
            "io=4096KiB"
        ),
    ]
}

fn qperf() -> Vec<Program> {
    vec![
        program!(
            "qperf rc_lat",
            Tcp,
            ["qperf", "-lp", "PORT"],
            ["qperf", "-lp", "PORT", "-cm1", "-t", "1", "ADDRESS", "rc_lat"],
            "latency"
        ),
        program!(
            "qperf rc_rdma_read_bw",
            Tcp,
            ["qperf", "-lp", "PORT"],
            ["qperf", "-lp", "PORT", "-cm1", "-t", "1", "ADDRESS", "rc_rdma_read_bw"],
            "bw"
        ),
    ]
}

fn trial(stage: &Stage, program: Program) -> Trial {
    stage.trial(program.name, move |bed| {
        let binary = program.client.iter().find(|word| !word.contains('=') && **word != "env").copied();
        match binary.filter(|binary| !has_program(binary)) {
            Some(missing) => common::skip(program.name, &format!("{missing} is not installed")),
            None => (0..program.times).try_for_each(|_| play(bed, &program))?,
        }
        Ok(())
    })
}

/// Some of them wait for a second connection at once: their client comes a moment after they listen.
const MOMENT: Duration = Duration::from_millis(300);

fn play(bed: &Bed, program: &Program) -> Result<()> {
    let port = free_port()?;
    let fill = |word: &&str| word.replace("PORT", &port.to_string()).replace("ADDRESS", &bed.server.address);
    let server: Vec<String> = program.server.iter().map(fill).collect();
    let client: Vec<String> = program.client.iter().map(fill).collect();
    let server = match program.meets {
        Meeting::Cm => bed.start_cm_server(&server, port, LIMIT)?,
        Meeting::Tcp => {
            let command = bed.command(&bed.server, &server);
            let all = std::iter::once(command.get_program()).chain(command.get_args());
            let all: Vec<String> = all.map(|word| word.to_string_lossy().into_owned()).collect();
            start_server(&bed.server, &all, port, LIMIT)?
        }
    };
    thread::sleep(MOMENT);
    let outcome = Job::spawn(bed.command(&bed.client, &client), LIMIT)?.wait()?;
    let server = match program.server_ends {
        true => server.wait()?,
        false => server.stop(Duration::from_millis(500))?,
    };
    ensure!(!program.server_ends || server.succeeded(), "server {}", server.report());
    proven(program, &outcome, &server)
}

fn proven(program: &Program, client: &Outcome, server: &Outcome) -> Result<()> {
    let report = || format!("server {}client {}", server.report(), client.report());
    ensure!(client.succeeded(), "{}", report());
    ensure!(client.stdout.contains(program.proof), "no {:?} was printed\n{}", program.proof, report());
    Ok(())
}
