//! What the provider says on stderr, since the process is not ours and has no logger of ours.
//!
//! `FREEFLOW_LOG` chooses: `error` what cannot work; `warn` (the default) what works worse than it should; `info`
//! what happens once a process; `debug` once an object; `trace` more often than that. Nothing is said per work
//! request.

use std::fmt;
use std::io::{self, Write};
use std::sync::OnceLock;

/// How much a line matters; see the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl Level {
    fn parse(word: &str) -> Option<Level> {
        Some(match word {
            "error" => Level::Error,
            "warn" => Level::Warn,
            "info" => Level::Info,
            "debug" => Level::Debug,
            "trace" => Level::Trace,
            _ => return None,
        })
    }
}

/// Whether lines of this level are wanted.
pub(crate) fn wanted(level: Level) -> bool {
    static WANTED: OnceLock<Level> = OnceLock::new();
    let limit = WANTED.get_or_init(|| {
        std::env::var("FREEFLOW_LOG").ok().and_then(|word| Level::parse(&word)).unwrap_or(Level::Warn)
    });
    level <= *limit
}

/// Writes one line, if lines of this level are wanted. The line is written whole: other writers do not mix in.
pub(crate) fn say(level: Level, message: fmt::Arguments<'_>) {
    if wanted(level) {
        // A closed stderr is no reason to fail.
        let _ = io::stderr().write_all(format!("freeflow: {message}\n").as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_ordered_by_how_much_they_matter() {
        assert!(Level::Error < Level::Warn && Level::Debug < Level::Trace);
        assert_eq!(Level::parse("info"), Some(Level::Info));
        assert_eq!(Level::parse("loud"), None);
    }
}
