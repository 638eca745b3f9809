//! The throughput of stdout through a fifo, to a file and from a terminal, and the processor time that it costs the shim.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use shim_tests::container::Stdio;
use shim_tests::eventually::eventually_true;
use shim_tests::proc;
use shim_tests::stdio::Pace;

use super::Subject;

const MIB: u64 = 1 << 20;
const ROUNDS: usize = 3;
const WITHIN: Duration = Duration::from_secs(120);

/// Where stdout goes.
#[derive(Debug, Clone, Copy)]
enum Target {
    Fifo,
    File,
    Terminal,
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Self::Fifo => "through a fifo",
            Self::File => "to a file",
            Self::Terminal => "from a terminal",
        }
    }

    /// A terminal hands over a few KiB at once, and would take long for as much as the others.
    fn mib(self) -> u64 {
        if matches!(self, Self::Terminal) { 128 } else { 1024 }
    }
}

pub(super) async fn measure(subjects: &mut [Subject]) -> Result<()> {
    for target in [Target::Fifo, Target::File, Target::Terminal] {
        let mut speeds = vec![Vec::new(); subjects.len()];
        let mut costs = vec![Vec::new(); subjects.len()];
        for _round in 0..ROUNDS {
            for (index, subject) in subjects.iter().enumerate() {
                let (took, cost) = one(subject, target).await?;
                speeds[index].push(target.mib() as f64 / took.as_secs_f64());
                costs[index].push(cost * 1024.0 / target.mib() as f64);
            }
        }
        for ((subject, speeds), costs) in subjects.iter_mut().zip(speeds).zip(costs) {
            subject.note_all(&format!("stdout {}, MiB/s", target.name()), speeds);
            subject.note_all(&format!("… processor time of the shim for a GiB {}, s", target.name()), costs);
        }
    }
    Ok(())
}

/// How long the output took from its start to its last byte, and the processor seconds of the shim.
async fn one(subject: &Subject, target: Target) -> Result<(Duration, f64)> {
    let cx = &subject.bed.cx;
    let bytes = target.mib() * MIB;
    let file = cx.folder().join("output");
    let stdio = match target {
        Target::Fifo | Target::Terminal => Stdio::Fifos { stdin: false, pace: Some(Pace::Count) },
        Target::File => Stdio::uri(format!("file://{}", file.display())),
    };
    let script = format!("dd if=/dev/zero bs=64k count={} 2>/dev/null", bytes / (64 << 10));
    let builder = subject.bed.container(&["sh", "-c", &script]).stdio(stdio);
    let builder = if matches!(target, Target::Terminal) { builder.terminal() } else { builder };
    let container = builder.create().await?;
    let shim = cx.shim_pid(&container.id)?;
    let before = processor_time(shim)?;
    let begin = Instant::now();
    container.start().await?;
    let arrived = || match target {
        Target::Fifo | Target::Terminal => container.io.out().count(),
        Target::File => fs::metadata(&file).map_or(0, |metadata| metadata.len()),
    };
    eventually_true(format!("{bytes} bytes {}", target.name()), WITHIN, || arrived() == bytes).await?;
    let took = begin.elapsed();
    let cost = processor_time(shim)? - before;
    ensure!(container.finish().await? == 0);
    container.remove().await?;
    if matches!(target, Target::File) {
        fs::remove_file(&file)?;
    }
    Ok((took, cost))
}

/// Processor seconds of a shim and the processes that belong to it: not those of containers.
fn processor_time(shim: i32) -> Result<f64> {
    let mut ticks = 0;
    for pid in own_processes(shim) {
        let stat = proc::stat(pid)?;
        ticks += stat.field(14).parse::<u64>()? + stat.field(15).parse::<u64>()?;
    }
    Ok(ticks as f64 / 100.0)
}

/// The shim's process, and its worker if it has one.
fn own_processes(shim: i32) -> Vec<i32> {
    let is_worker = |child: &proc::Process| child.command.split(' ').any(|word| word == "worker");
    let workers = proc::children(shim).into_iter().filter(is_worker).map(|child| child.pid);
    std::iter::once(shim).chain(workers).collect()
}
