//! The configuration read again: who may be direct. Everything else waits for a restart.

use std::path::PathBuf;

use super::Daemon;
use crate::config::{Config, Mode};

/// The configuration and where it came from.
#[derive(Debug)]
pub(super) struct Policy {
    pub(super) file: PathBuf,
    pub(super) config: Config,
}

impl Daemon {
    /// Reads the configuration again and follows its modes. One that is wrong changes nothing.
    pub(super) fn reload(&mut self) {
        let Some(policy) = &self.policy else { return };
        let shown = policy.file.display();
        let new = match Config::load(&policy.file) {
            Ok(new) => new,
            Err(error) => return tracing::error!("{error}; nothing was changed"),
        };
        tracing::info!(file = %shown, "read the configuration again");
        if without_modes(&new) != without_modes(&policy.config) {
            tracing::warn!(file = %shown, "only `mode` and `direct` are followed at once; restart the router for the rest");
        }
        for (_, tenant) in &self.doors {
            if let Some(mode) = tenant.follow(&new) {
                tracing::info!(tenant = tenant.name, mode, "the mode changed");
            }
        }
        self.sessions.values_mut().for_each(crate::session::Session::follow_policy);
    }
}

/// The rest of a configuration. What the command line overrides is not compared.
fn without_modes(config: &Config) -> Config {
    let mut rest = Config { direct: true, socket: None, log: None, idle_exit: None, ..config.clone() };
    rest.tenants.iter_mut().for_each(|tenant| tenant.mode = Mode::Direct);
    rest
}
