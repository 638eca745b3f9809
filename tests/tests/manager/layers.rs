//! Snapshots and layers, as clients unpack images with them: by raw requests, over crashes, upgrades and on a full disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
    UsageRequest, ViewSnapshotRequest,
};
use containerd_client::services::v1::{ApplyRequest, DeleteRequest, DiffRequest};
use containerd_client::types::{Descriptor, Mount};
use shim_tests::client::{Answer, Client};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually_true};
use shim_tests::upload::{read, refused, store};
use tonic::Code;

fn snapshots(cx: &Context) -> PathBuf {
    cx.daemon().folder().join("root/io.containerd.snapshotter.v1.overlayfs/snapshots")
}

/// Names in a folder.
fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names: Vec<_> =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

/// An archive of what a script makes in an empty folder.
fn archive(cx: &Context, script: &str) -> Result<Vec<u8>> {
    let folder = cx.folder().join("layer");
    fs::create_dir_all(&folder)?;
    let script = format!("{script}; tar --numeric-owner -cf ../layer.tar .");
    let status = Command::new("sh").args(["-ec", &script]).current_dir(&folder).status()?;
    ensure!(status.success(), "{script}: {status}");
    fs::remove_dir_all(&folder)?;
    Ok(fs::read(cx.folder().join("layer.tar"))?)
}

async fn prepare(client: &Client, key: &str, parent: &str, labels: &[(&str, &str)]) -> Answer<Vec<Mount>> {
    let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let (snapshotter, key, parent) = ("overlayfs".to_owned(), key.to_owned(), parent.to_owned());
    let request = PrepareSnapshotRequest { snapshotter, key, parent, labels };
    Ok(client.api().snapshots().prepare(client.request(request)).await?.into_inner().mounts)
}

async fn apply(client: &Client, digest: &str, mounts: Vec<Mount>) -> Answer<String> {
    let diff = Some(Descriptor { digest: digest.to_owned(), ..Descriptor::default() });
    let request = ApplyRequest { diff, mounts, ..ApplyRequest::default() };
    let answer = client.api().diff().apply(client.request(request)).await?.into_inner();
    Ok(answer.applied.unwrap_or_default().digest)
}

async fn commit(client: &Client, key: &str, name: &str) -> Answer<()> {
    let (snapshotter, key, name) = ("overlayfs".to_owned(), key.to_owned(), name.to_owned());
    let request = CommitSnapshotRequest { snapshotter, key, name, ..CommitSnapshotRequest::default() };
    client.api().snapshots().commit(client.request(request)).await.map(drop)
}

async fn remove(client: &Client, key: &str) -> Answer<()> {
    let request = RemoveSnapshotRequest { snapshotter: "overlayfs".to_owned(), key: key.to_owned() };
    client.api().snapshots().remove(client.request(request)).await.map(drop)
}

async fn info(client: &Client, key: &str) -> Answer<Info> {
    let request = StatSnapshotRequest { snapshotter: "overlayfs".to_owned(), key: key.to_owned() };
    Ok(client.api().snapshots().stat(client.request(request)).await?.into_inner().info.unwrap_or_default())
}

async fn list(client: &Client, filters: &[&str]) -> Answer<Vec<String>> {
    let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
    let request = ListSnapshotsRequest { snapshotter: "overlayfs".to_owned(), filters };
    let mut answer = client.api().snapshots().list(client.request(request)).await?.into_inner();
    let mut found = Vec::new();
    while let Some(message) = answer.message().await? {
        found.extend(message.info.into_iter().map(|info| info.name));
    }
    Ok(found)
}

/// A client whose content and snapshots are not collected while a test runs.
async fn kept(cx: &Context) -> Result<Client> {
    Ok(cx.client().with_lease("test").await?)
}

pub(crate) async fn layers_are_unpacked_as_clients_do_and_read_again_as_a_diff(cx: Context) -> Result<()> {
    let client = &kept(&cx).await?;
    let first = archive(&cx, "mkdir d; echo 1 > d/old; echo 1 > f; chmod 4755 f")?;
    let second = archive(&cx, "mkdir d; touch d/.wh.old; echo 2 > d/new")?;
    let (one, two) = (store(client, "one", &first, &[]).await?, store(client, "two", &second, &[]).await?);
    let target = &[("containerd.io/snapshot.ref", "chain-1")];
    let mounts = prepare(client, "extract-1", "", target).await?;
    ensure!(apply(client, &one, mounts).await? == one, "it is not compressed");
    commit(client, "extract-1", "chain-1").await?;
    refused(prepare(client, "extract-2", "", target).await, Code::AlreadyExists, "target snapshot \"chain-1\": already exists")?;
    let mounts = prepare(client, "extract-3", "chain-1", &[]).await?;
    apply(client, &two, mounts).await?;
    commit(client, "extract-3", "chain-2").await?;
    let mounts = prepare(client, "container", "chain-2", &[("a", "1")]).await?;
    ensure!(list(client, &[]).await? == ["chain-1", "chain-2", "container"]);
    ensure!(
        list(client, &["kind==active,labels.a==1"]).await? == ["container"] && list(client, &["parent==chain-1"]).await? == ["chain-2"]
    );
    // as a client mounts it, by its own means
    let point = cx.folder().join("point");
    fs::create_dir(&point)?;
    let options = mounts[0].options.join(",");
    nix::mount::mount(Some("overlay"), &point, Some("overlay"), nix::mount::MsFlags::empty(), Some(&*options))?;
    let seen = names(&point.join("d")).and_then(|names| {
        fs::write(point.join("made"), "data")?;
        Ok(names)
    });
    nix::mount::umount(&point)?;
    ensure!(seen? == ["new"]);
    let usage = UsageRequest { snapshotter: "overlayfs".to_owned(), key: "chain-2".to_owned() };
    let usage = client.api().snapshots().usage(client.request(usage)).await?.into_inner();
    ensure!(usage.inodes == 4, "the root, d, its new file, and the whiteout of the old one: {usage:?}");
    let request = MountsRequest { snapshotter: "overlayfs".to_owned(), key: "container".to_owned() };
    let right = client.api().snapshots().mounts(client.request(request)).await?.into_inner().mounts;
    ensure!(right == mounts);
    let view = ViewSnapshotRequest {
        snapshotter: "overlayfs".to_owned(),
        key: "view".to_owned(),
        parent: "chain-2".to_owned(),
        ..ViewSnapshotRequest::default()
    };
    let left = client.api().snapshots().view(client.request(view)).await?.into_inner().mounts;
    let request = DiffRequest { left, right, media_type: "application/vnd.oci.image.layer.v1.tar".to_owned(), ..DiffRequest::default() };
    let diff = client.api().diff().diff(client.request(request)).await?.into_inner().diff.unwrap_or_default();
    let layer = cx.folder().join("diff.tar");
    fs::write(&layer, read(client, &diff.digest, 0, 0).await?)?;
    let listed = Command::new("tar").arg("-tf").arg(&layer).output()?;
    ensure!(String::from_utf8_lossy(&listed.stdout) == "made\n", "{listed:?}");
    refused(remove(client, "chain-1").await, Code::FailedPrecondition, "cannot remove snapshot with child: failed precondition")?;
    for key in ["view", "container", "chain-2", "chain-1"] {
        remove(client, key).await?;
    }
    ensure!(list(client, &[]).await?.is_empty());
    Ok(())
}

pub(crate) async fn a_snapshot_stays_as_long_as_a_lease_or_a_child_needs_it(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = cx.client();
    let (chain, container) = (client.with_lease("chain").await?, client.with_lease("container").await?);
    prepare(&chain, "a", "", &[]).await?;
    commit(&chain, "a", "one").await?;
    prepare(&container, "b", "one", &[]).await?;
    let end = async |id: &str| client.api().leases().delete(client.request(DeleteRequest { id: id.to_owned(), sync: true })).await;
    end("chain").await?;
    ensure!(info(client, "one").await.is_ok(), "a child needs it");
    ensure!(names(&snapshots(&cx))?.len() == 2);
    end("container").await?;
    refused(info(client, "one").await, Code::NotFound, "snapshot one does not exist: not found")?;
    ensure!(names(&snapshots(&cx))?.is_empty(), "a collection that is waited for has freed the space");
    Ok(())
}

pub(crate) async fn a_crash_while_a_layer_is_applied_leaves_a_snapshot_that_can_be_removed(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = &kept(&cx).await?;
    let blob = store(
        client,
        "r",
        // enough of them to be killed in the middle
        &archive(&cx, "mkdir d; cd d; seq 30000 | xargs touch; echo long > long; cd ..")?,
        &[],
    )
    .await?;
    let mounts = prepare(client, "a", "", &[]).await?;
    let tree = PathBuf::from(&mounts[0].source);
    let (other, digest) = (client.clone(), blob.clone());
    let applying = tokio::spawn(async move { apply(&other, &digest, mounts).await });
    eventually_true("files are made", SOON, || tree.join("d").exists()).await?;
    cx.daemon().kill()?;
    ensure!(applying.await?.is_err());
    // what a crash can leave besides
    for left in ["new-1-1/fs", "77/fs", "rm-1-1-7/fs"] {
        fs::create_dir_all(snapshots(&cx).join(left))?;
    }
    cx.revive_daemon().await?;
    eventually_true("leftovers are removed", SOON, || names(&snapshots(&cx)).is_ok_and(|names| names == ["1"])).await?;
    // on what is there, again
    let mounts = prepare(client, "b", "", &[]).await?;
    for (key, mounts) in
        [("b", mounts), ("a", vec![Mount { r#type: "bind".to_owned(), source: tree.display().to_string(), ..Mount::default() }])]
    {
        ensure!(apply(client, &blob, mounts).await? == blob);
        commit(client, key, &format!("chain-{key}")).await?;
    }
    let same = Command::new("diff").arg("-r").arg(&tree).arg(snapshots(&cx).join("2/fs")).output()?;
    ensure!(same.status.success() && names(&tree.join("d"))?.len() == 30001, "{same:?}");
    for key in ["chain-a", "chain-b"] {
        remove(client, key).await?;
    }
    eventually_true("files are removed", SOON, || names(&snapshots(&cx)).is_ok_and(|names| names.is_empty())).await
}

pub(crate) async fn a_layer_that_finds_no_room_leaves_nothing(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    cx.daemon().stop()?;
    let root = cx.daemon().folder().join("root");
    fs::rename(&root, cx.folder().join("root"))?;
    fs::create_dir(&root)?;
    nix::mount::mount(Some("tmpfs"), &root, Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=24m"))?;
    cx.revive_daemon().await?;
    let result = full(&cx).await;
    cx.daemon().stop()?;
    nix::mount::umount(&root)?;
    result
}

async fn full(cx: &Context) -> Result<()> {
    let client = &kept(cx).await?;
    let large = store(client, "large", &archive(cx, "head -c 12000000 /dev/urandom > long")?, &[]).await?;
    let small = store(client, "small", &archive(cx, "echo 1 > short")?, &[]).await?;
    let mounts = prepare(client, "a", "", &[]).await?;
    let error = apply(client, &large, mounts).await.err().context("there is no room")?;
    ensure!(error.code() == Code::ResourceExhausted && error.message().contains("\"long\""), "{error:?}");
    remove(client, "a").await?;
    eventually_true("its files are removed", SOON, || names(&snapshots(cx)).is_ok_and(|names| names.is_empty())).await?;
    let mounts = prepare(client, "b", "", &[]).await?;
    apply(client, &small, mounts).await?;
    Ok(commit(client, "b", "chain").await?)
}
