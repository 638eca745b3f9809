//! Many execs: how long State takes meanwhile, and the cost of each exec. The shims are driven without a daemon, whose own work would be
//! most of the measured time.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use shim_tests::bundle::Container;
use shim_tests::eventually::SOON;
use shim_tests::stand::Stand;
use shim_tests::stdio;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::timeout;

use super::latency::milliseconds;
use super::{Plan, Subject};

/// How many execs run while State is measured.
const RUNNING: usize = 400;
/// How many execs are started at once.
const AT_ONCE: usize = 500;
/// How many execs have exited with unread output.
const UNREAD: usize = 200;
const SLEEP: [&str; 2] = ["sleep", "100000"];
/// How often State is measured among those that run.
const STATES: usize = 2000;

pub(super) async fn measure(subjects: &mut [Subject], plan: &Plan, programs: &Path) -> Result<()> {
    for subject in subjects {
        let mut shim = subject.shim.clone();
        // not that of the oldest suite
        shim.binary.get_or_insert_with(|| plan.suite.program(&subject.shim.binary_name()));
        let stand = Stand::with_engine(&shim, programs, &plan.suite.runtime(subject.runtime))?;
        LocalSet::new().run_until(of_one(subject, &stand, plan.execs)).await?;
    }
    Ok(())
}

async fn of_one(subject: &mut Subject, stand: &Stand, execs: usize) -> Result<()> {
    for (letter, with) in [("a", "without stdio"), ("b", "with two fifos each")] {
        let container = stand.bundle(&format!("many{letter}"), &["sleep", "100000"]).run().await?;
        let mut readers = Vec::new();
        let mut storm = start(&container, "r", RUNNING, with == "with two fifos each", &SLEEP, &mut readers).await?;
        while let Some(started) = storm.join_next().await {
            started??;
        }
        let times = ask(&container, Duration::ZERO, |asked| asked == STATES).await?;
        subject.note_all(&format!("State beside {RUNNING} execs {with}, ms"), all(times));
        let mut times = Vec::with_capacity(RUNNING);
        for number in 0..RUNNING {
            let begin = Instant::now();
            container.task.close_stdin(&container.id, &format!("r{number}")).await?;
            times.push(begin.elapsed());
        }
        subject.note_all(&format!("CloseIO of one of {RUNNING} execs {with}, ms"), all(times));
        ensure!(container.destroy().await? == 137);

        let container = stand.bundle(&format!("storm{letter}"), &["sleep", "100000"]).run().await?;
        let over = Arc::new(AtomicBool::new(false));
        let begin = Instant::now();
        let mut storm = start(&container, "s", AT_ONCE, with == "with two fifos each", &SLEEP, &mut readers).await?;
        let all_started = async {
            while let Some(started) = storm.join_next().await {
                started??;
            }
            over.store(true, Ordering::Relaxed);
            anyhow::Ok(begin.elapsed())
        };
        let (times, took) = tokio::try_join!(ask(&container, Duration::from_millis(5), |_| over.load(Ordering::Relaxed)), all_started)?;
        let worst = times.iter().max().copied().unwrap_or_default();
        subject.note_all(&format!("State while {AT_ONCE} execs start {with}, ms"), all(times));
        subject.note(&format!("… the longest of these {with}, ms"), milliseconds(worst));
        subject.note(&format!("… until all have started {with}, s"), took.as_secs_f64());
        ensure!(container.destroy().await? == 137);
    }

    // A stock shim of containerd 1.6 needs more than a second for each of these.
    match timeout(SOON * 6, beside_unread(stand)).await {
        Ok(times) => subject.note_all(&format!("State beside {UNREAD} exited execs with two unread fifos each, ms"), all(times?)),
        Err(_) => eprintln!("{}: {UNREAD} execs with unread output did not end within {:?}", subject.name, SOON * 6),
    }

    let container = stand.bundle("row", &["sleep", "100000"]).run().await?;
    let mut times = Vec::with_capacity(execs);
    for number in 0..execs {
        let begin = Instant::now();
        ensure!(run_undeleted(&container, &format!("e{number}")).await? == 0);
        times.push(begin.elapsed());
    }
    let some = 100.min(execs);
    subject.note_all("exec of `/bin/true` that is not deleted, to its exit, the first hundred, ms", all(times[..some].to_vec()));
    subject.note_all(&format!("… the last hundred of {execs}, ms"), all(times[execs - some..].to_vec()));
    ensure!(container.destroy().await? == 137);
    Ok(())
}

fn all(times: Vec<Duration>) -> Vec<f64> {
    times.into_iter().map(milliseconds).collect()
}

/// How long State takes beside many execs that have exited and whose output is not read.
async fn beside_unread(stand: &Stand) -> Result<Vec<Duration>> {
    let container = stand.bundle("unread", &["sleep", "100000"]).run().await?;
    let mut readers = Vec::new();
    let mut storm = start(&container, "u", UNREAD, true, &["sh", "-c", "echo out; echo err >&2"], &mut readers).await?;
    while let Some(started) = storm.join_next().await {
        started??;
    }
    for number in 0..UNREAD {
        ensure!(container.task.wait_within(&container.id, &format!("u{number}"), SOON * 4).await? == 0);
    }
    let times = ask(&container, Duration::ZERO, |asked| asked == STATES).await?;
    ensure!(container.destroy().await? == 137);
    Ok(times)
}

async fn run_undeleted(container: &Container, exec: &str) -> Result<u32> {
    container.exec(exec, &["/bin/true"]).await?;
    Ok(container.task.wait(&container.id, exec).await?)
}

/// Adds execs and starts all of them at once; each future ends when its exec has started.
async fn start(
    container: &Container,
    prefix: &str,
    count: usize,
    fifos: bool,
    command: &[&str],
    readers: &mut Vec<File>,
) -> Result<JoinSet<Result<()>>> {
    let folder = container.stand().folder().join(format!("{}-fifos", container.id));
    std::fs::create_dir_all(&folder)?;
    for number in 0..count {
        let mut request = container.bundle.exec_request(&format!("{prefix}{number}"), command);
        if fifos {
            for (name, target) in [("out", &mut request.stdout), ("err", &mut request.stderr)] {
                let fifo = folder.join(format!("{number}-{name}"));
                stdio::fifo(&fifo)?;
                readers.push(File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(&fifo)?);
                *target = fifo.display().to_string();
            }
        }
        container.task.exec(&request).await?;
    }
    let mut starts = JoinSet::new();
    for number in 0..count {
        let (task, id, exec) = (container.task.clone(), container.id.clone(), format!("{prefix}{number}"));
        starts.spawn(async move {
            let request = containerd_shim_protos::api::StartRequest { id, exec_id: exec, ..Default::default() };
            let started = task.call::<containerd_shim_protos::api::StartResponse>("Start", &request, SOON * 20).await;
            started.map(drop).context("start an exec")
        });
    }
    Ok(starts)
}

/// How long each State of init takes on a connection of its own, until it is enough.
async fn ask(container: &Container, pause: Duration, enough: impl Fn(usize) -> bool) -> Result<Vec<Duration>> {
    let task = container.task.another().await?;
    let mut times = Vec::new();
    while !enough(times.len()) {
        let begin = Instant::now();
        task.state_within(&container.id, "", SOON * 4).await?;
        times.push(begin.elapsed());
        tokio::time::sleep(pause).await;
    }
    Ok(times)
}
