//! Facts about the host that a plan depends on.
//!
//! Owns their reading. They do not change while the host is up, but for the cgroup of the calling process.
use std::fs::{self, File};
use std::io::{self, Read as _};

use crate::sys;

/// What is known of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// The mounted hierarchies of cgroups.
    pub hierarchies: Vec<MountedHierarchy>,
    /// The number of the kernel's last capability.
    pub last_capability: u32,
    /// There is a `/proc/kcore`, to which containers have a link.
    pub has_kcore: bool,
    /// AppArmor is active.
    pub has_apparmor: bool,
    /// SELinux is active.
    pub has_selinux: bool,
}

/// A mounted hierarchy of cgroups.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountedHierarchy {
    /// `memory`, `name=systemd`; none for cgroup v2.
    pub controllers: Vec<String>,
    pub mount: String,
    /// The part of the hierarchy that is mounted: `/` but in containers.
    pub root: String,
    /// The cgroup of the process that makes the plan.
    pub own: String,
    /// The cgroup of the host's first process, if it was asked for: systemd's own are beside it.
    pub of_init: String,
    /// Controllers that cgroup v2 has: those that no hierarchy of v1 took.
    pub available: Vec<String>,
}

impl Host {
    /// Reads the facts, for the calling process.
    pub fn read() -> io::Result<Self> {
        Ok(Self { hierarchies: Self::read_cgroups()?.hierarchies, ..Self::read_without_cgroups()? })
    }

    /// Reads what is enough for a plan of cgroups alone.
    pub fn read_cgroups() -> io::Result<Self> {
        let (mounts, cgroups) = (read_text("/proc/self/mountinfo")?, read_text("/proc/self/cgroup")?);
        Ok(Self { hierarchies: with_controllers(hierarchies(&mounts, &cgroups)), ..Self::default() })
    }

    /// Reads what never changes, and is enough for another process of a container: all but the cgroups.
    pub fn read_without_cgroups() -> io::Result<Self> {
        Ok(Self {
            hierarchies: Vec::new(),
            last_capability: sys::last_capability(),
            has_kcore: fs::exists("/proc/kcore")?,
            has_apparmor: fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|enabled| enabled.starts_with(b"Y")),
            has_selinux: fs::exists("/sys/fs/selinux/enforce")?,
        })
    }

    /// Adds the cgroups of the host's first process.
    pub fn with_init(mut self) -> io::Result<Self> {
        let cgroups = fs::read_to_string("/proc/1/cgroup")?;
        for hierarchy in &mut self.hierarchies {
            hierarchy.of_init =
                cgroup_of(&cgroups, |controllers| controllers == hierarchy.controllers.join(",")).unwrap_or_default().1.to_owned();
        }
        Ok(self)
    }
}

/// Hosts that have everything, for questions about what a planner takes.
impl Host {
    pub(crate) fn example_v1() -> Self {
        const NAMES: [&str; 10] =
            ["cpu,cpuacct", "cpuset", "memory", "devices", "pids", "hugetlb", "blkio", "net_cls,net_prio", "rdma", "unified"];
        let hierarchy = |name: &str| MountedHierarchy {
            controllers: name.split(',').filter(|name| *name != "unified").map(str::to_owned).collect(),
            mount: format!("/sys/fs/cgroup/{name}"),
            root: "/".to_owned(),
            own: "/d".to_owned(),
            of_init: "/".to_owned(),
            available: Vec::new(),
        };
        let hierarchies = NAMES.into_iter().map(hierarchy).collect();
        Self { hierarchies, last_capability: 40, has_kcore: true, has_apparmor: true, has_selinux: true }
    }

    pub(crate) fn example_v2() -> Self {
        let unified = MountedHierarchy {
            mount: "/sys/fs/cgroup".to_owned(),
            root: "/".to_owned(),
            own: "/d/e".to_owned(),
            of_init: "/init.scope".to_owned(),
            available: ["cpu", "cpuset", "hugetlb", "io", "memory", "pids", "rdma"].map(str::to_owned).to_vec(),
            ..MountedHierarchy::default()
        };
        Self { hierarchies: vec![unified], ..Self::example_v1() }
    }
}

/// Reads a file of procfs in few calls: each begins the kernel's list again, and what is in it has no size that would be known before.
fn read_text(path: &str) -> io::Result<String> {
    let mut text = String::with_capacity(READ_BYTES);
    File::open(path)?.read_to_string(&mut text)?;
    Ok(text)
}

/// The mounts of a host with a few containers.
const READ_BYTES: usize = 8 << 10;

/// The hierarchies of `/proc/self/cgroup` that are mounted, in the order of their mounts.
fn hierarchies(mountinfo: &str, cgroups: &str) -> Vec<MountedHierarchy> {
    let mut found: Vec<MountedHierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let before: Vec<&str> = before.split(' ').collect();
        let after: Vec<&str> = after.split(' ').collect();
        let ([_, _, _, root, mount, ..], [kind, _, options]) = (&before[..], &after[..]) else { continue };
        let is_of = |controllers: &str| match *kind {
            "cgroup2" => controllers.is_empty(),
            "cgroup" => !controllers.is_empty() && controllers.split(',').all(|one| options.split(',').any(|option| option == one)),
            _ => false,
        };
        let Some((controllers, own)) = cgroup_of(cgroups, is_of) else { continue };
        let controllers: Vec<String> = controllers.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
        if found.iter().all(|other| other.controllers != controllers) {
            found.push(MountedHierarchy {
                controllers,
                mount: unescape(mount),
                root: unescape(root),
                own: own.to_owned(),
                of_init: String::new(),
                available: Vec::new(),
            });
        }
    }
    found
}

/// The line of a hierarchy in a process's `cgroup`: its controllers and its path.
fn cgroup_of(cgroups: &str, is_of: impl Fn(&str) -> bool) -> Option<(&str, &str)> {
    cgroups.lines().filter_map(|line| line.split_once(':')?.1.split_once(':')).find(|(controllers, _)| is_of(controllers))
}

fn with_controllers(mut hierarchies: Vec<MountedHierarchy>) -> Vec<MountedHierarchy> {
    for unified in hierarchies.iter_mut().filter(|hierarchy| hierarchy.controllers.is_empty()) {
        let names = fs::read_to_string(format!("{}/cgroup.controllers", unified.mount)).unwrap_or_default();
        unified.available = names.split_whitespace().map(str::to_owned).collect();
    }
    hierarchies
}

/// Undoes the octal escapes of mountinfo.
pub(crate) fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_by_their_mounts() {
        let mountinfo = "\
            30 20 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
            31 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:1 - cgroup cgroup rw,cpu,cpuacct\n\
            32 30 0:29 /docker/x /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
            33 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
            34 30 0:28 / /mnt/again rw - cgroup cgroup rw,cpu,cpuacct\n";
        let found = hierarchies(mountinfo, "9:hugetlb:/\n3:name=systemd:/docker/x\n2:cpu,cpuacct:/a:b\n0::/u\n");
        let brief: Vec<_> =
            found.iter().map(|one| (one.controllers.join(","), one.mount.as_str(), one.root.as_str(), one.own.as_str())).collect();
        assert_eq!(
            brief,
            [
                ("cpu,cpuacct".to_owned(), "/sys/fs/cgroup/cpu,cpuacct", "/", "/a:b"),
                ("name=systemd".to_owned(), "/sys/fs/cgroup/systemd", "/docker/x", "/docker/x"),
                (String::new(), "/sys/fs/cgroup/unified", "/", "/u"),
            ]
        );
    }
}
