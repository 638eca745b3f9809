//! Measures Docker 28 with its image store (the feature `containerd-snapshotter`) on containerd 2.1 and on x-manager, in turns in one run. Needs root.
//!
//! ```text
//! X_SHIM=… X_DAEMON=… docker-bench [--mib 512] [--layers 10] [--rounds 3] [--runs 20] [--folder /var/tmp]
//! ```
//! It starts itself once for each daemon and round, with namespaces of its own; the files of dockerd and of the daemon below are in the folder, on a disk.

#[path = "images-bench/image.rs"]
mod image;
#[path = "images-bench/registry.rs"]
mod registry;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio as Io};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};
use shim_tests::context::Context;
use shim_tests::daemon::Daemon;
use shim_tests::docker::Docker;
use shim_tests::eventually::eventually;
use shim_tests::isolation;
use shim_tests::runner::EXECUTOR;
use shim_tests::suite::{self, Runtime, Shim, Suite};
use tokio::task::LocalSet;

use image::{Codec, Image, Size};
use registry::Registry;

/// What to measure.
#[derive(Clone)]
struct Plan {
    mib: usize,
    layers: usize,
    rounds: usize,
    runs: usize,
    folder: PathBuf,
}

const IMAGES: &[(Codec, Size)] = &[(Codec::Gzip, Size::Large), (Codec::Zstd, Size::Large), (Codec::Gzip, Size::Small)];

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("docker-bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<ExitCode> {
    let mut plan = Plan { mib: 512, layers: 10, rounds: 3, runs: 20, folder: "/var/tmp".into() };
    let mut one = None;
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--mib" => plan.mib = value()?.parse()?,
            "--layers" => plan.layers = value()?.parse()?,
            "--rounds" => plan.rounds = value()?.parse()?,
            "--runs" => plan.runs = value()?.parse()?,
            "--folder" => plan.folder = value()?.into(),
            "--one" => one = Some(PathBuf::from(value()?)),
            _ => anyhow::bail!("unknown argument {word}"),
        }
    }
    if let Some(folder) = one {
        plan.folder = folder;
        return isolation::run(|| match EXECUTOR.block_on(LocalSet::new().run_until(measure(&plan))) {
            Ok(figures) => {
                println!("{figures}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("docker-bench: {error:#}");
                ExitCode::FAILURE
            }
        });
    }
    ensure!(plan.rounds > 0 && plan.runs > 0, "--rounds and --runs are 1 at least");
    suite::fetch()?;
    suite::use_manager()?;
    let folder = plan.folder.join(format!("x-docker-bench-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    let measured = rounds(&plan, &folder);
    std::fs::remove_dir_all(&folder)?;
    table(&plan, &measured?);
    Ok(ExitCode::SUCCESS)
}

/// Figures by their name: on containerd and on x-manager, in each round.
type Figures = BTreeMap<String, [Vec<f64>; 2]>;

fn rounds(plan: &Plan, folder: &Path) -> Result<Figures> {
    for (codec, size) in IMAGES {
        eprintln!("an image of {} MiB, {}", plan.mib, image::name(*codec, *size));
        Image::make(folder, *codec, *size, plan.mib, plan.layers)?;
    }
    let mut all = Figures::new();
    for round in 0..plan.rounds {
        for (number, manager) in [None, suite::manager()].into_iter().enumerate() {
            eprintln!("round {}, on {}", round + 1, if manager.is_some() { "x-manager" } else { "containerd" });
            let figures = one(plan, folder, manager)?;
            for (name, value) in figures.as_object().context("figures")? {
                all.entry(name.clone()).or_default()[number].push(value.as_f64().context("a figure")?);
            }
        }
    }
    Ok(all)
}

/// The figures on one daemon: containerd, or the x-manager at a path.
fn one(plan: &Plan, folder: &Path, manager: Option<&Path>) -> Result<Value> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--one").arg(folder).args(["--runs", &plan.runs.to_string()]);
    match manager {
        Some(path) => command.env("X_DAEMON", path),
        None => command.env_remove("X_DAEMON"),
    };
    let output = command.stderr(Io::inherit()).output()?;
    ensure!(output.status.success(), "a run failed: {}", output.status);
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.lines().last().unwrap_or_default()).with_context(|| format!("figures: {text:?}"))
}

async fn measure(plan: &Plan) -> Result<Value> {
    let disk = plan.folder.join("daemon");
    std::fs::create_dir_all(&disk)?;
    // in this run's own mount namespace
    mount(Some(&disk), isolation::RUN, None::<&str>, MsFlags::MS_BIND, None::<&str>).context("the folder of the daemons")?;
    let measured = with_docker(plan).await;
    // both daemons have ended; what cannot be removed goes with the whole folder
    let _ = std::fs::remove_dir_all(isolation::RUN);
    measured
}

async fn with_docker(plan: &Plan) -> Result<Value> {
    let shim = Shim::under_test()?;
    let daemon = Arc::new(Daemon::start(Suite::Forky, &shim).await?);
    let programs = std::env::current_exe()?.parent().context("a file is in a folder")?.to_owned();
    let cx = Context::new(Arc::clone(&daemon), Runtime::Crun, shim, &programs).await?;
    // it has a daemon of its own below
    let docker = Docker::start_with_image_store(&cx).await?;
    let registry = Registry::start(&plan.folder)?;
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
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5")?;
    let cpu = cpu_seconds(pid)?;
    let begin = Instant::now();
    docker.run(arguments)?;
    figures.insert(format!("{name}: s"), json!(begin.elapsed().as_secs_f64()));
    figures.insert(format!("{name}: CPU time of the daemon below, s"), json!(cpu_seconds(pid)? - cpu));
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    figures.insert(format!("{name}: peak of the daemon below, MiB"), json!(peak.context("no VmHWM")? / 1024.0));
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

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn table(plan: &Plan, figures: &Figures) {
    println!("# Docker 28's images: on x-manager and on containerd 2.1\n");
    println!(
        "dockerd 28.5 with the feature `containerd-snapshotter`; images of {} MiB of text-like files in {} layers, pulled from a registry on",
        plan.mib, plan.layers
    );
    println!(
        "loopback; the median of {} rounds, in turns. By `make bench-docker` (`tests/src/bin/docker-bench.rs`). A ratio above 1 is in x-manager's favour.\n",
        plan.rounds
    );
    println!("| docker | containerd 2.1 | x-manager | containerd / x-manager |\n| --- | ---: | ---: | ---: |");
    for (name, [theirs, ours]) in figures {
        let (theirs, ours) = (median(theirs), median(ours));
        println!("| {name} | {theirs:.2} | {ours:.2} | {:.2} |", theirs / ours);
    }
}
