//! Content that another process keeps: stock containerd, behind its socket.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::{CreateRequest, DeleteContentRequest, DeleteRequest, InfoRequest};
use containerd_client::types::transfer::ImageExportStream;
use shim_tests::client::Client;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::operator::{Own, output_text, printed};
use shim_tests::registry::Registry;
use shim_tests::rootfs;
use shim_tests::suite::Suite;
use shim_tests::transfers::{self, OCI_LAYER, Parts, blobs, export, pull, remove, sha256, tar, this_machine};
use shim_tests::upload::{Upload, commit, read, stat, store, write};
use tokio::sync::Notify;
use tonic::Code;

use crate::proxies::Backend;

/// The namespace in which everything is at the proxy.
const FAR: &str = "cache";

fn settings(address: &Path) -> String {
    format!("[proxy_plugins.{FAR}]\ntype = \"content\"\nnamespace = \"{FAR}\"\naddress = \"{}\"\n", address.display())
}

/// What the proxy has.
async fn there(backend: &Backend) -> Result<BTreeSet<String>> {
    Ok(blobs(&Client::connect(&backend.address(), FAR).await?).await?.into_iter().collect())
}

async fn is_emptied(backend: &Backend) -> Result<()> {
    eventually("the proxy has deleted it", SOON, async || {
        let left = there(backend).await?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await
}

/// Files of blobs, of ingests, and of what is being removed.
fn files(own: &Own) -> Result<Vec<String>> {
    let folder = own.folder().join("root/io.containerd.content.v1.content");
    let mut names = Vec::new();
    for name in ["blobs/sha256", "ingest", "removed"] {
        for entry in fs::read_dir(folder.join(name))? {
            names.push(entry?.path().display().to_string());
        }
    }
    Ok(names)
}

fn digests(parts: &Parts) -> BTreeSet<String> {
    parts.blobs.keys().cloned().collect()
}

/// An image of two layers with some MiB that differ.
fn image(text: &str) -> (Parts, serde_json::Value) {
    let mut parts = Parts::default();
    let noise: Vec<u8> = (0..3_000_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let tars = [tar(&[("text", text.as_bytes())]), tar(&[("noise", &noise)])];
    let diff_ids: Vec<_> = tars.iter().map(|tar| sha256(tar)).collect();
    let layers: Vec<_> = tars.into_iter().map(|tar| parts.put(OCI_LAYER, tar)).collect();
    let root = parts.manifest(&this_machine().architecture, &layers, &diff_ids);
    (parts, root)
}

/// Waits for a collection.
async fn collected(client: &Client) -> Result<()> {
    let lease = CreateRequest { id: "empty".to_owned(), ..CreateRequest::default() };
    client.api().leases().create(client.request(lease)).await?;
    client.api().leases().delete(client.request(DeleteRequest { id: "empty".to_owned(), sync: true })).await?;
    Ok(())
}

pub(crate) async fn an_image_whose_content_is_at_stock_containerd_is_used_like_any_other(cx: Context) -> Result<()> {
    let backend = Backend::start(&cx.folder().join("backend")).await?;
    let mut own = Own::new(&cx.folder().join("own"), &settings(&backend.address()))?;
    let mut command = own.command(&[])?;
    command.env("PATH", cx.daemon().path());
    let client = own.start_as(command).await?;
    let address = own.address();
    let ctr = |arguments: &[&str]| {
        let mut command = Command::new(Suite::Forky.program("ctr"));
        command.arg("--address").arg(&address).args(arguments);
        printed(&mut command)
    };
    let plugins = ctr(&["plugins", "ls"])?;
    ensure!(plugins.lines().any(|line| line.contains("io.containerd.content.v1") && line.contains(FAR)), "{plugins}");
    // an image with a program, imported and run
    let folder = cx.folder().join("rootfs");
    rootfs::make(&folder)?;
    let archive = Command::new("tar").arg("-C").arg(&folder).args(["-cf", "-", "."]).output()?.stdout;
    let mut parts = Parts::default();
    let diff_id = sha256(&archive);
    let layer = parts.put(OCI_LAYER, archive);
    let mut root = parts.manifest(&this_machine().architecture, &[layer], &[diff_id]);
    root["annotations"] = serde_json::json!({ "io.containerd.image.name": "localhost/box:1" });
    let file = cx.folder().join("image.tar");
    fs::write(&file, parts.layout(&[root]))?;
    let file = file.display().to_string();
    ctr(&["images", "import", &file])?;
    // the archive's own index has no name
    collected(&client).await?;
    let rows: BTreeSet<_> = blobs(&client).await?.into_iter().collect();
    ensure!(rows.len() >= 3, "{rows:?}");
    eventually("the proxy has what the image has", SOON, async || {
        let there = there(&backend).await?;
        ensure!(there == rows, "{:?}", there.symmetric_difference(&rows));
        Ok(())
    })
    .await?;
    ensure!(files(&own)?.is_empty(), "{:?}", files(&own)?);
    // the proxy collects, and nothing there leads to it
    let far = Client::connect(&backend.address(), FAR).await?;
    collected(&far).await?;
    ensure!(there(&backend).await? == rows, "{:?}", there(&backend).await?);
    let cgroup = cx.cgroup_path("far");
    let (name, runtime) = ("localhost/box:1", cx.shim().runtime_type.as_str());
    let said = ctr(&["run", "--rm", "--runtime", runtime, "--cgroup", &cgroup, name, "far", "/bin/busybox", "echo", "hello"])?;
    ensure!(said == "hello\n", "{said}");
    // by a process that has written nothing: all comes back
    let exported = export(&client, name, ImageExportStream::default()).await?;
    own.kill()?;
    let client = own.start().await?;
    ensure!(export(&client, name, ImageExportStream::default()).await? == exported, "other bytes");
    for digest in &rows {
        ensure!(sha256(&read(&client, digest, 0, 0).await?) == *digest, "{digest}");
    }
    ensure!(printed(&mut own.command(&["check"])?)?.contains("is sound"));
    let verified = printed(&mut own.command(&["verify"])?)?;
    ensure!(verified.contains(&format!("{} blobs are sound", rows.len())), "{verified} {}", rows.len());
    // imported by calls of Content into another namespace: the proxy's blobs are not sent again, and stay until no namespace has them
    ctr(&["--namespace", "second", "images", "import", "--local", &file])?;
    ctr(&["images", "rm", "--sync", name])?;
    let second: BTreeSet<_> = blobs(&Client::connect(&address, "second").await?).await?.into_iter().collect();
    ensure!(blobs(&client).await?.is_empty() && second.len() >= 3);
    eventually("the proxy has what the second namespace has", SOON, async || {
        let there = there(&backend).await?;
        ensure!(there == second, "{:?}", there.symmetric_difference(&second));
        Ok(())
    })
    .await?;
    ctr(&["--namespace", "second", "images", "rm", "--sync", name])?;
    is_emptied(&backend).await?;
    // pulled and unpacked, and what only the proxy has is damaged there
    let (registry, (parts, root)) = (Registry::start(None).await?, image("pulled"));
    parts.publish(&registry, "app:1", &root)?;
    pull(&client, &registry.image("app:1")).await?;
    ensure!(there(&backend).await? == digests(&parts) && transfers::snapshots(&client).await?.len() == 2);
    let lost = root["digest"].as_str().context("a digest")?.to_owned();
    far.api().content().delete(far.request(DeleteContentRequest { digest: lost.clone() })).await?;
    let checked = own.command(&["check"])?.output()?;
    let sentence = format!("content proxy {FAR}: {lost} is not there");
    ensure!(!checked.status.success() && output_text(&checked).contains(&sentence), "{}", output_text(&checked));
    pull(&client, &registry.image("app:1")).await?;
    ensure!(printed(&mut own.command(&["check"])?)?.contains("is sound"), "the pull brought it");
    remove(&client, &registry.image("app:1")).await?;
    is_emptied(&backend).await
}

pub(crate) async fn content_of_a_proxy_that_is_gone_is_one_clear_error_and_nothing_is_lost(cx: Context) -> Result<()> {
    let mut backend = Backend::start(&cx.folder().join("backend")).await?;
    let mut own = Own::new(&cx.folder().join("own"), &settings(&backend.address()))?;
    let client = own.start().await?.with_lease("test").await?;
    let before = store(&client, "before", b"before", &[]).await?;
    let (mut upload, _) = Upload::begin(&client, stat("midway")).await?;
    upload.send(write(0, b"mid")).await?;
    backend.child.kill()?;
    backend.child.wait()?;
    upload.send(write(3, b"way")).await?;
    let refused = upload.send(commit(6, 6, "")).await.expect_err("it is gone");
    let unreachable = format!("content proxy {FAR}: cannot reach {}: ", backend.address().display());
    ensure!(refused.code() == Code::Unavailable && refused.message().starts_with(&unreachable), "{refused}");
    let info = client.api().content().info(client.request(InfoRequest { digest: before.clone() })).await?.into_inner().info;
    ensure!(info.unwrap_or_default().size == 6, "rows are here");
    let checked = own.command(&["check"])?.output()?;
    ensure!(!checked.status.success() && output_text(&checked).contains(&unreachable), "{}", output_text(&checked));
    own.kill()?;
    let client = own.start().await?.with_existing_lease("test");
    let refused = read(&client, &before, 0, 0).await.expect_err("it is gone");
    ensure!(refused.code() == Code::Unavailable && refused.message().starts_with(&unreachable), "{refused}");
    let folder = backend.folder.clone();
    drop(backend);
    let backend = Backend::start(&folder).await?;
    // all that was written is still here
    let (mut upload, found) = Upload::begin(&client, stat("midway")).await?;
    ensure!(found.offset == 6, "{found:?}");
    let midway = upload.send(commit(6, 6, "")).await?.digest;
    ensure!(read(&client, &midway, 0, 0).await? == b"midway" && read(&client, &before, 0, 0).await? == b"before");
    ensure!(there(&backend).await? == BTreeSet::from([before, midway]));
    let request = DeleteRequest { id: "test".to_owned(), sync: true };
    client.api().leases().delete(client.request(request)).await?;
    is_emptied(&backend).await
}

pub(crate) async fn content_that_a_proxy_has_by_itself_is_not_fetched(cx: Context) -> Result<()> {
    let backend = Backend::start(&cx.folder().join("backend")).await?;
    let mut own = Own::new(&cx.folder().join("own"), &settings(&backend.address()))?;
    let client = own.start().await?;
    let (registry, (parts, root)) = (Registry::start(None).await?, image("cached"));
    parts.publish(&registry, "app:1", &root)?;
    let far = Client::connect(&backend.address(), FAR).await?;
    let other = store(&far, "other", b"of others", &[]).await?;
    let mut cached = BTreeSet::from([other.clone()]);
    for (_, bytes) in parts.blobs.values() {
        cached.insert(store(&far, "cached", bytes, &[]).await?);
    }
    pull(&client, &registry.image("app:1")).await?;
    let layers: Vec<_> = parts.blobs.iter().filter(|(_, (kind, _))| kind == OCI_LAYER).map(|(digest, _)| digest).collect();
    ensure!(layers.len() == 2 && layers.iter().all(|digest| registry.fetches(digest) == 0), "{:?}", registry.requests());
    ensure!(transfers::snapshots(&client).await?.len() == 2 && blobs(&client).await?.len() == parts.blobs.len());
    ensure!(there(&backend).await? == cached);
    // what has got no row is not ours
    remove(&client, &registry.image("app:1")).await?;
    eventually("the proxy has deleted what had a row", SOON, async || {
        let left = there(&backend).await?;
        ensure!(left == BTreeSet::from([other.clone()]), "{left:?}");
        Ok(())
    })
    .await
}

pub(crate) async fn what_was_acknowledged_outlives_a_kill_and_what_was_not_is_deleted_at_the_proxy(cx: Context) -> Result<()> {
    let backend = Backend::start(&cx.folder().join("backend")).await?;
    let mut own = Own::new(&cx.folder().join("own"), &settings(&backend.address()))?;
    let mut acknowledged = BTreeSet::new();
    let bytes = |round: u8, number: u8| [vec![round; 2_000_000], vec![number]].concat();
    for round in 0..6 {
        let client = own.start().await?;
        let client = if round == 0 { client.with_lease("test").await? } else { client.with_existing_lease("test") };
        let two_are_stored = Notify::new();
        let storing = async {
            for number in 0..50 {
                let Ok(digest) = store(&client, &format!("r{round}"), &bytes(round, number), &[]).await else { return };
                acknowledged.insert(digest);
                if number == 1 {
                    two_are_stored.notify_one();
                }
            }
        };
        // somewhere in the middle of another one
        let killing = async {
            two_are_stored.notified().await;
            tokio::time::sleep(Duration::from_millis(7 * u64::from(round))).await;
            own.kill()
        };
        let ((), killed) = tokio::join!(storing, killing);
        killed?;
    }
    let client = own.start().await?.with_existing_lease("test");
    let rows: BTreeSet<_> = blobs(&client).await?.into_iter().collect();
    ensure!(rows.is_superset(&acknowledged), "lost: {:?}", acknowledged.difference(&rows));
    eventually("what no row names is deleted at the proxy", SOON, async || {
        let there = there(&backend).await?;
        ensure!(there == rows, "{:?}", there.symmetric_difference(&rows));
        Ok(())
    })
    .await?;
    let verified = printed(&mut own.command(&["verify"])?)?;
    ensure!(verified.contains(&format!("{} blobs are sound", rows.len())), "{verified} {}", rows.len());
    let request = DeleteRequest { id: "test".to_owned(), sync: true };
    client.api().leases().delete(client.request(request)).await?;
    is_emptied(&backend).await?;
    eventually("ingests go with their lease", SOON, async || {
        let files = files(&own)?;
        ensure!(files.is_empty(), "{files:?}");
        Ok(())
    })
    .await
}

pub(crate) async fn an_upgrade_while_content_is_written_to_a_proxy_is_noticed_by_no_client(cx: Context) -> Result<()> {
    let backend = Backend::start(&cx.folder().join("backend")).await?;
    let mut own = Own::new(&cx.folder().join("own"), &settings(&backend.address()))?;
    own.start().await?.with_lease("test").await?;
    let mut stored = BTreeSet::new();
    for round in 0..2 {
        let client = own.client().await?.with_existing_lease("test");
        let mut uploads = Vec::new();
        for number in 0..12 {
            let bytes = [vec![round; 2_000_000], vec![number]].concat();
            let (mut upload, _) = Upload::begin(&client, stat(&format!("u{round}.{number}"))).await?;
            upload.send(write(0, &bytes)).await?;
            uploads.push((upload, i64::try_from(bytes.len())?));
        }
        let committing = async {
            for (upload, size) in &mut uploads {
                stored.insert(upload.send(commit(*size, *size, "")).await?.digest);
            }
            anyhow::Ok(())
        };
        let upgrading = async {
            let output = tokio::process::Command::from(own.command(&["upgrade"])?).output().await?;
            ensure!(output.status.success(), "{}", output_text(&output));
            Ok(())
        };
        let (committed, upgraded) = tokio::join!(committing, upgrading);
        upgraded?;
        committed.with_context(|| own.log())?;
    }
    eventually("the proxy has what has a row, and nothing else", SOON, async || {
        let there = there(&backend).await?;
        ensure!(there == stored, "{:?}", there.symmetric_difference(&stored));
        Ok(())
    })
    .await
}
