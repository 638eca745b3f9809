//! `exec`: another process in a container that runs.

use std::path::{Path, PathBuf};

use clap::Args;
use containerd_client::services::v1::ExecProcessRequest;
use containerd_client::types::v1::Status;
use prost_types::Any;

use crate::attach::{Attachment, Outputs, Signals};
use crate::client::Client;
use crate::error::{Error, Result};
use crate::spec::{self, ProcessWish};
use crate::start::{DetachKeys, exit_status, show};
use crate::stdio::{self, Folders, Uris};
use crate::tasks::{self, Id};
use crate::users::{self, User};
use crate::{containers, create, parse, terminal};

/// Arguments of `exec`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ExecArgs {
    /// Pass standard input on
    #[arg(short, long, conflicts_with = "detach")]
    interactive: bool,
    /// Give the process a terminal
    #[arg(short, long, conflicts_with = "detach")]
    tty: bool,
    /// Let it run without its output
    #[arg(short, long)]
    detach: bool,
    /// Set an environment variable: NAME=VALUE, or NAME for xctl's own
    #[arg(short, long = "env", value_name = "NAME=VALUE", value_parser = parse::variable)]
    environment: Vec<String>,
    /// User, by name or number in the container: USER[:GROUP] [default: the container's]
    #[arg(short, long)]
    user: Option<String>,
    /// Folder that the program starts in [default: the container's]
    #[arg(short, long, value_name = "FOLDER", value_parser = parse::absolute)]
    workdir: Option<PathBuf>,
    #[command(flatten)]
    keys: DetachKeys,
    /// Container
    container: String,
    /// Program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs a process, and returns its status.
pub(crate) async fn run(client: &Client, folders: &Folders, args: ExecArgs) -> Result<u8> {
    if args.tty && !terminal::is_there() {
        return Err(Error::refused("standard input is not a terminal, so --tty cannot be used; leave it out, or run xctl on a terminal"));
    }
    let container = containers::get(client, &args.container).await?;
    let task = tasks::get(client, &Id::init(&container.id)).await?;
    let task = task
        .filter(|task| task.status() == Status::Running)
        .ok_or_else(|| Error::refused(format!("container {id} does not run; `xctl start {id}` starts it", id = container.id)))?;
    let value = process_of(&args, &containers::spec(&container)?, task.pid)?;
    let process = Id { container: container.id.clone(), exec: format!("xctl-{}", create::random()?) };
    let folder = folders.of(client.namespace(), &container.id).join(&process.exec);
    let uris = if args.detach { Uris::default() } else { stdio::fifos(&folder, args.interactive, args.tty)? };
    let request = ExecProcessRequest {
        container_id: process.container.clone(),
        exec_id: process.exec.clone(),
        stdin: uris.stdin.clone(),
        stdout: uris.stdout.clone(),
        stderr: uris.stderr.clone(),
        terminal: args.tty,
        spec: Some(Any { type_url: PROCESS.to_owned(), value }),
    };
    if args.detach {
        tasks::exec(client, request).await?;
        return match tasks::start(client, &process).await {
            Ok(()) => Ok(0),
            Err(error) => {
                // it never ran
                let _ = tasks::delete(client, &process).await;
                Err(error)
            }
        };
    }
    let ended = in_foreground(client, &args, &process, uris, request).await;
    match &ended {
        // it runs, and its fifos are in use
        Ok(None) => {}
        _ => stdio::remove(&folder)?,
    }
    ended.map(|status| status.map_or(0, exit_status))
}

async fn in_foreground(client: &Client, args: &ExecArgs, process: &Id, uris: Uris, request: ExecProcessRequest) -> Result<Option<u32>> {
    let outputs = Outputs::open(&uris)?;
    let mut signals = Signals::take()?;
    tasks::exec(client, request).await?;
    // an exec's fifos are opened by the shim at its start
    if let Err(error) = tasks::start(client, process).await {
        // it never ran
        let _ = tasks::delete(client, process).await;
        return Err(error);
    }
    let what = Attachment {
        process: process.clone(),
        stdin: uris.stdin,
        is_terminal: args.tty,
        is_interactive: args.interactive,
        keys: args.keys.detach_keys.clone(),
    };
    let running = what.begin(client, Some(outputs))?;
    let Some((status, running)) = show(client, running, &mut signals).await? else { return Ok(None) };
    tasks::delete(client, process).await?;
    running.finish().await;
    Ok(Some(status))
}

/// The container's process with what the command line changes.
fn process_of(args: &ExecArgs, container: &oci_spec::runtime::Spec, init: u32) -> Result<Vec<u8>> {
    let of_init = container.process().clone().unwrap_or_default();
    let user = match &args.user {
        // the container's own files, as it sees them now
        Some(text) => users::look_up(&Path::new("/proc").join(init.to_string()).join("root"), text)?,
        None => User {
            uid: of_init.user().uid(),
            gid: of_init.user().gid(),
            more_gids: of_init.user().additional_gids().clone().unwrap_or_default(),
        },
    };
    let wish = ProcessWish {
        args: args.command.clone(),
        environment: spec::environment(&of_init.env().clone().unwrap_or_default(), args.tty, &args.environment),
        user,
        folder: args.workdir.clone().unwrap_or_else(|| of_init.cwd().clone()),
        is_terminal: args.tty,
    };
    let mut process = spec::process(&wish)?;
    // what the container may do, its processes may
    process.set_capabilities(of_init.capabilities().clone());
    process.set_rlimits(of_init.rlimits().clone());
    process.set_no_new_privileges(of_init.no_new_privileges());
    serde_json::to_vec(&process).map_err(|error| Error::unreadable("the process that was made", error))
}

const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
