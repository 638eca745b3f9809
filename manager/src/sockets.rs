//! The sockets that are listened on: made here, passed by a service manager, or handed over by the process before this one.

use std::fs::{self, DirBuilder};
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _, chown};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use crate::error::{Error, IoContext as _, Result};
use crate::settings::{MetricsAddress, Settings};
use crate::sys::descriptors;

/// All of them.
#[derive(Debug)]
pub(crate) struct Sockets {
    /// Of the gRPC API.
    pub(crate) clients: UnixListener,
    /// To which shims send their events.
    pub(crate) shims: UnixListener,
    /// For `x-manager upgrade`.
    pub(crate) control: UnixListener,
    /// Of metrics.
    pub(crate) metrics: Option<MetricsListener>,
}

/// Where metrics are served.
#[derive(Debug)]
pub(crate) enum MetricsListener {
    /// An address and port.
    Tcp(TcpListener),
    /// A unix socket.
    Unix(UnixListener),
}

/// Where the sockets come from that are there already.
#[derive(Debug)]
pub(crate) enum Inherited {
    /// A service manager: what it does not pass is made.
    Activated(Vec<OwnedFd>),
    /// The process before this one: what it does not pass is an error.
    HandedOver(Vec<OwnedFd>),
}

impl Inherited {
    /// What a service manager has passed, if it has: see `sd_listen_fds(3)`.
    pub(crate) fn from_service_manager() -> Result<Self> {
        let number = |name| std::env::var(name).ok().and_then(|value| value.parse::<i32>().ok());
        let is_for_us = number("LISTEN_PID") == Some(std::process::id().cast_signed());
        let count = number("LISTEN_FDS").filter(|_| is_for_us).unwrap_or(0).clamp(0, 16);
        let passed = descriptors::passed_by_service_manager(count).on("take the sockets of", Path::new("the service manager"))?;
        Ok(Self::Activated(passed))
    }

    /// The one that serves at `path`, if it was passed.
    fn take_unix(&mut self, path: &Path) -> Result<Option<UnixListener>> {
        // a socket that was renamed after it was bound knows its first name only
        let name_of =
            |descriptor: &OwnedFd| UnixListener::from(descriptor.try_clone().ok()?).local_addr().ok()?.as_pathname().map(Path::to_owned);
        self.take(path, |descriptor| name_of(descriptor).is_some_and(|name| name == path || name == hidden(path)))
            .map(|found| found.map(Into::into))
    }

    fn take_tcp(&mut self, address: std::net::SocketAddr) -> Result<Option<TcpListener>> {
        let address_of = |descriptor: &OwnedFd| TcpListener::from(descriptor.try_clone().ok()?).local_addr().ok();
        let shown = address.to_string();
        self.take(Path::new(&shown), |descriptor| address_of(descriptor) == Some(address)).map(|found| found.map(Into::into))
    }

    fn take(&mut self, shown: &Path, is_it: impl Fn(&OwnedFd) -> bool) -> Result<Option<OwnedFd>> {
        let (Self::Activated(passed) | Self::HandedOver(passed)) = self;
        match (passed.iter().position(is_it), self) {
            (Some(index), Self::Activated(passed) | Self::HandedOver(passed)) => Ok(Some(passed.swap_remove(index))),
            (None, Self::Activated(_)) => Ok(None),
            (None, Self::HandedOver(_)) => Err(Error::Precondition(format!(
                "the running x-manager does not serve at {}; to change where it serves, stop it and start it again",
                shown.display()
            ))),
        }
    }
}

impl Sockets {
    /// Takes what was passed and makes the rest.
    ///
    /// Errors: [`Error::Precondition`] for a place that is taken, and for sockets that were passed but are in no setting.
    pub(crate) fn open(settings: &Settings, mut inherited: Inherited) -> Result<Self> {
        let mut unix = |path: &Path, gid, mode| match inherited.take_unix(path)? {
            Some(listener) => Ok(listener),
            None => listen(path, gid, mode),
        };
        let clients = unix(&settings.address, settings.gid, SHARED)?;
        let shims = unix(&settings.ttrpc_address(), 0, SHARED)?;
        let control = unix(&settings.control_address(), 0, OWN)?;
        let metrics = match &settings.metrics {
            None => None,
            Some(MetricsAddress::Unix(path)) => Some(MetricsListener::Unix(unix(path, settings.gid, SHARED)?)),
            Some(MetricsAddress::Tcp(address)) => {
                let shown = format!("tcp://{address}");
                let listener = match inherited.take_tcp(*address)? {
                    Some(listener) => listener,
                    None => TcpListener::bind(address).on("listen at", Path::new(&shown))?,
                };
                Some(MetricsListener::Tcp(listener))
            }
        };
        let (Inherited::Activated(rest) | Inherited::HandedOver(rest)) = inherited;
        if !rest.is_empty() {
            let sentence = format!("{} sockets were passed to this process that the configuration does not name", rest.len());
            return Err(Error::Precondition(sentence));
        }
        let sockets = Self { clients, shims, control, metrics };
        for socket in sockets.all() {
            let flags = nix::fcntl::OFlag::O_NONBLOCK;
            nix::fcntl::fcntl(socket, nix::fcntl::FcntlArg::F_SETFL(flags)).on("set up a socket of", &settings.address)?;
        }
        Ok(sockets)
    }

    /// All sockets, as handed over to the next process.
    pub(crate) fn all(&self) -> Vec<BorrowedFd<'_>> {
        let metrics = self.metrics.as_ref().map(|listener| match listener {
            MetricsListener::Tcp(listener) => listener.as_fd(),
            MetricsListener::Unix(listener) => listener.as_fd(),
        });
        [self.clients.as_fd(), self.shims.as_fd(), self.control.as_fd()].into_iter().chain(metrics).collect()
    }
}

/// A second handle on a socket, for the executor.
pub(crate) fn accepting(listener: &UnixListener) -> Result<tokio::net::UnixListener> {
    listener.try_clone().and_then(tokio::net::UnixListener::from_std).on("serve at", Path::new("a socket"))
}

/// Listens at `path`, for root and the group; removes the leftover of a dead daemon.
///
/// Errors: [`Error::InUse`] when another process serves there, [`Error::Precondition`] when the path is not a socket.
fn listen(path: &Path, gid: u32, mode: u32) -> Result<UnixListener> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o711).create(folder).on("make folder", folder)?;
    match fs::symlink_metadata(path) {
        Ok(about) if !about.file_type().is_socket() => {
            return Err(Error::Precondition(format!("{} exists and is not a socket", path.display())));
        }
        Ok(_) if is_served(path)? => {
            return Err(Error::InUse { path: path.to_owned(), by: "process" });
        }
        Ok(_) => fs::remove_file(path).on("remove old socket", path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).on("look at", path),
    }
    // clients must not connect before mode and group are set: the socket is renamed into place after that
    let hidden = hidden(path);
    let _leftover_of_a_killed_start = fs::remove_file(&hidden);
    let listener = UnixListener::bind(&hidden).on("listen at", path)?;
    fs::set_permissions(&hidden, fs::Permissions::from_mode(mode)).on("set mode of", path)?;
    chown(&hidden, Some(0), Some(gid)).on("set group of", path)?;
    fs::rename(&hidden, path).on("name socket", path)?;
    Ok(listener)
}

/// Whether a process listens at a socket, even if it is too busy to accept.
fn is_served(path: &Path) -> Result<bool> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let client = socket(AddressFamily::Unix, SockType::Stream, flags, None).on("make a socket for", path)?;
    let address = UnixAddr::new(path).on("look at", path)?;
    match connect(client.as_raw_fd(), &address) {
        // EAGAIN: the backlog is full
        Ok(()) | Err(Errno::EAGAIN) => Ok(true),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(false),
        Err(error) => Err(error).on("connect to", path),
    }
}

fn hidden(path: &Path) -> std::path::PathBuf {
    let mut hidden = path.to_owned().into_os_string();
    hidden.push(".new");
    hidden.into()
}

/// The mode of a socket for root and a group.
const SHARED: u32 = 0o660;
/// The mode of a socket for root.
const OWN: u32 = 0o600;

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{Backlog, bind};

    use super::*;

    #[test]
    fn a_socket_is_for_root_and_a_group_and_is_never_taken_from_another_process() {
        let folder = scratch::Folder::new("taken");
        let path = folder.join("own/api.sock");
        if nix::unistd::geteuid().is_root() {
            let listener = listen(&path, 12345, SHARED).expect("a free place");
            assert_eq!(fs::metadata(&path).expect("a socket").permissions().mode() & 0o777, 0o660);
            assert!(matches!(listen(&path, 0, SHARED), Err(Error::InUse { .. })), "taken");
            drop(listener);
            drop(listen(&path, 0, SHARED).expect("leftovers are removed"));
        }
        let busy = folder.join("busy");
        let busy_listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
        bind(busy_listener.as_raw_fd(), &UnixAddr::new(&busy).expect("a short path")).expect("a free place");
        nix::sys::socket::listen(&busy_listener, Backlog::new(0).expect("a number")).expect("a socket");
        let _waits_to_be_accepted = UnixStream::connect(&busy).expect("room for one");
        assert!(matches!(listen(&busy, 0, SHARED), Err(Error::InUse { .. })), "it does not accept, but is there");
        let file = folder.join("file");
        fs::write(&file, "precious").expect("a file");
        assert!(matches!(listen(&file, 0, SHARED), Err(Error::Precondition(_))));
        assert_eq!(fs::read_to_string(&file).expect("a file"), "precious");
    }

    #[test]
    fn sockets_that_are_handed_over_are_found_by_where_they_serve() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let folder = scratch::Folder::new("handed");
        let metrics = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
        let settings = Settings {
            state: folder.to_owned(),
            address: folder.join("api.sock"),
            metrics: Some(MetricsAddress::Tcp(metrics)),
            ..Settings::default()
        };
        let first = Sockets::open(&settings, Inherited::Activated(Vec::new())).expect("free places");
        let hand = |sockets: &Sockets| {
            let mut all: Vec<_> = sockets.all().iter().map(|socket| socket.try_clone_to_owned().expect("a copy")).collect();
            all.reverse();
            all
        };
        let second = Sockets::open(&settings, Inherited::HandedOver(hand(&first))).expect("all of them");
        assert_eq!(second.clients.local_addr().expect("a name").as_pathname(), Some(hidden(&settings.address).as_path()));
        assert!(Sockets::open(&settings, Inherited::Activated(hand(&first))).is_ok(), "in the way of a service manager");
        let elsewhere = Settings { address: folder.join("other.sock"), ..settings.clone() };
        let error = Sockets::open(&elsewhere, Inherited::HandedOver(hand(&first))).expect_err("not there").to_string();
        assert!(error.contains("does not serve at") && error.contains("other.sock"), "{error}");
        let fewer = Settings { metrics: None, ..settings };
        assert!(Sockets::open(&fewer, Inherited::HandedOver(hand(&first))).is_err(), "one too many");
    }
}
