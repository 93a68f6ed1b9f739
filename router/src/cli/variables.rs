//! The environment variables that give a program the virtual RNIC.
//!
//! Does: which variables, with which values, beside what the environment says already.
//! Leaves to others: printing them (env), setting them for a program (run).

use std::{
    ffi::{OsStr, OsString},
    path::Path,
};

use clap::ValueEnum;

use super::install::Tree;

/// Who executes the work requests of a program's queue pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// The router, on its own checked copy
    Isolated,
    /// The program's own threads, for peers of the same tenant
    Direct,
}

impl Mode {
    fn word(self) -> &'static str {
        match self {
            Self::Isolated => "isolated",
            Self::Direct => "direct",
        }
    }
}

/// Names and values, in the order in which they are shown.
pub(crate) type Variables = Vec<(&'static str, OsString)>;

/// The variables of a program that starts from the environment `old` and looks for devices in `sysfs`.
pub(crate) fn variables(
    tree: &Tree,
    sysfs: &Path,
    socket: &Path,
    mode: Option<Mode>,
    old: impl Fn(&str) -> Option<OsString>,
) -> Variables {
    let drivers = tree.provider_stem().into_os_string();
    let preload = tree.shim().into_os_string();
    let mut variables = vec![
        ("SYSFS_PATH", sysfs.as_os_str().to_owned()),
        ("RDMAV_DRIVERS", prepended(drivers, old("RDMAV_DRIVERS"))),
        ("LD_PRELOAD", prepended(preload, old("LD_PRELOAD"))),
        ("FREEFLOW_SOCKET", socket.as_os_str().to_owned()),
    ];
    variables.extend(mode.map(|mode| ("FREEFLOW_MODE", OsString::from(mode.word()))));
    variables
}

/// `first:rest`, where `rest` does not name `first` again.
fn prepended(first: OsString, old: Option<OsString>) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let old = old.unwrap_or_default();
    let rest = old.as_bytes().split(|byte| matches!(byte, b':' | b';' | b' '));
    let mut list = first.clone().into_vec();
    for name in rest.filter(|name| !name.is_empty() && OsStr::from_bytes(name) != first) {
        list.push(b':');
        list.extend_from_slice(name);
    }
    OsString::from_vec(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepend(old: &str) -> String {
        prepended("/p/ours.so".into(), Some(old.into())).into_string().unwrap()
    }

    #[test]
    fn what_is_preloaded_already_stays_behind_ours() {
        assert_eq!(prepend(""), "/p/ours.so");
        assert_eq!(prepend("/x/a.so /x/b.so"), "/p/ours.so:/x/a.so:/x/b.so");
    }

    #[test]
    fn a_run_inside_a_run_names_nothing_twice() {
        assert_eq!(prepend("/p/ours.so:/x/a.so"), "/p/ours.so:/x/a.so");
    }
}
