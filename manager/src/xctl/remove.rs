//! `rm`: a container with its task, its snapshot, its fifos and its log.

use clap::Args;
use containerd_client::services::v1::Container;
use containerd_client::types::v1::Status;
use tonic::Code;

use crate::client::Client;
use crate::error::{Error, IoContext as _, Result};
use crate::stdio::{self, Folders};
use crate::tasks::{self, Id};
use crate::{containers, image, output, stop};

/// Arguments of `rm`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RmArgs {
    /// Kill those that run
    #[arg(short, long)]
    force: bool,
    /// Containers
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// Removes containers; the others too if one cannot be removed.
pub(crate) async fn run(client: &Client, folders: &Folders, args: RmArgs) -> Result<u8> {
    let mut failed = 0;
    for id in &args.containers {
        let removed = async {
            let container = containers::get(client, id).await?;
            end_task(client, &container, args.force).await?;
            remove(client, folders, &container).await
        };
        match removed.await {
            Ok(()) => output::print(&format!("{id}\n"))?,
            Err(error) => {
                failed = 1;
                eprintln!("xctl: {}", error.chain());
            }
        }
    }
    Ok(failed)
}

async fn end_task(client: &Client, container: &Container, force: bool) -> Result<()> {
    let process = Id::init(&container.id);
    let Some(task) = tasks::get(client, &process).await? else { return Ok(()) };
    if task.status() != Status::Stopped {
        if !force {
            let id = &container.id;
            return Err(Error::refused(format!("container {id} runs; `xctl stop {id}` stops it, --force kills it")));
        }
        containers::suspend_restarts(client, container).await?;
        stop::kill_hard(client, &process).await?;
    }
    tasks::delete(client, &process).await.map(drop)
}

/// Removes a container without a task, and what is `xctl`'s own of it.
pub(crate) async fn remove(client: &Client, folders: &Folders, container: &Container) -> Result<()> {
    match containers::delete(client, &container.id).await {
        Err(error) if error.code() != Some(Code::NotFound) => return Err(error),
        _ => {}
    }
    if !container.snapshot_key.is_empty() {
        image::remove_snapshot(client, &container.snapshotter, &container.snapshot_key).await?;
    }
    stdio::remove(&folders.of(client.namespace(), &container.id))?;
    // a log that was put elsewhere is its owner's
    let own = folders.log(client.namespace(), &container.id);
    let is_own = container.labels.get(containers::LOG_URI).and_then(|uri| stdio::file_path(uri)).is_some_and(|path| path == own);
    match std::fs::remove_file(&own) {
        Err(error) if is_own && error.kind() != std::io::ErrorKind::NotFound => Err(error).on("remove", &own),
        _ => Ok(()),
    }
}
