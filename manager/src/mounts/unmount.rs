//! Unmounting a mount point with everything that is mounted below it, as in a recursive bind mount of a tree with mounts.
//!
//! ```text
//! the tree is made private ─▶ mounts below, until none is left ─▶ the mount itself ─▶ what it was mounted over, if anything
//! ```
//! **Invariant:** nothing below a mount point is unmounted before it is private: what is shared with the host's mounts would be unmounted there, too.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::{Error, IoContext as _, Result};

/// Unmounts everything at a mount point.
///
/// Errors: [`Error::Precondition`] while something is in use; what is not stays unmounted.
pub(super) fn blocking_unmount(point: &Path) -> Result<()> {
    loop {
        match umount2(point, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            // a file, or a mount below
            Err(Errno::EBUSY) if blocking_unmount_below(point)? => {}
            Err(Errno::EBUSY) => return Err(in_use(point)),
            Err(error) => return Err(io::Error::from(error)).on("unmount", point),
        }
    }
}

/// Unmounts what is mounted below the uppermost mount at a point. Returns whether there was anything.
fn blocking_unmount_below(point: &Path) -> Result<bool> {
    let none: Option<&str> = None;
    mount(none, point, none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).on("make private", point)?;
    for round in 0.. {
        let below = blocking_below(point)?;
        if below.is_empty() {
            return Ok(round > 0);
        }
        let mut is_any = false;
        for mounted in &below {
            if mounted.is_shared {
                return Err(Error::Precondition(format!("{} is shared with other mounts", mounted.point.display())));
            }
            match umount2(&mounted.point, MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => is_any = true,
                // in use, or under another one, which goes first
                Err(Errno::EBUSY | Errno::EINVAL | Errno::ENOENT) => {}
                Err(error) => return Err(io::Error::from(error)).on("unmount", &mounted.point),
            }
        }
        if !is_any {
            return Err(in_use(&below[0].point));
        }
    }
    Ok(true)
}

fn in_use(point: &Path) -> Error {
    Error::Precondition(format!("{} is in use", point.display()))
}

/// A line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mounted {
    id: u64,
    parent: u64,
    point: PathBuf,
    is_shared: bool,
}

/// What is mounted below the uppermost mount at a point, the last ones first.
fn blocking_below(point: &Path) -> Result<Vec<Mounted>> {
    let path = Path::new("/proc/thread-self/mountinfo");
    let text = fs::read(path).on("read", path)?;
    // the mount itself is not looked at: it may not answer
    let parent = point.parent().unwrap_or(point);
    let point = fs::canonicalize(parent).on("look at", parent)?.join(point.file_name().unwrap_or_default());
    let all: Vec<_> = text.split(|byte| *byte == b'\n').filter_map(Mounted::parse).collect();
    Ok(below(&all, &point))
}

fn below(all: &[Mounted], point: &Path) -> Vec<Mounted> {
    let at: Vec<_> = all.iter().filter(|mounted| mounted.point == point).collect();
    // the one that no other of them is mounted on
    let is_covered = |one: &Mounted| at.iter().any(|other| other.parent == one.id);
    let Some(top) = at.iter().find(|mounted| !is_covered(mounted)) else { return Vec::new() };
    let (mut inside, mut found) = (HashSet::from([top.id]), Vec::new());
    // a line may come before that of its parent
    loop {
        let more: Vec<_> = all.iter().filter(|mounted| inside.contains(&mounted.parent) && !inside.contains(&mounted.id)).collect();
        if more.is_empty() {
            found.reverse();
            return found;
        }
        inside.extend(more.iter().map(|mounted| mounted.id));
        found.extend(more.into_iter().cloned());
    }
}

impl Mounted {
    /// `ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [shared:N master:N …] - TYPE SOURCE OPTIONS`
    fn parse(line: &[u8]) -> Option<Self> {
        let mut words = line.split(|byte| *byte == b' ');
        let mut number = || std::str::from_utf8(words.next()?).ok()?.parse().ok();
        let (id, parent) = (number()?, number()?);
        let point = PathBuf::from(OsString::from_vec(unescaped(words.nth(2)?)));
        let is_shared = words.skip(1).take_while(|word| *word != b"-").any(|word| word.starts_with(b"shared:"));
        Some(Self { id, parent, point, is_shared })
    }
}

/// Bytes that the kernel writes as `\ooo`.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text);
    while let [first, after @ ..] = rest {
        let octal = |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok();
        match after.get(..3).and_then(octal).filter(|_| *first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_below_the_uppermost_mount_is_found_whatever_the_order_of_the_lines() {
        let lines = [
            "20 1 0:1 / / rw shared:1 - ext4 /dev/x rw",
            "30 20 0:2 / /m/0 rw,relatime - tmpfs tmpfs rw",
            // over the first one, with a mount in it before its own line
            "33 31 0:5 / /m/0/a\\040b rw master:7 shared:9 - proc proc rw",
            "31 30 0:3 / /m/0 rw - tmpfs tmpfs rw",
            "32 31 0:4 / /m/0/c rw - tmpfs tmpfs rw",
            "34 33 0:6 / /m/0/a\\040b/d rw - tmpfs tmpfs rw",
            "35 30 0:7 / /m/0/hidden rw - tmpfs tmpfs rw",
            "36 20 0:8 / /m/01 rw - tmpfs tmpfs rw",
            "",
            "x",
        ];
        let all: Vec<_> = lines.iter().filter_map(|line| Mounted::parse(line.as_bytes())).collect();
        assert_eq!(all.len(), 8);
        let found = below(&all, Path::new("/m/0"));
        let ids: Vec<_> = found.iter().map(|mounted| mounted.id).collect();
        assert_eq!(ids, [34, 32, 33]);
        assert_eq!((found[2].point.as_path(), found[2].is_shared, found[1].is_shared), (Path::new("/m/0/a b"), true, false));
        assert!(below(&all, Path::new("/n")).is_empty());
    }
}
