use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::sync::Mutex;
use std::time::Duration;

use containerd_client::services::v1::snapshots::Kind;
use flate2::Compression;
use flate2::write::GzEncoder;
use nix::mount::{MsFlags, mount};
use sha2::{Digest as _, Sha256};

use super::*;
use crate::content::Opening;
use crate::layers::testing::{Archive, is_root, view};
use crate::settings::Sharing;
use crate::snapshots::{New, in_own_mounts};
use crate::store::blobs;

pub(in crate::images) struct Fixture {
    pub(in crate::images) unpacker: Unpacker,
    folder: scratch::Folder,
}

pub(in crate::images) fn namespace() -> Namespace {
    Namespace::parse("n").expect("a name")
}

pub(in crate::images) fn digest_of(bytes: &[u8]) -> Digest {
    Digest::of_sha256(&Sha256::digest(bytes).into())
}

pub(in crate::images) fn zipped(tar: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(tar).expect("memory");
    encoder.finish().expect("memory")
}

fn silent() -> OnProgress {
    Arc::new(|_progress| {})
}

impl Fixture {
    pub(in crate::images) fn new(name: &str) -> Option<Self> {
        if !is_root() {
            return None;
        }
        let folder = scratch::Folder::new(name);
        let store = Store::new(&folder);
        let pools = Pools::default();
        let gate = Gate::default();
        let content =
            Content::open(&folder.join("content"), Sharing::Shared, store.clone(), pools.content.clone(), gate.clone()).expect("a folder");
        let snapshots =
            Snapshots::open(&folder, store.clone(), gate.clone(), pools.snapshots.clone(), pools.removal.clone()).expect("a root");
        let unpacker = Unpacker::new(store, Arc::new(content), snapshots, gate, &pools, LayerLimits::default());
        Some(Self { unpacker, folder })
    }

    pub(in crate::images) async fn writer(&self, bytes: &[u8]) -> crate::content::Writer {
        let digest = digest_of(bytes);
        let (reference, expected) = (digest.to_string(), Some(digest.clone()));
        let opening = Opening { namespace: namespace(), reference, total: 0, expected, lease: None };
        self.unpacker.content.write(opening).await.expect("a writer")
    }

    pub(in crate::images) async fn blob(&self, bytes: &[u8]) -> Digest {
        let digest = digest_of(bytes);
        if self.unpacker.content.has(&namespace(), &digest).await.expect("read") {
            return digest;
        }
        let mut writer = self.writer(bytes).await;
        writer.write(bytes.to_vec().into()).await.expect("written");
        writer.commit(0, Some(&digest), HashMap::new()).await.expect("committed")
    }

    /// Manifest and config of an image; its layers are not written.
    pub(in crate::images) async fn image(&self, tars: &[Vec<u8>], blobs: &[Vec<u8>]) -> Digest {
        let diff_ids: Vec<_> = tars.iter().map(|tar| digest_of(tar).to_string()).collect();
        let config = format!(r#"{{"rootfs":{{"type":"layers","diff_ids":{diff_ids:?}}}}}"#);
        let config = self.blob(config.as_bytes()).await;
        let layers: Vec<_> = blobs
            .iter()
            .map(|blob| {
                let (digest, size) = (digest_of(blob), blob.len());
                format!(r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{digest}","size":{size}}}"#)
            })
            .collect();
        let manifest = format!(r#"{{"config":{{"digest":"{config}","size":1}},"layers":[{}]}}"#, layers.join(","));
        self.blob(manifest.as_bytes()).await
    }

    /// An image with its layers.
    pub(in crate::images) async fn whole(&self, tars: &[Vec<u8>]) -> Digest {
        let blobs: Vec<_> = tars.iter().map(|tar| zipped(tar)).collect();
        for blob in &blobs {
            self.blob(blob).await;
        }
        self.image(tars, &blobs).await
    }

    fn unpack(snapshotter: Snapshotter, manifest: &Digest) -> Unpack {
        let manifest = manifest.clone();
        Unpack { namespace: namespace(), snapshotter, manifest, labels: HashMap::new(), lease: None, waits: false }
    }

    pub(in crate::images) fn place(snapshotter: Snapshotter) -> Place {
        Place { namespace: "n".to_owned(), snapshotter: snapshotter.name().to_owned() }
    }

    /// What a container on an unpacked image would see.
    pub(in crate::images) async fn seen(&self, snapshotter: Snapshotter, unpacked: &Unpacked) -> BTreeMap<String, String> {
        let parent = unpacked.chain.as_ref().map(ToString::to_string).unwrap_or_default();
        let new = New { key: format!("view {parent}"), parent, kind: Kind::View, labels: HashMap::new(), lease: None };
        let mounts = self.unpacker.snapshots.prepare(&Self::place(snapshotter), new).await.expect("prepared");
        let [only] = &mounts[..] else { panic!("{mounts:?}") };
        let point = self.folder.join(format!("point-{}", snapshotter.name()));
        fs::create_dir(&point).expect("a folder");
        let seen = in_own_mounts(|| {
            let options: Vec<_> = only.options.iter().filter(|option| !matches!(&***option, "ro" | "rbind")).map(String::as_str).collect();
            let flags = if only.r#type == "bind" { MsFlags::MS_BIND } else { MsFlags::MS_RDONLY };
            mount(Some(&*only.source), &point, Some(&*only.r#type), flags, Some(&*options.join(","))).expect("mounted");
            Ok(view(&point))
        });
        let seen = seen.expect("a namespace");
        // links between files are an overlay's own matter
        seen.into_iter().map(|(name, text)| (name, text.split(" linked to").next().unwrap_or_default().to_owned())).collect()
    }

    /// Names in the folder of the snapshotter.
    pub(in crate::images) fn folders(&self) -> Vec<String> {
        let base = self.folder.join("io.containerd.snapshotter.v1.overlayfs/snapshots");
        fs::read_dir(base).expect("a folder").map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }

    pub(in crate::images) async fn eventually_empty(&self) {
        let empty = async {
            while !self.folders().is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let ended = tokio::time::timeout(Duration::from_secs(20), empty).await;
        assert!(ended.is_ok(), "left: {:?}", self.folders());
    }
}

/// Layers in which each needs to know something of those below.
pub(in crate::images) fn layers() -> Vec<Vec<u8>> {
    let lowest = Archive::default()
        .folder("usr")
        .folder("usr/bin")
        .file("usr/bin/sh", "shell")
        .symlink("bin", "usr/bin")
        .folder("tmp")
        .folder("etc")
        .file("etc/passwd", "root")
        .file("etc/shadow", "x")
        .folder("gone")
        .file("gone/a", "a")
        .folder("hidden")
        .file("hidden/old", "old");
    vec![
        lowest.end(),
        // parents that it has no entries for, a whiteout, an opaque folder
        Archive::default()
            .file("usr/bin/ls", "list")
            .file("etc/.wh.shadow", "")
            .file("hidden/.wh..wh..opq", "")
            .file("hidden/new", "new")
            .end(),
        // through a link of a lower layer
        Archive::default().file("bin/cat", "cat").end(),
        // a link to a file of a lower layer
        Archive::default().link("etc/other", "etc/passwd").file(".wh.gone", "").end(),
        // a whiteout of nothing, and the same file again
        Archive::default().file("etc/.wh.nothing", "").file("etc/passwd", "users").end(),
    ]
}

#[tokio::test]
async fn layers_unpacked_at_once_are_what_they_are_one_after_the_other() {
    let Some(f) = Fixture::new("unpack") else { return };
    let manifest = f.whole(&layers()).await;
    let at_once = f.unpacker.unpack(Fixture::unpack(Snapshotter::Overlayfs, &manifest), silent()).await.expect("unpacked");
    let copies = f.unpacker.unpack(Fixture::unpack(Snapshotter::Native, &manifest), silent()).await.expect("unpacked");
    assert_eq!((at_once.new_layers, copies.new_layers), (5, 5));
    let (left, right) = (f.seen(Snapshotter::Overlayfs, &at_once).await, f.seen(Snapshotter::Native, &copies).await);
    assert_eq!(left, right, "overlay on the left, copies on the right");
    assert!(left.contains_key("usr/bin/cat") && left.contains_key("etc/other"), "{left:?}");
    assert!(!left.contains_key("etc/shadow") && !left.contains_key("gone") && !left.contains_key("hidden/old"), "{left:?}");
}

#[tokio::test]
async fn everything_below_can_be_deleted_by_one_layer() {
    let Some(f) = Fixture::new("unpack-root") else { return };
    let upper = Archive::default().file(".wh..wh..opq", "").file("only", "this").end();
    let manifest = f.whole(&[layers().remove(0), upper]).await;
    let unpacked = f.unpacker.unpack(Fixture::unpack(Snapshotter::Overlayfs, &manifest), silent()).await.expect("unpacked");
    let seen = f.seen(Snapshotter::Overlayfs, &unpacked).await;
    assert_eq!(seen.keys().collect::<Vec<_>>(), ["", "only"]);
}

#[tokio::test]
async fn an_unpacked_image_has_the_labels_of_one_that_a_client_has_unpacked() {
    let Some(f) = Fixture::new("unpack-labels") else { return };
    let tars = layers();
    let manifest = f.whole(&tars).await;
    let unpack = || f.unpacker.unpack(Fixture::unpack(Snapshotter::Overlayfs, &manifest), silent());
    let unpacked = unpack().await.expect("unpacked");
    let again = unpack().await.expect("all is there");
    assert_eq!((again.new_layers, &again.chain), (0, &unpacked.chain));
    let (config, layer) = (unpacked.config.clone(), digest_of(&zipped(&tars[1])));
    let labels = f.unpacker.store.read(move |db| {
        let of = |digest: &Digest| Ok::<_, Error>(blobs::get(db, "n", digest.as_str())?.expect("it is there").labels);
        Ok((of(&config)?, of(&layer)?))
    });
    let (of_config, of_layer) = labels.await.expect("read");
    assert_eq!(of_config["containerd.io/gc.ref.snapshot.overlayfs"], unpacked.chain.expect("layers").to_string());
    assert_eq!(of_layer["containerd.io/uncompressed"], digest_of(&tars[1]).to_string());
}

#[tokio::test]
async fn a_layer_is_unpacked_while_it_is_written() {
    let Some(f) = Fixture::new("unpack-arriving") else { return };
    // incompressible, so that half of the blob is half of the files
    let noise: Vec<u8> = (0..1 << 17).flat_map(|number: u32| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let large: Vec<u8> = noise.iter().cycle().take(8 << 20).copied().collect();
    let tars = vec![Archive::default().file("large", &large).end(), Archive::default().file("small", "x").end()];
    let blobs = [tars[0].clone(), zipped(&tars[1])];
    let manifest = f.image(&tars, &blobs).await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let on_progress: OnProgress = {
        let seen = Arc::clone(&seen);
        Arc::new(move |progress: Progress| seen.lock().expect("no panic").push(progress.step))
    };
    let unpack = Unpack { waits: true, ..Fixture::unpack(Snapshotter::Overlayfs, &manifest) };
    let unpacker = f.unpacker.clone();
    let unpacking = tokio::spawn(async move { unpacker.unpack(unpack, on_progress).await });
    let mut writer = f.writer(&blobs[0]).await;
    let half = blobs[0].len() / 2;
    writer.write(blobs[0][..half].to_vec().into()).await.expect("written");
    let early = async {
        while !seen.lock().expect("no panic").iter().any(|step| matches!(step, Step::Unpacking { .. })) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), early).await.expect("what has arrived is unpacked");
    assert!(!unpacking.is_finished());
    writer.write(blobs[0][half..].to_vec().into()).await.expect("written");
    writer.commit(0, None, HashMap::new()).await.expect("committed");
    f.blob(&blobs[1]).await;
    let unpacked = unpacking.await.expect("no panic").expect("unpacked");
    assert_eq!(unpacked.new_layers, 2);
    assert!(f.seen(Snapshotter::Overlayfs, &unpacked).await["large"].contains("8388608 bytes"));
}

#[tokio::test]
async fn bytes_that_are_taken_back_while_they_are_unpacked_do_no_harm() {
    let Some(f) = Fixture::new("unpack-cut") else { return };
    let tars = vec![Archive::default().file("a", vec![7; 3 << 20]).end()];
    let manifest = f.image(&tars, &tars).await;
    let unpack = Unpack { waits: true, ..Fixture::unpack(Snapshotter::Overlayfs, &manifest) };
    let unpacker = f.unpacker.clone();
    let unpacking = tokio::spawn(async move { unpacker.unpack(unpack, silent()).await });
    let mut writer = f.writer(&tars[0]).await;
    // another file's beginning, of which nothing is wrong yet
    let other = Archive::default().file("a", vec![8; 3 << 20]).end();
    writer.write(other[..1 << 20].to_vec().into()).await.expect("written");
    tokio::time::timeout(Duration::from_secs(20), async {
        while f.folders().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("it is begun");
    writer.truncate().await.expect("from the beginning");
    writer.write(tars[0].clone().into()).await.expect("written");
    writer.commit(0, None, HashMap::new()).await.expect("committed");
    assert_eq!(unpacking.await.expect("no panic").expect("unpacked").new_layers, 1);
}

#[tokio::test]
async fn ten_callers_at_once_unpack_an_image_once() {
    let Some(f) = Fixture::new("unpack-ten") else { return };
    let manifest = f.whole(&layers()).await;
    let mut callers = JoinSet::new();
    for _ in 0..10 {
        let (unpacker, unpack) = (f.unpacker.clone(), Fixture::unpack(Snapshotter::Overlayfs, &manifest));
        callers.spawn(async move { unpacker.unpack(unpack, silent()).await });
    }
    let all = callers.join_all().await;
    let new: usize = all.into_iter().map(|unpacked| unpacked.expect("unpacked").new_layers).sum();
    assert_eq!(new, 5);
    assert_eq!(f.folders().len(), 5, "{:?}", f.folders());
}

#[tokio::test]
async fn one_layer_twice_in_an_image_is_two_snapshots() {
    let Some(f) = Fixture::new("unpack-twice") else { return };
    let (a, b) = (Archive::default().file("a", "a").end(), Archive::default().file(".wh.a", "").file("b", "b").end());
    let manifest = f.whole(&[a.clone(), b, a]).await;
    let unpacked = f.unpacker.unpack(Fixture::unpack(Snapshotter::Overlayfs, &manifest), silent()).await.expect("unpacked");
    assert_eq!(unpacked.new_layers, 3);
    assert_eq!(f.seen(Snapshotter::Overlayfs, &unpacked).await.keys().collect::<Vec<_>>(), ["", "a", "b"]);
}

#[tokio::test]
async fn a_layer_with_another_diff_id_is_refused_and_its_chain_is_free() {
    let Some(f) = Fixture::new("unpack-wrong") else { return };
    let mut tars = layers();
    let blobs: Vec<_> = tars.iter().map(|tar| zipped(tar)).collect();
    for blob in &blobs {
        f.blob(blob).await;
    }
    tars[2] = Archive::default().file("other", "x").end();
    let manifest = f.image(&tars, &blobs).await;
    let refused = f.unpacker.unpack(Fixture::unpack(Snapshotter::Overlayfs, &manifest), silent()).await.expect_err("another layer");
    let text = refused.to_string();
    assert!(text.contains(digest_of(&blobs[2]).as_str()) && text.contains(digest_of(&tars[2]).as_str()), "{text}");
    f.eventually_empty().await;
    let chain = Plan::read(&f.unpacker.content, &namespace(), &manifest).await.expect("a plan").layers.remove(2).chain;
    let found = f.unpacker.snapshots.committed(&Fixture::place(Snapshotter::Overlayfs), vec![chain.to_string()], None).await;
    assert_eq!(found.expect("read"), [false]);
}

#[tokio::test]
async fn a_caller_that_leaves_leaves_nothing() {
    let Some(f) = Fixture::new("unpack-left") else { return };
    let tars = layers();
    let blobs: Vec<_> = tars.iter().map(|tar| zipped(tar)).collect();
    // the last is missing
    for blob in &blobs[..4] {
        f.blob(blob).await;
    }
    let manifest = f.image(&tars, &blobs).await;
    let unpack = Unpack { waits: true, ..Fixture::unpack(Snapshotter::Overlayfs, &manifest) };
    let unpacker = f.unpacker.clone();
    let unpacking = tokio::spawn(async move { unpacker.unpack(unpack, silent()).await });
    tokio::time::timeout(Duration::from_secs(20), async {
        // of the four, one says nothing without those below it, and its draft goes at once
        while f.folders().len() < 3 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("what is there is unpacked");
    unpacking.abort();
    assert!(unpacking.await.expect_err("it was given up").is_cancelled());
    f.eventually_empty().await;
}

#[tokio::test]
async fn a_draft_whose_caller_leaves_before_it_has_it_is_deleted() {
    let Some(f) = Fixture::new("unpack-draft") else { return };
    let draft = loop {
        let mut draft = Box::pin(f.unpacker.snapshots.draft(Snapshotter::Overlayfs, None));
        let is_made = std::future::poll_fn(|cx| std::task::Poll::Ready(draft.as_mut().poll(cx).is_ready())).await;
        if !is_made {
            break draft;
        }
        // the thread that makes it was faster than this one: once more
        f.eventually_empty().await;
    };
    // this thread does nothing else: the caller cannot have it
    scratch::eventually("its folder", || f.folders().len() == 1);
    drop(draft);
    f.eventually_empty().await;
}
