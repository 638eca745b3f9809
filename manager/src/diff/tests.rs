use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use containerd_client::services::v1::snapshots::Kind;

use super::*;
use crate::content::Opening;
use crate::gate::Gate;
use crate::layers::testing::is_root;
use crate::settings::Sharing;
use crate::snapshots::{Commit, New};
use crate::store::Store;
use crate::store::snapshots::Place;

struct Fixture {
    differ: Differ,
    folder: scratch::Folder,
}

fn namespace() -> Namespace {
    Namespace::parse("n").expect("a name")
}

fn place(snapshotter: &str) -> Place {
    Place { namespace: "n".to_owned(), snapshotter: snapshotter.to_owned() }
}

impl Fixture {
    /// Nothing is left of mounts but the folders on which all are made.
    fn has_its_points_alone(&self) {
        for entry in fs::read_dir(&self.differ.state).expect("a folder") {
            let path = entry.expect("an entry").path();
            assert!(["mount-0", "mount-1", "mount-2"].iter().any(|name| path.ends_with(name)), "{}", path.display());
            assert_eq!(fs::read_dir(&path).expect("a folder").count(), 0, "{}", path.display());
        }
    }

    fn new(name: &str) -> Option<Self> {
        if !is_root() {
            return None;
        }
        let folder = scratch::Folder::new(name);
        let store = Store::new(&folder);
        let pool = || Pool::new("test", 3);
        let content = Content::open(&folder.join("content"), Sharing::Shared, store.clone(), pool(), Gate::default()).expect("a folder");
        let snapshots = Snapshots::open(&folder, store, Gate::default(), pool(), pool()).expect("a root");
        let state = folder.join("state");
        fs::create_dir(&state).expect("a folder");
        let differ = Differ { snapshots, content: Arc::new(content), pool: pool(), limits: LayerLimits::default(), state };
        Some(Self { differ, folder })
    }

    async fn blob(&self, bytes: Vec<u8>) -> Digest {
        let opening = Opening { namespace: namespace(), reference: "r".to_owned(), total: 0, expected: None, lease: None };
        let mut writer = self.differ.content.write(opening).await.expect("a writer");
        writer.write(bytes.into()).await.expect("written");
        writer.commit(0, None, HashMap::new()).await.expect("committed")
    }

    async fn prepare(&self, snapshotter: &str, key: &str, parent: &str, kind: Kind) -> Vec<Mount> {
        let new = New { key: key.to_owned(), parent: parent.to_owned(), kind, labels: HashMap::new(), lease: None };
        self.differ.snapshots.prepare(&place(snapshotter), new).await.expect("prepared")
    }

    async fn commit(&self, snapshotter: &str, key: &str, name: &str) {
        let commit = Commit { key: key.to_owned(), name: name.to_owned(), parent: String::new(), labels: HashMap::new(), lease: None };
        self.differ.snapshots.commit(&place(snapshotter), commit).await.expect("committed");
    }

    fn shell(&self, script: &str) -> Vec<u8> {
        let ran = Command::new("sh").args(["-ec", script]).current_dir(&*self.folder).output().expect("a shell");
        assert!(ran.status.success(), "{script}: {}", String::from_utf8_lossy(&ran.stderr));
        ran.stdout
    }
}

fn new(compression: Compression) -> NewBlob {
    NewBlob { reference: String::new(), labels: HashMap::new(), lease: None, compression, times: Times::Seconds(None) }
}

#[tokio::test]
async fn layers_go_through_every_snapshotter_and_come_out_again() {
    for snapshotter in ["overlayfs", "native"] {
        let Some(f) = Fixture::new(snapshotter) else { return };
        let first = f.blob(f.shell("mkdir -p t/d && echo 1 > t/d/old && echo 1 > t/f && tar -C t -czf - .")).await;
        let second = f.blob(f.shell("mkdir -p u/d && touch u/d/.wh.old && echo 2 > u/d/new && tar -C u -cf - .")).await;
        let mounts = f.prepare(snapshotter, "a", "", Kind::Active).await;
        f.differ.apply(&namespace(), &first, mounts, false).await.expect("applied");
        f.commit(snapshotter, "a", "one").await;
        let mounts = f.prepare(snapshotter, "b", "one", Kind::Active).await;
        let applied = f.differ.apply(&namespace(), &second, mounts.clone(), true).await.expect("applied");
        assert_eq!(Digest::of_sha256(&applied.diff_id), second, "it is not compressed");
        let view = f.prepare(snapshotter, "v", "one", Kind::View).await;
        for compression in [Compression::Plain, Compression::Gzip, Compression::Zstd] {
            let (digest, size) = f.differ.create(&namespace(), view.clone(), mounts.clone(), new(compression)).await.expect("created");
            let info = f.differ.content.info(&namespace(), &digest).await.expect("it is content");
            assert_eq!(
                (u64::try_from(info.size), info.labels.contains_key("containerd.io/uncompressed")),
                (Ok(size), compression != Compression::Plain)
            );
            let again = f.differ.create(&namespace(), view.clone(), mounts.clone(), new(compression)).await.expect("it is there already");
            assert_eq!(again, (digest.clone(), size));
            let to = f.prepare(snapshotter, &format!("c{size}"), "one", Kind::Active).await;
            f.differ.apply(&namespace(), &digest, to.clone(), false).await.expect("applied");
            let (nothing, _) = f.differ.create(&namespace(), mounts.clone(), to, new(Compression::Plain)).await.expect("compared");
            assert_eq!(f.differ.content.info(&namespace(), &nothing).await.expect("it is there").size, 1024, "an archive without entries");
        }
        f.has_its_points_alone();
    }
}

#[tokio::test]
async fn what_cannot_be_applied_is_refused() {
    let Some(f) = Fixture::new("refused") else { return };
    let blob = f.blob(f.shell("mkdir t && echo 1 > t/f && tar -C t -cf - .")).await;
    let garbage = f.blob(vec![7; 10_000]).await;
    let mounts = f.prepare("overlayfs", "a", "", Kind::Active).await;
    let view = f.prepare("overlayfs", "v", "", Kind::View).await;
    let missing = Digest::parse(&format!("sha256:{}", "0f".repeat(32))).expect("a digest");
    let code =
        async |digest: &Digest, mounts: Vec<Mount>| f.differ.apply(&namespace(), digest, mounts, false).await.expect_err("refused").code();
    assert_eq!(code(&missing, mounts.clone()).await, tonic::Code::NotFound);
    assert_eq!(code(&garbage, mounts).await, tonic::Code::InvalidArgument);
    assert_eq!(code(&blob, view).await, tonic::Code::InvalidArgument);
    assert_eq!(code(&blob, Vec::new()).await, tonic::Code::InvalidArgument);
    let nowhere = Mount { r#type: "overlay".to_owned(), options: vec!["lowerdir=/none:/nowhere".to_owned()], ..Mount::default() };
    f.differ.apply(&namespace(), &blob, vec![nowhere], false).await.expect_err("there is no such folder");
    f.has_its_points_alone();
}

#[tokio::test]
async fn an_overlay_of_more_layers_than_a_page_names_is_mounted() {
    let Some(f) = Fixture::new("many") else { return };
    let layers: Vec<PathBuf> = (0..150).map(|number| f.folder.join(format!("layer-with-a-long-name-{number}"))).collect();
    for (number, layer) in layers.iter().enumerate() {
        fs::create_dir(layer).and_then(|()| fs::write(layer.join(format!("file{number}")), "x")).expect("a layer");
    }
    let lowers: Vec<_> = layers.iter().map(|layer| layer.display().to_string()).collect();
    let view = Mount { r#type: "overlay".to_owned(), options: vec![format!("lowerdir={}", lowers.join(":"))], ..Mount::default() };
    let (digest, _) = f.differ.create(&namespace(), Vec::new(), vec![view], new(Compression::Plain)).await.expect("created");
    let blob = f.differ.content.read(&namespace(), &digest).await.expect("content");
    assert_eq!(blob.size, 150 * 1024 + 1024);
}

/// mount(2) takes a page of options, with the NUL behind them.
#[tokio::test]
async fn an_overlay_whose_options_fill_a_page_is_mounted_at_every_byte() {
    let Some(f) = Fixture::new("page") else { return };
    for length in 4090..=4100 {
        let folder = f.folder.join(format!("of-{length}"));
        let mut left = length - "lowerdir=".len();
        let mut layers = Vec::new();
        while left > 0 {
            // of some hundred bytes each, the last as long as it must be
            let above = format!("{}/{}-", folder.display(), layers.len());
            let name = if left <= above.len() + 230 { left - above.len() } else { 100 };
            let layer = PathBuf::from(format!("{above}{}", "n".repeat(name)));
            fs::create_dir_all(&layer).and_then(|()| fs::write(layer.join(format!("file{}", layers.len())), "x")).expect("a layer");
            left -= layer.as_os_str().len() + usize::from(left > layer.as_os_str().len());
            layers.push(layer.display().to_string());
        }
        let option = format!("lowerdir={}", layers.join(":"));
        assert_eq!(option.len(), length);
        let view = Mount { r#type: "overlay".to_owned(), options: vec![option], ..Mount::default() };
        let (digest, _) = f.differ.create(&namespace(), Vec::new(), vec![view], new(Compression::Plain)).await.expect("created");
        let blob = f.differ.content.read(&namespace(), &digest).await.expect("content");
        assert_eq!(blob.size, layers.len() as u64 * 1024 + 1024, "{length}");
    }
}

#[tokio::test]
async fn a_call_that_is_given_up_ends_its_work() {
    let Some(f) = Fixture::new("given-up") else { return };
    // long enough not to be over first
    let blob = f.blob(f.shell("mkdir t && head -c 300000000 /dev/zero > t/f && tar -C t -czf - .")).await;
    let mounts = f.prepare("overlayfs", "a", "", Kind::Active).await;
    let (namespace, pool) = (namespace(), f.differ.pool.clone());
    let file = PathBuf::from(&mounts[0].source).join("f");
    let mut call = Box::pin(f.differ.apply(&namespace, &blob, mounts, false));
    while pool.busy() == 0 {
        let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(call.as_mut().poll(cx).is_ready())).await;
        assert!(!polled, "it has ended before it was given up");
        tokio::task::yield_now().await;
    }
    drop(call);
    scratch::eventually("its thread is free", || pool.busy() == 0);
    assert!(fs::metadata(file).map_or(0, |about| about.len()) < 300_000_000, "it was done to its end");
}

#[tokio::test]
async fn layers_that_wait_for_another_in_the_same_folder_keep_no_thread() {
    let Some(f) = Fixture::new("locked") else { return };
    let blob = f.blob(f.shell("mkdir t && echo 1 > t/f && tar -C t -cf - .")).await;
    let busy = f.prepare("overlayfs", "a", "", Kind::Active).await;
    let free = f.prepare("overlayfs", "b", "", Kind::Active).await;
    let locked = File::open(&busy[0].source).expect("a folder");
    locked.lock().expect("a lock");
    let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(f.differ.apply_in(busy.clone(), &blob))).collect();
    for call in &mut waiting {
        assert!(tokio::time::timeout(Duration::from_millis(50), call.as_mut()).await.is_err(), "it is locked");
    }
    // as many wait as there are threads
    let other = f.differ.apply_in(free, &blob);
    let waits = async {
        for call in &mut waiting {
            let _ = tokio::time::timeout(Duration::from_millis(1), call.as_mut()).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        applied = other => drop(applied.expect("applied")),
        () = waits => {}
        () = tokio::time::sleep(Duration::from_secs(60)) => panic!("it waits for a thread"),
    }
    drop(locked);
    waiting.swap_remove(0).await.expect("applied");
}

impl Differ {
    async fn apply_in(&self, mounts: Vec<Mount>, blob: &Digest) -> Result<Applied> {
        self.apply(&namespace(), blob, mounts, false).await
    }
}

#[tokio::test]
async fn layers_of_an_id_mapped_snapshot_have_the_ids_that_are_seen_in_it() {
    use std::os::unix::fs::MetadataExt as _;
    let Some(f) = Fixture::new("mapped") else { return };
    if let Some(why) = f.differ.snapshots.cannot_remap(crate::snapshots::Snapshotter::Overlayfs) {
        eprintln!("skipped: {why}");
        return;
    }
    let first = f.blob(f.shell("mkdir a && echo 1 > a/below && tar --owner=0 --group=0 -C a -cf - .")).await;
    let second =
        f.blob(f.shell("mkdir b && echo 2 > b/new && chown 7:8 b/new && touch b/.wh.below && tar --numeric-owner -C b -cf - .")).await;
    let mounts = f.prepare("overlayfs", "a", "", Kind::Active).await;
    f.differ.apply(&namespace(), &first, mounts, false).await.expect("applied");
    f.commit("overlayfs", "a", "one").await;
    let map = "0:100000:1000";
    let labels = ["uid", "gid"].map(|kind| (format!("containerd.io/snapshot/{kind}mapping"), map.to_owned())).into();
    let new_one = New { key: "b".to_owned(), parent: "one".to_owned(), kind: Kind::Active, labels, lease: None };
    let mounts = f.differ.snapshots.prepare(&place("overlayfs"), new_one).await.expect("prepared");
    let applied = f.differ.apply(&namespace(), &second, mounts.clone(), true).await.expect("applied");
    assert_eq!(Digest::of_sha256(&applied.diff_id), second);
    let upper = mounts[0].options.iter().find_map(|option| option.strip_prefix("upperdir=")).expect("it has one");
    let stored = fs::symlink_metadata(PathBuf::from(upper).join("new")).expect("it is there");
    assert_eq!((stored.uid(), stored.gid()), (100_007, 100_008), "as a container in the user namespace writes it");
    let view = f.prepare("overlayfs", "v", "one", Kind::View).await;
    let (digest, _) = f.differ.create(&namespace(), view, mounts, new(Compression::Plain)).await.expect("created");
    let plain = f.prepare("overlayfs", "c", "one", Kind::Active).await;
    f.differ.apply(&namespace(), &digest, plain.clone(), false).await.expect("applied");
    let upper = plain[0].options.iter().find_map(|option| option.strip_prefix("upperdir=")).expect("it has one");
    let seen = fs::symlink_metadata(PathBuf::from(upper).join("new")).expect("it is there");
    assert_eq!((seen.uid(), seen.gid()), (7, 8));
    assert!(fs::symlink_metadata(PathBuf::from(upper).join("below")).is_ok_and(|whiteout| whiteout.rdev() == 0), "it is deleted there too");
    f.has_its_points_alone();
}
