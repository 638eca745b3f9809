//! `start`: which shim a container gets, and what may stand in its way.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::{fs, io};

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message as _;
use shim_tests::eventually::SOON;
use shim_tests::stand::{self, Stand};
use shim_tests::task::Task;

pub(crate) async fn whatever_stands_on_standard_input_the_answer_can_be_dialled(stand: Stand) -> Result<()> {
    let options = stand.bundle("options", &["true"]).options().write_to_bytes()?;
    let inputs: [&[u8]; 4] = [&[], &options, b"garbage", &[0xff; 100_000]];
    let ours = stand.shim().is_ours();
    for (number, input) in inputs.into_iter().enumerate().filter(|(number, _)| ours || *number < 2) {
        for (way, flags) in [&[][..], &["-debug"]].into_iter().enumerate() {
            let bundle = stand.bundle(&format!("c{number}-{way}"), &["sh", "-c", "exit 3"]);
            let task = Task::connect(&bundle.start_shim_with(flags, input).await?).await?;
            let container = bundle.run_in(&task).await?;
            ensure!(container.finish().await? == 3, "{number}");
            stand::leave(&task, container.shim_pid()?, &container.id).await?;
        }
    }
    Ok(())
}

pub(crate) async fn a_daemon_of_2_3_is_answered_in_its_own_words_and_served(stand: Stand) -> Result<()> {
    let bundle = stand.bundle("c1", &["sh", "-c", "exit 3"]);
    bundle.write()?;
    // short, as it is a part of a socket's path
    let sockets = stand.folder().join("s");
    let params = BootstrapParams {
        instance_id: "c1".to_owned(),
        namespace: stand.namespace().to_owned(),
        containerd_grpc_address: "/somewhere/else.sock".to_owned(),
        containerd_ttrpc_address: stand.containerd().path().display().to_string(),
        socket_dir: Some(sockets.display().to_string()),
        ..Default::default()
    };
    let mut command = bundle.command("start", &[]);
    command.env_remove("TTRPC_ADDRESS");
    let output = stand::run(command, &params.write_to_bytes()?).await?;
    ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let result = BootstrapResult::parse_from_bytes(&output.stdout)?;
    ensure!(result.version == 2 && result.protocol == "ttrpc", "{result:?}");
    let socket = result.address.strip_prefix("unix://").context("not an address")?;
    ensure!(Path::new(socket).parent() == Some(&sockets), "{socket}");
    let task = Task::connect(Path::new(socket)).await?;
    let container = bundle.run_in(&task).await?;
    ensure!(container.finish().await? == 3);
    stand.containerd().events().of_until("c1", "delete").await?;
    stand::leave(&task, container.shim_pid()?, "c1").await
}

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
        let output = stand::run(bundle.command("start", &[]), &params.write_to_bytes()?).await?;
        if fits {
            ensure!(output.status.success(), "{output:?}");
            let address = BootstrapResult::parse_from_bytes(&output.stdout)?.address;
            let socket = address.strip_prefix("unix://").context("not an address")?;
            ensure!(socket.len() == 107, "{} bytes", socket.len());
            let task = Task::connect(Path::new(socket)).await?;
            stand::leave(&task, bundle.shim_pid()?, "c").await?;
        } else {
            let sentence = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(!output.status.success() && sentence.contains("107") && sentence.lines().count() == 1, "{sentence}");
            ensure!(!bundle.folder.join("shim.pid").exists(), "a shim was started");
        }
    }
    Ok(())
}

pub(crate) async fn a_second_start_in_a_group_answers_the_living_shims_address(stand: Stand) -> Result<()> {
    let first = stand.bundle("c1", &["sleep", "1000"]).group("pod").run().await?;
    for number in 2..5 {
        let bundle = stand.bundle(&format!("c{number}"), &["sh", "-c", "exit 5"]).group("pod");
        ensure!(bundle.start_shim().await? == first.task.socket());
        if stand.shim().is_ours() {
            ensure!(bundle.shim_pid()? == first.shim_pid()?);
        }
        let container = bundle.run_in(&Task::connect(first.task.socket()).await?).await?;
        let address = fs::read_to_string(container.bundle.folder.join("address")).unwrap_or_default();
        ensure!(address.ends_with(&first.task.socket().display().to_string()) || !stand.shim().is_ours(), "{address:?}");
        ensure!(container.finish().await? == 5);
    }
    ensure!(stand.shims().len() == 1, "{:?}", stand.shims());
    first.shut_down().await.map(drop)
}

pub(crate) async fn two_starts_of_a_group_at_once_make_one_shim(stand: Stand) -> Result<()> {
    for round in 0..5 {
        let group = format!("pod{round}");
        let bundles = [1, 2].map(|number| stand.bundle(&format!("c{round}-{number}"), &["sh", "-c", "exit 5"]).group(&group));
        let (one, other) = tokio::join!(bundles[0].start_shim(), bundles[1].start_shim());
        let socket = one?;
        ensure!(socket == other?);
        ensure!(stand.shims().len() == 1, "{:?}", stand.shims());
        let shim = bundles[0].shim_pid()?;
        for bundle in bundles {
            let container = bundle.run_in(&Task::connect(&socket).await?).await?;
            ensure!(container.finish().await? == 5);
        }
        stand::leave(&Task::connect(&socket).await?, shim, "c").await?;
    }
    Ok(())
}

/// A shim that was asked to leave goes on for whoever has been promised a place in it.
pub(crate) async fn a_place_that_was_promised_keeps_the_shim(stand: Stand) -> Result<()> {
    let first = stand.bundle("c1", &["true"]).group("pod").run().await?;
    let second = stand.bundle("c2", &["sh", "-c", "exit 5"]).group("pod");
    let socket = second.start_shim().await?;
    first.finish().await?;
    first.task.shutdown("c1").await?;
    let task = Task::connect(&socket).await?;
    let second = second.run_in(&task).await?;
    ensure!(second.finish().await? == 5);
    stand::leave(&task, first.shim_pid()?, "c2").await
}

pub(crate) async fn sockets_are_private_and_none_is_abstract(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let name = container.task.socket().file_name().context("a name")?.to_owned();
    let mut sockets = vec![container.task.socket().to_owned()];
    if stand.shim().is_ours() {
        sockets.push(Path::new("/run/containerd-shim-x").join(name).with_extension("sock"));
    }
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
    ensure!(!stand.shim().is_ours() || private? == 0o700);
    for line in fs::read_to_string("/proc/net/unix")?.lines() {
        let path = line.split_whitespace().nth(7).unwrap_or_default();
        ensure!(!(path.starts_with('@') && path.contains("shim")), "{line}");
    }
    // nothing that listens has no path: of all descriptors of the shim, sockets are either bound to those two or connected
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

/// The file that takes a container's output is not the container's: it sees a pipe, and nothing beside its three descriptors.
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
        shim_tests::eventually::eventually("it is the program itself", SOON, async || {
            ensure!(shim_tests::proc::Process::read(pid)?.command == "sleep 1000");
            Ok(())
        })
        .await?;
        let files = shim_tests::proc::open_files(pid)?;
        ensure!(files.keys().copied().collect::<Vec<_>>() == [0, 1, 2], "{files:?}");
        if stand.shim().is_ours() {
            let kinds: Vec<_> = files.values().map(|target| target.display().to_string()).collect();
            ensure!(kinds[0] == "/dev/null" && kinds[1..].iter().all(|kind| kind.starts_with("pipe:")), "{kinds:?}");
        }
    }
    container.shut_down().await.map(drop)
}

/// The runtime prints its environment as its error: nothing of the daemon's is in it.
pub(crate) async fn no_secret_of_the_daemon_reaches_the_runtime(stand: Stand) -> Result<()> {
    let runtime = stand.folder().join("runtime");
    fs::write(&runtime, "#!/bin/sh\n/usr/bin/env >&2\nls -l /proc/$$/fd >&2\nexit 1\n")?;
    fs::set_permissions(&runtime, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let log = fs::File::open("/etc/hostname").or_else(|_| fs::File::open("/etc/passwd"))?;
    let output = stand.folder().join("out");
    shim_tests::stdio::fifo(&output)?;
    let reader = shim_tests::stdio::Reader::open(&output, shim_tests::stdio::Pace::Keep)?;
    let path = output.display().to_string();
    let bundle = stand.bundle("c1", &["true"]).runtime(&runtime).stdio("", &path, &path);
    let task = bundle.shim().await?;
    let Err(error) = task.create(&bundle.request()).await else { bail!("it was accepted") };
    drop(log);
    let said = format!("{error} {}", reader.to_end().await?);
    ensure!(said.contains("PATH="), "{said}");
    for secret in ["SECRET_OF_THE_DAEMON", "GOMAXPROCS", "TTRPC_ADDRESS", "GRPC_ADDRESS", "MAX_SHIM_VERSION", "NOTIFY_SOCKET"] {
        ensure!(!said.contains(secret), "{said}");
    }
    stand::leave(&task, bundle.shim_pid()?, "c1").await
}

/// A path where a socket should be is not removed unless it is one, and a shim that cannot listen says so.
pub(crate) async fn what_is_no_socket_is_not_replaced(stand: Stand) -> Result<()> {
    let bundle = stand.bundle("c1", &["true"]);
    let socket = bundle.start_shim().await?;
    stand::leave(&Task::connect(&socket).await?, bundle.shim_pid()?, "c1").await?;
    fs::create_dir(&socket)?;
    fs::write(socket.join("precious"), "")?;
    let output = stand::run(bundle.command("start", &[]), &[]).await?;
    let sentence = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && sentence.contains(&socket.display().to_string()), "{sentence}");
    ensure!(socket.join("precious").exists());
    match fs::remove_dir_all(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}
