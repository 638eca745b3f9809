//! Measures how x-manager and containerd 2.1 store and unpack images for containerd's own clients, in turns in one run. Needs root.
//!
//! ```text
//! X_SHIM=… X_DAEMON=… images-bench [--mib 1024] [--layers 20] [--rounds 3] [--blobs 10000] [--folder /var/tmp]
//! ```
//! It starts itself once for each daemon and round, with namespaces of its own; the daemons' files are in the folder, on a disk.

#[path = "images-bench/image.rs"]
mod image;
#[path = "images-bench/registry.rs"]
mod registry;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio as Io};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::DeleteRequest;
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};
use shim_tests::context::Context;
use shim_tests::daemon::Daemon;
use shim_tests::suite::{self, Runtime, Shim, Suite};
use shim_tests::{beside, isolation, upload};

use image::{Codec, Image, Size};
use registry::Registry;

/// What to measure.
#[derive(Clone)]
struct Plan {
    mib: usize,
    layers: usize,
    rounds: usize,
    blobs: usize,
    folder: PathBuf,
}

/// How a client gets an image to the daemon.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Import,
    ImportLocal,
    Pull,
}

const CASES: &[(&str, Suite, Way, Codec, Size)] = &[
    ("import by Transfer, ctr 2.1, gzip", Suite::Forky, Way::Import, Codec::Gzip, Size::Large),
    ("import by Transfer, ctr 2.1, zstd", Suite::Forky, Way::Import, Codec::Zstd, Size::Large),
    ("import --local, ctr 2.1, gzip", Suite::Forky, Way::ImportLocal, Codec::Gzip, Size::Large),
    ("import --local, ctr 2.1, zstd", Suite::Forky, Way::ImportLocal, Codec::Zstd, Size::Large),
    ("import --local, ctr 2.1, gzip, small files", Suite::Forky, Way::ImportLocal, Codec::Gzip, Size::Small),
    ("pull, ctr 1.6, gzip", Suite::Bookworm, Way::Pull, Codec::Gzip, Size::Large),
    ("pull, ctr 1.6, zstd", Suite::Bookworm, Way::Pull, Codec::Zstd, Size::Large),
    ("pull, ctr 1.6, gzip, small files", Suite::Bookworm, Way::Pull, Codec::Gzip, Size::Small),
];

fn main() -> ExitCode {
    beside::end(PROGRAM, run())
}

const PROGRAM: &str = "images-bench";

fn run() -> Result<ExitCode> {
    let mut plan = Plan { mib: 1024, layers: 20, rounds: 3, blobs: 10_000, folder: "/var/tmp".into() };
    let mut one = None;
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--mib" => plan.mib = value()?.parse()?,
            "--layers" => plan.layers = value()?.parse()?,
            "--rounds" => plan.rounds = value()?.parse()?,
            "--blobs" => plan.blobs = value()?.parse()?,
            "--folder" => plan.folder = value()?.into(),
            "--one" => one = Some(PathBuf::from(value()?)),
            _ => anyhow::bail!("unknown argument {word}"),
        }
    }
    if let Some(folder) = one {
        plan.folder = folder;
        return beside::run(PROGRAM, measure(&plan));
    }
    suite::fetch()?;
    suite::use_manager()?;
    let folder = plan.folder.join(format!("x-images-bench-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    let measured = rounds(&plan, &folder);
    std::fs::remove_dir_all(&folder)?;
    table(&plan, &measured?);
    Ok(ExitCode::SUCCESS)
}

/// Figures by their name: of containerd and of x-manager, in each round.
type Figures = BTreeMap<String, [Vec<f64>; 2]>;

fn rounds(plan: &Plan, folder: &Path) -> Result<Figures> {
    for codec in [Codec::Gzip, Codec::Zstd] {
        for size in [Size::Large, Size::Small] {
            if CASES.iter().any(|(.., of, files)| *of == codec && *files == size) {
                eprintln!("an image of {} MiB, {}", plan.mib, image::name(codec, size));
                Image::make(folder, codec, size, plan.mib, plan.layers)?;
            }
        }
    }
    let mut all = Figures::new();
    for round in 0..plan.rounds {
        for (number, manager) in [None, suite::manager()].into_iter().enumerate() {
            eprintln!("round {}, {}", round + 1, if manager.is_some() { "x-manager" } else { "containerd" });
            let figures = one(plan, folder, manager)?;
            for (name, value) in figures.as_object().context("figures")? {
                if let Some(value) = value.as_f64() {
                    all.entry(name.clone()).or_default()[number].push(value);
                }
            }
        }
    }
    Ok(all)
}

/// The figures of one daemon.
fn one(plan: &Plan, folder: &Path, manager: Option<&Path>) -> Result<Value> {
    let folder = folder.to_str().context("the folder's name is no text")?;
    beside::figures(&["--one", folder, "--blobs", &plan.blobs.to_string()], manager)
}

async fn measure(plan: &Plan) -> Result<Value> {
    let disk = plan.folder.join("daemon");
    std::fs::create_dir_all(&disk)?;
    // in this run's own mount namespace
    mount(Some(&disk), isolation::RUN, None::<&str>, MsFlags::MS_BIND, None::<&str>).context("the folder of the daemon")?;
    let measured = with_daemon(plan).await;
    // the daemon has ended; what cannot be removed goes with the whole folder
    let _ = std::fs::remove_dir_all(isolation::RUN);
    measured
}

async fn with_daemon(plan: &Plan) -> Result<Value> {
    let shim = Shim::under_test()?;
    let daemon = Arc::new(Daemon::start(Suite::Forky, &shim).await?);
    let programs = std::env::current_exe()?.parent().context("a file is in a folder")?.to_owned();
    let cx = Context::new(Arc::clone(&daemon), Runtime::Crun, shim, &programs).await?;
    let registry = Registry::start(&plan.folder)?;
    let container = cx.container(&["sleep", "100000"]).start().await?;
    let mut figures = serde_json::Map::new();
    for (name, client, way, codec, size) in CASES {
        eprintln!("{name}");
        match case(&cx, plan, &registry, &container.id, (*client, *way, *codec, *size)).await {
            Ok(Measured { seconds, peak_mib, state_p99_ms }) => {
                figures.insert(format!("{name}: s"), json!(seconds));
                figures.insert(format!("{name}: peak of the daemon, MiB"), json!(peak_mib));
                figures.insert(format!("{name}: State, 99 %, ms"), json!(state_p99_ms));
            }
            Err(error) => eprintln!("{name}: {error:#}"),
        }
    }
    container.destroy().await?;
    if plan.blobs > 0 {
        eprintln!("{} blobs", plan.blobs);
        let (list, collection) = blobs(&cx, plan.blobs).await?;
        figures.insert(format!("list of {} blobs: ms", plan.blobs), json!(list));
        figures.insert(format!("collection of {} blobs: ms", plan.blobs), json!(collection));
    }
    daemon.stop()?;
    Ok(Value::Object(figures))
}

struct Measured {
    seconds: f64,
    peak_mib: f64,
    state_p99_ms: f64,
}

async fn case(
    cx: &Context,
    plan: &Plan,
    registry: &Registry,
    container: &str,
    (client, way, codec, size): (Suite, Way, Codec, Size),
) -> Result<Measured> {
    let image = Image::at(&plan.folder, codec, size);
    let pid = cx.daemon().pid().context("a daemon")?;
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5")?;
    let (name, archive) = (registry.image(codec, size), image.archive());
    let mut command = Command::new(client.program("ctr"));
    command.arg("--address").arg(cx.daemon().address()).args(["--namespace", "bench", "images"]);
    match way {
        Way::Import => command.arg("import").arg(&archive),
        Way::ImportLocal => command.args(["import", "--local"]).arg(&archive),
        Way::Pull => command.args(["pull", "--plain-http", &name]),
    };
    command.stdin(Io::null()).stdout(Io::null()).stderr(Io::piped());
    let is_done = Arc::new(AtomicBool::new(false));
    let asks = async {
        let mut took = Vec::new();
        while !is_done.load(Ordering::Relaxed) {
            let begin = Instant::now();
            cx.client().state(container, "").await?;
            took.push(begin.elapsed().as_secs_f64() * 1000.0);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        took.sort_by(f64::total_cmp);
        Ok::<_, anyhow::Error>(took[(took.len() * 99 / 100).min(took.len() - 1)])
    };
    let runs = async {
        let begin = Instant::now();
        let output = tokio::task::spawn_blocking(move || command.output()).await?;
        let seconds = begin.elapsed().as_secs_f64();
        is_done.store(true, Ordering::Relaxed);
        let output = output?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok::<_, anyhow::Error>(seconds)
    };
    let (state_p99_ms, seconds) = tokio::join!(asks, runs);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    empty(cx)?;
    Ok(Measured { seconds: seconds?, peak_mib: peak.context("no VmHWM")? / 1024.0, state_p99_ms: state_p99_ms? })
}

/// Removes every image of the benchmark, and waits until their files are gone.
fn empty(cx: &Context) -> Result<()> {
    let ctr = |arguments: &[&str]| -> Result<String> {
        let mut command = Command::new(Suite::Forky.program("ctr"));
        command.arg("--address").arg(cx.daemon().address()).args(["--namespace", "bench"]).args(arguments);
        let output = command.output()?;
        ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    for name in ctr(&["images", "ls", "-q"])?.lines() {
        ctr(&["images", "rm", "--sync", name])?;
    }
    let snapshots = cx.daemon().folder().join("root/io.containerd.snapshotter.v1.overlayfs/snapshots");
    let begin = Instant::now();
    while std::fs::read_dir(&snapshots)?.count() > 0 && begin.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure!(Command::new("sync").status()?.success());
    Ok(())
}

/// Milliseconds of a list, and of the collection, of that many blobs.
async fn blobs(cx: &Context, count: usize) -> Result<(f64, f64)> {
    let client = cx.client().with_lease("many").await?;
    for number in 0..count {
        upload::store(&client, &format!("r{number}"), format!("blob {number}").as_bytes(), &[]).await?;
    }
    let begin = Instant::now();
    let mut listed = client.api().content().list(client.request(Default::default())).await?.into_inner();
    let mut found = 0;
    while let Some(page) = listed.message().await? {
        found += page.info.len();
    }
    let list = begin.elapsed().as_secs_f64() * 1000.0;
    ensure!(found >= count, "{found} of {count}");
    let begin = Instant::now();
    client.api().leases().delete(client.request(DeleteRequest { id: "many".to_owned(), sync: true })).await?;
    Ok((list, begin.elapsed().as_secs_f64() * 1000.0))
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn table(plan: &Plan, figures: &Figures) {
    println!("# Images: x-manager beside containerd 2.1\n");
    println!(
        "Images of {} MiB of text-like files in {} layers, stored and unpacked for containerd's own clients; the median of {} rounds, in turns. By",
        plan.mib, plan.layers, plan.rounds
    );
    println!("`make bench-images` (`tests/src/bin/images-bench.rs`). A ratio above 1 is in x-manager's favour.\n");
    println!("| | containerd 2.1 | x-manager | containerd / x-manager |\n| --- | ---: | ---: | ---: |");
    for (name, [theirs, ours]) in figures {
        let (theirs, ours) = (median(theirs), median(ours));
        println!("| {name} | {theirs:.2} | {ours:.2} | {:.2} |", theirs / ours);
    }
}
