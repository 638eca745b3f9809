//! Imports beside what ends leases, removes images, fills disks and replaces the daemon.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::snapshots::{PrepareSnapshotRequest, StatSnapshotRequest};
use containerd_client::services::v1::{CreateRequest, WriteContentRequest};
use prost_types::Timestamp;
use shim_tests::client::Client;
use shim_tests::context::Context;
use shim_tests::dice::Dice;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::image::{Image, Layer, Node};
use shim_tests::import::{Fact, Import, OVERLAYFS, delete_image, end_lease};
use shim_tests::operator::{ctr, output_text, printed, upgrade};
use shim_tests::power::Disk;
use shim_tests::registry::Registry;
use shim_tests::stored::Stored;
use shim_tests::suite::Suite;
use shim_tests::transfers::pull;
use shim_tests::upload::{Upload, commit, info, read, refused, stat, write};
use tonic::Code;

/// An image of three layers, which no other test has.
fn image(seed: u64, name: &str) -> Image {
    let mut dice = Dice::new(seed);
    let layers: Vec<_> = (0..3).map(|number| Arc::new(Layer::random(&mut dice, number, 5 + 10 * number))).collect();
    Image::new(&format!("example.com/rows/{name}:1"), &layers)
}

fn stored(cx: &Context) -> Stored {
    Stored::new(cx.client(), &cx.daemon().folder().join("root"))
}

/// Everything that an imported image consists of.
fn whole(image: &Image) -> Vec<Fact> {
    let blobs = image.blobs().map(|(digest, _)| Fact::Blob(digest));
    blobs.chain(image.chains().into_iter().map(Fact::Snapshot)).chain([Fact::Image(image.name.clone())]).collect()
}

async fn import(client: &Client, image: &Image, lease: &str) -> Result<()> {
    let import = Import::begin(client, image, lease).await?;
    import.run(&mut |_fact| {}).await.with_context(|| format!("import under lease {lease}"))?;
    Ok(import.end().await?)
}

/// Checks that an image is there as a whole, and nothing that has no row.
async fn is_whole(cx: &Context, image: &Image) -> Result<()> {
    let stored = stored(cx);
    stored.settles().await?;
    let mut wrong = stored.lost(whole(image)).await?;
    wrong.extend(stored.damage(std::slice::from_ref(image)).await?);
    ensure!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

pub(crate) async fn an_import_whose_lease_is_pruned_says_so_and_can_be_repeated(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let (client, image) = (cx.client(), image(86, "pruned"));
    for point in ["uploaded", "named", "half unpacked"] {
        let interrupted = Import::begin(client, &image, "running").await?;
        interrupted.upload(&mut |_fact| {}).await?;
        if point != "uploaded" {
            interrupted.name().await?;
        }
        if point == "half unpacked" {
            interrupted.unpack_some(1).await?;
        }
        // what `docker system prune` does
        end_lease(client, "running").await?;
        let mut rest = interrupted.upload(&mut |_fact| {}).await;
        if rest.is_ok() {
            rest = interrupted.unpack(&mut |_fact| {}).await;
        }
        refused(rest, Code::NotFound, "lease does not exist").context(point)?;
        import(client, &image, "repeated").await.context(point)?;
        is_whole(&cx, &image).await.context(point)?;
        delete_image(client, &image.name, true).await?;
    }
    Ok(())
}

pub(crate) async fn an_import_keeps_what_a_killed_one_has_left_without_labels(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let (client, image) = (cx.client(), image(85, "unlabelled"));
    let archive = cx.folder().join("unlabelled.tar");
    fs::write(&archive, image.archive())?;
    for importer in ["step by step", "ctr --local", "ctr"] {
        let killed = Import::begin(client, &image, "killed").await?;
        killed.upload_without_labels().await?;
        let local: &[&str] = if importer == "ctr --local" { &["--local"] } else { &[] };
        match importer {
            "step by step" => import(client, &image, "next").await?,
            _ => drop(printed(ctr(&cx).args(["images", "import"]).args(local).arg(&archive))?),
        }
        // ends the lease of the killed one, too
        is_whole(&cx, &image).await.context(importer)?;
        delete_image(client, &image.name, true).await?;
    }
    Ok(())
}

pub(crate) async fn a_snapshot_that_a_retry_has_found_stays_when_the_first_attempts_lease_ends(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let (client, image) = (cx.client(), image(87, "retried"));
    let first = Import::begin(client, &image, "first").await?;
    first.upload(&mut |_fact| {}).await?;
    first.unpack_some(2).await?;
    let second = Import::begin(client, &image, "second").await?;
    second.upload(&mut |_fact| {}).await?;
    // both layers are there, it is answered
    second.unpack_some(2).await?;
    end_lease(client, "first").await?;
    second.unpack(&mut |_fact| {}).await.context("on what was found")?;
    second.name().await?;
    second.end().await?;
    is_whole(&cx, &image).await
}

pub(crate) async fn a_snapshot_that_a_client_has_seen_stays_as_long_as_its_lease(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let (client, image) = (cx.client(), image(75, "seen"));
    import(client, &image, "first").await?;
    // ctr 1.6 skips a layer whose snapshot it has seen, and prepares the next one on that snapshot
    let (second, chains) = (client.with_lease("second").await?, image.chains());
    for chain in &chains {
        let request = StatSnapshotRequest { snapshotter: OVERLAYFS.to_owned(), key: chain.clone() };
        second.api().snapshots().stat(second.request(request)).await?;
    }
    delete_image(client, &image.name, true).await?;
    let (key, parent) = ("next".to_owned(), chains[2].clone());
    let request = PrepareSnapshotRequest { snapshotter: OVERLAYFS.to_owned(), key, parent, ..PrepareSnapshotRequest::default() };
    second.api().snapshots().prepare(second.request(request)).await?;
    end_lease(client, "second").await?;
    stored(&cx).settles().await?;
    ensure!(stored(&cx).rows().await?.snapshots.is_empty(), "it is not held for ever");
    Ok(())
}

/// 40 times; `X_TIMES` for more.
pub(crate) async fn an_image_that_is_removed_and_imported_again_at_once_is_whole(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let (client, layer) = (cx.client(), Layer::of([("f".to_owned(), Node::File(0o644, b"of a small image".to_vec()))].into()));
    let image = Image::new("example.com/rows/again:1", &[Arc::new(layer)]);
    import(client, &image, "first").await?;
    for time in 0..40 * shim_tests::times::times() {
        let lease = format!("l{time}");
        // its collection, if it is not waited for, takes place while the next import runs
        let again = async {
            delete_image(client, &image.name, time % 2 == 0).await?;
            import(client, &image, &lease).await
        };
        again.await.with_context(|| format!("time {time}"))?;
        let lost = stored(&cx).lost(whole(&image)).await?;
        ensure!(lost.is_empty(), "time {time}: {lost:?}");
    }
    is_whole(&cx, &image).await
}

pub(crate) async fn what_an_import_has_found_stays_when_the_image_that_had_it_is_removed(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = cx.client();
    let first = image(89, "first");
    let second = Image::new("example.com/rows/second:1", &first.layers);
    import(client, &first, "l").await?;
    for steps in 0..3 {
        let lease = format!("found-{steps}");
        let resolving = Import::begin(client, &second, &lease).await?;
        resolving.upload(&mut |_fact| {}).await?;
        resolving.unpack_some(steps).await?;
        delete_image(client, &first.name, true).await?;
        resolving.unpack(&mut |_fact| {}).await.with_context(|| format!("after {steps} layers"))?;
        resolving.name().await?;
        resolving.end().await?;
        is_whole(&cx, &second).await.with_context(|| format!("after {steps} layers"))?;
        import(client, &first, "l").await?;
        delete_image(client, &second.name, true).await?;
    }
    is_whole(&cx, &first).await
}

pub(crate) async fn a_write_whose_lease_expires_meanwhile_is_refused_and_leaves_nothing(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = cx.client();
    let soon = Timestamp::from(SystemTime::now() + Duration::from_secs(1)).to_string();
    let labels = [("containerd.io/gc.expire".to_owned(), soon)].into();
    client.api().leases().create(client.request(CreateRequest { id: "short".to_owned(), labels })).await?;
    let leased = client.with_existing_lease("short");
    let (mut upload, _) = Upload::begin(&leased, stat("r")).await?;
    upload.send(write(0, b"begun")).await?;
    eventually("the lease expires", SOON, async || {
        stored(&cx).collect().await?;
        ensure!(!stored(&cx).rows().await?.leases.contains(&"short".to_owned()), "it is there");
        Ok(())
    })
    .await?;
    upload.send(write(5, b" and written on")).await.context("nothing is taken from a writer")?;
    refused(upload.send(commit(20, 20, "")).await, Code::NotFound, "lease does not exist")?;
    drop(upload);
    stored(&cx).settles().await
}

/// Something that is done to a file.
type Damage = fn(&Path) -> Result<()>;

pub(crate) async fn a_damaged_ingest_begins_again(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = &cx.client().with_lease("test").await?;
    let ingests = cx.daemon().folder().join("root/io.containerd.content.v1.content/ingest");
    let data = Dice::new(99).bytes(3000);
    let expected = shim_tests::image::digest(&data);
    let mut damages: Vec<(String, Damage)> = Vec::new();
    for file in ["ref", "data", "startedat", "updatedat", "total", "lease"] {
        damages.push((file.to_owned(), |path| Ok(fs::remove_file(path)?)));
        damages.push((file.to_owned(), |path| Ok(File::create(path)?.set_len(0)?)));
        damages.push((file.to_owned(), |path| Ok(fs::write(path, [fs::read(path)?, vec![0; 9000]].concat())?)));
        damages.push((file.to_owned(), |path| Ok(fs::write(path, [0xff; 3])?)));
    }
    for (number, (file, damage)) in damages.into_iter().enumerate() {
        let reference = format!("r{number}");
        let first = || WriteContentRequest { total: 3000, expected: expected.clone(), ..stat(&reference) };
        let (mut upload, _) = Upload::begin(client, first()).await?;
        upload.send(write(0, &data[..1000])).await?;
        cx.daemon().kill()?;
        let ingest = fs::read_dir(&ingests)?.next().context("an ingest")??.path();
        damage(&ingest.join(&file)).with_context(|| format!("{number}: {file}"))?;
        cx.revive_daemon().await?;
        let stored_by_a_client = async {
            // one attempt may be refused, and then the next one begins anew
            for attempt in 0.. {
                let (mut upload, answer) = Upload::begin(client, first()).await?;
                let offset = usize::try_from(answer.offset)?;
                let mut last = commit(answer.offset, 3000, &expected);
                last.data = data.get(offset..).unwrap_or_default().to_vec();
                match upload.send(last).await {
                    Err(status) if attempt == 0 && status.code() == Code::FailedPrecondition => {}
                    answer => {
                        answer?;
                        break;
                    }
                }
            }
            ensure!(read(client, &expected, 0, 0).await? == data);
            anyhow::Ok(())
        };
        stored_by_a_client.await.with_context(|| format!("damage {number}, of {file}"))?;
        let request = containerd_client::services::v1::DeleteContentRequest { digest: expected.clone() };
        client.api().content().delete(client.request(request)).await?;
    }
    ensure!(info(client, &expected).await.is_err());
    Ok(())
}

/// From no room at all to enough, by half a mebibyte; by an `X_TIMES`-th of that. Every other one is pulled from a registry by Transfer.
pub(crate) async fn an_import_that_finds_no_room_leaves_nothing_and_can_be_repeated(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    cx.daemon().stop()?;
    let (root, file) = (cx.daemon().folder().join("root"), cx.folder().join("disk"));
    fs::rename(&root, cx.folder().join("root"))?;
    File::create(&file)?.set_len(40 << 20)?;
    printed(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&file))?;
    let disk = Disk::mount(&file, &root)?;
    cx.revive_daemon().await?;
    let result = at_each_step(&cx, &root).await.with_context(|| cx.daemon().log());
    cx.daemon().stop()?;
    disk.unmount()?;
    result
}

async fn at_each_step(cx: &Context, root: &Path) -> Result<()> {
    let (client, ballast, registry) = (cx.client(), root.join("ballast"), Registry::start(None).await?);
    let image = Image { name: registry.image("full:1"), ..image(103, "full") };
    image.publish(&registry);
    let (mut refused, mut step) = (BTreeMap::<String, u32>::new(), 0);
    loop {
        fill(&ballast, step * (512 << 10) / u64::from(shim_tests::times::times()))?;
        let lease = format!("l{step}");
        let begun = Import::begin(client, &image, &lease).await;
        let imported = match &begun {
            Ok(_) if step % 2 == 1 => pull(client, &image.name).await,
            Ok(import) => import.run(&mut |_fact| {}).await,
            Err(status) => Err(status.clone()),
        };
        let what = format!("step {step}");
        match imported {
            Ok(()) => break,
            Err(status) => {
                ensure!(status.code() == Code::ResourceExhausted, "{what}: {status:?}");
                let words = status.message().split(['/', '"', ':']).next().unwrap_or_default();
                *refused.entry(words.trim().to_owned()).or_default() += 1;
            }
        }
        // everything that there is goes while the disk is full
        end_lease(client, &lease).await.with_context(|| what.clone())?;
        delete_image(client, &image.name, true).await.with_context(|| what.clone())?;
        let leaked = async || {
            let leaked = stored(cx).leaked().await?;
            ensure!(leaked.is_empty(), "{leaked:#?}");
            Ok(())
        };
        eventually("nothing is left that has no row", SOON, leaked).await.with_context(|| what.clone())?;
        ensure!(stored(cx).rows().await?.content.is_empty(), "{what}");
        fs::remove_file(&ballast)?;
        if step % 4 == 0 {
            import(client, &image, &format!("again-{step}")).await.with_context(|| what.clone())?;
            is_whole(cx, &image).await.with_context(|| what.clone())?;
            delete_image(client, &image.name, true).await?;
        }
        step += 1;
    }
    println!("{step} imports found no room: {refused:?}");
    ensure!(refused.len() > 1 && step > 5, "{refused:?}");
    is_whole(cx, &image).await
}

/// Writes a file that leaves so many bytes free.
fn fill(ballast: &Path, free: u64) -> Result<()> {
    let about = nix::sys::statvfs::statvfs(ballast.parent().context("a folder")?)?;
    let mut bytes = (about.blocks_available() * about.fragment_size()).saturating_sub(free);
    let file = File::create(ballast)?;
    // the file system needs some itself
    while let Err(error) = nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, i64::try_from(bytes)?) {
        ensure!(error == nix::errno::Errno::ENOSPC && bytes > 1 << 20, "{error}");
        bytes -= 4096;
    }
    Ok(())
}

pub(crate) async fn a_write_goes_on_over_an_upgrade_also_if_another_namespace_has_the_content_by_then(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let (client, other) = (cx.client().with_lease("l").await?, cx.daemon().client("other").await?.with_lease("l").await?);
    let data = Dice::new(5).bytes(3000);
    let expected = shim_tests::image::digest(&data);
    let first = WriteContentRequest { total: 3000, expected: expected.clone(), ..stat("r") };
    let (mut upload, _) = Upload::begin(&client, first).await?;
    upload.send(write(0, &data[..1000])).await?;
    shim_tests::upload::store(&other, "r", &data, &[]).await?;
    upgraded_beside(&cx).await?;
    let mut last = commit(1000, 0, "");
    last.data = data[1000..].to_vec();
    ensure!(upload.send(last).await?.digest == expected);
    drop(upload);
    // the connection ends with the process that is replaced, maybe while a call is on its way
    let is_there = async || {
        ensure!(read(&client, &expected, 0, 0).await? == data);
        Ok(())
    };
    eventually("it can be read", SOON, is_there).await
}

/// As ctr imports it: it repeats no call on its own.
pub(crate) async fn upgrades_end_no_import(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let mut dice = Dice::new(7);
    // one takes longer than two upgrades
    let layers: Vec<_> = (0..).zip([50, 2500, 50]).map(|(number, files)| Arc::new(Layer::random(&mut dice, number, files))).collect();
    let image = Image::new("example.com/rows/upgraded:1", &layers);
    let archive = cx.folder().join("image.tar");
    fs::write(&archive, image.archive())?;
    let mut command = ctr(&cx);
    command.args(["images", "import"]);
    if cx.suite() == Suite::Forky {
        command.arg("--local");
    }
    let mut command = tokio::process::Command::from(command);
    let importing = command.arg(&archive).kill_on_drop(true).output();
    let mut importing = std::pin::pin!(importing);
    let mut upgrades = 0;
    let output = loop {
        let mut upgrade = std::pin::pin!(upgraded_beside(&cx));
        let output = tokio::select! {
            output = &mut importing => output?,
            upgraded = &mut upgrade => {
                upgraded?;
                upgrades += 1;
                continue;
            }
        };
        // one that is under way would have the calls below refused, which are not repeated
        upgrade.await?;
        break output;
    };
    ensure!(output.status.success(), "after {upgrades} upgrades: {}\n{}", output_text(&output), cx.daemon().log());
    println!("{upgrades} upgrades during an import");
    ensure!(upgrades > 0);
    // the first call may be on a connection to the process that was replaced
    eventually("a process serves", SOON, async || Ok(cx.client().version().await?)).await?;
    is_whole(&cx, &image).await
}

/// An upgrade, after a while; the processes before it may serve on for streams.
async fn upgraded_beside(cx: &Context) -> Result<()> {
    // a client repeats a refused call once
    tokio::time::sleep(Duration::from_millis(100)).await;
    let output = tokio::process::Command::from(upgrade(cx.daemon())?).output().await?;
    ensure!(output.status.success(), "{}", output_text(&output));
    Ok(())
}
