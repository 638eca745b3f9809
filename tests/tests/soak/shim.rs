//! A shim without a daemon: what loses a byte or an exit is the shim.

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

use super::{Dice, Worker, count, hurt_a_worker, kill_a_runtime, lives, seed, sum, timer};

/// What was done so far.
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
    readers: AtomicU64,
    logs: AtomicU64,
}

/// What all lanes share.
struct Soak {
    stand: Stand,
    counts: Counts,
    disk: PathBuf,
    over: AtomicBool,
}

pub(crate) async fn every_exit_is_told_once_and_no_byte_is_lost_whatever_fails(stand: Stand) -> Result<()> {
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
    let lane = |lane| lives(&soak.over, lane, Dice::new(seed, lane), live);
    let (chaos, (), one, two, three, four) =
        tokio::join!(chaos(&soak, Dice::new(seed, 99)), timer(&soak.over), lane(0), lane(1), lane(2), lane(3));
    let Counts { absences, runtimes, workers, stops, shims, disks, readers, logs, .. } = &soak.counts;
    let faults = sum(&[absences, runtimes, workers, stops, shims, disks, readers, logs]);
    println!("soak: {faults} faults survived: {:?}", soak.counts);
    for result in [chaos, one, two, three, four] {
        result.with_context(|| format!("X_SEED={seed}"))?;
    }
    umount2(&soak.disk, MntFlags::MNT_DETACH)?;
    soak.stand.leaves_nothing().await
}

/// Makes things fail, one at a time.
async fn chaos(soak: &Soak, mut dice: Dice) -> Result<()> {
    let (stand, counts) = (&soak.stand, &soak.counts);
    while !soak.over.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(50 + dice.below(400))).await; // what fails, fails at some time
        match dice.below(6) {
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
            2 | 3 => match hurt_a_worker(&stand.shims(), &mut dice).await {
                Some(Worker::Killed) => count(&counts.workers),
                Some(Worker::Stopped) => count(&counts.stops),
                None => {}
            },
            _ => {
                let _full = fs::write(soak.disk.join("filler"), vec![0; 2 << 20]);
                tokio::time::sleep(Duration::from_millis(dice.below(700))).await;
                let _there_is_none = fs::remove_file(soak.disk.join("filler"));
                count(&counts.disks);
            }
        }
    }
    Ok(())
}

/// Where a container's output goes.
enum Output {
    Nowhere,
    Read(Reader),
    Left,
    Disk,
}

/// A container from its creation to its end, however often something has to be asked for again.
async fn one_life(soak: &Soak, id: &str, dice: &mut Dice) -> Result<()> {
    let stand = &soak.stand;
    let (status, bytes) = (1 + dice.below(99) as u32, dice.below(300_000));
    // some live for as long as an exec needs
    let script = format!("head -c {bytes} /dev/zero; sleep 0.{}; exit {status}", dice.below(10));
    let bundle = stand.bundle(id, &["sh", "-c", &script]);
    let path = stand.folder().join(id);
    let (bundle, output) = match dice.below(6) {
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
                Output::Read(reader)
            };
            (bundle.stdio("", &text, &text), output)
        }
    };
    let bundle = if dice.one_in(8) {
        count(&soak.counts.logs);
        bundle.without_log_reader()
    } else {
        bundle
    };
    let begun = begin(&bundle).await.with_context(|| format!("its shim said:\n{}", stand.log_of(id)));
    let Some(container) = begun? else { return undo(soak, &bundle).await };
    if dice.one_in(10) {
        return die(soak, container, status).await;
    }
    for exec in 0..dice.below(3) {
        run_exec(soak, &container, exec, dice).await?;
    }
    // without a reader it waits for one
    let late = if matches!(output, Output::Left) { Some(Reader::open(&path, Pace::Count)?) } else { None };
    let task = &container.task;
    let ended = eventually("the end", SOON * 3, async || Ok(task.wait_within(id, "", SOON * 2).await?)).await?;
    ensure!(ended == status, "Wait says {ended}, not {status}");
    // its runtime may be killed as well
    let deleted = eventually("deleted", SOON * 3, async || Ok(task.delete(id, "").await?)).await?;
    ensure!(deleted.exit_status == status, "Delete says {}, not {status}", deleted.exit_status);
    let reader = if let Output::Read(reader) = &output { Some(reader) } else { late.as_ref() };
    if let Some(reader) = reader {
        reader.to_end_within(SOON * 3).await?;
        ensure!(reader.count() == bytes, "{} of {bytes} bytes", reader.count());
        soak.counts.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
    drop(late);
    leave(&container).await?;
    told(soak, id, status).await?;
    let _of_the_disk = fs::remove_file(soak.disk.join(id));
    clear(&bundle)
}

/// Starts a shim, creates the container and starts it; nothing when the runtime was killed on the way.
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

/// An answer is one, whatever it says; silence is none.
fn refused(error: &anyhow::Error) -> Result<()> {
    match error.downcast_ref::<CallError>() {
        Some(CallError::Refused { .. }) => Ok(()),
        _ => bail!("no answer: {error:#}"),
    }
}

/// What containerd does when Create or Start has failed.
async fn undo(soak: &Soak, bundle: &Bundle) -> Result<()> {
    let shim = bundle.shim_pid()?;
    eventually("delete", SOON * 3, async || bundle.delete_command().await).await?;
    if proc::is_alive(shim) {
        let task = shim_tests::task::Task::connect(&socket(bundle)?).await;
        if let Ok(task) = task {
            let _it_may_be_on_its_way = task.shutdown(&bundle.id).await;
        }
    }
    eventually_true("the shim has left", SOON * 3, || !proc::is_alive(shim)).await?;
    let _of_the_disk = fs::remove_file(soak.disk.join(&bundle.id));
    // a runtime that was killed in the middle of create has told nobody of the cgroups that it had made: they are empty, and left
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
    ensure!([status, 137].contains(&deleted.exit_status), "delete says {}, not {status} or 137", deleted.exit_status);
    ensure!(!proc::is_alive(container.pid.cast_signed()), "its init lives");
    let _of_the_disk = fs::remove_file(soak.disk.join(&container.id));
    clear(&container.bundle)
}

async fn run_exec(soak: &Soak, container: &Container, number: u64, dice: &mut Dice) -> Result<()> {
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
            // init may end first, and takes it along
            ensure!([status, 137].contains(&ended), "{exec}: {ended}, not {status}");
            count(&soak.counts.execs);
        }
        // the container has ended, or the runtime was killed
        Err(CallError::Refused { .. }) => {}
        Err(error) => bail!("{exec}: {error}"),
    }
    Ok(())
}

async fn leave(container: &Container) -> Result<()> {
    let shim = container.shim_pid()?;
    match container.task.shutdown(&container.id).await {
        Ok(()) | Err(CallError::Closed) => {}
        Err(error) => return Err(error.into()),
    }
    eventually_true("the shim has left", SOON * 3, || !proc::is_alive(shim)).await
}

/// The exit was told, once but for the event that was under way when nobody was there, and truly.
async fn told(soak: &Soak, id: &str, status: u32) -> Result<()> {
    let events = soak.stand.containerd().events();
    eventually("the deletion is told", SOON * 3, async || {
        let told = events.of(id);
        ensure!(told.last().is_some_and(|event| event == "delete"), "{told:?}");
        Ok(())
    })
    .await?;
    let mut told = events.of(id);
    told.dedup();
    ensure!(told.iter().filter(|event| *event == "exit").count() == 1, "{told:?}");
    ensure!(events.exits(id, "").iter().all(|exit| exit.status == status), "{:?}", events.exits(id, ""));
    Ok(())
}

fn clear(bundle: &Bundle) -> Result<()> {
    fs::remove_dir_all(&bundle.folder).with_context(|| format!("remove {}", bundle.folder.display()))
}
