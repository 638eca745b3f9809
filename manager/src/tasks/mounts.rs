//! What is mounted below a folder, and getting rid of it before the folder is removed: what is in a mount does not belong to the task.
//!
//! Source: proc_pid_mountinfo(5).

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

use crate::error::{Error, IoContext as _, Result};

/// Removes a folder and everything in it, after everything that is mounted there. That there is none is fine.
///
/// Errors: nothing is removed while something is mounted below, or when that cannot be determined.
pub(super) fn remove_tree(folder: &Path) -> Result<()> {
    // the kernel's list knows no links; one in the folder's own place is removed as such
    let (Some(parent), Some(name)) = (folder.parent(), folder.file_name()) else { return Ok(()) };
    let folder = match parent.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.on("find", parent)?.join(name),
    };
    unmount_below(&folder)?;
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.on("remove", &folder),
    }
}

fn unmount_below(folder: &Path) -> Result<()> {
    for _round in 0..ROUNDS {
        let mounts = mounts_below(folder)?;
        if mounts.is_empty() {
            return Ok(());
        }
        // what was mounted last first; one that fails is still there in the next round
        for mount in mounts.iter().rev() {
            let _ = umount2(mount, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
    }
    Err(Error::Precondition(format!("{} is not removed: something is mounted below that cannot be unmounted", folder.display())))
}

fn mounts_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read(TABLE).on("read", Path::new(TABLE))?;
    let points = table.split(|byte| *byte == b'\n').filter_map(|line| line.split(|byte| *byte == b' ').nth(4)).map(unescaped);
    Ok(points.filter(|point| point.starts_with(folder)).collect())
}

/// A path of the table, where blanks and the like are octal.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut parts = field.split(|byte| *byte == b'\\');
    let mut bytes = parts.next().unwrap_or_default().to_vec();
    for part in parts {
        let digits = part.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(code) => {
                bytes.push(code);
                bytes.extend_from_slice(&part[3..]);
            }
            None => bytes.extend_from_slice(part),
        }
    }
    OsString::from_vec(bytes).into()
}

/// Of the thread: its mount namespace may be one of its own.
const TABLE: &str = "/proc/thread-self/mountinfo";
/// A mount hides those below it from the first rounds.
const ROUNDS: usize = 8;

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::symlink;

    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// Runs `test` in a mount namespace of its own, with a folder on a file system that goes with it.
    fn among_own_mounts(test: impl FnOnce(&Path) + Send + 'static) {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return;
        }
        let thread = std::thread::spawn(move || {
            let none: Option<&str> = None;
            unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).expect("a mount namespace");
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
            let folder = std::env::temp_dir().canonicalize().expect("a temporary folder");
            mount(Some("tmpfs"), &folder, Some("tmpfs"), MsFlags::empty(), none).expect("a tmpfs");
            test(&folder);
        });
        thread.join().expect("the test holds");
    }

    fn bind(from: &Path, to: &Path) {
        let none: Option<&str> = None;
        mount(Some(from), to, none, MsFlags::MS_BIND | MsFlags::MS_REC, none).expect("a bind mount");
    }

    #[test]
    fn what_is_mounted_in_a_removed_folder_keeps_its_files() {
        among_own_mounts(|folder| {
            let (host, state) = (folder.join("host"), folder.join("state"));
            let rootfs = state.join("c 1/rootfs");
            for made in [&host, &rootfs] {
                fs::create_dir_all(made).expect("a folder");
            }
            fs::write(host.join("precious"), "data").expect("a file");
            symlink(&state, folder.join("link")).expect("a link");
            // another program's mount point that is not UTF-8
            let odd = folder.join(OsStr::from_bytes(b"odd\xff"));
            fs::create_dir(&odd).expect("a folder");
            bind(&host, &odd);
            bind(&host, &rootfs);
            bind(&host, &rootfs);
            remove_tree(&folder.join("link/c 1")).expect("removed");
            remove_tree(&folder.join("link/c 1")).expect("and again");
            assert!(!state.join("c 1").exists());
            assert_eq!(fs::read_to_string(host.join("precious")).expect("it is still there"), "data");
            assert!(odd.join("precious").exists(), "other mounts stay");
        });
    }

    #[test]
    fn blanks_in_mount_points_are_understood() {
        assert_eq!(unescaped(br"/a\040b\011c"), Path::new("/a b\tc"));
        assert_eq!(unescaped(br"/a\b"), Path::new("/ab"));
    }
}
