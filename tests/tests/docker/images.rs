//! Docker 28 with its images in the daemon below (the feature `containerd-snapshotter`): docs/docker.md is the table of it.

#[path = "builds.rs"]
mod builds;
#[path = "graph.rs"]
mod graph;

use std::fs;
use std::future::Future;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::snapshots::{ListSnapshotsRequest, RemoveSnapshotRequest, UsageRequest};
use containerd_client::services::v1::{
    CreateImageRequest, DeleteImageRequest, DeleteRequest, GetImageRequest, Image, ListContentRequest, ListRequest,
};
use shim_tests::client::Client;
use shim_tests::context::Context;
use shim_tests::docker::{Docker, IMAGE};
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::image_tools::{HeldPort, Registry};
use shim_tests::runner::skip;
use shim_tests::{operator, proc, suite};

use builds::buildx;

/// The length of a file in a layer.
const LARGE: usize = 4 << 20;

type Answer<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

/// What users do, and its check.
type Row = (&'static str, for<'a> fn(&'a Bench) -> Answer<'a>);

macro_rules! rows {
    ($($name:literal: $check:ident),+ $(,)?) => { &[$(($name, |bench| Box::pin($check(bench)))),+] };
}

const ROWS: &[Row] = rows![
    "run, of an image from `import`": run,
    "build (classic), with its cache": build,
    "a build again under the same name leaves one image without a name, which `image prune` removes": build_again,
    "build with buildx (BuildKit): RUN, COPY, stages, a cache mount, cache hits, --load, --output type=oci and type=local, --push": buildx,
    "push, then pull by name and by digest: the same image": push_and_pull,
    "two pulls of one image at once": pull_twice,
    "save, then load, also twice: the same image": save_and_load,
    "commit: the image's id is its manifest's digest; diff, history": commit,
    "cp and export of a container": copy,
    "tag, rmi of one name and of the last one, which frees the space": tag,
    "rmi of an image with a container is refused; with --force the container keeps running": remove_used,
    "inspect, ls, system df: the sizes of images and containers": sizes,
    "300 images are listed by one call": list,
    "volumes are filled with the image's files": volume,
    "a kill of dockerd: images are there, and containers keep running (live-restore)": restart,
    "a kill of the daemon below: the same": crash,
    "an upgrade of the daemon below in the middle of a pull: the pull continues, containers keep running": upgrade,
    "rm of a container whose lease, or snapshot, is gone": no_lease,
    "system prune --all frees everything": prune,
];

/// A dockerd, a registry, and a client of the daemon below in dockerd's namespace.
struct Bench {
    docker: Docker,
    registry: Registry,
    below: Client,
    folder: PathBuf,
}

impl Bench {
    async fn start(cx: &Context) -> Result<Self> {
        let docker = Docker::start_with_image_store(cx).await?;
        let folder = docker.context().folder().to_owned();
        let registry = Registry::start(&folder.join("registry")).await?;
        let below = Client::connect(&docker.context().daemon().address(), "moby").await?;
        Ok(Self { docker, registry, below, folder })
    }

    /// Builds an image with one file more than the first has.
    fn build(&self, name: &str, text: &str) -> Result<String> {
        self.build_with(name, text.as_bytes(), "RUN cat /made /made > /twice && rm /made\nCMD cat /twice")
    }

    fn build_with(&self, name: &str, data: &[u8], steps: &str) -> Result<String> {
        let folder = self.folder.join("build");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("made"), data)?;
        fs::write(folder.join("Dockerfile"), format!("FROM {IMAGE}\nCOPY made /made\n{steps}\n"))?;
        let mut build = self.docker.command(&["build", "--network", "none", "--tag", name, &folder.display().to_string()]);
        let output = build.env("DOCKER_BUILDKIT", "0").output()?;
        ensure!(output.status.success(), "{output:?}");
        self.id(name)?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// An image that is in the registry alone, with a layer of some MiB, and the port by which a pull of it stops in the middle of that.
    fn held_image(&self) -> Result<(String, HeldPort)> {
        let name = self.registry.image("a/large:1");
        let mut large = fs::read("/proc/self/exe")?;
        large.truncate(LARGE);
        self.build_with(&name, &large, "CMD wc -c < /made")?;
        self.docker.run(&["push", &name])?;
        self.remove(&[&name])?;
        let held = HeldPort::new(self.registry.port(), 1 << 20)?;
        Ok((format!("127.0.0.1:{}/a/large:1", held.port()), held))
    }

    fn id(&self, name: &str) -> Result<String> {
        self.docker.run(&["image", "inspect", "--format", "{{.Id}}", name])
    }

    /// Names and ids of images; those without a name are called so.
    fn images(&self) -> Result<Vec<String>> {
        let printed = self.docker.run(&["image", "ls", "--all", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}"])?;
        let mut images: Vec<_> = printed.lines().map(str::to_owned).collect();
        images.sort();
        Ok(images)
    }

    fn nameless(&self) -> Result<usize> {
        Ok(self.docker.run(&["image", "ls", "--quiet", "--filter", "dangling=true"])?.lines().count())
    }

    /// Runs a container of an image to its end, and returns what it printed.
    fn output_of(&self, image: &str, command: &[&str]) -> Result<String> {
        self.docker.run(&[&["run", "--rm", "--network", "none", image], command].concat())
    }

    /// Digests and sizes of all content below.
    async fn content(&self) -> Result<Vec<(String, i64)>> {
        content(&self.below).await
    }

    async fn snapshots(&self) -> Result<Vec<(String, String)>> {
        let request = ListSnapshotsRequest { snapshotter: "overlayfs".to_owned(), filters: Vec::new() };
        let mut pages = self.below.api().snapshots().list(self.below.request(request)).await?.into_inner();
        let mut all = Vec::new();
        while let Some(page) = pages.message().await? {
            all.extend(page.info.into_iter().map(|info| (info.name, info.parent)));
        }
        Ok(all)
    }

    /// Content and snapshots that are there, in numbers, once what was removed is collected.
    async fn is_again(&self, before: (usize, usize)) -> Result<()> {
        eventually("what was removed is collected", SOON, async || {
            let now = (self.content().await?.len(), self.snapshots().await?.len());
            ensure!(now == before, "{now:?} blobs and snapshots, not {before:?}");
            Ok(())
        })
        .await
    }

    async fn numbers(&self) -> Result<(usize, usize)> {
        Ok((self.content().await?.len(), self.snapshots().await?.len()))
    }

    /// Removes what a row has left that failed.
    fn clean(&self) -> Result<()> {
        for container in self.docker.run(&["ps", "--all", "--quiet"])?.lines() {
            self.docker.run(&["rm", "--force", container])?;
        }
        self.docker.run(&["image", "prune", "--force"])?;
        for image in self.images()? {
            let name = image.split(' ').next().unwrap_or_default();
            if name != format!("{IMAGE}:latest") {
                self.remove(&[name])?;
            }
        }
        Ok(())
    }

    fn remove(&self, names: &[&str]) -> Result<()> {
        self.docker.run(&[&["rmi", "--force"], names].concat()).map(drop)
    }
}

/// On containerd only with `X_DOCKER=28`, to compare; `X_ROWS` chooses rows by a part of their names.
pub(crate) async fn what_docker_does_with_images_it_does_on_x_manager(cx: Context) -> Result<()> {
    needs_manager()?;
    let bench = Bench::start(&cx).await?;
    let mut wrong = Vec::new();
    let mut table = HEAD.to_owned();
    let chosen = std::env::var("X_ROWS").unwrap_or_default();
    for (name, check) in ROWS.iter().filter(|(name, _)| name.contains(&chosen)) {
        let begin = Instant::now();
        let verdict = match check(&bench).await {
            Ok(()) => "yes",
            Err(error) => {
                wrong.push(format!("{name}: {error:#}"));
                bench.clean()?;
                "NO"
            }
        };
        println!("{name}: {verdict}, {:.1?}", begin.elapsed());
        table.push_str(&format!("| {name} | {verdict} |\n"));
    }
    bench.docker.leaves_nothing().await?;
    drop(bench);
    wrong.extend(graph::append(&cx, &mut table, &chosen).await?);
    ensure!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    // the same on containerd, or some rows of it
    if suite::manager().is_none() || !chosen.is_empty() {
        return Ok(());
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/docker.md");
    if std::env::var_os("X_WRITE_DOCS").is_some() {
        fs::write(&path, &table)?;
    }
    ensure!(fs::read_to_string(&path).unwrap_or_default() == table, "docs/docker.md is out of date: run with X_WRITE_DOCS=1");
    Ok(())
}

/// Digests and sizes of all content of a namespace.
async fn content(client: &Client) -> Result<Vec<(String, i64)>> {
    let mut pages = client.api().content().list(client.request(ListContentRequest::default())).await?.into_inner();
    let mut all = Vec::new();
    while let Some(page) = pages.message().await? {
        all.extend(page.info.into_iter().map(|info| (info.digest, info.size)));
    }
    Ok(all)
}

fn needs_manager() -> Result<()> {
    let is_asked_for = std::env::var("X_DOCKER").is_ok_and(|version| version == "28");
    if suite::manager().is_some() || is_asked_for { Ok(()) } else { skip("X_DOCKER=28 compares Docker's images on containerd") }
}

const HEAD: &str = "\
# Docker on x-manager

What Docker 28 does with images and containers when both are kept by `x-manager`:

```json
{ \"features\": { \"containerd-snapshotter\": true }, \"default-runtime\": \"x\", \"runtimes\": { \"x\": { \"runtimeType\": \"io.containerd.x.v2\" } } }
```

```sh
dockerd --containerd /run/x-manager/x-manager.sock
```

`docker buildx`, of the package docker-buildx of Debian forky, is BuildKit within dockerd: its layers and cache are in `x-manager`, its containers are made by runc, which dockerd starts itself. Generated by `tests/tests/docker/images.rs`, which runs each row and checks its output and effect; what containers do is in `tests/tests/docker.rs`.

| | on x-manager |
| --- | --- |
";

async fn run(bench: &Bench) -> Result<()> {
    ensure!(bench.output_of(IMAGE, &["echo", "hello"])? == "hello");
    let refused = bench.docker.output(&["run", "--rm", "--network", "none", IMAGE, "sh", "-c", "exit 3"])?;
    ensure!(refused.status.code() == Some(3), "{refused:?}");
    Ok(())
}

async fn build(bench: &Bench) -> Result<()> {
    let before = bench.numbers().await?;
    bench.build("built", "text")?;
    let id = bench.id("built")?;
    ensure!(bench.output_of("built", &[])? == "texttext");
    let again = bench.build("built", "text")?;
    ensure!(again.matches("Using cache").count() == 3 && bench.id("built")? == id, "{again}");
    ensure!(bench.nameless()? == 0, "{:?}", bench.images()?);
    bench.remove(&["built"])?;
    bench.is_again(before).await
}

async fn build_again(bench: &Bench) -> Result<()> {
    let before = bench.numbers().await?;
    bench.build("built", "one")?;
    bench.build("built", "two")?;
    ensure!(bench.output_of("built", &[])? == "twotwo");
    ensure!(bench.nameless()? == 1, "{:?}", bench.images()?);
    bench.docker.run(&["image", "prune", "--force"])?;
    ensure!(bench.nameless()? == 0, "{:?}", bench.images()?);
    ensure!(bench.output_of("built", &[])? == "twotwo");
    bench.remove(&["built"])?;
    bench.is_again(before).await
}

async fn push_and_pull(bench: &Bench) -> Result<()> {
    let before = bench.numbers().await?;
    let name = bench.registry.image("a/pushed:1");
    bench.build(&name, "pushed")?;
    let id = bench.id(&name)?;
    let pushed = bench.docker.run(&["push", &name])?;
    let digest = pushed.split_whitespace().find(|word| word.starts_with("sha256:")).context("no digest")?.to_owned();
    ensure!(digest == id, "{pushed}");
    bench.remove(&[&name])?;
    bench.is_again(before).await?;
    let by_digest = bench.registry.image(&format!("a/pushed@{digest}"));
    for reference in [&name, &by_digest] {
        bench.docker.run(&["pull", reference])?;
        ensure!(bench.id(reference)? == id && bench.output_of(reference, &[])? == "pushedpushed", "{reference}");
        let again = bench.docker.run(&["pull", reference])?;
        ensure!(again.contains("Image is up to date"), "{again}");
        bench.remove(&[reference])?;
        bench.is_again(before).await?;
    }
    let missing = bench.docker.output(&["pull", &bench.registry.image("a/pushed:none")])?;
    ensure!(!missing.status.success() && String::from_utf8_lossy(&missing.stderr).contains("not found"), "{missing:?}");
    Ok(())
}

async fn pull_twice(bench: &Bench) -> Result<()> {
    let before = bench.numbers().await?;
    let name = bench.registry.image("a/twice:1");
    bench.build(&name, "twice")?;
    bench.docker.run(&["push", &name])?;
    bench.remove(&[&name])?;
    bench.is_again(before).await?;
    let pulls = [0, 1].map(|_| bench.docker.command(&["pull", "--quiet", &name]).stdout(Stdio::null()).spawn());
    for pull in pulls {
        let status = pull?.wait()?;
        ensure!(status.success(), "{status}");
    }
    ensure!(bench.output_of(&name, &[])? == "twicetwice");
    bench.remove(&[&name])?;
    bench.is_again(before).await
}

async fn save_and_load(bench: &Bench) -> Result<()> {
    let before = bench.numbers().await?;
    bench.build("saved", "saved")?;
    let (id, file) = (bench.id("saved")?, bench.folder.join("saved.tar").display().to_string());
    bench.docker.run(&["save", "--output", &file, "saved"])?;
    bench.remove(&["saved"])?;
    bench.is_again(before).await?;
    for _again in 0..2 {
        let loaded = bench.docker.run(&["load", "--input", &file])?;
        ensure!(loaded == "Loaded image: saved:latest", "{loaded}");
        ensure!(bench.id("saved")? == id, "{id}, then {:?}", bench.images()?);
    }
    // dockerd 28 calls the first load an image without a name then, also on containerd
    bench.docker.run(&["image", "prune", "--force"])?;
    ensure!(bench.nameless()? == 0, "{:?}", bench.images()?);
    ensure!(bench.output_of("saved", &[])? == "savedsaved");
    bench.remove(&["saved"])?;
    bench.is_again(before).await?;
    // what is no archive of an image leaves nothing
    fs::write(&file, "no archive")?;
    ensure!(!bench.docker.output(&["load", "--input", &file])?.status.success());
    bench.is_again(before).await
}

async fn commit(bench: &Bench) -> Result<()> {
    let before = bench.numbers().await?;
    bench.docker.run(&["run", "--network", "none", "--name", "it", IMAGE, "sh", "-c", "echo made > /made; rm /bin/wget"])?;
    let changes = bench.docker.run(&["diff", "it"])?;
    for change in ["A /made", "D /bin/wget", "C /bin"] {
        ensure!(changes.lines().any(|line| line == change), "{change}: {changes}");
    }
    let id = bench.docker.run(&["commit", "--message", "a note", "--change", "CMD cat /made", "it", "committed"])?;
    ensure!(bench.id("committed")? == id);
    let request = GetImageRequest { name: "docker.io/library/committed:latest".to_owned() };
    let image = bench.below.api().images().get(bench.below.request(request)).await?.into_inner().image.unwrap_or_default();
    ensure!(image.target.as_ref().is_some_and(|target| target.digest == id), "{image:?}");
    ensure!(bench.output_of("committed", &[])? == "made");
    ensure!(bench.output_of("committed", &["sh", "-c", "test -e /bin/wget || echo gone"])? == "gone");
    let history = bench.docker.run(&["history", "--format", "{{.Comment}}", "committed"])?;
    ensure!(history.lines().count() == 2 && history.starts_with("a note"), "{history}");
    bench.docker.run(&["rm", "it"])?;
    bench.remove(&["committed"])?;
    bench.is_again(before).await
}

async fn copy(bench: &Bench) -> Result<()> {
    let before = bench.numbers().await?;
    bench.docker.run(&["create", "--network", "none", "--name", "it", IMAGE, "cat", "/into"])?;
    let file = bench.folder.join("into");
    fs::write(&file, "copied")?;
    bench.docker.run(&["cp", &file.display().to_string(), "it:/into"])?;
    ensure!(bench.docker.run(&["start", "--attach", "it"])? == "copied");
    let exported = bench.folder.join("exported.tar");
    bench.docker.run(&["export", "--output", &exported.display().to_string(), "it"])?;
    let found = Command::new("tar").arg("-xOf").arg(&exported).arg("into").output()?;
    ensure!(found.stdout == b"copied", "{found:?}");
    bench.docker.run(&["rm", "it"])?;
    bench.is_again(before).await
}

async fn tag(bench: &Bench) -> Result<()> {
    let before = bench.numbers().await?;
    bench.build("one", "tagged")?;
    bench.docker.run(&["tag", "one", "two:2"])?;
    ensure!(bench.id("two:2")? == bench.id("one")?);
    let untagged = bench.docker.run(&["rmi", "one"])?;
    ensure!(untagged == "Untagged: one:latest", "{untagged}");
    ensure!(bench.output_of("two:2", &[])? == "taggedtagged");
    let deleted = bench.docker.run(&["rmi", "two:2"])?;
    ensure!(deleted.contains("Untagged: two:2") && deleted.contains("Deleted: sha256:"), "{deleted}");
    bench.is_again(before).await
}

async fn remove_used(bench: &Bench) -> Result<()> {
    let before = bench.numbers().await?;
    bench.build("used", "used")?;
    bench.docker.run(&["run", "--detach", "--network", "none", "--name", "it", "used", "sleep", "1000"])?;
    let refused = bench.docker.output(&["rmi", "used"])?;
    ensure!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("unable to delete used:latest"), "{refused:?}");
    bench.docker.run(&["kill", "it"])?;
    bench.docker.run(&["rmi", "--force", "used"])?;
    bench.docker.run(&["start", "it"])?;
    ensure!(bench.docker.run(&["exec", "it", "cat", "/twice"])? == "usedused", "its files are there");
    bench.docker.run(&["rm", "--force", "it"])?;
    // its image has no name any more
    bench.docker.run(&["image", "prune", "--force"])?;
    bench.is_again(before).await
}

/// Of an image without layers in common with another, the sum of its content and of its unpacked layers.
async fn sizes(bench: &Bench) -> Result<()> {
    bench.docker.run(&["image", "prune", "--force"])?;
    let mut expected = 0;
    for (name, _) in bench.snapshots().await? {
        let request = UsageRequest { snapshotter: "overlayfs".to_owned(), key: name };
        expected += bench.below.api().snapshots().usage(bench.below.request(request)).await?.into_inner().size;
    }
    expected += bench.content().await?.iter().map(|(_, size)| size).sum::<i64>();
    let listed = bench.docker.get("/images/json?shared-size=1")?;
    let [image] = listed.as_array().context("a list")?.as_slice() else { anyhow::bail!("{listed}") };
    ensure!(image["Size"].as_i64() == Some(expected), "{expected} bytes are there: {image}");
    ensure!(image["SharedSize"].as_i64() == Some(0), "{image}");
    let usage = bench.docker.get("/system/df")?;
    ensure!(usage["LayersSize"].as_i64().is_some_and(|size| size > 0 && size <= expected), "{usage}");
    ensure!(usage["Images"][0]["Size"].as_i64() == Some(expected), "{usage}");
    // another with those layers and one more shares them
    bench.build("more", "x")?;
    let listed = bench.docker.get("/images/json?shared-size=1")?;
    for image in listed.as_array().context("a list")? {
        let (size, shared) = (image["Size"].as_i64().unwrap_or(-1), image["SharedSize"].as_i64().unwrap_or(-1));
        ensure!(0 < shared && shared <= size, "{image}");
    }
    ensure!(bench.docker.run(&["image", "inspect", "--format", "{{.Size}}", "more"])?.parse::<i64>()? > 0);
    bench.remove(&["more"])
}

async fn list(bench: &Bench) -> Result<()> {
    let request = GetImageRequest { name: format!("docker.io/library/{IMAGE}:latest") };
    let image = bench.below.api().images().get(bench.below.request(request)).await?.into_inner().image.context("an image")?;
    let names: Vec<_> = (0..300).map(|number| format!("docker.io/library/many:{number}")).collect();
    for name in &names {
        let request = CreateImageRequest { image: Some(Image { name: name.clone(), ..image.clone() }), ..CreateImageRequest::default() };
        bench.below.api().images().create(bench.below.request(request)).await?;
    }
    let begin = Instant::now();
    let listed = bench.images()?.len();
    let took = begin.elapsed();
    for name in names {
        let request = DeleteImageRequest { name, ..DeleteImageRequest::default() };
        bench.below.api().images().delete(bench.below.request(request)).await?;
    }
    println!("{listed} images listed in {took:.1?}");
    ensure!(listed == 301 && took < Duration::from_secs(10), "{listed} images listed in {took:?}");
    Ok(())
}

async fn volume(bench: &Bench) -> Result<()> {
    let before = bench.numbers().await?;
    bench.build("filled", "data")?;
    let seen = bench.docker.run(&["run", "--rm", "--network", "none", "--volume", "bin:/bin", "filled", "sh", "-c", "ls /bin | wc -l"])?;
    ensure!(seen.trim().parse::<u32>()? > 10, "{seen}");
    bench.docker.run(&["volume", "rm", "bin"])?;
    bench.remove(&["filled"])?;
    bench.is_again(before).await
}

async fn restart(bench: &Bench) -> Result<()> {
    bench.build("kept", "kept")?;
    bench.docker.run(&["run", "--detach", "--network", "none", "--name", "it", "kept", "sleep", "1000"])?;
    let (pid, images) = (bench.docker.inspect("it", ".State.Pid")?, bench.images()?);
    bench.docker.kill()?;
    bench.docker.revive().await?;
    ensure!(bench.images()? == images && bench.docker.inspect("it", ".State.Pid")? == pid);
    is_kept(bench, &pid)
}

async fn crash(bench: &Bench) -> Result<()> {
    bench.build("kept", "kept")?;
    bench.docker.run(&["run", "--detach", "--network", "none", "--name", "it", "kept", "sleep", "1000"])?;
    let (pid, images) = (bench.docker.inspect("it", ".State.Pid")?, bench.images()?);
    bench.docker.context().crash_daemon().await?;
    ensure!(proc::is_alive(pid.parse()?));
    // dockerd connects again
    eventually("exec works again", Duration::from_secs(30), async || {
        ensure!(bench.docker.run(&["exec", "it", "cat", "/twice"])? == "keptkept");
        ensure!(bench.images()? == images);
        Ok(())
    })
    .await?;
    is_kept(bench, &pid)
}

async fn upgrade(bench: &Bench) -> Result<()> {
    // containerd has none
    if suite::manager().is_none() {
        return Ok(());
    }
    let before = bench.numbers().await?;
    let daemon = bench.docker.context().daemon();
    let (name, held) = bench.held_image()?;
    bench.is_again(before).await?;
    bench.docker.run(&["run", "--detach", "--network", "none", "--name", "it", IMAGE, "sleep", "1000"])?;
    let mut pull = bench.docker.command(&["pull", "--quiet", &name]).stdout(Stdio::null()).spawn()?;
    eventually_true("a layer is in the middle", SOON, || held.is_holding()).await?;
    let printed = operator::printed(&mut operator::upgrade(daemon)?)?;
    held.release();
    let status = pull.wait()?;
    ensure!(status.success(), "the pull: {status}");
    daemon.is_succeeded_by(printed.split(' ').nth(1).context("a pid")?.parse()?).await?;
    ensure!(bench.output_of(&name, &[])? == LARGE.to_string());
    ensure!(bench.docker.run(&["exec", "it", "echo", "hello"])? == "hello");
    bench.docker.run(&["rm", "--force", "it"])?;
    bench.remove(&[&name])?;
    bench.is_again(before).await
}

fn is_kept(bench: &Bench, pid: &str) -> Result<()> {
    ensure!(bench.docker.run(&["exec", "it", "cat", "/twice"])? == "keptkept");
    ensure!(bench.docker.inspect("it", ".State.Pid")? == pid && bench.output_of("kept", &[])? == "keptkept");
    bench.docker.run(&["rm", "--force", "it"])?;
    bench.remove(&["kept"])
}

async fn no_lease(bench: &Bench) -> Result<()> {
    let before = bench.numbers().await?;
    let id = bench.docker.run(&["create", "--network", "none", "--name", "it", IMAGE, "true"])?;
    let leases = bench.below.api().leases().list(bench.below.request(ListRequest::default())).await?.into_inner().leases;
    ensure!(leases.iter().any(|lease| lease.id == id), "{leases:?}");
    bench.below.api().leases().delete(bench.below.request(DeleteRequest { id, sync: true })).await?;
    bench.docker.run(&["rm", "it"])?;
    let id = bench.docker.run(&["create", "--network", "none", "--name", "it", IMAGE, "true"])?;
    for (key, _) in bench.snapshots().await?.into_iter().filter(|(key, _)| key.starts_with(&id)) {
        let request = RemoveSnapshotRequest { snapshotter: "overlayfs".to_owned(), key };
        bench.below.api().snapshots().remove(bench.below.request(request)).await?;
    }
    let refused = bench.docker.output(&["start", "it"])?;
    ensure!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("does not exist"), "{refused:?}");
    bench.docker.run(&["rm", "it"])?;
    ensure!(bench.docker.run(&["ps", "--all", "--quiet"])?.is_empty());
    bench.is_again(before).await
}

async fn prune(bench: &Bench) -> Result<()> {
    bench.build("unused", "unused")?;
    let printed = bench.docker.run(&["system", "prune", "--all", "--force"])?;
    ensure!(printed.contains("Total reclaimed space"), "{printed}");
    ensure!(bench.images()?.is_empty(), "{:?}", bench.images()?);
    bench.is_again((0, 0)).await?;
    let root = bench.docker.context().daemon().folder().join("root");
    // BuildKit's records of builds stay: `docker buildx history rm` removes them
    let history = Client::connect(&bench.docker.context().daemon().address(), "moby_history").await?;
    eventually("its files are removed", SOON, async || {
        let snapshots = fs::read_dir(root.join("io.containerd.snapshotter.v1.overlayfs/snapshots"))?.count();
        let blobs = fs::read_dir(root.join("io.containerd.content.v1.content/blobs/sha256"))?.count();
        let records = content(&history).await?.len();
        ensure!((snapshots, blobs) == (0, records), "{snapshots} snapshots, {blobs} blobs, of which {records} are records of builds");
        Ok(())
    })
    .await
}

/// Which deletes the leases of pulls that are under way.
pub(crate) async fn a_pull_that_is_pruned_meanwhile_ends_well(cx: Context) -> Result<()> {
    needs_manager()?;
    let bench = Bench::start(&cx).await?;
    let (name, held) = bench.held_image()?;
    bench.docker.run(&["system", "prune", "--all", "--force"])?;
    bench.is_again((0, 0)).await?;
    let mut pull = bench.docker.command(&["pull", "--quiet", &name]).stderr(Stdio::piped()).spawn()?;
    eventually_true("a layer is in the middle", SOON, || held.is_holding()).await?;
    let printed = bench.docker.run(&["system", "prune", "--all", "--force"])?;
    held.release();
    let mut message = String::new();
    pull.stderr.take().context("piped")?.read_to_string(&mut message)?;
    let status = pull.wait()?;
    println!("the pull: {status} {message:?}; the prune: {printed:?}");
    // it may fail with a reason, but what it reports as pulled is whole
    if !status.success() {
        ensure!(!message.trim().is_empty(), "{status}");
        bench.docker.run(&["pull", &name])?;
    }
    ensure!(bench.output_of(&name, &[])? == LARGE.to_string());
    bench.docker.leaves_nothing().await
}
