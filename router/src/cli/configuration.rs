//! `freeflow doctor`: whether the router's configuration means what its operator wants.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use router::{
    config::{Config, DirectoryFile, Endpoint},
    directory::Probe,
};
use verbs_abi::shm::lane::sleep_on_any;

use super::{
    doctor::Finding,
    router::SYSTEM_CONFIG,
    runtime::{Socket, default_directory},
};

/// What a configuration says of other hosts, if it does.
pub(crate) fn directory(named: Option<&Path>) -> Option<Finding> {
    let config = Config::load(named.unwrap_or(Path::new(SYSTEM_CONFIG))).ok()?;
    let (links, told) = (config.links.as_ref()?, config.directory.as_ref()?);
    if let Some(file) = &told.file {
        return Some(match DirectoryFile::load(file, links.security) {
            Ok(says) => Finding::pass(format!(
                "{}: {} routers, {} routes",
                file.display(),
                says.routers.len(),
                says.routes.len()
            )),
            Err(error) => Finding::fail(
                format!("{:#}", anyhow::Error::from(error)),
                "correct the file; it is the same on all hosts",
            ),
        });
    }
    let probe = match router::directory::probe(&config)? {
        Ok(probe) => probe,
        Err(trouble) => {
            return Some(Finding::fail(
                format!("no etcd answers: {trouble}"),
                "check that it runs and can be reached, and directory.etcd, user and certificates",
            ));
        }
    };
    let Probe { place, revision, routers, addresses } = probe;
    let found = format!("etcd at {place}: revision {revision}, {routers} routers, {addresses} addresses");
    Some(match weakness(&config) {
        Some((what, mend)) => Finding::warn(format!("{found}; {what}"), mend),
        None => Finding::pass(found),
    })
}

/// What works, and should not stay so.
fn weakness(config: &Config) -> Option<(String, &'static str)> {
    let told = config.directory.as_ref()?;
    let published =
        told.announce.len() + config.tenants.iter().map(|tenant| tenant.announce.len()).sum::<usize>();
    if published == 0 {
        return Some((
            "this router publishes no address".to_owned(),
            "write `announce = [\"10.244.0.0/16\"]` into [directory], or into each [[tenant]]",
        ));
    }
    let file = told.password_file.as_ref()?;
    let mode = fs::metadata(file).map(|data| data.permissions().mode()).unwrap_or(0);
    if mode & 0o007 != 0 {
        return Some((
            format!("everybody on this host can read {}", file.display()),
            "chmod 0600 the file; the router reads it as its own user",
        ));
    }
    let open = |endpoint: &&Endpoint| {
        !endpoint.is_secure && !["127.0.0.1", "::1", "localhost"].contains(&&*endpoint.host)
    };
    told.etcd.iter().find(open).map(|endpoint| {
        (
            format!("the password travels to {endpoint} in the open"),
            "use https servers, with directory.authority",
        )
    })
}

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

/// What the configuration says of the real NIC; of one that is wrong, the default.
pub(crate) fn nic(named: Option<&Path>) -> router::config::Rnic {
    Config::load(named.unwrap_or(Path::new(SYSTEM_CONFIG))).unwrap_or_default().rnic
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
    fn the_directory_is_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let (path, list) = (folder.path().join("router.toml"), folder.path().join("directory.toml"));
        let look = |directory: &str| {
            let links = "[links]\nname = 'a'\nlisten = '127.0.0.1:7471'\nsecurity = 'plain'\n";
            fs::write(&path, format!("{links}[directory]\n{directory}")).unwrap();
            format!("{:?}", directory_of(&path))
        };
        let in_file = format!("file = {list:?}\n");
        assert!(look(&in_file).contains("Fail"), "it is not there");
        fs::write(&list, "[routers]\na = '10.0.0.1:7471'\n").unwrap();
        assert!(look(&in_file).contains("Pass") && look(&in_file).contains("1 routers"));
        // Port 1 of this host: nobody listens there.
        let away = look("etcd = ['http://127.0.0.1:1']\n");
        assert!(away.contains("Fail") && away.contains("http://127.0.0.1:1"), "{away}");
        fs::write(&path, "").unwrap();
        assert!(directory(Some(&path)).is_none(), "this host is alone");
    }

    fn directory_of(path: &Path) -> Finding {
        directory(Some(path)).unwrap()
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
