//! Create: makes a container, its init stopped before the user's program.
use std::path::{Path, PathBuf};

use serde::Deserialize;
use x_engine::plan;

use super::choose::{Begun, Chosen, blocking_choose};
use super::execs::Execs;
use super::kill::kill_unclaimed;
use super::streams::Plan;
use super::verb::run_verb;
use super::{Change, Container, Event, EventKind, Process, Record, Reply, Shared, Streams, journal, native};
use crate::cgroup::Cgroup;
use crate::engine::{self, CommandEngine, Engine, EngineError, Verb};
use crate::handover::Spawn;
use crate::options::RuntimeOptions;
use crate::rootfs::{self, Mount, Unmount};
use crate::whole_file::blocking_replace;
use crate::worker::cause::{Cause, step};
use crate::worker::error::Error;
use crate::worker::id::{ContainerId, ProcessKey};
use crate::worker::pod::{self, PodChange};
use crate::worker::spec::Spec;

/// The request.
#[derive(Debug, Clone)]
pub(in crate::worker) struct CreateCall {
    pub(in crate::worker) id: String,
    pub(in crate::worker) bundle: PathBuf,
    pub(in crate::worker) mounts: Vec<Mount>,
    pub(in crate::worker) stdio: Streams,
    /// Files of a checkpoint to make the container from; empty for none.
    pub(in crate::worker) checkpoint: String,
    pub(in crate::worker) options: RuntimeOptions,
}

/// Makes a container.
pub(in crate::worker) async fn create(shared: &Shared, cause: &Cause, call: CreateCall) -> Result<Change, Error> {
    let id = ContainerId::new(&call.id)?;
    // Held until the change is applied or dropped: a second Create of this id is refused, and the shim does not exit.
    let _reservation = shared.registry.reserve(&id)?;
    let is_of_pod = pod::blocking_join(shared, &id, &call.bundle)?;
    let mut draft = Draft::new(shared, cause, id, &call)?;
    draft.is_of_pod = is_of_pod;
    match draft.make(shared, cause, &call).await {
        Ok(()) => {}
        Err(error) => {
            draft.undo(shared, cause, &error).await;
            return Ok(Change { releases: vec![draft.key], ..Change::refuse(error) });
        }
    }
    let Draft { record, key, .. } = draft;
    let (bundle, pid) = (record.bundle.clone(), record.init.pid);
    let container = Container::new(record);
    drop(container.record_mut()); // marks every entry as unsaved
    let created = EventKind::Created { bundle, mounts: call.mounts, stdio: call.stdio, checkpoint: call.checkpoint, pid };
    let event = Event::new(&container, created);
    let pod = PodChange { save: is_of_pod, ..PodChange::default() };
    Ok(Change { pod, claim: pid.map(|pid| (key, pid)), ..Change::save(&container, Reply::Pid(pid)) }.event(event))
}

/// A container being created, and the progress so far.
struct Draft {
    key: ProcessKey,
    record: Record,
    spec: Spec,
    streams: Plan,
    /// Of the native engine.
    plan: Option<Box<plan::Create>>,
    engine_was_asked: bool,
    /// Its journal is kept with the pod too.
    is_of_pod: bool,
}

impl Draft {
    /// Checks all that can be checked without changing anything.
    fn new(shared: &Shared, cause: &Cause, id: ContainerId, call: &CreateCall) -> Result<Self, Error> {
        let bundle = call.bundle.clone();
        if !bundle.is_absolute() {
            return Err(Error::Value { what: "bundle", value: bundle.display().to_string() });
        }
        let (spec, config) = Spec::blocking_read(&bundle)?;
        let options = call.options.clone();
        for key in &options.unknown_keys {
            log::warn!(container:% = id, key:%; "unknown option");
        }
        if spec.names_unit && !options.systemd_cgroup {
            log::warn!(container:% = id; "cgroupsPath names a systemd unit, but the option SystemdCgroup is not set: the container runs outside its slice");
        }
        let key = ProcessKey::init(&id);
        let begun = match journal::blocking_read(&bundle) {
            // Another running shim owns the container and writes into the bundle.
            Some((body, None)) if body.keeper != shared.keeper.get() && body.keeper.is_running() => return Err(Error::Exists { id }),
            // An earlier worker has begun with this Create: its engine and its place for the root go on, whatever this worker would choose.
            Some((body, None)) if body.keeper == shared.keeper.get() && body.cause == cause.number() => {
                Engine::deserialize(&body.engine).ok().map(|engine| Begun { engine, mounts_on_host: body.rootfs.is_some() })
            }
            _ => None,
        };
        let Chosen { engine, plan } = blocking_choose(shared, &id, call, &config, begun)?;
        let is_in_container = plan.as_ref().is_some_and(|plan| !plan.root_mounts.is_empty());
        let restore = (!call.checkpoint.is_empty()).then(|| PathBuf::from(&call.checkpoint));
        let record = Record {
            version: Record::version_for(&engine),
            mounted: (!call.mounts.is_empty() && !is_in_container).then(|| spec.rootfs.clone()),
            rootfs: spec.rootfs.clone(),
            engine,
            options,
            shared_pid_namespace: spec.shared_pid_namespace,
            cgroup: Cgroup::default(),
            oom_kills: 0,
            unknown_to_engine: true,
            restore,
            init: Process::new(call.stdio.clone()),
            execs: Execs::default(),
            id,
            bundle,
        };
        let streams = Plan::blocking_read(&key, &call.stdio, &record)?;
        // The TaskCreate event repeats them.
        let mounts = call.mounts.iter().flat_map(|mount| mount.options.iter().chain([&mount.kind, &mount.source, &mount.target]));
        record.check_size(mounts.map(String::len).sum())?;
        Ok(Self { key, record, spec, streams, plan, engine_was_asked: false, is_of_pod: false })
    }

    async fn make(&mut self, shared: &Shared, cause: &Cause, call: &CreateCall) -> Result<(), Error> {
        match &self.record.restore {
            // Start takes it.
            Some(_) => journal::write(shared, cause, step::JOURNAL, &self.record).await?,
            None => journal::take_id(shared, cause, &self.record).await?,
        }
        if self.is_of_pod {
            pod::blocking_keep_journal(shared, &self.record.id, &journal::path(&self.record.bundle))?;
        }
        blocking_write_address(&self.record.bundle, &shared.settings.shim_address)?;
        if let Some(path) = self.record.restore.clone() {
            blocking(move || match path.metadata() {
                Ok(_) => Ok(()),
                Err(source) => Err(Error::Io { op: "open checkpoint", path, source }),
            })
            .await?;
        }
        if !call.mounts.is_empty() {
            let target = self.record.rootfs.clone();
            let mounts = if self.record.mounted.is_some() { call.mounts.clone() } else { Vec::new() };
            blocking(move || {
                std::fs::create_dir_all(&target).map_err(|source| Error::Io { op: "make folder", path: target.clone(), source })?;
                rootfs::blocking_mount_all(&target, &mounts).map_err(Error::from)
            })
            .await?;
        }
        self.spec.blocking_check_rootfs()?;
        self.streams.open(shared, cause).await?;
        if self.record.restore.is_some() {
            return Ok(());
        }
        self.engine_was_asked = true;
        let pid = match (&self.record.engine, &self.plan) {
            (Engine::Native(_), Some(plan)) => native::create(shared, cause, &self.key, plan).await?,
            (Engine::Native(_), None) => return Err(Error::Outcome { doing: "plan the container" }),
            (Engine::Command(engine), _) => {
                let files = ProcessFiles::new(shared, cause, &self.record, &self.key);
                let create = engine::Create {
                    pid_file: &files.pid_file,
                    console_socket: self.record.init.stdio.terminal.then_some(&files.console_socket),
                    stdio_key: &self.key.to_string(),
                };
                let pid = files.run(cause, engine.create(&at(&self.record), &create), engine, Verb::Create).await?;
                self.record.init.files.push(files.pid_file);
                pid
            }
        };
        self.record.unknown_to_engine = false;
        self.record.init.pid = Some(pid);
        find_cgroup(&mut self.record, pid);
        journal::write(shared, cause, step::JOURNAL_AGAIN, &self.record).await
    }

    /// Undoes the Create. Failures are logged: the client gets the error that led here.
    async fn undo(&mut self, shared: &Shared, cause: &Cause, why: &Error) {
        let container = &self.record.id;
        if self.engine_was_asked {
            undo_engine(shared, cause, &self.record, why).await;
        }
        if let Some(target) = self.record.mounted.clone()
            && let Err(error) = unmount(target, Unmount::Detach).await
        {
            log::warn!(container:%, error:% = error.chain(); "cannot unmount the root filesystem after a failed Create");
        }
        log::debug!(container:%, keeper = shared.keeper.get().pid; "creation undone");
    }
}

/// Has the engine remove what a Create or a restore has made, unless the id belongs to another container.
pub(super) async fn undo_engine(shared: &Shared, cause: &Cause, record: &Record, why: &Error) {
    let container = &record.id;
    let is_taken = matches!(why, Error::Engine(EngineError::Exists { .. }));
    let undone = match &record.engine {
        _ if is_taken => disown(shared, cause, record).await,
        // A performer that has reported a failure has removed everything; one that could not be forked has made nothing.
        Engine::Native(_) if matches!(why, Error::Engine(_) | Error::TooMuch { .. } | Error::NotPerformed { .. }) => Ok(()),
        Engine::Native(engine) => native::undo(engine, &ProcessKey::init(&record.id)).await,
        Engine::Command(engine) if is_of_another(cause, engine, record).await => disown(shared, cause, record).await,
        Engine::Command(engine) => {
            let spawn = engine.delete(&at(record), true);
            run_verb(cause, step::UNDO, engine, Verb::Delete, spawn).await.map(drop)
        }
    };
    match undone {
        Ok(()) | Err(Error::Engine(EngineError::NoContainer { .. })) => {}
        Err(error) => log::warn!(container:%, error:% = error.chain(); "cannot remove the container after a failed Create"),
    }
}

/// Another created a container of this id since it was found free. The command `delete` must not touch it either.
async fn disown(shared: &Shared, cause: &Cause, record: &Record) -> Result<(), Error> {
    journal::write(shared, cause, step::JOURNAL_AGAIN, &Record { unknown_to_engine: true, ..record.clone() }).await
}

/// Whether the engine's container of this id is of another bundle. Runtimes report a taken id in many ways.
async fn is_of_another(cause: &Cause, engine: &CommandEngine, record: &Record) -> bool {
    match cause.run(step::ENGINE_STATE, engine.state(&at(record))).await {
        Ok(exited) => engine.blocking_is_in_bundle(&at(record), &exited) == Some(false),
        Err(error) => {
            log::debug!(container:% = record.id, error:% = error.chain(); "cannot ask the OCI runtime which bundle has the id");
            false
        }
    }
}

/// The files through which a runtime reports a process. Init's pid file has the name that wrappers of runtimes look for, the stock
/// shim's own; the others are named after the cause: one that another cause left behind cannot be mistaken.
pub(super) struct ProcessFiles {
    key: ProcessKey,
    pub(super) pid_file: PathBuf,
    pub(super) console_socket: PathBuf,
}

impl ProcessFiles {
    pub(super) fn new(shared: &Shared, cause: &Cause, record: &Record, key: &ProcessKey) -> Self {
        let folder = shared.settings.control_path.parent().unwrap_or(Path::new("/run"));
        Self {
            key: key.clone(),
            pid_file: record.bundle.join(if key.exec.is_none() { "init.pid".to_owned() } else { format!("x-{}.pid", cause.number()) }),
            // Short, whatever the bundle's path is: 108 bytes are all that a socket may have. All keepers share the folder.
            console_socket: folder.join(format!("c{}-{}", shared.keeper.get().pid, cause.number())),
        }
    }

    /// Runs a verb that leaves a process behind, and reads its pid.
    pub(super) async fn run(&self, cause: &Cause, spawn: Spawn, engine: &CommandEngine, verb: Verb) -> Result<u32, Error> {
        let wants_terminal = spawn.console_socket.is_some();
        let exited = run_verb(cause, step::ENGINE, engine, verb, spawn).await?;
        let path = self.pid_file.clone();
        let no_pid = |source| Error::NoPid { path: path.clone(), source };
        let text = std::fs::read_to_string(&path).map_err(no_pid)?;
        match text.trim().parse() {
            Ok(0) | Err(_) => Err(no_pid(std::io::ErrorKind::InvalidData.into())),
            Ok(pid) if wants_terminal && !exited.terminal => {
                kill_unclaimed(pid);
                Err(Error::NoTerminal { key: self.key.clone() })
            }
            Ok(pid) => Ok(pid),
        }
    }
}

/// The container, described for the engine.
pub(super) fn at(record: &Record) -> engine::Container<'_> {
    engine::Container { id: record.id.as_str(), bundle: &record.bundle }
}

/// Records the cgroup that the engine chose. Without a cgroup there are no metrics, but the container runs.
pub(super) fn find_cgroup(record: &mut Record, pid: u32) {
    match Cgroup::of_pid(pid) {
        Ok(cgroup) => {
            record.oom_kills = cgroup.oom_kills().unwrap_or(0);
            record.cgroup = cgroup;
        }
        Err(error) => log::warn!(container:% = record.id, pid, error:%; "cannot find the cgroup"),
    }
}

pub(super) async fn unmount(target: PathBuf, how: Unmount) -> Result<(), Error> {
    blocking(move || rootfs::blocking_unmount_all(&target, how).map_err(Error::from)).await
}

/// Does work that a slow disk can block, on a thread of its own.
pub(in crate::worker) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// Writes the file from which containerd reads the shim's address: not every protocol runs `start` for a container that joins
/// a shim.
fn blocking_write_address(bundle: &Path, address: &str) -> Result<(), Error> {
    let path = bundle.join("address");
    blocking_replace(&path, address.as_bytes(), 0o644).map_err(|source| Error::Io { op: "write", path, source })
}
