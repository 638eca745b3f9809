//! The sockets of a shim: how they are made, and when stale ones are removed.
//!
//! Owns the lock under which `start` and `delete` decide whether a shim runs, and the creation and removal of its two sockets.
//!
//! ```text
//!  lock ─▶ control socket: no listener ────▶ remove both, bind both ─▶ keeper ─▶ unlock
//!                        └ keeper answers ─▶ reserve a place there ────────────▶ unlock
//! ```
//!
//! **Invariant:** only the holder of the lock makes and removes sockets; both listen before their address is published.
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use nix::sys::socket::{Backlog, listen};
use nix::sys::stat::{Mode, umask};

use super::Error;
use crate::run_dir::Place;

/// An exclusive lock. Its file is removed with it.
#[derive(Debug)]
pub(crate) struct Lock {
    path: PathBuf,
    _file: Flock<File>,
}

impl Lock {
    /// Waits for the lock at `path`, whose folder exists.
    ///
    /// Errors: [`Error::Locked`] if another process holds it for too long.
    pub(crate) fn take(path: &Path, deadline: Instant) -> Result<Self, Error> {
        let failed = |source| Error::Io { op: "lock", path: path.to_owned(), source };
        loop {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
                .open(path)
                .map_err(failed)?;
            let number = file.metadata().map_err(failed)?.ino();
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // The previous holder may have removed the file: then this lock protects nothing.
                Ok(locked) if fs::metadata(path).is_ok_and(|meta| meta.ino() == number) => {
                    return Ok(Self { path: path.to_owned(), _file: locked });
                }
                Ok(_) => {}
                Err((_, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() < deadline => {
                    // flock(2) has no timeout, and the holder is done within a millisecond or two.
                    std::thread::sleep(Duration::from_micros(200));
                }
                Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Err(Error::Locked { path: path.to_owned() }),
                Err((_, error)) => return Err(failed(error.into())),
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before the lock is released: the next holder sees that the file is gone, and makes another.
        let _ = fs::remove_file(&self.path);
    }
}

/// The two listening sockets of a new shim. Dropped without [`Sockets::keep`], they are removed.
#[derive(Debug)]
pub(crate) struct Sockets {
    /// For clients.
    pub(crate) clients: OwnedFd,
    /// For commands.
    pub(crate) control: OwnedFd,
    place: Option<Place>,
}

impl Sockets {
    /// Binds both sockets and listens. The caller holds the place's lock and has found no listener.
    pub(crate) fn bind(place: &Place) -> Result<Self, Error> {
        remove_stale(place)?;
        let clients = bind(&place.socket)?;
        let control = bind(&place.control).inspect_err(|_| drop(fs::remove_file(&place.socket)))?;
        Ok(Self { clients, control, place: Some(place.clone()) })
    }

    /// Keeps the sockets: the keeper owns them now.
    pub(crate) fn keep(mut self) {
        self.place = None;
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        if let Some(place) = &self.place {
            let _ = remove_stale(place);
        }
    }
}

/// Removes both sockets of a dead shim. The caller holds the place's lock.
pub(crate) fn remove_stale(place: &Place) -> Result<(), Error> {
    for path in [&place.socket, &place.control] {
        match fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(Error::Io { op: "remove the old socket", path: path.clone(), source });
            }
            _ => {}
        }
    }
    Ok(())
}

fn bind(path: &Path) -> Result<OwnedFd, Error> {
    let failed = |source| Error::Io { op: "listen on", path: path.to_owned(), source };
    // The socket is created with its mode; a later chmod would leave a moment in which others can connect.
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(path);
    umask(before);
    let listener = bound.map_err(failed)?;
    listen(&listener, Backlog::MAXCONN).map_err(|error| failed(error.into()))?;
    Ok(listener.into())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    fn place(name: &str) -> (scratch::Folder, Place) {
        let folder = scratch::Folder::new(name);
        let place = Place { socket: folder.join("s"), control: folder.join("c"), lock: folder.join("l") };
        (folder, place)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    #[test]
    fn sockets_are_for_their_owner_alone_and_gone_when_not_kept() {
        let (_folder, place) = place("modes");
        let sockets = Sockets::bind(&place).expect("binds");
        for path in [&place.socket, &place.control] {
            assert_eq!(fs::metadata(path).expect("is there").mode() & 0o777, 0o600);
            UnixStream::connect(path).expect("listens");
        }
        drop(sockets);
        assert!(!place.socket.exists() && !place.control.exists());
        Sockets::bind(&place).expect("binds").keep();
        assert!(place.socket.exists() && place.control.exists());
    }

    #[test]
    fn stale_sockets_and_other_leftovers_are_replaced() {
        let (_folder, place) = place("stale");
        let sockets = Sockets::bind(&place).expect("binds");
        // Another test may have forked a child that still has copies.
        for socket in [&sockets.clients, &sockets.control] {
            nix::sys::socket::shutdown(socket.as_raw_fd(), nix::sys::socket::Shutdown::Both).expect("a socket");
        }
        sockets.keep();
        assert!(UnixStream::connect(&place.socket).is_err(), "a closed socket accepted a connection");
        let _sockets = Sockets::bind(&place).expect("binds again");
        UnixStream::connect(&place.socket).expect("listens");
    }

    #[test]
    fn only_one_process_holds_the_lock_though_its_file_is_recreated() {
        let (_folder, place) = place("lock");
        let inside = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let _lock = Lock::take(&place.lock, soon()).expect("is free soon");
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(!place.lock.exists());
    }

    #[test]
    fn a_lock_that_is_held_too_long_is_given_up() {
        let (_folder, place) = place("held");
        let _lock = Lock::take(&place.lock, soon()).expect("is free");
        let deadline = Instant::now() + Duration::from_millis(20);
        assert!(matches!(Lock::take(&place.lock, deadline), Err(Error::Locked { .. })));
    }
}
