//! Measures Docker 28 with its image store (the feature `containerd-snapshotter`) on containerd 2.1 and on x-manager, in turns in one run. Needs root.
//!
//! ```text
//! X_SHIM=… X_DAEMON=… docker-bench [--mib 512] [--layers 10] [--rounds 3] [--runs 20] [--folder /var/tmp]
//! ```
//! It starts itself once for each daemon and round, with namespaces of its own; the files of dockerd and of the daemon below are in the folder, on a disk.

#[path = "images-bench/image.rs"]
mod image;
#[path = "images-bench/options.rs"]
mod options;
#[path = "images-bench/registry.rs"]
mod registry;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser as _;
use serde_json::{Value, json};
use shim_tests::beside::{self, median};
use shim_tests::context::Context;
use shim_tests::daemon::Daemon;
use shim_tests::docker::Docker;
use shim_tests::eventually::eventually;
use shim_tests::isolation;
use shim_tests::suite::{self, Runtime, Shim, Suite};

use image::{Codec, Image, Size};
use options::Images;
use registry::Registry;

/// Measures Docker 28 with its image store on containerd 2.1 and on x-manager
#[derive(Debug, clap::Parser)]
struct Plan {
    #[command(flatten)]
    images: Images,
    /// Containers that are run
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
}

const IMAGES: &[(Codec, Size)] = &[(Codec::Gzip, Size::Large), (Codec::Zstd, Size::Large), (Codec::Gzip, Size::Small)];

fn main() -> ExitCode {
    beside::end(PROGRAM, run())
}

const PROGRAM: &str = "docker-bench";

fn run() -> Result<ExitCode> {
    let plan = Plan::parse();
    if let Some(folder) = &plan.images.one {
        return beside::run(PROGRAM, options::on_disk(folder, with_docker(&plan, folder)));
    }
    suite::fetch()?;
    suite::use_manager()?;
    let measured = plan.images.with_folder(PROGRAM, |folder| rounds(&plan, folder))?;
    table(&plan, &measured);
    Ok(ExitCode::SUCCESS)
}

/// Figures by their name: on containerd and on x-manager, in each round.
type Figures = BTreeMap<String, [Vec<f64>; 2]>;

fn rounds(plan: &Plan, folder: &Path) -> Result<Figures> {
    for (codec, size) in IMAGES {
        eprintln!("an image of {} MiB, {}", plan.images.mib, image::name(*codec, *size));
        Image::make(folder, *codec, *size, plan.images.mib, plan.images.layers)?;
    }
    let mut all = Figures::new();
    for round in 0..plan.images.rounds {
        for (number, manager) in [None, suite::manager()].into_iter().enumerate() {
            eprintln!("round {}, on {}", round + 1, if manager.is_some() { "x-manager" } else { "containerd" });
            let arguments = ["--one", folder.to_str().context("the folder's name is no text")?, "--runs", &plan.runs.to_string()];
            let figures = beside::figures(&arguments, manager)?;
            for (name, value) in figures.as_object().context("figures")? {
                all.entry(name.clone()).or_default()[number].push(value.as_f64().context("a figure")?);
            }
        }
    }
    Ok(all)
}

async fn with_docker(plan: &Plan, folder: &Path) -> Result<Value> {
    let shim = Shim::under_test()?;
    let daemon = Arc::new(Daemon::start(Suite::Forky, &shim).await?);
    let programs = std::env::current_exe()?.parent().context("a file is in a folder")?.to_owned();
    let cx = Context::new(Arc::clone(&daemon), Runtime::Crun, shim, &programs).await?;
    // it has a daemon of its own below
    let docker = Docker::start_with_image_store(&cx).await?;
    let registry = Registry::start(folder)?;
    let mut figures = Measured::new();
    let empty = snapshots(&docker)?;
    for (codec, size) in IMAGES {
        let (kind, reference) = (image::name(*codec, *size), registry.image(*codec, *size));
        timed(&docker, &mut figures, &format!("pull, {kind}"), &["pull", "--quiet", &reference])?;
        if (*codec, *size) == (Codec::Gzip, Size::Large) {
            let file = isolation::RUN.to_owned() + "/saved.tar";
            timed(&docker, &mut figures, &format!("save, {kind}"), &["save", "--output", &file, &reference])?;
            emptied(&docker, &reference, empty).await?;
            timed(&docker, &mut figures, &format!("load, {kind}"), &["load", "--quiet", "--input", &file])?;
            std::fs::remove_file(file)?;
        }
        emptied(&docker, &reference, empty).await?;
    }
    let mut took = Vec::new();
    for _run in 0..plan.runs {
        let begin = Instant::now();
        let output = docker.container(&["--rm"], &["true"])?;
        took.push(begin.elapsed().as_secs_f64() * 1000.0);
        ensure!(output.status.success(), "{output:?}");
    }
    figures.insert("run --rm of a small image: ms".to_owned(), json!(median(&took)));
    docker.leaves_nothing().await?;
    drop(docker);
    daemon.stop()?;
    Ok(Value::Object(figures))
}

type Measured = serde_json::Map<String, Value>;

/// Runs a command of the client, and keeps how long it took and how large the daemon below was at most.
fn timed(docker: &Docker, figures: &mut Measured, name: &str, arguments: &[&str]) -> Result<()> {
    eprintln!("{name}");
    let pid = docker.context().daemon().pid().context("a daemon")?;
    beside::begin_peak(pid)?;
    let cpu = cpu_seconds(pid)?;
    let begin = Instant::now();
    docker.run(arguments)?;
    figures.insert(format!("{name}: s"), json!(begin.elapsed().as_secs_f64()));
    figures.insert(format!("{name}: CPU time of the daemon below, s"), json!(cpu_seconds(pid)? - cpu));
    figures.insert(format!("{name}: peak of the daemon below, MiB"), json!(beside::peak_mib(pid)?));
    Ok(())
}

fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let words: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    // after the name: state is the 3rd field, utime the 14th, stime the 15th; in hundredths of a second
    let ticks = |number: usize| -> Result<f64> { Ok(words.get(number - 3).context("a field")?.parse()?) };
    Ok((ticks(14)? + ticks(15)?) / 100.0)
}

/// Folders of snapshots below.
fn snapshots(docker: &Docker) -> Result<usize> {
    Ok(std::fs::read_dir(docker.context().daemon().folder().join("root/io.containerd.snapshotter.v1.overlayfs/snapshots"))?.count())
}

/// Removes an image, and waits until its files are gone.
async fn emptied(docker: &Docker, reference: &str, left: usize) -> Result<()> {
    docker.run(&["rmi", "--force", reference])?;
    docker.run(&["image", "prune", "--force"])?;
    eventually("the image's files are removed", Duration::from_secs(60), async || {
        let now = snapshots(docker)?;
        ensure!(now <= left, "{now} snapshots, not {left}");
        Ok(())
    })
    .await?;
    ensure!(Command::new("sync").status()?.success());
    Ok(())
}

fn table(plan: &Plan, figures: &Figures) {
    println!("# Docker 28's images: on x-manager and on containerd 2.1\n");
    println!(
        "dockerd 28.5 with the feature `containerd-snapshotter`; images of {} MiB of text-like files in {} layers, pulled from a registry on",
        plan.images.mib, plan.images.layers
    );
    println!(
        "loopback; the median of {} rounds, in turns. By `make bench-docker` (`tests/src/bin/docker-bench.rs`). A ratio above 1 is in x-manager's favour.\n",
        plan.images.rounds
    );
    println!("| docker | containerd 2.1 | x-manager | containerd / x-manager |\n| --- | ---: | ---: | ---: |");
    for (name, [theirs, ours]) in figures {
        let (theirs, ours) = (median(theirs), median(ours));
        println!("| {name} | {theirs:.2} | {ours:.2} | {:.2} |", theirs / ours);
    }
    println!("\n## Aims\n\n| | aim | measured | |\n| --- | --- | ---: | --- |");
    for (name, times) in AIMS {
        if let Some([theirs, ours]) = figures.get(&format!("{name}: s")) {
            let ratio = median(theirs) / median(ours);
            println!("| {name} | at least {times} times as fast | {ratio:.2} | {} |", if ratio >= *times { "met" } else { "**missed**" });
        }
    }
}

/// How many times as fast as on containerd it should be.
const AIMS: &[(&str, f64)] =
    &[("pull, gzip", 1.5), ("pull, zstd", 1.5), ("pull, gzip-small", 1.5), ("load, gzip", 1.0), ("save, gzip", 1.0)];
