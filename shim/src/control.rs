//! The client of a keeper's control socket.
//!
//! Owns one exchange: connect, one request, one reply. The messages are `handover`'s.
//!
//! **Invariant:** no exchange takes longer than its deadline, even if the keeper hangs.
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::handover::{ControlReply, ControlRequest, MAX_MESSAGE_BYTES, Malformed, Snapshot, UpgradeReport, length_of};

/// How long to wait before retrying after a keeper closed the connection.
const RETRY_AFTER: Duration = Duration::from_millis(5);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// There is no socket, or no process listens on it: the keeper is gone.
    #[error("no keeper listens on {}", path.display())]
    NoKeeper { path: PathBuf },
    /// The keeper listens and closes each connection: it serves too many.
    #[error("the keeper on {} closed the connection on every try until the deadline; it may be serving too many", path.display())]
    HungUp { path: PathBuf },
    /// The keeper listens and did not answer in time.
    #[error("the keeper on {} did not answer in time", path.display())]
    Silent { path: PathBuf },
    #[error("the keeper on {} sent a malformed answer", path.display())]
    Malformed { path: PathBuf, source: Malformed },
    #[error("the keeper on {} sent an answer of the wrong kind", path.display())]
    Unexpected { path: PathBuf },
    #[error("the keeper on {} refuses: {why}", path.display())]
    Refused { path: PathBuf, why: String },
    #[error("talk to the keeper on {}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl Error {
    /// Whether there is no keeper (any more), rather than one that does not answer: its socket is missing or refuses connections.
    pub(crate) fn is_gone(&self) -> bool {
        matches!(self, Self::NoKeeper { .. })
    }
}

/// Sends a request to the keeper that listens at `path` and waits for its reply.
pub(crate) fn ask(path: &Path, request: &ControlRequest, deadline: Instant) -> Result<ControlReply, Error> {
    ask_with(path, request, None, deadline)
}

/// Upgrades a keeper and its worker to another executable.
pub(crate) fn upgrade(path: &Path, request: &ControlRequest, program: BorrowedFd<'_>, deadline: Instant) -> Result<UpgradeReport, Error> {
    match ask_with(path, request, Some(program), deadline)? {
        ControlReply::Upgraded(report) => Ok(*report),
        ControlReply::Refused { why } => Err(Error::Refused { path: path.to_owned(), why }),
        _ => Err(Error::Unexpected { path: path.to_owned() }),
    }
}

fn ask_with(path: &Path, request: &ControlRequest, attached: Option<BorrowedFd<'_>>, deadline: Instant) -> Result<ControlReply, Error> {
    let explain = |source: io::Error| {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::NoKeeper { path },
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => Error::HungUp { path },
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::Silent { path },
            _ => Error::Io { path, source },
        }
    };
    // A keeper closes connections beyond its limit; one that died meanwhile refuses the next try. Every request may be repeated.
    let reply = loop {
        match exchange(path, request, attached, deadline).map_err(explain) {
            Err(Error::HungUp { .. }) if Instant::now() + RETRY_AFTER < deadline => std::thread::sleep(RETRY_AFTER),
            other => break other?,
        }
    };
    ControlReply::decode(&reply).map_err(|source| Error::Malformed { path: path.to_owned(), source })
}

/// Asks a keeper for a snapshot.
pub(crate) fn describe(path: &Path, deadline: Instant) -> Result<Snapshot, Error> {
    snapshot(path, &ControlRequest::Describe, deadline)
}

/// Reserves a place for a container in a keeper. Returns the keeper's snapshot, which has the container if it exists already.
pub(crate) fn join(path: &Path, id: &str, deadline: Instant) -> Result<Snapshot, Error> {
    snapshot(path, &ControlRequest::Join { id: id.to_owned() }, deadline)
}

fn snapshot(path: &Path, request: &ControlRequest, deadline: Instant) -> Result<Snapshot, Error> {
    match ask(path, request, deadline)? {
        ControlReply::Snapshot(snapshot) => Ok(*snapshot),
        _ => Err(Error::Unexpected { path: path.to_owned() }),
    }
}

/// Whether a process accepts connections at `path`.
pub(crate) fn is_listening(path: &Path, patience: Duration) -> bool {
    match dial(path, patience) {
        Ok(_) => true,
        Err(error) => !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused),
    }
}

fn exchange(path: &Path, request: &ControlRequest, attached: Option<BorrowedFd<'_>>, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut stream = dial(path, left(deadline)?)?;
    stream.set_write_timeout(Some(left(deadline)?))?;
    let request = request.encode();
    let numbers: Vec<_> = attached.iter().map(AsRawFd::as_raw_fd).collect();
    let controls = [ControlMessage::ScmRights(&numbers)];
    let controls = if numbers.is_empty() { &controls[..0] } else { &controls[..] };
    let sent = sendmsg::<()>(stream.as_raw_fd(), &[io::IoSlice::new(&request)], controls, MsgFlags::MSG_NOSIGNAL, None)?;
    stream.write_all(&request[sent..])?;
    let mut length = [0; 4];
    read_exact(&mut stream, &mut length, deadline)?;
    let mut reply = vec![0; length_of(length, MAX_MESSAGE_BYTES).map_err(io::Error::other)?];
    read_exact(&mut stream, &mut reply, deadline)?;
    Ok(reply)
}

/// Connects. A listener whose queue is full is waited for, but not longer than `patience`.
fn dial(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let patience = patience.max(Duration::from_millis(1));
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::new(patience.as_secs() as i64, i64::from(patience.subsec_micros())))?;
    let address = UnixAddr::new(path.as_os_str().as_bytes())?;
    loop {
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => return Ok(UnixStream::from(fd)),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn read_exact(stream: &mut UnixStream, buffer: &mut [u8], deadline: Instant) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(&mut buffer[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The time until `deadline`, never zero, which would mean no limit.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left < Duration::from_micros(1) { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// Where a test's keeper listens; removed with it.
    struct Socket {
        path: PathBuf,
        _folder: scratch::Folder,
    }

    impl Socket {
        fn new(name: &str) -> Self {
            let folder = scratch::Folder::new(name);
            Self { path: folder.join("socket"), _folder: folder }
        }
    }

    impl std::ops::Deref for Socket {
        type Target = Path;

        fn deref(&self) -> &Path {
            &self.path
        }
    }

    /// For what is not to be answered.
    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(300)
    }

    /// For what is: a busy machine may take a while.
    fn late() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    /// A keeper that answers one connection with these bytes.
    fn answering(name: &str, bytes: Vec<u8>) -> Socket {
        let path = Socket::new(name);
        let listener = UnixListener::bind(&*path).expect("a socket can be bound");
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client connects");
            let mut head = [0; 5];
            let _ = stream.read_exact(&mut head);
            let _ = stream.write_all(&bytes);
        });
        path
    }

    #[test]
    fn a_reply_is_read_whole() {
        let snapshot = Snapshot { group: "g".into(), state: vec![("c1".into(), vec![7; 100_000])], ..Snapshot::default() };
        let path = answering("whole", ControlReply::Snapshot(Box::new(snapshot.clone())).encode());
        assert_eq!(describe(&path, late()).expect("a snapshot"), snapshot);
        let path = answering("other", ControlReply::Done.encode());
        assert!(matches!(describe(&path, late()), Err(Error::Unexpected { .. })));
    }

    #[test]
    fn a_dead_keeper_is_distinguished_from_a_silent_one() {
        let path = Socket::new("none");
        assert!(matches!(describe(&path, late()), Err(Error::NoKeeper { .. })));
        drop(UnixListener::bind(&*path).expect("a socket can be bound"));
        assert!(matches!(describe(&path, late()), Err(Error::NoKeeper { .. })));
        assert!(!is_listening(&path, Duration::from_millis(10)));

        let path = Socket::new("silent");
        let listener = UnixListener::bind(&*path).expect("a socket can be bound");
        assert!(matches!(describe(&path, soon()), Err(Error::Silent { .. })));
        assert!(is_listening(&path, Duration::from_millis(10)));
        drop(listener);
    }

    #[test]
    fn a_keeper_that_hangs_up_is_asked_again_and_is_not_dead() {
        let path = Socket::new("busy");
        let listener = UnixListener::bind(&*path).expect("a socket can be bound");
        let keeper = thread::spawn(move || {
            for _refused in 0..3 {
                drop(listener.accept().expect("a client connects"));
            }
            let (mut stream, _) = listener.accept().expect("a client connects again");
            let _ = stream.read_exact(&mut [0; 5]);
            let _ = stream.write_all(&ControlReply::Done.encode());
            // from here on it closes every connection, until it exits
            listener
        });
        assert_eq!(ask(&path, &ControlRequest::Describe, Instant::now() + Duration::from_secs(10)).expect("a reply"), ControlReply::Done);
        let listener = keeper.join().expect("no panic");
        thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                drop(stream);
            }
        });
        let error = describe(&path, soon()).expect_err("nothing is answered");
        assert!(matches!(error, Error::HungUp { .. } | Error::Silent { .. }), "{error}");
    }

    #[test]
    fn a_subscriber_with_a_full_queue_delays_no_other() {
        use nix::sys::socket::{Backlog, listen};
        let path = Socket::new("full");
        let listener = UnixListener::bind(&*path).expect("a socket can be bound");
        listen(&listener, Backlog::new(0).expect("0 is a backlog")).expect("a backlog can be changed");
        let mut held = Vec::new();
        let begun = Instant::now();
        while let Ok(stream) = dial(&path, Duration::from_millis(20)) {
            held.push(stream);
            assert!(held.len() < 10, "a backlog of 0 is full at once");
        }
        assert!(matches!(describe(&path, soon()), Err(Error::Silent { .. })));
        // a call that waits for room in the queue waits for ever
        assert!(begun.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn answers_that_are_none_are_refused() {
        let garbage: [(&str, Vec<u8>); 5] = [
            ("torn", vec![50, 0, 0, 0, 1, 2]),
            ("huge", vec![0xff, 0xff, 0xff, 0xff, 1]),
            ("empty", vec![0, 0, 0, 0]),
            ("kind", vec![1, 0, 0, 0, 99]),
            ("short", vec![2, 0, 0, 0, 1, 0]),
        ];
        for (name, bytes) in garbage {
            let path = answering(&format!("garbage-{name}"), bytes);
            assert!(describe(&path, soon()).is_err(), "{name}");
        }
    }
}
