//! Where the bytes of a process go: fifos that this `xctl` reads, or a file that the shim writes.
//!
//! ```text
//!  in the foreground   fifos in a folder of its own ──▶ this xctl; the folder stays when it detaches, for `attach`
//!  detached            stdout, stderr: a file that the shim appends to; stdin: a fifo, if it was asked for, or nothing
//! ```

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::error::{Error, IoContext as _, Result};

/// What a daemon is given.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Uris {
    /// Empty for none.
    pub(crate) stdin: String,
    /// Empty for none.
    pub(crate) stdout: String,
    /// Empty for none.
    pub(crate) stderr: String,
}

/// The folders of a host that `xctl` uses.
#[derive(Debug, Clone)]
pub(crate) struct Folders {
    /// Of fifos; lost with a reboot.
    pub(crate) state: PathBuf,
    /// Of the files that detached containers write to.
    pub(crate) logs: PathBuf,
}

impl Folders {
    /// The folder of a container's fifos.
    pub(crate) fn of(&self, namespace: &str, container: &str) -> PathBuf {
        self.state.join(namespace).join(container)
    }

    /// Where snapshots are mounted for a moment, in a mount namespace of its own; no namespace of containers has that name.
    pub(crate) fn place_of_mounts(&self) -> PathBuf {
        self.state.join(".mounts")
    }

    /// The file for a container's output.
    pub(crate) fn log(&self, namespace: &str, container: &str) -> PathBuf {
        self.logs.join(namespace).join(format!("{container}.log"))
    }
}

/// Makes the fifos of a process; those in the folder before are another process' no more.
pub(crate) fn fifos(folder: &Path, has_stdin: bool, is_terminal: bool) -> Result<Uris> {
    make_folder(folder)?;
    let fifo = |name: &str| {
        let path = folder.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).on("remove", &path),
            _ => {}
        }
        mkfifo(&path, Mode::from_bits_truncate(0o600)).on("make the fifo", &path)?;
        path.to_str().map(str::to_owned).ok_or_else(|| Error::refused(format!("{} is not in UTF-8", path.display())))
    };
    let stdin = if has_stdin { fifo("stdin")? } else { String::new() };
    // both outputs of a terminal are one
    let stderr = if is_terminal { String::new() } else { fifo("stderr")? };
    Ok(Uris { stdin, stdout: fifo("stdout")?, stderr })
}

/// Those of a process whose output the shim writes to a file.
pub(crate) fn detached(folder: &Path, log_uri: &str, has_stdin: bool, is_terminal: bool) -> Result<Uris> {
    let stdin = if has_stdin { fifos(folder, true, true)?.stdin } else { String::new() };
    let stderr = if is_terminal { String::new() } else { log_uri.to_owned() };
    Ok(Uris { stdin, stdout: log_uri.to_owned(), stderr })
}

/// The URI of a file, as the shim takes it. Its folder is made: daemons that restart a container do not.
pub(crate) fn file_uri(path: &Path) -> Result<String> {
    if let Some(folder) = path.parent() {
        make_folder(folder)?;
    }
    use std::os::unix::ffi::OsStrExt as _;
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
    let escape = |byte: u8| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    Ok(format!("file://{}", path.as_os_str().as_bytes().iter().map(|byte| escape(*byte)).collect::<String>()))
}

/// The path of such a URI.
pub(crate) fn file_path(uri: &str) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStringExt as _;
    let mut rest = uri.strip_prefix("file://")?.bytes();
    let mut path = Vec::new();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            path.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        let value = digit(rest.next())? * 16 + digit(rest.next())?;
        path.push(u8::try_from(value).ok()?);
    }
    path.starts_with(b"/").then(|| PathBuf::from(std::ffi::OsString::from_vec(path)))
}

/// Removes a folder of fifos.
pub(crate) fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).on("remove", folder),
        _ => Ok(()),
    }
}

/// Makes a folder for root alone.
pub(crate) fn make_folder(folder: &Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).on("make the folder", folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_the_same_after_a_uri() {
        let folder = scratch::Folder::new("xctl-uri");
        let path = folder.join("a b%é.log");
        let uri = file_uri(&path).expect("a folder can be made");
        assert!(!uri.contains(' '), "{uri}");
        assert_eq!(file_path(&uri), Some(path));
        for bad in ["", "fifo:///x", "file://x", "file:///a%zz", "file:///a%2"] {
            assert_eq!(file_path(bad), None, "{bad}");
        }
    }

    #[test]
    fn fifos_are_new_each_time() {
        let folder = scratch::Folder::new("xctl-fifos");
        for _ in 0..2 {
            let uris = fifos(&folder, true, false).expect("fifos");
            assert!([&uris.stdin, &uris.stdout, &uris.stderr].iter().all(|path| Path::new(path).exists()), "{uris:?}");
        }
        assert_eq!(fifos(&folder, false, true).map(|uris| (uris.stdin, uris.stderr)).ok(), Some(Default::default()));
    }
}
