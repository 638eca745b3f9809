//! The keeper's answers while no worker can answer, and their latency.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use protobuf::Message;
use shim_tests::eventually::{SOON, eventually, patience};
use shim_tests::stand::Stand;
use shim_tests::task::Task;
use shim_tests::times::times;

/// `Connect`, `State` and `Pids` must be answered the same about a container and its init without a worker as with one. Execs are
/// missing from the answer to `Pids` then.
pub(crate) async fn ready_made_answers_are_those_of_the_worker(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).create().await?;
    let task = &container.task;
    let mut exec = 0;
    let all = async |task: &Task, exec: u32| -> Result<Vec<Vec<u8>>> {
        let (connect, state, pids) = tokio::join!(task.connect_to("c1"), task.state("c1", ""), task.pids("c1"));
        let pids: Vec<u32> = pids?.into_iter().filter(|pid| *pid != exec).collect();
        Ok(vec![connect?.write_to_bytes()?, state?.write_to_bytes()?, format!("{pids:?}").into_bytes()])
    };
    for step in ["created", "running", "with an exec", "paused", "exited"] {
        match step {
            "running" => container.start().await?,
            "with an exec" => exec = container.exec("e", &["sleep", "1000"]).await?,
            "paused" => task.pause("c1").await?,
            "exited" => {
                task.kill("c1", "", 9).await?;
                task.wait("c1", "e").await?;
                task.wait("c1", "").await?;
            }
            _ => {}
        }
        let fresh = all(task, exec).await?;
        let worker = container.worker_pid().await?;
        shim_tests::proc::signal(worker, nix::sys::signal::Signal::SIGSTOP)?;
        let ready = all(task, exec).await;
        shim_tests::proc::signal(worker, nix::sys::signal::Signal::SIGCONT)?;
        ensure!(ready? == fresh, "{step}: not the same");
    }
    eventually("deleted", SOON, async || Ok(task.delete("c1", "").await?)).await?;
    shim_tests::bundle::leave(task, container.shim_pid()?, "c1").await
}

/// While the OCI runtime creates another container of the pod, for any time.
pub(crate) async fn a_create_under_way_costs_a_siblings_state_no_fifty_milliseconds(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime())?;
    let anchor = stand.bundle("anchor", &["sleep", "1000"]).group("pod").run().await?;
    gate.hold("create")?;
    let slow = stand.bundle("slow", &["sh", "-c", "exit 3"]).group("pod").runtime(&gate.binary());
    let task = anchor.task.another().await?;
    let create = tokio::spawn(async move { slow.create_in(&task).await });
    gate.held("create").await?;
    let (begin, spell) = (Instant::now(), Duration::from_millis(500) * times());
    let mut took = Vec::new();
    while begin.elapsed() < spell {
        let asked = Instant::now();
        anchor.task.state("anchor", "").await?;
        took.push(asked.elapsed());
        tokio::time::sleep(Duration::from_millis(1)).await; // the polling interval
    }
    gate.release("create")?;
    let slow = create.await??;
    slow.start().await?;
    ensure!(slow.finish().await? == 3);
    took.sort();
    // on a busy machine some answers are late
    let (usual, longest) = (took[took.len() * 9 / 10], took[took.len() - 1]);
    ensure!(
        usual < Duration::from_millis(50) * patience(),
        "{} were asked for, nine of ten came within {usual:?}, all within {longest:?}",
        took.len()
    );
    anchor.shut_down().await.map(drop)
}
