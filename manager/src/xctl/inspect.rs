//! `inspect`: everything that the daemon knows of a container, or of an image.

use clap::Args;
use serde_json::{Value, json};

use crate::client::Client;
use crate::error::{Error, Result};
use crate::tasks::{self, Id};
use crate::{containers, image, images, output, ps, stdio};

/// Arguments of `inspect`.
#[derive(Debug, Clone, Args)]
pub(crate) struct InspectArgs {
    /// What the names are [default: containers; if there is none of that name, images]
    #[arg(long = "type", value_enum, value_name = "KIND")]
    kind: Option<Kind>,
    /// Containers or images
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// What a name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// A container
    Container,
    /// An image
    Image,
}

/// Prints a list, also of one.
pub(crate) async fn run(client: &Client, args: InspectArgs) -> Result<u8> {
    let mut all = Vec::new();
    for name in &args.names {
        all.push(match args.kind {
            Some(Kind::Container) => one(client, name).await?,
            Some(Kind::Image) => images::inspect(client, name).await?,
            None => match one(client, name).await {
                Err(Error::NoContainer { .. }) => match images::inspect(client, name).await {
                    Err(Error::Refused(_)) if image::get(client, name).await.is_err() => return Err(neither(client, name)),
                    found => found?,
                },
                found => found?,
            },
        });
    }
    output::print_json(&all)?;
    Ok(0)
}

fn neither(client: &Client, name: &str) -> Error {
    Error::refused(format!(
        "there is neither a container nor an image {name} in namespace {}; `xctl ps --all` and `xctl images` list those that there are",
        client.namespace()
    ))
}

async fn one(client: &Client, id: &str) -> Result<Value> {
    let container = containers::get(client, id).await?;
    let task = tasks::get(client, &Id::init(id)).await?;
    let spec: Value = serde_json::to_value(containers::spec(&container)?).unwrap_or_default();
    let log = container.labels.get(containers::LOG_URI).and_then(|uri| stdio::file_path(uri));
    let state = json!({
        "status": ps::status(task.as_ref()),
        "pid": task.as_ref().map(|task| task.pid),
        "exit_status": task.as_ref().filter(|task| ps::status(Some(task)) == "exited").map(|task| task.exit_status),
        "exited_at": task.as_ref().and_then(|task| output::timestamp(task.exited_at.as_ref())),
        "stdin": task.as_ref().map(|task| &task.stdin),
        "stdout": task.as_ref().map(|task| &task.stdout),
        "stderr": task.as_ref().map(|task| &task.stderr),
        "terminal": task.as_ref().map(|task| task.terminal),
    });
    Ok(json!({
        "name": container.id,
        "namespace": client.namespace(),
        "image": container.image,
        "runtime": container.runtime.as_ref().map(|runtime| &runtime.name),
        "snapshotter": container.snapshotter,
        "snapshot": container.snapshot_key,
        "sandbox": container.sandbox,
        "created_at": output::timestamp(container.created_at.as_ref()),
        "updated_at": output::timestamp(container.updated_at.as_ref()),
        "labels": container.labels,
        "log": log,
        "state": state,
        "spec": spec,
    }))
}
