//! The journal of a container, which the keeper writes at the worker's request.
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Record, Shared};
use crate::handover::{Op, Step};
use crate::journal::{FILE_NAME, RecordedExit};
use crate::journal_body::{JournalBody, ProcessIdentity, VERSION};
use crate::worker::cause::{Cause, step};
use crate::worker::error::Error;

/// The path of the journal of the container in `bundle`.
pub(in crate::worker) fn path(bundle: &Path) -> PathBuf {
    bundle.join(FILE_NAME)
}

/// Reads the journal of the container in `bundle`, if there is one.
pub(super) fn blocking_read(bundle: &Path) -> Option<(JournalBody, Option<RecordedExit>)> {
    let contents = crate::journal::read(&path(bundle)).ok()?;
    Some((JournalBody::decode(&contents.body?).ok()?, contents.exit))
}

/// Claims the container's id with its engine: `delete` removes from the engine only what the journal names.
///
/// Errors: the engine has a container of that id. Whether it did before this cause, the keeper remembers with the journal that
/// the first worker wrote: a container that a replay finds may be one that this very cause has made.
pub(super) async fn take_id(shared: &Shared, cause: &Cause, record: &Record) -> Result<(), Error> {
    let found = record.engine.blocking_find(record.id.as_str());
    write(shared, cause, step::JOURNAL, &Record { unknown_to_engine: found.is_some(), ..record.clone() }).await?;
    match blocking_read(&record.bundle) {
        Some((body, _)) if !body.engine.is_null() => Ok(()),
        Some(_) => {
            let found = found.map_or_else(|| "what an earlier worker has found".to_owned(), |path| path.display().to_string());
            Err(Error::Taken { id: record.id.clone(), found })
        }
        None => Err(Error::Io { op: "read", path: path(&record.bundle), source: std::io::ErrorKind::InvalidData.into() }),
    }
}

/// Has the keeper write the journal with the current record.
pub(super) async fn write(shared: &Shared, cause: &Cause, at: Step, record: &Record) -> Result<(), Error> {
    let body = JournalBody {
        version: VERSION,
        namespace: shared.settings.namespace.clone(),
        id: record.id.to_string(),
        bundle: record.bundle.clone(),
        rootfs: record.mounted.clone(),
        keeper: shared.keeper.get(),
        cause: cause.number(),
        control_path: shared.settings.control_path.clone(),
        engine: if record.unknown_to_engine { Value::Null } else { serde_json::to_value(record.engine.for_cleanup()).unwrap_or_default() },
        shared_pid_namespace: record.shared_pid_namespace,
        cgroup: serde_json::to_value(&record.cgroup).unwrap_or_default(),
        init: record.init.pid.and_then(ProcessIdentity::of),
    };
    let path = path(&record.bundle).to_string_lossy().into_owned();
    cause.perform(at, Op::WriteJournal { path, body: body.encode() }).await
}
