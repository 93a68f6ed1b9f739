//! `freeflow doctor`: whether the router's configuration means what its operator wants.

use std::path::{Path, PathBuf};

use router::config::Config;
use verbs_abi::shm::lane::sleep_on_any;

use super::{
    doctor::Finding,
    router::SYSTEM_CONFIG,
    runtime::{Socket, default_directory},
};

/// Looks at the file that was named, or at the one that root's router reads.
pub(crate) fn look(named: Option<&Path>, socket: &Socket) -> Finding {
    let path = named.unwrap_or(Path::new(SYSTEM_CONFIG));
    if named.is_none() && !path.exists() {
        return Finding::pass(format!("none at {SYSTEM_CONFIG}: one tenant, any address"));
    }
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(error) => return Finding::fail(format!("{:#}", anyhow::Error::from(error)), "correct the file"),
    };
    if config.tenants.len() > 1 && sleep_on_any(std::iter::empty(), None).is_err() {
        return Finding::fail(
            format!("{} tenants in {}, and this kernel can serve one", config.tenants.len(), path.display()),
            "use Linux 5.16 or newer (futex_waitv), or a router for each tenant",
        );
    }
    match shared_directory(&config, socket) {
        Some((directory, names)) => Finding::warn(
            format!("{} holds the sockets of {}", directory.display(), names.join(" and ")),
            "containers get the directory: give each tenant's socket one of its own",
        ),
        None => Finding::pass(format!("{}: {}", path.display(), summary(&config))),
    }
}

fn summary(config: &Config) -> String {
    match config.tenants.len() {
        0 => "one tenant, any address".to_owned(),
        1 => "1 tenant".to_owned(),
        count => format!("{count} tenants"),
    }
}

/// A directory with more than one socket in it: who can reach one of them can reach them all.
fn shared_directory(config: &Config, socket: &Socket) -> Option<(PathBuf, Vec<String>)> {
    if config.tenants.is_empty() {
        return None;
    }
    let own = if socket.named { Some(&socket.path) } else { config.socket.as_ref() };
    let own = own.cloned().unwrap_or_else(|| default_directory().join("router.sock"));
    let tenants = config.tenants.iter().map(|tenant| (tenant.socket.clone(), tenant.name.clone()));
    let sockets: Vec<_> = std::iter::once((own, "the operator".to_owned())).chain(tenants).collect();
    let holders = |directory: &Path| -> Vec<String> {
        let inside = sockets.iter().filter(|(socket, _)| socket.parent() == Some(directory));
        inside.map(|(_, name)| name.clone()).collect()
    };
    sockets.iter().filter_map(|(socket, _)| socket.parent()).find_map(|directory| {
        let names = holders(directory);
        (names.len() > 1).then(|| (directory.to_owned(), names))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(text: &str) -> String {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("router.toml");
        std::fs::write(&path, text).unwrap();
        let socket = Socket { path: "/run/freeflow/router.sock".into(), named: true };
        format!("{:?}", look(Some(&path), &socket))
    }

    #[test]
    fn a_configuration_is_checked_as_the_router_checks_it() {
        assert!(finding("").contains("Pass"));
        let wrong = finding("[[tenant]]\nname = 'a'\nsocket = '/a'\nprefixes = ['10.0.0.1/8']\n");
        assert!(wrong.contains("Fail") && wrong.contains("10.0.0.0/8"), "{wrong}");
        assert!(
            format!(
                "{:?}",
                look(Some(Path::new("/nonexistent")), &Socket { path: "/x".into(), named: true })
            )
            .contains("Fail")
        );
    }

    #[test]
    fn sockets_in_one_directory_are_told_of() {
        let tenant = |name: &str, socket: &str, prefix: &str| {
            format!("[[tenant]]\nname = '{name}'\nsocket = '{socket}'\nprefixes = ['{prefix}']\n")
        };
        let apart = tenant("a", "/run/freeflow/a/router.sock", "10.0.0.0/8")
            + &tenant("b", "/run/freeflow/b/router.sock", "fd00::/8");
        assert!(finding(&apart).contains("2 tenants"));
        let together =
            tenant("a", "/run/ff/a.sock", "10.0.0.0/8") + &tenant("b", "/run/ff/b.sock", "fd00::/8");
        assert!(finding(&together).contains("Warn") && finding(&together).contains("a and b"));
        let beside = tenant("a", "/run/freeflow/a.sock", "10.0.0.0/8");
        assert!(finding(&beside).contains("the operator and a"), "{}", finding(&beside));
    }
}
