//! `stats`: what containers use, from the metrics of their cgroups.

use std::collections::HashMap;
use std::time::Duration;

use clap::Args;
use containerd_client::types::Metric;
use prost::Message;
use serde::Serialize;

use crate::client::Client;
use crate::error::{Error, Result};
use crate::output::{self, Format, Table};
use crate::{containers, tasks};

/// Arguments of `stats`.
#[derive(Debug, Clone, Args)]
pub(crate) struct StatsArgs {
    /// Print more every so many seconds, until interrupted [default: once]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    every: Option<u32>,
    /// Containers [default: all that run]
    #[arg(value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// What a container uses.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Row {
    name: String,
    /// Percent of one processor, since the last measurement.
    cpu_percent: f64,
    cpu_seconds: f64,
    memory_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_limit_bytes: Option<u64>,
    processes: u64,
}

/// Prints what containers use.
pub(crate) async fn run(client: &Client, format: Format, args: StatsArgs) -> Result<u8> {
    for id in &args.containers {
        containers::get(client, id).await?;
    }
    let mut before = measure(client, &args.containers).await?;
    let mut pause = Duration::from_millis(500);
    loop {
        tokio::time::sleep(pause).await;
        let now = measure(client, &args.containers).await?;
        let mut rows: Vec<_> = now.iter().map(|(name, usage)| row(name, usage, before.get(name))).collect();
        rows.sort_by(|one, other| one.name.cmp(&other.name));
        output::print_list(format, &rows, table)?;
        let Some(seconds) = args.every else { return Ok(0) };
        before = now;
        pause = Duration::from_secs(u64::from(seconds));
    }
}

/// A measurement of a container.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Usage {
    at: Duration,
    cpu: Duration,
    memory_bytes: u64,
    memory_limit_bytes: u64,
    processes: u64,
}

async fn measure(client: &Client, chosen: &[String]) -> Result<HashMap<String, Usage>> {
    let metrics = tasks::metrics(
        client,
        match chosen {
            [one] => Some(one),
            _ => None,
        },
    )
    .await?;
    let is_chosen = |metric: &&Metric| chosen.is_empty() || chosen.contains(&metric.id);
    metrics.iter().filter(is_chosen).map(|metric| Ok((metric.id.clone(), usage(metric)?))).collect()
}

fn usage(metric: &Metric) -> Result<Usage> {
    let unreadable = |why: String| Error::unreadable(format!("the metrics of container {}", metric.id), why);
    let data = metric.data.as_ref().ok_or_else(|| unreadable("there are none".to_owned()))?;
    let at = metric
        .timestamp
        .as_ref()
        .map_or(Duration::ZERO, |at| Duration::new(u64::try_from(at.seconds).unwrap_or(0), u32::try_from(at.nanos).unwrap_or(0)));
    match data.type_url.rsplit('/').next().unwrap_or_default() {
        "io.containerd.cgroups.v1.Metrics" => {
            let metrics = V1::decode(data.value.as_slice()).map_err(|error| unreadable(error.to_string()))?;
            let memory = metrics.memory.unwrap_or_default();
            let entry = memory.usage.unwrap_or_default();
            Ok(Usage {
                at,
                cpu: Duration::from_nanos(metrics.cpu.unwrap_or_default().usage.unwrap_or_default().total),
                memory_bytes: entry.usage.saturating_sub(memory.total_inactive_file),
                memory_limit_bytes: entry.limit,
                processes: metrics.pids.unwrap_or_default().current,
            })
        }
        "io.containerd.cgroups.v2.Metrics" => {
            let metrics = V2::decode(data.value.as_slice()).map_err(|error| unreadable(error.to_string()))?;
            let memory = metrics.memory.unwrap_or_default();
            Ok(Usage {
                at,
                cpu: Duration::from_micros(metrics.cpu.unwrap_or_default().usage_usec),
                memory_bytes: memory.usage.saturating_sub(memory.inactive_file),
                memory_limit_bytes: memory.usage_limit,
                processes: metrics.pids.unwrap_or_default().current,
            })
        }
        other => Err(unreadable(format!("they are of the type {other:?}, which only its runtime understands"))),
    }
}

fn row(name: &str, usage: &Usage, before: Option<&Usage>) -> Row {
    let since = before.map_or(0.0, |before| {
        let elapsed = usage.at.saturating_sub(before.at).as_secs_f64();
        if elapsed > 0.0 { usage.cpu.saturating_sub(before.cpu).as_secs_f64() / elapsed * 100.0 } else { 0.0 }
    });
    Row {
        name: name.to_owned(),
        cpu_percent: (since * 10.0).round() / 10.0,
        cpu_seconds: usage.cpu.as_secs_f64(),
        memory_bytes: usage.memory_bytes,
        // cgroup v1 has a number of almost 8 EiB for none, v2 the highest one
        memory_limit_bytes: Some(usage.memory_limit_bytes).filter(|limit| (1..1 << 62).contains(limit)),
        processes: usage.processes,
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(&["NAME", "CPU %", "CPU TIME", "MEMORY", "LIMIT", "PROCESSES"]);
    for row in rows {
        table.row(vec![
            row.name.clone(),
            format!("{:.1}", row.cpu_percent),
            format!("{:.1} s", row.cpu_seconds),
            output::size(row.memory_bytes),
            row.memory_limit_bytes.map_or_else(|| "-".to_owned(), output::size),
            row.processes.to_string(),
        ]);
    }
    table
}

/// The fields that are shown of `io.containerd.cgroups.v1.Metrics`.
#[derive(Clone, PartialEq, Message)]
struct V1 {
    #[prost(message, optional, tag = "2")]
    pids: Option<Pids>,
    #[prost(message, optional, tag = "3")]
    cpu: Option<V1Cpu>,
    #[prost(message, optional, tag = "4")]
    memory: Option<V1Memory>,
}

#[derive(Clone, PartialEq, Message)]
struct Pids {
    #[prost(uint64, tag = "1")]
    current: u64,
}

#[derive(Clone, PartialEq, Message)]
struct V1Cpu {
    #[prost(message, optional, tag = "1")]
    usage: Option<V1CpuUsage>,
}

#[derive(Clone, PartialEq, Message)]
struct V1CpuUsage {
    #[prost(uint64, tag = "1")]
    total: u64,
}

#[derive(Clone, PartialEq, Message)]
struct V1Memory {
    #[prost(uint64, tag = "30")]
    total_inactive_file: u64,
    #[prost(message, optional, tag = "33")]
    usage: Option<V1MemoryEntry>,
}

#[derive(Clone, PartialEq, Message)]
struct V1MemoryEntry {
    #[prost(uint64, tag = "1")]
    limit: u64,
    #[prost(uint64, tag = "2")]
    usage: u64,
}

/// The fields that are shown of `io.containerd.cgroups.v2.Metrics`.
#[derive(Clone, PartialEq, Message)]
struct V2 {
    #[prost(message, optional, tag = "1")]
    pids: Option<Pids>,
    #[prost(message, optional, tag = "2")]
    cpu: Option<V2Cpu>,
    #[prost(message, optional, tag = "4")]
    memory: Option<V2Memory>,
}

#[derive(Clone, PartialEq, Message)]
struct V2Cpu {
    #[prost(uint64, tag = "1")]
    usage_usec: u64,
}

#[derive(Clone, PartialEq, Message)]
struct V2Memory {
    #[prost(uint64, tag = "12")]
    inactive_file: u64,
    #[prost(uint64, tag = "32")]
    usage: u64,
    #[prost(uint64, tag = "33")]
    usage_limit: u64,
}

#[cfg(test)]
mod tests {
    use prost_types::{Any, Timestamp};

    use super::*;

    #[test]
    fn both_versions_are_read_and_others_are_refused() {
        let metric = |kind: &str, value| Metric {
            id: "c".to_owned(),
            timestamp: Some(Timestamp { seconds: 1, nanos: 0 }),
            data: Some(Any { type_url: format!("types/{kind}"), value }),
        };
        let memory = V1Memory { total_inactive_file: 24, usage: Some(V1MemoryEntry { limit: 1 << 63, usage: 1024 }) };
        let one = V1 { memory: Some(memory), ..V1::default() }.encode_to_vec();
        let one = usage(&metric("io.containerd.cgroups.v1.Metrics", one)).expect("understood");
        assert_eq!((one.memory_bytes, row("c", &one, None).memory_limit_bytes), (1000, None));
        let two = V2 { cpu: Some(V2Cpu { usage_usec: 500_000 }), ..V2::default() }.encode_to_vec();
        let two = usage(&metric("io.containerd.cgroups.v2.Metrics", two)).expect("understood");
        let before = Usage { at: Duration::ZERO, cpu: Duration::ZERO, ..two };
        assert!((row("c", &two, Some(&before)).cpu_percent - 50.0).abs() < 0.01);
        assert!(usage(&metric("other", Vec::new())).is_err());
        assert!(usage(&metric("io.containerd.cgroups.v2.Metrics", vec![0xff])).is_err());
    }
}
