//! Moves network devices of the host into the container.
//!
//! Owns the messages to the kernel (rtnetlink). A device keeps its addresses that do not depend on the network where it was: permanent ones of global scope.
//!
//! **Invariant:** this process is in the host's network namespace before and after; only sockets are made in the container's.
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use nix::sys::stat::{Mode, fstat};

use super::{Doing, Failure, Step};
use crate::sys;

/// Moves devices, each with its name in the container, into the network namespace of process `pid`, and sets them up.
pub(super) fn move_devices(devices: &[(String, String)], pid: u32) -> Result<(), Failure> {
    if devices.is_empty() {
        return Ok(());
    }
    let doing = || "open the network namespace of the container".to_owned();
    let open = |path: &str| nix::fcntl::open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
    let own = open("/proc/self/ns/net").doing(Step::Namespaces, doing)?;
    let theirs = open(&format!("/proc/{pid}/ns/net")).doing(Step::Namespaces, doing)?;
    let identity = |fd: &OwnedFd| fstat(fd).map(|about| (about.st_dev, about.st_ino)).doing(Step::Namespaces, doing);
    if identity(&own)? == identity(&theirs)? {
        let what = "linux.netDevices: the network namespace is the runtime's".to_owned();
        return Err(Failure { step: Step::Namespaces, what, errno: 0 });
    }
    for (host, container) in devices {
        move_device(host, container, pid, &own, &theirs)
            .doing(Step::Namespaces, || format!("move network device {host} (linux.netDevices) into the container as {container}"))?;
    }
    Ok(())
}

/// Sets the loopback interface of the network namespace of process `pid` up.
pub(super) fn loopback_up(pid: u32) -> Result<(), Failure> {
    let up = || -> io::Result<()> {
        let open = |path: &str| nix::fcntl::open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
        inside(&open("/proc/self/ns/net")?, &open(&format!("/proc/{pid}/ns/net"))?, sys::loopback_up)
    };
    up().doing(Step::Namespaces, || "set the loopback interface up".to_owned())
}

fn move_device(host: &str, container: &str, pid: u32, own: &OwnedFd, theirs: &OwnedFd) -> io::Result<()> {
    let here = Netlink::open()?;
    let index = if_nametoindex(host)?;
    let addresses = here.addresses(index)?;
    // The kernel would find out after it has moved the device, and some devices end with a failed container.
    let (there, is_taken) = inside(own, theirs, || Ok((Netlink::open()?, if_nametoindex(container).is_ok())))?;
    if is_taken {
        return Err(Errno::EEXIST.into());
    }
    // One request moves and renames it.
    let attributes =
        [attribute(libc::IFLA_NET_NS_PID, &pid.to_ne_bytes()), attribute(libc::IFLA_IFNAME, &[container.as_bytes(), &[0]].concat())];
    here.ask(libc::RTM_NEWLINK, 0, &[&link(index, 0, 0)[..], &attributes.concat()].concat())?;
    let index = inside(own, theirs, || Ok(if_nametoindex(container)?))?;
    for address in &addresses {
        there.ask(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &address.message(index))?;
    }
    let up = libc::IFF_UP as u32;
    there.ask(libc::RTM_NEWLINK, 0, &link(index, up, up))
}

/// Does something in the container's network namespace, and returns from it.
fn inside<T>(own: &OwnedFd, theirs: &OwnedFd, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    setns(theirs, CloneFlags::CLONE_NEWNET)?;
    let done = act();
    setns(own, CloneFlags::CLONE_NEWNET)?;
    done
}

/// An address of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Address {
    family: u8,
    prefix: u8,
    /// Attributes as the kernel takes them: the address, its peer, its broadcast.
    attributes: Vec<u8>,
}

impl Address {
    /// Of a message about an address: `None` if it is not to be moved, or not of the device.
    fn parse(message: &[u8], device: u32) -> Option<Self> {
        let ([family, prefix, flags, scope], rest) = message.split_first_chunk()?;
        let (index, mut rest) = rest.split_first_chunk()?;
        let mut flags = u32::from(*flags);
        let mut kept = Vec::new();
        while let Some((kind, value, next)) = split_attribute(rest) {
            match (kind, <[u8; 4]>::try_from(value)) {
                // The whole of the flags.
                (libc::IFA_FLAGS, Ok(all)) => flags = u32::from_ne_bytes(all),
                (libc::IFA_ADDRESS | libc::IFA_LOCAL | libc::IFA_BROADCAST, _) => kept.extend(attribute(kind, value)),
                _ => {}
            }
            rest = next;
        }
        let is_kept = u32::from_ne_bytes(*index) == device && *scope == libc::RT_SCOPE_UNIVERSE && flags & libc::IFA_F_PERMANENT != 0;
        is_kept.then_some(Self { family: *family, prefix: *prefix, attributes: kept })
    }

    fn message(&self, device: u32) -> Vec<u8> {
        let head = [self.family, self.prefix, 0, libc::RT_SCOPE_UNIVERSE];
        [&head[..], &device.to_ne_bytes(), &self.attributes].concat()
    }
}

/// A socket to the kernel's network configuration, of the network namespace in which it was made.
struct Netlink(OwnedFd);

impl Netlink {
    fn open() -> io::Result<Self> {
        Ok(Self(socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?))
    }

    /// Makes a request, and waits until it is done.
    fn ask(&self, kind: u16, flags: i32, payload: &[u8]) -> io::Result<()> {
        self.send(kind, libc::NLM_F_ACK | flags, payload)?;
        self.receive(|_, _| {})
    }

    /// The addresses of a device that are to be kept.
    fn addresses(&self, device: u32) -> io::Result<Vec<Address>> {
        let any = [0_u8; 8];
        self.send(libc::RTM_GETADDR, libc::NLM_F_DUMP, &any)?;
        let mut found = Vec::new();
        self.receive(|kind, message| {
            if kind == libc::RTM_NEWADDR {
                found.extend(Address::parse(message, device));
            }
        })?;
        Ok(found)
    }

    fn send(&self, kind: u16, flags: i32, payload: &[u8]) -> io::Result<()> {
        let length = (HEADER_BYTES + payload.len()) as u32;
        let flags = (libc::NLM_F_REQUEST | flags) as u16;
        let message = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8], payload].concat();
        let sent = send(self.0.as_raw_fd(), &message, MsgFlags::empty())?;
        if sent == message.len() { Ok(()) } else { Err(Errno::EIO.into()) }
    }

    /// Gives every message to `see`, to the last or an error.
    fn receive(&self, mut see: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let length = match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                length => length?,
            };
            let mut rest = &buffer[..length];
            while let Some((kind, payload, next)) = split_message(rest) {
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR => {
                        let code = payload.first_chunk().map_or(-libc::EIO, |code| i32::from_ne_bytes(*code));
                        return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                    }
                    _ => see(kind, payload),
                }
                rest = next;
            }
        }
    }
}

/// `struct ifinfomsg`: flags of a device to change.
fn link(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut message = [0; 16];
    message[4..8].copy_from_slice(&index.to_ne_bytes());
    message[8..12].copy_from_slice(&flags.to_ne_bytes());
    message[12..].copy_from_slice(&change.to_ne_bytes());
    message
}

/// `struct rtattr`, with what fills it up.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = (4 + value.len()) as u16;
    let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
    bytes.resize(aligned(bytes.len()), 0);
    bytes
}

/// Type, value, rest.
fn split_attribute(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let (head, _) = bytes.split_first_chunk::<4>()?;
    let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
    Some((u16::from_ne_bytes([head[2], head[3]]), bytes.get(4..length)?, bytes.get(aligned(length)..).unwrap_or_default()))
}

/// Type, payload, rest.
fn split_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let (length, _) = bytes.split_first_chunk()?;
    let length = u32::from_ne_bytes(*length) as usize;
    let kind = u16::from_ne_bytes([*bytes.get(4)?, *bytes.get(5)?]);
    Some((kind, bytes.get(HEADER_BYTES..length)?, bytes.get(aligned(length)..).unwrap_or_default()))
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;

/// What the kernel sends at once at most.
const BUFFER_BYTES: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_split_as_they_were_joined() {
        let both = [attribute(1, b"abcde"), attribute(2, b"")].concat();
        assert_eq!(both.len(), 16);
        let (kind, value, rest) = split_attribute(&both).expect("an attribute");
        assert_eq!((kind, value), (1, &b"abcde"[..]));
        assert_eq!(split_attribute(rest), Some((2, &b""[..], &b""[..])));
        for end in 0..9 {
            assert_eq!(split_attribute(&both[..end]), None);
        }
        // Lengths that lie.
        assert_eq!(split_attribute(&[3, 0, 1, 0]), None);
        assert_eq!(split_message(&[255; 16]), None);
        assert_eq!(split_message(&[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None);
    }

    #[test]
    fn only_permanent_global_addresses_of_the_device_are_kept() {
        let message = |device: u32, scope: u8, flags: u8| {
            let head = [libc::AF_INET as u8, 24, flags, scope];
            [&head[..], &device.to_ne_bytes(), &attribute(libc::IFA_LOCAL, &[10, 0, 0, 1]), &attribute(libc::IFA_LABEL, b"eth0\0")].concat()
        };
        let permanent = libc::IFA_F_PERMANENT as u8;
        let kept = Address::parse(&message(7, 0, permanent), 7).expect("kept");
        assert_eq!(kept, Address { family: libc::AF_INET as u8, prefix: 24, attributes: attribute(libc::IFA_LOCAL, &[10, 0, 0, 1]) });
        assert_eq!(&kept.message(9)[..8], &[libc::AF_INET as u8, 24, 0, 0, 9, 0, 0, 0]);
        assert_eq!(Address::parse(&message(8, 0, permanent), 7), None);
        assert_eq!(Address::parse(&message(7, libc::RT_SCOPE_LINK, permanent), 7), None);
        assert_eq!(Address::parse(&message(7, 0, 0), 7), None);
        assert_eq!(Address::parse(&[1, 2, 3], 7), None);
    }
}
