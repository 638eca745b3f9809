//! A real containerd, which is killed, as is everything below it. Every answer is right, and nothing is left behind.
//!
//! Events published without a subscriber are lost: the events of a container are counted where the daemon ran through all
//! of its lifetime. Wait and Delete report the exit in any case, and only a killed shim may report another status.

use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use shim_tests::audit::Audit;
use shim_tests::client::Answer;
use shim_tests::container::{Container, Stdio};
use shim_tests::context::Context;
use shim_tests::daemon::Daemon;
use shim_tests::events::Events;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::stand::Stand;
use shim_tests::stdio::Pace;
use shim_tests::suite::{Runtime, Suite};
use shim_tests::{cgroups, proc};
use tonic::{Code, Status};

use super::{Dice, FILLER, Worker, count, hurt_a_worker, kill_a_runtime, seed, sum, until_over};

/// Counters of the run so far.
#[derive(Debug, Default)]
struct Counts {
    containers: AtomicU64,
    /// Containers whose creation was interrupted.
    undone: AtomicU64,
    execs: AtomicU64,
    bytes: AtomicU64,
    /// Containers whose events were counted.
    published: AtomicU64,
    /// Crashes of containerd, which is the reader of every shim's log.
    daemons: AtomicU64,
    runtimes: AtomicU64,
    workers: AtomicU64,
    stops: AtomicU64,
    shims: AtomicU64,
    /// Killed shims whose sockets were left behind.
    sockets: AtomicU64,
    /// Times for which the disk of some outputs was full.
    disks: AtomicU64,
    /// Readers that disconnected and came back.
    readers: AtomicU64,
}

/// State shared by all lanes.
struct Soak {
    cx: Context,
    events: Events,
    counts: Counts,
    /// Containers whose shim was killed, with its command line.
    bereft: Mutex<BTreeMap<String, String>>,
    /// Where some containers write into a file.
    disk: PathBuf,
    /// Crashes and revivals of the daemon.
    eras: AtomicU64,
    over: AtomicBool,
}

pub(crate) async fn every_exit_is_known_and_nothing_is_left_after_random_kills(stand: Stand) -> Result<()> {
    let (seed, before) = (seed(), Audit::take(&[]));
    let daemon = Arc::new(Daemon::start(suite()?, stand.shim()).await?);
    let programs = stand.program("gated-runtime").parent().context("a file is in a folder")?.to_owned();
    let runtime = if Dice::new(seed, 98).one_in(2) { Runtime::Runc } else { Runtime::Crun };
    let cx = Context::new(Arc::clone(&daemon), runtime, stand.shim().clone(), &programs).await?;
    println!("soak: {} with {runtime}", daemon.suite());
    let (events, counts) = (cx.events().await?, Counts::default());
    let disk = cx.folder().join("disk");
    fs::create_dir(&disk)?;
    // more than the output of all containers
    mount(Some("tmpfs"), &disk, Some("tmpfs"), MsFlags::empty(), Some("size=4m"))?;
    let soak = Soak { cx, events, counts, bereft: Mutex::default(), disk, eras: AtomicU64::new(0), over: AtomicBool::new(false) };
    let live = async |id: &str, dice: &mut Dice| {
        let result_of_run = one_life(&soak, id, dice).await;
        result_of_run.with_context(|| format!("{:?}, its shim was killed: {}", soak.events.of(id), soak.lost_its_shim(id)))
    };
    let disk = (soak.disk.as_path(), &soak.counts.disks);
    let results = until_over(&soak.over, seed, disk, chaos(&soak, Dice::new(seed, 99)), live).await;
    soak.remove_sockets_of_the_killed();
    let Counts { daemons, runtimes, workers, stops, shims, disks, readers, .. } = &soak.counts;
    println!("soak: {} faults survived: {:?}", sum(&[daemons, runtimes, workers, stops, shims, disks, readers]), soak.counts);
    for result in results {
        result.with_context(|| format!("X_SEED={seed}, the daemon's log:\n{}", soak.cx.logs()))?;
    }
    umount2(&soak.disk, MntFlags::MNT_DETACH)?;
    let tasks = soak.cx.client().list().await?;
    ensure!(tasks.is_empty(), "containerd knows of {tasks:?}");
    soak.cx.leaves_nothing().await?;
    let (killed, log) = (soak.killed_shims(), daemon.log());
    daemon.stop()?;
    drop((soak, daemon));
    let left = Audit::nothing_more_than(&before, &[], SOON).await;
    left.with_context(|| format!("X_SEED={seed}, killed shims: {killed:#?}, the daemon's log:\n{log}"))
}

fn suite() -> Result<Suite> {
    let version = env::var("X_SOAK_CONTAINERD").unwrap_or_else(|_| Suite::Forky.version().to_owned());
    let found = Suite::ALL.into_iter().find(|suite| suite.version() == version);
    found.with_context(|| format!("X_SOAK_CONTAINERD={version}: there are 1.6, 1.7 and 2.1"))
}

/// Kills one thing at a time; with the daemon, sometimes also a shim or a worker.
async fn chaos(soak: &Soak, mut dice: Dice) -> Result<()> {
    let (cx, counts) = (&soak.cx, &soak.counts);
    while !soak.over.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(100 + dice.below(600))).await; // a random time
        match dice.below(8) {
            0 | 1 => {
                soak.eras.fetch_add(1, Ordering::SeqCst);
                cx.daemon().kill()?;
                count(&counts.daemons);
                tokio::time::sleep(Duration::from_millis(dice.below(1000))).await;
                match dice.below(4) {
                    0 => kill_a_shim(soak, &mut dice),
                    1 => kill_or_stop_a_worker(soak, &mut dice).await,
                    _ => {}
                }
                cx.revive_daemon().await.context("containerd after its crash")?;
                soak.events.resubscribe(cx.client()).await?;
                soak.eras.fetch_add(1, Ordering::SeqCst);
            }
            2 | 3 => {
                if kill_a_runtime(&cx.runtime_program(), &mut dice) {
                    count(&counts.runtimes);
                }
            }
            4 => kill_a_shim(soak, &mut dice),
            _ => kill_or_stop_a_worker(soak, &mut dice).await,
        }
    }
    Ok(())
}

async fn kill_or_stop_a_worker(soak: &Soak, dice: &mut Dice) {
    match hurt_a_worker(&soak.cx.shims(), dice).await {
        Some(Worker::Killed) => count(&soak.counts.workers),
        Some(Worker::Stopped) => count(&soak.counts.stops),
        None => {}
    }
}

fn kill_a_shim(soak: &Soak, dice: &mut Dice) {
    let Some(shim) = dice.one_of(soak.cx.shims()) else { return };
    let words: Vec<_> = shim.command.split(' ').collect();
    let Some(id) = words.iter().skip_while(|word| **word != "-id").nth(1) else { return };
    soak.bereft.lock().expect("no panic under this lock").insert((*id).to_owned(), shim.command.clone());
    proc::kill_hard(shim.pid);
    count(&soak.counts.shims);
}

impl Soak {
    fn lost_its_shim(&self, id: &str) -> bool {
        self.bereft.lock().expect("no panic under this lock").contains_key(id)
    }

    /// A shim that is killed while it exits leaves its sockets behind: containerd has already run `delete`, and does not run it again.
    fn remove_sockets_of_the_killed(&self) {
        for command in self.bereft.lock().expect("no panic under this lock").values() {
            let paths = command.split(' ').map(|word| word.trim_start_matches("unix://")).map(Path::new);
            let sockets = paths.filter(|path| fs::symlink_metadata(path).is_ok_and(|about| about.file_type().is_socket()));
            // the daemon's own sockets are in that folder too, and accept connections
            let dead: Vec<_> = sockets.filter(|path| UnixStream::connect(path).is_err()).collect();
            if !dead.is_empty() {
                count(&self.counts.sockets);
                dead.into_iter().for_each(|path| drop(fs::remove_file(path)));
            }
        }
    }

    /// The command line of each killed shim, and the events of its container.
    fn killed_shims(&self) -> Vec<(String, Vec<String>)> {
        let bereft = self.bereft.lock().expect("no panic under this lock");
        bereft.iter().map(|(id, command)| (command.clone(), self.events.of(id))).collect()
    }

    fn era(&self) -> u64 {
        self.eras.load(Ordering::SeqCst)
    }
}

/// Repeats a call until it is answered. An error of the shim is an answer; a closed connection, to the daemon or from there to a shim, is not.
async fn answered<T>(what: &str, mut ask: impl AsyncFnMut() -> Answer<T>) -> Result<Answer<T>> {
    eventually(what, SOON * 3, async || match ask().await {
        Err(status) if is_silence(&status) => Err(status.into()),
        answer => Ok(answer),
    })
    .await
}

fn is_silence(status: &Status) -> bool {
    let words = ["ttrpc: closed", "transport", "error reading from server", "connection refused", "h2 protocol error"];
    matches!(status.code(), Code::Unavailable | Code::Cancelled) || words.iter().any(|words| status.message().contains(words))
}

/// A container from Create to Delete, with as many repetitions of calls as necessary.
async fn one_life(soak: &Soak, id: &str, dice: &mut Dice) -> Result<()> {
    let (era, status, bytes) = (soak.era(), 1 + dice.below(99) as u32, dice.below(300_000));
    // some run for as long as an exec or a restart of the daemon takes
    let script = format!("head -c {bytes} /dev/zero; sleep {}.{}; exit {status}", dice.below(2), dice.below(10));
    let (file, fills) = (soak.disk.join(id), soak.counts.disks.load(Ordering::Relaxed));
    let stdio = match dice.one_in(4) {
        true => Stdio::uri(format!("file://{}", file.display())),
        false => Stdio::Fifos { stdin: false, pace: Some(Pace::Count) },
    };
    let builder = soak.cx.container(&["sh", "-c", &script]).id(id).stdio(stdio);
    // metadata deleted before its task would leave a task that no client can delete: undo removes both, the task first
    let created = async { builder.metadata().await?.create_task().await };
    let mut container = match created.await {
        Ok(container) if container.start().await.is_ok() => container,
        begun => {
            count(&soak.counts.undone);
            let undone = undo(soak, id).await;
            drop(begun);
            let _there_may_be_one = fs::remove_file(&file);
            return undone;
        }
    };
    for exec in 0..dice.below(3) {
        run_exec(soak, &container, exec, dice).await?;
    }
    let mut read = 0;
    if let Some(reader) = container.io.stdout.as_mut().filter(|_| dice.one_in(3)) {
        for _turn in 0..1 + dice.below(4) {
            tokio::time::sleep(Duration::from_millis(dice.below(60))).await; // a random time
            reader.leave();
            read += reader.count();
            *reader = reader.again(Pace::Slow { chunk: 1000 + dice.below(9000) as usize, pause: Duration::from_millis(1) })?;
            count(&soak.counts.readers);
        }
    }
    let true_status = |found: u32| found == status || (found == 137 && soak.lost_its_shim(id));
    match answered("Wait", async || container.wait().await).await? {
        Ok(found) => ensure!(true_status(found), "Wait reports {found}, not {status}"),
        Err(refused) => ensure!(soak.lost_its_shim(id), "Wait: {refused}"),
    }
    // the runtime may be killed as well, and the daemon after the deletion
    let deleted = eventually("deleted", SOON * 3, async || match container.delete().await {
        Ok(deleted) => Ok(Some(deleted.exit_status)),
        Err(gone) if gone.code() == Code::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    });
    match deleted.await? {
        Some(found) => ensure!(true_status(found), "Delete reports {found}, not {status}"),
        None => ensure!(soak.lost_its_shim(id) || soak.era() != era, "Delete found no task"),
    }
    if let Some(reader) = &container.io.stdout {
        // a reader that opens the fifo after the writer's exit finds no writer
        eventually("the end of the output", SOON * 3, async || {
            let is_over = reader.ended() || read > 0 && (read + reader.count() == bytes || soak.lost_its_shim(id));
            ensure!(is_over, "{read} and {} of {bytes} bytes", reader.count());
            Ok(())
        })
        .await?;
        read += reader.count();
    } else {
        read = fs::metadata(&file).map_or(0, |about| about.len());
        let _there_may_be_none = fs::remove_file(&file);
    }
    // the shim logs the bytes lost on a full disk to a log that the daemon's crash closes
    let was_full = container.io.stdout.is_none() && (soak.disk.join(FILLER).exists() || soak.counts.disks.load(Ordering::Relaxed) != fills);
    ensure!(read == bytes || (read < bytes && (soak.lost_its_shim(id) || was_full)), "{read} of {bytes} bytes");
    soak.counts.bytes.fetch_add(read, Ordering::Relaxed);
    forget(soak, id).await?;
    count(&soak.counts.containers);
    exit_was_published(soak, id, status, era).await
}

async fn run_exec(soak: &Soak, container: &Container, number: u64, dice: &mut Dice) -> Result<()> {
    let (exec, status) = (format!("e{number}"), dice.below(100) as u32);
    let Ok(process) = container.exec(&exec, &["sh", "-c", &format!("exit {status}")]).start().await else {
        // the container has exited, or something was killed
        return Ok(());
    };
    match answered("the end of an exec", async || process.wait().await).await? {
        // init may exit first, which kills the exec
        Ok(found) => ensure!([status, 137].contains(&found), "{exec}: {found}, not {status}"),
        Err(refused) => ensure!(soak.lost_its_shim(&container.id), "{exec}: {refused}"),
    }
    count(&soak.counts.execs);
    Ok(())
}

/// Cleans up like a client that does not know how far its Create got.
async fn undo(soak: &Soak, id: &str) -> Result<()> {
    let client = soak.cx.client();
    eventually("no task", SOON * 3, async || {
        // an exited or missing container cannot be killed
        let _either = client.kill(id, "", 9, true).await;
        match client.delete(id).await {
            Err(error) if error.code() != Code::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    })
    .await?;
    forget(soak, id).await?;
    // a runtime that was killed during create has not reported its cgroups: they are empty, and stay
    cgroups::remove(soak.cx.cgroup_path(id).trim_matches('/'));
    Ok(())
}

/// Deletes the metadata.
async fn forget(soak: &Soak, id: &str) -> Result<()> {
    eventually("no metadata", SOON * 3, async || match soak.cx.client().delete_container(id).await {
        Err(error) if error.code() != Code::NotFound => Err(error.into()),
        _ => Ok(()),
    })
    .await
}

/// Checks that the exit was published once with the right status, if a subscriber was connected all the time.
async fn exit_was_published(soak: &Soak, id: &str, status: u32, era: u64) -> Result<()> {
    if !era.is_multiple_of(2) {
        return Ok(());
    }
    let deletion = soak.events.of_until(id, "delete").await;
    if soak.era() != era {
        return Ok(());
    }
    let published = deletion?;
    let exits = soak.events.exits(id, "");
    if soak.lost_its_shim(id) {
        // the shim may have published it before it was killed; then the daemon publishes it again
        ensure!(!exits.is_empty() && exits.iter().all(|exit| [status, 137].contains(&exit.status)), "{exits:?}");
    } else if exits.len() != 1 || exits[0].status != status {
        bail!("exactly one exit with {status} expected: {published:?}, {exits:?}");
    }
    count(&soak.counts.published);
    Ok(())
}
