mod idmap;
mod native;

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use nix::mount::{MsFlags, mount};

use super::*;
use crate::error::Error;
use crate::layers::testing::is_root;

/// `XFS_SUPER_MAGIC`
const XFS: rustix::fs::FsWord = 0x5846_5342;

struct Fixture {
    snapshots: Snapshots,
    folder: scratch::Folder,
}

fn place(snapshotter: &str) -> Place {
    Place { namespace: "n".to_owned(), snapshotter: snapshotter.to_owned() }
}

impl Fixture {
    fn new(name: &str) -> Option<Self> {
        if !is_root() {
            return None;
        }
        let folder = scratch::Folder::new(name);
        let store = Store::new(&folder);
        let (files, removal) = (Pool::new("test", 4), Pool::new("test", 1));
        let snapshots = Snapshots::open(&folder, store, Gate::default(), files, removal).expect("a root");
        assert_eq!(snapshots.unusable(Snapshotter::Overlayfs), None);
        Some(Self { snapshots, folder })
    }

    async fn prepare(&self, snapshotter: &str, key: &str, parent: &str, kind: Kind) -> Result<Vec<Mount>> {
        let new = New { key: key.to_owned(), parent: parent.to_owned(), kind, labels: HashMap::new(), lease: None };
        self.snapshots.prepare(&place(snapshotter), new).await
    }

    async fn commit(&self, snapshotter: &str, key: &str, name: &str, parent: &str) -> Result<()> {
        let commit = Commit { key: key.to_owned(), name: name.to_owned(), parent: parent.to_owned(), labels: HashMap::new(), lease: None };
        self.snapshots.commit(&place(snapshotter), commit).await
    }

    /// A committed snapshot with one file, named as it is.
    async fn layer(&self, snapshotter: &str, name: &str, parent: &str) {
        let key = format!("active-{name}");
        let mounts = self.prepare(snapshotter, &key, parent, Kind::Active).await.expect("prepared");
        fs::write(writable(&mounts).join(name), name).expect("a file");
        self.commit(snapshotter, &key, name, "").await.expect("committed");
    }

    fn numbers(&self, snapshotter: Snapshotter) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.snapshots.base(snapshotter))
            .expect("a folder")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

/// Where files go that are made in what is mounted.
fn writable(mounts: &[Mount]) -> PathBuf {
    let [only] = mounts else { panic!("{mounts:?}") };
    let upper = only.options.iter().find_map(|option| option.strip_prefix("upperdir="));
    upper.map_or_else(|| PathBuf::from(&only.source), PathBuf::from)
}

fn options(mounts: &[Mount]) -> Vec<&str> {
    mounts[0].options.iter().map(String::as_str).filter(|option| *option != "index=off").collect()
}

fn sentence<T: std::fmt::Debug>(result: Result<T>) -> (tonic::Code, String) {
    let error = result.expect_err("refused");
    (error.code(), error.chain())
}

#[tokio::test]
async fn a_file_system_that_can_spreads_snapshots_over_the_disk() {
    let Some(f) = Fixture::new("spread") else { return };
    let base = fs::File::open(f.snapshots.base(Snapshotter::Overlayfs)).expect("a folder");
    let other = fs::File::open(&*f.folder).expect("a folder");
    let able = rustix::fs::ioctl_getflags(&other).and_then(|flags| rustix::fs::ioctl_setflags(&other, flags | rustix::fs::IFlags::TOPDIR));
    match able {
        Ok(()) => assert!(rustix::fs::ioctl_getflags(&base).expect("flags").contains(rustix::fs::IFlags::TOPDIR)),
        Err(error) => eprintln!("skipped: this file system has no such flag: {error}"),
    }
}

#[tokio::test]
async fn mounts_are_those_of_containerd() {
    let Some(f) = Fixture::new("mounts") else { return };
    let base = f.snapshots.base(Snapshotter::Overlayfs).display().to_string();
    assert_eq!(fs::metadata(&base).expect("a folder").permissions().mode() & 0o777, 0o700);
    let first = f.prepare("overlayfs", "a", "", Kind::Active).await.expect("prepared");
    assert_eq!((first[0].r#type.as_str(), &*first[0].source, options(&first)), ("bind", &*format!("{base}/1/fs"), vec!["rw", "rbind"]));
    f.commit("overlayfs", "a", "one", "").await.expect("committed");
    let second = f.prepare("overlayfs", "b", "one", Kind::Active).await.expect("prepared");
    let (work, upper) = (format!("workdir={base}/2/work"), format!("upperdir={base}/2/fs"));
    let lower = format!("lowerdir={base}/1/fs");
    assert_eq!((second[0].r#type.as_str(), options(&second)), ("overlay", vec![&*work, &upper, &lower]));
    let view = f.prepare("overlayfs", "v", "one", Kind::View).await.expect("prepared");
    assert_eq!((view[0].r#type.as_str(), &*view[0].source, options(&view)), ("bind", &*format!("{base}/1/fs"), vec!["ro", "rbind"]));
    f.commit("overlayfs", "b", "two", "").await.expect("committed");
    let view = f.prepare("overlayfs", "w", "two", Kind::View).await.expect("prepared");
    assert_eq!((view[0].r#type.as_str(), options(&view)), ("overlay", vec![&*format!("lowerdir={base}/2/fs:{base}/1/fs")]));
    assert_eq!(f.snapshots.mounts(&place("overlayfs"), "w").await.expect("there"), view);
    // it works where the client mounts it
    let point = f.folder.join("point");
    fs::create_dir(&point).expect("a folder");
    in_own_mounts(|| {
        let data = view[0].options.join(",");
        mount(Some("overlay"), &point, Some("overlay"), MsFlags::empty(), Some(&*data)).expect("an overlay");
        Ok(())
    })
    .expect("a namespace");
    let empty = f.prepare("overlayfs", "e", "", Kind::View).await.expect("prepared");
    assert_eq!(options(&empty), ["ro", "rbind"]);
}

#[tokio::test]
async fn requests_are_refused_with_containerds_codes_and_sentences() {
    use tonic::Code::{AlreadyExists, FailedPrecondition, InvalidArgument, NotFound};
    let Some(f) = Fixture::new("refused") else { return };
    f.layer("overlayfs", "one", "").await;
    f.prepare("overlayfs", "a", "one", Kind::Active).await.expect("prepared");
    f.prepare("overlayfs", "v", "one", Kind::View).await.expect("prepared");
    let at = place("overlayfs");
    for (found, code, expected) in [
        (sentence(f.prepare("overlayfs", "a", "", Kind::Active).await), AlreadyExists, "snapshot \"a\": already exists"),
        (sentence(f.prepare("overlayfs", "one", "", Kind::View).await), AlreadyExists, "snapshot \"one\": already exists"),
        (sentence(f.prepare("overlayfs", "b", "none", Kind::Active).await), NotFound, "parent snapshot none does not exist: not found"),
        (
            sentence(f.prepare("overlayfs", "b", "a", Kind::Active).await),
            InvalidArgument,
            "parent \"a\" is not committed snapshot: invalid argument",
        ),
        (sentence(f.prepare("zfs", "b", "", Kind::Active).await), InvalidArgument, "snapshotter not loaded: zfs: invalid argument"),
        (sentence(f.commit("overlayfs", "none", "x", "").await), NotFound, "snapshot none does not exist: not found"),
        (sentence(f.commit("overlayfs", "a", "one", "").await), AlreadyExists, "snapshot \"one\": already exists"),
        (sentence(f.commit("overlayfs", "v", "x", "").await), FailedPrecondition, "snapshot v is not active: failed precondition"),
        (sentence(f.commit("overlayfs", "one", "x", "").await), FailedPrecondition, "snapshot one is not active: failed precondition"),
        (sentence(f.snapshots.stat(&at, "none").await), NotFound, "snapshot none does not exist: not found"),
        (
            sentence(f.snapshots.mounts(&at, "one").await),
            FailedPrecondition,
            "requested snapshot one not active or view: failed precondition",
        ),
        (
            sentence(f.snapshots.remove(&at, "one", None).await),
            FailedPrecondition,
            "cannot remove snapshot with child: failed precondition",
        ),
        (sentence(f.snapshots.remove(&at, "none", None).await), NotFound, "snapshot none does not exist: not found"),
        (sentence(f.snapshots.stat(&place("native"), "one").await), NotFound, "snapshot one does not exist: not found"),
    ] {
        assert_eq!((found.0, found.1.as_str()), (code, expected));
    }
    // what a client asks before it fetches a layer
    let labels: HashMap<_, _> = [("containerd.io/snapshot.ref".to_owned(), "one".to_owned())].into();
    let new = New { key: "extract".to_owned(), parent: String::new(), kind: Kind::Active, labels, lease: None };
    assert_eq!(sentence(f.snapshots.prepare(&at, new.clone()).await).0, AlreadyExists);
    let (error, _) = (sentence(f.snapshots.prepare(&at, New { lease: Some("none".to_owned()), labels: HashMap::new(), ..new }).await), ());
    assert_eq!(error, (NotFound, "lease does not exist: not found".to_owned()));
    assert_eq!(f.numbers(Snapshotter::Overlayfs).len(), 3, "what was refused has left nothing");
}

#[tokio::test]
async fn a_snapshot_is_measured_when_it_is_committed() {
    let Some(f) = Fixture::new("usage") else { return };
    let at = place("overlayfs");
    let mounts = f.prepare("overlayfs", "a", "", Kind::Active).await.expect("prepared");
    let tree = writable(&mounts);
    let empty = f.snapshots.usage(&at, "a").await.expect("measured");
    assert_eq!(empty.inodes, 1);
    fs::write(tree.join("file"), [7; 10_000]).expect("a file");
    fs::hard_link(tree.join("file"), tree.join("link")).expect("a link");
    fs::File::create(tree.join("hole")).and_then(|file| file.set_len(1 << 30)).expect("a file");
    let full = f.snapshots.usage(&at, "a").await.expect("measured");
    assert_eq!((full.inodes, full.bytes - empty.bytes), (3, 12_288));
    f.commit("overlayfs", "a", "one", "").await.expect("committed");
    fs::remove_file(tree.join("hole")).expect("removed");
    assert_eq!(f.snapshots.usage(&at, "one").await.expect("recorded").inodes, 3);
    f.prepare("overlayfs", "v", "one", Kind::View).await.expect("prepared");
    assert_eq!(f.snapshots.usage(&at, "v").await.expect("a view has nothing"), Usage::default());
}

#[tokio::test]
async fn a_native_snapshot_is_a_copy_of_its_parent() {
    let Some(f) = Fixture::new("native") else { return };
    let first = f.prepare("native", "a", "", Kind::Active).await.expect("prepared");
    let tree = writable(&first);
    fs::create_dir(tree.join("d")).expect("a folder");
    fs::write(tree.join("d/file"), "data").expect("a file");
    fs::hard_link(tree.join("d/file"), tree.join("link")).expect("a link");
    fs::set_permissions(&tree, fs::Permissions::from_mode(0o1711)).expect("a mode");
    std::os::unix::fs::symlink("d/file", tree.join("soft")).expect("a link");
    f.commit("native", "a", "one", "").await.expect("committed");
    let second = f.prepare("native", "b", "one", Kind::Active).await.expect("prepared");
    let copy = writable(&second);
    assert_ne!(copy, tree);
    let about = |path: &Path| fs::symlink_metadata(path).expect("it is there");
    let file = about(&copy.join("d/file"));
    assert_eq!((file.ino(), file.nlink()), (about(&copy.join("link")).ino(), 2));
    let original = about(&tree.join("d/file"));
    assert_eq!((file.mtime(), file.mtime_nsec()), (original.mtime(), original.mtime_nsec()));
    assert_eq!((about(&copy).mode() & 0o7777, about(&copy.join("soft")).is_symlink()), (0o1711, true));
    fs::write(copy.join("d/file"), "other").expect("a change");
    assert_eq!(fs::read_to_string(tree.join("d/file")).expect("the parent's"), "data");
    let view = f.prepare("native", "v", "one", Kind::View).await.expect("prepared");
    assert_eq!((&*view[0].source, options(&view)), (&*tree.display().to_string(), vec!["ro", "rbind"]));
}

#[tokio::test]
async fn folders_go_with_their_snapshots_and_what_a_crash_has_left_goes_too() {
    let Some(f) = Fixture::new("removal") else { return };
    f.layer("overlayfs", "one", "").await;
    f.layer("overlayfs", "two", "one").await;
    let at = place("overlayfs");
    f.snapshots.remove(&at, "two", None).await.expect("removed");
    scratch_eventually(|| f.numbers(Snapshotter::Overlayfs) == ["1"]).await;
    let base = f.snapshots.base(Snapshotter::Overlayfs);
    // named and never recorded, half made, half removed, and what is not ours
    for left in ["2", "7/fs/d", "new-1-1/fs", "rm-1-1-5/fs", "lost+found", "007"] {
        fs::create_dir_all(base.join(left)).expect("a folder");
    }
    // a number that was never recorded is used again
    fs::create_dir_all(base.join("3/old")).expect("a folder");
    f.layer("overlayfs", "three", "one").await;
    assert!(!base.join("3/old").exists() && base.join("3/fs/three").exists());
    f.snapshots.cleanup(Snapshotter::Overlayfs).await.expect("cleaned");
    assert_eq!(f.numbers(Snapshotter::Overlayfs), ["007", "1", "3", "lost+found"]);
}

async fn scratch_eventually(mut is_true: impl FnMut() -> bool) {
    for _attempt in 0..30_000 {
        if is_true() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    panic!("not within a minute");
}

/// What is mounted in a snapshot's folder keeps its files, and the folder is removed later.
#[tokio::test]
async fn a_mount_in_a_removed_snapshot_keeps_its_files() {
    let Some(f) = Fixture::new("busy") else { return };
    let mounts = f.prepare("overlayfs", "a", "", Kind::Active).await.expect("prepared");
    let (tree, host) = (writable(&mounts), f.folder.join("host"));
    for path in [&host, &tree.join("in")] {
        fs::create_dir(path).expect("a folder");
    }
    fs::write(host.join("precious"), "data").expect("a file");
    let removed = in_own_mounts(|| {
        let none: Option<&str> = None;
        mount(Some(&host), &tree.join("in"), none, MsFlags::MS_BIND, none).expect("a bind mount");
        let folder = tree.parent().expect("a parent");
        Ok(folders::blocking_remove(folder).map_err(|error| error.chain()))
    });
    let error = removed.expect("a namespace").expect_err("something is mounted");
    assert!(error.contains("Invalid cross-device link"), "{error}");
    assert_eq!(fs::read_to_string(host.join("precious")).expect("it is there"), "data");
    folders::blocking_remove(tree.parent().expect("a parent")).expect("nothing is mounted here");
}

#[tokio::test]
async fn a_snapshot_whose_folder_is_gone_says_so() {
    let Some(f) = Fixture::new("gone") else { return };
    f.layer("overlayfs", "one", "").await;
    f.prepare("overlayfs", "a", "one", Kind::Active).await.expect("prepared");
    fs::remove_dir_all(f.snapshots.tree(Snapshotter::Overlayfs, 1)).expect("removed");
    for result in [f.snapshots.mounts(&place("overlayfs"), "a").await, f.prepare("overlayfs", "b", "one", Kind::View).await] {
        let (code, sentence) = sentence(result);
        assert_eq!(code, tonic::Code::FailedPrecondition);
        assert!(sentence.contains("1/fs is gone"), "{sentence}");
    }
}

#[tokio::test]
async fn twenty_clients_unpack_one_chain_and_one_of_them_wins() {
    let Some(f) = Fixture::new("twenty") else { return };
    let (f, mut tasks) = (Arc::new(f), tokio::task::JoinSet::new());
    for number in 0..20 {
        let f = Arc::clone(&f);
        tasks.spawn(async move {
            let key = format!("extract-{number}");
            f.prepare("overlayfs", &key, "", Kind::Active).await.expect("prepared");
            match f.commit("overlayfs", &key, "chain", "").await {
                Ok(()) => true,
                Err(Error::AlreadyExists(_)) => {
                    f.snapshots.remove(&place("overlayfs"), &key, None).await.expect("removed");
                    f.snapshots.stat(&place("overlayfs"), "chain").await.expect("it is there");
                    false
                }
                Err(error) => panic!("{}", error.chain()),
            }
        });
    }
    assert_eq!(tasks.join_all().await.into_iter().filter(|won| *won).count(), 1);
}

#[tokio::test]
async fn a_parent_given_at_the_commit_puts_its_folders_right() {
    let Some(f) = Fixture::new("rebase") else { return };
    let below = writable(&f.prepare("overlayfs", "a", "", Kind::Active).await.expect("prepared"));
    fs::create_dir(below.join("d")).expect("a folder");
    fs::write(below.join("gone"), "").expect("a file");
    fs::set_permissions(below.join("d"), fs::Permissions::from_mode(0o1777)).expect("a mode");
    f.commit("overlayfs", "a", "one", "").await.expect("committed");
    let upper = writable(&f.prepare("overlayfs", "b", "", Kind::Active).await.expect("prepared"));
    fs::create_dir(upper.join("d")).expect("a folder");
    f.snapshots.blocking_note(&upper, &[b"d".to_vec()]).expect("noted");
    let whiteout = |path: PathBuf| {
        nix::sys::stat::mknod(&path, nix::sys::stat::SFlag::S_IFCHR, nix::sys::stat::Mode::empty(), 0).expect("a whiteout");
    };
    whiteout(upper.join("gone"));
    whiteout(upper.join("d/none"));
    f.commit("overlayfs", "b", "two", "one").await.expect("committed");
    assert_eq!(fs::metadata(upper.join("d")).expect("a folder").permissions().mode() & 0o7777, 0o1777);
    assert!(upper.join("gone").symlink_metadata().is_ok(), "whiteouts hide what the parent has");
    assert!(upper.join("d/none").symlink_metadata().is_err(), "one that hides nothing would be seen in a list");
    assert_eq!(f.snapshots.stat(&place("overlayfs"), "two").await.expect("there").parent, "one");
    let lowest = writable(&f.prepare("overlayfs", "c", "", Kind::Active).await.expect("prepared"));
    whiteout(lowest.join("gone"));
    f.commit("overlayfs", "c", "three", "").await.expect("committed");
    assert!(lowest.join("gone").symlink_metadata().is_err(), "there is nothing to hide");
}

#[tokio::test]
async fn more_layers_than_the_kernel_takes_are_refused_when_a_snapshot_is_made() {
    let Some(f) = Fixture::new("deep") else { return };
    let insert = |db: &mut Meta<'_>| {
        let (at, mut parent) = (place("overlayfs"), None);
        for number in 0..=500 {
            let (key, name) = (format!("key-{number}"), format!("chain-{number}"));
            let id = store::snapshots::insert(db, &at, &key, parent, Kind::Active, &HashMap::new())?;
            store::snapshots::commit(db, &at, id, &name, parent, None, &HashMap::new())?;
            parent = Some(id);
        }
        Ok(())
    };
    f.snapshots.store.write(insert).await.expect("room");
    let (code, sentence) = sentence(f.prepare("overlayfs", "a", "chain-500", Kind::Active).await);
    assert_eq!((code, sentence.contains("the kernel's overlayfs takes 500")), (tonic::Code::FailedPrecondition, true), "{sentence}");
    let (_, sentence) = self::sentence(f.prepare("overlayfs", "a", "chain-499", Kind::Active).await);
    assert!(sentence.contains("is gone"), "500 are not too many: {sentence}");
}

#[test]
fn a_file_system_that_takes_no_overlay_is_noticed() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: mounting needs root");
        return;
    }
    let folder = scratch::Folder::new("probe");
    for name in ["lower", "upper", "work", "point"] {
        fs::create_dir(folder.join(name)).expect("a folder");
    }
    assert_eq!(overlay::blocking_probe(&folder.join("snapshots")), Ok(()));
    let on_overlay = in_own_mounts(|| {
        let at = |name: &str| folder.join(name).display().to_string();
        let data = format!("lowerdir={},upperdir={},workdir={}", at("lower"), at("upper"), at("work"));
        mount(Some("overlay"), &folder.join("point"), Some("overlay"), MsFlags::empty(), Some(&*data)).expect("an overlay");
        Ok(overlay::blocking_probe(&folder.join("point/snapshots")))
    });
    let why = on_overlay.expect("a namespace").expect_err("an overlay on an overlay");
    assert!(why.contains("mount an overlay at"), "{why}");
    assert!(!folder.join("check").exists() && !folder.join("upper/check").exists());
}

#[tokio::test]
async fn a_folder_that_a_crash_has_left_is_cleaned_up_without_the_snapshot_that_gets_its_number() {
    let Some(f) = Fixture::new("number") else { return };
    // named, and then the process was killed before the row was written
    fs::create_dir_all(f.snapshots.folder(Snapshotter::Overlayfs, 1).join("fs/left")).expect("a folder");
    let removal = f.snapshots.removal.clone();
    let (end, ends) = std::sync::mpsc::channel::<()>();
    let other = tokio::spawn({
        let removal = removal.clone();
        async move { removal.run(move || ends.recv()).await }
    });
    while removal.busy() == 0 {
        tokio::task::yield_now().await;
    }
    let cleanup = tokio::spawn({
        let snapshots = f.snapshots.clone();
        async move { snapshots.cleanup(Snapshotter::Overlayfs).await }
    });
    while removal.waiting() == 0 {
        tokio::task::yield_now().await;
    }
    let mounts = f.prepare("overlayfs", "a", "", Kind::Active).await.expect("prepared");
    assert!(mounts[0].source.ends_with("/1/fs"), "{mounts:?}");
    fs::write(writable(&mounts).join("file"), "").expect("a file");
    end.send(()).expect("it waits");
    other.await.expect("no panic").expect("no panic").expect("sent");
    cleanup.await.expect("no panic").expect("cleaned up");
    assert!(writable(&mounts).join("file").exists());
    assert_eq!(f.numbers(Snapshotter::Overlayfs), ["1"]);
}

#[tokio::test]
async fn no_call_waits_for_the_measuring_of_a_snapshot_in_use_which_ends_with_its_caller() {
    let Some(f) = Fixture::new("measuring") else { return };
    let (pool, at) = (f.snapshots.usage.clone(), place("overlayfs"));
    f.layer("overlayfs", "one", "").await;
    let mounts = f.prepare("overlayfs", "a", "one", Kind::Active).await.expect("prepared");
    // another measures a large tree
    let (end, ends) = std::sync::mpsc::channel::<()>();
    let other = tokio::spawn({
        let pool = pool.clone();
        async move { pool.run(move || ends.recv()).await }
    });
    while pool.busy() == 0 {
        tokio::task::yield_now().await;
    }
    let usage = tokio::spawn({
        let (snapshots, at) = (f.snapshots.clone(), at.clone());
        async move { snapshots.usage(&at, "a").await }
    });
    while pool.waiting() == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(f.snapshots.usage(&at, "one").await.expect("it was recorded").inodes, 2);
    f.snapshots.mounts(&at, "a").await.expect("mounts");
    f.prepare("overlayfs", "b", "one", Kind::Active).await.expect("prepared");
    f.commit("overlayfs", "b", "two", "").await.expect("committed");
    usage.abort();
    assert!(usage.await.expect_err("its client has left").is_cancelled());
    assert_eq!(pool.waiting(), 0);
    end.send(()).expect("it waits");
    other.await.expect("no panic").expect("no panic").expect("sent");
    fs::write(writable(&mounts).join("file"), "").expect("a file");
    let cancel = Cancel::default();
    drop(cancel.guard());
    let measured = layers::measure(&writable(&mounts), Beneath::Known, &cancel);
    measured.expect_err("it was cancelled");
}

#[tokio::test]
async fn a_snapshot_that_is_committed_twice_at_once_is_committed_once() {
    let Some(f) = Fixture::new("commits") else { return };
    let f = Arc::new(f);
    for round in 0..10 {
        let key = format!("key-{round}");
        let tree = writable(&f.prepare("overlayfs", &key, "", Kind::Active).await.expect("prepared"));
        fs::write(tree.join("file"), "data").expect("a file");
        let mut commits = tokio::task::JoinSet::new();
        for number in 0..4 {
            let (f, key) = (Arc::clone(&f), key.clone());
            commits.spawn(async move {
                f.commit("overlayfs", &key, &format!("chain-{round}-{}", number % 2), "").await.map_err(|error| error.code())
            });
        }
        let mut results = commits.join_all().await;
        results.sort_by_key(Result::is_err);
        assert_eq!(results[0], Ok(()));
        for late in &results[1..] {
            assert!(matches!(late, Err(tonic::Code::NotFound | tonic::Code::AlreadyExists)), "{results:?}");
        }
    }
    // the second waits for the first: it does not touch the files of what is committed
    let tree = writable(&f.prepare("overlayfs", "last", "", Kind::Active).await.expect("prepared"));
    fs::write(tree.join("file"), "data").expect("a file");
    let number = f.snapshots.chain(&place("overlayfs"), "last").await.expect("there").snapshot.id;
    let turn = f.snapshots.committing.take(number).await;
    let commit = tokio::spawn({
        let f = Arc::clone(&f);
        async move { f.commit("overlayfs", "last", "late", "").await }
    });
    let (pool, deadline) = (f.snapshots.files.clone(), std::time::Instant::now() + std::time::Duration::from_millis(50));
    while std::time::Instant::now() < deadline {
        assert_eq!(pool.busy(), 0, "it works on the files");
        tokio::task::yield_now().await;
    }
    drop(turn);
    commit.await.expect("no panic").expect("it is the only one now");
}

#[tokio::test]
async fn layers_that_cannot_be_recorded_leave_no_folders() {
    let Some(f) = Fixture::new("unrecorded") else { return };
    let mut layers = Vec::new();
    for key in ["one", "two"] {
        let draft = f.snapshots.draft(Snapshotter::Overlayfs, None).await.expect("a draft");
        layers.push(NewLayer { draft, key: key.to_owned(), labels: HashMap::new(), implicit: Vec::new(), usage: None });
    }
    let fail = |_: &mut Meta<'_>| Err(Error::Exhausted("as the test wants".to_owned()));
    let error = f.snapshots.record(&place("overlayfs"), None, layers, None, fail).await.expect_err("it cannot be recorded");
    assert_eq!(error.to_string(), "as the test wants");
    scratch_eventually(|| f.numbers(Snapshotter::Overlayfs).is_empty()).await;
    f.layer("overlayfs", "three", "").await;
    assert_eq!(f.numbers(Snapshotter::Overlayfs), ["1"]);
}

#[tokio::test]
async fn a_file_that_cannot_be_removed_is_removed_later_and_keeps_no_other() {
    let Some(f) = Fixture::new("immutable") else { return };
    let at = place("overlayfs");
    for key in ["a", "b"] {
        f.prepare("overlayfs", key, "", Kind::Active).await.expect("prepared");
    }
    let tree = f.snapshots.tree(Snapshotter::Overlayfs, 1);
    fs::write(tree.join("file"), "").expect("a file");
    let set = |flags| {
        let found = fs::read_dir(f.snapshots.base(Snapshotter::Overlayfs)).expect("a folder").next()?.ok()?.path().join("fs/file");
        rustix::fs::ioctl_setflags(fs::File::open(found).ok()?, flags).ok()
    };
    let file = fs::File::open(tree.join("file")).expect("a file");
    if rustix::fs::ioctl_setflags(&file, rustix::fs::IFlags::IMMUTABLE).is_err() {
        eprintln!("skipped: this file system has no immutable files");
        return;
    }
    for key in ["a", "b"] {
        f.snapshots.remove(&at, key, None).await.expect("removed");
    }
    scratch_eventually(|| f.numbers(Snapshotter::Overlayfs).len() == 1 && f.snapshots.has_left.load(std::sync::atomic::Ordering::Relaxed))
        .await;
    assert!(crate::gc::Snapshotters::take_left(&f.snapshots) && !crate::gc::Snapshotters::take_left(&f.snapshots));
    f.snapshots.cleanup(Snapshotter::Overlayfs).await.expect("it goes on");
    let is_still_left = crate::gc::Snapshotters::take_left(&f.snapshots);
    set(rustix::fs::IFlags::empty()).expect("it is there");
    assert!(is_still_left);
    f.snapshots.cleanup(Snapshotter::Overlayfs).await.expect("cleaned up");
    assert!(f.numbers(Snapshotter::Overlayfs).is_empty() && !crate::gc::Snapshotters::take_left(&f.snapshots));
}

/// A file system on a disk that is full before it is: what it was given and cannot write is an error later.
struct Failing {
    folder: scratch::Folder,
}

impl Failing {
    fn new() -> Self {
        let this = Self { folder: scratch::Folder::new("failing") };
        this.run("mkdir memory disk && mount -t tmpfs -o size=16m none memory && truncate -s 128m memory/file");
        this.run("mkfs.ext4 -q -O ^has_journal -E lazy_itable_init=1 memory/file && mount -o loop,errors=continue memory/file disk");
        this
    }

    fn run(&self, script: &str) {
        let ran = std::process::Command::new("sh").args(["-ec", script]).current_dir(&*self.folder).output().expect("a shell");
        assert!(ran.status.success(), "{script}: {}", String::from_utf8_lossy(&ran.stderr));
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        let script = "umount -l disk; umount -l memory";
        let _ = std::process::Command::new("sh").args(["-c", script]).current_dir(&*self.folder).output();
    }
}

#[tokio::test]
async fn a_commit_learns_of_files_that_were_not_written_though_another_was_told_first() {
    if !nix::unistd::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
        eprintln!("skipped: a file system that fails needs root and loop devices");
        return;
    }
    let failing = Failing::new();
    let store = Store::new(&failing.folder);
    let disk = failing.folder.join("disk");
    let snapshots = Snapshots::open(&disk, store, Gate::default(), Pool::new("test", 4), Pool::new("test", 1)).expect("a root");
    let new = New { key: "a".to_owned(), parent: String::new(), kind: Kind::Active, labels: HashMap::new(), lease: None };
    let mounts = snapshots.prepare(&place("overlayfs"), new).await.expect("prepared");
    let tree = PathBuf::from(&mounts[0].source);
    snapshots.blocking_begin(&tree).expect("a folder");
    fs::write(tree.join("file"), vec![7; 40 << 20]).expect("it is in memory");
    let told = rustix::fs::syncfs(fs::File::open(&disk).expect("a folder"));
    assert!(told.is_err(), "the disk is full");
    let commit = Commit { key: "a".to_owned(), name: "b".to_owned(), parent: String::new(), labels: HashMap::new(), lease: None };
    snapshots.commit(&place("overlayfs"), commit).await.expect_err("its file is lost");
}

#[tokio::test]
async fn a_snapshot_that_cannot_be_bounded_is_not_made_and_the_error_says_what_is_missing() {
    let Some(f) = Fixture::new("unbounded") else { return };
    let prepare = async |snapshotter: &str, limit: &str, kind| {
        let labels = HashMap::from([(quota::LABEL.to_owned(), limit.to_owned())]);
        let new = New { key: "a".to_owned(), parent: String::new(), kind, labels, lease: None };
        f.snapshots.prepare(&place(snapshotter), new).await
    };
    let (code, text) = sentence(prepare("overlayfs", "much", Kind::Active).await);
    assert!(code == tonic::Code::InvalidArgument && text.contains("much") && text.contains("10g"), "{text}");
    let (code, text) = sentence(prepare("native", "10g", Kind::Active).await);
    assert!(code == tonic::Code::Unimplemented && text.contains("native"), "{text}");
    let base = f.snapshots.base(Snapshotter::Overlayfs);
    if crate::sys::quota::is_enforced(fs::File::open(&base).expect("a folder")).expect("it is known") {
        eprintln!("skipped: this file system bounds projects");
        return;
    }
    let (code, text) = sentence(prepare("overlayfs", "10g", Kind::Active).await);
    assert!(code == tonic::Code::FailedPrecondition && text.contains("prjquota") && text.contains(&base.display().to_string()), "{text}");
    assert_eq!((f.numbers(Snapshotter::Overlayfs), f.snapshots.stat(&place("overlayfs"), "a").await.is_err()), (Vec::new(), true));
    prepare("overlayfs", "10g", Kind::View).await.expect("nothing is written to a view");
}

/// `make test-quota` runs it where projects are bounded, and sets `X_BOUNDED`.
#[tokio::test]
async fn a_bounded_snapshot_takes_no_more_and_its_bound_goes_with_it() {
    let Some(f) = Fixture::new("bounded") else { return };
    let base = f.snapshots.base(Snapshotter::Overlayfs);
    if !crate::sys::quota::is_enforced(fs::File::open(&base).expect("a folder")).expect("it is known") {
        assert!(std::env::var_os("X_BOUNDED").is_none(), "this file system bounds no projects");
        eprintln!("skipped: this file system bounds no projects");
        return;
    }
    // to xfs, a project is a small file system: it is full
    let is_xfs = rustix::fs::statfs(&base).expect("a folder").f_type == XFS;
    let full = if is_xfs { nix::libc::ENOSPC } else { nix::libc::EDQUOT };
    f.layer("overlayfs", "layer", "").await;
    let labels = HashMap::from([(quota::LABEL.to_owned(), "1m".to_owned())]);
    let new = New { key: "a".to_owned(), parent: "layer".to_owned(), kind: Kind::Active, labels, lease: None };
    let mounts = f.snapshots.prepare(&place("overlayfs"), new).await.expect("prepared");
    let other = f.prepare("overlayfs", "b", "layer", Kind::Active).await.expect("prepared");
    let point = f.folder.join("point");
    fs::create_dir(&point).expect("a folder");
    // as a container writes
    let written = in_own_mounts(|| {
        let data = mounts[0].options.join(",");
        mount(Some("overlay"), &point, Some("overlay"), MsFlags::empty(), Some(&*data)).expect("an overlay");
        fs::rename(point.join("layer"), point.join("moved")).expect("it is copied up");
        fs::create_dir(point.join("deep")).expect("a folder");
        let mut large = fs::File::create(point.join("deep/large")).expect("a file");
        // xfs writes all of a part or nothing
        let refused = (0..64).find_map(|_| large.write_all(&[7; 64 << 10]).err()).expect("4 MiB are too much");
        assert_eq!(refused.raw_os_error(), Some(full), "{refused}");
        Ok(fs::metadata(point.join("deep/large")).expect("its beginning").len())
    });
    let written = written.expect("a namespace");
    assert!(written > 512 << 10 && written <= 1 << 20, "{written}");
    let usage = f.snapshots.usage(&place("overlayfs"), "a").await.expect("counted");
    assert!(usage.bytes >= i64::try_from(written).expect("small") && usage.bytes <= 1 << 20, "{usage:?}");
    assert!(usage.inodes >= 4, "{usage:?}");
    fs::write(writable(&other).join("large"), vec![7; 4 << 20]).expect("it is not bounded");
    // what is left of the project is nothing
    let project = quota::blocking_project(&base.join("2")).expect("a project");
    let used = || crate::sys::quota::used(fs::File::open(&base).expect("a folder"), project).expect("it is known");
    assert_eq!(used().limit_bytes, 1 << 20);
    f.snapshots.remove(&place("overlayfs"), "a", None).await.expect("removed");
    let gone = async {
        while used() != crate::sys::quota::Used::default() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(std::time::Duration::from_secs(60), gone).await.is_ok(), "{:?}", used());
    println!("bounded on {}: {written} bytes were written, {usage:?}", if is_xfs { "xfs" } else { "another file system" });
}
