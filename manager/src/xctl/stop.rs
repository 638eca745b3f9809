//! `stop` and `kill`: a request to end, then force; or a signal.

use std::time::Duration;

use clap::Args;
use containerd_client::types::v1::Status;
use nix::sys::signal::Signal;

use crate::client::Client;
use crate::error::{Error, Result};
use crate::tasks::{self, Id};
use crate::{containers, output, parse};

/// Arguments of `stop`.
#[derive(Debug, Clone, Args)]
pub(crate) struct StopArgs {
    /// Seconds before the container is killed
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10)]
    time: u32,
    /// Signal to send first [default: the container's, or TERM]
    #[arg(short, long, value_parser = parse::signal)]
    signal: Option<u32>,
    /// Containers
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// Arguments of `kill`.
#[derive(Debug, Clone, Args)]
pub(crate) struct KillArgs {
    /// Signal, by name or number
    #[arg(short, long, default_value = "KILL", value_parser = parse::signal)]
    signal: u32,
    /// To every process of the container, not to the first alone
    #[arg(long)]
    all: bool,
    /// Containers
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// Stops containers, at the same time.
pub(crate) async fn stop(client: &Client, args: StopArgs) -> Result<u8> {
    let mut steps = tokio::task::JoinSet::new();
    for id in args.containers.clone() {
        let (client, time, signal) = (client.clone(), Duration::from_secs(u64::from(args.time)), args.signal);
        steps.spawn(async move { stop_one(&client, &id, time, signal).await.map(|()| id) });
    }
    let mut failed = 0;
    while let Some(stopped) = steps.join_next().await {
        match stopped {
            Ok(Ok(id)) => output::print(&format!("{id}\n"))?,
            Ok(Err(error)) => {
                failed = 1;
                eprintln!("xctl: {}", error.chain());
            }
            Err(_panic) => failed = 1,
        }
    }
    Ok(failed)
}

async fn stop_one(client: &Client, id: &str, time: Duration, signal: Option<u32>) -> Result<()> {
    let container = containers::get(client, id).await?;
    containers::suspend_restarts(client, &container).await?;
    let process = Id::init(id);
    let Some(task) = tasks::get(client, &process).await? else { return Ok(()) };
    let of_label = container.labels.get(containers::STOP_SIGNAL).and_then(|signal| parse::signal(signal).ok());
    let signal = signal.or(of_label).unwrap_or(Signal::SIGTERM as u32);
    match task.status() {
        Status::Stopped => return Ok(()),
        // it takes no other signal
        Status::Paused | Status::Pausing | Status::Created => {}
        Status::Running | Status::Unknown => {
            if !tasks::kill(client, &process, signal, false).await? {
                return Ok(());
            }
            match tokio::time::timeout(time, tasks::wait(client, &process)).await {
                Ok(ended) => return ended.map(drop),
                Err(_elapsed) => {}
            }
        }
    }
    kill_hard(client, &process).await
}

/// Kills a container, and waits until it has exited.
pub(crate) async fn kill_hard(client: &Client, process: &Id) -> Result<()> {
    if !tasks::kill(client, process, Signal::SIGKILL as u32, true).await? {
        return Ok(());
    }
    match tokio::time::timeout(KILLED, tasks::wait(client, process)).await {
        Ok(ended) => ended.map(drop),
        Err(_elapsed) => Err(Error::refused(format!(
            "container {} has not exited {} s after SIGKILL: a process of it may be blocked in the kernel; `xctl top` lists its processes",
            process.container,
            KILLED.as_secs()
        ))),
    }
}

/// Sends a signal.
pub(crate) async fn kill(client: &Client, args: KillArgs) -> Result<u8> {
    for id in &args.containers {
        let container = containers::get(client, id).await?;
        if args.signal == Signal::SIGKILL as u32 {
            containers::suspend_restarts(client, &container).await?;
        }
        if !tasks::kill(client, &Id::init(id), args.signal, args.all).await? {
            return Err(Error::refused(format!("container {id} does not run")));
        }
        output::print(&format!("{id}\n"))?;
    }
    Ok(0)
}

const KILLED: Duration = Duration::from_secs(30);
