//! The worker: everything of the shim that has features, and may crash at any time.
//!
//! Owns the meaning of requests and exits: the task service, the lifecycle of containers, the content of events. The keeper performs
//! what must not happen twice, and holds what the worker commits.
//!
//! ```text
//!  link ──Request──▶ server ──Call──▶ container ──Change──▶ apply ──Commit──▶ link
//!   │                                    ▲  │
//!   ├─────────────Exit───────────────────┘  └──operations──▶ link
//!   └─State (at the start)──▶ registry
//! ```
//!
//! One thread; a task for each request and each exit. A handler runs up to its first wait in the moment in which its message is
//! taken from the link, so that what is admitted, and what is observed, follows the order of the messages.
//!
//! **Invariant:** the next worker generation completes the work of a crashed one: its own side effects can be repeated,
//! everything else is an operation of the keeper.
use std::future::Future;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::rc::Rc;
use std::task::{Context, Waker};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::LocalSet;

mod cause;
mod commit;
mod container;
mod error;
mod events;
mod fault;
mod id;
mod link;
mod phase;
mod pod;
mod pump;
mod server;
pub(crate) mod spec;
mod starts;

use self::cause::Cause;
use self::commit::Ending;
use self::container::{Change, Container, Process, RECORD_VERSION, Record, Reply, Shared};
use self::error::{Code, Error};
use self::id::ProcessKey;
use self::link::{Incoming, Link, LinkError};
use self::phase::Exit;
use self::pod::Pod;
use self::server::{Call, Inbound, PodCall};
use crate::handover::{POD_KEY, ProcessExit, ToWorker};
use crate::journal_body::ProcessIdentity;
use crate::settings::Settings;
use crate::sys;
use crate::test_identity::{self, Place};

/// Runs a worker on its end of the socketpair, until the keeper is gone.
pub(crate) fn run(settings: Settings, link: OwnedFd) -> ExitCode {
    crate::sys::memory::keep_little();
    block_signals();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_io_events_per_tick(EVENTS_PER_TURN)
        .thread_stack_size(BLOCKING_STACK_BYTES)
        .thread_keep_alive(BLOCKING_KEEP_ALIVE)
        .build();
    let result = runtime.map_err(|source| LinkError::Io { source }).and_then(|runtime| {
        let life = LocalSet::new();
        life.block_on(&runtime, live(settings, link))
    });
    match result {
        // The keeper is gone. Threads that a slow disk blocks end with the process.
        Ok(()) | Err(LinkError::Closed) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!(error:%; "worker exits");
            ExitCode::FAILURE
        }
    }
}

/// A stray signal, such as a host's shutdown sends to every process, must not end a worker; a write beyond RLIMIT_FSIZE then fails like
/// one to a full disk. Crashes stay crashes. Threads inherit the mask: all are started later.
fn block_signals() {
    use nix::libc::{SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP};
    if let Err(error) = sys::signals::block_all_but(&[SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP]) {
        log::warn!(error:%; "cannot block signals");
    }
}

/// Takes the keeper's messages, has each handled, and commits what comes of it.
#[derive(Debug)]
struct Worker {
    shared: Shared,
}

async fn live(settings: Settings, link: OwnedFd) -> Result<(), LinkError> {
    let faults = fault::Faults::from_environment(&settings.id);
    test_identity::misbehave(Place::Hello);
    let link = Link::new(link, faults).map_err(|source| LinkError::Io { source })?;
    tokio::task::spawn_local(Rc::clone(&link).write_queue());
    let mut incoming = Incoming::new(Rc::clone(&link));
    let worker = Rc::new(Worker { shared: Shared::new(settings, link) });
    worker.catch_up(&mut incoming).await?;
    let ahead = Rc::clone(&worker);
    tokio::task::spawn_local(async move { pod::blocking_look_ahead(&ahead.shared) });
    let is_used = Rc::new(Notify::new());
    tokio::task::spawn_local(return_memory(Rc::clone(&is_used)));
    loop {
        is_used.notify_one();
        let message = incoming.next().await?;
        worker.take(message);
        incoming.acted();
    }
}

/// Returns unused memory a while after each use. Not postponed by later ones, since calls that keep coming would postpone it for ever.
async fn return_memory(is_used: Rc<Notify>) {
    loop {
        is_used.notified().await;
        tokio::time::sleep(sys::memory::TRIM_AFTER).await;
        sys::memory::trim();
    }
}

impl Worker {
    /// Loads the saved state, then the open requests and exits.
    async fn catch_up(self: &Rc<Self>, incoming: &mut Incoming) -> Result<(), LinkError> {
        let mut backlog = Vec::new();
        let mut doubtful = Vec::new();
        let mut refusal = None;
        loop {
            match incoming.next().await? {
                ToWorker::Try { key, value } => {
                    refusal = refusal.or_else(|| refusal_of(&key, &value));
                }
                ToWorker::Tried => {
                    test_identity::misbehave(Place::Fit);
                    self.shared.link.fit(refusal.take());
                }
                ToWorker::Welcome { version, keeper_pid, generation } => {
                    test_identity::misbehave(Place::Welcome);
                    test_identity::misbehave(Place::Later);
                    self.shared.keeper.set(ProcessIdentity::of(keeper_pid).unwrap_or(ProcessIdentity { pid: keeper_pid, start_time: 0 }));
                    self.shared.version.set(version);
                    log::debug!(generation, keeper = keeper_pid; "worker started");
                }
                ToWorker::State { key, value } => self.load(&key, &value),
                ToWorker::Request { cause, age_nanos, origin, payload } => {
                    test_identity::meet_request(&payload);
                    let inbound = Inbound::parse(&payload, Duration::from_nanos(age_nanos), origin);
                    if inbound.left == Some(Duration::ZERO) && inbound.call.as_ref().is_ok_and(Call::must_be_ended) {
                        let cause = self.cause(cause);
                        doubtful.push((cause.number(), tokio::task::spawn_local(async move { cause.was_begun().await })));
                    }
                    backlog.push(Pending::Request(cause, inbound));
                }
                ToWorker::Exit { cause, exit } => backlog.push(Pending::Exit(cause, exit)),
                ToWorker::CaughtUp => break,
                ToWorker::Done { .. } | ToWorker::Ping { .. } | ToWorker::MayHibernate => {}
            }
            incoming.acted();
        }
        // An expired request that was begun is completed; one that was not is refused. What arrives meanwhile is queued behind.
        let mut begun = Vec::new();
        for (cause, answer) in doubtful {
            tokio::pin!(answer);
            let was_begun = loop {
                tokio::select! {
                    biased;
                    result = &mut answer => break result.unwrap_or(true),
                    message = incoming.next() => match message? {
                        ToWorker::Request { cause, age_nanos, origin, payload } => {
                            let inbound = Inbound::parse(&payload, Duration::from_nanos(age_nanos), origin);
                            backlog.push(Pending::Request(cause, inbound));
                        }
                        ToWorker::Exit { cause, exit } => backlog.push(Pending::Exit(cause, exit)),
                        _ => {}
                    },
                }
            };
            if was_begun {
                begun.push(cause);
            }
        }
        for container in self.shared.registry.all() {
            let keys = container.record().keys();
            self.attach(&container, &keys);
        }
        for pending in backlog {
            match pending {
                Pending::Request(cause, inbound) => {
                    let was_begun = begun.contains(&cause);
                    launch(Rc::clone(self).serve(self.cause(cause), inbound, was_begun));
                }
                Pending::Exit(cause, exit) => self.take(ToWorker::Exit { cause, exit }),
            }
        }
        incoming.acted();
        Ok(())
    }

    /// Loads an entry of the state. A container's entry precedes those of its execs.
    fn load(&self, key: &str, value: &[u8]) {
        let id = key.split('/').next().unwrap_or(key);
        if let Some(version) = Record::newer_version(value) {
            log::error!(container:% = key, version; "a newer version has written the state of this container: upgrade the shim to manage it");
            self.shared.registry.set_aside(id);
        }
        if self.shared.registry.is_set_aside(id) {
            return;
        }
        if let Err(error) = self.decode(key, value) {
            log::error!(container:% = key, error:%; "cannot read the state of a container");
            // Its exit stays with the keeper for a version that can read it, and its id stays taken.
            if key == id {
                self.shared.registry.set_aside(id);
            }
        }
    }

    fn decode(&self, key: &str, value: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
        if key == POD_KEY {
            *self.shared.pod.borrow_mut() = Some(Pod::new(pod::Record::decode(value)?));
            return Ok(());
        }
        let key = ProcessKey::parse(key)?;
        match key.exec {
            None => self.shared.registry.insert(&Container::new(Record::decode(value)?)),
            Some(exec) => self.shared.registry.get(key.container.as_str())?.load(exec, Process::decode(value)?),
        }
        Ok(())
    }

    fn take(self: &Rc<Self>, message: ToWorker) {
        match message {
            ToWorker::Request { cause, age_nanos, origin, payload } => {
                test_identity::meet_request(&payload);
                let inbound = Inbound::parse(&payload, Duration::from_nanos(age_nanos), origin);
                launch(Rc::clone(self).serve_late(self.cause(cause), inbound));
            }
            ToWorker::Exit { cause, exit } => {
                test_identity::meet_exit(&exit.key);
                launch(Rc::clone(self).exited(self.cause(cause), exit));
            }
            ToWorker::MayHibernate => self.shared.link.hibernate(container::may_hibernate(&self.shared)),
            _ => log::warn!("keeper sent an unexpected message"),
        }
    }

    fn attach<'a>(self: &Rc<Self>, container: &Rc<Container>, changed: impl IntoIterator<Item = &'a ProcessKey>) {
        let worker = Rc::clone(self);
        container::attach(&self.shared, container, changed, move |change| worker.apply(None, change));
    }

    fn cause(&self, number: crate::handover::Cause) -> Cause {
        Cause::new(Rc::clone(&self.shared.link), number)
    }

    /// Serves a request that arrived after the saved state. The keeper may have queued it, so it may have expired and been begun.
    async fn serve_late(self: Rc<Self>, cause: Cause, inbound: Inbound) {
        let is_doubtful = inbound.left == Some(Duration::ZERO) && inbound.call.as_ref().is_ok_and(Call::must_be_ended);
        let was_begun = is_doubtful && cause.was_begun().await;
        self.serve(cause, inbound, was_begun).await;
    }

    async fn serve(self: Rc<Self>, cause: Cause, inbound: Inbound, was_begun: bool) {
        let Inbound { method, left, call } = inbound;
        let result = match call {
            Ok(call) if left == Some(Duration::ZERO) && !was_begun && !call.is_never_too_late() => {
                Err(Error::Expired { method: method.clone() })
            }
            Ok(call) => {
                if call.must_be_ended() && !was_begun {
                    cause.begin();
                }
                self.perform(&cause, call).await
            }
            Err(error) => Err(error),
        };
        let change = result.unwrap_or_else(Change::refuse);
        if let Some(Err(error)) = &change.reply {
            // Daemons ask about deleted containers all the time.
            let level = if error.code() == Code::NotFound { log::Level::Debug } else { log::Level::Info };
            log::log!(level, method:%, error:% = error.chain(); "request refused");
        }
        self.apply(Some(Ending::Request(cause.number())), change);
    }

    async fn perform(self: &Rc<Self>, cause: &Cause, call: Call) -> Result<Change, Error> {
        let shared = &self.shared;
        match call {
            Call::State(target) => {
                let container = shared.registry.get(&target.id)?;
                let key = container.key(&target.exec)?;
                let state = container::state_of(&container.record(), &key);
                let state = state.ok_or(Error::NoContainer { id: target.id })?;
                Ok(Change { reply: Some(Ok(Reply::State(Box::new(state)))), ..Change::default() })
            }
            Call::Create(call) => container::create(shared, cause, *call).await,
            Call::Start(target) => container::start(shared, cause, target).await,
            Call::Delete(target) => container::delete(shared, cause, target).await,
            Call::Pids(id) => container::pids(shared, cause, &id).await,
            Call::Pause(id) => container::pause(shared, cause, id).await,
            Call::Resume(id) => container::resume(shared, cause, id).await,
            Call::Checkpoint(call) => container::checkpoint(shared, cause, *call).await,
            Call::Kill(call) => container::kill(shared, cause, call).await,
            Call::Exec(call) => container::exec(shared, *call),
            Call::Resize { target, rows, columns } => container::resize(shared, cause, target, rows, columns).await,
            Call::CloseIo { target, stdin } => container::close_io(shared, cause, target, stdin).await,
            Call::Update(call) => container::update(shared, cause, call).await,
            Call::Wait(target) => container::wait(shared, &target),
            Call::Stats(id) => container::stats(shared, &id),
            Call::Connect(id) => {
                let task_pid = shared.registry.get(&id).ok().and_then(|container| container.record().init.pid);
                Ok(Change { reply: Some(Ok(Reply::Connect { task_pid })), ..Change::default() })
            }
            Call::Shutdown(id) => pod::shutdown_by_task(shared, cause, &id, self).await,
            Call::Pod(call) => self.perform_for_pod(cause, call).await,
            Call::DeletePodForCommand(id) => pod::shutdown(shared, cause, &id, self).await,
            Call::DeleteForCommand(id) => container::delete_for_command(shared, cause, id).await,
        }
    }

    async fn perform_for_pod(self: &Rc<Self>, cause: &Cause, call: PodCall) -> Result<Change, Error> {
        let shared = &self.shared;
        match call {
            PodCall::Create(call) => pod::create(shared, *call),
            PodCall::Start(id) => pod::start(shared, cause, &id, self).await,
            PodCall::Platform(id) => pod::platform(shared, &id),
            PodCall::Stop(id) => pod::stop(shared, cause, &id, self).await,
            PodCall::Wait(id) => pod::wait(shared, &id),
            PodCall::Status { id, is_verbose } => pod::status(shared, &id, is_verbose),
            PodCall::Ping(id) => pod::ping(shared, &id),
            PodCall::Shutdown(id) => pod::shutdown(shared, cause, &id, self).await,
            PodCall::Metrics(id) => pod::metrics(shared, &id),
        }
    }

    async fn exited(self: Rc<Self>, cause: Cause, exit: ProcessExit) {
        let change = match ProcessKey::parse(&exit.key) {
            _ if exit.key == POD_KEY => pod::exited(&self.shared, &cause, &exit, &self).await,
            Ok(key) => container::exited(&self.shared, &cause, key, Exit { status: exit.status, at_nanos: exit.at_nanos }).await,
            Err(error) => {
                log::warn!(key:% = exit.key, error:%; "unknown process exited");
                Change::default()
            }
        };
        self.apply(Some(Ending::Exit(cause.number())), change);
    }
}

/// Why this worker cannot use an entry of the state, if so.
fn refusal_of(key: &str, value: &[u8]) -> Option<String> {
    let newest = test_identity::record_version(RECORD_VERSION);
    if let Some(version) = Record::newer_version(value) {
        return Some(format!("the record of container {key} has version {version}, and version {newest} is the newest that can be read"));
    }
    let result = if key == POD_KEY {
        pod::Record::decode(value).map(drop)
    } else if key.contains('/') {
        Process::decode(value).map(drop)
    } else {
        Record::decode(value).map(drop)
    };
    match result {
        Ok(()) => None,
        Err(error) => Some(format!("cannot read the record of container {key}: {error}")),
    }
}

/// Messages that arrived before the worker had caught up.
enum Pending {
    Request(crate::handover::Cause, Inbound),
    Exit(crate::handover::Cause, ProcessExit),
}

/// Runs `work` up to its first wait now, and the rest as a task of its own.
fn launch(work: impl Future<Output = ()> + 'static) {
    let mut work = Box::pin(work);
    // A wake-up before the task exists is not lost: a new task is polled in any case.
    if work.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
        drop(tokio::task::spawn_local(work));
    }
}

/// Of the descriptors: the keeper's, and those of outputs. tokio's own number, 1024, takes 12 KiB.
const EVENTS_PER_TURN: usize = 64;
/// Threads for work that a slow disk can block: mounts, output files.
const BLOCKING_STACK_BYTES: usize = 256 << 10;
const BLOCKING_KEEP_ALIVE: Duration = Duration::from_secs(1);
