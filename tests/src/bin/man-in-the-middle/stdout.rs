//! Between a process's stdout and its reader.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, poll};
use shim_tests::stdio::fifo;

/// The suffix of the path that the shim gets.
const SUFFIX: &str = ".m";

/// Puts a fifo in front of `path`, and returns its path.
pub(super) fn intercept(path: &str, fault: &str) -> String {
    let inner = format!("{path}{SUFFIX}");
    if !Path::new(path).is_absolute() || fifo(Path::new(&inner)).is_err() {
        return path.to_owned();
    }
    let (from, to, fault) = (inner.clone(), path.to_owned(), fault.to_owned());
    thread::spawn(move || drop(copy(&from, &to, &fault)));
    inner
}

/// The path that the client knows.
pub(super) fn client_path(path: &str) -> String {
    path.strip_suffix(SUFFIX).unwrap_or(path).to_owned()
}

fn copy(from: &str, to: &str, fault: &str) -> io::Result<()> {
    let (mut from, mut to) = (File::open(from)?, File::options().write(true).open(to)?);
    if fault == "impatient" {
        fcntl(&to, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    }
    let mut last = None;
    let mut buffer = [0; 1 << 16];
    loop {
        if fault == "quiet-is-the-end" {
            let mut wanted = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
            if poll(&mut wanted, 500u16)? == 0 {
                break;
            }
        }
        let count = from.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        match fault {
            "lost-byte" => {
                if let Some(last) = last.replace(buffer[count - 1]) {
                    to.write_all(&[last])?;
                }
                to.write_all(&buffer[..count - 1])?;
            }
            "impatient" => {
                let _not_at_once = to.write(&buffer[..count]);
            }
            _ => to.write_all(&buffer[..count])?,
        }
    }
    if fault == "late-end" {
        thread::sleep(Duration::from_secs(15)); // the fault
    }
    Ok(())
}
