//! `ps`: containers, and whether they run.

use std::collections::HashMap;

use clap::Args;
use containerd_client::services::v1::Container;
use containerd_client::types::v1::{Process, Status};
use serde::Serialize;

use crate::client::Client;
use crate::error::Result;
use crate::output::{self, Format, Table};
use crate::{containers, tasks};

/// Arguments of `ps`.
#[derive(Debug, Clone, Args)]
pub(crate) struct PsArgs {
    /// Containers that do not run, too
    #[arg(short, long)]
    all: bool,
    /// Names alone
    #[arg(short, long)]
    quiet: bool,
}

/// A container in the list.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    image: String,
    command: Vec<String>,
    status: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_status: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    created_at: Option<String>,
    runtime: String,
    labels: HashMap<String, String>,
    #[serde(skip)]
    age: String,
}

/// Lists containers.
pub(crate) async fn run(client: &Client, format: Format, args: PsArgs) -> Result<u8> {
    let (containers, tasks) = (containers::list(client).await?, tasks::list(client).await?);
    let tasks: HashMap<_, _> = tasks.into_iter().map(|task| (task.id.clone(), task)).collect();
    let is_shown = |container: &Container| args.all || tasks.get(&container.id).is_some_and(runs);
    let mut rows: Vec<_> = containers.iter().filter(|container| is_shown(container)).map(|each| row(each, tasks.get(&each.id))).collect();
    rows.sort_by(|one, other| other.created_at.cmp(&one.created_at).then_with(|| one.name.cmp(&other.name)));
    if args.quiet {
        let names: String = rows.iter().map(|row| format!("{}\n", row.name)).collect();
        return output::print(&names).map(|()| 0);
    }
    output::print_list(format, &rows, table)?;
    Ok(0)
}

/// Paused containers and those whose shim does not answer are containers that run.
fn runs(task: &Process) -> bool {
    !matches!(task.status(), Status::Stopped | Status::Created)
}

fn row(container: &Container, task: Option<&Process>) -> Row {
    let spec = containers::spec(container).ok();
    let process = spec.as_ref().and_then(|spec| spec.process().as_ref());
    let command = process.and_then(|process| process.args().clone()).unwrap_or_default();
    let has_exited = task.filter(|task| task.status() == Status::Stopped);
    Row {
        name: container.id.clone(),
        image: container.image.clone(),
        command,
        status: status(task).to_owned(),
        exit_status: has_exited.map(|task| task.exit_status),
        pid: task.filter(|task| runs(task)).map(|task| task.pid),
        created_at: output::timestamp(container.created_at.as_ref()),
        runtime: container.runtime.as_ref().map(|runtime| runtime.name.clone()).unwrap_or_default(),
        labels: container.labels.clone(),
        age: output::age(container.created_at.as_ref()),
    }
}

/// A word for the state of a task.
pub(crate) fn status(task: Option<&Process>) -> &'static str {
    match task.map(Process::status) {
        None => "not started",
        Some(Status::Created) => "created",
        Some(Status::Running) => "running",
        Some(Status::Stopped) => "exited",
        Some(Status::Paused | Status::Pausing) => "paused",
        Some(Status::Unknown) => "unknown",
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(&["NAME", "IMAGE", "COMMAND", "STATUS", "PID", "AGE"]);
    for row in rows {
        let status = row.exit_status.map_or_else(|| row.status.clone(), |status| format!("{} ({status})", row.status));
        table.row(vec![
            row.name.clone(),
            if row.image.is_empty() { "-".to_owned() } else { row.image.clone() },
            output::shorten(&row.command.join(" "), 40),
            status,
            row.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            row.age.clone(),
        ]);
    }
    table
}
