//! The calls that change an existing container: pause, resume, checkpoint, update, and those on a terminal and stdin.
use std::path::PathBuf;
use std::rc::Rc;

use super::create::{at, blocking};
use super::verb::{CriuWork, blocking_add_criu_errors, run_verb};
use super::{Change, Container, Event, EventKind, Reply, Shared, Target, native};
use crate::engine::{self, CommandEngine, Engine, Verb};
use crate::handover::{Op, Spawn};
use crate::options::CheckpointOptions;
use crate::whole_file::blocking_replace;
use crate::worker::cause::{Cause, step};
use crate::worker::error::Error;
use crate::worker::id::ProcessKey;
use crate::worker::phase::{Announce, Fact, Request};

/// The request.
#[derive(Debug, Clone)]
pub(in crate::worker) struct CheckpointCall {
    pub(in crate::worker) id: String,
    pub(in crate::worker) path: String,
    pub(in crate::worker) options: CheckpointOptions,
}

/// The request.
#[derive(Debug, Clone)]
pub(in crate::worker) struct UpdateCall {
    pub(in crate::worker) id: String,
    /// A `LinuxResources` of the runtime specification as JSON.
    pub(in crate::worker) resources: Option<Vec<u8>>,
}

/// Freezes all processes of a container.
pub(in crate::worker) async fn pause(shared: &Shared, cause: &Cause, id: String) -> Result<Change, Error> {
    let container = shared.registry.get(&id)?;
    let key = ProcessKey::init(&container.id);
    container.admit(&key, Request::Pause)?;
    match container.engine() {
        Engine::Native(engine) => native::pause(&engine).await?,
        Engine::Command(engine) => run(cause, &container, &engine, Verb::Pause, |at| engine.pause(at)).await?,
    }
    let announcements = container.observe(&key, Fact::Paused);
    Ok(announced(&container, announcements))
}

/// Thaws all processes of a container.
pub(in crate::worker) async fn resume(shared: &Shared, cause: &Cause, id: String) -> Result<Change, Error> {
    let container = shared.registry.get(&id)?;
    let key = ProcessKey::init(&container.id);
    container.admit(&key, Request::Resume)?;
    match container.engine() {
        Engine::Native(engine) => native::resume(&engine).await?,
        Engine::Command(engine) => run(cause, &container, &engine, Verb::Resume, |at| engine.resume(at)).await?,
    }
    let announcements = container.observe(&key, Fact::Resumed);
    Ok(announced(&container, announcements))
}

/// Writes the state of a container's processes into files.
pub(in crate::worker) async fn checkpoint(shared: &Shared, cause: &Cause, call: CheckpointCall) -> Result<Change, Error> {
    let container = shared.registry.get(&call.id)?;
    let key = ProcessKey::init(&container.id);
    let options = call.options;
    let mut refusal = container.admit(&key, Request::Checkpoint).err();
    // Requested in any case: an earlier worker may have made the checkpoint, and the container exited with it.
    let may_be_done = options.exit && container.process(&key, |process| process.exit().is_some())?;
    if let Some(refusal) = refusal.take_if(|_| !may_be_done) {
        return Err(refusal);
    }
    let _turn = container.take_checkpoint()?;
    let record = container.record().clone();
    let named = (!call.path.is_empty()).then(|| PathBuf::from(&call.path));
    let image_path = options.image_path.clone().or(named).or_else(|| record.options.criu_image_path.clone());
    let Some(image_path) = image_path.filter(|path| path.is_absolute()) else {
        return Err(Error::Value { what: "path of a checkpoint", value: call.path });
    };
    let work = CriuWork::new(&record, options.work_path.as_deref());
    let folders = [image_path.clone(), work.path.clone()];
    blocking(move || {
        let make =
            |folder: PathBuf| std::fs::create_dir_all(&folder).map_err(|source| Error::Io { op: "make folder", path: folder, source });
        folders.into_iter().try_for_each(make)
    })
    .await?;
    let checkpoint = engine::Checkpoint { image_path: &image_path, work_path: &work.path, exit: options.exit, options: &options.criu };
    let made = match &record.engine {
        Engine::Command(engine) => run(cause, &container, engine, Verb::Checkpoint, |at| engine.checkpoint(at, &checkpoint)).await,
        Engine::Native(engine) => native::checkpoint(shared, cause, &container, (&record, engine), &checkpoint).await,
    };
    made.map_err(|error| refusal.unwrap_or_else(|| blocking_add_criu_errors(error, &work.path)))?;
    work.blocking_remove();
    let path = image_path.display().to_string();
    Ok(Change::reply(Reply::Empty).event(Event::new(&container, EventKind::Checkpointed { path })))
}

/// The right to save a container's processes; one at a time.
struct Saving(Rc<Container>);

impl Drop for Saving {
    fn drop(&mut self) {
        self.0.saving.set(false);
    }
}

impl Container {
    fn take_checkpoint(self: &Rc<Self>) -> Result<Saving, Error> {
        if self.saving.replace(true) {
            return Err(Error::Saving { id: self.id.clone() });
        }
        Ok(Saving(Rc::clone(self)))
    }
}

/// Changes limits.
pub(in crate::worker) async fn update(shared: &Shared, cause: &Cause, call: UpdateCall) -> Result<Change, Error> {
    let container = shared.registry.get(&call.id)?;
    container.admit(&ProcessKey::init(&container.id), Request::Update)?;
    if let Some(resources) = call.resources {
        let valid: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&resources).map_err(|source| Error::Json { method: "Update", source })?;
        drop(valid);
        match container.engine() {
            Engine::Native(engine) => native::update(&container, &engine, &resources).await?,
            Engine::Command(engine) => update_by_runtime(cause, &container, &engine, &resources).await?,
        }
    }
    Ok(Change::reply(Reply::Empty))
}

async fn update_by_runtime(cause: &Cause, container: &Rc<Container>, engine: &CommandEngine, resources: &[u8]) -> Result<(), Error> {
    let file = container.record().bundle.join(format!("x-{}.resources", cause.number()));
    // A runtime that an earlier worker started may be reading it.
    blocking_replace(&file, resources, 0o600).map_err(|source| Error::Io { op: "write", path: file.clone(), source })?;
    let result = run(cause, container, engine, Verb::Update, |at| engine.update(at, &file)).await;
    // A replay would write it again.
    if let Err(error) = std::fs::remove_file(&file) {
        log::debug!(container:% = container.id, error:%; "cannot remove the resources file");
    }
    result
}

/// Sets the size of a terminal, now or as soon as it exists. A process without a terminal needs nothing.
pub(in crate::worker) async fn resize(shared: &Shared, cause: &Cause, target: Target, rows: u16, columns: u16) -> Result<Change, Error> {
    let container = shared.registry.get(&target.id)?;
    let key = container.key(&target.exec)?;
    if !container.process(&key, |process| process.stdio.terminal && process.exit().is_none())? {
        return Ok(Change::reply(Reply::Empty));
    }
    container.update(&key, |process| process.size = Some((rows, columns)));
    match cause.perform(step::RESIZE, Op::Resize { key: key.to_string(), rows, columns }).await {
        Ok(()) => {}
        // Its streams are not open yet, or closed already.
        Err(Error::Keeper { source, .. }) if is_absent(&source) => {}
        Err(error) => return Err(error),
    }
    Ok(Change::save(&container, Reply::Empty))
}

/// The client will write no more to stdin.
pub(in crate::worker) async fn close_io(shared: &Shared, cause: &Cause, target: Target, stdin: bool) -> Result<Change, Error> {
    let container = shared.registry.get(&target.id)?;
    let key = container.key(&target.exec)?;
    if !stdin {
        return Ok(Change::reply(Reply::Empty));
    }
    container.update(&key, |process| process.stdin_closed = true);
    cause.perform(step::CLOSE_STDIN, Op::CloseStdin { key: key.to_string() }).await?;
    Ok(Change::save(&container, Reply::Empty))
}

/// Runs a verb of an OCI runtime that leaves no process behind.
async fn run(
    cause: &Cause,
    container: &Rc<Container>,
    engine: &CommandEngine,
    verb: Verb,
    build: impl FnOnce(&engine::Container<'_>) -> Spawn,
) -> Result<(), Error> {
    let spawn = build(&at(&container.record()));
    run_verb(cause, step::ENGINE, engine, verb, spawn).await.map(drop)
}

fn announced(container: &Rc<Container>, announcements: &[Announce]) -> Change {
    let mut change = Change::save(container, Reply::Empty);
    for announce in announcements {
        let kind = match announce {
            Announce::Pause => EventKind::Paused,
            Announce::Resume => EventKind::Resumed,
            // Published by Start and by exits.
            Announce::Start | Announce::Exit => continue,
        };
        change = change.event(Event::new(container, kind));
    }
    change
}

fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(nix::libc::ENOTTY | nix::libc::ENOENT))
}
