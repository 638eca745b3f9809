//! Layers that are unpacked while containerd's own client still downloads them; it knows nothing of it. The registry sends the last layer's second
//! half when the test says so.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::snapshots::{Kind, ListSnapshotsRequest};
use containerd_client::services::v1::{DeleteImageRequest, DeleteRequest, ListRequest};
use shim_tests::client::Client;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::suite::Suite;
use shim_tests::upload::digest;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Serves one image, until it is dropped.
struct Registry {
    port: u16,
    held: watch::Sender<bool>,
    serving: tokio::task::JoinHandle<()>,
}

struct Served {
    /// By path: media type and bytes.
    files: HashMap<String, (&'static str, Vec<u8>)>,
    /// The path of which the second half waits.
    slow: String,
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const LAYERS: usize = 3;

impl Registry {
    async fn start(cx: &Context) -> Result<Self> {
        let first = layer(cx, "head -c 3000000 /dev/urandom > one; mkdir d; echo old > d/old; echo gone > gone")?;
        let second = layer(cx, "mkdir d; touch d/.wh..wh..opq; echo new > d/new; touch .wh.gone")?;
        let third = layer(cx, "head -c 3000000 /dev/urandom > three; mkdir d; echo more > d/more")?;
        let layers = [first, second, third];
        let digests = layers.iter().map(|layer| digest("sha256", layer)).collect::<Result<Vec<_>>>()?;
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config =
            format!(r#"{{"architecture":"{architecture}","os":"linux","rootfs":{{"type":"layers","diff_ids":{digests:?}}}}}"#).into_bytes();
        let described = |kind: &str, digest: &str, size: usize| {
            format!(r#"{{"mediaType":"application/vnd.oci.image.{kind}","digest":"{digest}","size":{size}}}"#)
        };
        let of_config = digest("sha256", &config)?;
        let of_layers: Vec<_> = layers.iter().zip(&digests).map(|(layer, digest)| described("layer.v1.tar", digest, layer.len())).collect();
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{},"layers":[{}]}}"#,
            described("config.v1+json", &of_config, config.len()),
            of_layers.join(",")
        )
        .into_bytes();
        let slow = format!("/v2/test/blobs/{}", digests[LAYERS - 1]);
        let mut files: HashMap<_, _> = [("/v2/".to_owned(), ("text/plain", Vec::new()))].into();
        files.insert(format!("/v2/test/manifests/{}", digest("sha256", &manifest)?), (MANIFEST, manifest.clone()));
        files.insert("/v2/test/manifests/1".to_owned(), (MANIFEST, manifest));
        files.insert(format!("/v2/test/blobs/{of_config}"), ("application/octet-stream", config));
        for (digest, layer) in digests.iter().zip(layers) {
            files.insert(format!("/v2/test/blobs/{digest}"), ("application/octet-stream", layer));
        }
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let (held, holds) = watch::channel(true);
        let served = Arc::new(Served { files, slow });
        let serving = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(serve(socket, Arc::clone(&served), holds.clone()));
            }
        });
        Ok(Self { port, held, serving })
    }

    fn image(&self) -> String {
        format!("127.0.0.1:{}/test:1", self.port)
    }

    fn release(&self) {
        self.held.send_replace(false);
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(socket: TcpStream, served: Arc<Served>, mut holds: watch::Receiver<bool>) {
    let mut socket = BufReader::new(socket);
    // a client that disconnects is no failure of the registry
    while one(&mut socket, &served, &mut holds).await.is_ok() {}
}

async fn one(socket: &mut BufReader<TcpStream>, served: &Served, holds: &mut watch::Receiver<bool>) -> Result<()> {
    let mut line = String::new();
    socket.read_line(&mut line).await?;
    let (method, path) = line.split_once(' ').context("a method")?;
    let path = path.split([' ', '?']).next().context("a path")?.to_owned();
    let is_head = method == "HEAD";
    let (mut from, mut header) = (0, String::new());
    while socket.read_line(&mut header).await? > 2 {
        if let Some(range) = header.to_ascii_lowercase().strip_prefix("range: bytes=") {
            from = range.split('-').next().and_then(|from| from.parse().ok()).unwrap_or(0);
        }
        header.clear();
    }
    let Some((kind, bytes)) = served.files.get(&path) else {
        return Ok(socket.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").await?);
    };
    let hash = digest("sha256", bytes)?;
    let (status, length) = (if from > 0 { "206 Partial Content" } else { "200 OK" }, bytes.len() - from);
    let range = if from > 0 { format!("Content-Range: bytes {from}-{}/{}\r\n", bytes.len() - 1, bytes.len()) } else { String::new() };
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nContent-Type: {kind}\r\nDocker-Content-Digest: {hash}\r\n{range}\r\n");
    socket.write_all(head.as_bytes()).await?;
    if is_head {
        return Ok(());
    }
    let half = if path == served.slow { (bytes.len() / 2).max(from) } else { bytes.len() };
    socket.write_all(&bytes[from..half]).await?;
    socket.flush().await?;
    if half < bytes.len() {
        let mut none = [0; 1];
        tokio::select! {
            released = holds.wait_for(|holds| !*holds) => { released?; }
            _gone = socket.read(&mut none) => anyhow::bail!("its client is gone"),
        }
    }
    Ok(socket.write_all(&bytes[half..]).await?)
}

/// An archive of what a script makes in an empty folder.
fn layer(cx: &Context, script: &str) -> Result<Vec<u8>> {
    let folder = cx.folder().join("layer");
    fs::create_dir_all(&folder)?;
    let script = format!("{script}; tar --numeric-owner -cf ../layer.tar *  $(ls -d .wh.* 2>/dev/null)");
    let status = Command::new("sh").args(["-ec", &script]).current_dir(&folder).status()?;
    ensure!(status.success(), "{script}: {status}");
    fs::remove_dir_all(&folder)?;
    Ok(fs::read(cx.folder().join("layer.tar"))?)
}

/// A client's command, ended when it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    async fn end(&mut self, what: &str) -> Result<std::process::ExitStatus> {
        eventually(format!("{what} ends"), 3 * SOON, async || self.0.try_wait()?.context("it runs")).await
    }
}

fn ctr(cx: &Context, suite: Suite, arguments: &[&str]) -> Result<Running> {
    let log = fs::File::create(cx.folder().join("ctr.log"))?;
    let mut command = Command::new(suite.program("ctr"));
    command.arg("--address").arg(cx.daemon().address()).args(["--namespace", cx.client().namespace()]).args(arguments);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    Ok(Running(command.spawn()?))
}

fn pull(cx: &Context, suite: Suite, registry: &Registry) -> Result<Running> {
    let image = registry.image();
    let local: &[&str] = if suite == Suite::Forky { &["--local"] } else { &[] };
    ctr(cx, suite, &[&["images", "pull", "--plain-http"], local, &[&image]].concat())
}

fn log(cx: &Context) -> String {
    fs::read_to_string(cx.folder().join("ctr.log")).unwrap_or_default()
}

fn snapshots(cx: &Context) -> PathBuf {
    cx.daemon().folder().join("root/io.containerd.snapshotter.v1.overlayfs/snapshots")
}

/// Folders of snapshots that are not recorded.
fn drafts(cx: &Context) -> Vec<PathBuf> {
    let entries = fs::read_dir(snapshots(cx)).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("new-")))
        .collect()
}

fn has(drafts: &[PathBuf], file: &str, bytes: u64) -> bool {
    drafts.iter().any(|draft| fs::metadata(draft.join("fs").join(file)).is_ok_and(|about| about.len() >= bytes))
}

/// Waits until the first layer and a part of the last are unpacked, while the last is still on its way.
async fn is_unpacked_early(cx: &Context) -> Result<()> {
    let is_there = || {
        let drafts = drafts(cx);
        has(&drafts, "one", 3_000_000) && has(&drafts, "three", 1_000_000)
    };
    let seen = eventually_true("layers are unpacked while they arrive", SOON, is_there).await;
    seen.with_context(|| format!("{:?}\n{}", drafts(cx), log(cx)))
}

async fn list(client: &Client) -> Result<Vec<(String, i32)>> {
    let request = ListSnapshotsRequest { snapshotter: "overlayfs".to_owned(), ..ListSnapshotsRequest::default() };
    let mut answer = client.api().snapshots().list(client.request(request)).await?.into_inner();
    let mut found = Vec::new();
    while let Some(message) = answer.message().await? {
        found.extend(message.info.into_iter().map(|info| (info.name, info.kind)));
    }
    Ok(found)
}

async fn leaves_nothing(cx: &Context) -> Result<()> {
    eventually_true("no folder is left", SOON, || drafts(cx).is_empty()).await.with_context(|| format!("{:?}", drafts(cx)))
}

/// What the image's uppermost snapshot shows.
fn shown(cx: &Context, suite: Suite, image: &str) -> Result<Vec<String>> {
    let point = cx.folder().join(format!("point-{}", suite.version()));
    fs::create_dir(&point)?;
    let at = point.display().to_string();
    let mounted = ctr(cx, suite, &["images", "mount", image, &at])?.0.wait()?;
    ensure!(mounted.success(), "{}", log(cx));
    let listed = Command::new("find").arg(&point).args(["-mindepth", "1", "-printf", "%P\\n"]).output();
    let unmounted = ctr(cx, suite, &["images", "unmount", "--rm", &at])?.0.wait()?;
    ensure!(unmounted.success(), "{}", log(cx));
    let mut names: Vec<_> = String::from_utf8(listed?.stdout)?.lines().map(ToOwned::to_owned).collect();
    names.sort();
    Ok(names)
}

pub(crate) async fn a_pull_by_ctr_is_unpacked_while_it_downloads(cx: Context) -> Result<()> {
    for suite in Suite::ALL {
        let cx = cx.with_own_daemon().await?;
        let registry = Registry::start(&cx).await?;
        let mut pull = pull(&cx, suite, &registry)?;
        is_unpacked_early(&cx).await.with_context(|| format!("ctr {}", suite.version()))?;
        ensure!(list(cx.client()).await?.is_empty(), "nothing is recorded before all of it is there");
        registry.release();
        ensure!(pull.end("the pull").await?.success(), "{}", log(&cx));
        let found = list(cx.client()).await?;
        ensure!(found.len() == LAYERS && found.iter().all(|(_key, kind)| *kind == Kind::Committed as i32), "{found:?}");
        ensure!(shown(&cx, suite, &registry.image())? == ["d", "d/more", "d/new", "one", "three"]);
        leaves_nothing(&cx).await?;
        let request = DeleteImageRequest { name: registry.image(), sync: true, ..DeleteImageRequest::default() };
        cx.client().api().images().delete(cx.client().request(request)).await?;
        eventually("nothing is left of the image", SOON, async || {
            let left = list(cx.client()).await?;
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

pub(crate) async fn a_fetch_alone_is_not_unpacked(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let registry = Registry::start(&cx).await?;
    let changed = |path: &Path| Ok::<_, anyhow::Error>(fs::metadata(path)?.mtime_nsec());
    let before = changed(&snapshots(&cx))?;
    let image = registry.image();
    let mut fetch = ctr(&cx, Suite::Bookworm, &["content", "fetch", "--plain-http", &image])?;
    let arrives = || log(&cx).contains("downloading");
    eventually_true("the last layer arrives", SOON, arrives).await.with_context(|| log(&cx))?;
    registry.release();
    ensure!(fetch.end("the fetch").await?.success(), "{}", log(&cx));
    ensure!(changed(&snapshots(&cx))? == before, "a folder was made");
    Ok(())
}

pub(crate) async fn a_pull_that_is_killed_leaves_nothing_and_can_be_repeated(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let registry = Registry::start(&cx).await?;
    let killed = pull(&cx, Suite::Bookworm, &registry)?;
    is_unpacked_early(&cx).await?;
    drop(killed);
    leaves_nothing(&cx).await?;
    let mut again = pull(&cx, Suite::Bookworm, &registry)?;
    registry.release();
    ensure!(again.end("the second pull").await?.success(), "{}", log(&cx));
    ensure!(list(cx.client()).await?.len() == LAYERS);
    Ok(())
}

/// As `docker system prune` does it.
pub(crate) async fn a_pull_whose_lease_is_deleted_says_so_and_can_be_repeated(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let registry = Registry::start(&cx).await?;
    let mut pulls = pull(&cx, Suite::Bookworm, &registry)?;
    is_unpacked_early(&cx).await?;
    let client = cx.client();
    let leases = client.api().leases().list(client.request(ListRequest::default())).await?.into_inner().leases;
    ensure!(!leases.is_empty());
    for lease in leases {
        client.api().leases().delete(client.request(DeleteRequest { id: lease.id, sync: true })).await?;
    }
    leaves_nothing(&cx).await?;
    registry.release();
    let ended = pulls.end("the pull").await?;
    ensure!(ended.success() || log(&cx).contains("lease"), "{}", log(&cx));
    let mut again = pull(&cx, Suite::Bookworm, &registry)?;
    ensure!(again.end("the second pull").await?.success(), "{}", log(&cx));
    ensure!(list(cx.client()).await?.len() == LAYERS);
    Ok(())
}
