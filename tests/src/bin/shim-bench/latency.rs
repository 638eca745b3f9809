//! How long one container takes from create to deleted, and one exec from added to deleted; how many containers several clients get done.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use shim_tests::container::Container;
use tokio::task::{JoinSet, LocalSet};

use super::plot::Panel;
use super::{Bed, Subject};

pub(super) const SECTION: &str = "Latency";
const CONTAINER: &str = "container with `/bin/true`, create to deleted, ms";
const EXEC: &str = "exec of `/bin/true`, added to deleted, ms";

/// What is plotted.
pub(super) const PANELS: [Panel<'_>; 2] = [
    ("A container with /bin/true, create to deleted, ms", SECTION, CONTAINER),
    ("An exec of /bin/true, added to deleted, ms", SECTION, EXEC),
];

/// How many containers each of several clients runs.
const EACH: usize = 10;
const LOAD_ROUNDS: usize = 3;

pub(super) async fn measure(subjects: &mut [Subject], rounds: usize) -> Result<()> {
    let mut runs = vec![Vec::new(); subjects.len()];
    let mut execs = vec![Vec::new(); subjects.len()];
    let mut hosts = Vec::new();
    for subject in subjects.iter() {
        run_true(&subject.bed).await?; // the first run is slower and not measured
        hosts.push(subject.bed.container(&["sleep", "100000"]).start().await?);
    }
    for round in 0..rounds {
        for (index, subject) in subjects.iter().enumerate() {
            runs[index].push(run_true(&subject.bed).await?);
            execs[index].push(run_exec(&hosts[index], &format!("e{round}")).await?);
        }
    }
    for host in &hosts {
        host.destroy().await?;
    }
    for ((subject, runs), execs) in subjects.iter_mut().zip(runs).zip(execs) {
        for (what, steps, runs) in [(CONTAINER, STEPS, runs), (EXEC, EXEC_STEPS, execs)] {
            subject.note_all(what, runs.iter().map(|run: &[Duration; 4]| milliseconds(run.iter().sum())).collect());
            let whole = what.split(',').next().unwrap_or(what);
            for (index, step) in steps.iter().enumerate() {
                subject.note_all(&format!("… {whole}: {step}, ms"), runs.iter().map(|run| milliseconds(run[index])).collect());
            }
        }
    }
    Ok(())
}

pub(super) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The steps of a container's life that [`run_true`] times.
const STEPS: [&str; 4] = ["create", "start", "until its exit is published", "delete"];

/// The times of the steps from create to deleted; metadata is made before and removed after.
pub(super) async fn run_true(bed: &Bed) -> Result<[Duration; 4]> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let id = format!("true{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let container = bed.container(&["/bin/true"]).id(&id).metadata().await?;
    let begin = Instant::now();
    let container = container.create_task().await?;
    let created = begin.elapsed();
    container.start().await?;
    let started = begin.elapsed();
    ensure!(container.wait().await? == 0);
    let ended = begin.elapsed();
    container.delete().await?;
    let deleted = begin.elapsed();
    container.remove().await?;
    Ok([created, started - created, ended - started, deleted - ended])
}

/// The steps of an exec's life that [`run_exec`] times.
const EXEC_STEPS: [&str; 4] = ["add", "start", "until its exit is published", "delete"];

/// The times of the steps from added to deleted.
pub(super) async fn run_exec(host: &Container, exec: &str) -> Result<[Duration; 4]> {
    let begin = Instant::now();
    let process = host.exec(exec, &["/bin/true"]).add().await?;
    let added = begin.elapsed();
    process.start().await?;
    let started = begin.elapsed();
    ensure!(process.wait().await? == 0);
    let ended = begin.elapsed();
    process.delete().await?;
    let deleted = begin.elapsed();
    Ok([added, started - added, ended - started, deleted - ended])
}

pub(super) async fn of_several_clients(subjects: &mut [Subject]) -> Result<()> {
    for count in [1, 2, 8] {
        let mut rates = vec![Vec::new(); subjects.len()];
        for _round in 0..LOAD_ROUNDS {
            for (index, subject) in subjects.iter().enumerate() {
                let begin = Instant::now();
                LocalSet::new().run_until(clients(&subject.bed, count)).await?;
                rates[index].push((count * EACH) as f64 / begin.elapsed().as_secs_f64());
            }
        }
        for (subject, rates) in subjects.iter_mut().zip(rates) {
            let clients = if count == 1 { "client" } else { "clients" };
            subject.note_all(&format!("{count} {clients}, containers/s"), rates);
        }
    }
    Ok(())
}

async fn clients(bed: &Bed, count: usize) -> Result<()> {
    let mut clients = JoinSet::new();
    for _client in 0..count {
        let bed = bed.clone();
        clients.spawn_local(async move {
            for _container in 0..EACH {
                run_true(&bed).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = clients.join_next().await {
        done??;
    }
    Ok(())
}
