//! `start` and `attach`, and the second half of `run`: a task for a container, in the foreground or detached.

use clap::Args;
use containerd_client::services::v1::{Container, CreateTaskRequest};
use containerd_client::types::v1::Status;
use tonic::Code;

use crate::attach::{self, Attachment, End, Outputs, Running, Signals};
use crate::client::Client;
use crate::error::{Error, Result};
use crate::follow::{Follower, From};
use crate::keys::Keys;
use crate::stdio::{self, Folders};
use crate::tasks::{self, Id};
use crate::{containers, image, output, remove};

/// Arguments of `start`.
#[derive(Debug, Clone, Args)]
pub(crate) struct StartArgs {
    /// Show the output here, pass signals on and wait for the exit
    #[arg(short, long)]
    pub(crate) attach: bool,
    #[command(flatten)]
    keys: DetachKeys,
    /// Containers
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// Arguments of `attach`.
#[derive(Debug, Clone, Args)]
pub(crate) struct AttachArgs {
    /// Pass nothing of standard input on
    #[arg(long)]
    no_stdin: bool,
    #[command(flatten)]
    keys: DetachKeys,
    /// Container
    container: String,
}

/// Which keys leave a terminal without ending its process.
#[derive(Debug, Clone, Args)]
pub(crate) struct DetachKeys {
    /// Keys that leave the terminal without ending the process; "" for none
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", value_parser = Keys::parse)]
    pub(crate) detach_keys: Keys,
}

/// Starts containers.
pub(crate) async fn start(client: &Client, folders: &Folders, args: StartArgs) -> Result<u8> {
    if args.attach {
        let [id] = args.containers.as_slice() else {
            return Err(Error::refused("--attach shows one container; start the others without it"));
        };
        let container = containers::get(client, id).await?;
        return foreground(client, folders, &container, args.keys.detach_keys, false).await;
    }
    for id in &args.containers {
        let container = containers::get(client, id).await?;
        detached(client, folders, &container).await?;
        output::print(&format!("{id}\n"))?;
    }
    Ok(0)
}

/// Starts a container whose output goes to its file.
pub(crate) async fn detached(client: &Client, folders: &Folders, container: &Container) -> Result<()> {
    let folder = folders.of(client.namespace(), &container.id);
    let uri = match container.labels.get(containers::LOG_URI) {
        Some(uri) => uri.clone(),
        None => stdio::file_uri(&folders.log(client.namespace(), &container.id))?,
    };
    let has_stdin = container.labels.contains_key(containers::INTERACTIVE);
    let is_terminal = is_terminal(container)?;
    make_room(client, container).await?;
    // a log that is removed while its container is stopped begins anew
    if let Some(path) = stdio::file_path(&uri) {
        stdio::file_uri(&path)?;
    }
    let uris = stdio::detached(&folder, &uri, has_stdin, is_terminal)?;
    create_task(client, container, &uris, is_terminal).await?;
    if let Err(error) = tasks::start(client, &Id::init(&container.id)).await {
        abandon(client, &Id::init(&container.id)).await;
        return Err(error);
    }
    resume_restarts(client, container).await;
    Ok(())
}

/// Removes a task that was not started: the next start makes another.
async fn abandon(client: &Client, process: &Id) {
    if let Err(error) = tasks::delete(client, process).await {
        eprintln!("xctl: {}", error.chain());
    }
}

/// The container runs, whether this succeeds or not.
async fn resume_restarts(client: &Client, container: &Container) {
    if let Err(error) = containers::resume_restarts(client, container).await {
        eprintln!("xctl: container {id} runs, and the daemon will not restart it: {}", error.chain(), id = container.id);
    }
}

/// Starts a container and shows it, until it exits or is detached from. Returns its status.
pub(crate) async fn foreground(client: &Client, folders: &Folders, container: &Container, keys: Keys, removes: bool) -> Result<u8> {
    let is_terminal = is_terminal(container)?;
    let is_interactive = container.labels.contains_key(containers::INTERACTIVE);
    if is_terminal && !crate::terminal::is_there() {
        return Err(Error::refused("the container has a terminal, and standard input is none; leave --tty out, or run xctl on a terminal"));
    }
    make_room(client, container).await?;
    let uris = stdio::fifos(&folders.of(client.namespace(), &container.id), is_interactive, is_terminal)?;
    let outputs = Outputs::open(&uris)?;
    let mut signals = Signals::take()?;
    create_task(client, container, &uris, is_terminal).await?;
    let process = Id::init(&container.id);
    let what = Attachment { process: process.clone(), stdin: uris.stdin, is_terminal, is_interactive, keys };
    let running = match what.begin(client, Some(outputs)) {
        Ok(running) => running,
        Err(error) => {
            abandon(client, &process).await;
            return Err(error);
        }
    };
    // so that the program finds it as it is
    running.resize(client).await;
    if let Err(error) = tasks::start(client, &process).await {
        abandon(client, &process).await;
        running.finish().await;
        return Err(error);
    }
    resume_restarts(client, container).await;
    let status = show(client, running, &mut signals).await?;
    let Some((status, running)) = status else {
        if removes {
            eprintln!("xctl: container {id} runs, and --rm will not remove it; `xctl rm --force {id}` does", id = container.id);
        }
        return Ok(0);
    };
    if removes {
        // it also waits for the output, which is read meanwhile
        tasks::delete(client, &process).await?;
    }
    running.finish().await;
    if removes {
        remove::remove(client, folders, container).await?;
    }
    Ok(exit_status(status))
}

/// Shows a process: its status, and what is left of its output; or nothing, if it was detached from.
pub(crate) async fn show(client: &Client, mut running: Running, signals: &mut Signals) -> Result<Option<(u32, Running)>> {
    match running.until_end(client, signals).await {
        Ok(End::Exited(status)) => Ok(Some((status, running))),
        Ok(End::Detached) => {
            drop(running);
            Ok(None)
        }
        Err(error) => {
            // the terminal first: the message is for people
            drop(running);
            Err(error)
        }
    }
}

/// Shows a container that runs.
pub(crate) async fn attach(client: &Client, args: AttachArgs) -> Result<u8> {
    let container = containers::get(client, &args.container).await?;
    let process = Id::init(&container.id);
    let task = tasks::get(client, &process).await?;
    let task = task
        .filter(|task| task.status() != Status::Stopped)
        .ok_or_else(|| Error::refused(format!("container {id} does not run; `xctl start --attach {id}` starts it", id = container.id)))?;
    let is_interactive = !args.no_stdin && attach::is_fifo(&task.stdin);
    let mut what = Attachment {
        process: process.clone(),
        stdin: task.stdin.clone(),
        is_terminal: task.terminal,
        is_interactive,
        keys: args.keys.detach_keys,
    };
    let mut signals = Signals::take()?;
    if let Some(path) = stdio::file_path(&task.stdout) {
        // the shim writes a file: it is followed, and the shim's own work does not depend on this xctl
        let mut log = Follower::open(&path, From::End)?;
        if !is_interactive {
            what.stdin.clear();
        }
        let running = what.begin(client, None)?;
        let shown = log.print_until(show(client, running, &mut signals)).await??;
        return Ok(shown.map_or(0, |(status, _running)| exit_status(status)));
    }
    if !attach::is_fifo(&task.stdout) {
        return Err(attach::not_attachable(&container.id));
    }
    let uris = stdio::Uris { stdin: String::new(), stdout: task.stdout, stderr: task.stderr };
    let running = what.begin(client, Some(Outputs::open(&uris)?))?;
    match show(client, running, &mut signals).await? {
        Some((status, running)) => {
            running.finish().await;
            Ok(exit_status(status))
        }
        None => Ok(0),
    }
}

/// Removes a task that has exited: its status has been seen, or is not wanted.
async fn make_room(client: &Client, container: &Container) -> Result<()> {
    let process = Id::init(&container.id);
    match tasks::get(client, &process).await? {
        None => Ok(()),
        Some(task) if task.status() == Status::Stopped => tasks::delete(client, &process).await.map(drop),
        Some(task) if task.status() == Status::Created => Err(Error::refused(format!(
            "container {id} has a task that another client made and did not start; `ctr tasks start {id}` starts it, `xctl rm --force {id}` removes it",
            id = container.id
        ))),
        Some(_) => Err(Error::refused(format!("container {} runs already", container.id))),
    }
}

async fn create_task(client: &Client, container: &Container, uris: &stdio::Uris, terminal: bool) -> Result<()> {
    let rootfs = match container.snapshot_key.as_str() {
        "" => Vec::new(),
        key => image::mounts(client, &container.snapshotter, key).await?,
    };
    let request = CreateTaskRequest {
        container_id: container.id.clone(),
        rootfs,
        stdin: uris.stdin.clone(),
        stdout: uris.stdout.clone(),
        stderr: uris.stderr.clone(),
        terminal,
        ..CreateTaskRequest::default()
    };
    match tasks::create(client, request).await {
        Err(error) if error.code() == Some(Code::AlreadyExists) => Err(Error::refused(format!(
            "container {} is being started by another client, or by the daemon's restart monitor",
            container.id
        ))),
        created => created.map(drop),
    }
}

fn is_terminal(container: &Container) -> Result<bool> {
    Ok(containers::spec(container)?.process().as_ref().and_then(oci_spec::runtime::Process::terminal).unwrap_or(false))
}

/// A status as this process can exit with it; those of processes are from 0 to 255.
pub(crate) fn exit_status(status: u32) -> u8 {
    u8::try_from(status).unwrap_or(u8::MAX)
}
