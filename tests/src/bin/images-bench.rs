//! Measures how x-manager and containerd 2.1 store and unpack images for containerd's own clients, in turns in one run. Needs root.
//!
//! ```text
//! X_SHIM=… X_DAEMON=… images-bench [--mib 1024] [--layers 20] [--rounds 3] [--blobs 10000] [--folder /var/tmp] [--only TEXT]
//! ```
//! It starts itself once for each daemon and round, with namespaces of its own; the daemons' files are in the folder, on a disk. containerd is
//! measured as it comes, and with the program igzip, if that is in the cache of the suites. `--only` measures what
//! has that text in its name: a case, or `list and collection of blobs`.

#[path = "images-bench/image.rs"]
mod image;
#[path = "images-bench/registry.rs"]
mod registry;
#[path = "images-bench/table.rs"]
mod table;

use std::os::unix::fs::symlink;
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
use shim_tests::{beside, image_tools, isolation, upload};

use image::{Codec, Image, Size};
use registry::Registry;
use table::Figures;

/// What to measure.
#[derive(Clone)]
struct Plan {
    mib: usize,
    layers: usize,
    rounds: usize,
    blobs: usize,
    folder: PathBuf,
    /// In the names of cases.
    only: String,
}

/// Who serves.
#[derive(Clone, Copy, PartialEq)]
enum Server {
    Containerd,
    /// containerd with a faster program for gzip in its PATH.
    WithIgzip,
    Manager,
}

const SERVERS: [Server; 3] = [Server::Containerd, Server::WithIgzip, Server::Manager];

/// How a client gets an image to the daemon.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Import,
    ImportLocal,
    Pull,
    PullLocal,
}

struct Case {
    name: &'static str,
    client: Suite,
    way: Way,
    codec: Codec,
    size: Size,
    /// How many times as fast as containerd it should be.
    times_faster: Option<f64>,
}

const fn case(name: &'static str, client: Suite, way: Way, (codec, size): (Codec, Size), times_faster: Option<f64>) -> Case {
    Case { name, client, way, codec, size, times_faster }
}

const GZIP: (Codec, Size) = (Codec::Gzip, Size::Large);
const ZSTD: (Codec, Size) = (Codec::Zstd, Size::Large);
const SMALL: (Codec, Size) = (Codec::Gzip, Size::Small);
const CASES: &[Case] = &[
    case("import by Transfer, ctr 2.1, gzip", Suite::Forky, Way::Import, GZIP, Some(4.0)),
    case("import by Transfer, ctr 2.1, zstd", Suite::Forky, Way::Import, ZSTD, Some(2.5)),
    case("import --local, ctr 2.1, gzip", Suite::Forky, Way::ImportLocal, GZIP, Some(3.0)),
    case("import --local, ctr 2.1, zstd", Suite::Forky, Way::ImportLocal, ZSTD, Some(1.7)),
    case("import --local, ctr 2.1, gzip, small files", Suite::Forky, Way::ImportLocal, SMALL, None),
    case("pull by Transfer, ctr 2.1, gzip", Suite::Forky, Way::Pull, GZIP, Some(4.0)),
    case("pull by Transfer, ctr 2.1, zstd", Suite::Forky, Way::Pull, ZSTD, Some(2.5)),
    case("pull --local, ctr 2.1, gzip", Suite::Forky, Way::PullLocal, GZIP, Some(3.0)),
    case("pull --local, ctr 2.1, zstd", Suite::Forky, Way::PullLocal, ZSTD, Some(1.7)),
    case("pull, ctr 1.6, gzip", Suite::Bookworm, Way::Pull, GZIP, Some(1.5)),
    case("pull, ctr 1.6, zstd", Suite::Bookworm, Way::Pull, ZSTD, Some(1.5)),
    case("pull, ctr 1.6, gzip, small files", Suite::Bookworm, Way::Pull, SMALL, None),
];

fn main() -> ExitCode {
    beside::end(PROGRAM, run())
}

const PROGRAM: &str = "images-bench";

fn run() -> Result<ExitCode> {
    let mut plan = Plan { mib: 1024, layers: 20, rounds: 3, blobs: 10_000, folder: "/var/tmp".into(), only: String::new() };
    let (mut one, mut with_igzip) = (None, false);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--mib" => plan.mib = value()?.parse()?,
            "--layers" => plan.layers = value()?.parse()?,
            "--rounds" => plan.rounds = value()?.parse()?,
            "--blobs" => plan.blobs = value()?.parse()?,
            "--folder" => plan.folder = value()?.into(),
            "--only" => plan.only = value()?,
            "--one" => one = Some(PathBuf::from(value()?)),
            // in the run of one daemon
            "--with-igzip" => with_igzip = true,
            _ => anyhow::bail!("unknown argument {word}"),
        }
    }
    if let Some(folder) = one {
        plan.folder = folder;
        return beside::run(PROGRAM, measure(&plan, with_igzip));
    }
    suite::fetch()?;
    suite::use_manager()?;
    let folder = plan.folder.join(format!("x-images-bench-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    let measured = rounds(&plan, &folder);
    std::fs::remove_dir_all(&folder)?;
    table::print(&plan, &measured?);
    Ok(ExitCode::SUCCESS)
}

fn rounds(plan: &Plan, folder: &Path) -> Result<Figures> {
    for (codec, size) in [GZIP, ZSTD, SMALL] {
        if plan.cases().any(|case| (case.codec, case.size) == (codec, size)) {
            eprintln!("an image of {} MiB, {}", plan.mib, image::name(codec, size));
            Image::make(folder, codec, size, plan.mib, plan.layers)?;
        }
    }
    let has_igzip = image_tools::program("igzip").is_file();
    if !has_igzip {
        eprintln!("there is no igzip in the cache of the suites (make suites): containerd is measured without it only");
    }
    let mut all = Figures::new();
    for round in 0..plan.rounds {
        for (number, server) in SERVERS.into_iter().enumerate() {
            if server == Server::WithIgzip && !has_igzip {
                continue;
            }
            let name = match server {
                Server::Containerd => "containerd",
                Server::WithIgzip => "containerd with igzip",
                Server::Manager => "x-manager",
            };
            eprintln!("round {}, {name}", round + 1);
            let figures = one(plan, folder, server)?;
            for (name, value) in figures.as_object().context("figures")? {
                if let Some(value) = value.as_f64() {
                    all.entry(name.clone()).or_default()[number].push(value);
                }
            }
        }
    }
    Ok(all)
}

impl Plan {
    fn cases(&self) -> impl Iterator<Item = &'static Case> {
        CASES.iter().filter(|case| case.name.contains(&self.only))
    }
}

/// The figures of one daemon.
fn one(plan: &Plan, folder: &Path, server: Server) -> Result<Value> {
    let folder = folder.to_str().context("the folder's name is no text")?;
    // what is no layer is the same with igzip
    let is_asked_for = server != Server::WithIgzip && "list and collection of blobs".contains(&plan.only);
    let blobs = if is_asked_for { plan.blobs } else { 0 }.to_string();
    let mut arguments = vec!["--one", folder, "--only", &plan.only, "--blobs", &blobs];
    if server == Server::WithIgzip {
        arguments.push("--with-igzip");
    }
    beside::figures(&arguments, suite::manager().filter(|_| server == Server::Manager))
}

async fn measure(plan: &Plan, with_igzip: bool) -> Result<Value> {
    let disk = plan.folder.join("daemon");
    std::fs::create_dir_all(&disk)?;
    // in this run's own mount namespace
    mount(Some(&disk), isolation::RUN, None::<&str>, MsFlags::MS_BIND, None::<&str>).context("the folder of the daemon")?;
    let measured = with_daemon(plan, with_igzip).await;
    // the daemon has ended; what cannot be removed goes with the whole folder
    let _ = std::fs::remove_dir_all(isolation::RUN);
    measured
}

async fn with_daemon(plan: &Plan, with_igzip: bool) -> Result<Value> {
    let shim = Shim::under_test()?;
    // whatever this host has in /usr/bin
    let plain = [("CONTAINERD_DISABLE_IGZIP", "1"), ("CONTAINERD_DISABLE_PIGZ", "1")];
    let daemon = Arc::new(Daemon::start_with(Suite::Forky, &shim, if with_igzip { &[] } else { &plain }).await?);
    if with_igzip {
        // it looks for the program when it unpacks its first layer
        symlink(image_tools::program("igzip"), daemon.bin().join("igzip"))?;
    }
    let programs = std::env::current_exe()?.parent().context("a file is in a folder")?.to_owned();
    let cx = Context::new(Arc::clone(&daemon), Runtime::Crun, shim, &programs).await?;
    let registry = Registry::start(&plan.folder)?;
    let container = cx.container(&["sleep", "100000"]).start().await?;
    let mut figures = serde_json::Map::new();
    for case in plan.cases().filter(|case| !with_igzip || case.codec == Codec::Gzip) {
        let name = case.name;
        eprintln!("{name}");
        match run_case(&cx, plan, &registry, &container.id, case).await {
            Ok(Measured { seconds, peak_mib, state_p99_ms }) => {
                figures.insert(format!("{name}: {}", table::SECONDS), json!(seconds));
                figures.insert(format!("{name}: {}", table::PEAK), json!(peak_mib));
                figures.insert(format!("{name}: {}", table::STATE), json!(state_p99_ms));
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

async fn run_case(cx: &Context, plan: &Plan, registry: &Registry, container: &str, case: &Case) -> Result<Measured> {
    let image = Image::at(&plan.folder, case.codec, case.size);
    let pid = cx.daemon().pid().context("a daemon")?;
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5")?;
    let (name, archive) = (registry.image(case.codec, case.size), image.archive());
    let mut command = Command::new(case.client.program("ctr"));
    command.arg("--address").arg(cx.daemon().address()).args(["--namespace", "bench", "images"]);
    match case.way {
        Way::Import => command.arg("import").arg(&archive),
        Way::ImportLocal => command.args(["import", "--local"]).arg(&archive),
        Way::Pull => command.args(["pull", "--plain-http", &name]),
        Way::PullLocal => command.args(["pull", "--local", "--plain-http", &name]),
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
