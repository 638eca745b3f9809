//! Startup: finds the shims of the previous process, connects to them, and queries what happened meanwhile.
//!
//! All tasks are loaded concurrently: a shim that does not answer delays no other.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::{StateRequest, StateResponse, Status};
use log::{info, warn};

use super::bundle::Bundle;
use super::cleanup::Left;
use super::{AGAIN, Fact, LONGEST_PAUSE, Phase, Shim, Task, Tasks, Unanswered, log_fifo, mounts};
use crate::error::{Error, IoContext as _, Result};
use crate::name::{self, Namespace};
use crate::settings::Settings;
use crate::store::{Exit, Kind, ended, execs};

impl Tasks {
    /// Registers every task of the previous process and begins to load them; a client that uses one waits for it.
    ///
    /// Errors: when the tasks cannot be listed.
    pub(crate) async fn load(self: &Arc<Self>) -> Result<()> {
        let mut ended: HashMap<_, _> =
            self.store.recall(ended::list).await?.into_iter().map(|(kind, namespace, id, exit)| ((namespace, id), (kind, exit))).collect();
        let settings = self.settings.clone();
        let found = self.pool.run(move || Kind::ALL.map(|kind| found(&settings, kind)).into_iter().collect::<Result<Vec<_>>>()).await??;
        let mut loading = Vec::new();
        {
            let mut all = self.all();
            for task in found.into_iter().flatten() {
                let exit = ended.remove(&(task.namespace.to_string(), task.id.clone())).map(|(_kind, exit)| exit);
                all.insert(task.key(), Arc::clone(&task));
                loading.push((task, exit));
            }
            for ((namespace, id), (kind, exit)) in ended {
                let task = Task::new(&self.settings, kind, (Namespace::parse(&namespace)?, id), None, Phase::Ended(exit));
                all.insert(task.key(), task);
            }
        }
        info!(tasks = loading.len(); "looking for the shims of earlier tasks and sandboxes");
        for (task, exit) in loading {
            tokio::spawn(Arc::clone(self).load_one(task, exit));
        }
        Ok(())
    }

    async fn load_one(self: Arc<Self>, task: Arc<Task>, ended: Option<Exit>) {
        // an error means that another process has taken over and loads the task
        let _ = self.find_shim(&task, ended).await;
    }

    async fn find_shim(self: &Arc<Self>, task: &Arc<Task>, ended: Option<Exit>) -> Result<()> {
        // wait until this process serves
        drop(self.gate.enter().await?);
        let claim = self.claim(task).await?;
        if let Some(exit) = ended {
            // cleaned up, or deleted by its shim, except for its bundle
            if let Ok(Some(address)) = task.bundle.address()
                && let Ok(shim) = Shim::connect(&address, &task.namespace).await
            {
                self.dismiss_gracefully(task, &shim).await;
            }
            let _pass = self.gate.enter().await?;
            self.publish_exit(task, "", exit).await;
            self.remove_bundle(task).await;
            task.observe(Fact::CleanedUp(exit));
            return Ok(());
        }
        let mut pause = AGAIN;
        let shim = loop {
            match Self::reach(task).await {
                Ok(Found::Nothing) => {
                    // nothing was ever started for it
                    self.remove_bundle(task).await;
                    self.forget(task);
                    return Ok(());
                }
                Ok(Found::NoAddress) => {
                    task.observe(Fact::ShimGone);
                    let published = self.published_exit(task).await;
                    let left = if published.is_some() { Left::Unacknowledged(published) } else { Left::Unstarted };
                    self.clean_up(task, left, claim).await;
                    return Ok(());
                }
                Ok(Found::Shim(shim)) => break Ok(shim),
                Err(error @ Error::ShimDead { .. }) => match may_be_known(task) {
                    Ok(true) => break Err((error, Left::Dead)),
                    // the previous process was killed before the program had answered, and the shim with it
                    Ok(false) => break Err((error, Left::Unstarted)),
                    Err(unreadable) => warn!(container = task.id.as_str(), error = unreadable.chain(); "cannot read a bundle, will retry"),
                },
                Err(error) => {
                    warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot reach a shim, which may be running; will retry");
                    task.observe(Fact::Unreachable(error.chain().into()));
                }
            }
            self.pause(pause).await?;
            pause = (pause * 2).min(LONGEST_PAUSE);
        };
        if let Err(error) = log_fifo::copy(task.bundle.path()) {
            warn!(container = task.id.as_str(), error = error.chain(); "cannot read the log of a shim");
        }
        match shim {
            // no client knows of it: its creation was not acknowledged
            Ok(shim) if task.kind == Kind::Sandbox && !task.bundle.was_created().unwrap_or(true) => {
                task.observe(Fact::ShimGone);
                self.dismiss(task, &shim).await;
                drop(shim);
                self.clean_up(task, Left::Unacknowledged(None), claim).await;
            }
            Ok(shim) => {
                task.observe(Fact::Connected(shim.clone()));
                drop(claim);
                tokio::spawn(Arc::clone(self).watch(Arc::clone(task), shim.clone()));
                match task.kind {
                    Kind::Task => self.reconcile(task, &shim).await,
                    Kind::Sandbox => self.reconcile_sandbox(task, &shim).await,
                }
            }
            Err((error, left)) => {
                warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "a shim is dead");
                task.observe(Fact::ShimGone);
                self.clean_up(task, left, claim).await;
            }
        }
        Ok(())
    }

    async fn reach(task: &Task) -> Result<Found> {
        if task.bundle.program()?.is_none() {
            return Ok(Found::Nothing);
        }
        match task.bundle.address()? {
            Some(address) => Shim::connect(&address, &task.namespace).await.map(Found::Shim),
            None => Ok(Found::NoAddress),
        }
    }

    /// Queries the shim until it answers whether it has the task, and which of its processes have exited.
    async fn reconcile(self: &Arc<Self>, task: &Arc<Task>, shim: &Shim) {
        let mut pause = AGAIN;
        let mut again = async || {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        };
        let mut unknown = loop {
            let (namespace, id) = (task.namespace.clone(), task.id.clone());
            match self.store.recall(move |db| execs::list(db, namespace.as_str(), &id)).await {
                Ok(execs) => break execs,
                Err(error) => {
                    warn!(namespace:% = task.namespace, container = task.id.as_str(), error = error.chain(); "cannot read which processes a task has");
                }
            }
            again().await;
        };
        // init's exit is published last
        unknown.push(String::new());
        loop {
            let (mut exited, mut unanswered) = (Vec::new(), Vec::new());
            for exec in unknown {
                match state(task, shim, &exec).await {
                    Ok(state) => exited.extend(exit_of(&state).map(|exit| (exec, exit))),
                    Err(reason) if reason.is_not_found() && exec.is_empty() => {
                        // otherwise a client's Delete, or the end of the shim, was faster
                        if task.observe(Fact::ShimGone) {
                            self.sweep(task, shim).await;
                        }
                        return;
                    }
                    Err(reason) if reason.is_not_found() => {}
                    Err(Unanswered::Lost) => return,
                    Err(Unanswered::Refused(error) | Unanswered::Late(error)) => {
                        warn!(namespace:% = task.namespace, container = task.id.as_str(), exec = exec.as_str(), error = error.chain(); "a shim does not report the state of its task");
                        unanswered.push(exec);
                    }
                }
            }
            if !exited.is_empty() {
                // the shim may be about to publish it, in its own order
                tokio::time::sleep(SHIM_PUBLISHES).await;
                // after an upgrade the subscribers are those of the next process
                let Ok(_pass) = self.gate.enter().await else { return };
                for (exec, exit) in exited {
                    self.publish_exit(task, &exec, exit).await;
                }
            }
            if unanswered.is_empty() {
                return;
            }
            unknown = unanswered;
            again().await;
        }
    }
}

/// Whether a client can know of a task whose shim is dead.
fn may_be_known(task: &Task) -> Result<bool> {
    match task.kind {
        // its program's `delete` tells whether there was a process
        Kind::Task => task.bundle.was_started(),
        Kind::Sandbox => task.bundle.was_created(),
    }
}

/// What a bundle leads to.
enum Found {
    Nothing,
    /// The program was about to start a shim, or has started one.
    NoAddress,
    Shim(Shim),
}

pub(super) async fn state(task: &Task, shim: &Shim, exec: &str) -> Result<StateResponse, Unanswered> {
    let request = StateRequest { id: task.id.clone(), exec_id: exec.to_owned(), ..StateRequest::default() };
    shim.call("State", &request, Some(STATE)).await
}

fn exit_of(state: &StateResponse) -> Option<Exit> {
    let at = state.exited_at.as_ref()?;
    let at = at.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(at.nanos));
    (state.status.enum_value() == Ok(Status::STOPPED)).then_some(Exit { pid: state.pid, status: state.exit_status, at })
}

/// Those of a kind that have a bundle. Half-removed ones are removed, and work folders without a bundle.
fn found(settings: &Settings, kind: Kind) -> Result<Vec<Arc<Task>>> {
    let (folder, works) = (settings.bundles(kind), settings.works(kind));
    let mut found = Vec::new();
    for (namespace, path) in folders(&folder)? {
        let Ok(namespace) = Namespace::parse(&namespace) else { continue };
        for (id, path) in folders(&path)? {
            if id.starts_with('.') {
                // best effort: the next start tries again
                let _ = mounts::remove_tree(&path);
            } else if name::identifier("task", &id).is_ok() {
                let key = (namespace.clone(), id);
                let sandbox = Bundle::of(settings, kind, &key.0, &key.1).sandbox()?;
                found.push(Task::new(settings, kind, key, sandbox, Phase::Loading(None)));
            }
        }
    }
    for (namespace, path) in folders(&works)? {
        for (id, path) in folders(&path)? {
            let bundle = folder.join(&namespace).join(id);
            if !bundle.try_exists().on("look for", &bundle)? {
                // as above
                let _ = mounts::remove_tree(&path);
            }
        }
    }
    Ok(found)
}

fn folders(folder: &Path) -> Result<Vec<(String, std::path::PathBuf)>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.on("read folder", folder)?,
    };
    let mut folders = Vec::new();
    for entry in entries {
        let entry = entry.on("read folder", folder)?;
        if entry.file_type().on("look at", &entry.path())?.is_dir() {
            folders.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
        }
    }
    Ok(folders)
}

/// For a shim to report the state of a process.
const STATE: Duration = Duration::from_secs(5);
/// For a shim to publish an exit itself: shims retry events, containerd's own within five seconds.
const SHIM_PUBLISHES: Duration = Duration::from_secs(6);
