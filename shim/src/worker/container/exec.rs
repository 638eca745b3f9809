//! Exec: adds a process to a container, to be started later.
use std::path::{Path, PathBuf};

use super::{Change, Event, EventKind, Process, Reply, Shared, Streams};
use crate::whole_file::blocking_replace;
use crate::worker::error::Error;
use crate::worker::id::{ExecId, ProcessKey};
use crate::worker::phase::Request;

/// The request.
#[derive(Debug, Clone)]
pub(in crate::worker) struct ExecCall {
    pub(in crate::worker) id: String,
    pub(in crate::worker) exec: String,
    pub(in crate::worker) stdio: Streams,
    /// A `Process` of the runtime specification as JSON.
    pub(in crate::worker) spec: Vec<u8>,
}

/// Adds a process.
pub(in crate::worker) fn exec(shared: &Shared, call: ExecCall) -> Result<Change, Error> {
    let container = shared.registry.get(&call.id)?;
    let exec = ExecId::new(&call.exec)?;
    let key = ProcessKey::exec(&container.id, &exec);
    container.refuse_while_deleting()?;
    container.admit(&ProcessKey::init(&container.id), Request::Exec)?;
    if container.record().execs.get(exec.as_str()).is_some() {
        return Err(Error::ProcessExists { key });
    }
    // Refused now rather than at Start.
    super::streams::Plan::blocking_read(&key, &call.stdio, &container.record())?;
    let path = process_file(&container.record().bundle, &key);
    let process = Process { files: vec![path.clone()], ..Process::new(call.stdio) };
    if let Some((bytes, limit)) = container.record().execs.excess(&exec, &process) {
        return Err(Error::TooMuch { id: container.id.clone(), bytes, limit });
    }
    let mut spec: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&call.spec).map_err(|source| Error::Json { method: "Exec", source })?;
    spec.insert("terminal".into(), process.stdio.terminal.into());
    let text = serde_json::to_vec(&spec).map_err(|source| Error::Json { method: "Exec", source })?;
    // Environment variables hold secrets: only root may read them.
    blocking_replace(&path, &text, 0o600).map_err(|source| Error::Io { op: "write", path, source })?;
    container.add(exec, process);
    let added = Event::new(&container, EventKind::ExecAdded { exec: call.exec });
    Ok(Change::save(&container, Reply::Empty).event(added))
}

/// The file that holds the specification of an exec until its start.
pub(super) fn process_file(bundle: &Path, key: &ProcessKey) -> PathBuf {
    bundle.join(format!("x-exec-{}.json", key.exec.as_ref().map_or("", ExecId::as_str)))
}
