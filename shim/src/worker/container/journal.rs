//! What the worker has the keeper write into a container's journal.
use std::path::{Path, PathBuf};

use super::Record;
use crate::handover::{Op, Step};
use crate::journal::FILE_NAME;
use crate::journal_body::{JournalBody, ProcessIdentity, VERSION};
use crate::worker::Worker;
use crate::worker::cause::Cause;
use crate::worker::error::Error;

/// Where the journal of the container in `bundle` is.
pub(in crate::worker) fn path(bundle: &Path) -> PathBuf {
    bundle.join(FILE_NAME)
}

/// Has the journal written with all that is known by now.
pub(super) async fn write(worker: &Worker, cause: &Cause, at: Step, record: &Record) -> Result<(), Error> {
    let body = JournalBody {
        version: VERSION,
        namespace: worker.settings.namespace.clone(),
        id: record.id.to_string(),
        bundle: record.bundle.clone(),
        rootfs: record.mounted.clone(),
        keeper: worker.keeper.get(),
        control_path: worker.settings.control_path.clone(),
        engine: serde_json::to_value(&record.engine).unwrap_or_default(),
        shared_pid_namespace: record.shared_pid_namespace,
        cgroup: serde_json::to_value(&record.cgroup).unwrap_or_default(),
        init: record.init.pid.and_then(ProcessIdentity::of),
    };
    let path = path(&record.bundle).to_string_lossy().into_owned();
    cause.perform(at, Op::WriteJournal { path, body: body.encode() }).await
}
