//! No room is left where the bundles are, or where the sockets are: calls that need room are refused, all others work.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use shim_tests::builds;
use shim_tests::bundle::worker_of;
use shim_tests::cgroups;
use shim_tests::container::Stdio;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually_true};
use shim_tests::proc;
use shim_tests::sandbox::{CONTAINER, POD, Sandbox, namespace_of};
use shim_tests::stand::Stand;
use shim_tests::suite::Runtime;

use crate::{build, on_build};

const PAGE: usize = 4096;

/// A small file system.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path, options: &str) -> Result<Self> {
        fs::create_dir_all(at)?;
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(options))?;
        Ok(Self(at.to_owned()))
    }

    /// Fills it except for that many pages.
    fn fill(&self, but: usize) -> Result<()> {
        self.free()?;
        let stat = nix::sys::statvfs::statvfs(&self.0)?;
        let bytes = (stat.blocks_available() * stat.fragment_size()) as usize;
        fs::write(self.0.join("filler"), vec![0; bytes - but * PAGE])?;
        let left = nix::sys::statvfs::statvfs(&self.0)?.blocks_available() as usize;
        ensure!(left == but, "{left} pages are left, not {but}");
        Ok(())
    }

    /// Leaves no room for another file, socket or folder.
    fn use_up_names(&self) -> Result<()> {
        for number in 0..10_000 {
            if fs::create_dir(self.0.join(format!("filler{number}"))).is_err() {
                return Ok(());
            }
        }
        anyhow::bail!("there is always room for another folder")
    }

    /// Makes room for that many files and folders.
    fn free_some_names(&self, count: usize) -> Result<()> {
        (0..count).try_for_each(|number| Ok(fs::remove_dir(self.0.join(format!("filler{number}")))?))
    }

    fn free_names(&self) -> Result<()> {
        for entry in fs::read_dir(&self.0)?.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("filler")) {
            fs::remove_dir(entry.path())?;
        }
        Ok(())
    }

    fn free(&self) -> Result<()> {
        match fs::remove_file(self.0.join("filler")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _the_run_goes_anyway = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

pub(crate) async fn a_full_disk_fails_only_calls_that_need_room(cx: Context) -> Result<()> {
    let cx = on_build(&cx, "build=old").await?;
    let disk = Disk::mount(&cx.daemon().bundle(cx.client().namespace(), ""), "size=1m")?;
    let events = cx.events().await?;
    let container = cx.container(&["sh", "-c", "read go; exit 3"]).stdio(Stdio::ALL).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    let waiting = container.exec("waiting", &["sh", "-c", "exit 5"]).stdio(Stdio::OUTPUT).add().await?;
    disk.fill(0)?;
    let program = build(&cx, "new", "build=new")?;
    for round in 0..2 {
        let refused = container.exec("late", &["sh", "-c", "exit 6"]).add().await.err().context("it was accepted")?;
        ensure!(format!("{refused:#}").contains("No space left on device"), "{refused:#}");
        let worker = worker_of(keeper).await?;
        proc::kill_hard(worker);
        eventually_true("the worker is dead", SOON, || !proc::is_alive(worker)).await?;
        let state = container.state().await?;
        ensure!(state.pid == container.pid && cx.shim_pid(&container.id)? == keeper, "{state:?}");
        let to = if round == 0 { program.clone() } else { cx.shim().binary.clone().context("ours")? };
        builds::upgrade(&cx, &to, &["--all"]).await?.is_done().with_context(|| format!("upgrade {round}"))?;
    }
    if cx.runtime() == Runtime::Native {
        // nothing is written for it
        ensure!(waiting.run().await? == 5);
        disk.free()?;
    } else {
        // the runtime has no room for the pid
        let refused = waiting.start().await.err().context("it was started")?;
        ensure!(refused.message().to_lowercase().contains("no space left on device"), "{refused:?}");
        disk.free()?;
        waiting.delete().await?;
    }
    for (exec, status) in [("late", 6), ("later", 7)] {
        ensure!(container.exec(exec, &["sh", "-c", &format!("exit {status}")]).run().await? == status);
    }
    disk.fill(0)?;
    container.io.stdin().await?.write_all(b"go\n")?;
    ensure!(container.finish().await? == 3);
    let published = cx.history(&events, &container.id).await?;
    ensure!(published.ends_with(&["exit".to_owned(), "delete".to_owned()]), "{published:?}");
    drop(disk);
    cx.leaves_nothing().await
}

pub(crate) async fn a_create_on_a_disk_that_fills_up_is_completed_or_undone(cx: Context) -> Result<()> {
    let stand = Stand::new(cx.shim(), cx.program("gated-runtime").parent().context("a file is in a folder")?)?;
    let disk = Disk::mount(&stand.folder().join("b"), "size=1m")?;
    let (mut done, mut undone) = (0, 0);
    for pages in 0..12 {
        disk.free()?;
        let id = format!("c{pages}");
        let bundle = stand.bundle(&id, &["sh", "-c", "exit 3"]);
        let task = bundle.shim().await?;
        let shim = bundle.shim_pid()?;
        disk.fill(pages)?;
        match bundle.clone().create_in(&task).await {
            Ok(container) => {
                done += 1;
                container.start().await?;
                ensure!(container.finish().await? == 3);
            }
            Err(error) => {
                undone += 1;
                ensure!(format!("{error:#}").contains("No space left on device"), "{pages} pages left: {error:#}");
                // when there is room it can be created
                disk.free()?;
                let container = bundle.clone().create_in(&task).await.context("once there is room")?;
                container.start().await?;
                ensure!(container.finish().await? == 3);
            }
        }
        shim_tests::bundle::leave(&task, shim, &id).await?;
    }
    ensure!(done > 0 && undone > 0, "{done} done, {undone} undone");
    drop(disk);
    stand.leaves_nothing().await
}

/// With a pid namespace for each container, and with one for all.
pub(crate) async fn a_pod_on_a_disk_that_fills_up_is_made_or_undone(cx: Context) -> Result<()> {
    let stand =
        Stand::with_engine(cx.shim(), cx.program("gated-runtime").parent().context("a file is in a folder")?, &cx.runtime_binary())?;
    let disk = Disk::mount(&stand.folder().join("b"), "size=1m,nr_inodes=600")?;
    let (mut done, mut undone) = (0, 0);
    for (number, (pages, names)) in (0..7).map(|pages| (Some(pages), None)).chain((0..9).map(|names| (None, Some(names)))).enumerate() {
        let room = format!("room for {pages:?} pages or {names:?} files");
        let mut sandbox = Sandbox::shim(&stand, &format!("s{number:02}")).await?;
        sandbox.config.namespaces().pid = if number % 2 == 0 { CONTAINER } else { POD };
        sandbox.create().await?;
        match (pages, names) {
            (Some(pages), _) => disk.fill(pages)?,
            (None, names) => {
                disk.use_up_names()?;
                disk.free_some_names(names.unwrap_or_default())?;
            }
        }
        let started = sandbox.start().await;
        if let Err(error) = &started {
            undone += 1;
            ensure!(error.to_string().contains("No space left on device"), "{room}: {error}");
            ensure!(!sandbox.bundle.folder.join("pod").exists(), "{room}: files are left");
            ensure!(cgroups::folders(&sandbox.cgroup()).is_empty(), "{room}: a cgroup is left");
            let keeper = sandbox.bundle.shim_pid()?.cast_unsigned();
            ensure!(namespace_of(keeper, "net")? == namespace_of(std::process::id(), "net")?, "{room}: the keeper is in the pod's network");
        } else {
            done += 1;
        }
        disk.free()?;
        disk.free_names()?;
        // when there is room it can be started
        let holder = if let Ok(holder) = started { holder } else { sandbox.start().await.with_context(|| room.clone())? };
        let member = sandbox.member(&format!("c{number:02}"), holder, &["sh", "-c", "exit 3"]);
        member.write()?;
        disk.fill(0)?;
        let refused = sandbox.task.create(&member.request()).await;
        disk.free()?;
        ensure!(refused.as_ref().is_err_and(|error| error.to_string().contains("No space left on device")), "{room}: {refused:?}");
        ensure!(member.run_in(&sandbox.task).await.with_context(|| room.clone())?.finish().await? == 3);
        sandbox.end().await?;
        ensure!(!sandbox.bundle.folder.join("pod").exists(), "{room}: files are left after the end");
    }
    ensure!(done > 2 && undone > 2, "{done} done, {undone} undone");
    drop(disk);
    stand.leaves_nothing().await
}

pub(crate) async fn without_room_for_sockets_running_containers_continue(cx: Context) -> Result<()> {
    // a socket's path is short
    let folder = Path::new("/run").join(cx.client().namespace());
    let disk = Disk::mount(&folder, "mode=755,nr_inodes=64")?;
    let shim = shim_tests::suite::Shim { binary: Some(build(&cx, "first", "build=old")?), ..cx.shim().clone() };
    let run_dir = ("X_SHIM_RUN_DIR", folder.to_str().context("a folder of the test has a plain name")?);
    let cx = cx.with_own_shim(&shim, &[run_dir]).await?;
    let container = cx.container(&["sh", "-c", "read go; exit 3"]).stdio(Stdio::ALL).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    disk.use_up_names()?;
    let refused = cx.container(&["true"]).create().await.err().context("another shim was started")?;
    ensure!(format!("{refused:#}").contains("No space left on device"), "{refused:#}");
    ensure!(cx.shims().len() == 1, "{:?}", cx.shims());
    // an OCI runtime delivers a terminal through a socket, everything else needs none
    let terminal = container.exec("tty", &["true"]).terminal().stdio(Stdio::OUTPUT).add().await?;
    if cx.runtime() == Runtime::Native {
        ensure!(terminal.run().await? == 0);
    } else {
        let refused = terminal.start().await.err().context("it was started")?;
        ensure!(refused.message().contains("No space left on device"), "{refused:?}");
        terminal.delete().await?;
    }
    ensure!(container.exec("e", &["sh", "-c", "exit 4"]).run().await? == 4);
    proc::kill_hard(worker_of(keeper).await?);
    cx.crash_daemon().await?;
    ensure!(container.state().await?.pid == container.pid && cx.shim_pid(&container.id)? == keeper);
    let program = build(&cx, "new", "build=new")?;
    let mut command = tokio::process::Command::new(&program);
    let output = command.args(["upgrade", "--all", "--json"]).env(run_dir.0, run_dir.1).kill_on_drop(true).output().await?;
    ensure!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    disk.free_names()?;
    let terminal = container.exec("tty", &["sh", "-c", "exit 5"]).terminal().stdio(Stdio::OUTPUT).add().await?;
    ensure!(terminal.run().await? == 5);
    container.io.stdin().await?.write_all(b"go\n")?;
    ensure!(container.finish().await? == 3);
    ensure!(cx.container(&["sh", "-c", "exit 6"]).run().await? == 6);
    cx.leaves_nothing().await
}
