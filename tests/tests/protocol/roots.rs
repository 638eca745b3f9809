//! Where the native engine's containers have their root file systems mounted.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::types::mount::Mount;
use shim_tests::bundle::{Bundle, leave};
use shim_tests::eventually::{SOON, eventually_true};
use shim_tests::proc;
use shim_tests::rootfs;
use shim_tests::stand::Stand;
use shim_tests::suite::Runtime;
use shim_tests::ttrpc::{Code, refusal};

fn native(stand: &Stand) -> Result<Stand> {
    Stand::with_engine(stand.shim(), &stand.program(""), Path::new(Runtime::Native.name()))
}

/// The lines of the host's table of mounts that name a bundle.
fn on_host(bundle: &Path) -> Result<Vec<String>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let name = bundle.display().to_string();
    Ok(mounts.lines().filter(|line| line.contains(&name)).map(str::to_owned).collect())
}

/// The type of the file system that a process has as its root.
fn kind_of_root(pid: u32) -> Result<String> {
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let root = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/")).context("no root")?;
    Ok(root.split(" - ").nth(1).and_then(|text| text.split(' ').next()).context("no type")?.to_owned())
}

fn overlay(stand: &Stand, id: &str) -> Result<Mount> {
    let folder = |name: &str| -> Result<String> {
        let path = stand.folder().join(format!("{id}-{name}"));
        fs::create_dir_all(&path)?;
        Ok(path.display().to_string())
    };
    Ok(Mount {
        type_: "overlay".to_owned(),
        source: "overlay".to_owned(),
        options: vec![
            "index=off".to_owned(),
            "volatile".to_owned(),
            format!("workdir={}", folder("work")?),
            format!("upperdir={}", folder("upper")?),
            format!("lowerdir={}", rootfs::shared()?.display()),
        ],
        ..Mount::default()
    })
}

/// As a snapshotter gives them, a folder without one, and what hooks of later kinds do not need.
pub(crate) async fn the_host_does_not_see_the_root_of_a_native_container(stand: Stand) -> Result<()> {
    let stand = native(&stand)?;
    let later = |bundle: Bundle| {
        ["startContainer", "poststart", "poststop"]
            .into_iter()
            .fold(bundle, |bundle, kind| bundle.spec(|spec| spec.hook(kind, "/bin/true", &["true"])))
    };
    for id in ["bind", "overlay", "hooks", "user"] {
        let mut bundle = stand.bundle(id, &["sh", "-c", "echo > /root/made; exec sleep 1000"]);
        if id != "bind" {
            bundle = bundle.mounts(vec![overlay(&stand, id)?]);
        }
        match id {
            "hooks" => bundle = later(bundle),
            "user" => bundle = bundle.spec(|spec| spec.user_namespace(100_000)),
            _ => {}
        }
        let container = bundle.create().await?;
        ensure!(on_host(&container.bundle.folder)?.is_empty(), "{id}, created: {:?}", on_host(&container.bundle.folder)?);
        container.start().await?;
        ensure!(container.run("e", &["sh", "-c", "test -e /bin/busybox && exit 6"]).await? == 6, "{id}");
        ensure!(on_host(&container.bundle.folder)?.is_empty(), "{id}: {:?}", on_host(&container.bundle.folder)?);
        let folder = container.bundle.folder.join("rootfs");
        ensure!(fs::read_dir(&folder)?.count() == 0, "{id}: the folder of the bundle is not empty");
        if id != "bind" {
            ensure!(kind_of_root(container.pid)? == "overlay", "{id}");
        }
        // Root of a user namespace may not write here.
        if id == "overlay" {
            eventually_true("it is written", SOON, || stand.folder().join(format!("{id}-upper/root/made")).exists()).await?;
        }
        ensure!(container.shut_down().await? == 137);
        // A daemon removes the folder like this.
        fs::remove_dir(&folder)?;
    }
    Ok(())
}

pub(crate) async fn a_hook_that_looks_for_the_root_on_the_host_finds_it(stand: Stand) -> Result<()> {
    let stand = native(&stand)?;
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let bundle = stand.bundle(kind, &["sleep", "1000"]);
        let program = bundle.folder.join("rootfs/bin/busybox").display().to_string();
        let container = bundle.spec(|spec| spec.hook(kind, "/bin/sh", &["sh", "-c", &format!("test -e {program}")])).run().await?;
        ensure!(on_host(&container.bundle.folder)?.len() == 1, "{kind}: {:?}", on_host(&container.bundle.folder)?);
        ensure!(container.shut_down().await? == 137);
        ensure!(on_host(&container.bundle.folder)?.is_empty(), "{kind} is left: {:?}", on_host(&container.bundle.folder)?);
    }
    Ok(())
}

/// Options of the programs that mount, not of the kernel; and mounts below the root.
pub(crate) async fn a_root_that_the_kernel_alone_cannot_mount_is_mounted_on_the_host(stand: Stand) -> Result<()> {
    let stand = native(&stand)?;
    let bind = |target: &str, options: &[&str]| -> Result<Mount> {
        let options = options.iter().map(|&option| option.to_owned()).collect();
        let (type_, source) = ("bind".to_owned(), rootfs::shared()?.display().to_string());
        Ok(Mount { type_, source, target: target.to_owned(), options, ..Mount::default() })
    };
    let cases = [
        ("staged", vec![bind("", &["rbind", "rw"])?, bind("/mnt", &["rbind"])?], 2),
        ("mapped", vec![bind("", &["rbind", "uidmap=0:0:1000", "gidmap=0:0:1000"])?], 1),
        ("shared", vec![bind("", &["rbind", "rslave"])?], 1),
    ];
    for (id, mounts, count) in cases {
        let container = stand.bundle(id, &["sleep", "1000"]).mounts(mounts).run().await?;
        ensure!(on_host(&container.bundle.folder)?.len() == count, "{id}: {:?}", on_host(&container.bundle.folder)?);
        ensure!(container.shut_down().await? == 137);
        ensure!(on_host(&container.bundle.folder)?.is_empty(), "{id} is left: {:?}", on_host(&container.bundle.folder)?);
    }
    // Nothing to mount: the folder is the root.
    let bundle = stand.bundle("own", &["sh", "-c", "test -e /bin/busybox"]).mounts(Vec::new());
    bundle.write()?;
    fs::remove_dir(bundle.folder.join("rootfs"))?;
    rootfs::make(&bundle.folder.join("rootfs"))?;
    let container = bundle.run().await?;
    ensure!(container.finish().await? == 0);
    leave(&container.task, container.shim_pid()?, "own").await
}

/// As with an OCI runtime: the code and the text do not depend on where it is mounted.
pub(crate) async fn a_root_that_cannot_be_mounted_is_named_wherever_it_is(stand: Stand) -> Result<()> {
    let engines = [stand.clone(), native(&stand)?];
    for stand in engines {
        for (kind, source) in [("bind", "/no/such/folder"), ("no-such-type", "/no/such/device")] {
            let bundle = stand.bundle(kind, &["true"]);
            bundle.write()?;
            let mount = Mount { type_: kind.to_owned(), source: source.to_owned(), options: vec!["ro".to_owned()], ..Mount::default() };
            let task = bundle.shim().await?;
            let request = api::CreateTaskRequest { rootfs: vec![mount], ..bundle.request() };
            let (code, message) = refusal(task.create(&request).await)?;
            let expected = format!("mount {kind} from {source:?} at {}: ", bundle.folder.join("rootfs").display());
            ensure!(code == Code::Internal && message.starts_with(&expected), "{code:?} {message}");
            let why = message.trim_start_matches(&expected).to_lowercase();
            ensure!(why.contains("no such "), "{message}");
            ensure!(on_host(&bundle.folder)?.is_empty(), "{:?}", on_host(&bundle.folder)?);
            ensure!(refusal(task.state(kind, "").await)?.0 == Code::NotFound);
            leave(&task, bundle.shim_pid()?, kind).await?;
        }
    }
    Ok(())
}

/// The keeper is killed with a container in each state; none has anything on the host.
pub(crate) async fn delete_removes_a_native_container_whose_root_the_host_never_saw(stand: Stand) -> Result<()> {
    let stand = native(&stand)?;
    for id in ["created", "running", "exited"] {
        let container = stand.bundle(id, &["sh", "-c", if id == "exited" { "exit 3" } else { "exec sleep 1000" }]);
        let container = container.mounts(vec![overlay(&stand, id)?]).create().await?;
        if id != "created" {
            container.start().await?;
        }
        if id == "exited" {
            ensure!(container.task.wait(id, "").await? == 3);
        }
        let shim = container.shim_pid()?;
        proc::kill_hard(shim);
        eventually_true("the shim is dead", SOON, || !proc::is_alive(shim)).await?;
        let deleted = container.bundle.delete_command().await?;
        ensure!(deleted.exit_status == if id == "exited" { 3 } else { 137 }, "{id}: {deleted:?}");
        ensure!(!proc::is_alive(container.pid.cast_signed()), "{id}: init is alive");
        // The folders can be mounted again, by another container of the same name; the kernel refuses those of a volatile mount.
        fs::remove_dir_all(&container.bundle.folder)?;
        fs::remove_dir_all(stand.folder().join(format!("{id}-work")))?;
        let again = stand.bundle(id, &["sh", "-c", "exit 4"]).mounts(vec![overlay(&stand, id)?]).run().await?;
        ensure!(again.finish().await? == 4);
        leave(&again.task, again.shim_pid()?, id).await?;
    }
    Ok(())
}

/// A hook on the host side of a container's making, which nothing but the keeper knows.
pub(crate) async fn delete_removes_a_container_whose_keeper_was_killed_during_a_hook(stand: Stand) -> Result<()> {
    let stand = native(&stand)?;
    for (id, kind) in [("host", "createRuntime"), ("container", "createContainer"), ("shared", "createContainer")] {
        let marker = stand.folder().join(format!("{id}-marker"));
        let script = format!("echo $$ > {}; exec sleep 1000", marker.display());
        let mut bundle = stand.bundle(id, &["sleep", "1000"]).spec(|spec| spec.hook(kind, "/bin/sh", &["sh", "-c", &script]));
        if id == "shared" {
            bundle = bundle.spec(shim_tests::spec::Spec::host_pids);
        }
        let (task, request) = (bundle.shim().await?, bundle.request());
        let create = tokio::spawn(async move { task.create(&request).await });
        eventually_true("the hook runs", SOON, || marker.metadata().is_ok_and(|about| about.size() > 0)).await?;
        let shim = bundle.shim_pid()?;
        proc::kill_hard(shim);
        ensure!(tokio::time::timeout(Duration::from_secs(20), create).await??.is_err(), "{id}: a container was made");
        ensure!(bundle.delete_command().await?.exit_status == 137);
        let left = stand.leftovers();
        let left: Vec<_> = left.iter().filter(|line| line.starts_with("cgroup") || line.starts_with("process")).collect();
        ensure!(left.is_empty(), "{id}: {left:?}");
        fs::remove_dir_all(&bundle.folder)?;
        ensure!(stand.bundle(id, &["sleep", "1000"]).run().await?.shut_down().await? == 137);
    }
    Ok(())
}
