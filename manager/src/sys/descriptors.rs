//! Descriptors that come from another process.
#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// The most that one message carries.
pub(crate) const MOST: usize = 8;

/// Takes the descriptors 3, 4, … with which a service manager has started this process, and marks them close-on-exec. To be called
/// once, before anything else is opened.
///
/// Errors: EBADF if fewer were passed.
pub(crate) fn passed_by_service_manager(count: RawFd) -> io::Result<Vec<OwnedFd>> {
    let take = |number| {
        // SAFETY: the number is open or fcntl returns EBADF; nothing of this process is above 2 yet, as the caller promises.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        // SAFETY: it was just found to be open, was passed for this purpose, and is taken once, as the caller promises.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    };
    (3..3 + count).map(take).collect()
}

/// Sends a message with descriptors over a unix socket.
pub(crate) fn send(socket: BorrowedFd<'_>, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let numbers: Vec<RawFd> = descriptors.iter().map(|descriptor| descriptor.as_raw_fd()).collect();
    let sent =
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(message)], &[ControlMessage::ScmRights(&numbers)], MsgFlags::MSG_NOSIGNAL, None)?;
    if sent == message.len() { Ok(()) } else { Err(Errno::EMSGSIZE.into()) }
}

/// Receives up to `bytes.len()` bytes and the descriptors that come with them.
pub(crate) fn receive(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; MOST]);
    let mut parts = [IoSliceMut::new(bytes)];
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            // SAFETY: the kernel has just made these numbers for this process; nothing else uses them.
            descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    Ok((received.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_descriptor_arrives_with_its_message_and_works() {
        let (one, other) = UnixStream::pair().expect("a pair");
        let (mut left, right) = UnixStream::pair().expect("a pair");
        send(one.as_fd(), b"here", &[right.as_fd()]).expect("sent");
        drop(right);
        let mut bytes = [0; 16];
        let (count, mut descriptors) = receive(other.as_fd(), &mut bytes).expect("received");
        assert_eq!((&bytes[..count], descriptors.len()), (&b"here"[..], 1));
        let mut arrived = UnixStream::from(descriptors.remove(0));
        arrived.write_all(b"x").expect("it is connected");
        drop(arrived);
        let mut received = String::new();
        left.read_to_string(&mut received).expect("its end is seen");
        assert_eq!(received, "x");
    }
}
