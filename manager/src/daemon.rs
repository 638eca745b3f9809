//! The daemon's life: open, listen, load, serve, stop.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::info;
use nix::fcntl::{Flock, FlockArg};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::error::{Error, IoContext as _, Result};
use crate::manager::Manager;
use crate::settings::Settings;
use crate::{api, forward, logging, sockets};

/// Serves until SIGTERM or SIGINT.
///
/// Errors: when it cannot start; with a sentence for whoever reads the service's log.
pub(crate) fn run(settings: Settings) -> Result<()> {
    logging::install(settings.log_level);
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().max_blocking_threads(BLOCKING_THREADS).thread_stack_size(STACK_BYTES).build();
    runtime.on("start the executor of", Path::new("x-manager"))?.block_on(serve(settings))
}

async fn serve(settings: Settings) -> Result<()> {
    let _only_one = patiently(|| claim(&settings.root)).await?;
    let manager = Arc::new(Manager::open(&settings).await?);
    let clients = patiently(|| sockets::listen(&settings.address, settings.gid)).await?;
    let shims = patiently(|| sockets::listen(&settings.ttrpc_address(), 0)).await?;
    manager.tasks.load().await?;
    let mut events = forward::serve(shims, Arc::clone(&manager.tasks)).await?;
    let (stop, stopped) = watch::channel(false);
    let api = tokio::spawn(api::serve(clients, manager, stopped));
    info!(address:% = settings.address.display(), version = env!("CARGO_PKG_VERSION"); "serving");
    let mut terminate = signal(SignalKind::terminate()).on("wait for SIGTERM of", &settings.address)?;
    let mut interrupt = signal(SignalKind::interrupt()).on("wait for SIGINT of", &settings.address)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    info!("stopping; shims and their containers stay");
    stop.send_replace(true);
    // it was told to end, and says nothing
    let _ = api.await;
    events.stop_listen().await;
    Ok(())
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

/// Makes sure that no other daemon works on the same data.
fn claim(root: &Path) -> Result<Flock<File>> {
    std::fs::create_dir_all(root).on("make folder", root)?;
    let path = root.join("lock");
    let file = File::options().create(true).append(true).open(&path).on("open", &path)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| Error::Precondition(format!("another x-manager works on {}", root.display())))
}

/// How long what a dead daemon holds is waited for.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(10);
/// For work that waits for the disk; they end when they have nothing to do.
const BLOCKING_THREADS: usize = 16;
/// Of each of them.
const STACK_BYTES: usize = 256 << 10;
