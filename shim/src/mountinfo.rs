//! The mounts of this thread's mount namespace.
//!
//! Source: proc_pid_mountinfo(5).
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountEntry {
    /// The mounted part of the file system.
    pub(crate) root: PathBuf,
    /// The mount point.
    pub(crate) mount_point: PathBuf,
    /// The file system's type.
    pub(crate) kind: String,
    /// The file system's own options.
    pub(crate) options: String,
}

/// Lists the mounts that `wanted` picks by their mount point, in the kernel's order: of those at one place, the last is on top.
///
/// Only one line is in memory: a busy host has many thousands.
pub(crate) fn blocking_list(mut wanted: impl FnMut(&MountEntry) -> bool) -> io::Result<Vec<MountEntry>> {
    let mut reader = BufReader::with_capacity(4096, File::open(PATH)?);
    let (mut line, mut found) = (Vec::new(), Vec::new());
    while reader.read_until(b'\n', &mut line)? > 0 {
        found.extend(parse(&line).filter(&mut wanted));
        line.clear();
    }
    Ok(found)
}

/// `36 35 98:0 /root /mount/point rw,noatime shared:1 … - type source options`
fn parse(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.trim_ascii_end().split(|byte| *byte == b' ');
    let root = unescape(fields.nth(3)?);
    let mount_point = unescape(fields.next()?);
    fields.find(|field| *field == b"-")?;
    let kind = String::from_utf8_lossy(fields.next()?).into_owned();
    let options = String::from_utf8_lossy(fields.nth(1)?).into_owned();
    Some(MountEntry { root, mount_point, kind, options })
}

/// Decodes `\040` and other octal escapes.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).filter(|digits| *first == b'\\' && digits.iter().all(|digit| matches!(digit, b'0'..=b'7')));
        match octal {
            Some(digits) => {
                bytes.push(digits.iter().fold(0u8, |value, digit| value.wrapping_mul(8).wrapping_add(digit - b'0')));
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

/// Of the thread: it may have a mount namespace of its own.
pub(crate) const PATH: &str = "/proc/thread-self/mountinfo";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_taken_apart() {
        let entry = |root: &str, mount_point: &str, kind: &str, options: &str| {
            Some(MountEntry { root: root.into(), mount_point: mount_point.into(), kind: kind.into(), options: options.into() })
        };
        for (line, expected) in [
            ("36 35 98:0 /r /m\\040n\\134 rw shared:1 master:2 - ext4 /dev/sda rw,x=y\n", entry("/r", "/m n\\", "ext4", "rw,x=y")),
            ("1 2 0:1 / / rw - overlay overlay rw,lowerdir=/a:/b", entry("/", "/", "overlay", "rw,lowerdir=/a:/b")),
            ("1 2 0:1 / /a\\04 rw - t s o", entry("/", "/a\\04", "t", "o")),
            ("1 2 0:1 / /a rw", None),
            ("", None),
        ] {
            assert_eq!(parse(line.as_bytes()), expected, "{line}");
        }
    }

    #[test]
    fn the_kernels_list_is_read() {
        let proc = blocking_list(|entry| entry.mount_point.as_os_str() == "/proc").expect("a list");
        assert!(proc.iter().any(|entry| entry.kind == "proc"));
    }
}
