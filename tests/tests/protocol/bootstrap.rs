//! `start`: the shim that a container gets, and errors.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::process::Stdio;
use std::{fs, io};

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message as _;
use shim_tests::bundle::{self, Bundle};
use shim_tests::cgroups::Version;
use shim_tests::eventually::{SOON, eventually, within};
use shim_tests::runner::skip;
use shim_tests::stand::Stand;
use shim_tests::suite::{Runtime, Suite};
use shim_tests::task::Task;
use shim_tests::ttrpc::CallError;

pub(crate) async fn a_socket_folder_fits_to_the_last_byte_and_not_beyond(stand: Stand) -> Result<()> {
    let named = |length: usize| {
        let folder = stand.folder().join("s");
        format!("{}/{}", folder.display(), "x".repeat(length - folder.display().to_string().len() - 1))
    };
    // a name of 64 characters, a slash, and the NUL that ends it, of 108
    for (length, fits) in [(42, true), (43, false)] {
        let bundle = stand.bundle(&format!("c{length}"), &["true"]);
        bundle.write()?;
        let params = BootstrapParams {
            instance_id: bundle.id.clone(),
            namespace: stand.namespace().to_owned(),
            socket_dir: Some(named(length)),
            ..Default::default()
        };
        let output = bundle::run(bundle.command("start", &[]), &params.write_to_bytes()?).await?;
        if fits {
            ensure!(output.status.success(), "{output:?}");
            let address = BootstrapResult::parse_from_bytes(&output.stdout)?.address;
            let socket = address.strip_prefix("unix://").context("not an address")?;
            ensure!(socket.len() == 107, "{} bytes", socket.len());
            let task = Task::connect(Path::new(socket)).await?;
            bundle::leave(&task, bundle.shim_pid()?, "c").await?;
        } else {
            let sentence = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(!output.status.success() && sentence.contains("107") && sentence.lines().count() == 1, "{sentence}");
            ensure!(!bundle.folder.join("shim.pid").exists(), "a shim was started");
        }
    }
    Ok(())
}

pub(crate) async fn sockets_are_private_and_none_is_abstract(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let name = container.task.socket().file_name().context("a name")?.to_owned();
    let mut sockets = vec![container.task.socket().to_owned()];
    sockets.push(Path::new("/run/containerd-shim-x").join(name).with_extension("sock"));
    for socket in &sockets {
        let about = fs::metadata(socket).with_context(|| socket.display().to_string())?;
        ensure!(
            about.file_type().is_socket() && about.mode() & 0o777 == 0o600 && about.uid() == 0,
            "{}: {:o}",
            socket.display(),
            about.mode()
        );
        let folder = fs::symlink_metadata(socket.parent().context("a folder")?)?;
        // containerd's own folder lets others look at names, ours does not
        ensure!(folder.is_dir() && folder.mode() & 0o022 == 0 && folder.uid() == 0, "{:o}", folder.mode());
    }
    let private = fs::metadata("/run/containerd-shim-x").map(|folder| folder.mode() & 0o777);
    ensure!(private? == 0o700);
    for line in fs::read_to_string("/proc/net/unix")?.lines() {
        let path = line.split_whitespace().nth(7).unwrap_or_default();
        ensure!(!(path.starts_with('@') && path.contains("shim")), "{line}");
    }
    // every listening socket has a path: all sockets of the shim are bound to these two or connected
    let unix = fs::read_to_string("/proc/net/unix")?;
    for shim in stand.shims() {
        for (number, target) in shim_tests::proc::open_files(shim.pid)? {
            let target = target.display().to_string();
            let Some(inode) = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')) else { continue };
            let line = unix.lines().find(|line| line.split_whitespace().nth(6) == Some(inode));
            // flags 00010000: it listens
            if let Some(line) = line.filter(|line| line.contains(" 00010000 ")) {
                ensure!(sockets.iter().any(|socket| line.ends_with(&socket.display().to_string())), "descriptor {number}: {line}");
            }
        }
    }
    container.shut_down().await.map(drop)
}

/// A container with a `file://` log gets a pipe, not the file, and only its three descriptors.
pub(crate) async fn a_container_has_three_descriptors_and_none_is_a_file_of_the_host(stand: Stand) -> Result<()> {
    let log = stand.folder().join("out.log");
    let uri = format!("file://{}", log.display());
    let container = stand.bundle("c1", &["sleep", "1000"]).stdio("", &uri, &uri).run().await?;
    let exec = containerd_shim_protos::api::ExecProcessRequest {
        stdout: uri.clone(),
        stderr: uri.clone(),
        ..container.bundle.exec_request("e", &["sleep", "1000"])
    };
    container.task.exec(&exec).await?;
    let exec = container.task.start("c1", "e").await?;
    for pid in [container.pid, exec] {
        let pid = pid.cast_signed();
        eventually("it is the program itself", SOON, async || {
            ensure!(shim_tests::proc::Process::read(pid)?.command == "sleep 1000");
            Ok(())
        })
        .await?;
        let files = shim_tests::proc::open_files(pid)?;
        ensure!(files.keys().copied().collect::<Vec<_>>() == [0, 1, 2], "{files:?}");
        let kinds: Vec<_> = files.values().map(|target| target.display().to_string()).collect();
        ensure!(kinds[0] == "/dev/null" && kinds[1..].iter().all(|kind| kind.starts_with("pipe:")), "{kinds:?}");
    }
    container.shut_down().await.map(drop)
}

/// A path where a socket should be is not removed unless it is one, and a shim that cannot listen reports it.
pub(crate) async fn a_file_that_is_no_socket_is_not_replaced(stand: Stand) -> Result<()> {
    let bundle = stand.bundle("c1", &["true"]);
    let socket = bundle.start_shim().await?;
    bundle::leave(&Task::connect(&socket).await?, bundle.shim_pid()?, "c1").await?;
    fs::create_dir(&socket)?;
    fs::write(socket.join("precious"), "")?;
    let output = bundle::run(bundle.command("start", &[]), &[]).await?;
    let sentence = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && sentence.contains(&socket.display().to_string()), "{sentence}");
    ensure!(socket.join("precious").exists());
    match fs::remove_dir_all(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// The last member of a group is deleted while the next one starts: it gets the exiting shim, if that stays, or a new one.
pub(crate) async fn a_start_beside_an_exiting_shim_gets_a_new_one(stand: Stand) -> Result<()> {
    let mut last = stand.instant("c0", &["true"]).group("pod").run().await?;
    let (mut same, mut new) = (0, 0);
    for round in 1..60 {
        let next = stand.instant(&format!("c{round}"), &["true"]).group("pod");
        let leaving = async {
            last.finish().await?;
            match last.task.shutdown(&last.id).await {
                Ok(()) | Err(CallError::Closed) => anyhow::Ok(()),
                Err(error) => Err(error.into()),
            }
        };
        let (left, socket) = tokio::join!(leaving, next.start_shim());
        left?;
        let task = Task::connect(&socket?).await.with_context(|| format!("round {round}: connect"))?;
        let next = next.run_in(&task).await.with_context(|| format!("round {round}"))?;
        if next.shim_pid()? == last.shim_pid()? {
            same += 1
        } else {
            new += 1
        }
        last = next;
    }
    ensure!(same + new == 59, "{same} joined, {new} started a new shim");
    last.finish().await?;
    bundle::leave(&last.task, last.shim_pid()?, "c").await
}

/// Its client was stopped, or keeps the pipe open by mistake. Closed at last, the `start` joins the shim that the other one has started.
pub(crate) async fn a_start_whose_input_stays_open_does_not_keep_another_of_its_group_waiting(stand: Stand) -> Result<()> {
    let silent = stand.bundle("c1", &["true"]).group("pod");
    silent.write()?;
    stand.read_log_of("c1", &silent.folder.join("log"))?;
    let mut command = silent.command("start", &[]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut start = command.spawn()?;
    let stdin = start.stdin.take().context("it was asked for")?;
    let pid = start.id().context("it has ended")?.cast_signed();
    // it has prepared: nothing before makes it sleep for long
    eventually("it waits for its input", SOON, async || {
        let waits_for = fs::read_to_string(format!("/proc/{pid}/wchan"))?;
        ensure!(waits_for.contains("poll") || waits_for.contains("pipe"), "in {waits_for:?}");
        Ok(())
    })
    .await?;
    let other = stand.instant("c2", &["true"]).group("pod").run().await?;
    drop(stdin);
    let output = within("the first start", SOON, bundle::output_of(&mut start)).await??;
    ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    ensure!(bundle::read_address(&output.stdout)? == other.task.socket() && silent.shim_pid()? == other.shim_pid()?, "{output:?}");
    let mut members = [silent.create_in(&other.task).await?, other];
    for member in &mut members {
        member.destroy().await?;
    }
    bundle::leave(&members[0].task, members[0].shim_pid()?, "c").await
}

/// crun refuses a host with cgroup v1 and controllers on a v2 hierarchy beside it, with any options. The hosts here are mount
/// namespaces in which the kernel's list of those controllers is covered by another. A container from a checkpoint needs an OCI runtime, which
/// runs at its Start.
pub(crate) async fn the_runtime_is_one_that_works_on_this_host_unless_it_is_named(stand: Stand) -> Result<()> {
    if Version::here() == Version::V2 {
        return skip("this is about hosts with cgroup v1");
    }
    let crun_alone = stand.folder().join("crun-alone");
    fs::create_dir(&crun_alone)?;
    std::os::unix::fs::symlink(Suite::Bookworm.runtime(Runtime::Crun), crun_alone.join("crun"))?;
    let image = stand.folder().display().to_string();
    for (id, controllers, path, named, checkpoint, outcome) in [
        ("nothing-is-needed", "hugetlb rdma\n", Some(&crun_alone), None, "", Ok("native")),
        ("crun-works", "", None, None, &image, Ok("/crun")),
        ("crun-does-not", "hugetlb rdma\n", None, None, &image, Ok("/runc")),
        ("crun-is-named", "hugetlb rdma\n", None, Some("crun"), "", Err("cgroups in hybrid mode not supported")),
        ("nothing-works", "hugetlb rdma\n", Some(&crun_alone), None, &image, Err("hugetlb rdma), and runc was not found in PATH=")),
    ] {
        let bundle = stand.bundle(id, &["sleep", "1000"]).runtime(Path::new(named.unwrap_or_default()));
        let task = start_on_a_host_with(&stand, &bundle, controllers, path.map(|path| path.as_path())).await?;
        let pid = bundle.shim_pid()?;
        match (task.create(&api::CreateTaskRequest { checkpoint: checkpoint.to_owned(), ..bundle.request() }).await, outcome) {
            (Ok(_), Ok(expected)) => {
                let log = stand.log_of(id);
                ensure!(log.lines().any(|line| line.contains("OCI runtime chosen") && line.contains(expected)), "{id}: {log}");
                task.delete(id, "").await?;
            }
            (Err(error), Err(expected)) => ensure!(format!("{error:#}").contains(expected), "{id}: {error:#}"),
            (result, _) => bail!("{id}: {result:?}"),
        }
        bundle::leave(&task, pid, id).await?;
    }
    Ok(())
}

/// Runs `start` where the v2 hierarchy beside those of v1 seems to have `controllers`, with a PATH of its own if there is one.
async fn start_on_a_host_with(stand: &Stand, bundle: &Bundle, controllers: &str, path: Option<&Path>) -> Result<Task> {
    bundle.write()?;
    stand.read_log_of(&bundle.id, &bundle.folder.join("log"))?;
    let list = stand.folder().join(format!("{}.controllers", bundle.id));
    fs::write(&list, controllers)?;
    let start = bundle.command("start", &[]);
    let start = start.as_std();
    let mut command = tokio::process::Command::new("/usr/bin/unshare");
    command.args(["--mount", "/bin/sh", "-c", "/bin/mount --bind $0 /sys/fs/cgroup/unified/cgroup.controllers && exec \"$@\""]).arg(&list);
    command.arg(start.get_program()).args(start.get_args()).env_clear();
    command.envs(start.get_envs().filter_map(|(name, value)| Some((name, value?)))).current_dir(&bundle.folder).kill_on_drop(true);
    if let Some(path) = path {
        command.env("PATH", format!("{}:/no/such/folder", path.display()));
    }
    let output = bundle::run(command, &[]).await?;
    ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    Task::connect(&bundle::read_address(&output.stdout)?).await
}
