//! Containers with an exec each second, as liveness probes are: what they cost the node, without the daemon.

use std::time::Duration;

use anyhow::{Result, ensure};
use shim_tests::container::Container;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{Instant, sleep_until};

use super::Subject;
use super::cost::Meter;
use super::latency::{milliseconds, run_exec};

/// How often each container has an exec.
const PERIOD: Duration = Duration::from_secs(1);
/// How many of each container are measured.
const EXECS: u32 = 10;

/// One shim after the other, so that none shares the machine with the containers of another.
pub(super) async fn measure(subjects: &mut [Subject], containers: usize) -> Result<()> {
    for subject in subjects {
        let meter = Meter::new(&subject.bed.cx)?;
        let mut hosts = Vec::new();
        for _container in 0..containers {
            hosts.push(subject.bed.container(&["sleep", "100000"]).start().await?);
        }
        let (costs, times) = LocalSet::new().run_until(probe(&meter, hosts)).await?;
        subject.note_all("processor time per second, ms", costs);
        subject.note_all("an exec, added to deleted, ms", times);
    }
    Ok(())
}

/// The processor time of each second, and the time of each exec, in milliseconds.
async fn probe(meter: &Meter, hosts: Vec<Container>) -> Result<(Vec<f64>, Vec<f64>)> {
    let begin = Instant::now() + PERIOD;
    let count = u32::try_from(hosts.len())?;
    let mut clients = JoinSet::new();
    for (number, host) in (0..count).zip(hosts) {
        clients.spawn_local(async move {
            let mut times = Vec::new();
            // the first is slower, and begins before the processor time is read
            for round in 0..=EXECS {
                // spread over the second
                sleep_until(begin + PERIOD * round + PERIOD * number / count).await;
                let steps = run_exec(&host, &format!("p{round}")).await?;
                times.push(milliseconds(steps.iter().sum()));
            }
            anyhow::Ok((host, times.split_off(1)))
        });
    }
    let mut costs = Vec::new();
    sleep_until(begin + PERIOD).await;
    let mut before = meter.read()?;
    for second in 2..=EXECS + 1 {
        sleep_until(begin + PERIOD * second).await;
        let now = meter.read()?;
        costs.push(now - before);
        before = now;
    }
    let (mut all, mut hosts) = (Vec::new(), Vec::new());
    while let Some(done) = clients.join_next().await {
        let (host, times) = done??;
        all.extend(times);
        hosts.push(host);
    }
    for host in hosts {
        ensure!(host.destroy().await? == 137);
        host.remove().await?;
    }
    Ok((costs, all))
}
