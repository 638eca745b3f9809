//! Finds the folders of a process's cgroup.
use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::{Cgroup, CgroupError};
use crate::mountinfo;

/// Whether this host has cgroup v2 and nothing else.
pub(super) fn is_unified() -> bool {
    statfs(MOUNT).is_ok_and(|about| about.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// See [`Cgroup::of_pid`].
pub(super) fn of_pid(pid: u32) -> Result<Cgroup, CgroupError> {
    let theirs = read(&format!("/proc/{pid}/cgroup"))?;
    let ours = read("/proc/self/cgroup")?;
    resolve(pid, &theirs, &ours, is_unified(), find)
}

fn resolve(
    pid: u32,
    theirs: &str,
    ours: &str,
    is_unified: bool,
    find: impl Fn(&str, &Path) -> Option<PathBuf>,
) -> Result<Cgroup, CgroupError> {
    let mut folders = BTreeMap::new();
    for (controllers, path) in lines(theirs) {
        if is_unified && !controllers.is_empty() {
            continue;
        }
        if !path.starts_with('/') || Path::new(path).components().any(|part| part == Component::ParentDir) {
            return Err(CgroupError::Malformed { pid, what: path.to_owned() });
        }
        let is_ours = lines(ours).any(|(other, own)| other == controllers && Path::new(own).starts_with(path));
        // A cgroup whose path ends so was removed: the process outlived it.
        if is_ours || path.ends_with(" (deleted)") {
            continue;
        }
        let Some(folder) = find(controllers, Path::new(path)) else { continue };
        if is_unified {
            return Ok(Cgroup::V2(folder));
        }
        for controller in controllers.split(',') {
            let name = if controller.is_empty() { "unified" } else { controller.trim_start_matches("name=") };
            folders.insert(name.to_owned(), folder.clone());
        }
    }
    Ok(if folders.is_empty() { Cgroup::None } else { Cgroup::V1(folders) })
}

/// `id:controllers:path`, of which the path may contain colons.
fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'))
}

/// The folder of a cgroup, in the usual place, else wherever that hierarchy is mounted.
fn find(controllers: &str, path: &Path) -> Option<PathBuf> {
    let relative = path.strip_prefix("/").ok()?;
    let first = controllers.split(',').next().unwrap_or_default();
    let usual = match controllers {
        "" if is_unified() => vec![String::new()],
        "" => vec!["unified".to_owned()],
        named if named.starts_with("name=") => vec![named["name=".len()..].to_owned()],
        several => vec![several.to_owned(), first.to_owned()],
    };
    let usual = usual.iter().map(|name| Path::new(MOUNT).join(name).join(relative)).find(|folder| is_cgroup(folder));
    usual.or_else(|| {
        let is_wanted = |kind: &str, options: &str| match kind {
            "cgroup2" => controllers.is_empty(),
            "cgroup" => !controllers.is_empty() && options.split(',').any(|option| option == first),
            _ => false,
        };
        let mounts = mountinfo::blocking_list(|entry| is_wanted(&entry.kind, &entry.options)).ok()?;
        // Only a part of the hierarchy may be mounted, as in a container that has no cgroup namespace.
        mounts
            .iter()
            .map(|entry| entry.mount_point.join(path.strip_prefix(&entry.root).unwrap_or(relative)))
            .find(|folder| is_cgroup(folder))
    })
}

fn is_cgroup(folder: &Path) -> bool {
    folder.join("cgroup.procs").exists()
}

fn read(path: &str) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(|source| CgroupError::Io { op: "read", path: path.into(), source })
}

const MOUNT: &str = "/sys/fs/cgroup";

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(theirs: &str, ours: &str, is_unified: bool) -> Result<Cgroup, CgroupError> {
        resolve(7, theirs, ours, is_unified, |controllers, path| Some(Path::new("/m").join(controllers).join(path.strip_prefix("/").ok()?)))
    }

    #[test]
    fn v1_folders_are_found_but_never_the_shims_own() {
        let theirs = "9:name=systemd:/c1\n4:memory:/pod/c1\n3:cpu,cpuacct:/c1\n2:pids:/system.slice\n1:freezer:/\n0::/c1\n";
        let ours = "9:name=systemd:/\n4:memory:/pod\n3:cpu,cpuacct:/c10\n2:pids:/system.slice/containerd.service\n1:freezer:/x\n0::/c1/x\n";
        let expected = [
            ("cpu", "/m/cpu,cpuacct/c1"),
            ("cpuacct", "/m/cpu,cpuacct/c1"),
            ("memory", "/m/memory/pod/c1"),
            ("systemd", "/m/name=systemd/c1"),
        ];
        let expected = expected.into_iter().map(|(name, folder)| (name.to_owned(), folder.into())).collect();
        assert_eq!(resolved(theirs, ours, false).expect("a cgroup"), Cgroup::V1(expected));
    }

    #[test]
    fn v2_has_one_folder() {
        let theirs = "1:name=old:/\n0::/kubepods.slice/a:b.scope\n";
        let cgroup = resolved(theirs, "0::/system.slice/c\n", true).expect("a cgroup");
        assert_eq!(cgroup, Cgroup::V2("/m/kubepods.slice/a:b.scope".into()));
        for ours in ["0::/kubepods.slice/a:b.scope\n", "0::/kubepods.slice/a:b.scope/shim\n"] {
            assert_eq!(resolved(theirs, ours, true).expect("none"), Cgroup::None);
        }
        assert_eq!(resolved("0::/\n", "0::/x\n", true).expect("none"), Cgroup::None);
        assert_eq!(resolved("0::/c1 (deleted)\n", "0::/x\n", true).expect("none"), Cgroup::None);
    }

    #[test]
    fn a_path_that_leads_out_is_refused() {
        for theirs in ["0::/../c1\n", "0::c1\n"] {
            assert!(matches!(resolved(theirs, "", true), Err(CgroupError::Malformed { pid: 7, .. })), "{theirs}");
        }
    }
}
