//! The terminal of a process.
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::statfs::{DEVPTS_SUPER_MAGIC, fstatfs};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::root::{self, Root};
use super::{Doing, Failure, Step};
use crate::plan::Terminal;
use crate::sys::{self, Tree};

/// Opens a terminal of the container, sends it through `console`, and makes its other side the streams and the controlling terminal of this process.
///
/// `on_console`: it is bound on `/dev/console` too.
pub(super) fn open(root: &Root, terminal: &Terminal, console: &OwnedFd, on_console: bool) -> Result<(), Failure> {
    let open = || -> io::Result<(OwnedFd, OwnedFd)> {
        let master = root.open("/dev/pts/ptmx", OFlag::O_RDWR | OFlag::O_NOCTTY)?;
        // The image could have something else there.
        let is_real = root::is_device(&fstat(&master)?, SFlag::S_IFCHR, 5, 2) && fstatfs(&master)?.filesystem_type() == DEVPTS_SUPER_MAGIC;
        if !is_real {
            return Err(Errno::ENODEV.into());
        }
        let peer = sys::open_peer(master.as_fd(), terminal.size)?;
        Ok((master, peer))
    };
    let (master, peer) = open().doing(Step::Terminal, || "open a terminal".to_owned())?;
    if on_console {
        bind(root, &peer).doing(Step::Terminal, || "mount the terminal on /dev/console".to_owned())?;
    }
    send(&master, console).doing(Step::Terminal, || "send the terminal".to_owned())?;
    let adopt = || -> io::Result<()> {
        dup2_stdin(&peer)?;
        dup2_stdout(&peer)?;
        dup2_stderr(&peer)?;
        sys::control(peer.as_fd())
    };
    adopt().doing(Step::Terminal, || "make the terminal the controlling one".to_owned())
}

fn bind(root: &Root, peer: &OwnedFd) -> io::Result<()> {
    let place = root.place("/dev/console")?;
    let flags = OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    match nix::fcntl::openat(&place.folder, &place.name, flags | OFlag::O_EXCL, nix::sys::stat::Mode::from_bits_truncate(0o666)) {
        Ok(_) | Err(Errno::EEXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let target = root::in_folder(place.folder.as_fd(), &place.name, OFlag::O_PATH)?;
    let mount = sys::open_tree(peer.as_fd(), Path::new(""), Tree::Top)?;
    sys::move_mount(mount.as_fd(), target.as_fd())
}

/// Sends a terminal to the keeper.
pub(super) fn send(master: &OwnedFd, console: &OwnedFd) -> io::Result<()> {
    let descriptors = [master.as_raw_fd()];
    let message = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(console.as_raw_fd(), &[IoSlice::new(b"/dev/ptmx")], &message, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}
