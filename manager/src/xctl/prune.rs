//! `prune` and `df`: what containers and images that are not needed hold, and its removal.

use std::collections::HashSet;
use std::io::{self, Write as _};

use clap::Args;
use containerd_client::services::v1::snapshots::{Kind, ListSnapshotsRequest, UsageRequest};
use containerd_client::services::v1::{Container, DeleteImageRequest, ListContentRequest};
use containerd_client::types::v1::Status;
use serde::Serialize;
use tonic::Code;

use crate::client::{Client, call};
use crate::error::{Error, Result};
use crate::output::{self, Format, Table};
use crate::stdio::{self, Folders};
use crate::tasks::{self, Id};
use crate::{containers, images, remove, terminal};

/// Arguments of `prune`.
#[derive(Debug, Clone, Args)]
pub(crate) struct PruneArgs {
    /// Remove images that no container was made from, too
    #[arg(long)]
    images: bool,
    /// Do not ask
    #[arg(short, long)]
    force: bool,
}

/// Arguments of `df`.
#[derive(Debug, Clone, Args)]
pub(crate) struct DfArgs {
    /// Snapshotter whose snapshots are counted
    #[arg(long, value_name = "NAME", default_value = "overlayfs")]
    snapshotter: String,
}

/// Removes containers of `xctl` that have exited, and images if they were asked for.
pub(crate) async fn run(client: &Client, folders: &Folders, args: PruneArgs) -> Result<u8> {
    let exited = exited(client).await?;
    let images = if args.images { unused(client, &exited).await? } else { Vec::new() };
    if exited.is_empty() && images.is_empty() {
        return Ok(0);
    }
    if !args.force && !agrees(&exited, &images)? {
        return Ok(1);
    }
    for container in &exited {
        tasks::delete(client, &Id::init(&container.id)).await?;
        remove::remove(client, folders, container).await?;
        output::print(&format!("{}\n", container.id))?;
    }
    for (index, name) in images.iter().enumerate() {
        // the daemon collects once, after the last
        let sync = index + 1 == images.len();
        let request = client.request(DeleteImageRequest { name: name.clone(), sync, target: None });
        call(format!("remove image {name}"), client.images().delete(request)).await?;
        output::print(&format!("{name}\n"))?;
    }
    Ok(0)
}

/// Containers of other clients are theirs: in the namespaces of Docker and Kubernetes, an exited container is not one that is not needed.
async fn exited(client: &Client) -> Result<Vec<Container>> {
    let stopped: HashSet<String> =
        tasks::list(client).await?.into_iter().filter(|task| task.status() == Status::Stopped).map(|task| task.id).collect();
    let is_exited = |container: &Container| {
        let is_restarted = container.labels.contains_key(containers::RESTART_STATUS);
        stopped.contains(&container.id) && container.labels.contains_key(containers::LOG_URI) && !is_restarted
    };
    Ok(containers::list(client).await?.into_iter().filter(is_exited).collect())
}

async fn unused(client: &Client, exited: &[Container]) -> Result<Vec<String>> {
    let is_kept = |container: &Container| !exited.iter().any(|other| other.id == container.id);
    let used: HashSet<String> = containers::list(client).await?.into_iter().filter(is_kept).map(|container| container.image).collect();
    Ok(images::all(client).await?.into_iter().map(|image| image.name).filter(|name| !used.contains(name)).collect())
}

fn agrees(exited: &[Container], images: &[String]) -> Result<bool> {
    let names: Vec<_> = exited.iter().map(|container| container.id.as_str()).chain(images.iter().map(String::as_str)).collect();
    if !terminal::is_there() {
        return Err(Error::refused(format!("{} would be removed; --force does so without asking", names.join(", "))));
    }
    eprint!("Remove {}? [y/N] ", output::printable(&names.join(", ")));
    // a terminal that shows nothing gets no answer either
    let _ = io::stderr().flush();
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(|error| Error::unreadable("the answer", error))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

#[derive(Debug, Serialize)]
struct Row {
    kind: &'static str,
    count: usize,
    size_bytes: u64,
    /// What `prune` would free, as far as it is known.
    removable_bytes: u64,
}

/// Prints what is held by what.
pub(crate) async fn df(client: &Client, folders: &Folders, format: Format, args: DfArgs) -> Result<u8> {
    let (all, exited) = (containers::list(client).await?, exited(client).await?);
    let is_exited = |container: &Container| exited.iter().any(|other| other.id == container.id);
    let mut rows = Vec::new();
    // a daemon without an image store has neither content nor snapshots
    if let Some((count, size)) = served(content(client).await)? {
        rows.push(Row { kind: "content", count, size_bytes: size, removable_bytes: 0 });
    }
    if let Some((count, size)) = served(layers(client, &args.snapshotter).await)? {
        rows.push(Row { kind: "layers", count, size_bytes: size, removable_bytes: 0 });
    }
    let mut snapshots = Row { kind: "containers", count: all.len(), size_bytes: 0, removable_bytes: 0 };
    let mut logs = Row { kind: "logs", count: 0, size_bytes: 0, removable_bytes: 0 };
    for container in &all {
        if !container.snapshot_key.is_empty() {
            let size = usage(client, &container.snapshotter, &container.snapshot_key).await?;
            snapshots.size_bytes += size;
            snapshots.removable_bytes += if is_exited(container) { size } else { 0 };
        }
        let log = container.labels.get(containers::LOG_URI).and_then(|uri| stdio::file_path(uri));
        if let Some((path, about)) = log.and_then(|path| std::fs::metadata(&path).ok().map(|about| (path, about))) {
            logs.count += 1;
            logs.size_bytes += about.len();
            let is_own = path == folders.log(client.namespace(), &container.id);
            logs.removable_bytes += if is_exited(container) && is_own { about.len() } else { 0 };
        }
    }
    rows.extend([snapshots, logs]);
    output::print_list(format, &rows, |rows| {
        let mut table = Table::new(&["WHAT", "COUNT", "SIZE", "REMOVABLE"]);
        for row in rows {
            table.row(vec![row.kind.to_owned(), row.count.to_string(), output::size(row.size_bytes), output::size(row.removable_bytes)]);
        }
        table
    })?;
    Ok(0)
}

/// None for a service that the daemon does not have.
fn served<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Err(error) if error.code() == Some(Code::Unimplemented) => Ok(None),
        result => result.map(Some),
    }
}

async fn content(client: &Client) -> Result<(usize, u64)> {
    let doing = "list content";
    let request = client.request(ListContentRequest { filters: Vec::new() });
    let mut stream = call(doing, client.content().list(request)).await?;
    let (mut count, mut size) = (0, 0);
    while let Some(part) = stream.message().await.map_err(|status| Error::Call { doing: doing.to_owned(), status })? {
        count += part.info.len();
        size += part.info.iter().map(|info| u64::try_from(info.size).unwrap_or(0)).sum::<u64>();
    }
    Ok((count, size))
}

/// Committed snapshots; those of containers are counted with them.
async fn layers(client: &Client, snapshotter: &str) -> Result<(usize, u64)> {
    let doing = format!("list the snapshots of {snapshotter}");
    let request = client.request(ListSnapshotsRequest { snapshotter: snapshotter.to_owned(), filters: Vec::new() });
    let mut stream = call(&doing, client.api().snapshots().list(request)).await?;
    let mut names = Vec::new();
    while let Some(part) = stream.message().await.map_err(|status| Error::Call { doing: doing.clone(), status })? {
        names.extend(part.info.into_iter().filter(|info| info.kind() == Kind::Committed).map(|info| info.name));
    }
    let mut size = 0;
    for name in &names {
        size += usage(client, snapshotter, name).await?;
    }
    Ok((names.len(), size))
}

async fn usage(client: &Client, snapshotter: &str, key: &str) -> Result<u64> {
    let request = client.request(UsageRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() });
    match call(format!("measure snapshot {key}"), client.api().snapshots().usage(request)).await {
        Ok(answer) => Ok(u64::try_from(answer.size).unwrap_or(0)),
        // it was removed meanwhile
        Err(error) if error.code() == Some(Code::NotFound) => Ok(0),
        Err(error) => Err(error),
    }
}
