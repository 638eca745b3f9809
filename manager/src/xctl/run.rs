//! `run`: a new container, started in the foreground or detached.

use clap::Args;

use crate::client::Client;
use crate::error::{Error, Result};
use crate::start::DetachKeys;
use crate::stdio::Folders;
use crate::{containers, create, output, remove, start, terminal};

/// Arguments of `run`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RunArgs {
    /// Print the name and let the container run; its output goes to a file that `xctl logs` shows
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Remove the container when it has exited
    #[arg(long, conflicts_with = "detach")]
    rm: bool,
    #[command(flatten)]
    keys: DetachKeys,
    #[command(flatten)]
    options: create::Options,
}

/// Runs a new container, and returns its status. When it cannot be started, nothing of it is left.
pub(crate) async fn run(client: &Client, folders: &Folders, args: RunArgs) -> Result<u8> {
    if args.options.restart.as_ref().is_some_and(|policy| policy != "no") && !args.detach {
        return Err(Error::refused("--restart needs --detach: it is the daemon that restarts the container, and a file gets its output"));
    }
    if args.options.tty && !args.detach && !terminal::is_there() {
        return Err(Error::refused("standard input is not a terminal, so --tty cannot be used; leave it out, or add --detach"));
    }
    let id = create::create(client, folders, &args.options).await?;
    let container = containers::get(client, &id).await?;
    let ended = if args.detach {
        start::detached(client, folders, &container).await.map(|()| 0)
    } else {
        start::foreground(client, folders, &container, args.keys.detach_keys, args.rm).await
    };
    if ended.is_err() && crate::tasks::get(client, &crate::tasks::Id::init(&id)).await.is_ok_and(|task| task.is_none()) {
        // nothing of it runs: with the same name the next attempt can succeed
        if let Err(error) = remove::remove(client, folders, &container).await {
            eprintln!("xctl: cannot remove container {id}, which was not started: {}", error.chain());
        }
    }
    let status = ended?;
    if args.detach {
        output::print(&format!("{id}\n"))?;
    }
    Ok(status)
}
