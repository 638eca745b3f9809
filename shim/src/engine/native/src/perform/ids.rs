//! The ids of user namespaces, as the performer sees them.
use std::io;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::{Uid, fchown};

use super::{Doing, Failure, Step, root};
use crate::plan::{IdRange, Mappings};
use crate::sys::{self, Forked};

/// Writes the mappings of the new user namespace of a process.
pub(super) fn write(pid: u32, mappings: &Mappings) -> io::Result<()> {
    for (file, ranges) in [("uid_map", &mappings.uids), ("gid_map", &mappings.gids)] {
        let text: String = ranges.iter().map(|range| format!("{} {} {}\n", range.inside, range.outside, range.count)).collect();
        std::fs::write(format!("/proc/{pid}/{file}"), text)?;
    }
    Ok(())
}

/// Reads the mappings of a process's user namespace.
pub(super) fn read(pid: u32) -> io::Result<Mappings> {
    let ranges = |file: &str| -> io::Result<Vec<IdRange>> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/{file}"))?;
        let mut ranges: Vec<IdRange> = text.lines().filter_map(parse).collect();
        ranges.sort_unstable();
        Ok(ranges)
    };
    Ok(Mappings { uids: ranges("uid_map")?, gids: ranges("gid_map")? })
}

fn parse(line: &str) -> Option<IdRange> {
    let mut numbers = line.split_whitespace().map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some(IdRange { inside: next()?, outside: next()?, count: next()? })
}

/// A user namespace that has these mappings, and no process.
pub(super) fn namespace(mappings: &Mappings) -> io::Result<OwnedFd> {
    let (ours, theirs) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    match sys::fork_into(libc::CLONE_NEWUSER as u64)? {
        Forked::Child => {
            drop(theirs);
            // Until the other end is closed.
            let _ = nix::unistd::read(&ours, &mut [0; 1]);
            sys::exit_now(0)
        }
        Forked::Parent { pid } => {
            let opened = write(pid, mappings).and_then(|()| of(pid));
            drop(theirs);
            nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid as i32), None)?;
            opened
        }
    }
}

/// The user namespace of a process.
pub(super) fn of(pid: u32) -> io::Result<OwnedFd> {
    Ok(nix::fcntl::open(format!("/proc/{pid}/ns/user").as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// Makes the streams of this process belong to a user of a process's user namespace, which itself cannot take what is the host's.
///
/// The null device, the group and what cannot be changed stay.
pub(super) fn give_streams(pid: u32, uid: u32) -> Result<(), Failure> {
    let mappings = read(pid).doing(Step::Namespaces, || "read the mappings of the user namespace".to_owned())?;
    let Some(uid) = IdRange::outside(&mappings.uids, uid) else { return Ok(()) };
    own_streams(uid)
}

/// Makes the streams a user's: a program may open them again by `/dev/stdout`. The null device, the group and what cannot be changed stay.
pub(super) fn own_streams(uid: u32) -> Result<(), Failure> {
    for stream in sys::streams() {
        let about = nix::sys::stat::fstat(stream).doing(Step::Identity, || "examine a stream".to_owned())?;
        if about.st_uid == uid || root::is_null(stream) {
            continue;
        }
        match fchown(stream, Some(Uid::from_raw(uid)), None) {
            Ok(()) | Err(Errno::EPERM | Errno::EROFS | Errno::EINVAL | Errno::EOVERFLOW) => {}
            Err(error) => return Err(error).doing(Step::Identity, || "set the owner of a stream".to_owned()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_a_map_is_three_numbers() {
        assert_eq!(parse("         0     100000      65536"), Some(IdRange { inside: 0, outside: 100_000, count: 65_536 }));
        assert_eq!(parse("0 1"), None);
        assert_eq!(parse(""), None);
    }
}
