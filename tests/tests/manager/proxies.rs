//! Snapshotters that another process serves: stock containerd's own, behind its socket.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, ListSnapshotsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, UsageRequest,
};
use containerd_client::services::v1::{ApplyRequest, DeleteRequest, PluginsRequest};
use containerd_client::to_any;
use containerd_client::types::transfer::{ImageStore, UnpackConfiguration};
use containerd_client::types::{Descriptor, Mount};
use shim_tests::client::{Answer, Client};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::isolation;
use shim_tests::operator::Own;
use shim_tests::registry::Registry;
use shim_tests::suite::Suite;
use shim_tests::transfers::{self, OCI_LAYER, Parts, registry_of, sha256, tar, this_machine, transfer};
use shim_tests::upload::store;
use tonic::Code;

/// A containerd that is killed with the test.
pub(crate) struct Backend {
    pub(crate) folder: PathBuf,
    pub(crate) child: Child,
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Backend {
    /// Waits until it has no snapshot any more.
    async fn is_emptied(&self) -> Result<()> {
        eventually("the proxy has removed them", SOON, async || {
            let keys = self.keys().await?;
            ensure!(keys.is_empty(), "{keys:?}");
            Ok(())
        })
        .await
    }

    pub(crate) async fn start(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let place = folder.display();
        let text = format!(
            "version = 3\nroot = \"{place}/root\"\nstate = \"{place}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\",\n\
             \"io.containerd.podsandbox.controller.v1.podsandbox\", \"io.containerd.nri.v1.nri\", \"io.containerd.internal.v1.tracing\",\n\
             \"io.containerd.tracing.processor.v1.otlp\"]\n\
             [grpc]\naddress = \"{place}/c.sock\"\n[plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{place}/opt\"\n\
             [plugins.\"io.containerd.gc.v1.scheduler\"]\nstartup_delay = \"1h\"\nmutation_threshold = 0\n"
        );
        fs::write(folder.join("config.toml"), text)?;
        let log = fs::File::create(folder.join("log"))?;
        let child = Command::new(Suite::Forky.program("containerd"))
            .arg("--config")
            .arg(folder.join("config.toml"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("stock containerd")?;
        isolation::keep(child.id());
        let backend = Self { folder: folder.to_owned(), child };
        eventually("containerd answers", SOON, async || {
            let client = Client::connect(&backend.address(), "default").await?;
            client.version().await?;
            anyhow::Ok(())
        })
        .await
        .with_context(|| fs::read_to_string(folder.join("log")).unwrap_or_default())?;
        Ok(backend)
    }

    pub(crate) fn address(&self) -> PathBuf {
        self.folder.join("c.sock")
    }

    /// Keys of its snapshots.
    async fn keys(&self) -> Result<Vec<String>> {
        list(&Client::connect(&self.address(), "default").await?, "overlayfs").await
    }
}

async fn list(client: &Client, snapshotter: &str) -> Result<Vec<String>> {
    let request = ListSnapshotsRequest { snapshotter: snapshotter.to_owned(), filters: Vec::new() };
    let mut pages = client.api().snapshots().list(client.request(request)).await?.into_inner();
    let mut keys = Vec::new();
    while let Some(page) = pages.message().await? {
        keys.extend(page.info.into_iter().map(|info| info.name));
    }
    keys.sort();
    Ok(keys)
}

async fn prepare(client: &Client, snapshotter: &str, key: &str, parent: &str) -> Answer<Vec<Mount>> {
    let (snapshotter, key, parent) = (snapshotter.to_owned(), key.to_owned(), parent.to_owned());
    let request = PrepareSnapshotRequest { snapshotter, key, parent, labels: [].into() };
    Ok(client.api().snapshots().prepare(client.request(request)).await?.into_inner().mounts)
}

async fn commit(client: &Client, key: &str, name: &str) -> Answer<()> {
    let (snapshotter, key, name) = (FAR.to_owned(), key.to_owned(), name.to_owned());
    let request = CommitSnapshotRequest { snapshotter, key, name, labels: [].into() };
    client.api().snapshots().commit(client.request(request)).await.map(drop)
}

async fn remove(client: &Client, key: &str) -> Answer<()> {
    let request = RemoveSnapshotRequest { snapshotter: FAR.to_owned(), key: key.to_owned() };
    client.api().snapshots().remove(client.request(request)).await.map(drop)
}

const FAR: &str = "far";

fn settings(address: &Path) -> String {
    format!(
        "[proxy_plugins.{FAR}]\ntype = \"snapshot\"\nsnapshotter = \"overlayfs\"\naddress = \"{}\"\nplatform = \"linux/arm64\"\n\
         [proxy_plugins.{FAR}.exports]\nroot = \"/far\"\n",
        address.display()
    )
}

pub(crate) async fn a_snapshotter_of_another_process_is_used_like_ones_own(cx: Context) -> Result<()> {
    let backend = Backend::start(&cx.folder().join("backend")).await?;
    let mut own = Own::new(&cx.folder().join("own"), &settings(&backend.address()))?;
    let client = &own.start().await?.with_lease("test").await?;
    let request = PluginsRequest { filters: vec![format!("id=={FAR}")] };
    let plugins = client.api().introspection().plugins(client.request(request)).await?.into_inner().plugins;
    let [plugin] = &plugins[..] else { anyhow::bail!("{plugins:?}") };
    ensure!(plugin.r#type == "io.containerd.snapshotter.v1" && plugin.exports["root"] == "/far", "{plugin:?}");
    ensure!(plugin.platforms[0].architecture == "arm64", "{plugin:?}");
    // an image's two layers, as clients unpack them
    let folder = cx.folder().join("layer");
    fs::create_dir(&folder)?;
    fs::write(folder.join("file"), "one")?;
    let archive = Command::new("tar").args(["-C"]).arg(&folder).args(["-cf", "-", "file"]).output()?.stdout;
    let digest = store(client, "layer", &archive, &[]).await?;
    let mounts = prepare(client, FAR, "a", "").await?;
    ensure!(mounts[0].source.starts_with(&backend.folder.display().to_string()), "{mounts:?}");
    let diff = Some(Descriptor { digest: digest.clone(), ..Descriptor::default() });
    let request = ApplyRequest { diff, mounts, ..ApplyRequest::default() };
    let applied = client.api().diff().apply(client.request(request)).await?.into_inner().applied.unwrap_or_default();
    ensure!(applied.digest == digest, "it is not compressed");
    commit(client, "a", "one").await?;
    let mounts = prepare(client, FAR, "b", "one").await?;
    let lower = mounts[0].options.iter().find_map(|option| option.strip_prefix("lowerdir=")).context("an overlay")?;
    ensure!(fs::read_to_string(Path::new(lower).join("file"))? == "one");
    ensure!(list(client, FAR).await? == ["b", "one"] && list(client, "overlayfs").await?.is_empty());
    ensure!(backend.keys().await? == ["default/1/one", "default/2/b"], "{:?}", backend.keys().await?);
    let usage = UsageRequest { snapshotter: FAR.to_owned(), key: "one".to_owned() };
    ensure!(client.api().snapshots().usage(client.request(usage)).await?.into_inner().inodes == 2);
    let request = StatSnapshotRequest { snapshotter: FAR.to_owned(), key: "b".to_owned() };
    ensure!(client.api().snapshots().stat(client.request(request)).await?.into_inner().info.unwrap_or_default().parent == "one");
    let busy = remove(client, "one").await.expect_err("it has a child");
    ensure!(busy.code() == Code::FailedPrecondition, "{busy}");
    // the lease goes, and everything that it has held
    let lease = DeleteRequest { id: "test".to_owned(), sync: true };
    client.api().leases().delete(client.request(lease)).await?;
    ensure!(list(client, FAR).await?.is_empty());
    backend.is_emptied().await?;
    // what a crash has left there, and what others have there
    let far = Client::connect(&backend.address(), "default").await?;
    for key in ["default/7/left", "default/8/child", "other", "else/7/left"] {
        let parent = if key.ends_with("child") { "parent" } else { "" };
        if !parent.is_empty() {
            prepare(&far, "overlayfs", "default/9/parent-active", "").await?;
            let (key, name) = ("default/9/parent-active".to_owned(), parent.to_owned());
            let request = CommitSnapshotRequest { snapshotter: "overlayfs".to_owned(), name, key, labels: [].into() };
            far.api().snapshots().commit(far.request(request)).await?;
        }
        prepare(&far, "overlayfs", key, parent).await?;
    }
    let request = containerd_client::services::v1::snapshots::CleanupRequest { snapshotter: FAR.to_owned() };
    client.api().snapshots().cleanup(client.request(request)).await?;
    ensure!(backend.keys().await? == ["else/7/left", "other", "parent"], "{:?}", backend.keys().await?);
    Ok(())
}

pub(crate) async fn layers_that_a_proxy_has_by_itself_are_neither_fetched_nor_unpacked(cx: Context) -> Result<()> {
    let backend = Backend::start(&cx.folder().join("backend")).await?;
    let mut own = Own::new(&cx.folder().join("own"), &settings(&backend.address()))?;
    let client = &own.start().await?.with_lease("test").await?;
    let far = Client::connect(&backend.address(), "default").await?;
    let target = |name: &str| std::collections::HashMap::from([("containerd.io/snapshot.ref".to_owned(), name.to_owned())]);
    // as a snapshotter that fetches lazily makes them
    let layers = ["sha256:one", "sha256:two"];
    for (name, parent) in [(layers[0], ""), (layers[1], layers[0])] {
        let mounts = prepare(&far, "overlayfs", "making", parent).await?;
        let upper = mounts[0].options.iter().find_map(|option| option.strip_prefix("upperdir=")).unwrap_or(&mounts[0].source);
        fs::write(Path::new(upper).join(&name[7..]), name)?;
        let (snapshotter, key, name) = ("overlayfs".to_owned(), "making".to_owned(), name.to_owned());
        let request = CommitSnapshotRequest { snapshotter, key, labels: target(&name), name };
        far.api().snapshots().commit(far.request(request)).await?;
    }
    let ask = async |key: &str, parent: &str, name: &str| {
        let (snapshotter, key, parent) = (FAR.to_owned(), key.to_owned(), parent.to_owned());
        let request = PrepareSnapshotRequest { snapshotter, key, parent, labels: target(name) };
        client.api().snapshots().prepare(client.request(request)).await.map(drop)
    };
    for (name, parent) in [(layers[0], ""), (layers[1], layers[0])] {
        // the second time the row is found
        for _ in 0..2 {
            let there = ask("extract", parent, name).await.expect_err("it is there");
            ensure!(there.code() == Code::AlreadyExists && there.message().contains(name), "{there}");
        }
        let request = StatSnapshotRequest { snapshotter: FAR.to_owned(), key: name.to_owned() };
        let info = client.api().snapshots().stat(client.request(request)).await?.into_inner().info.unwrap_or_default();
        ensure!(info.parent == parent && info.kind == 3, "{info:?}");
    }
    ensure!(list(client, FAR).await? == layers, "nothing else has a row");
    let usage = UsageRequest { snapshotter: FAR.to_owned(), key: layers[1].to_owned() };
    ensure!(client.api().snapshots().usage(client.request(usage)).await?.into_inner().inodes == 2);
    // a container on them
    let mounts = prepare(client, FAR, "c", layers[1]).await?;
    let lowers = mounts[0].options.iter().find_map(|option| option.strip_prefix("lowerdir=")).context("an overlay")?;
    let seen: Vec<_> = lowers.split(':').zip(["two", "one"]).map(|(lower, name)| Path::new(lower).join(name).exists()).collect();
    ensure!(seen == [true, true], "{mounts:?}");
    // what nothing holds is removed there too, under the proxy's names
    let lease = DeleteRequest { id: "test".to_owned(), sync: true };
    client.api().leases().delete(client.request(lease)).await?;
    ensure!(list(client, FAR).await?.is_empty());
    backend.is_emptied().await
}

pub(crate) async fn a_transfer_unpacks_with_a_snapshotter_of_another_process(cx: Context) -> Result<()> {
    let backend = Backend::start(&cx.folder().join("backend")).await?;
    let mut own = Own::new(&cx.folder().join("own"), &settings(&backend.address()))?;
    let client = &own.start().await?;
    // holds containers' snapshots, and nothing of images
    let leased = &own.client().await?.with_lease("test").await?;
    let registry = Registry::start(None).await?;
    let mut parts = Parts::default();
    let architecture = this_machine().architecture;
    let tars = ["one", "two"].map(|name| tar(&[(name, name.as_bytes())]));
    let diff_ids: Vec<_> = tars.iter().map(|tar| sha256(tar)).collect();
    let layers: Vec<_> = tars.into_iter().map(|tar| parts.put(OCI_LAYER, tar)).collect();
    let whole = parts.manifest(&architecture, &layers, &diff_ids);
    parts.publish(&registry, "app:1", &whole)?;
    let pull = async |name: &str| {
        let unpacks = vec![UnpackConfiguration { platform: Some(this_machine()), snapshotter: FAR.to_owned() }];
        let store = ImageStore { unpacks, ..transfers::store(name) };
        transfer(client, to_any(&registry_of(name)), to_any(&store), "").await
    };
    let files = async |key: &str, parent: &str, names: &[&str]| {
        let mounts = prepare(leased, FAR, key, parent).await?;
        let lowers = mounts[0].options.iter().find_map(|option| option.strip_prefix("lowerdir=")).context("an overlay")?;
        ensure!(lowers.split(':').zip(names).all(|(lower, name)| Path::new(lower).join(name).exists()), "{mounts:?}");
        remove(leased, key).await?;
        anyhow::Ok(())
    };
    let chain = sha256(format!("{} {}", diff_ids[0], diff_ids[1]).as_bytes());
    // it has none of them
    pull(&registry.image("app:1")).await?;
    ensure!(diff_ids.iter().all(|digest| registry.fetches(digest) == 1), "{:?}", registry.requests());
    let mut expected = vec![diff_ids[0].clone(), chain.clone()];
    expected.sort();
    ensure!(list(client, FAR).await? == expected && list(client, "overlayfs").await?.is_empty());
    files("c", &chain, &["two", "one"]).await?;
    transfers::remove(client, &registry.image("app:1")).await?;
    ensure!(list(client, FAR).await?.is_empty());
    backend.is_emptied().await?;
    // it has the lower one by itself: that is not fetched
    let far = Client::connect(&backend.address(), "default").await?;
    let mounts = prepare(&far, "overlayfs", "making", "").await?;
    fs::write(Path::new(&mounts[0].source).join("one"), "one")?;
    let labels = std::collections::HashMap::from([("containerd.io/snapshot.ref".to_owned(), diff_ids[0].clone())]);
    let (snapshotter, key, name) = ("overlayfs".to_owned(), "making".to_owned(), diff_ids[0].clone());
    far.api().snapshots().commit(far.request(CommitSnapshotRequest { snapshotter, key, name, labels })).await?;
    pull(&registry.image("app:1")).await?;
    ensure!([1, 2] == [0, 1].map(|layer: usize| registry.fetches(&diff_ids[layer])), "{:?}", registry.requests());
    ensure!(list(client, FAR).await? == expected && backend.keys().await?.contains(&diff_ids[0]));
    files("d", &chain, &["two", "one"]).await?;
    transfers::remove(client, &registry.image("app:1")).await?;
    backend.is_emptied().await
}

pub(crate) async fn a_proxy_that_is_gone_is_one_clear_error_and_blocks_nothing_else(cx: Context) -> Result<()> {
    let mut backend = Backend::start(&cx.folder().join("backend")).await?;
    let mut own = Own::new(&cx.folder().join("own"), &settings(&backend.address()))?;
    let client = &own.start().await?.with_lease("test").await?;
    prepare(client, FAR, "a", "").await?;
    backend.child.kill()?;
    backend.child.wait()?;
    let error = prepare(client, FAR, "b", "").await.expect_err("it is gone");
    let expected = format!("snapshotter {FAR}: cannot reach {}: Connection refused (os error 111)", backend.address().display());
    ensure!((error.code(), error.message()) == (Code::Unavailable, expected.as_str()), "{error}");
    ensure!(list(client, FAR).await? == ["a"], "what could not be made has left no row");
    prepare(client, "overlayfs", "c", "").await?;
    // rows go, and the proxy's part follows when it is there again
    remove(client, "a").await?;
    let lease = DeleteRequest { id: "test".to_owned(), sync: true };
    client.api().leases().delete(client.request(lease)).await?;
    ensure!(list(client, "overlayfs").await?.is_empty());
    let folder = backend.folder.clone();
    drop(backend);
    let backend = Backend::start(&folder).await?;
    ensure!(backend.keys().await? == ["default/1/a"]);
    let request = containerd_client::services::v1::snapshots::CleanupRequest { snapshotter: FAR.to_owned() };
    client.api().snapshots().cleanup(client.request(request)).await?;
    ensure!(backend.keys().await?.is_empty());
    prepare(&own.client().await?, FAR, "b", "").await?;
    Ok(())
}
