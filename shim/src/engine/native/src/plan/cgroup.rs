//! Plans the folders of a cgroup, and its limits.
use oci_spec::runtime::{Linux, LinuxCpu, LinuxMemory, LinuxResources};
use std::path::{Component, Path};

use super::{Cgroup, Folder, Hierarchy, Write, devices};
use crate::Refused;
use crate::host::{Host, MountedHierarchy};

/// Plans the cgroup of a container.
pub(super) fn plan(linux: &Linux, id: &str, host: &Host) -> Result<Cgroup, Refused> {
    if host.hierarchies.iter().all(|hierarchy| hierarchy.controllers.is_empty()) {
        return Err(Refused::unsupported("cgroup v2"));
    }
    let none = LinuxResources::default();
    let resources = linux.resources().as_ref().unwrap_or(&none);
    let wanted = linux.cgroups_path().as_deref().unwrap_or(Path::new(""));
    let mut writes = Limits(Vec::new());
    if let Some(memory) = resources.memory() {
        writes.memory(memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        writes.cpu(cpu)?;
    }
    if let Some(limit) = resources.pids().as_ref().map(|pids| pids.limit()) {
        let value = match limit {
            ..0 => "max".to_owned(),
            // A limit that was given counts: the least that lets a process run.
            0 => "1".to_owned(),
            1.. => limit.to_string(),
        };
        writes.add("pids", "pids.max", value);
    }
    for write in devices::rules(resources.devices().as_deref().unwrap_or_default())? {
        writes.0.push(("devices", write));
    }

    let mut folders = Vec::new();
    for hierarchy in &host.hierarchies {
        let is_of = |controller: &str| hierarchy.controllers.iter().any(|own| own == controller);
        let (limits, others) = writes.0.into_iter().partition(|(controller, _)| is_of(controller));
        writes.0 = others;
        folders.push(Folder {
            mount: hierarchy.mount.clone(),
            path: path(wanted, id, hierarchy)?,
            hierarchy: match () {
                () if hierarchy.controllers.is_empty() => Hierarchy::Unified,
                () if is_of("cpuset") => Hierarchy::Cpuset,
                () => Hierarchy::V1,
            },
            limits: limits.into_iter().map(|(_, write)| write).collect(),
        });
    }
    match writes.0.first() {
        Some((controller, write)) => {
            Err(Refused::invalid("linux.resources", format!("{} needs the cgroup controller {controller}", write.file)))
        }
        None => Ok(Cgroup { folders }),
    }
}

/// The path below the mount point: absolute ones start there, others at the cgroup of the process that plans.
fn path(wanted: &Path, id: &str, hierarchy: &MountedHierarchy) -> Result<String, Refused> {
    let wanted = if wanted.as_os_str().is_empty() { Path::new(id) } else { wanted };
    if wanted.to_str().is_some_and(|text| text.contains(':') && !text.contains('/')) {
        return Err(Refused::unsupported("linux.cgroupsPath of systemd's form"));
    }
    let own = Path::new(&hierarchy.own);
    let base = if wanted.is_absolute() { Path::new("/") } else { own.strip_prefix(&hierarchy.root).unwrap_or(own) };
    let mut parts: Vec<&str> = base.to_str().into_iter().flat_map(|text| text.split('/')).filter(|part| !part.is_empty()).collect();
    let least = parts.len();
    for component in wanted.components() {
        match component {
            Component::Normal(part) => parts.push(part.to_str().ok_or_else(|| Refused::invalid("linux.cgroupsPath", "not UTF-8"))?),
            // Cleaned as if its beginning were a root.
            Component::ParentDir if parts.len() > least => {
                parts.pop();
            }
            Component::ParentDir | Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    if parts.len() == least {
        return Err(Refused::invalid("linux.cgroupsPath", format!("{} is not below the root of the cgroups", wanted.display())));
    }
    Ok(parts.join("/"))
}

/// Files to write, each with its controller.
struct Limits(Vec<(&'static str, Write)>);

impl Limits {
    fn add(&mut self, controller: &'static str, file: &str, value: impl ToString) {
        self.0.push((controller, Write { file: file.to_owned(), value: value.to_string() }));
    }

    fn memory(&mut self, memory: &LinuxMemory) -> Result<(), Refused> {
        let limit = memory.limit().filter(|limit| *limit != 0);
        let mut swap = memory.swap().filter(|swap| *swap != 0);
        if limit == Some(-1) {
            swap = swap.or(Some(-1));
        }
        if let (Some(limit), Some(swap)) = (limit, swap)
            && swap > 0
            && swap < limit
        {
            return Err(Refused::invalid("linux.resources.memory.swap", "is memory and swap together and cannot be less than limit"));
        }
        // The new folder has no limits, so that the one of memory and swap together can come second.
        if let Some(limit) = limit {
            self.add("memory", "memory.limit_in_bytes", limit);
        }
        if let Some(swap) = swap {
            self.add("memory", "memory.memsw.limit_in_bytes", swap);
        }
        if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
            self.add("memory", "memory.soft_limit_in_bytes", reservation);
        }
        if memory.disable_oom_killer() == Some(true) {
            self.add("memory", "memory.oom_control", 1);
        }
        if let Some(swappiness) = memory.swappiness() {
            if swappiness > 100 {
                return Err(Refused::invalid("linux.resources.memory.swappiness", format!("{swappiness} is not between 0 and 100")));
            }
            self.add("memory", "memory.swappiness", swappiness);
        }
        Ok(())
    }

    fn cpu(&mut self, cpu: &LinuxCpu) -> Result<(), Refused> {
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            if !(2..=262_144).contains(&shares) {
                return Err(Refused::invalid("linux.resources.cpu.shares", format!("{shares} is not between 2 and 262144")));
            }
            self.add("cpu", "cpu.shares", shares);
        }
        // A burst may not exceed the quota; both begin at nothing.
        if let Some(period) = cpu.period().filter(|period| *period != 0) {
            self.add("cpu", "cpu.cfs_period_us", period);
        }
        if let Some(quota) = cpu.quota().filter(|quota| *quota != 0) {
            self.add("cpu", "cpu.cfs_quota_us", quota);
        }
        if let Some(burst) = cpu.burst() {
            self.add("cpu", "cpu.cfs_burst_us", burst);
        }
        for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
                self.add("cpuset", file, value);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below_the_mount() {
        let hierarchy = |root: &str, own: &str| MountedHierarchy { root: root.into(), own: own.into(), ..Default::default() };
        let path = |wanted: &str, hierarchy: &MountedHierarchy| path(Path::new(wanted), "id", hierarchy);
        let host = hierarchy("/", "/system.slice/containerd");
        assert_eq!(path("/default/c1", &host).expect("a path"), "default/c1");
        assert_eq!(path("", &host).expect("a path"), "system.slice/containerd/id");
        assert_eq!(path("a/../b", &host).expect("a path"), "system.slice/containerd/b");
        assert_eq!(path("../../../b", &host).expect("a path"), "system.slice/containerd/b");
        assert_eq!(path("/../x", &host).expect("a path"), "x");
        let nested = hierarchy("/docker/a", "/docker/a/inner");
        assert_eq!(path("", &nested).expect("a path"), "inner/id");
        assert!(path("/", &host).is_err());
        assert!(path("system.slice:x:id", &host).is_err());
    }
}
