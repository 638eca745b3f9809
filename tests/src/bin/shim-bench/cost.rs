//! What one container and one exec cost beside time: processor time, program executions and system calls of all processes but the daemon's.
//!
//! ```text
//!  cgroup of the daemon:      the daemon (subtracted), its shims, their runtimes
//!  cgroup of the namespace:   the containers, each in a cgroup of its own below it
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::time::ClockId;
use nix::unistd::Pid;
use shim_tests::cgroups::Version;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::isolation;
use shim_tests::kernel_trace::KernelTrace;
use shim_tests::runner::skip;

use super::latency::{milliseconds, run_exec, run_true};
use super::{Bed, Plan, Subject};

/// How many containers and execs are counted.
const COUNTED: usize = 3;

/// The processor time of everything that a daemon has started, without its own.
pub(super) struct Meter {
    daemon: ClockId,
    /// The files with the times of its own cgroup, and of its containers' together.
    files: [PathBuf; 2],
}

impl Meter {
    /// Puts the daemon, and so the shims that it starts from now on, into a cgroup of its own.
    ///
    /// Errors: a skip, without the controller cpuacct of cgroup v1.
    pub(super) fn new(cx: &Context) -> Result<Self> {
        let namespace = cx.client().namespace();
        let pid = cx.daemon().pid().context("the daemon runs")?;
        Self::of(&format!("daemon-{namespace}"), &format!("{}/{namespace}", isolation::cgroup()), pid)
    }

    /// The same for the daemon `pid`, with a name for its cgroup, and with the cgroup below which its containers are.
    pub(super) fn of(name: &str, containers: &str, pid: u32) -> Result<Self> {
        let (root, file) = match Version::here() {
            Version::V1 => (Path::new("/sys/fs/cgroup/cpuacct"), "cpuacct.usage"),
            Version::V2 => (Path::new("/sys/fs/cgroup"), "cpu.stat"),
        };
        if !root.join(file).exists() {
            return skip(format!("no processor time is measured: there is no {}", root.join(file).display()));
        }
        let folders = [root.join(isolation::cgroup()).join(name), root.join(containers)];
        for folder in &folders {
            fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        fs::write(folders[0].join("cgroup.procs"), pid.to_string()).context("move the daemon")?;
        let daemon = ClockId::pid_cpu_clock_id(Pid::from_raw(pid.cast_signed()))?;
        Ok(Self { daemon, files: folders.map(|folder| folder.join(file)) })
    }

    /// In milliseconds. Only differences mean anything: the daemon also has times of before it was moved.
    pub(super) fn read(&self) -> Result<f64> {
        let mut all = Duration::ZERO;
        for file in &self.files {
            let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
            all += match text.lines().find_map(|line| line.strip_prefix("usage_usec ")) {
                Some(microseconds) => Duration::from_micros(microseconds.parse()?),
                None => Duration::from_nanos(text.trim().parse()?),
            };
        }
        Ok(milliseconds(all) - self.daemon()?)
    }

    /// The daemon's own, in milliseconds.
    pub(super) fn daemon(&self) -> Result<f64> {
        Ok(milliseconds(self.daemon.now()?.into()))
    }
}

/// Waits until that many shims are left.
async fn settled(cx: &Context, shims: usize) -> Result<()> {
    eventually("the shims of deleted containers have exited", SOON, async || {
        let left = cx.shims();
        ensure!(left.len() == shims, "{left:?}");
        Ok(())
    })
    .await
}

pub(super) async fn processor_time(subjects: &mut [Subject], rounds: usize) -> Result<()> {
    let mut meters = Vec::new();
    let mut hosts = Vec::new();
    for subject in subjects.iter() {
        meters.push(Meter::new(&subject.bed.cx)?);
        hosts.push(subject.bed.container(&["sleep", "100000"]).start().await?);
    }
    let mut runs = vec![Vec::new(); subjects.len()];
    let mut execs = vec![Vec::new(); subjects.len()];
    for round in 0..rounds {
        for (index, subject) in subjects.iter().enumerate() {
            let (cx, meter) = (&subject.bed.cx, &meters[index]);
            let before = meter.read()?;
            run_true(&subject.bed).await?;
            settled(cx, 1).await?;
            let between = meter.read()?;
            run_exec(&hosts[index], &format!("e{round}")).await?;
            runs[index].push(between - before);
            execs[index].push(meter.read()? - between);
        }
    }
    for host in &hosts {
        host.destroy().await?;
    }
    for ((subject, runs), execs) in subjects.iter_mut().zip(runs).zip(execs) {
        subject.note_all("container with `/bin/true`, user and system, ms", runs);
        subject.note_all("exec of `/bin/true`, user and system, ms", execs);
    }
    Ok(())
}

/// Program executions and system calls, on daemons of their own: following their processes costs them time.
pub(super) async fn counts(subjects: &mut [Subject], plan: &Plan, programs: &Path) -> Result<()> {
    for (subject, choice) in subjects.iter_mut().zip(&plan.shims) {
        let mut trace = KernelTrace::follow()?;
        let bed = Bed::new(plan, choice, programs).await?;
        let host = bed.container(&["sleep", "100000"]).start().await?;
        run_true(&bed).await?;
        run_exec(&host, "first").await?;
        settled(&bed.cx, 1).await?;
        trace.take()?;
        let mut kinds = [("container with `/bin/true`", Vec::new(), Vec::new()), ("exec of `/bin/true`", Vec::new(), Vec::new())];
        for round in 0..COUNTED {
            for (what, executions, calls) in &mut kinds {
                if what.starts_with("exec") {
                    run_exec(&host, &format!("e{round}")).await?;
                } else {
                    run_true(&bed).await?;
                    settled(&bed.cx, 1).await?;
                }
                let activity = trace.take()?;
                executions.push(activity.executions().len() as f64);
                // without the daemon, and without its forks that have not executed anything yet
                calls.push(activity.calls(|span| span.generation > 2 || span.generation == 2 && span.program.is_some()) as f64);
            }
        }
        ensure!(host.destroy().await? == 137);
        for (what, executions, calls) in kinds {
            subject.note_all(&format!("{what}: program executions"), executions);
            subject.note_all(&format!("{what}: system calls"), calls);
        }
    }
    Ok(())
}
