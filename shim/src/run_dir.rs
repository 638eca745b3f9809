//! The paths of the shims' sockets.
//!
//! Owns the names below `/run`: the folder in which containerd finds shims' sockets, and x's own folder with the control sockets
//! of all keepers, which is the one place that lists them.
//!
//! **Invariant:** a used folder is a real one, owned by root (or by the shim's user) and closed to all others; a socket's
//! path is never longer than the kernel allows.
use std::env;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;
use sha2::{Digest, Sha256};

/// Replaces `/run`, so that a test's shims see only each other. Daemon, `start`, `delete`, `ps` and `inspect` must agree on it.
pub(crate) const RUN_DIR_VARIABLE: &str = "X_SHIM_RUN_DIR";

/// The longest path of a socket, in bytes: `sun_path` is 108 with the zero at its end.
pub(crate) const MAX_SOCKET_PATH_BYTES: usize = 107;

const CONTROL_SUFFIX: &str = "sock";
const LOCK_SUFFIX: &str = "lock";

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{op} {}", path.display())]
    Io { op: &'static str, path: PathBuf, source: io::Error },
    #[error("folder {} is not safe to use: {why}", path.display())]
    NotPrivate { path: PathBuf, why: &'static str },
    #[error("the socket path {} has {} bytes, but the kernel allows at most {MAX_SOCKET_PATH_BYTES}: choose a shorter folder", path.display(), path.as_os_str().len())]
    TooLong { path: PathBuf },
}

/// The folders of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RunDir(PathBuf);

/// The paths of one shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The socket for containerd.
    pub(crate) socket: PathBuf,
    /// The control socket, for the commands of this binary.
    pub(crate) control: PathBuf,
    /// Locked by a `start` or `delete` that makes or removes these sockets.
    pub(crate) lock: PathBuf,
}

impl RunDir {
    /// The folders that the environment names, `/run` by default.
    pub(crate) fn from_environment() -> Self {
        let named = env::var_os(RUN_DIR_VARIABLE).filter(|path| Path::new(path).is_absolute());
        Self(named.map_or_else(|| PathBuf::from("/run"), PathBuf::from))
    }

    /// The folder of the control sockets.
    pub(crate) fn controls(&self) -> PathBuf {
        self.0.join("containerd-shim-x")
    }

    /// The folder of the stock shim's sockets.
    pub(crate) fn sockets(&self) -> PathBuf {
        self.0.join("containerd/s")
    }

    /// Finds the place of the shim of `group`. `socket_dir` is the daemon's choice, if it made one.
    ///
    /// Errors: [`Error::TooLong`].
    pub(crate) fn place(&self, daemon: &str, namespace: &str, group: &str, socket_dir: Option<&Path>) -> Result<Place, Error> {
        let name = name_of(daemon, namespace, group);
        let sockets = socket_dir.map_or_else(|| self.sockets(), Path::to_path_buf);
        let controls = self.controls();
        let place = Place {
            socket: sockets.join(&name),
            control: controls.join(format!("{name}.{CONTROL_SUFFIX}")),
            lock: controls.join(format!("{name}.{LOCK_SUFFIX}")),
        };
        for path in [&place.socket, &place.control] {
            if path.as_os_str().as_bytes().len() > MAX_SOCKET_PATH_BYTES {
                return Err(Error::TooLong { path: path.clone() });
            }
        }
        Ok(place)
    }

    /// Lists the control sockets of all keepers, dead ones' included. No folder: no keepers.
    pub(crate) fn list_controls(&self) -> Result<Vec<PathBuf>, Error> {
        let path = self.controls();
        match check_private(&path) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        }
        let failed = |source| Error::Io { op: "list", path: path.clone(), source };
        let mut controls = Vec::new();
        for entry in fs::read_dir(&path).map_err(failed)? {
            let entry = entry.map_err(failed)?.path();
            if entry.extension().is_some_and(|suffix| suffix == CONTROL_SUFFIX) {
                controls.push(entry);
            }
        }
        controls.sort();
        Ok(controls)
    }
}

/// The name of a shim's sockets: the same for every container of a group, and no other shim's.
///
/// It is the name of the stock shim's sockets, so that `ctr shim --id` finds it: the SHA-256 of the daemon's address,
/// the namespace and the group (else the container's id) as a path, in hexadecimal. Neither namespaces nor ids contain a slash.
fn name_of(daemon: &str, namespace: &str, group: &str) -> String {
    // as Go's filepath.Join writes it
    let daemon: PathBuf = Path::new(daemon).components().collect();
    let mut hash = Sha256::new();
    for part in [daemon.as_os_str().as_bytes(), b"/", namespace.as_bytes(), b"/", group.as_bytes()] {
        hash.update(part);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes the folder for control sockets, or checks that an existing one belongs to this user alone.
pub(crate) fn ensure_private(path: &Path) -> Result<(), Error> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut parents = DirBuilder::new();
            parents.recursive(true).mode(0o711);
            if let Some(parent) = path.parent() {
                parents.create(parent).map_err(|source| Error::Io { op: "make", path: parent.to_owned(), source })?;
            }
            DirBuilder::new().mode(0o700).create(path).or_else(already_there).map_err(|source| Error::Io {
                op: "make",
                path: path.to_owned(),
                source,
            })?;
        }
        other => other.or_else(already_there).map_err(|source| Error::Io { op: "make", path: path.to_owned(), source })?,
    }
    check_private(path)
}

fn already_there(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) }
}

/// Checks that only this user (and root) can put or reach anything in a folder.
fn check_private(path: &Path) -> Result<(), Error> {
    // Not following a link: it could lead into another user's folder.
    let meta = fs::symlink_metadata(path).map_err(|source| Error::Io { op: "look at", path: path.to_owned(), source })?;
    let refuse = |why| Err(Error::NotPrivate { path: path.to_owned(), why });
    match () {
        () if meta.is_symlink() => refuse("it is a symbolic link"),
        () if !meta.is_dir() => refuse("it is not a folder"),
        () if meta.uid() != geteuid().as_raw() && meta.uid() != 0 => refuse("it belongs to another user"),
        () if meta.mode() & 0o077 != 0 => refuse("its mode lets others in"),
        () => Ok(()),
    }
}

/// Makes the folder for shims' sockets, which other shims share. Its mode is only set where it is made here.
pub(crate) fn ensure_shared(path: &Path) -> Result<(), Error> {
    let failed = |source| Error::Io { op: "make", path: path.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAEMON: &str = "/run/containerd/containerd.sock";

    #[test]
    fn a_group_has_one_place_and_no_other_group_has_it() {
        let run = RunDir("/run".into());
        let place = |daemon, namespace, group| run.place(daemon, namespace, group, None).expect("short enough");
        let mine = place(DAEMON, "n1", "c1");
        assert_eq!(mine, place(DAEMON, "n1", "c1"));
        assert_eq!(mine.socket.parent(), Some(Path::new("/run/containerd/s")));
        assert_eq!(mine.control.parent(), Some(Path::new("/run/containerd-shim-x")));
        assert_eq!(mine.control.file_stem(), mine.socket.file_name());
        for other in [place(DAEMON, "n1", "c2"), place(DAEMON, "n2", "c1"), place("/d", "n1", "c1"), place(DAEMON, "n1c1", "")] {
            assert_ne!(mine, other);
        }
    }

    #[test]
    fn the_name_of_a_place_is_the_one_that_ctr_computes() {
        for (daemon, namespace, id, name) in [
            (DAEMON, "default", "c1", "d25aa4ef11a84e954e74a5bcff06557d0b6ea8d0c00243896f29826694bbd888"),
            (
                "/run//k3s/./containerd/containerd.sock",
                "k8s.io",
                "0a1b",
                "2a03a2229c1c4dcc7ee9174926220030dd20a871371ac1d06ddb0f2e86a75da8",
            ),
        ] {
            assert_eq!(name_of(daemon, namespace, id), name);
        }
    }

    #[test]
    fn a_socket_path_of_107_bytes_is_taken_and_one_of_108_is_refused_with_both_numbers() {
        let run = RunDir("/run".into());
        let folder = |bytes: usize| format!("/{}", "d".repeat(bytes - 1));
        // 64 of the name and a slash.
        let fits = folder(MAX_SOCKET_PATH_BYTES - 65);
        let place = run.place(DAEMON, "n1", "c1", Some(Path::new(&fits))).expect("107 bytes");
        assert_eq!(place.socket.as_os_str().len(), 107);
        let error = run.place(DAEMON, "n1", "c1", Some(Path::new(&folder(43)))).expect_err("108 bytes");
        let sentence = error.to_string();
        assert!(sentence.contains("has 108 bytes, but the kernel allows at most 107") && sentence.contains("/ddd"), "{sentence}");
        // The kernel agrees.
        assert!(nix::sys::socket::UnixAddr::new(place.socket.as_os_str().as_bytes()).is_ok());
        assert!(nix::sys::socket::UnixAddr::new([b'a'; 108].as_slice()).is_err());
    }

    #[test]
    fn a_folder_that_others_can_reach_is_refused() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = scratch::Folder::new("private");
        let mine = folder.join("deep/mine");
        ensure_private(&mine).expect("is made");
        ensure_private(&mine).expect("is there");
        assert_eq!(fs::metadata(&mine).expect("is there").mode() & 0o7777, 0o700);
        let link = folder.join("link");
        symlink(&mine, &link).expect("a link can be made");
        assert!(matches!(ensure_private(&link), Err(Error::NotPrivate { why: "it is a symbolic link", .. })));
        fs::set_permissions(&mine, fs::Permissions::from_mode(0o755)).expect("can be opened up");
        assert!(matches!(ensure_private(&mine), Err(Error::NotPrivate { why: "its mode lets others in", .. })));
        let file = folder.join("file");
        fs::write(&file, "").expect("a file can be written");
        assert!(matches!(ensure_private(&file), Err(Error::NotPrivate { why: "it is not a folder", .. })));
    }

    #[test]
    fn only_control_sockets_are_listed() {
        let folder = scratch::Folder::new("list");
        let run = RunDir(folder.to_owned());
        assert!(run.list_controls().expect("no folder").is_empty());
        ensure_private(&run.controls()).expect("is made");
        for name in ["b.sock", "a.sock", "a.lock", "other"] {
            fs::write(run.controls().join(name), "").expect("a file can be written");
        }
        let listed = run.list_controls().expect("a folder");
        assert_eq!(listed, [run.controls().join("a.sock"), run.controls().join("b.sock")]);
    }
}
