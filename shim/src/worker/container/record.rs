//! The record of a container, saved with the keeper: the next worker generation starts from it.
//!
//! A container has one entry of the keeper's state under its id, which holds init too, and one for each exec under that
//! process's key. A commit writes the entries that have changed.
//!
//! **Invariant:** fields are only ever added, each with a default: another version of the worker reads it.
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::execs::Execs;
use super::process::Process;
use crate::cgroup::Cgroup;
use crate::engine::Engine;
use crate::options::RuntimeOptions;
use crate::worker::error::Error;
use crate::worker::id::{ContainerId, ProcessKey};

/// A container and its processes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) version: u32,
    pub(crate) id: ContainerId,
    pub(crate) bundle: PathBuf,
    /// The root filesystem.
    pub(crate) rootfs: PathBuf,
    /// Where the shim mounted the root filesystem, if it did: not if it is mounted in the container's mount namespace alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mounted: Option<PathBuf>,
    pub(crate) engine: Engine,
    pub(crate) options: RuntimeOptions,
    #[serde(default)]
    pub(crate) shared_pid_namespace: bool,
    #[serde(default)]
    pub(crate) cgroup: Cgroup,
    /// The kernel's count of OOM kills, as last published.
    #[serde(default)]
    pub(crate) oom_kills: u64,
    /// The files of a checkpoint from which Start makes the container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) restore: Option<PathBuf>,
    /// The engine does not have the container: it was not restored yet, or is deleted.
    #[serde(default)]
    pub(crate) unknown_to_engine: bool,
    pub(crate) init: Process,
    /// Each is an entry of its own.
    #[serde(skip)]
    pub(crate) execs: Execs,
}

/// The longest encoded entry of a container.
const MAX_BYTES: usize = 1 << 20;

/// The newest version of records: those of containers whose cgroup is a unit of systemd's. Other containers that the native engine has made have version 2, the rest 1,
/// which earlier builds read.
pub(crate) const VERSION: u32 = 3;
const NATIVE_VERSION: u32 = 2;
const COMMAND_VERSION: u32 = 1;

impl Record {
    /// The version of the record of a container that `engine` makes.
    pub(crate) fn version_for(engine: &Engine) -> u32 {
        match engine {
            Engine::Native(native) if native.container().unit.is_some() => VERSION,
            Engine::Native(_) => NATIVE_VERSION,
            Engine::Command(_) => COMMAND_VERSION,
        }
    }

    /// The process that a key names.
    pub(crate) fn process(&self, key: &ProcessKey) -> Option<&Process> {
        match &key.exec {
            None => Some(&self.init),
            Some(exec) => self.execs.get(exec.as_str()),
        }
    }

    /// The keys of all its processes, init first.
    pub(crate) fn keys(&self) -> Vec<ProcessKey> {
        let mut keys = vec![ProcessKey::init(&self.id)];
        keys.extend(self.execs.iter().map(|(exec, _)| ProcessKey::exec(&self.id, exec)));
        keys
    }

    /// Refuses a record that would not fit into a commit, together with prepared answers and events.
    ///
    /// The keeper kills a worker that sends a longer message, and would kill the next one, which replays the request.
    pub(crate) fn check_size(&self, added_bytes: usize) -> Result<(), Error> {
        let bytes = self.encode().len() + added_bytes;
        if bytes <= MAX_BYTES { Ok(()) } else { Err(Error::TooMuch { id: self.id.clone(), bytes, limit: MAX_BYTES }) }
    }

    /// The entry of a process: for init, that of the container. Absent for a deleted one.
    pub(crate) fn entry(&self, key: &ProcessKey) -> Option<Vec<u8>> {
        match &key.exec {
            None => Some(self.encode()),
            Some(exec) => self.execs.get(exec.as_str()).map(|process| encode(&Entry { version: self.version, process })),
        }
    }

    fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Decodes the entry of a container of this version or an older one.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let record: Self = serde_json::from_slice(bytes)?;
        Ok(Self { version: Self::version_for(&record.engine), ..record })
    }

    /// The version of an entry that is too new for this binary.
    pub(crate) fn newer_version(bytes: &[u8]) -> Option<u32> {
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let head: Head = serde_json::from_slice(bytes).ok()?;
        (head.version > crate::test_identity::record_version(VERSION)).then_some(head.version)
    }
}

impl Process {
    /// Decodes the entry of an exec, as [`Record::decode`] does that of a container.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice::<Entry<Self>>(bytes).map(|entry| entry.process)
    }
}

/// The entry of an exec.
#[derive(Serialize, Deserialize)]
struct Entry<P> {
    version: u32,
    process: P,
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("a struct of strings and numbers has a JSON form")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The record of a container that was created.
    pub(in crate::worker::container) fn record(id: &str) -> Record {
        let text = serde_json::json!({
            "version": VERSION,
            "id": id,
            "bundle": "/bundle",
            "rootfs": "/bundle/rootfs",
            "engine": { "binary": "/usr/bin/rt", "root": "/run/rt", "environment": [] },
            "options": RuntimeOptions::default(),
            "init": Process::new(Default::default()),
        });
        Record::decode(text.to_string().as_bytes()).expect("a record")
    }
}
