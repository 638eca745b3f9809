//! The record of a pod, saved with the keeper: the next worker generation starts from it.
//!
//! **Invariant:** fields are only ever added, each with a default: another version of the worker reads it.
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::cgroup::Parent;
use super::config::Config;
use crate::worker::id::ContainerId;
use crate::worker::phase::Exit;

/// The version of the record: older builds know no pods, and refuse it.
const VERSION: u32 = 3;

/// A pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::worker) struct Record {
    pub(in crate::worker) version: u32,
    pub(in crate::worker) id: ContainerId,
    pub(in crate::worker) bundle: PathBuf,
    pub(in crate::worker) phase: Phase,
    pub(in crate::worker) config: Config,
    /// The process that holds its namespaces, if that is not the keeper.
    #[serde(default)]
    pub(in crate::worker) holder: Option<u32>,
    #[serde(default)]
    pub(in crate::worker) cgroup: Parent,
    /// Containers that a Stop or a Shutdown ends, in the order in which the first one has found them.
    #[serde(default)]
    pub(in crate::worker) ending: Vec<ContainerId>,
    /// The folder of its containers' bundles, once there is one.
    #[serde(default)]
    pub(in crate::worker) bundles: Option<PathBuf>,
}

/// The phase of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::worker) enum Phase {
    Created,
    Ready {
        /// Of the process whose namespaces its containers join.
        pid: u32,
        /// Unix time in nanoseconds.
        since_nanos: i64,
    },
    NotReady {
        /// Absent if it was never ready.
        since_nanos: Option<i64>,
        exit: Exit,
    },
}

/// The answer to SandboxStatus.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::worker) struct Status {
    pub(in crate::worker) id: String,
    pub(in crate::worker) pid: Option<u32>,
    pub(in crate::worker) is_ready: bool,
    pub(in crate::worker) created_nanos: Option<i64>,
    pub(in crate::worker) exited_nanos: Option<i64>,
    /// For a client that asks for all: the specification.
    pub(in crate::worker) info: Option<serde_json::Value>,
}

impl Phase {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Ready { .. } => "ready",
            Self::NotReady { .. } => "stopped",
        }
    }

    /// The pid of a pod that is ready.
    pub(in crate::worker) fn pid(self) -> Option<u32> {
        match self {
            Self::Ready { pid, .. } => Some(pid),
            Self::Created | Self::NotReady { .. } => None,
        }
    }
}

impl Record {
    pub(super) fn new(id: ContainerId, bundle: PathBuf, config: Config) -> Self {
        Self {
            version: VERSION,
            id,
            bundle,
            phase: Phase::Created,
            config,
            holder: None,
            cgroup: Parent::default(),
            ending: Vec::new(),
            bundles: None,
        }
    }

    pub(in crate::worker) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a struct of strings and numbers has a JSON form")
    }

    pub(in crate::worker) fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    pub(in crate::worker) fn status(&self, is_verbose: bool) -> Status {
        let (created_nanos, exited_nanos) = match self.phase {
            Phase::Created => (None, None),
            Phase::Ready { since_nanos, .. } => (Some(since_nanos), None),
            Phase::NotReady { since_nanos, exit } => (since_nanos, Some(exit.at_nanos)),
        };
        let pid = self.phase.pid();
        let info = is_verbose.then(|| {
            serde_json::json!({
                "pid": pid.unwrap_or(0),
                "processStatus": if pid.is_some() { "running" } else { "stopped" },
                "netNamespaceClosed": pid.is_none(),
                "runtimeSpec": self.spec(pid.unwrap_or(0)),
            })
        });
        Status { id: self.id.to_string(), pid, is_ready: pid.is_some(), created_nanos, exited_nanos, info }
    }

    /// The runtime specification of the pod, held by the process `pid`: its namespaces, and where its cgroup is.
    pub(in crate::worker) fn spec(&self, pid: u32) -> serde_json::Value {
        let config = &self.config;
        let kinds = [
            ("network", "net", config.network.is_some()),
            ("uts", "uts", config.has_uts()),
            ("ipc", "ipc", !config.host_ipc),
            ("pid", "pid", config.shares_pids()),
            ("user", "user", config.user),
        ];
        let of_pod = kinds.into_iter().filter(|(_, _, has)| *has);
        let namespaces: Vec<_> =
            of_pod.map(|(kind, file, _)| serde_json::json!({ "type": kind, "path": format!("/proc/{pid}/ns/{file}") })).collect();
        serde_json::json!({
            "ociVersion": OCI_VERSION,
            "hostname": config.hostname,
            "linux": { "namespaces": namespaces, "cgroupsPath": config.cgroup_parent, "sysctl": config.sysctls },
        })
    }
}

/// Of the runtime specification.
const OCI_VERSION: &str = "1.1.0";

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The record of a pod that was created.
    pub(in crate::worker::pod) fn record() -> Record {
        Record::new(ContainerId::new("p1").expect("a valid id"), "/bundle".into(), Config::default())
    }

    #[test]
    fn a_record_reads_back_as_it_was_written_and_without_what_was_added_later() {
        let exit = Exit { status: 137, at_nanos: 9 };
        for phase in [Phase::Created, Phase::Ready { pid: 7, since_nanos: 3 }, Phase::NotReady { since_nanos: None, exit }] {
            let written = Record { phase, holder: Some(8), ..record() };
            assert_eq!(Record::decode(&written.encode()).expect("a record"), written);
        }
        let mut value = serde_json::to_value(record()).expect("a value");
        let object = value.as_object_mut().expect("an object");
        object.retain(|key, _| ["version", "id", "bundle", "phase", "config"].contains(&key.as_str()));
        assert_eq!(Record::decode(value.to_string().as_bytes()).expect("a record"), record());
    }

    #[test]
    fn a_pod_is_ready_from_its_start_to_its_stop() {
        let exit = Exit { status: 0, at_nanos: 9 };
        let status = |phase| Record { phase, ..record() }.status(false);
        let created = status(Phase::Created);
        assert_eq!((created.is_ready, created.pid, created.created_nanos, created.exited_nanos), (false, None, None, None));
        let ready = status(Phase::Ready { pid: 7, since_nanos: 3 });
        assert_eq!((ready.is_ready, ready.pid, ready.created_nanos, ready.exited_nanos), (true, Some(7), Some(3), None));
        let stopped = status(Phase::NotReady { since_nanos: Some(3), exit });
        assert_eq!((stopped.is_ready, stopped.pid, stopped.created_nanos, stopped.exited_nanos), (false, None, Some(3), Some(9)));
    }

    #[test]
    fn the_specification_names_the_namespaces_that_are_the_pods() {
        let types = |config: Config| {
            let spec = Record { config, ..record() }.spec(7);
            let namespaces = spec["linux"]["namespaces"].as_array().expect("a list").clone();
            namespaces.iter().map(|namespace| namespace["type"].as_str().unwrap_or_default().to_owned()).collect::<Vec<_>>()
        };
        let own = || Config { network: Some("/run/netns/x".into()), ..Config::default() };
        assert_eq!(types(own()), ["network", "uts", "ipc"]);
        assert_eq!(types(Config { host_ipc: true, ..Config::default() }), [] as [&str; 0]);
        assert_eq!(types(Config { user: true, ..own() }), ["network", "uts", "ipc", "user"]);
    }
}
