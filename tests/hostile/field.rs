//! Where every case is tried: a router, two bystanders, and what must hold after each.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context, Result, anyhow, ensure};
use libtest_mimic::{Failed, Trial};
use router::status::Status;
use tempfile::TempDir;

use crate::{
    bystander::{Bystander, Target},
    client::{Client, eventually},
    common::{self, daemon::Daemon},
};
use verbs_abi::proto::Mode;

/// One thing that a hostile client does. It fails when the client gets what it should not, or is not answered as it
/// should be.
pub(crate) struct Case {
    name: String,
    attack: Attack,
}

type Attack = Box<dyn FnOnce(&Field) -> Result<()> + Send>;

impl Case {
    pub(crate) fn new(
        name: impl Into<String>,
        attack: impl FnOnce(&Field) -> Result<()> + Send + 'static,
    ) -> Self {
        Self { name: name.into(), attack: Box::new(attack) }
    }
}

/// A router with bystanders.
#[derive(Debug)]
pub(crate) struct Field {
    // Ends before the router does.
    bystander: Bystander,
    daemon: Daemon,
    /// Clients that belong here.
    clients: usize,
    _directory: TempDir,
}

impl Field {
    fn new() -> Result<Self> {
        let directory = TempDir::with_prefix("freeflow-")?;
        let daemon = Daemon::start(&common::tree()?, &directory.path().join("router.sock"))?;
        Self::around(daemon, directory)
    }

    /// Bystanders at a router of the case's own.
    pub(crate) fn around(daemon: Daemon, directory: TempDir) -> Result<Self> {
        let bystander = Bystander::start(&daemon.socket)?;
        Ok(Self { bystander, daemon, clients: 2, _directory: directory })
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.daemon.socket
    }

    /// The router's process.
    pub(crate) fn router(&self) -> Result<u32> {
        Ok(self.status()?.pid)
    }

    /// What belongs to a bystander.
    pub(crate) fn target(&self) -> Target {
        self.bystander.target
    }

    pub(crate) fn open(&self) -> Result<Client> {
        Client::open(self.socket(), Mode::Isolated)
    }

    /// What the router has written so far.
    pub(crate) fn log(&self) -> String {
        self.daemon.log()
    }

    pub(crate) fn status(&self) -> Result<Status> {
        router::client::status(self.socket()).context("the router does not answer")
    }

    /// The bystanders' traffic goes on now.
    pub(crate) fn traffic_goes_on(&self) -> Result<()> {
        self.bystander.check()
    }

    /// What must hold after each case.
    pub(crate) fn check(&self) -> Result<()> {
        self.bystander.check()?;
        eventually("nothing of the hostile client is left", || {
            let status = self.status()?;
            Ok(status.clients.len() == self.clients && status.listeners.is_empty())
        })?;
        let log = self.daemon.log();
        ensure!(!log.contains("panicked"), "the router panicked:\n{log}");
        ensure!(!log.contains("ERROR"), "the router met an error of its own:\n{log}");
        Ok(())
    }
}

/// Tries cases one after the other, and counts.
#[derive(Clone, Default)]
pub(crate) struct Series {
    field: Arc<Mutex<Option<Field>>>,
    held: Arc<AtomicUsize>,
    succeeded: Arc<Mutex<Vec<String>>>,
}

impl Series {
    pub(crate) fn trial(&self, case: Case) -> Trial {
        let series = self.clone();
        Trial::test(case.name.clone(), move || {
            series.attempt(case).map_err(|error| Failed::from(format!("{error:#}")))
        })
    }

    fn attempt(&self, case: Case) -> Result<()> {
        xtask::interrupt::check()?;
        let mut field = self.field.lock().unwrap_or_else(PoisonError::into_inner);
        let there = match field.take() {
            Some(there) => there,
            None => Field::new()?,
        };
        let attack = AssertUnwindSafe(|| (case.attack)(&there).and_then(|()| there.check()));
        let outcome = catch_unwind(attack).unwrap_or_else(|_| Err(anyhow!("the case itself panicked")));
        match outcome {
            Ok(()) => {
                self.held.fetch_add(1, Ordering::Relaxed);
                // Only an unharmed field serves again.
                *field = Some(there);
                Ok(())
            }
            Err(error) => {
                self.succeeded.lock().unwrap_or_else(PoisonError::into_inner).push(case.name);
                Err(anyhow!("{error:#}\nthe router's log:\n{}", there.daemon.log()))
            }
        }
    }

    /// The last test: that there were enough of them, and that none succeeded.
    pub(crate) fn count(&self, cases: usize) -> Trial {
        let series = self.clone();
        Trial::test("at least a hundred hostile cases are tried and none succeeds", move || {
            let tried = || {
                let failed = series.succeeded.lock().unwrap_or_else(PoisonError::into_inner).len();
                series.held.load(Ordering::Relaxed) + failed == cases
            };
            // The others may run in threads of their own.
            let began = std::time::Instant::now();
            while !tried() {
                if began.elapsed() > std::time::Duration::from_secs(600) {
                    return Err(Failed::from("the other cases never end"));
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            let succeeded = series.succeeded.lock().unwrap_or_else(PoisonError::into_inner);
            println!("{} hostile cases, {} succeeded", cases, succeeded.len());
            let held = series.held.load(Ordering::Relaxed);
            if held >= 100 && succeeded.is_empty() {
                Ok(())
            } else {
                Err(Failed::from(format!("{held} cases held; these did not: {succeeded:?}")))
            }
        })
    }
}

/// A file in the directory of the router's socket.
pub(crate) fn beside(field: &Field, name: &str) -> PathBuf {
    field.socket().with_file_name(name)
}
