use super::*;

struct Fixture {
    mounts: Mounts,
    folder: scratch::Folder,
}

impl Fixture {
    fn new(name: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return None;
        }
        let folder = scratch::Folder::new(name);
        for name in ["state", "root", "data"] {
            fs::create_dir(folder.join(name)).expect("a folder");
        }
        fs::write(folder.join("data/file"), "data").expect("a file");
        let store = Store::new(&folder);
        let mounts = Mounts::new(&folder.join("state"), &folder.join("root"), store, Pool::new("test", 2), Gate::default());
        Some(Self { mounts, folder })
    }

    fn bind(&self) -> Mount {
        let source = self.folder.join("data").display().to_string();
        Mount { r#type: "bind".to_owned(), source, target: String::new(), options: vec!["rbind".to_owned(), "ro".to_owned()] }
    }

    fn left(&self) -> usize {
        fs::read_dir(self.folder.join("state/mounts")).map_or(0, Iterator::count)
    }

    /// Labels by which an image holds it.
    fn held() -> HashMap<String, String> {
        [("containerd.io/gc.bref.image".to_owned(), "i".to_owned())].into()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        for mounted in ["data/sub", "data"] {
            let _ = nix::mount::umount2(&self.folder.join(mounted), nix::mount::MntFlags::MNT_DETACH);
        }
        for (folder, _) in self.mounts.blocking_records().unwrap_or_default() {
            let _ = blocking_undo(&folder);
        }
    }
}

fn namespace() -> Namespace {
    Namespace::parse("n").expect("a name")
}

fn asked(name: &str, mounts: Vec<Mount>, temporary: bool) -> Activation {
    Activation { name: name.to_owned(), mounts, labels: Fixture::held(), temporary, lease: None }
}

#[tokio::test]
async fn what_a_client_wants_to_look_into_is_mounted_until_it_is_deactivated() {
    let Some(f) = Fixture::new("activated") else { return };
    let info = f.mounts.activate(&namespace(), asked("a", vec![f.bind()], true)).await.expect("activated");
    let point = Path::new(&info.active[0].mount_point);
    assert_eq!(fs::read_to_string(point.join("file")).expect("it is mounted"), "data");
    fs::write(point.join("file"), "").expect_err("read-only");
    assert_eq!((info.system[0].r#type.as_str(), info.system[0].source.as_str()), ("bind", info.active[0].mount_point.as_str()));
    assert_eq!(f.mounts.info(&namespace(), "a").await.expect("there"), info);
    let again = f.mounts.activate(&namespace(), asked("a", vec![f.bind()], true)).await.expect_err("the name is taken");
    assert_eq!((again.code(), again.chain().as_str()), (tonic::Code::AlreadyExists, "mount \"a\": already exists"));
    // in use: it stays
    let used = fs::File::open(point.join("file")).expect("a file");
    assert_eq!(f.mounts.deactivate(&namespace(), "a").await.expect_err("in use").code(), tonic::Code::FailedPrecondition);
    assert_eq!(f.mounts.list(&namespace()).await.expect("a list"), std::slice::from_ref(&info));
    drop(used);
    f.mounts.deactivate(&namespace(), "a").await.expect("deactivated");
    assert_eq!((f.left(), f.folder.join("data/file").exists()), (0, true));
    assert_eq!(f.mounts.info(&namespace(), "a").await.expect_err("gone").code(), tonic::Code::NotFound);
}

#[tokio::test]
async fn mounts_that_need_no_activation_are_left_to_the_client_and_failed_ones_leave_nothing() {
    let Some(f) = Fixture::new("unneeded") else { return };
    let code = async |mounts: Vec<Mount>, temporary| {
        f.mounts.activate(&namespace(), asked("a", mounts, temporary)).await.expect_err("refused").code()
    };
    assert_eq!(code(vec![f.bind()], false).await, tonic::Code::Unimplemented);
    let nothing = Mount { source: "/nonexistent".to_owned(), ..f.bind() };
    assert_eq!(code(vec![f.bind(), nothing], true).await, tonic::Code::Internal);
    let mapped = Mount { options: vec!["uidmap=0:1:2".to_owned(), "gidmap=0:1:2".to_owned()], ..f.bind() };
    assert_eq!(code(vec![f.bind(), mapped], true).await, tonic::Code::Unimplemented);
    let outside = Mount { r#type: "mkdir/bind".to_owned(), options: vec!["X-containerd.mkdir.path=/tmp/../x".to_owned()], ..f.bind() };
    assert_eq!(code(vec![outside], true).await, tonic::Code::InvalidArgument);
    let root = format!("X-containerd.mkdir.path={}", f.folder.join("root").display());
    let itself = Mount { r#type: "mkdir/bind".to_owned(), options: vec![root], ..f.bind() };
    assert_eq!(code(vec![itself], true).await, tonic::Code::InvalidArgument);
    assert_eq!(fs::read_dir(f.folder.join("root")).expect("a folder").count(), 0);
    // from its mount point to the data
    for target in ["../../../../data", "/../../../../data", "x"] {
        let elsewhere = Mount { target: target.to_owned(), ..f.bind() };
        assert_eq!(code(vec![elsewhere], true).await, tonic::Code::Unimplemented, "{target}");
    }
    assert_eq!(f.left(), 0);
}

#[tokio::test]
async fn an_overlay_is_made_of_mounts_and_folders_that_are_made_for_it() {
    let Some(f) = Fixture::new("formatted") else { return };
    let root = f.folder.join("root").display().to_string();
    let options = [
        "lowerdir={{ mount 0 }}",
        "upperdir=ROOT/u",
        "workdir=ROOT/w",
        "X-containerd.mkdir.path=ROOT/u:0755",
        "X-containerd.mkdir.path=ROOT/w",
    ];
    let options = options.iter().map(|option| option.replace("ROOT", &root)).collect();
    let overlay = Mount { r#type: "format/mkdir/overlay".to_owned(), source: "overlay".to_owned(), target: String::new(), options };
    let info = f.mounts.activate(&namespace(), asked("a", vec![f.bind(), overlay.clone()], false)).await.expect("activated");
    assert_eq!((info.active.len(), info.system.len()), (1, 1));
    assert_eq!(info.system[0].options[0], format!("lowerdir={}", info.active[0].mount_point));
    assert!(f.folder.join("root/u").is_dir() && info.system[0].r#type == "overlay");
    let info = f.mounts.activate(&namespace(), asked("b", vec![f.bind(), overlay], true)).await.expect("all of them");
    fs::write(Path::new(&info.active[1].mount_point).join("new"), "").expect("it can be written to");
    assert!(f.folder.join("root/u/new").exists());
}

/// Mounts a tmpfs that shares what is mounted in it.
fn shared_tmpfs(at: &Path) {
    use nix::mount::{MsFlags, mount};
    let none: Option<&str> = None;
    mount(Some("x"), at, Some("tmpfs"), MsFlags::empty(), none).expect("mounted");
    mount(none, at, none, MsFlags::MS_SHARED, none).expect("shared");
}

#[tokio::test]
async fn a_tree_with_mounts_is_undone_and_stays_where_it_came_from() {
    let Some(f) = Fixture::new("recursive") else { return };
    shared_tmpfs(&f.folder.join("data"));
    fs::create_dir(f.folder.join("data/sub")).expect("a folder");
    shared_tmpfs(&f.folder.join("data/sub"));
    fs::create_dir(f.folder.join("data/sub/deep")).expect("a folder");
    shared_tmpfs(&f.folder.join("data/sub/deep"));
    // one over the other
    shared_tmpfs(&f.folder.join("data/sub/deep"));
    let kept = f.folder.join("data/sub/deep/file");
    fs::write(&kept, "kept").expect("a file");
    let info = f.mounts.activate(&namespace(), asked("a", vec![f.bind()], true)).await.expect("activated");
    let copy = Path::new(&info.active[0].mount_point).join("sub/deep/file");
    // in use: it stays
    let used = fs::File::open(&copy).expect("a file");
    assert_eq!(f.mounts.deactivate(&namespace(), "a").await.expect_err("in use").code(), tonic::Code::FailedPrecondition);
    assert_eq!((fs::read_to_string(&copy).expect("it is there"), f.left()), ("kept".to_owned(), 1));
    drop(used);
    f.mounts.deactivate(&namespace(), "a").await.expect("deactivated");
    assert_eq!((fs::read_to_string(&kept).expect("it is there"), f.left()), ("kept".to_owned(), 0));
    for mounted in ["data/sub/deep", "data/sub/deep", "data/sub", "data"] {
        nix::mount::umount2(&f.folder.join(mounted), nix::mount::MntFlags::empty()).expect("it is mounted");
    }
}

#[tokio::test]
async fn mounts_that_hang_are_waited_for_in_a_limit() {
    let Some(mut f) = Fixture::new("hanging") else { return };
    f.mounts.activate(&namespace(), asked("a", vec![f.bind()], true)).await.expect("activated");
    let (held, hold) = std::sync::mpsc::channel::<()>();
    let hold = Arc::new(Mutex::new(hold));
    let hanging: Vec<_> = (0..2)
        .map(|_| {
            let (pool, hold) = (f.mounts.pool.clone(), Arc::clone(&hold));
            tokio::spawn(async move { pool.run(move || hold.lock().expect("no panic").recv().expect_err("nothing is sent")).await })
        })
        .collect();
    while f.mounts.pool.busy() < 2 {
        tokio::task::yield_now().await;
    }
    f.mounts.limit = Duration::from_millis(20);
    for refused in [f.mounts.deactivate(&namespace(), "a").await, f.mounts.collect().await] {
        assert_eq!(refused.expect_err("no thread is free").code(), tonic::Code::ResourceExhausted);
    }
    drop(held);
    for hung in hanging {
        hung.await.expect("no panic").expect("no panic");
    }
    f.mounts.limit = LIMIT;
    f.mounts.deactivate(&namespace(), "a").await.expect("deactivated");
}

#[tokio::test]
async fn a_collection_leaves_what_has_changed_since_it_looked() {
    let Some(f) = Fixture::new("changed") else { return };
    f.mounts.activate(&namespace(), asked("a", vec![f.bind()], true)).await.expect("activated");
    let (folder, seen) = f.mounts.blocking_records().expect("records").remove(0);
    f.mounts.deactivate(&namespace(), "a").await.expect("deactivated");
    let other = f.mounts.activate(&namespace(), asked("b", vec![f.bind()], true)).await.expect("activated");
    assert_eq!(Path::new(&other.active[0].mount_point), folder.join("0"), "in the same folder");
    assert!(!f.mounts.blocking_undo_if(&folder, &seen).expect("looked at"));
    assert!(folder.join("0/file").exists());
    let (folder, seen) = f.mounts.blocking_records().expect("records").remove(0);
    assert!(f.mounts.blocking_undo_if(&folder, &seen).expect("undone") && f.left() == 0);
}

#[tokio::test]
async fn a_collection_undoes_what_nothing_holds_and_what_a_crash_has_left() {
    let Some(f) = Fixture::new("uncollected") else { return };
    let image = |db: &mut store::Meta<'_>| {
        store::namespaces::ensure(db, "n")?;
        store::images::put(db, "n", "i", &containerd_client::services::v1::Image { name: "i".to_owned(), ..Default::default() })
    };
    f.mounts.store.write(image).await.expect("room");
    f.mounts.activate(&namespace(), asked("held", vec![f.bind()], true)).await.expect("activated");
    let loose = Activation { labels: HashMap::new(), ..asked("loose", vec![f.bind()], true) };
    f.mounts.activate(&namespace(), loose.clone()).await.expect("activated");
    let no_lease = Activation { lease: Some("none".to_owned()), ..loose.clone() };
    assert_eq!(f.mounts.activate(&namespace(), no_lease).await.expect_err("no such lease").code(), tonic::Code::NotFound);
    // mounted, and then the process was killed
    let folder = f.mounts.blocking_folder().expect("a folder");
    write(&folder, &Record { namespace: unfinished("n", "c"), ..Record::default() }).expect("a record");
    fs::create_dir(folder.join("0"))
        .and_then(|()| blocking_mount(&f.bind(), &folder.join("0")).map_err(|_| io::ErrorKind::Other.into()))
        .expect("a mount");
    f.mounts.collect().await.expect("collected");
    let names: Vec<_> = f.mounts.list(&namespace()).await.expect("a list").into_iter().map(|info| info.name).collect();
    assert_eq!((names, f.left()), (vec!["held".to_owned()], 1));
    f.mounts.store.remove(|db| store::images::remove(db, "n", "i")).await.expect("removed");
    f.mounts.collect().await.expect("collected");
    assert_eq!((f.left(), fs::read_to_string(f.folder.join("data/file")).expect("it is there")), (0, "data".to_owned()));
}
