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
#[derive(Clone)]
struct Program {
    name: String,
    /// The server's words; `PORT` stands for a free port.
    server: String,
    /// The client's words; `ADDRESS` stands for where the server is.
    client: String,
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
    fn new(name: impl Into<String>, meets: Meeting, server: &str, client: &str, proof: &'static str) -> Self {
        let (server, client) = (server.to_owned(), client.to_owned());
        Self { name: name.into(), server, client, meets, proof, times: 1, server_ends: false }
    }

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

/// By its own choice of transports, and by those that verbs has, each kind of operation; then its transports themselves, below
/// what chooses among them.
fn ucx() -> Vec<Program> {
    let mut programs = vec![ucx_perftest("UCX tag_lat by its own choice", "", "-t tag_lat -n 200")];
    let long = ["tag_bw -s 1048576", "stream_bw -s 65536", "ucp_put_bw -s 65536", "ucp_get -s 65536"];
    let short = ["tag_lat", "stream_lat", "ucp_am_lat", "ucp_put_lat", "ucp_get"];
    let atomic = ["ucp_fadd", "ucp_cswap", "ucp_swap", "ucp_add"];
    for test in [&long[..], &short, &atomic].concat() {
        let name = format!("UCX {test} over rc and ud");
        programs.push(ucx_perftest(&name, "env UCX_TLS=rc_verbs,ud_verbs ", &format!("-t {test} -n 200")));
    }
    for test in ["tag_lat", "tag_bw -s 4096", "ucp_put_bw -s 65536"] {
        let name = format!("UCX {test} over ud");
        programs.push(ucx_perftest(&name, "env UCX_TLS=ud_verbs ", &format!("-t {test} -n 200")));
    }
    for (transport, tests) in [
        (
            "rc_verbs",
            &[
                "am_lat -D short",
                "am_bw -D bcopy -s 4096",
                "am_bw -D zcopy -s 4096",
                "put_lat -D short",
                "put_bw -D zcopy -s 65536",
                "get -D bcopy -s 4096",
                "get -D zcopy -s 65536",
                "fadd",
                "cswap",
                "add_mr",
            ][..],
        ),
        ("ud_verbs", &["am_lat -D short", "am_bw -D bcopy -s 1000", "am_bw -D zcopy -s 1000"]),
    ] {
        for test in tests {
            let words = format!("-d ff0:1 -x {transport} -t {test} -n 200");
            programs.push(ucx_perftest(&format!("UCX {transport} {test}"), "", &words));
        }
    }
    programs
}

fn ucx_perftest(name: &str, before: &str, words: &str) -> Program {
    let (server, client) = (
        format!("{before}ucx_perftest -p PORT {words}"),
        format!("{before}ucx_perftest ADDRESS -p PORT {words}"),
    );
    Program::new(name, Meeting::Tcp, &server, &client, "Final:")
}

/// Its own data check (`-c`) where it has one; what it uses of rdma_cm it finds out over TCP. By `ofi_rxm` several times:
/// one end leaves while the other still waits for its last message.
fn libfabric() -> Vec<Program> {
    let pingpong = |name: &str, words: &str, proof| {
        let server = format!("fi_pingpong -B PORT {words}");
        Program::new(name, Meeting::Tcp, &server, &format!("fi_pingpong -P PORT {words} ADDRESS"), proof)
    };
    vec![
        pingpong("libfabric msg", "-p verbs -e msg -I 20 -c", "1m"),
        pingpong("libfabric dgram", "-p verbs -e dgram -I 20", "4k"),
        pingpong("libfabric rdm by rxm", "-p verbs;ofi_rxm -e rdm -I 20 -c", "1m").until_the_end(8),
        pingpong("libfabric rdm by rxm, tagged", "-p verbs;ofi_rxm -e rdm -m tagged -I 20 -c", "1m"),
        pingpong("libfabric rdm by rxd", "-p verbs;ofi_rxd -e rdm -I 20 -c", "1m"),
    ]
}

/// By SEND it asks for no RNR retries and posts its receives late: a device that gave them no time would outrun it.
fn fio() -> Vec<Program> {
    let words = "fio --name=s --ioengine=rdma --port=PORT --bs=64k --size=4m --iodepth=4";
    let program = |name: &str, verb: &str| {
        let (server, client) =
            (format!("{words} --rw=read"), format!("{words} --rw=write --verb={verb} --hostname=ADDRESS"));
        Program::new(name, Meeting::Cm, &server, &client, "io=4096KiB")
    };
    vec![
        program("fio by RDMA WRITE", "write"),
        program("fio by RDMA READ", "read"),
        Program { times: 3, ..program("fio by SEND", "send") },
    ]
}

/// All that it has for connections of rdma_cm: without (`-cm1`) it knows LIDs alone.
fn qperf() -> Vec<Program> {
    let tests = [
        ("rc_lat", "latency"),
        ("rc_bw", "bw"),
        ("rc_bi_bw", "bw"),
        ("rc_rdma_read_bw", "bw"),
        ("rc_rdma_read_lat", "latency"),
        ("rc_rdma_write_bw", "bw"),
        ("rc_rdma_write_lat", "latency"),
        ("rc_rdma_write_poll_lat", "latency"),
        ("rc_compare_swap_mr", "msg_rate"),
        ("rc_fetch_add_mr", "msg_rate"),
        ("ver_rc_compare_swap", "msg_rate"),
        ("ver_rc_fetch_add", "msg_rate"),
    ];
    let program = |(test, proof): (&str, &'static str)| {
        let client = format!("qperf -lp PORT -cm1 -t 1 ADDRESS {test}");
        Program::new(format!("qperf {test}"), Meeting::Tcp, "qperf -lp PORT", &client, proof)
    };
    tests.map(program).into()
}

fn trial(stage: &Stage, program: Program) -> Trial {
    stage.trial(program.name.clone(), move |bed| {
        let binary = program.client.split(' ').find(|word| !word.contains('=') && *word != "env");
        match binary.filter(|binary| !has_program(binary)) {
            Some(missing) => common::skip(&program.name, &format!("{missing} is not installed")),
            None => (0..program.times).try_for_each(|_| play(bed, &program))?,
        }
        Ok(())
    })
}

/// Some of them wait for a second connection at once: their client comes a moment after they listen.
const MOMENT: Duration = Duration::from_millis(300);

fn play(bed: &Bed, program: &Program) -> Result<()> {
    let port = free_port()?;
    let fill = |word: &str| word.replace("PORT", &port.to_string()).replace("ADDRESS", &bed.server.address);
    let server: Vec<String> = program.server.split(' ').map(fill).collect();
    let client: Vec<String> = program.client.split(' ').map(fill).collect();
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
