//! What no good client sends, what is too large, and what cannot be removed: one clear error each, and nothing is left behind.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::snapshots::{
    CleanupRequest, CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, UsageRequest,
};
use containerd_client::services::v1::{
    ApplyRequest, Container, CreateContainerRequest, CreateImageRequest, CreateRequest, DeleteContainerRequest, DeleteImageRequest,
    DeleteRequest, Image, Info, UpdateRequest,
};
use containerd_client::types::{Descriptor, Mount};
use prost_types::{Any, Timestamp};
use shim_tests::client::{Answer, Client};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::suite;
use shim_tests::upload::{Upload, commit as commit_content, info, refused, stat, store, write};
use tonic::Code;

const ROOT: (&str, &str) = ("containerd.io/gc.root", "x");

fn snapshots(cx: &Context) -> PathBuf {
    cx.daemon().folder().join("root/io.containerd.snapshotter.v1.overlayfs/snapshots")
}

fn count(folder: &Path) -> usize {
    fs::read_dir(folder).map_or(0, Iterator::count)
}

fn labels(labels: &[(&str, &str)]) -> HashMap<String, String> {
    labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

async fn prepare(client: &Client, key: &str, parent: &str, given: &[(&str, &str)]) -> Answer<Vec<Mount>> {
    let (snapshotter, key, parent) = ("overlayfs".to_owned(), key.to_owned(), parent.to_owned());
    let request = PrepareSnapshotRequest { snapshotter, key, parent, labels: labels(given) };
    Ok(client.api().snapshots().prepare(client.request(request)).await?.into_inner().mounts)
}

async fn commit(client: &Client, key: &str, name: &str, given: &[(&str, &str)]) -> Answer<()> {
    let (snapshotter, key, name) = ("overlayfs".to_owned(), key.to_owned(), name.to_owned());
    let request = CommitSnapshotRequest { snapshotter, key, name, labels: labels(given) };
    client.api().snapshots().commit(client.request(request)).await.map(drop)
}

async fn remove(client: &Client, key: &str) -> Answer<()> {
    let request = RemoveSnapshotRequest { snapshotter: "overlayfs".to_owned(), key: key.to_owned() };
    client.api().snapshots().remove(client.request(request)).await.map(drop)
}

async fn is_snapshot(client: &Client, key: &str) -> bool {
    let request = StatSnapshotRequest { snapshotter: "overlayfs".to_owned(), key: key.to_owned() };
    client.api().snapshots().stat(client.request(request)).await.is_ok()
}

async fn apply(client: &Client, digest: &str, mounts: Vec<Mount>) -> Answer<String> {
    let diff = Some(Descriptor { digest: digest.to_owned(), ..Descriptor::default() });
    let request = ApplyRequest { diff, mounts, ..ApplyRequest::default() };
    Ok(client.api().diff().apply(client.request(request)).await?.into_inner().applied.unwrap_or_default().digest)
}

async fn end(client: &Client, lease: &str) -> Answer<()> {
    client.api().leases().delete(client.request(DeleteRequest { id: lease.to_owned(), sync: true })).await.map(drop)
}

fn image(name: &str, digest: &str) -> Image {
    let media_type = "application/vnd.oci.image.manifest.v1+json".to_owned();
    let target = Some(Descriptor { media_type, digest: digest.to_owned(), size: 7, ..Descriptor::default() });
    Image { name: name.to_owned(), target, ..Image::default() }
}

async fn create_image(client: &Client, image: Image) -> Answer<()> {
    let request = CreateImageRequest { image: Some(image), ..CreateImageRequest::default() };
    client.api().images().create(client.request(request)).await.map(drop)
}

async fn delete_image(client: &Client, name: &str) -> Answer<()> {
    let request = DeleteImageRequest { name: name.to_owned(), sync: true, ..DeleteImageRequest::default() };
    client.api().images().delete(client.request(request)).await.map(drop)
}

/// What a shell script prints.
fn printed(cx: &Context, script: &str) -> Result<Vec<u8>> {
    let output = Command::new("sh").args(["-ec", script]).current_dir(cx.folder()).output()?;
    ensure!(output.status.success(), "{script}: {output:?}");
    Ok(output.stdout)
}

/// Nothing of any client is left: no row, and no file that has none.
async fn is_empty(cx: &Context) -> Result<()> {
    let content = cx.daemon().folder().join("root/io.containerd.content.v1.content");
    eventually("nothing is left", SOON, async || {
        let left =
            [snapshots(cx), content.join("blobs/sha256"), content.join("ingest"), content.join("removed")].map(|folder| count(&folder));
        ensure!(left == [0; 4], "snapshots, blobs, ingests, files to be removed: {left:?}");
        Ok(())
    })
    .await?;
    let output =
        Command::new(suite::manager().context("a manager")?).args(["check", "--root"]).arg(cx.daemon().folder().join("root")).output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

pub(crate) async fn a_broken_layer_is_refused_with_one_sentence_and_leaves_nothing(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = &cx.client().with_lease("l").await?;
    let gzip = printed(&cx, "mkdir t; head -c 300000 /dev/urandom > t/f; tar -C t -czf - f")?;
    let tar = printed(&cx, "tar -C t -cf - f")?;
    let mut torn = tar.clone();
    torn[30] ^= 1;
    let mut flipped = gzip.clone();
    flipped[200_000] ^= 1;
    let manifest = br#"{"schemaVersion":2,"manifests":[]}"#.to_vec();
    for (name, bytes, expected) in [
        ("half a gzip layer", gzip[..gzip.len() / 2].to_vec(), "cut off"),
        ("half a tar layer", tar[..tar.len() / 2].to_vec(), "ends within the data of \"f\""),
        ("a header with a wrong checksum", torn, "its checksum is"),
        ("a flipped bit in a gzip layer", flipped, ""),
        ("a layer followed by something else", [&gzip[..], b"garbage"].concat(), "followed by something else"),
        ("a manifest as a layer", manifest, "ends within a block"),
        ("compressed text", printed(&cx, "seq 1000 | gzip -c")?, "octal digits"),
    ] {
        let digest = store(client, name, &bytes, &[]).await?;
        let mounts = prepare(client, name, "", &[]).await?;
        let message = match apply(client, &digest, mounts).await {
            Err(status) if status.code() == Code::InvalidArgument => status.message().to_owned(),
            answer => anyhow::bail!("{name}: {answer:?}"),
        };
        ensure!(message.contains(expected) && !message.contains('\n'), "{name}: {message:?}");
        remove(client, name).await?;
    }
    let mounts = prepare(client, "none", "", &[]).await?;
    let none = format!("sha256:{}", "0f".repeat(32));
    refused(apply(client, &none, mounts.clone()).await, Code::NotFound, &none)?;
    for wrong in ["", "sha256:", "sha256:../../etc", "md5:0f", &"0f".repeat(32)] {
        refused(apply(client, wrong, mounts.clone()).await, Code::InvalidArgument, "")?;
    }
    remove(client, "none").await?;
    // sizes that the bytes do not have
    for (total, sent) in [(10, 5), (5, 10)] {
        let (mut upload, _) = Upload::begin(client, stat("wrong-size")).await?;
        upload.send(write(0, &vec![7; sent])).await?;
        let message = upload.send(commit_content(i64::try_from(sent)?, total, "")).await.err().context("it was accepted")?;
        ensure!(message.code() == Code::FailedPrecondition || message.code() == Code::InvalidArgument, "{message:?}");
        ensure!(message.message().contains("size"), "{message:?}");
    }
    end(client, "l").await?;
    is_empty(&cx).await
}

pub(crate) async fn a_layer_of_a_hundred_thousand_entries_in_one_folder_is_unpacked_and_removed(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = &cx.client().with_lease("l").await?;
    let layer = printed(&cx, "mkdir -p t/d; cd t/d; seq 100000 | xargs touch; cd ../..; tar -C t -czf - d; rm -r t")?;
    let digest = store(client, "large", &layer, &[]).await?;
    let mounts = prepare(client, "a", "", &[]).await?;
    let begin = Instant::now();
    apply(client, &digest, mounts).await?;
    println!("applied within {:.1?}", begin.elapsed());
    commit(client, "a", "large", &[]).await?;
    println!("committed within {:.1?}", begin.elapsed());
    let request = UsageRequest { snapshotter: "overlayfs".to_owned(), key: "large".to_owned() };
    let usage = client.api().snapshots().usage(client.request(request)).await?.into_inner();
    ensure!(usage.inodes == 100_002, "{usage:?}");
    // while they are removed, other calls are answered
    let other = cx.client().with_lease("m").await?;
    let has_ended = Cell::new(false);
    let calls = async {
        let (mut answered, mut longest) = (0, Duration::ZERO);
        while !has_ended.get() && answered < 100 {
            let begin = Instant::now();
            prepare(&other, &format!("other-{answered}"), "", &[]).await?;
            longest = longest.max(begin.elapsed());
            answered += usize::from(!has_ended.get());
        }
        Ok::<_, tonic::Status>((answered, longest))
    };
    let begin = Instant::now();
    let removal = async {
        let ended = end(client, "l").await;
        has_ended.set(true);
        ended.map(|()| begin.elapsed())
    };
    let (removed, calls) = tokio::join!(removal, calls);
    let (removed, (answered, longest)) = (removed?, calls?);
    println!("removed within {removed:.1?}, {answered} Prepares meanwhile, the longest {longest:.1?}");
    // one may slip in before it; a disk that stalls delays them all
    ensure!(answered > 4, "{answered} Prepares were answered within {removed:?}");
    end(cx.client(), "m").await?;
    is_empty(&cx).await
}

/// Everything that has labels. The bound on all of an object is some hundred KiB; messages may have 16 MiB.
pub(crate) async fn labels_longer_than_any_client_needs_are_refused(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = &cx.client().with_lease("l").await?;
    let digest = store(client, "r", b"content", &[]).await?;
    let long = "x".repeat(8 << 20);
    let given = &[("k", long.as_str())][..];
    let (invalid, why) = (Code::InvalidArgument, "label");
    let update = UpdateRequest { info: Some(Info { digest: digest.clone(), labels: labels(given), ..Info::default() }), update_mask: None };
    refused(client.api().content().update(client.request(update)).await, invalid, why)?;
    refused(store(client, "s", b"other", given).await.map_err(|error| error.downcast().expect("a status")), invalid, why)?;
    refused(create_image(client, Image { labels: labels(given), ..image("i", &digest) }).await, invalid, why)?;
    refused(prepare(client, "a", "", given).await, invalid, why)?;
    prepare(client, "a", "", &[]).await?;
    refused(commit(client, "a", "b", given).await, invalid, why)?;
    let lease = CreateRequest { id: "m".to_owned(), labels: labels(given) };
    refused(client.api().leases().create(client.request(lease)).await, invalid, why)?;
    let container = Container {
        id: "c".to_owned(),
        labels: labels(given),
        runtime: Some(Runtime { name: "x".to_owned(), options: None }),
        ..Container::default()
    };
    let request = CreateContainerRequest { container: Some(container) };
    refused(client.api().containers().create(client.request(request)).await, invalid, why)?;
    // a label of four GiB: its message says so in its first five bytes
    let socket = tokio::net::UnixStream::connect(cx.daemon().address()).await?;
    let (sender, connection) = h2::client::handshake(socket).await?;
    tokio::spawn(connection);
    let request = http::Request::post("http://x/containerd.services.images.v1.Images/Create").header("content-type", "application/grpc");
    let request = request.header("te", "trailers").header("containerd-namespace", client.namespace()).body(())?;
    let (answer, mut body) = sender.ready().await?.send_request(request, false)?;
    body.send_data(vec![0, 0xff, 0xff, 0xff, 0xff, b'x'].into(), false)?;
    let answer = tokio::time::timeout(Duration::from_secs(5), answer).await.context("it waits for four GiB")??;
    let status = answer.headers().get("grpc-status").and_then(|status| status.to_str().ok()).unwrap_or("none");
    // OutOfRange, or ResourceExhausted
    ensure!(["8", "11"].contains(&status), "{answer:?}");
    end(client, "l").await?;
    is_empty(&cx).await
}

/// Clients label what they like.
pub(crate) async fn labels_that_lead_in_circles_or_nowhere_stop_no_collection(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let (client, leased) = (cx.client(), cx.client().with_lease("l").await?);
    let sums = ["one", "other"].map(|text| shim_tests::upload::digest("sha256", text.as_bytes()));
    let [one, other] = [sums[0].as_ref(), sums[1].as_ref()].map(|sum| sum.expect("a digest").as_str());
    let own = shim_tests::upload::digest("sha256", b"own")?;
    let (content, snapshot) = ("containerd.io/gc.ref.content", "containerd.io/gc.ref.snapshot.overlayfs");
    store(&leased, "one", b"one", &[(content, other)]).await?;
    store(&leased, "other", b"other", &[(content, one), ("containerd.io/gc.ref.snapshot.none/1", "x"), (snapshot, "circle")]).await?;
    let none = format!("sha256:{}", "0f".repeat(32));
    store(
        &leased,
        "own",
        b"own",
        &[(content, &own), ("containerd.io/gc.ref.content/2", &none), ("containerd.io/gc.ref.content.3", "sha256:../..")],
    )
    .await?;
    prepare(&leased, "a", "", &[]).await?;
    commit(&leased, "a", "circle", &[(snapshot, "circle"), (content, one)]).await?;
    create_image(client, image("i", one)).await?;
    create_image(client, image("dangling", &none)).await?;
    end(client, "l").await?;
    ensure!(info(client, one).await.is_ok() && info(client, other).await.is_ok() && is_snapshot(client, "circle").await);
    ensure!(info(client, &own).await.is_err(), "nothing but itself leads there");
    delete_image(client, "i").await?;
    ensure!(info(client, one).await.is_err() && info(client, other).await.is_err() && !is_snapshot(client, "circle").await);
    delete_image(client, "dangling").await?;
    is_empty(&cx).await
}

pub(crate) async fn a_snapshot_that_cannot_be_removed_stops_no_collection(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let (client, leased) = (cx.client(), cx.client().with_lease("l").await?);
    for key in ["a", "b", "c"] {
        let mounts = prepare(&leased, key, "", &[]).await?;
        fs::write(Path::new(&mounts[0].source).join("file"), "data")?;
        commit(&leased, key, &format!("chain-{key}"), &[]).await?;
    }
    let content = store(&leased, "r", b"content", &[]).await?;
    // what an operator, or a client that crashed, has left mounted there
    let busy = snapshots(&cx).join("2/fs");
    nix::mount::mount(Some("tmpfs"), &busy, Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=1m"))?;
    fs::write(busy.join("precious"), "data")?;
    let ended = end(client, "l").await;
    let left = async || -> Result<()> {
        ended?;
        for key in ["a", "b", "c"] {
            ensure!(!is_snapshot(client, &format!("chain-{key}")).await, "{key}");
        }
        ensure!(info(client, &content).await.is_err(), "content is collected too");
        eventually("the others are removed", SOON, async || {
            ensure!(count(&snapshots(&cx)) == 1, "{} folders", count(&snapshots(&cx)));
            Ok(())
        })
        .await?;
        let folder = fs::read_dir(snapshots(&cx))?.next().context("a folder")?;
        let kept = fs::read_to_string(folder?.path().join("fs/precious"))?;
        ensure!(kept == "data", "nothing in the mount is removed");
        Ok(())
    };
    let left = left().await;
    // it is mounted wherever the folder is by now
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    for line in mounts.lines().filter(|line| line.contains(&snapshots(&cx).display().to_string())) {
        nix::mount::umount(line.split(' ').nth(1).context("a mount point")?)?;
    }
    left?;
    let request = CleanupRequest { snapshotter: "overlayfs".to_owned() };
    client.api().snapshots().cleanup(client.request(request)).await?;
    is_empty(&cx).await
}

pub(crate) async fn the_collection_after_a_start_removes_what_has_expired_and_nothing_in_use(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = cx.client();
    let in_an_hour = Timestamp::from(SystemTime::now() + Duration::from_secs(3600)).to_string();
    let soon = Timestamp::from(SystemTime::now() + Duration::from_secs(2)).to_string();
    for (id, expires) in [("long", &in_an_hour), ("short", &soon)] {
        let labels = [("containerd.io/gc.expire".to_owned(), expires.clone())].into();
        client.api().leases().create(client.request(CreateRequest { id: id.to_owned(), labels })).await?;
    }
    let (long, short) = (client.with_existing_lease("long"), client.with_existing_lease("short"));
    let (kept, expired) = (store(&long, "kept", b"kept", &[]).await?, store(&short, "expired", b"expired", &[]).await?);
    let rooted = store(&short, "rooted", b"rooted", &[ROOT]).await?;
    for (lease, key) in [(&short, "used"), (&short, "unused")] {
        prepare(lease, &format!("extract-{key}"), "", &[]).await?;
        commit(lease, &format!("extract-{key}"), &format!("chain-{key}"), &[]).await?;
        prepare(lease, key, &format!("chain-{key}"), &[]).await?;
    }
    let container = Container {
        id: "c".to_owned(),
        image: "removed-long-ago".to_owned(),
        snapshotter: "overlayfs".to_owned(),
        snapshot_key: "used".to_owned(),
        runtime: Some(Runtime { name: "io.containerd.x.v2".to_owned(), options: None }),
        spec: Some(Any { type_url: "example.test/spec".to_owned(), value: Vec::new() }),
        ..Container::default()
    };
    client.api().containers().create(client.request(CreateContainerRequest { container: Some(container) })).await?;
    cx.daemon().kill()?;
    // so that the start finds it expired
    eventually("the lease has expired", SOON, async || {
        ensure!(Timestamp::from(SystemTime::now()).to_string() > soon);
        Ok(())
    })
    .await?;
    cx.revive_daemon().await?;
    eventually("what has expired is removed", SOON, async || {
        ensure!(
            info(client, &expired).await.is_err() && !is_snapshot(client, "unused").await && !is_snapshot(client, "chain-unused").await
        );
        Ok(())
    })
    .await?;
    ensure!(info(client, &kept).await.is_ok() && info(client, &rooted).await.is_ok());
    ensure!(is_snapshot(client, "used").await && is_snapshot(client, "chain-used").await, "a container has it");
    client.api().containers().delete(client.request(DeleteContainerRequest { id: "c".to_owned() })).await?;
    let update = UpdateRequest { info: Some(Info { digest: rooted, ..Info::default() }), update_mask: None };
    client.api().content().update(client.request(update)).await?;
    end(client, "long").await?;
    is_empty(&cx).await
}

/// As a list of images and containers asks for each.
pub(crate) async fn three_hundred_images_are_looked_up_at_once(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = &cx.client().with_lease("l").await?;
    let mut digests = Vec::new();
    for number in 0..300 {
        let digest = store(client, &format!("r{number}"), format!("content {number}").as_bytes(), &[]).await?;
        create_image(client, image(&format!("i{number}"), &digest)).await?;
        let (key, name) = (format!("a{number}"), format!("chain-{number}"));
        let mounts = prepare(client, &key, "", &[]).await?;
        fs::write(Path::new(&mounts[0].source).join("file"), "data")?;
        commit(client, &key, &name, &[]).await?;
        digests.push((digest, name));
    }
    let mut times = Vec::new();
    for (digest, name) in &digests {
        let (snapshotter, key) = ("overlayfs".to_owned(), name.clone());
        let begin = Instant::now();
        info(client, digest).await?;
        times.push(begin.elapsed());
        let begin = Instant::now();
        ensure!(is_snapshot(client, name).await);
        times.push(begin.elapsed());
        let begin = Instant::now();
        client.api().snapshots().usage(client.request(UsageRequest { snapshotter, key })).await?;
        times.push(begin.elapsed());
    }
    times.sort_unstable();
    let (median, late) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    println!("{} calls: half within {median:.1?}, 99 of 100 within {late:.1?}", times.len());
    // with a debug build, beside other tests; something that walks files or all rows takes longer
    ensure!(median < Duration::from_millis(5), "half of the calls take more than {median:?}");
    for number in 0..300 {
        let request = DeleteImageRequest { name: format!("i{number}"), ..DeleteImageRequest::default() };
        client.api().images().delete(client.request(request)).await?;
    }
    end(client, "l").await?;
    is_empty(&cx).await
}
