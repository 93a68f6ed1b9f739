//! The directory of the default control socket, and which socket is meant.
//!
//! Does: `/run/freeflow` for root, `$XDG_RUNTIME_DIR/freeflow` for a user, `/tmp/freeflow-UID` where a session
//! gave the user no such directory. Leaves to others: who listens there (probe), starting who should (autostart).

use std::{
    env,
    ffi::OsStr,
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use rustix::process::geteuid;

/// A control socket and how it was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Socket {
    pub(crate) path: PathBuf,
    /// Named by the user, so only the user starts a router there.
    pub(crate) named: bool,
}

impl Socket {
    /// The socket named by `--socket` or `FREEFLOW_SOCKET`, else this user's default.
    pub(crate) fn choose(option: Option<&Path>) -> anyhow::Result<Self> {
        let variable = env::var_os("FREEFLOW_SOCKET").filter(|value| !value.is_empty()).map(PathBuf::from);
        match option.map(Path::to_owned).or(variable) {
            Some(path) => {
                // Programs change their directory; the router's path must mean the same from everywhere.
                let path = std::path::absolute(&path)
                    .with_context(|| format!("{} is not a usable socket path", path.display()))?;
                Ok(Self { path, named: true })
            }
            None => Ok(Self { path: default_directory().join("router.sock"), named: false }),
        }
    }
}

/// The directory of this user's default socket. It need not exist.
pub(crate) fn default_directory() -> PathBuf {
    let uid = geteuid().as_raw();
    directory(uid, env::var_os("XDG_RUNTIME_DIR").as_deref())
}

/// The same for any user. A session directory counts only where it exists and belongs to that user: after `su` the
/// variable still names the other user's.
fn directory(uid: u32, session: Option<&OsStr>) -> PathBuf {
    if uid == 0 {
        return PathBuf::from("/run/freeflow");
    }
    let session = session.map(Path::new).filter(|path| path.is_absolute());
    let owned = |path: &&Path| fs::metadata(path).is_ok_and(|data| data.is_dir() && data.uid() == uid);
    match session.filter(owned) {
        Some(session) => session.join("freeflow"),
        None => PathBuf::from(format!("/tmp/freeflow-{uid}")),
    }
}

/// Makes the default directory, or checks the one that is there: in `/tmp` anybody could have made it.
pub(crate) fn create_default_directory() -> anyhow::Result<PathBuf> {
    let uid = geteuid().as_raw();
    let path = default_directory();
    let mode = if uid == 0 { 0o755 } else { 0o700 };
    create_private(&path, uid, mode)?;
    Ok(path)
}

fn create_private(path: &Path, uid: u32, mode: u32) -> anyhow::Result<()> {
    let shown = path.display();
    match DirBuilder::new().mode(mode).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).with_context(|| format!("cannot make the directory {shown}")),
    }
    let data = fs::symlink_metadata(path).with_context(|| format!("cannot look at {shown}"))?;
    ensure!(
        data.is_dir(),
        "{shown} is in the way: it is no directory; remove it, or choose another --socket"
    );
    if data.uid() != uid {
        bail!(
            "{shown} belongs to user {}, not to user {uid}; remove it, or choose another --socket",
            data.uid()
        );
    }
    let strangers = data.mode() & 0o777 & !mode;
    ensure!(strangers == 0, "{shown} is open to others; run `chmod {mode:o} {shown}`");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn root_and_users_have_their_own_places() {
        let dir = tempfile::tempdir().unwrap();
        let me = fs::metadata(dir.path()).unwrap().uid();
        assert_eq!(directory(0, Some(OsStr::new("/run/user/1000"))), Path::new("/run/freeflow"));
        assert_eq!(directory(54_321, None), Path::new("/tmp/freeflow-54321"));
        assert_eq!(directory(54_321, Some(OsStr::new("relative"))), Path::new("/tmp/freeflow-54321"));
        assert_eq!(directory(54_321, Some(OsStr::new("/nonexistent"))), Path::new("/tmp/freeflow-54321"));
        if me != 0 {
            assert_eq!(directory(me, Some(dir.path().as_os_str())), dir.path().join("freeflow"));
        } else {
            assert_eq!(directory(54_321, Some(dir.path().as_os_str())), Path::new("/tmp/freeflow-54321"));
        }
    }

    #[test]
    fn a_directory_that_others_can_enter_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let uid = geteuid().as_raw();
        let path = dir.path().join("freeflow");
        create_private(&path, uid, 0o700).unwrap();
        create_private(&path, uid, 0o700).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(create_private(&path, uid, 0o700).unwrap_err().to_string().contains("chmod 700"));
    }

    #[test]
    fn a_directory_of_somebody_else_or_a_link_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let uid = geteuid().as_raw();
        let stranger = create_private(dir.path(), uid + 1, 0o700).unwrap_err().to_string();
        assert!(stranger.contains("belongs to user"), "{stranger}");
        let link = dir.path().join("link");
        symlink("/", &link).unwrap();
        assert!(create_private(&link, uid, 0o755).unwrap_err().to_string().contains("no directory"));
    }
}
