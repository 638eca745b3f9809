//! Checks whether a daemon could start with some settings, without changing anything, even while one runs.

use std::io;
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use crate::error::{Error, IoContext as _, Result};
use crate::settings::{MetricsAddress, Settings};
use crate::store;

/// Fails where a start would fail.
///
/// Errors: the first reason.
pub(crate) fn check(settings: &Settings) -> Result<()> {
    for folder in [&settings.root, &settings.state] {
        folder_can_be_made(folder)?;
    }
    let mut sockets = vec![settings.address.clone(), settings.ttrpc_address(), settings.control_address()];
    match &settings.metrics {
        Some(MetricsAddress::Unix(path)) => sockets.push(path.clone()),
        Some(MetricsAddress::Tcp(address)) => match TcpListener::bind(address) {
            // it may be the running daemon that listens there
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                return Err(error).on("listen at", Path::new(&format!("tcp://{address}")));
            }
            _ => {}
        },
        None => {}
    }
    for (index, path) in sockets.iter().enumerate() {
        socket_can_be_made(path)?;
        if sockets[..index].contains(path) {
            return Err(Error::Precondition(format!("{} is configured for two sockets", path.display())));
        }
    }
    store::rehearse(&settings.store_files()).map(drop)
}

fn socket_can_be_made(path: &Path) -> Result<()> {
    let length = path.as_os_str().len();
    if length > LONGEST_BYTES {
        let sentence = format!("path of socket {} has {length} bytes; the maximum is {LONGEST_BYTES}", path.display());
        return Err(Error::Precondition(sentence));
    }
    if path.as_os_str().as_bytes().ends_with(b"/") || path.symlink_metadata().is_ok_and(|about| !about.file_type().is_socket()) {
        return Err(Error::Precondition(format!("{} exists and is not a socket", path.display())));
    }
    folder_can_be_made(path.parent().unwrap_or(Path::new("/")))
}

fn folder_can_be_made(folder: &Path) -> Result<()> {
    let mut found = folder;
    loop {
        match found.metadata() {
            Ok(about) if about.is_dir() => return Ok(()),
            Ok(_) => {
                let sentence = format!("cannot create folder {}: {} is a file", folder.display(), found.display());
                return Err(Error::Precondition(sentence));
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                found = found.parent().unwrap_or(Path::new("/"))
            }
            Err(error) => return Err(error).on("make folder", folder),
        }
    }
}

/// What the kernel takes, without the ending under which a socket is made.
const LONGEST_BYTES: usize = 107 - ".new".len();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_start_would_refuse_is_found_without_starting() {
        let folder = scratch::Folder::new("preflight");
        std::fs::write(folder.join("file"), "precious").expect("a file");
        let good = Settings {
            root: folder.join("a/root"),
            state: folder.join("a/state"),
            address: folder.join("a/x.sock"),
            ..Settings::default()
        };
        check(&good).expect("nothing is there yet");
        assert!(!folder.join("a").exists(), "and nothing was made");
        for (bad, sentence) in [
            (Settings { root: folder.join("file/root"), ..good.clone() }, "file is a file"),
            (Settings { address: folder.join("file"), ..good.clone() }, "exists and is not a socket"),
            (Settings { address: folder.join("x".repeat(200)), ..good.clone() }, "bytes; the maximum is 103"),
            (Settings { metrics: Some(MetricsAddress::Unix(good.address.clone())), ..good.clone() }, "is configured for two sockets"),
            (
                Settings { metrics: Some(MetricsAddress::Tcp(([203, 0, 113, 1], 1).into())), ..good.clone() },
                "listen at tcp://203.0.113.1:1",
            ),
        ] {
            let error = check(&bad).expect_err(sentence).chain();
            assert!(error.contains(sentence), "{error}");
        }
        std::fs::create_dir_all(&good.root).expect("a folder");
        std::fs::write(good.store(), "not a store, but long enough to be taken for one. ".repeat(50)).expect("a file");
        assert!(check(&good).expect_err("foreign").to_string().contains("is not a metadata store"));
    }
}
