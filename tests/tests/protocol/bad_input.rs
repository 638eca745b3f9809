//! Requests that cannot be carried out: our shim's answer to each, and to many.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use shim_tests::bundle::Container;
use shim_tests::eventually::{SOON, eventually_true, within};
use shim_tests::proc;
use shim_tests::refusals::{Refusal, requests};
use shim_tests::stand::Stand;
use shim_tests::ttrpc::{self, Code, refusal};
use shim_tests::witness::Witness;

/// Checks that every error message is one line of readable length.
fn are_sentences(refusals: &[Refusal]) -> Result<()> {
    for refused in refusals {
        ensure!(refused.message.lines().count() == 1 && refused.message.len() < 500, "{refused:?}");
    }
    Ok(())
}

pub(crate) async fn errors_in_a_bundle_are_named(stand: Stand) -> Result<()> {
    let refusals = requests::of_bundles(&stand).await?;
    are_sentences(&refusals)?;
    for refused in refusals {
        let (code, words) = match refused.what {
            "missing" => (Code::FailedPrecondition, "config.json"),
            "another version" => (Code::InvalidArgument, "7.0.0"),
            "no version" => (Code::InvalidArgument, "ociVersion"),
            "no root" => (Code::InvalidArgument, "root.path"),
            _ => (Code::InvalidArgument, "config.json"),
        };
        ensure!(refused.code == code && refused.message.contains(words), "{refused:?}");
    }
    Ok(())
}

pub(crate) async fn an_invalid_create_is_refused_with_a_message(stand: Stand) -> Result<()> {
    let refusals = requests::of_creates(&stand).await?;
    are_sentences(&refusals)?;
    let last = refusals.last().context("one without a root file system")?;
    ensure!(last.message.contains("rootfs"), "{last:?}");
    Ok(())
}

pub(crate) async fn an_invalid_id_is_refused_with_a_message(stand: Stand) -> Result<()> {
    are_sentences(&requests::of_ids(&stand).await?)
}

pub(crate) async fn an_invalid_exec_is_refused_with_a_message(stand: Stand) -> Result<()> {
    let refusals = requests::of_execs(&stand).await?;
    // the runtime has its own messages
    are_sentences(&refusals.into_iter().filter(|refused| refused.what == "exec").collect::<Vec<_>>())
}

pub(crate) async fn invalid_values_are_invalid_arguments(stand: Stand) -> Result<()> {
    let refusals = requests::of_values(&stand).await?;
    ensure!(refusals.iter().all(|refused| refused.what != "size"), "a size was refused: {refusals:?}");
    for refused in refusals {
        let number = refused.what.strip_prefix("signal ").unwrap_or_default();
        ensure!(refused.code == Code::InvalidArgument && !refused.message.is_empty() && refused.message.contains(number), "{refused:?}");
    }
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    for path in ["", "relative", "../up"] {
        let checkpoint = api::CheckpointTaskRequest { id: "c1".to_owned(), path: path.to_owned(), ..Default::default() };
        let refused = container.task.call::<api::Empty>("Checkpoint", &checkpoint, SOON).await;
        ensure!(ttrpc::code_of(refused)? == Code::InvalidArgument, "{path:?}");
    }
    container.shut_down().await.map(drop)
}

/// Our control socket: `/run/containerd-shim-x/NAME.sock` beside `…/s/NAME`.
fn control_socket(container: &Container) -> PathBuf {
    let name = container.task.socket().file_name().unwrap_or_default();
    Path::new("/run/containerd-shim-x").join(name).with_extension("sock")
}

pub(crate) async fn garbage_on_the_control_socket_has_no_effect(stand: Stand) -> Result<()> {
    use std::io::{Read as _, Write as _};
    let witness = Witness::start(&stand).await?;
    let path = control_socket(&witness.container);
    let garbage: [&[u8]; 9] = [
        b"",
        b"\0",
        b"\0\0\0\0",
        b"\x01\0\0\0\xff",
        b"\x02\0\0\0\x01",
        b"\xff\xff\xff\xff",
        &[0xff; 5000],
        b"GET / HTTP/1.0\r\n\r\n",
        b"\x05\0\0\0\x02\xff\xff\xff\xff",
    ];
    let mut held = Vec::new();
    for bytes in garbage {
        let mut socket = UnixStream::connect(&path)?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        // it may have hung up by then
        let _either = socket.write_all(bytes);
        held.push(UnixStream::connect(&path)?);
        if bytes.len() > 4 && socket.shutdown(std::net::Shutdown::Write).is_ok() {
            let mut answer = Vec::new();
            // there is no valid answer: the shim closes the connection, and does not hang
            let ended = socket.read_to_end(&mut answer);
            ensure!(!matches!(&ended, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock), "{bytes:?}: no end");
        }
        witness.is_untouched().await?;
    }
    // and more connections than it takes
    while held.len() < 100 {
        held.push(UnixStream::connect(&path)?);
    }
    witness.is_untouched().await?;
    let output = within("ps", SOON, stand.command(&["ps", "--json"]).output()).await??;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success() && text.contains("witness"), "{}: {text}", output.status);
    drop(held);
    witness.dismiss().await
}

pub(crate) async fn idle_control_connections_are_not_taken_for_a_dead_keeper(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let keeper = container.shim_pid()?;
    let held = (0..100).map(|_| UnixStream::connect(control_socket(&container))).collect::<std::io::Result<Vec<_>>>()?;
    ensure!(container.bundle.delete_command().await?.exit_status == 137);
    // by the keeper, which then had nothing left
    eventually_true("the keeper has exited", SOON, || !proc::is_alive(keeper)).await?;
    ensure!(stand.log_of("c1").contains("container deleted"), "the keeper was not asked: {}", stand.log_of("c1"));
    drop(held);
    Ok(())
}

/// Long fields of a request are neither repeated in an answer nor too long for the messages between keeper and worker.
pub(crate) async fn strings_of_megabytes_are_refused_and_not_repeated(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let (task, worker) = (&witness.container.task, witness.container.worker_pid().await?);
    // of characters that grow when they are quoted
    let long = "\u{1}".repeat(4_000_000);
    let path = format!("/{}", "x".repeat(3_900_000));
    let bundle = witness.sibling("long", &["true"]);
    bundle.write()?;
    let good = bundle.request();
    let options = {
        use containerd_shim_protos::shim::oci::Options;
        let options = Options { binary_name: stand.runtime().display().to_string(), root: format!("/{long}"), ..Options::default() };
        let value = protobuf::Message::write_to_bytes(&options)?;
        MessageField::some(Any { type_url: "containerd.runc.v1.Options".to_owned(), value, ..Any::default() })
    };
    let exec = witness.container.bundle.exec_request("e", &["true"]);
    let long_mount = containerd_shim_protos::types::mount::Mount { source: path.clone(), ..good.rootfs[0].clone() };
    let answers = [
        ("state", task.state(&long, "").await.map(drop)),
        ("state of an exec", task.state("witness", &long).await.map(drop)),
        ("kill", task.kill(&long, "", 9).await),
        ("create id", task.create(&api::CreateTaskRequest { id: long.clone(), ..good.clone() }).await.map(drop)),
        ("create bundle", task.create(&api::CreateTaskRequest { bundle: path.clone(), ..good.clone() }).await.map(drop)),
        ("create stdout", task.create(&api::CreateTaskRequest { stdout: path.clone(), ..good.clone() }).await.map(drop)),
        ("create scheme", task.create(&api::CreateTaskRequest { stdout: format!("{path}://"), ..good.clone() }).await.map(drop)),
        ("create checkpoint", task.create(&api::CreateTaskRequest { checkpoint: path.clone(), ..good.clone() }).await.map(drop)),
        ("create mount", task.create(&api::CreateTaskRequest { rootfs: vec![long_mount], ..good.clone() }).await.map(drop)),
        ("create options", task.create(&api::CreateTaskRequest { options, ..good.clone() }).await.map(drop)),
        ("exec id", task.exec(&api::ExecProcessRequest { exec_id: long.clone(), ..exec.clone() }).await),
        ("exec stdout", task.exec(&api::ExecProcessRequest { stdout: path.clone(), ..exec.clone() }).await),
        ("method", task.call::<api::Empty>(&long, &api::Empty::default(), SOON).await.map(drop)),
    ];
    for (what, answer) in answers {
        let (code, message) = refusal(answer).context(what)?;
        ensure!(message.len() < 70_000, "{what}: {code:?}, a message of {} bytes", message.len());
    }
    ensure!(witness.container.worker_pid().await? == worker, "another worker");
    witness.dismiss().await
}

/// Execs can be added for as long as their state fits the handover to the next worker.
pub(crate) async fn too_many_execs_are_refused_until_one_is_deleted(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let (task, worker) = (&witness.container.task, witness.container.worker_pid().await?);
    let path = format!("/{}", "x".repeat(4000));
    let add = |number: u32| api::ExecProcessRequest {
        stdout: path.clone(),
        stderr: path.clone(),
        ..witness.container.bundle.exec_request(&format!("e{number}"), &["true"])
    };
    let mut added = 0;
    let (code, message) = loop {
        match task.exec(&add(added)).await {
            Ok(()) => added += 1,
            answer => break refusal(answer)?,
        }
        ensure!(added < 2000, "{added} execs were added");
    };
    ensure!(code == Code::ResourceExhausted && message.contains("witness"), "after {added}: {code:?} {message}");
    ensure!(added > 50, "{added}");
    ensure!(task.exec(&add(added)).await.is_err(), "and again");
    ensure!(witness.container.worker_pid().await? == worker, "another worker");
    for number in 0..added {
        let _of_one_that_was_never_started = task.delete("witness", &format!("e{number}")).await?;
    }
    task.exec(&add(added)).await?;
    witness.dismiss().await
}
