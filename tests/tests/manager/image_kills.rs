//! SIGKILL at random moments of imports, pulls, deletions, collections and upgrades: acknowledged images are whole, and nothing is left that has no row.
//! Images come in steps of this process, by Transfer from a registry, and by ctr, both ways.
//!
//! `X_KILLS` crashes, six without it; `X_SEED` chooses which.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context as _, Result, bail, ensure};
use containerd_client::services::v1::TransferRequest;
use containerd_client::services::v1::snapshots::{PrepareSnapshotRequest, RemoveSnapshotRequest};
use containerd_client::to_any;
use containerd_client::types::transfer::ImageStore;
use shim_tests::client::{Answer, Client};
use shim_tests::context::Context;
use shim_tests::dice::Dice;
use shim_tests::image::{Image, Layer};
use shim_tests::import::{Fact, Import, OVERLAYFS, delete_image};
use shim_tests::operator::{binary, output_text, printed, upgrade};
use shim_tests::proc;
use shim_tests::registry::Registry;
use shim_tests::stored::Stored;
use shim_tests::suite::Suite;
use shim_tests::transfers::{registry_of, store};
use tokio::task::JoinSet;
use tonic::{Code, Status};

use crate::kills::{is_a_crash, store_is_sound};
use crate::power::some_time_passes;

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().and_then(|text| text.parse().ok())
}

fn kills() -> u64 {
    number("X_KILLS").unwrap_or(6)
}

/// Three seconds for each, and a minute.
pub(crate) fn deadline() -> Duration {
    Duration::from_secs(60 + 3 * kills())
}

/// What a client knows of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Absent,
    Present,
    /// A call about it got no answer.
    Unknown,
}

/// A client with images of its own.
#[derive(Debug)]
struct Worker {
    number: u64,
    images: Vec<Image>,
    states: BTreeMap<String, State>,
    /// Acknowledged of the import that was interrupted, whose lease is still there.
    facts: Vec<Fact>,
    /// The key of a container's snapshot, if one is acknowledged.
    container: Option<String>,
    rounds: u64,
    dice: Dice,
    sources: Arc<Sources>,
    moment: Arc<Moment>,
}

/// Where images come from.
#[derive(Debug)]
struct Sources {
    registry: Registry,
    /// Of the daemon.
    address: PathBuf,
    /// For archives.
    folder: PathBuf,
    pulls: AtomicU64,
}

/// How one comes.
#[derive(Debug, Clone, Copy)]
enum Way {
    Steps,
    Transfer,
    /// It downloads and unpacks by itself.
    CtrPull,
    CtrImport,
}

/// When the daemon is no longer to be expected to answer.
#[derive(Debug, Default)]
struct Moment {
    killed: AtomicBool,
    upgrading: AtomicBool,
}

impl Moment {
    /// Fails for an error that has no such reason.
    fn excuses(&self, status: &Status) -> Result<()> {
        let is_excused = self.killed.load(Ordering::SeqCst) || self.upgrading.load(Ordering::SeqCst) && is_a_crash(status);
        ensure!(is_excused, "no crash, and yet: {status:?}");
        Ok(())
    }
}

impl Sources {
    async fn fetch(&self, client: &Client, image: &Image, way: Way, moment: &Moment) -> Answer<()> {
        let failed = |error: &dyn std::fmt::Display| Status::unavailable(error.to_string());
        let mut command = Command::new(if matches!(way, Way::CtrPull) { Suite::Bookworm } else { Suite::Forky }.program("ctr"));
        command.arg("--address").arg(&self.address).args(["--namespace", client.namespace(), "images"]);
        match way {
            Way::Steps | Way::Transfer => {
                let store = ImageStore { name: image.name.clone(), ..store("") };
                let request = TransferRequest {
                    source: Some(to_any(&registry_of(&image.name))),
                    destination: Some(to_any(&store)),
                    ..TransferRequest::default()
                };
                return client.api().transfer().transfer(client.request(request)).await.map(drop);
            }
            Way::CtrPull => command.args(["pull", "--plain-http", &image.name]),
            Way::CtrImport => {
                let archive = self.folder.join(image.name.replace('/', "-"));
                fs::write(&archive, image.archive()).map_err(|error| failed(&error))?;
                command.arg("import").arg(archive)
            }
        };
        command.stdin(Stdio::null());
        let running = tokio::process::Command::from(command).kill_on_drop(true).output();
        let killed = async {
            while !moment.killed.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            output = running => match output {
                Ok(output) if output.status.success() => Ok(()),
                Ok(output) => Err(failed(&output_text(&output))),
                Err(error) => Err(failed(&error)),
            },
            // it may wait for a daemon that does not come
            () = killed => Err(failed(&"its daemon was killed")),
        }
    }
}

impl Worker {
    fn new(number: u64, base: &Arc<Layer>, seed: u64, sources: &Arc<Sources>) -> Self {
        let mut dice = Dice::new(seed + 1000 * number);
        let own: Vec<_> = (1..3).map(|layer| Arc::new(Layer::random(&mut dice, layer, 6 + 10 * layer))).collect();
        let layers = [&[Arc::clone(base)][..], &own].concat();
        let name = |image: u64| sources.registry.image(&format!("kills/w{number}:{image}"));
        let images = vec![Image::new(&name(1), &layers), Image::new(&name(2), &layers[..2])];
        images.iter().for_each(|image| image.publish(&sources.registry));
        let states = images.iter().map(|image| (image.name.clone(), State::Absent)).collect();
        Self {
            number,
            images,
            states,
            facts: Vec::new(),
            container: None,
            rounds: 0,
            dice,
            sources: Arc::clone(sources),
            moment: Arc::default(),
        }
    }

    /// Works until the daemon does not answer.
    async fn work(mut self, client: Client, moment: Arc<Moment>) -> Result<Self> {
        self.moment = Arc::clone(&moment);
        loop {
            self.facts.clear();
            if let Err(status) = self.round(&client).await {
                moment.excuses(&status).with_context(|| format!("worker {}, round {}", self.number, self.rounds))?;
                return Ok(self);
            }
            self.rounds += 1;
        }
    }

    async fn round(&mut self, client: &Client) -> Answer<()> {
        let image = self.images[usize::try_from(self.dice.below(2)).unwrap_or(0)].clone();
        let state = self.states[&image.name];
        if state == State::Present && self.container.is_none() && self.dice.below(3) == 0 {
            return self.start(client, &image).await;
        }
        if let Some(key) = self.container.take()
            && self.dice.below(2) == 0
        {
            let request = RemoveSnapshotRequest { snapshotter: OVERLAYFS.to_owned(), key };
            return client.api().snapshots().remove(client.request(request)).await.map(drop);
        }
        let deletes = state == State::Present;
        self.states.insert(image.name.clone(), State::Unknown);
        if deletes {
            let is_waited_for = self.dice.below(2) == 0;
            delete_image(client, &image.name, is_waited_for).await?;
            self.states.insert(image.name.clone(), State::Absent);
            return Ok(());
        }
        let way = [Way::Steps, Way::Transfer, Way::CtrPull, Way::CtrImport][usize::try_from(self.dice.below(4)).unwrap_or(0)];
        if !matches!(way, Way::Steps) {
            self.sources.fetch(client, &image, way, &self.moment).await?;
            self.sources.pulls.fetch_add(1, Ordering::Relaxed);
            self.states.insert(image.name.clone(), State::Present);
            return Ok(());
        }
        let lease = format!("w{}r{}-{}", self.number, self.rounds, self.dice.below(1 << 30));
        let import = Import::begin(client, &image, &lease).await?;
        let facts = &mut self.facts;
        import.run(&mut |fact| facts.push(fact)).await?;
        // once the lease has ended, the image holds it
        self.states.insert(image.name.clone(), State::Present);
        import.end().await
    }

    /// Makes the snapshot of a container, which keeps the image's snapshots whatever becomes of the image.
    async fn start(&mut self, client: &Client, image: &Image) -> Answer<()> {
        let key = format!("container-{}-{}-{}", self.number, self.rounds, self.dice.below(1 << 30));
        let parent = image.chains().pop().unwrap_or_default();
        let labels = [("containerd.io/gc.root".to_owned(), "x".to_owned())].into();
        let request = PrepareSnapshotRequest { snapshotter: OVERLAYFS.to_owned(), key: key.clone(), parent, labels };
        client.api().snapshots().prepare(client.request(request)).await?;
        self.container = Some(key);
        Ok(())
    }

    /// Everything that must be so.
    fn known(&self) -> Vec<Fact> {
        let mut facts = self.facts.clone();
        for image in &self.images {
            match self.states[&image.name] {
                State::Present => {
                    facts.extend(image.blobs().map(|(digest, _)| Fact::Blob(digest)));
                    facts.extend(image.chains().into_iter().map(Fact::Snapshot));
                    facts.push(Fact::Image(image.name.clone()));
                }
                State::Absent => facts.push(Fact::NoImage(image.name.clone())),
                State::Unknown => {}
            }
        }
        facts.extend(self.container.clone().map(Fact::Snapshot));
        facts
    }
}

pub(crate) async fn images_survive_kills_at_any_moment(cx: Context) -> Result<()> {
    let (cx, seed) = (cx.with_own_daemon().await?, number("X_SEED").unwrap_or(1));
    campaign(&cx, seed).await.with_context(|| format!("X_SEED={seed}"))
}

async fn campaign(cx: &Context, seed: u64) -> Result<()> {
    let mut dice = Dice::new(seed);
    let base = Arc::new(Layer::random(&mut dice, 0, 10));
    let sources = Arc::new(Sources {
        registry: Registry::start(None).await?,
        address: cx.daemon().address(),
        folder: cx.folder().to_owned(),
        pulls: AtomicU64::new(0),
    });
    let mut workers: Vec<_> = (0..WORKERS).map(|number| Worker::new(number, &base, seed, &sources)).collect();
    let images: Vec<_> = workers.iter().flat_map(|worker| worker.images.clone()).collect();
    let stored = Stored::new(cx.client(), &cx.daemon().folder().join("root"));
    let (mut upgrades, mut checked) = (0, 0);
    for crash in 0..kills() {
        let moment = Arc::<Moment>::default();
        let mut running = JoinSet::new();
        for worker in workers.drain(..) {
            running.spawn(worker.work(cx.client().clone(), Arc::clone(&moment)));
        }
        tokio::time::sleep(Duration::from_millis(dice.below(900))).await; // the moment is what is tested
        // every third crash is one of two processes, of which one is taking over from the other
        let upgrading = if dice.below(3) == 0 {
            moment.upgrading.store(true, Ordering::SeqCst);
            let child = upgrade(cx.daemon())?.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn()?;
            tokio::time::sleep(Duration::from_millis(dice.below(600))).await;
            upgrades += 1;
            Some(child)
        } else {
            None
        };
        moment.killed.store(true, Ordering::SeqCst);
        cx.daemon().kill()?;
        kill_all(cx);
        if let Some(mut child) = upgrading {
            child.wait()?;
        }
        while let Some(worker) = running.join_next().await {
            workers.push(worker??);
        }
        workers.sort_by_key(|worker| worker.number);
        store_is_sound(cx).await.with_context(|| format!("crash {crash}"))?;
        // one that was being made is kept for a minute
        some_time_passes(&cx.daemon().folder().join("root"))?;
        cx.revive_daemon().await?;
        let known: Vec<_> = workers.iter().flat_map(Worker::known).collect();
        checked += known.len();
        let mut wrong = stored.lost(known).await?;
        wrong.extend(stored.damage(&images).await?);
        ensure!(wrong.is_empty(), "crash {crash}: {wrong:#?}");
        forget_containers(cx.client(), &workers).await?;
        stored.settles().await.with_context(|| format!("crash {crash}"))?;
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let below = format!("{}/", cx.daemon().folder().display());
        let left: Vec<_> = mounts.lines().filter(|line| line.contains(&below)).collect();
        ensure!(left.is_empty(), "crash {crash}: {left:#?}");
    }
    let rounds: u64 = workers.iter().map(|worker| worker.rounds).sum();
    ensure!(rounds > 0, "no import has ended");
    // by its own command, too
    printed(Command::new(binary()?).arg("--state").arg(cx.daemon().folder().join("state")).arg("verify"))?;
    let pulls = sources.pulls.load(Ordering::Relaxed);
    println!(
        "{} crashes, {upgrades} of them during an upgrade, over {rounds} imports, deletions and containers, {pulls} of them pulls and imports by Transfer and ctr: {checked} acknowledged facts hold",
        kills()
    );
    Ok(())
}

/// Kills processes of the daemon that were about to take over, or had.
fn kill_all(cx: &Context) {
    let folder = format!("{}/", cx.daemon().folder().display());
    loop {
        let alive: Vec<_> = proc::all().into_values().filter(|process| process.pid != 1 && !process.is_zombie()).collect();
        let ours: Vec<_> = alive.iter().filter(|process| proc::mentions(process.pid, &folder)).collect();
        if ours.is_empty() {
            return;
        }
        ours.iter().for_each(|process| proc::kill_hard(process.pid));
    }
}

/// Removes snapshots of containers whose creation or removal got no answer: no client knows them.
async fn forget_containers(client: &Client, workers: &[Worker]) -> Result<()> {
    let rows = Stored::new(client, "/".as_ref()).rows().await?;
    let known: Vec<_> = workers.iter().filter_map(|worker| worker.container.as_ref()).collect();
    for key in rows.snapshots.keys().filter(|key| key.starts_with("container-") && !known.contains(key)) {
        let request = RemoveSnapshotRequest { snapshotter: OVERLAYFS.to_owned(), key: key.clone() };
        match client.api().snapshots().remove(client.request(request)).await {
            Err(status) if status.code() != Code::NotFound => bail!("{key}: {status:?}"),
            _ => {}
        }
    }
    Ok(())
}

const WORKERS: u64 = 3;
