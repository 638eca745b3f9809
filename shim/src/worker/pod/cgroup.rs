//! The cgroup above those of a pod's containers.
//!
//! The kubelet makes it before the pod. Where it is missing, Start makes it, because containerd cannot read statistics of a pod without a cgroup, and
//! the end of the pod removes it if it is empty. On cgroup v1 that is in the hierarchies with statistics: in the others the engine of the first container
//! makes it, and the end of the pod removes it likewise.
use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use x_engine::Host;
use x_engine::control;
use x_engine::plan::{self, Hierarchy};

use super::record::Record;
use crate::cgroup::Cgroup;
use crate::pod_folder::{Leftovers, Slice};
use crate::systemd::{self, Manager};
use crate::worker::container::blocking;
use crate::worker::error::Error;

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(in crate::worker) struct Parent {
    /// Its folders, for its metrics.
    pub(super) cgroup: Cgroup,
    /// The folders that the pod makes, each after those above it.
    pub(super) made: Vec<PathBuf>,
    /// The slice that it has systemd start.
    pub(super) slice: Option<String>,
}

/// A parent to be made.
#[derive(Debug)]
pub(super) struct Planned {
    folders: plan::Cgroup,
    unit: Option<plan::Unit>,
}

/// Plans the parent that a pod names. Absent if it names none. `host`: if it was read already.
pub(super) fn blocking_plan(record: &Record, host: Option<Host>) -> Result<Option<Planned>, Error> {
    let wanted = record.config.cgroup_parent.as_str();
    if wanted.trim_matches('/').is_empty() {
        return Ok(None);
    }
    let has_systemd = systemd::blocking_is_running();
    let read = || {
        let host = host.map_or_else(Host::read_cgroups, Ok)?;
        if has_systemd { host.with_init() } else { Ok(host) }
    };
    let host = read().map_err(|source| Error::Io { op: "read", path: "/proc/self/mountinfo".into(), source })?;
    let (folders, unit) = plan::parent(wanted, has_systemd, &host).map_err(|refused| Error::PodConfig {
        id: record.id.to_string(),
        field: "linux.cgroup_parent".to_owned(),
        why: crate::chain::chain(&refused),
    })?;
    Ok(Some(Planned { folders, unit }))
}

impl Planned {
    /// What is to be recorded before it is made.
    pub(super) fn blocking_parent(&self) -> Parent {
        let cgroup = folders(&self.folders);
        let Some(unit) = &self.unit else { return Parent { cgroup, made: control::missing(&self.folders), slice: None } };
        // systemd makes and removes its own folders: on v1, of a slice that it has started, those that something in it needs and its own, always.
        let is_started = self.folders.of_systemd().is_none_or(|folder| folder.absolute().is_dir());
        Parent { cgroup, made: Vec::new(), slice: (!is_started).then(|| unit.name.clone()) }
    }

    /// Makes what `parent` says is to be made. Can be repeated.
    pub(super) async fn make(self, parent: &Parent) -> Result<(), Error> {
        let failed = |source: std::io::Error| Error::Io { op: "make cgroup", path: self.folders.folders[0].absolute(), source };
        match (&self.unit, &parent.slice) {
            (Some(unit), Some(_)) => start(unit).await,
            // It is there, or its folder is.
            _ if parent.made.is_empty() => Ok(()),
            _ => control::make(&self.with_statistics(), &parent.made).map_err(failed),
        }
    }

    /// Its folders in the hierarchies from which containerd reads statistics: each folder takes the kernel 25 µs, one at a time.
    fn with_statistics(&self) -> plan::Cgroup {
        let has_any = |folder: &&plan::Folder| folder.of.iter().any(|controller| STATISTICS.contains(&controller.as_str()));
        let folders: Vec<_> = self.folders.folders.iter().filter(has_any).cloned().collect();
        // On v2, and on a host that has none of them.
        if folders.is_empty() { self.folders.clone() } else { plan::Cgroup { folders, ..self.folders.clone() } }
    }
}

/// The controllers of cgroup v1 that count something for a pod without containers.
const STATISTICS: [&str; 4] = ["cpu", "cpuacct", "memory", "pids"];

async fn start(unit: &plan::Unit) -> Result<(), Error> {
    let failed = |error: &systemd::Error| Error::PodConfig {
        id: unit.name.clone(),
        field: "linux.cgroup_parent".to_owned(),
        why: crate::chain::chain(error),
    };
    let manager = Manager::connect().await.map_err(|error| failed(&error))?;
    let started = manager.start(unit, &[]).await;
    manager.close().await;
    match started {
        Ok(()) | Err(systemd::Error::Exists { .. }) => Ok(()),
        Err(error) => Err(failed(&error)),
    }
}

impl Parent {
    /// What is left of it for `delete`.
    pub(super) fn leftovers(&self) -> Leftovers {
        let folders = match &self.cgroup {
            Cgroup::None => Vec::new(),
            Cgroup::V1(folders) => folders.values().cloned().collect(),
            Cgroup::V2(folder) => vec![folder.clone()],
        };
        Leftovers { cgroups: self.made.clone(), slice: self.slice.clone().map(|name| Slice { name, folders }) }
    }

    /// Removes what the pod has made, if it is empty. Failures are logged.
    pub(super) async fn remove(&self) {
        let leftovers = self.leftovers();
        if leftovers == Leftovers::default() {
            return;
        }
        let slice = blocking(move || {
            leftovers.blocking_remove_cgroups();
            leftovers.slice.filter(Slice::blocking_is_empty)
        });
        let Some(slice) = slice.await else { return };
        let stopped = async {
            let manager = Manager::connect().await?;
            let stopped = manager.stop(&slice.name).await;
            manager.close().await;
            stopped
        };
        if let Err(error) = stopped.await {
            log::warn!(slice:% = slice.name, error:% = crate::chain::chain(&error); "cannot stop the slice of a pod");
        }
    }
}

/// The folders by the controllers that they are of.
fn folders(planned: &plan::Cgroup) -> Cgroup {
    if let [folder] = &planned.folders[..]
        && folder.hierarchy == Hierarchy::Unified
    {
        return Cgroup::V2(folder.absolute());
    }
    let mut folders = BTreeMap::new();
    for folder in &planned.folders {
        for controller in &folder.of {
            folders.insert(controller.trim_start_matches("name=").to_owned(), folder.absolute());
        }
        if folder.of.is_empty() {
            folders.insert("unified".to_owned(), folder.absolute());
        }
    }
    Cgroup::V1(folders)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_cgroup_is_made_where_something_is_counted() {
        let folder = |of: &[&str], hierarchy| plan::Folder {
            mount: format!("/sys/fs/cgroup/{}", of.join(",")),
            path: "pods/pod1".to_owned(),
            hierarchy,
            limits: Vec::new(),
            controllers: Vec::new(),
            of: of.iter().map(|name| (*name).to_owned()).collect(),
            devices: None,
            owner: None,
        };
        let made = |folders: Vec<plan::Folder>| {
            let planned = Planned { folders: plan::Cgroup { folders, placeholder: None }, unit: None };
            planned.with_statistics().folders.iter().map(|folder| folder.of.join(",")).collect::<Vec<_>>()
        };
        let v1 = |of: &[&str]| folder(of, Hierarchy::V1);
        let hybrid = vec![
            v1(&["cpu", "cpuacct"]),
            v1(&["cpuset"]),
            v1(&["name=systemd"]),
            v1(&["memory"]),
            v1(&["devices"]),
            folder(&[], Hierarchy::Unified),
        ];
        assert_eq!(made(hybrid), ["cpu,cpuacct", "memory"]);
        assert_eq!(made(vec![folder(&[], Hierarchy::Unified)]), [""]);
        assert_eq!(made(vec![v1(&["freezer"])]), ["freezer"]);
    }
}
