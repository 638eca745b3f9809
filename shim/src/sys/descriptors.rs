//! Descriptors: received over a socket, counted, reopened, closed in bulk.
#![allow(unsafe_code)]
use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Runs `work` with the highest limit on descriptors. Children inherit limits: none may be started in it.
pub(crate) fn with_raised_limit<T>(work: impl FnOnce() -> T) -> T {
    let limits = getrlimit(Resource::RLIMIT_NOFILE).ok().filter(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, *hard, *hard).is_ok());
    let result = work();
    if let Some((soft, hard)) = limits {
        // lowering it is always allowed
        let _ = setrlimit(Resource::RLIMIT_NOFILE, soft, hard);
    }
    result
}

/// The most descriptors that the kernel attaches to one message: SCM_MAX_FD.
const MAX_ATTACHED: usize = 253;

/// Reads from a socket, with the descriptor that may be attached. Returns the number of bytes (0 at the end) and the first descriptor;
/// further ones are closed.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    // Room for all that a message can carry: excess descriptors would be lost, and those that fit would leak with the error.
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; MAX_ATTACHED]);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT)?;
    let mut first = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            for number in numbers {
                // SAFETY: the kernel has just installed this descriptor for this message and nothing else owns its number.
                let fd = unsafe { OwnedFd::from_raw_fd(number) };
                first.get_or_insert(fd);
            }
        }
    }
    Ok((message.bytes, first))
}

/// Bytes that wait in a pipe or fifo, from either end.
pub(crate) fn waiting_bytes(pipe: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int to the pointer, which is valid for the call.
    let result = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    nix::errno::Errno::result(result)?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Opens what `fd` refers to once more, with another access mode: a fifo's other end.
pub(crate) fn reopen(fd: BorrowedFd<'_>, flags: i32, read: bool, write: bool) -> io::Result<OwnedFd> {
    OpenOptions::new()
        .read(read)
        .write(write)
        .custom_flags(flags | libc::O_CLOEXEC)
        .open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .map(File::into)
}

/// Copies a descriptor, close-on-exec.
pub(crate) fn duplicate(fd: impl AsFd) -> io::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::fd::RawFd;
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    #[test]
    fn of_many_attached_descriptors_one_is_kept_and_none_is_left() {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let (mut pipes, mut numbers): (Vec<_>, Vec<RawFd>) = (Vec::new(), Vec::new());
        for _ in 0..MAX_ATTACHED {
            let (read, write) = std::io::pipe().expect("a pipe");
            numbers.push(write.as_raw_fd());
            pipes.push((read, Some(write)));
        }
        let attached = [ControlMessage::ScmRights(&numbers)];
        sendmsg::<()>(theirs.as_raw_fd(), &[IoSlice::new(b"x")], &attached, MsgFlags::empty(), None).expect("is sent");
        let (count, kept) = receive(ours.as_fd(), &mut [0; 8]).expect("is received");
        assert_eq!((count, kept.is_some()), (1, true));
        drop(kept);
        for (mut read, write) in pipes {
            drop(write);
            let mut rest = Vec::new();
            // Ends only when every copy of the other end is closed.
            io::Read::read_to_end(&mut read, &mut rest).expect("ends");
        }
    }
}
