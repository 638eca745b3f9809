//! Settings that a keeper inherits from its `start`: cgroup, OOM score, core scheduling.
//!
//! Owns the changes that `start` makes to itself just before it starts the keeper. It exits right after, so that only the keeper
//! keeps them. A single-threaded process that moves itself is also the cheap way: moving another one costs 8–14 ms.
//!
//! **Invariant:** nothing else is changed. Containers inherit from the keeper, and must get what they get under the stock
//! shim: its score (the daemon's plus one) unless their spec sets another.
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::process::parent_id;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, TMPFS_MAGIC, statfs};

use super::Error;
use crate::{mountinfo, sys};

const MAX_SCORE: i32 = 1000;

/// Sets this process's OOM score to its parent's plus one, so that the kernel kills a shim before its daemon.
///
/// Ignores failures, such as a lower score without CAP_SYS_RESOURCE.
pub(crate) fn adjust_oom_score() {
    let score = fs::read_to_string(format!("/proc/{}/oom_score_adj", parent_id()));
    let Some(daemon) = score.ok().and_then(|score| score.trim().parse::<i32>().ok()) else { return };
    let _ = fs::write("/proc/self/oom_score_adj", (daemon + 1).min(MAX_SCORE).to_string());
}

/// Lets only this process and its descendants share cores, if the variable SCHED_CORE is set.
///
/// Without SMT there is nothing to separate, which counts as success.
pub(crate) fn separate_cores() -> Result<(), Error> {
    if std::env::var_os("SCHED_CORE").is_none_or(|value| value.is_empty()) {
        return Ok(());
    }
    match sys::core_scheduling::create_cookie() {
        Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => Ok(()),
        other => other.map_err(|source| Error::CoreScheduling { source }),
    }
}

/// Moves this process to the cgroup `group`, in each hierarchy that has it.
///
/// Errors: no hierarchy has it; the kernel refuses.
pub(crate) fn join_cgroup(group: &str) -> Result<(), Error> {
    let failed = |source| Error::ShimCgroup { group: group.to_owned(), source };
    let Some(below) = relative(group) else { return Err(failed(io::ErrorKind::InvalidInput.into())) };
    // The list of mounts takes the kernel longer than most of `start`, and is read only where hierarchies are in other places.
    let usual = usual_hierarchies().unwrap_or_default();
    let joined = join(&usual, &below).map_err(failed)? || join(&hierarchies().map_err(failed)?, &below).map_err(failed)?;
    if joined { Ok(()) } else { Err(Error::NoShimCgroup { group: group.to_owned() }) }
}

/// Whether any of the hierarchies has the cgroup.
fn join(hierarchies: &[Hierarchy], below: &Path) -> io::Result<bool> {
    let only_unified = hierarchies.iter().all(|hierarchy| hierarchy.unified);
    let mut joined = false;
    // On a hybrid host the unified hierarchy has no controllers, and the stock shim leaves it alone.
    for hierarchy in hierarchies.iter().filter(|hierarchy| only_unified || !hierarchy.unified) {
        let file = hierarchy.folder.join(below).join(if hierarchy.unified { "cgroup.procs" } else { "tasks" });
        match OpenOptions::new().write(true).open(&file).and_then(|mut file| file.write_all(b"0")) {
            Ok(()) => joined = true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(source),
        }
    }
    Ok(joined)
}

/// The path below a hierarchy's root; absent if it leaves it.
fn relative(group: &str) -> Option<PathBuf> {
    let mut below = PathBuf::new();
    for component in Path::new(group).components() {
        match component {
            Component::Normal(name) => below.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    Some(below)
}

#[derive(Debug)]
struct Hierarchy {
    folder: PathBuf,
    unified: bool,
}

/// The hierarchies in the usual place, where the stock shim looks for them too: one of v2, or a folder for each of v1, whose second names are links.
fn usual_hierarchies() -> io::Result<Vec<Hierarchy>> {
    let place = Path::new("/sys/fs/cgroup");
    let kind = statfs(place)?.filesystem_type();
    if kind == CGROUP2_SUPER_MAGIC {
        return Ok(vec![Hierarchy { folder: place.to_owned(), unified: true }]);
    }
    // What is no hierarchy of v1 has no file `tasks`.
    let entries = fs::read_dir(place)?.filter(|entry| kind == TMPFS_MAGIC && entry.as_ref().is_ok_and(is_folder));
    entries.map(|entry| Ok(Hierarchy { folder: entry?.path(), unified: false })).collect()
}

fn is_folder(entry: &fs::DirEntry) -> bool {
    entry.file_type().is_ok_and(|kind| kind.is_dir())
}

fn hierarchies() -> io::Result<Vec<Hierarchy>> {
    let mounts = mountinfo::blocking_list(|mount| matches!(mount.kind.as_str(), "cgroup" | "cgroup2"))?;
    Ok(mounts.into_iter().map(|mount| Hierarchy { folder: mount.mount_point, unified: mount.kind == "cgroup2" }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_stays_below_its_root() {
        assert_eq!(relative("/a/b"), Some("a/b".into()));
        assert_eq!(relative("a//./b/"), Some("a/b".into()));
        assert_eq!(relative("/"), Some("".into()));
        assert_eq!(relative("/a/../../b"), None);
    }

    #[test]
    fn the_usual_hierarchies_are_those_that_are_mounted_there() {
        let all = hierarchies().expect("a list");
        let v1: Vec<_> = usual_hierarchies().expect("a place").into_iter().filter(|it| it.folder.join("tasks").exists()).collect();
        let folders = |list: Vec<Hierarchy>, unified| {
            let folders =
                list.into_iter().filter(|it| it.unified == unified && it.folder.starts_with("/sys/fs/cgroup")).map(|it| it.folder);
            folders.collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(folders(v1, false), folders(all, false));
    }

    #[test]
    fn a_cgroup_that_is_nowhere_is_named() {
        let error = join_cgroup("/no-such-cgroup-of-x").expect_err("is not there");
        assert!(error.to_string().contains("/no-such-cgroup-of-x"), "{error}");
    }
}
