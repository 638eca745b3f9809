//! Start: runs the user's program, as a container's init or as an exec.
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::create::{ProcessFiles, at, blocking, find_cgroup, undo_engine};
use super::exits::START_WITHIN;
use super::streams::Plan;
use super::verb::{CriuWork, blocking_add_criu_errors, run_verb};
use super::{Change, Container, Event, EventKind, Record, Reply, Shared, Target, journal, native};
use crate::engine::{self, Engine, Verb};
use crate::handover::Op;
use crate::processes;
use crate::worker::cause::{Cause, step};
use crate::worker::error::Error;
use crate::worker::id::ProcessKey;
use crate::worker::phase::{Fact, Phase, Request};

/// Starts a process that was created or added.
pub(in crate::worker) async fn start(shared: &Shared, cause: &Cause, target: Target) -> Result<Change, Error> {
    let container = shared.registry.get(&target.id)?;
    let key = container.key(&target.exec)?;
    container.refuse_while_deleting()?;
    if let Some(pid) = started_by_another(&container, &key).await? {
        return Ok(Change::reply(Reply::Pid(Some(pid))));
    }
    container.admit(&key, Request::Start)?;
    if key.exec.is_some() {
        container.admit(&ProcessKey::init(&container.id), Request::StartExec)?;
    }
    container.observe(&key, Fact::StartAsked);
    let result = match &key.exec {
        Some(_) => shared.starts.in_turn(start_added(shared, cause, &container, &key)).await,
        None if container.record().restore.is_some() => restore(shared, cause, &container, &key).await,
        None => start_init(cause, &container).await,
    };
    match result {
        Ok(change) => Ok(change),
        Err(error) => {
            container.observe(&key, Fact::StartFailed);
            if key.exec.is_none() {
                return Ok(Change::refuse(error));
            }
            container.update(&key, |process| process.failed_at_nanos = Some(now_nanos()));
            // So that a client can start it again: an exec opens its streams at its start. Init keeps its streams.
            let mut change = Change { releases: vec![key], save: Some(Rc::clone(&container)), ..Change::refuse(error) };
            container.drop_surplus(&mut change);
            Ok(change)
        }
    }
}

/// Waits while another Start of the process is under way, and returns its pid if it succeeded: a client that timed out or was killed
/// asks again and gets the same answer.
async fn started_by_another(container: &Rc<Container>, key: &ProcessKey) -> Result<Option<u32>, Error> {
    let is_starting = |phase| matches!(phase, Phase::Starting { .. });
    if !is_starting(container.phase(key)?) {
        return Ok(None);
    }
    let ended = |record: &Record| record.process(key).is_none_or(|process| !is_starting(process.phase));
    container.until("start", START_WITHIN, ended).await?;
    container.process(key, |process| process.pid.filter(|_| process.phase != Phase::Created))
}

async fn start_init(cause: &Cause, container: &Rc<Container>) -> Result<Change, Error> {
    let key = ProcessKey::init(&container.id);
    let engine = container.engine();
    let pid = container.record().init.pid;
    match &engine {
        Engine::Native(engine) => native::start(cause, engine, &key, pid).await?,
        Engine::Command(engine) => {
            let spawn = engine.start(&at(&container.record()));
            run_verb(cause, step::ENGINE, engine, Verb::Start, spawn).await?;
        }
    }
    let pid = pid.unwrap_or(0);
    container.observe(&key, Fact::Started);
    Ok(Change::save(container, Reply::Pid(Some(pid))).event(Event::new(container, EventKind::Started { pid })))
}

/// Makes the container from a checkpoint, running.
async fn restore(shared: &Shared, cause: &Cause, container: &Rc<Container>, key: &ProcessKey) -> Result<Change, Error> {
    let record = container.record().clone();
    let files = ProcessFiles::new(shared, cause, &record, key);
    let work = CriuWork::new(&record, None);
    let folder = work.path.clone();
    blocking(move || std::fs::create_dir_all(&folder).map_err(|source| Error::Io { op: "make folder", path: folder, source })).await?;
    let restore = engine::Restore {
        image_path: record.restore.as_deref().unwrap_or(&record.bundle),
        work_path: &work.path,
        pid_file: &files.pid_file,
        console_socket: record.init.stdio.terminal.then_some(&files.console_socket),
        stdio_key: &key.to_string(),
        options: &record.options.restore,
    };
    journal::take_id(shared, cause, &record).await?;
    let restored = match &record.engine {
        Engine::Command(engine) => {
            let spawn = engine.restore(&at(&record), &restore);
            let pid = files.run(cause, spawn, engine, Verb::Restore).await;
            pid.map(|pid| Restored { pid, pid_file: Some(files.pid_file.clone()), engine: record.engine.clone() })
        }
        Engine::Native(_) => native::restore(shared, cause, &record, key, &restore).await.map(|(pid, engine)| Restored {
            pid,
            pid_file: None,
            engine: Engine::Native(engine),
        }),
    };
    let Restored { pid, pid_file, engine } = match restored {
        Ok(restored) => restored,
        Err(error) => {
            undo_engine(shared, cause, &record, &error).await;
            return Err(blocking_add_criu_errors(error, &work.path));
        }
    };
    work.blocking_remove();
    // Into a copy: what another request saves meanwhile must still name the checkpoint, for the replay of this one.
    let restored = |record: &mut Record| {
        find_cgroup(record, pid);
        record.init.pid = Some(pid);
        record.init.files.extend(pid_file.clone());
        record.engine = engine.clone();
        record.unknown_to_engine = false;
        record.restore = None;
    };
    let mut copy = container.record().clone();
    restored(&mut copy);
    // The container runs by now: without its pid in the journal, the engine still has it.
    if let Err(error) = journal::write(shared, cause, step::JOURNAL_AGAIN, &copy).await {
        log::warn!(container:% = container.id, error:% = error.chain(); "cannot write the journal");
    }
    restored(&mut container.record_mut());
    container.observe(key, Fact::Started);
    let change = Change { claim: Some((key.clone(), pid)), ..Change::save(container, Reply::Pid(Some(pid))) };
    Ok(change.event(Event::new(container, EventKind::Started { pid })))
}

/// A container that was restored.
struct Restored {
    pid: u32,
    pid_file: Option<PathBuf>,
    engine: Engine,
}

async fn start_added(shared: &Shared, cause: &Cause, container: &Rc<Container>, key: &ProcessKey) -> Result<Change, Error> {
    let (plan, size, stdin_closed) = {
        let record = container.record();
        let process = record.process(key).ok_or_else(|| super::gone(key))?;
        (Plan::blocking_read(key, &process.stdio, &record)?, process.size, process.stdin_closed)
    };
    plan.open(shared, cause).await?;
    let text = key.to_string();
    if let Some((rows, columns)) = size {
        cause.perform(step::RESIZE, Op::Resize { key: text.clone(), rows, columns }).await?;
    }
    if stdin_closed {
        cause.perform(step::CLOSE_STDIN, Op::CloseStdin { key: text.clone() }).await?;
    }
    let process_file = super::exec::process_file(&container.record().bundle, key);
    let engine = container.engine();
    let made = match &engine {
        Engine::Native(engine) => {
            let process = match std::fs::read(&process_file) {
                Ok(process) => Some(process),
                // An earlier worker has removed it: the process was made.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                Err(source) => return Err(Error::Io { op: "read", path: process_file, source }),
            };
            native::exec(shared, cause, engine, key, process.as_deref(), plan.is_terminal()).await.map(|pid| (pid, None))
        }
        Engine::Command(engine) => {
            let files = ProcessFiles::new(shared, cause, &container.record(), key);
            let exec = engine::Exec {
                process_file: &process_file,
                pid_file: &files.pid_file,
                console_socket: plan.is_terminal().then_some(&files.console_socket),
                stdio_key: &text,
            };
            let spawn = engine.exec(&at(&container.record()), &exec);
            files.run(cause, spawn, engine, Verb::Exec).await.map(|pid| (pid, Some(files.pid_file)))
        }
    };
    let (pid, pid_file) = match made {
        Ok(made) => made,
        Err(error) => {
            if matches!(error, Error::NoPid { .. } | Error::NoReport { .. }) {
                kill_unreported(shared, container).await;
            }
            return Err(error);
        }
    };
    container.update(key, |process| {
        process.pid = Some(pid);
        // A replay does not read the specification again, and the environment in it may hold secrets.
        process.blocking_remove_files();
        process.files.extend(pid_file);
    });
    container.observe(key, Fact::Started);
    let exec = key.exec.as_ref().map(ToString::to_string).unwrap_or_default();
    let change = Change { claim: Some((key.clone(), pid)), ..Change::save(container, Reply::Pid(Some(pid))) };
    Ok(change.event(Event::new(container, EventKind::ExecStarted { exec, pid })))
}

/// Kills the process that the OCI runtime has started without reporting its pid: no commit will claim it.
///
/// It is a child of the keeper in the container's cgroup that no record names, once no other start is under way. In a pid namespace that
/// is not the container's own, the container's orphans are children of the keeper too: there it is left, and the log says so.
async fn kill_unreported(shared: &Shared, container: &Rc<Container>) {
    container.searches.update(|count| count + 1);
    container.changed();
    let alone =
        container.until("end of the other starts", OTHER_STARTS_WITHIN, |record| record.execs.starting() <= container.searches.get());
    let is_alone = alone.await.is_ok();
    container.searches.update(|count| count - 1);
    let record = container.record();
    if !is_alone || record.shared_pid_namespace {
        log::error!(container:% = container.id; "a process that the OCI runtime has started without reporting its pid is left to itself");
        return;
    }
    let keeper = shared.keeper.get().pid;
    let known: Vec<u32> = record.keys().iter().filter_map(|key| record.process(key)?.pid).collect();
    for pid in record.cgroup.pids().into_iter().filter(|pid| !known.contains(pid)) {
        if processes::kill_child_of(keeper, pid) {
            log::warn!(container:% = container.id, pid; "killed a process that the OCI runtime has started without reporting its pid");
        }
    }
}

/// How long a search for an unreported process waits for the other starts of its container.
const OTHER_STARTS_WITHIN: Duration = Duration::from_secs(10);

fn now_nanos() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i64)
}
