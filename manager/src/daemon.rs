//! The daemon's lifecycle: open, listen, load, serve, and stop or be replaced.

use std::fs::{DirBuilder, File, Permissions};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};
use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::api::Course;
use crate::control::UpgradeRequest;
use crate::error::{Error, IoContext as _, Result};
use crate::parts::Parts;
use crate::pools::THREADS;
use crate::settings::Settings;
use crate::sockets::{Inherited, Sockets, accepting};
use crate::sys::{children, memory};
use crate::upgrade::{self, HandedOver, Predecessor};
use crate::{api, control, forward, gc, logging, metrics, notify, restart, store, upkeep};

/// Serves until SIGTERM or SIGINT, or until another process has taken over. `takes_over` when this one is such a process.
///
/// Errors: when it cannot start.
pub(crate) fn run(settings: &Settings, takes_over: bool) -> Result<()> {
    logging::install(settings.log_level);
    memory::keep_little();
    // before an upgrade can replace the file
    let program = own_program();
    let inherited = if takes_over { None } else { Some(Inherited::from_service_manager()?) };
    if let Err(error) = children::raise_open_files() {
        warn!(error:%; "cannot raise the limit on open files");
    }
    let served = executor().build().on("start the executor of", Path::new("x-manager"))?.block_on(async {
        // SIGHUP during startup is an upgrade request, and must not kill this process
        let hangup = signal(SignalKind::hangup()).on("wait for signals to", Path::new("x-manager"))?;
        let start = match inherited {
            None => Start::after_another(settings).await?,
            Some(inherited) => Start::alone(settings, inherited).await?,
        };
        serve(settings, start, hangup, &program).await
    });
    if let Err(error) = &served {
        notify::send(&format!("STATUS={}", error.chain()));
    }
    served
}

/// The executor, whose one thread also receives what clients and registries send.
fn executor() -> Builder {
    let mut builder = Builder::new_current_thread();
    // By default it looks for what arrives after 61 steps only. While an image is pulled each of them copies up to 256 KiB, and a State waits for
    // all of that twice: for its request, and for the shim's answer.
    builder.enable_all().event_interval(STEPS).max_blocking_threads(THREADS).thread_stack_size(STACK_BYTES);
    builder
}

/// What is set up before this process serves.
struct Start {
    lock: OwnedFd,
    sockets: Sockets,
    parts: Parts,
    predecessor: Option<Predecessor>,
}

impl Start {
    async fn alone(settings: &Settings, inherited: Inherited) -> Result<Self> {
        let lock = patiently(|| claim(&settings.root)).await?;
        let sockets = Sockets::open(settings, inherited)?;
        Ok(Self { lock, sockets, parts: Parts::open(settings).await?, predecessor: None })
    }

    async fn after_another(settings: &Settings) -> Result<Self> {
        let (mut predecessor, lock, inherited) = Predecessor::meet()?;
        let lock = for_root_alone(lock.into(), &settings.root.join(LOCK))?;
        let sockets = Sockets::open(settings, inherited)?;
        predecessor.prepared(store::rehearse(&settings.store_files())?).await?;
        let parts = Parts::open(settings).await?;
        Ok(Self { lock, sockets, parts, predecessor: Some(predecessor) })
    }
}

async fn serve(settings: &Settings, start: Start, hangup: Signal, program: &Path) -> Result<()> {
    let Start { lock, sockets, parts, predecessor } = start;
    parts.store.limit(settings.limits.store_bytes).await?;
    let not_yet = parts.gate.close(Duration::ZERO).await;
    parts.tasks.load().await?;
    // everything that can fail comes before the running process retires
    let (clients, shims, control) = (accepting(&sockets.clients)?, accepting(&sockets.shims)?, accepting(&sockets.control)?);
    let metrics = sockets.metrics.as_ref().map(metrics::Listener::of).transpose()?;
    let (send, upgrades) = mpsc::channel(1);
    let mut requests = Requests::new(hangup, upgrades)?;
    let takes_over = predecessor.is_some();
    if let Some(predecessor) = predecessor {
        predecessor.ready(&parts.events).await?;
    }
    drop(not_yet);
    // this process has none yet
    parts.transfers.end_interrupted(takes_over).await?;
    let mut events = forward::serve(shims, Arc::clone(&parts.tasks)).await?;
    let (course, its_course) = watch::channel(Course::Serves);
    let services = Arc::new(parts.services());
    let api = tokio::spawn(api::serve(clients, Arc::clone(&services), settings.limits, its_course));
    tokio::spawn(control::serve(control, send, Arc::clone(&parts.content), parts.gate.clone()));
    if let Some(listener) = metrics {
        tokio::spawn(metrics::serve(listener, parts.sources()));
    }
    tokio::spawn(upkeep::run(parts.store.clone(), parts.gate.clone(), Arc::clone(&parts.calls)));
    tokio::spawn(gc::run(Arc::clone(&parts.collector)));
    let ahead = parts.ahead.clone();
    tokio::spawn(async move { ahead.watch().await });
    if let Some(interval) = settings.restart_interval {
        tokio::spawn(restart::watch(Arc::clone(&parts.restarter), interval));
    }
    info!(address:% = settings.address.display(), version = env!("CARGO_PKG_VERSION"), pid = std::process::id(); "serving");
    notify::send(&format!("READY=1\nSTATUS=serving at {}", settings.address.display()));
    let state = HandedOver {
        lock: lock.as_fd(),
        sockets: &sockets,
        store: &parts.store,
        gate: &parts.gate,
        events: &parts.events,
        transfers: &parts.transfers,
    };
    while let Some(request) = requests.next().await {
        let path = request.as_ref().and_then(|request| request.program.clone()).unwrap_or_else(|| program.to_owned());
        let mut must_stop = false;
        let stop = async {
            requests.stop().await;
            must_stop = true;
        };
        let handed_over = upgrade::hand_over(state, &path, stop).await;
        let is_over = handed_over.is_ok();
        match &handed_over {
            Ok(pid) => info!(pid; "another process has taken over"),
            Err(error) => warn!(error = error.chain(); "upgrade failed, this process continues to serve"),
        }
        if is_over {
            // before anyone learns that there is another process: the call that uses a stream may come there
            let _ = tokio::time::timeout(HAND_STREAMS_OVER, services.streams.hand_over()).await;
        }
        if let Some(request) = request {
            // the control client may have disconnected
            let _ = request.answer.send(handed_over);
        }
        if is_over || must_stop {
            break;
        }
    }
    // later requests go to the next process
    drop(requests);
    let ends = if parts.gate.is_retired() { Course::Yields } else { Course::Stops };
    if ends == Course::Stops {
        info!("stopping; shims and their containers stay");
        notify::send("STOPPING=1");
        drop(parts.gate.close(LAST_CHANGES).await);
        parts.gate.retire();
    }
    parts.events.retire();
    course.send_replace(ends);
    events.stop_listen().await;
    // shims reconnect to the next process, and resend events that were not answered
    let hang_up = async { drop(tokio::time::timeout(HANG_UP, events.disconnect()).await) };
    // including calls whose clients have disconnected
    let carried = async { drop(tokio::time::timeout(api::LAST_CALLS, parts.gate.carried()).await) };
    // the results do not matter when stopping
    let _ = tokio::join!(api, hang_up, carried);
    if ends == Course::Stops && !matches!(tokio::time::timeout(SETTLE, parts.store.settle()).await, Ok(Ok(()))) {
        warn!("store not checkpointed; the next start replays the WAL");
    }
    Ok(())
}

/// Signals and requests from operators.
struct Requests {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    /// Whether it was started from a terminal.
    has_terminal: bool,
    upgrades: mpsc::Receiver<UpgradeRequest>,
}

impl Requests {
    fn new(hangup: Signal, upgrades: mpsc::Receiver<UpgradeRequest>) -> Result<Self> {
        let listen = |kind| signal(kind).on("wait for signals to", Path::new("x-manager"));
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup,
            has_terminal: has_terminal(),
            upgrades,
        })
    }

    /// The next upgrade request, without the control request if it was SIGHUP; none when the daemon is to stop.
    async fn next(&mut self) -> Option<Option<UpgradeRequest>> {
        tokio::select! {
            _ = self.terminate.recv() => None,
            _ = self.interrupt.recv() => None,
            // a closed terminal sends the same signal as an operator who wants an upgrade
            _ = self.hangup.recv() => if self.has_terminal && !has_terminal() { None } else { Some(None) },
            Some(request) = self.upgrades.recv() => Some(Some(request)),
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

/// Retries for a moment: a daemon that was killed between fork and exec leaves a copy of itself, with its lock and sockets, until the exec.
async fn patiently<T>(attempt: impl Fn() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    loop {
        match attempt() {
            Err(Error::InUse { .. }) if begin.elapsed() < PATIENCE => tokio::time::sleep(PAUSE).await,
            result => return result,
        }
    }
}

/// Makes sure that no other daemon works on the same data. The lock lasts until the last copy of the descriptor is closed.
fn claim(root: &Path) -> Result<OwnedFd> {
    DirBuilder::new().recursive(true).mode(0o711).create(root).on("make folder", root)?;
    let path = root.join(LOCK);
    let file = File::options().create(true).append(true).mode(0o600).open(&path).on("open", &path)?;
    file.try_lock().map_err(|_| Error::InUse { path: root.to_owned(), by: "x-manager" })?;
    for_root_alone(file, &path)
}

/// Corrects the mode of a lock: a process that can open it can keep x-manager from starting.
fn for_root_alone(lock: File, path: &Path) -> Result<OwnedFd> {
    lock.set_permissions(Permissions::from_mode(0o600)).on("set mode of", path)?;
    Ok(lock.into())
}

/// The name by which this program was started, as a path: an upgrade runs the file that is there by then.
fn own_program() -> PathBuf {
    let name = PathBuf::from(std::env::args_os().next().unwrap_or_default());
    if name.components().count() > 1 || name.is_absolute() {
        return std::path::absolute(&name).unwrap_or(name);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(&name)).find(|file| file.is_file());
    found.or_else(|| std::env::current_exe().ok()).unwrap_or(name)
}

/// The lock file in the root folder.
const LOCK: &str = "lock";
/// How long to wait for the lock and sockets of a killed daemon.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(10);
/// Of each thread of the pools.
const STACK_BYTES: usize = 256 << 10;
/// Of tasks, between two looks at what has arrived.
const STEPS: u32 = 4;
/// When stopping, to answer events of shims.
const HANG_UP: Duration = Duration::from_secs(2);
/// For streams of transfers that have not begun, when another process serves.
const HAND_STREAMS_OVER: Duration = Duration::from_secs(5);
/// When stopping, to checkpoint the store.
const SETTLE: Duration = Duration::from_secs(2);
/// When stopping, for what is being written to the store.
const LAST_CHANGES: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::io::Write as _;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::Poll;

    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[test]
    fn what_arrives_is_seen_after_a_few_steps_of_tasks_that_never_rest() {
        executor().build().expect("an executor").block_on(async {
            let (mut here, there) = std::os::unix::net::UnixStream::pair().expect("sockets");
            there.set_nonblocking(true).expect("a socket");
            let mut there = tokio::net::UnixStream::from_std(there).expect("a socket");
            let steps = Arc::new(AtomicU32::new(0));
            let now = Arc::clone(&steps);
            let reader = tokio::spawn(async move {
                let mut latest = 0;
                while there.read_u8().await.is_ok() {
                    latest = latest.max(now.load(Ordering::Relaxed) % EVERY);
                }
                latest
            });
            let busy = tokio::spawn(poll_fn(move |cx| {
                let step = 1 + steps.fetch_add(1, Ordering::Relaxed);
                if step.is_multiple_of(EVERY) {
                    here.write_all(&[0]).expect("room");
                }
                if step == 50 * EVERY + EVERY / 2 {
                    return Poll::Ready(());
                }
                cx.waker().wake_by_ref();
                Poll::Pending
            }));
            busy.await.expect("no panic");
            let latest = reader.await.expect("no panic");
            assert!(latest <= 2 * STEPS, "{latest}");
        });
    }

    /// More than an executor does by itself before it looks.
    const EVERY: u32 = 200;
}
