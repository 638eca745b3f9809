//! `top`: the processes of a container, as the host sees them.

use std::fs;

use clap::Args;
use serde::Serialize;

use crate::client::Client;
use crate::error::Result;
use crate::output::{self, Format, Table};
use crate::{containers, tasks};

/// Arguments of `top`.
#[derive(Debug, Clone, Args)]
pub(crate) struct TopArgs {
    /// Container
    container: String,
}

/// A process.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    pid: u32,
    parent: u32,
    uid: u32,
    state: String,
    cpu_seconds: u64,
    memory_bytes: u64,
    command: String,
}

/// Lists processes.
pub(crate) async fn run(client: &Client, format: Format, args: TopArgs) -> Result<u8> {
    let container = containers::get(client, &args.container).await?;
    let pids = tasks::pids(client, &container.id).await?;
    // a process that has ended since is not listed
    let mut rows: Vec<_> = pids.iter().filter_map(|process| read(process.pid)).collect();
    rows.sort_by_key(|row| row.pid);
    output::print_list(format, &rows, table)?;
    Ok(0)
}

fn read(pid: u32) -> Option<Row> {
    let file = |name: &str| fs::read(format!("/proc/{pid}/{name}")).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    parse(pid, &file("stat")?, &file("status")?, &file("cmdline")?)
}

fn parse(pid: u32, stat: &str, status: &str, arguments: &str) -> Option<Row> {
    // the name is in parentheses, and may have some itself
    let (before, after) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = after.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    let of_status = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let name = before.split_once('(')?.1;
    let command = arguments.trim_end_matches('\0').replace('\0', " ");
    Some(Row {
        pid,
        parent: u32::try_from(number(1)?).ok()?,
        uid: u32::try_from(of_status("Uid:")?).ok()?,
        state: (*fields.first()?).to_owned(),
        // Linux counts for programs in hundredths of a second, on every architecture
        cpu_seconds: (number(11)? + number(12)?) / 100,
        memory_bytes: of_status("VmRSS:").unwrap_or(0) * 1024,
        command: if command.is_empty() { format!("[{name}]") } else { command },
    })
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(&["PID", "PARENT", "UID", "STATE", "CPU", "MEMORY", "COMMAND"]);
    for row in rows {
        let time = format!("{}:{:02}", row.cpu_seconds / 60, row.cpu_seconds % 60);
        let numbers =
            [row.pid.to_string(), row.parent.to_string(), row.uid.to_string(), row.state.clone(), time, output::size(row.memory_bytes)];
        table.row(numbers.into_iter().chain([row.command.clone()]).collect());
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_whatever_its_name_is() {
        let stat = "7 (a) b) R 3 7 7 0 -1 4194560 1 0 0 0 150 60 0 0 20 0 1 0 5 1000 2 18446744073709551615";
        let status = "Name:\ta) b\nUid:\t33\t33\t33\t33\nVmRSS:\t  12 kB\n";
        let row = parse(7, stat, status, "sleep\x001000\0").expect("a process");
        assert_eq!((row.parent, row.uid, row.cpu_seconds, row.memory_bytes), (3, 33, 2, 12_288));
        assert_eq!((row.state.as_str(), row.command.as_str()), ("R", "sleep 1000"));
        assert_eq!(parse(7, stat, status, "").map(|row| row.command), Some("[a) b]".to_owned()));
        for bad in ["", "7", "7 (a", "7 (a) R"] {
            assert_eq!(parse(7, bad, status, ""), None, "{bad}");
        }
    }
}
