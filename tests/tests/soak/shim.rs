//! A shim without a daemon: no byte and no exit may be lost.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use shim_tests::bundle::{Bundle, Container};
use shim_tests::eventually::{SOON, eventually, eventually_true, within};
use shim_tests::stand::Stand;
use shim_tests::stdio::{Pace, Reader, fifo};
use shim_tests::ttrpc::CallError;
use shim_tests::{cgroups, isolation, proc};

use super::{Dice, Worker, count, hurt_a_worker, kill_a_runtime, seed, sum, until_over};

/// Counters of the run so far.
#[derive(Debug, Default)]
struct Counts {
    containers: AtomicU64,
    execs: AtomicU64,
    bytes: AtomicU64,
    absences: AtomicU64,
    runtimes: AtomicU64,
    workers: AtomicU64,
    stops: AtomicU64,
    shims: AtomicU64,
    disks: AtomicU64,
    /// Bytes that a shim has reported lost on a full disk.
    lost: AtomicU64,
    readers: AtomicU64,
    logs: AtomicU64,
    /// Logs that are open and not read.
    stalled: AtomicU64,
}

/// State shared by all lanes.
struct Soak {
    stand: Stand,
    counts: Counts,
    disk: PathBuf,
    over: AtomicBool,
}

pub(crate) async fn every_exit_is_published_once_and_no_byte_is_lost_after_random_failures(stand: Stand) -> Result<()> {
    let seed = seed();
    let disk = stand.folder().join("disk");
    fs::create_dir(&disk)?;
    mount(Some("tmpfs"), &disk, Some("tmpfs"), MsFlags::empty(), Some("size=1m"))?;
    let soak = Soak { stand, counts: Counts::default(), disk, over: AtomicBool::new(false) };
    let live = async |id: &str, dice: &mut Dice| {
        let lived = one_life(&soak, id, dice).await;
        lived.with_context(|| format!("{:?}", soak.stand.containerd().events().of(id)))?;
        count(&soak.counts.containers);
        Ok(())
    };
    let disk = (soak.disk.as_path(), &soak.counts.disks);
    let results = until_over(&soak.over, seed, disk, chaos(&soak, Dice::new(seed, 99)), live).await;
    let Counts { absences, runtimes, workers, stops, shims, disks, readers, logs, stalled, .. } = &soak.counts;
    let faults = sum(&[absences, runtimes, workers, stops, shims, disks, readers, logs, stalled]);
    println!("soak: {faults} faults survived: {:?}", soak.counts);
    for result in results {
        result.with_context(|| format!("X_SEED={seed}"))?;
    }
    umount2(&soak.disk, MntFlags::MNT_DETACH)?;
    soak.stand.leaves_nothing().await
}

/// Injects failures, one at a time.
async fn chaos(soak: &Soak, mut dice: Dice) -> Result<()> {
    let (stand, counts) = (&soak.stand, &soak.counts);
    while !soak.over.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(50 + dice.below(400))).await; // a random time
        match dice.below(4) {
            0 => {
                stand.containerd().vanish();
                tokio::time::sleep(Duration::from_millis(dice.below(1500))).await;
                stand.containerd().come_back()?;
                count(&counts.absences);
            }
            1 => {
                if kill_a_runtime(&stand.runtime(), &mut dice) {
                    count(&counts.runtimes);
                }
            }
            _ => match hurt_a_worker(&stand.shims(), &mut dice).await {
                Some(Worker::Killed) => count(&counts.workers),
                Some(Worker::Stopped) => count(&counts.stops),
                None => {}
            },
        }
    }
    Ok(())
}

/// The target of a container's output.
enum Output {
    Nowhere,
    /// A reader that stays, or disconnects and comes back.
    Read(Reader, bool),
    /// A reader that opens only at the end.
    Left,
    Disk,
}

/// A container from Create to Delete, with as many repetitions of calls as necessary.
async fn one_life(soak: &Soak, id: &str, dice: &mut Dice) -> Result<()> {
    let stand = &soak.stand;
    let (status, bytes) = (1 + dice.below(99) as u32, dice.below(300_000));
    // some run for as long as an exec takes
    let script = format!("head -c {bytes} /dev/zero; sleep 0.{}; exit {status}", dice.below(10));
    let bundle = stand.bundle(id, &["sh", "-c", &script]);
    let path = stand.folder().join(id);
    let (bundle, mut output) = match dice.below(7) {
        0 => (bundle, Output::Nowhere),
        1 => {
            let uri = format!("file://{}", soak.disk.join(id).display());
            (bundle.stdio("", &uri, &uri), Output::Disk)
        }
        kind => {
            fifo(&path)?;
            let pace = if kind == 2 { Pace::Slow { chunk: 30_000, pause: Duration::from_millis(2) } } else { Pace::Count };
            let mut reader = Reader::open(&path, pace)?;
            let text = path.display().to_string();
            let output = if kind == 3 {
                reader.leave();
                count(&soak.counts.readers);
                Output::Left
            } else {
                Output::Read(reader, kind == 4)
            };
            (bundle.stdio("", &text, &text), output)
        }
    };
    let mut stalled = None;
    let bundle = match dice.below(16) {
        // the log reports the bytes lost on the disk
        _ if matches!(output, Output::Disk) => bundle,
        0 | 1 => {
            count(&soak.counts.logs);
            bundle.without_log_reader()
        }
        2 | 3 => {
            count(&soak.counts.stalled);
            bundle.write()?;
            stalled = Some(fs::File::options().read(true).write(true).open(bundle.folder.join("log"))?);
            bundle.without_log_reader()
        }
        _ => bundle,
    };
    let begun = begin(&bundle).await.with_context(|| format!("the log of its shim:\n{}", stand.log_of(id)));
    let Some(container) = begun? else { return undo(soak, &bundle).await };
    if dice.one_in(10) {
        return die(soak, container, status).await;
    }
    let mut execs = Vec::new();
    for exec in 0..dice.below(3) {
        execs.extend(run_exec(soak, &container, exec, dice).await?);
    }
    let mut read = 0;
    if let Output::Read(reader, true) = &mut output {
        for _turn in 0..1 + dice.below(4) {
            tokio::time::sleep(Duration::from_millis(dice.below(60))).await; // a random time
            reader.leave();
            read += reader.count();
            *reader = reader.again(Pace::Slow { chunk: 1000 + dice.below(9000) as usize, pause: Duration::from_millis(1) })?;
            count(&soak.counts.readers);
        }
    }
    // without a reader it waits for one
    let late = if matches!(output, Output::Left) { Some(Reader::open(&path, Pace::Count)?) } else { None };
    let task = &container.task;
    let ended = eventually("the end", SOON * 3, async || Ok(task.wait_within(id, "", SOON * 2).await?)).await?;
    ensure!(ended == status, "Wait reports {ended}, not {status}");
    // the runtime may be killed as well
    let deleted = eventually("deleted", SOON * 3, async || Ok(task.delete(id, "").await?)).await?;
    ensure!(deleted.exit_status == status, "Delete reports {}, not {status}", deleted.exit_status);
    let reader = if let Output::Read(reader, _) = &output { Some(reader) } else { late.as_ref() };
    if let Some(reader) = reader {
        // a reader that opens the fifo after the writer's exit finds no writer
        eventually("the end of the output", SOON * 3, async || {
            ensure!(reader.ended() || read > 0 && read + reader.count() == bytes, "{read} and {} of {bytes} bytes", reader.count());
            Ok(())
        })
        .await?;
        read += reader.count();
        ensure!(read == bytes, "{read} of {bytes} bytes");
        soak.counts.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
    drop(late);
    leave(&container).await?;
    drop(stalled);
    exits_were_published(soak, id, status, &execs).await?;
    if matches!(output, Output::Disk) {
        accounted(soak, id, bytes).await?;
    }
    let _of_the_disk = fs::remove_file(soak.disk.join(id));
    clear(&bundle)
}

/// Starts a shim, creates the container and starts it; none if the runtime was killed meanwhile.
async fn begin(bundle: &Bundle) -> Result<Option<Container>> {
    let task = bundle.shim().await?;
    let container = match within("Create", SOON * 3, bundle.clone().create_in(&task)).await? {
        Ok(container) => container,
        Err(error) => return refused(&error).map(|()| None),
    };
    match within("Start", SOON * 3, container.start()).await? {
        Ok(()) => Ok(Some(container)),
        Err(error) => refused(&error).map(|()| None),
    }
}

/// Accepts any answer, but not a timeout.
fn refused(error: &anyhow::Error) -> Result<()> {
    match error.downcast_ref::<CallError>() {
        Some(CallError::Refused { .. }) => Ok(()),
        _ => bail!("no answer: {error:#}"),
    }
}

/// Cleans up like containerd after a failed Create or Start.
async fn undo(soak: &Soak, bundle: &Bundle) -> Result<()> {
    let shim = bundle.shim_pid()?;
    eventually("delete", SOON * 3, async || bundle.delete_command().await).await?;
    if proc::is_alive(shim) {
        let task = shim_tests::task::Task::connect(&socket(bundle)?).await;
        if let Ok(task) = task {
            let _it_may_be_on_its_way = task.shutdown(&bundle.id).await;
        }
    }
    eventually_true("the shim has exited", SOON * 3, || !proc::is_alive(shim)).await?;
    let _of_the_disk = fs::remove_file(soak.disk.join(&bundle.id));
    // a runtime that was killed during create has not reported its cgroups: they are empty, and stay
    cgroups::remove(&format!("{}/{}/{}", isolation::cgroup(), soak.stand.namespace(), bundle.id));
    clear(bundle)
}

fn socket(bundle: &Bundle) -> Result<PathBuf> {
    let address = fs::read_to_string(bundle.folder.join("address"))?;
    Ok(PathBuf::from(address.trim().trim_start_matches("unix://")))
}

/// The shim is killed.
async fn die(soak: &Soak, container: Container, status: u32) -> Result<()> {
    let shim = container.shim_pid()?;
    proc::kill_hard(shim);
    count(&soak.counts.shims);
    eventually_true("the shim is dead", SOON, || !proc::is_alive(shim)).await?;
    let deleted = eventually("delete", SOON * 3, async || container.bundle.delete_command().await).await?;
    ensure!([status, 137].contains(&deleted.exit_status), "delete reports {}, not {status} or 137", deleted.exit_status);
    ensure!(!proc::is_alive(container.pid.cast_signed()), "its init is alive");
    let _of_the_disk = fs::remove_file(soak.disk.join(&container.id));
    clear(&container.bundle)
}

/// Returns its name and status, if there was one.
async fn run_exec(soak: &Soak, container: &Container, number: u64, dice: &mut Dice) -> Result<Option<(String, u32)>> {
    let (exec, status) = (format!("e{number}"), dice.below(100) as u32);
    let (task, id) = (&container.task, container.id.as_str());
    let request = container.bundle.exec_request(&exec, &["sh", "-c", &format!("exit {status}")]);
    let begun = match within("Exec", SOON * 3, task.exec(&request)).await? {
        Ok(()) => within("Start of an exec", SOON * 3, task.start(id, &exec)).await?,
        Err(error) => Err(error),
    };
    match begun {
        Ok(_) => {
            let ended = eventually("the end of an exec", SOON * 3, async || Ok(task.wait_within(id, &exec, SOON * 2).await?)).await?;
            // init may exit first, which kills the exec
            ensure!([status, 137].contains(&ended), "{exec}: {ended}, not {status}");
            count(&soak.counts.execs);
            Ok(Some((exec, ended)))
        }
        // the container has exited, or the runtime was killed
        Err(CallError::Refused { .. }) => Ok(None),
        Err(error) => bail!("{exec}: {error}"),
    }
}

async fn leave(container: &Container) -> Result<()> {
    let shim = container.shim_pid()?;
    match container.task.shutdown(&container.id).await {
        Ok(()) | Err(CallError::Closed) => {}
        Err(error) => return Err(error.into()),
    }
    eventually_true("the shim has exited", SOON * 3, || !proc::is_alive(shim)).await
}

/// Checks that every exit was published once with the right status; only unacknowledged events may be sent again.
async fn exits_were_published(soak: &Soak, id: &str, status: u32, execs: &[(String, u32)]) -> Result<()> {
    let events = soak.stand.containerd().events();
    eventually("the deletion is published", SOON * 3, async || {
        let published = events.of(id);
        ensure!(published.last().is_some_and(|event| event == "delete"), "{published:?}");
        Ok(())
    })
    .await?;
    for (exec, status) in [(String::new(), status)].iter().chain(execs) {
        let exits = events.exits(id, exec);
        ensure!(!exits.is_empty() && exits.iter().all(|exit| exit.status == *status), "{exec}: {exits:?}, not {status}");
    }
    let again = soak.stand.containerd().sent_twice(id);
    ensure!(again.is_empty(), "sent again, though acknowledged: {again:?}");
    let mut published = events.of(id);
    published.dedup();
    ensure!(published.iter().filter(|event| *event == "exit").count() == 1, "out of order: {published:?}");
    Ok(())
}

/// Checks that the shim has reported the missing bytes as lost. A worker that is killed while it discards output loses the count.
async fn accounted(soak: &Soak, id: &str, bytes: u64) -> Result<()> {
    eventually("every byte is accounted for", SOON, async || {
        let kept = fs::metadata(soak.disk.join(id)).map_or(0, |about| about.len());
        let log = soak.stand.log_of(id);
        let lost: Vec<u64> = log
            .split("lost_bytes=")
            .skip(1)
            .filter_map(|rest| rest.split(|end: char| !end.is_ascii_digit()).next()?.parse().ok())
            .collect();
        let known = kept + lost.iter().sum::<u64>();
        let is_uncounted =
            log.split_once("discarding output until its file is writable").is_some_and(|(_, then)| then.contains("the worker exited"));
        ensure!(known == bytes || known < bytes && is_uncounted, "{bytes} bytes, {kept} kept, {lost:?} lost; the log of the shim:\n{log}");
        soak.counts.lost.fetch_add(lost.iter().sum(), Ordering::Relaxed);
        Ok(())
    })
    .await
}

fn clear(bundle: &Bundle) -> Result<()> {
    fs::remove_dir_all(&bundle.folder).with_context(|| format!("remove {}", bundle.folder.display()))
}
