//! Bounds on what is written to a snapshot: quotas of projects, where the file system enforces them.
//!
//! ```text
//! Prepare with label containerd.io/snapshot/disk_quota=10g ─▶ number N ─▶ fs, work: project FIRST + N ─▶ its bound
//! folder deleted ─▶ bound taken away: nothing is left of the project
//! ```
//! The number of a project is made of the snapshot's, which is used once: nothing has to be stored, and a crash leaves no project that is not
//! that of a folder.
//!
//! **Invariant:** a snapshot that was to be bounded and cannot be is not made.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use super::Snapshotter;
use super::folders::{FS, WORK};
use crate::error::{Error, IoContext as _, Result};
use crate::store::snapshots::Usage;
use crate::sys::quota;

/// The bound that labels ask for, in bytes.
///
/// Errors: it is none.
pub(super) fn asked(labels: &HashMap<String, String>) -> Result<Option<u64>> {
    let Some(text) = labels.get(LABEL) else { return Ok(None) };
    let bytes = bytes(text).filter(|bytes| (1..=MOST_BYTES).contains(bytes));
    let wrong = || {
        Error::Invalid(format!("label {LABEL} is {:?}; it should be bytes, like 10g or 512MiB", text.chars().take(50).collect::<String>()))
    };
    bytes.map(Some).ok_or_else(wrong)
}

/// A number of bytes as Docker writes it, with units of 1024.
fn bytes(text: &str) -> Option<u64> {
    let text = text.trim().to_ascii_lowercase();
    let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let power = match unit.trim() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 1,
        "m" | "mb" | "mib" => 2,
        "g" | "gb" | "gib" => 3,
        "t" | "tb" | "tib" => 4,
        "p" | "pb" | "pib" => 5,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << (10 * power))
}

/// Refuses a bound that would bound nothing.
pub(super) fn blocking_check(snapshotter: Snapshotter, base: &Path) -> Result<()> {
    if snapshotter != Snapshotter::Overlayfs {
        return Err(Error::Unimplemented(format!("label {LABEL} for snapshotter {}: it copies files as they are", snapshotter.name())));
    }
    if quota::is_enforced(open(base)?).on("look for quotas of", base)? {
        return Ok(());
    }
    Err(Error::Precondition(format!(
        "label {LABEL}: the file system of {} enforces no quota of projects; mount it with prjquota (ext4: after `tune2fs -O project,quota`), on Linux 5.14 or newer",
        base.display()
    )))
}

/// Bounds the new snapshot in a folder, of which nothing is mounted yet.
pub(super) fn blocking_bound(folder: &Path, number: i64, limit_bytes: u64) -> Result<()> {
    let project = project_of(number)?;
    let on = open(folder)?;
    let used = quota::used(&on, project).on("look for the quota of", folder)?;
    if used.inodes > 0 {
        return Err(Error::Precondition(format!("project {project} of the file system of {} is another program's", folder.display())));
    }
    // first: it is never without
    quota::limit(&on, project, limit_bytes).on("set the quota of", folder)?;
    for path in [FS, WORK].map(|name| folder.join(name)) {
        quota::set_project(open(&path)?, project).on("set the project of", &path)?;
    }
    Ok(())
}

/// What a snapshot takes, as the file system counts it, if it is bounded.
pub(super) fn blocking_usage(folder: &Path, number: i64) -> Result<Option<Usage>> {
    let Some(project) = blocking_project(folder).filter(|project| project_of(number).is_ok_and(|own| own == *project)) else {
        return Ok(None);
    };
    let used = quota::used(open(folder)?, project).on("look for the quota of", folder)?;
    let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    // the folder beside the tree is the kernel's
    Ok(Some(Usage { bytes: number(used.bytes), inodes: number(used.inodes.saturating_sub(1)) }))
}

/// The project of a snapshot's folder, if it has one of ours.
pub(super) fn blocking_project(folder: &Path) -> Option<u32> {
    let tree = open(&folder.join(FS)).ok()?;
    quota::project(tree).ok().filter(|project| (FIRST..FIRST + COUNT).contains(project))
}

/// Takes the bound of a project away whose files are deleted.
pub(super) fn blocking_release(base: &Path, project: u32) -> Result<()> {
    quota::limit(open(base)?, project, 0).on("take the quota away in", base)
}

/// Opens a folder, and nothing else: what is in a copied tree is its image's.
fn open(folder: &Path) -> Result<File> {
    let flags = nix::libc::O_DIRECTORY | nix::libc::O_NOFOLLOW;
    File::options().read(true).custom_flags(flags).open(folder).on("open", folder)
}

fn project_of(number: i64) -> Result<u32> {
    let project = u32::try_from(number).ok().filter(|number| *number < COUNT).map(|number| FIRST + number);
    project.ok_or_else(|| Error::Exhausted(format!("no project is left for snapshot {number}")))
}

/// Asks for a bound, as snapshotters of others have it that know one.
pub(super) const LABEL: &str = "containerd.io/snapshot/disk_quota";
/// Of projects: those of other programs begin with 1, or a million.
const FIRST: u32 = 1 << 30;
const COUNT: u32 = 1 << 30;
const MOST_BYTES: u64 = 1 << 60;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_is_read_as_docker_writes_it() {
        for (text, expected) in [
            ("10g", Some(10 << 30)),
            ("10 GiB", Some(10 << 30)),
            ("512MB", Some(512 << 20)),
            ("1", Some(1)),
            ("4096b", Some(4096)),
            ("1p", Some(1 << 50)),
            ("0", None),
            ("", None),
            ("g", None),
            ("-1g", None),
            ("1.5g", None),
            ("10x", None),
            ("2000p", None),
            ("99999999999999999999", None),
        ] {
            let labels = HashMap::from([(LABEL.to_owned(), text.to_owned())]);
            assert_eq!(asked(&labels).ok().flatten(), expected, "{text}");
            assert_eq!(asked(&labels).is_err(), expected.is_none(), "{text}");
        }
        assert_eq!(asked(&HashMap::new()).expect("nothing is asked for"), None);
    }

    #[test]
    fn each_snapshot_has_a_project_of_its_own() {
        assert_eq!((project_of(1).expect("small"), project_of(7).expect("small")), (FIRST + 1, FIRST + 7));
        for number in [-1, i64::from(COUNT), i64::MAX] {
            project_of(number).expect_err("there is none");
        }
    }
}
