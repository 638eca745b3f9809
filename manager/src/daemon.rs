//! The daemon's life: open, listen, load, serve, and stop or be replaced.

use std::fs::{DirBuilder, File, Permissions};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::api::Course;
use crate::control::Order;
use crate::error::{Error, IoContext as _, Result};
use crate::manager::Manager;
use crate::settings::Settings;
use crate::sockets::{Inherited, Sockets, accepting};
use crate::sys::{children, memory};
use crate::upgrade::{self, Estate, Predecessor};
use crate::{api, control, forward, logging, metrics, notify, restart, store, upkeep};

/// Serves until SIGTERM or SIGINT, or until another process has taken over. `takes_over` when this one is such a process.
///
/// Errors: when it cannot start; with a sentence for whoever reads the service's log.
pub(crate) fn run(settings: &Settings, takes_over: bool) -> Result<()> {
    logging::install(settings.log_level);
    memory::keep_little();
    // before it may be replaced by another file
    let program = own_program();
    let inherited = if takes_over { None } else { Some(Inherited::from_service_manager()?) };
    if let Err(error) = children::raise_open_files() {
        warn!(error:%; "cannot raise the limit on open files");
    }
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().max_blocking_threads(BLOCKING_THREADS).thread_stack_size(STACK_BYTES).build();
    let served = runtime.on("start the executor of", Path::new("x-manager"))?.block_on(async {
        // one that comes while this process starts is an order like any other, and not its end
        let hangup = signal(SignalKind::hangup()).on("wait for signals to", Path::new("x-manager"))?;
        let start = match inherited {
            None => Start::after_another(settings).await?,
            Some(inherited) => Start::alone(settings, inherited).await?,
        };
        serve(settings, start, hangup, &program).await
    });
    if let Err(error) = &served {
        notify::tell(&format!("STATUS={}", error.chain()));
    }
    served
}

/// What is there before anything is served.
struct Start {
    lock: OwnedFd,
    sockets: Sockets,
    manager: Arc<Manager>,
    predecessor: Option<Predecessor>,
}

impl Start {
    async fn alone(settings: &Settings, inherited: Inherited) -> Result<Self> {
        let lock = patiently(|| claim(&settings.root)).await?;
        let sockets = Sockets::open(settings, inherited)?;
        Ok(Self { lock, sockets, manager: Arc::new(Manager::open(settings).await?), predecessor: None })
    }

    async fn after_another(settings: &Settings) -> Result<Self> {
        let (mut predecessor, lock, inherited) = Predecessor::meet()?;
        let lock = for_root_alone(lock.into(), &settings.root.join(LOCK))?;
        let sockets = Sockets::open(settings, inherited)?;
        predecessor.prepared(store::rehearse(&settings.store_files())?).await?;
        let manager = Arc::new(Manager::open(settings).await?);
        Ok(Self { lock, sockets, manager, predecessor: Some(predecessor) })
    }
}

async fn serve(settings: &Settings, start: Start, hangup: Signal, program: &Path) -> Result<()> {
    let Start { lock, sockets, manager, predecessor } = start;
    manager.store.limit(settings.limits.store_bytes).await?;
    let not_yet = manager.gate.close(Duration::ZERO).await;
    manager.tasks.load().await?;
    // everything that can fail, before the process that serves so far is told that it need not go on
    let (clients, shims, control) = (accepting(&sockets.clients)?, accepting(&sockets.shims)?, accepting(&sockets.control)?);
    let metrics = sockets.metrics.as_ref().map(metrics::Listener::of).transpose()?;
    let (send, orders) = mpsc::channel(1);
    let mut wishes = Wishes::new(hangup, orders)?;
    if let Some(predecessor) = predecessor {
        predecessor.ready(&manager.events).await?;
    }
    drop(not_yet);
    let mut events = forward::serve(shims, Arc::clone(&manager.tasks)).await?;
    let (course, its_course) = watch::channel(Course::Serves);
    let api = tokio::spawn(api::serve(clients, Arc::clone(&manager), settings.limits, its_course));
    tokio::spawn(control::serve(control, send, manager.gate.clone()));
    if let Some(listener) = metrics {
        tokio::spawn(metrics::serve(listener, Arc::clone(&manager)));
    }
    tokio::spawn(upkeep::run(Arc::clone(&manager)));
    if let Some(interval) = settings.restart_interval {
        tokio::spawn(restart::watch(Arc::clone(&manager), interval));
    }
    info!(address:% = settings.address.display(), version = env!("CARGO_PKG_VERSION"), pid = std::process::id(); "serving");
    notify::tell(&format!("READY=1\nSTATUS=serving at {}", settings.address.display()));
    let estate = Estate { lock: lock.as_fd(), sockets: &sockets, store: &manager.store, gate: &manager.gate, events: &manager.events };
    while let Some(order) = wishes.order().await {
        let path = order.as_ref().and_then(|order| order.program.clone()).unwrap_or_else(|| program.to_owned());
        let mut is_told_to_stop = false;
        let stop = async {
            wishes.stop().await;
            is_told_to_stop = true;
        };
        let handed_over = upgrade::hand_over(estate, &path, stop).await;
        let is_over = handed_over.is_ok();
        match &handed_over {
            Ok(pid) => info!(pid; "another process has taken over"),
            Err(error) => warn!(error = error.chain(); "no other process takes over, this one goes on"),
        }
        if let Some(order) = order {
            // whoever asked may have gone
            let _ = order.answer.send(handed_over);
        }
        if is_over || is_told_to_stop {
            break;
        }
    }
    // whoever is too late asks the next process
    drop(wishes);
    let ends = if manager.gate.is_retired() { Course::Yields } else { Course::Stops };
    if ends == Course::Stops {
        info!("stopping; shims and their containers stay");
        notify::tell("STOPPING=1");
        drop(manager.gate.close(LAST_CHANGES).await);
        manager.gate.retire();
    }
    manager.events.retire();
    course.send_replace(ends);
    events.stop_listen().await;
    // shims connect again, to whoever serves then; those that get no answer say it again there
    let hang_up = async { drop(tokio::time::timeout(HANG_UP, events.disconnect()).await) };
    // calls whose clients have gone too
    let carried = async { drop(tokio::time::timeout(api::LAST_CALLS, manager.gate.carried()).await) };
    // it was told to end, and says nothing
    let _ = tokio::join!(api, hang_up, carried);
    if ends == Course::Stops && !matches!(tokio::time::timeout(SETTLE, manager.store.settle()).await, Ok(Ok(()))) {
        warn!("what changed last stays in the log of the metadata store, where the next start finds it");
    }
    Ok(())
}

/// What this process is asked for from outside.
struct Wishes {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    /// Whether it was started from a terminal.
    has_terminal: bool,
    orders: mpsc::Receiver<Order>,
}

impl Wishes {
    fn new(hangup: Signal, orders: mpsc::Receiver<Order>) -> Result<Self> {
        let listen = |kind| signal(kind).on("wait for signals to", Path::new("x-manager"));
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup,
            has_terminal: has_terminal(),
            orders,
        })
    }

    /// The next wish to be replaced, with whoever has it if that can be answered; none when it is to stop.
    async fn order(&mut self) -> Option<Option<Order>> {
        tokio::select! {
            _ = self.terminate.recv() => None,
            _ = self.interrupt.recv() => None,
            // a terminal that was closed says the same as an operator who wants an upgrade
            _ = self.hangup.recv() => if self.has_terminal && !has_terminal() { None } else { Some(None) },
            Some(order) = self.orders.recv() => Some(Some(order)),
        }
    }

    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

fn has_terminal() -> bool {
    File::open("/dev/tty").is_ok()
}

/// Tries again for a moment: a daemon that was killed while it started a program leaves a copy of itself, with its lock and its sockets,
/// until that program begins.
async fn patiently<T>(attempt: impl Fn() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    loop {
        match attempt() {
            Err(Error::Precondition(_)) if begin.elapsed() < PATIENCE => tokio::time::sleep(PAUSE).await,
            result => return result,
        }
    }
}

/// Makes sure that no other daemon works on the same data. The lock lasts until the last copy of the descriptor is closed.
fn claim(root: &Path) -> Result<OwnedFd> {
    DirBuilder::new().recursive(true).mode(0o711).create(root).on("make folder", root)?;
    let path = root.join(LOCK);
    let file = File::options().create(true).append(true).mode(0o600).open(&path).on("open", &path)?;
    file.try_lock().map_err(|_| Error::Precondition(format!("another x-manager works on {}", root.display())))?;
    for_root_alone(file, &path)
}

/// Corrects the mode of a lock: whoever can open it can keep every x-manager from starting.
fn for_root_alone(lock: File, path: &Path) -> Result<OwnedFd> {
    lock.set_permissions(Permissions::from_mode(0o600)).on("set mode of", path)?;
    Ok(lock.into())
}

/// The name by which this program was started, as a path: what is there later is its successor.
fn own_program() -> PathBuf {
    let name = PathBuf::from(std::env::args_os().next().unwrap_or_default());
    if name.components().count() > 1 || name.is_absolute() {
        return std::path::absolute(&name).unwrap_or(name);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(&name)).find(|file| file.is_file());
    found.or_else(|| std::env::current_exe().ok()).unwrap_or(name)
}

/// The file, in the root folder, whose lock says who works there.
const LOCK: &str = "lock";
/// How long what a dead daemon holds is waited for.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(10);
/// For work that waits for the disk; they end when they have nothing to do.
const BLOCKING_THREADS: usize = 16;
/// Of each of them.
const STACK_BYTES: usize = 256 << 10;
/// At the end, for events of shims that are being answered.
const HANG_UP: Duration = Duration::from_secs(2);
/// When stopping, for the store to tidy up.
const SETTLE: Duration = Duration::from_secs(2);
/// When stopping, for what is being written to the store.
const LAST_CHANGES: Duration = Duration::from_secs(10);
