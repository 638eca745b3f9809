//! Benchmarks of x-manager beside containerd: the program starts itself once for each daemon, as a run has namespaces of its own, and that run
//! prints its figures in one line.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio::task::LocalSet;

use crate::runner::EXECUTOR;
use crate::{isolation, proc};

/// The exit code of a benchmark, whose error is printed.
pub fn end(program: &str, ended: Result<ExitCode>) -> ExitCode {
    ended.unwrap_or_else(|error| {
        eprintln!("{program}: {error:#}");
        ExitCode::from(2)
    })
}

/// The run of one daemon.
pub fn run(program: &str, measuring: impl Future<Output = Result<Value>>) -> Result<ExitCode> {
    isolation::run(|| match EXECUTOR.block_on(LocalSet::new().run_until(measuring)) {
        Ok(figures) => {
            println!("{figures}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{program}: {error:#}");
            ExitCode::FAILURE
        }
    })
}

/// From now on [`peak_mib`] of a process counts.
pub fn begin_peak(pid: u32) -> Result<()> {
    Ok(fs::write(format!("/proc/{pid}/clear_refs"), "5")?)
}

/// The most memory that a process has had, in MiB.
pub fn peak_mib(pid: u32) -> Result<f64> {
    let kib: f64 = proc::status_field(pid.cast_signed(), "VmHWM")?.trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}

/// Of several rounds.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The figures of one daemon, from a run with these arguments: containerd, or the x-manager at a path.
pub fn figures(arguments: &[&str], manager: Option<&Path>) -> Result<Value> {
    let mut command = Command::new(std::env::current_exe()?);
    match manager {
        Some(path) => command.env("X_DAEMON", path),
        None => command.env_remove("X_DAEMON"),
    };
    let output = command.args(arguments).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "a run failed: {}", output.status);
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.lines().last().unwrap_or_default()).with_context(|| format!("figures: {text:?}"))
}
