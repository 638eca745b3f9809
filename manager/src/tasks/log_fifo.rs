//! The fifo `log` of a bundle: what a shim writes there appears on this process' stderr.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::stat::{Mode, fstat, stat};
use tokio::io::Interest;
use tokio::net::unix::pipe::{OpenOptions, Receiver};

use crate::error::{IoContext as _, Result};

/// Copies the fifo until it is removed. Creates it if it does not exist.
pub(super) fn copy(bundle: &Path) -> Result<()> {
    let path = bundle.join("log");
    match nix::unistd::mkfifo(&path, Mode::S_IRWXU) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(error) => return Err(error).on("make fifo", &path),
    }
    // a shim opens it for writing and must find a reader, later ones too
    let receiver = OpenOptions::new().read_write(true).open_receiver(&path).on("open fifo", &path)?;
    tokio::spawn(copy_until_removed(receiver, path));
    Ok(())
}

async fn copy_until_removed(receiver: Receiver, path: PathBuf) {
    loop {
        // as this end is open for writing too, it never ends by itself
        let ready = tokio::time::timeout(CHECK_INTERVAL, receiver.ready(Interest::READABLE)).await;
        match ready {
            Ok(Ok(_)) => {
                let mut buffer = [0; 4096];
                match receiver.try_read(&mut buffer) {
                    Ok(0) => return,
                    // a failed write to stderr cannot be reported
                    Ok(count) => drop(io::stderr().write_all(&buffer[..count])),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return,
                }
            }
            Ok(Err(_)) => return,
            Err(_elapsed) if is_at(&receiver, &path) => {}
            Err(_elapsed) => return,
        }
    }
}

/// Whether this very fifo is still there: a task of the same id has another one.
fn is_at(receiver: &Receiver, path: &Path) -> bool {
    let (Ok(open), Ok(found)) = (fstat(receiver), stat(path)) else { return false };
    (open.st_dev, open.st_ino) == (found.st_dev, found.st_ino)
}

/// How often an unused fifo is checked for removal.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);
