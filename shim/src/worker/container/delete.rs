//! Delete: removes an exited process, and with init the container.
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use super::create::{at, unmount};
use super::exits::FLUSH_WITHIN;
use super::kill::kill_rest;
use super::verb::run_verb;
use super::{Change, Container, Deleted, Event, EventKind, Process, Record, Reply, Shared, Target, journal, native};
use crate::engine::{CommandEngine, Engine, EngineError, Verb};
use crate::handover::{Op, Step};
use crate::rootfs::Unmount;
use crate::worker::cause::{Cause, step};
use crate::worker::error::Error;
use crate::worker::id::{ContainerId, ProcessKey};
use crate::worker::phase::{Exit, Phase, Request};

/// Deletes a process at a client's request. A running one is refused.
pub(in crate::worker) async fn delete(shared: &Shared, cause: &Cause, target: Target) -> Result<Change, Error> {
    let container = match shared.registry.get(&target.id) {
        Ok(container) => container,
        Err(error @ Error::SetAside { .. }) => return Err(error),
        Err(error) => {
            let is_init = target.exec.is_empty();
            let deleted = is_init.then(|| from_journal(shared, &target.id)).flatten().ok_or(error)?;
            return Ok(Change::reply(Reply::Deleted(deleted)));
        }
    };
    let key = container.key(&target.exec)?;
    if key.exec.is_some() {
        return delete_added(cause, &container, &key).await;
    }
    // Before it takes the turn, for which the command `delete` waits.
    if container.process(&key, Process::exit)?.is_some() {
        drain(cause, &container, &key).await;
    }
    if let Some(deleted) = container.deleted_by_another(DELETE_WITHIN).await? {
        return Ok(Change::reply(Reply::Deleted(deleted)));
    }
    container.admit(&key, Request::Delete)?;
    let _turn = container.take_turn();
    remove(cause, &container, Thoroughness::OrTellWhy).await
}

/// Deletes a container for the command `delete`, by force.
pub(in crate::worker) async fn delete_for_command(shared: &Shared, cause: &Cause, id: String) -> Result<Change, Error> {
    if shared.registry.is_being_created(&id) {
        // The client has gone, and a runtime that hangs would never exit by itself.
        cause.perform(step::END_HELPERS, Op::EndHelpers { key: id.clone() }).await?;
    }
    shared.registry.until_created(&id, KILL_WITHIN).await;
    let container = match shared.registry.get(&id) {
        Ok(container) => container,
        // The command cleans up without the shim.
        Err(error @ Error::SetAside { .. }) => return Err(error),
        Err(error) => {
            let reply = from_journal(shared, &id).map(Reply::DeletedForCommand).ok_or(error);
            // The Create that was under way has failed.
            let releases = ContainerId::new(&id).map(|id| ProcessKey::init(&id)).into_iter().collect();
            return Ok(Change { reply: Some(reply), releases, leave: shared.registry.is_empty(), ..Change::default() });
        }
    };
    if let Some(deleted) = container.deleted_by_another(KILL_WITHIN).await? {
        return Ok(Change::reply(Reply::DeletedForCommand(deleted)));
    }
    let _turn = container.take_turn();
    kill_for_good(cause, &container).await;
    until_ended(&container).await?;
    let mut change = remove(cause, &container, Thoroughness::Whatever).await?;
    if let Some(Ok(Reply::Deleted(deleted))) = change.reply {
        change.reply = Some(Ok(Reply::DeletedForCommand(deleted)));
    }
    change.leave = shared.registry.count() == 1;
    Ok(change)
}

/// Sends SIGKILL to every process of a container that runs.
pub(in crate::worker) async fn kill_for_good(cause: &Cause, container: &Rc<Container>) {
    if is_alive(&container.record()) {
        kill_init(cause, container, &ProcessKey::init(&container.id)).await;
        kill_rest(cause, container).await;
    }
}

/// Waits for the exit of a container that was killed.
///
/// Errors: it takes too long.
pub(in crate::worker) async fn until_ended(container: &Rc<Container>) -> Result<(), Error> {
    container.until("exit of init", KILL_WITHIN, |record| !is_alive(record)).await
}

fn is_alive(record: &Record) -> bool {
    record.init.exit().is_none() && record.init.pid.is_some()
}

/// Whether a removal stops at a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Thoroughness {
    /// It does: the client can try again.
    OrTellWhy,
    /// It does not: there is no next time.
    Whatever,
}

async fn remove(cause: &Cause, container: &Rc<Container>, how: Thoroughness) -> Result<Change, Error> {
    let key = ProcessKey::init(&container.id);
    if container.phase(&key)? == Phase::Created && container.record().init.pid.is_some() {
        kill_init(cause, container, &key).await;
        container.until("exit of init", KILL_WITHIN, |record| record.init.exit().is_some()).await?;
    }
    if !container.record().unknown_to_engine {
        match (engine_delete(cause, container).await, how) {
            (Ok(()), _) => container.record_mut().unknown_to_engine = true,
            (Err(error), Thoroughness::OrTellWhy) => return Err(error),
            // The command cleans up without it.
            (Err(error @ Error::Engine(EngineError::Gone { .. })), Thoroughness::Whatever) => return Err(error),
            (Err(error), Thoroughness::Whatever) => {
                log::warn!(container:% = container.id, error:% = error.chain(); "OCI runtime cannot delete the container");
            }
        }
    }
    container.flush_pumps().await;
    let mounted = container.record().mounted.clone();
    if let Some(target) = mounted {
        let flag = if how == Thoroughness::Whatever { Unmount::Detach } else { Unmount::Clean };
        match (unmount(target, flag).await, how) {
            (Ok(()), _) => {}
            // Saved: the next attempt starts after this step.
            (Err(error), Thoroughness::OrTellWhy) => return Ok(Change { save: Some(Rc::clone(container)), ..Change::refuse(error) }),
            (Err(error), Thoroughness::Whatever) => {
                log::warn!(container:% = container.id, error:% = error.chain(); "cannot unmount the root filesystem");
            }
        }
    }
    container.end_pumps().await;
    let record = container.record();
    let deleted = Deleted::of(&record.init);
    container.deleted.set(Some(deleted));
    let wakes = record.keys().into_iter().filter_map(|key| Some((record.process(&key)?.exit(), key)));
    let wakes = wakes.map(|(exit, key)| (key.clone(), exit.ok_or_else(|| super::gone(&key)))).collect();
    let releases = record.keys();
    drop(record);
    for key in &releases {
        container.update(key, Process::blocking_remove_files);
    }
    log::info!(container:% = container.id; "container deleted");
    Ok(Change {
        remove: Some(Rc::clone(container)),
        releases,
        wakes,
        ..Change::reply(Reply::Deleted(deleted)).event(Event::new(container, EventKind::Deleted(deleted)))
    })
}

async fn delete_added(cause: &Cause, container: &Rc<Container>, key: &ProcessKey) -> Result<Change, Error> {
    container.admit(key, Request::Delete)?;
    let deleted = container.process(key, Deleted::of)?;
    drain(cause, container, key).await;
    if let Some(pump) = container.pump_of(key) {
        pump.end(FLUSH_WITHIN).await;
    }
    let mut change = Change::reply(Reply::Deleted(deleted));
    // Another Delete of the process or its container may have been answered meanwhile.
    if container.deleted.get().is_none() && container.drop_added(key, &mut change).is_ok() {
        change.save = Some(Rc::clone(container));
    }
    Ok(change)
}

/// Waits, with a bound, until the client has taken the output of a process and its descendants: clients close their ends after Delete.
async fn drain(cause: &Cause, container: &Container, key: &ProcessKey) {
    if container.process(key, |process| process.stdio.are_none()).unwrap_or(true) {
        return;
    }
    if let Err(error) = cause.perform(step::DRAIN, Op::Drain { key: key.to_string() }).await {
        log::warn!(container:% = key, error:% = error.chain(); "cannot wait until the output is taken");
    }
}

fn blocking_is_folder(path: &Path) -> bool {
    path.is_dir()
}

/// Sends SIGKILL to init, and thaws it: on cgroup v1 a frozen process cannot exit, and others freeze containers too. That init is dead
/// already is a success.
async fn kill_init(cause: &Cause, container: &Rc<Container>, key: &ProcessKey) {
    if let Err(error) = cause.perform(step::SIGNAL, Op::Signal { key: key.to_string(), signal: nix::libc::SIGKILL }).await {
        log::debug!(container:% = container.id, error:% = error.chain(); "cannot kill init");
    }
    container.record().cgroup.thaw();
}

async fn engine_delete(cause: &Cause, container: &Rc<Container>) -> Result<(), Error> {
    let (engine, has_survivors) = {
        let record = container.record();
        (record.engine.clone(), record.shared_pid_namespace)
    };
    match &engine {
        Engine::Native(engine) => native::delete(cause, engine, &ProcessKey::init(&container.id), has_survivors).await,
        Engine::Command(engine) => runtime_delete(cause, engine, container).await,
    }
}

/// By force only after a failure: runc since 1.2 waits 100 ms for processes to die even where there are none.
async fn runtime_delete(cause: &Cause, engine: &CommandEngine, container: &Rc<Container>) -> Result<(), Error> {
    match runtime_delete_by(cause, step::ENGINE_DELETE, engine, container, false).await {
        Ok(()) => Ok(()),
        Err(error @ Error::Engine(EngineError::Gone { .. })) => Err(error),
        Err(error) => {
            log::debug!(container:% = container.id, error:% = error.chain(); "cannot delete the container, will retry by force");
            runtime_delete_by(cause, step::ENGINE_DELETE_BY_FORCE, engine, container, true).await
        }
    }
}

async fn runtime_delete_by(cause: &Cause, step: Step, engine: &CommandEngine, container: &Rc<Container>, force: bool) -> Result<(), Error> {
    let spawn = {
        let record = container.record();
        let mut spawn = engine.delete(&at(&record), force);
        // A containerd that has lost track of the container has removed the bundle, and no program can be started in it.
        if !blocking_is_folder(&record.bundle) {
            "/".clone_into(&mut spawn.cwd);
        }
        spawn
    };
    match run_verb(cause, step, engine, Verb::Delete, spawn).await {
        // After a checkpoint that ended the container, or a Delete whose answer was lost.
        Ok(_) | Err(Error::Engine(EngineError::NoContainer { .. })) => Ok(()),
        Err(error) => Err(error),
    }
}

/// The exit of a container that was deleted already: a client that timed out asks again. The journal stays in the
/// bundle until the client removes it.
fn from_journal(shared: &Shared, id: &str) -> Option<Deleted> {
    let id = ContainerId::new(id).ok()?;
    let of_pod = shared.pod.borrow().as_ref().and_then(|pod| pod.record().bundles.clone());
    let folder = of_pod.unwrap_or_else(|| shared.settings.bundle.parent().unwrap_or(Path::new("/")).to_owned());
    let bundle = folder.join(id.as_str());
    let (body, exit) = journal::blocking_read(&bundle)?;
    let exit = exit?;
    let is_ours = body.id == id.as_str() && body.keeper == shared.keeper.get() && body.init.is_some_and(|init| init.pid == exit.pid);
    is_ours.then_some(Deleted { pid: Some(exit.pid), exit: Some(Exit { status: exit.status, at_nanos: exit.at_nanos }) })
}

/// The right to delete a container's init; one at a time.
struct Turn(Rc<Container>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.deleting.set(false);
        self.0.changed.notify_waiters();
    }
}

impl Container {
    /// Drops an exec with everything that is held for it.
    fn drop_added(&self, key: &ProcessKey, change: &mut Change) -> Result<Process, Error> {
        let mut process = key.exec.as_ref().and_then(|exec| self.remove(exec)).ok_or_else(|| super::gone(key))?;
        process.blocking_remove_files();
        self.drop_pump(key);
        change.wakes.push((key.clone(), process.exit().ok_or_else(|| super::gone(key))));
        change.releases.push(key.clone());
        Ok(process)
    }

    /// Drops the oldest spent execs where there are too many: their client does not delete them.
    pub(super) fn drop_surplus(&self, change: &mut Change) {
        while let Some(exec) = { self.record().execs.surplus() } {
            let key = ProcessKey::exec(&self.id, &exec);
            if self.drop_added(&key, change).is_ok() {
                log::debug!(container:% = self.id, exec:% = exec; "dropping an exec that exited long ago and was never deleted");
            }
        }
    }

    fn take_turn(self: &Rc<Self>) -> Turn {
        self.deleting.set(true);
        Turn(Rc::clone(self))
    }

    /// Waits while another Delete is under way. Returns its result, or nothing if the caller may try.
    async fn deleted_by_another(&self, within: Duration) -> Result<Option<Deleted>, Error> {
        let waiting_for = format!("another Delete of container {}", self.id);
        let seconds = within.as_secs();
        tokio::time::timeout(within, self.other_delete()).await.map_err(|_| Error::TimedOut { waiting_for, seconds })
    }

    async fn other_delete(&self) -> Option<Deleted> {
        loop {
            let changed = self.changed.notified();
            if let Some(deleted) = self.deleted.get() {
                return Some(deleted);
            }
            if !self.deleting.get() {
                return None;
            }
            changed.await;
        }
    }

    pub(super) fn refuse_while_deleting(&self) -> Result<(), Error> {
        if self.deleting.get() { Err(Error::Deleting { id: self.id.clone() }) } else { Ok(()) }
    }
}

/// How long a process may take to exit after SIGKILL.
const KILL_WITHIN: Duration = Duration::from_secs(3);
/// How long one Delete waits for another: longer than the wait for outputs and a runtime's delete.
const DELETE_WITHIN: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delete_waits_for_another_with_a_deadline() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("it has what it needs");
        runtime.block_on(async {
            let container = Container::new(super::super::record::tests::record("c1"));
            assert_eq!(container.deleted_by_another(Duration::ZERO).await.ok(), Some(None));
            let turn = container.take_turn();
            let waiting = tokio::time::timeout(Duration::from_secs(20), container.deleted_by_another(Duration::ZERO));
            let error = waiting.await.expect("it has a deadline").expect_err("the other one is not done");
            assert_eq!(error.chain(), "another Delete of container c1 took longer than 0 s");
            drop(turn);
            assert_eq!(container.deleted_by_another(DELETE_WITHIN).await.ok(), Some(None));
            let turn = container.take_turn();
            let deleted = Deleted { pid: Some(7), exit: None };
            let (answer, ()) = tokio::join!(container.deleted_by_another(DELETE_WITHIN), async {
                container.deleted.set(Some(deleted));
                drop(turn);
            });
            assert_eq!(answer.ok(), Some(Some(deleted)));
        });
    }
}
