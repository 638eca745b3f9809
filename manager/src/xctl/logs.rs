//! `logs`: what a detached container has written. The shim writes the file; no daemon takes part, here or there.

use std::path::PathBuf;

use clap::Args;
use containerd_client::types::v1::Status;

use crate::client::Client;
use crate::error::{Error, Result};
use crate::follow::{Follower, From};
use crate::tasks::{self, Id};
use crate::{containers, stdio};

/// Arguments of `logs`.
#[derive(Debug, Clone, Args)]
pub(crate) struct LogsArgs {
    /// Wait for more until the container has exited
    #[arg(short, long)]
    follow: bool,
    /// The last lines alone
    #[arg(short = 'n', long, value_name = "LINES")]
    tail: Option<usize>,
    /// Container
    container: String,
}

/// Prints the output of a container.
pub(crate) async fn run(client: &Client, args: LogsArgs) -> Result<u8> {
    let container = containers::get(client, &args.container).await?;
    let process = Id::init(&container.id);
    let task = tasks::get(client, &process).await?;
    let is_running = task.as_ref().is_some_and(|task| task.status() != Status::Stopped);
    // that of the task, if there is one: another client may have directed it elsewhere
    let of_label = || container.labels.get(containers::LOG_URI).cloned();
    let uri = task.map(|task| task.stdout).filter(|stdout| !stdout.is_empty()).or_else(of_label).unwrap_or_default();
    let path = stdio::file_path(&uri).filter(|path| path.exists()).ok_or_else(|| no_log(&container.id, stdio::file_path(&uri)))?;
    let mut log = Follower::open(&path, args.tail.map_or(From::Beginning, From::Lines))?;
    if args.follow && is_running {
        log.print_until(tasks::wait(client, &process)).await??;
    } else {
        log.print()?;
    }
    Ok(0)
}

fn no_log(id: &str, path: Option<PathBuf>) -> Error {
    Error::refused(match path {
        Some(path) => format!("container {id} has written nothing yet: there is no file {}", path.display()),
        None => format!(
            "container {id} has no log: its output goes to the client that started it; `xctl run --detach` and `xctl start` write one"
        ),
    })
}
