//! Requests that cannot be carried out: each gets one clear error, and a container of the same shim does not notice.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use shim_tests::bundle::Container;
use shim_tests::eventually::{SOON, eventually, within};
use shim_tests::spec;
use shim_tests::stand::Stand;
use shim_tests::ttrpc::{self, Code, refusal};
use shim_tests::witness::Witness;

pub(crate) async fn a_bundle_that_cannot_be_run_is_refused_with_a_sentence(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let task = &witness.container.task;
    let bundle = witness.sibling("bad", &["true"]);
    let root = "\"root\":{\"path\":\"rootfs\"}";
    let other_version = format!("{{\"ociVersion\":\"7.0.0\",{root}}}");
    let no_version = format!("{{{root}}}");
    let nested = format!("{{\"ociVersion\":\"1.0.2\",\"x\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    for (config, code, words) in [
        (None, Code::NotFound, "config.json"),
        (Some("{\"ociVersion\": "), Code::InvalidArgument, "config.json"),
        (Some(""), Code::InvalidArgument, "config.json"),
        (Some("[]"), Code::InvalidArgument, "config.json"),
        (Some("\0\u{1}"), Code::InvalidArgument, "config.json"),
        (Some(nested.as_str()), Code::InvalidArgument, "config.json"),
        (Some(other_version.as_str()), Code::InvalidArgument, "7.0.0"),
        (Some(no_version.as_str()), Code::InvalidArgument, "ociVersion"),
        (Some("{\"ociVersion\":\"1.0.2\"}"), Code::InvalidArgument, "root.path"),
    ] {
        bundle.write()?;
        let path = bundle.folder.join("config.json");
        match config {
            Some(config) => fs::write(&path, config)?,
            None => fs::remove_file(&path)?,
        }
        let (found, message) = refusal(task.create(&bundle.request()).await)?;
        let config = config.map(|config| &config[..config.len().min(40)]);
        ensure!(found == code && message.contains(words), "{config:?}: {found:?} {message}");
        ensure!(message.lines().count() == 1, "{config:?}: {message}");
    }
    // and the id is free
    let repaired = bundle.create_in(task).await?;
    ensure!(repaired.destroy().await? == 137);
    witness.dismiss().await
}

pub(crate) async fn a_request_that_cannot_be_carried_out_is_refused_with_a_sentence(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let task = &witness.container.task;
    let bundle = witness.sibling("bad", &["true"]);
    bundle.write()?;
    let good = bundle.request();
    let gone = |path: &str| vec![containerd_shim_protos::types::mount::Mount { source: path.to_owned(), ..good.rootfs[0].clone() }];
    let any = |name: &str, value: &[u8]| MessageField::some(Any { type_url: name.to_owned(), value: value.to_vec(), ..Any::default() });
    let cases = [
        ("a bundle that is not there", api::CreateTaskRequest { bundle: "/no/such/bundle".into(), ..good.clone() }, "/no/such/bundle"),
        ("no bundle", api::CreateTaskRequest { bundle: String::new(), ..good.clone() }, "bundle"),
        ("a relative bundle", api::CreateTaskRequest { bundle: "b/bad".into(), ..good.clone() }, "bundle"),
        ("a mount that cannot be", api::CreateTaskRequest { rootfs: gone("/no/such/folder"), ..good.clone() }, "/no/such/folder"),
        (
            "options of an unknown type",
            api::CreateTaskRequest { options: any("no.such.Options", b"\x0a\x01x"), ..good.clone() },
            "no.such.Options",
        ),
        (
            "options that are none",
            api::CreateTaskRequest { options: any("containerd.runc.v1.Options", &[0xff; 9]), ..good.clone() },
            "containerd.runc.v1.Options",
        ),
        (
            "a runtime that is not there",
            api::CreateTaskRequest { options: runtime("/no/such/runtime"), ..good.clone() },
            "/no/such/runtime",
        ),
        ("a scheme that is none", api::CreateTaskRequest { stdout: "carrier-pigeon:///x".into(), ..good.clone() }, "carrier-pigeon"),
        ("a fifo that is not there", api::CreateTaskRequest { stdout: "/no/such/fifo".into(), ..good.clone() }, "/no/such/fifo"),
        (
            "a checkpoint that is not there",
            api::CreateTaskRequest { checkpoint: "/no/such/image".into(), ..good.clone() },
            "/no/such/image",
        ),
    ];
    for (what, request, words) in cases {
        let (code, message) = refusal(task.create(&request).await).context(what)?;
        ensure!(message.contains(words) && message.lines().count() == 1, "{what}: {code:?} {message}");
        ensure!(task.state("bad", "").await.is_err(), "{what}: something was made");
    }
    // no root file system at all: the bundle's folder for it is gone, and nothing is mounted there
    fs::remove_dir(bundle.folder.join("rootfs"))?;
    let (_, message) = refusal(task.create(&api::CreateTaskRequest { rootfs: Vec::new(), ..good.clone() }).await)?;
    ensure!(message.contains("rootfs"), "{message}");
    ensure!(task.create(&good).await.is_ok(), "the id is free again");
    task.kill("bad", "", 9).await?;
    task.wait("bad", "").await?;
    task.delete("bad", "").await?;
    witness.dismiss().await
}

fn runtime(binary: &str) -> MessageField<Any> {
    use containerd_shim_protos::shim::oci::Options;
    use protobuf::Message as _;
    let options = Options { binary_name: binary.to_owned(), ..Options::default() };
    let value = options.write_to_bytes().expect("a message without required fields is always complete");
    MessageField::some(Any { type_url: "containerd.runc.v1.Options".to_owned(), value, ..Any::default() })
}

pub(crate) async fn a_text_that_is_no_id_is_refused_everywhere(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let task = &witness.container.task;
    let long = "a".repeat(300);
    for id in ["", ".", "..", "a/b", "../witness", "/etc", "a\0b", "-rf", "a b", "ä", "witness/", long.as_str()] {
        let bundle = witness.sibling("named", &["true"]);
        bundle.write()?;
        let (code, message) = refusal(task.create(&api::CreateTaskRequest { id: id.to_owned(), ..bundle.request() }).await)?;
        ensure!(code == Code::InvalidArgument && message.lines().count() == 1 && message.len() < 500, "create {id:?}: {code:?} {message}");
        let exec = api::ExecProcessRequest { exec_id: id.to_owned(), ..witness.container.bundle.exec_request("e", &["true"]) };
        let (code, message) = refusal(task.exec(&exec).await)?;
        ensure!(code == Code::InvalidArgument && message.lines().count() == 1 && message.len() < 500, "exec {id:?}: {code:?} {message}");
        let codes = [
            ttrpc::code_of(task.state(id, "").await)?,
            ttrpc::code_of(task.start(id, "").await)?,
            ttrpc::code_of(task.delete(id, "").await)?,
            ttrpc::code_of(task.kill(id, "", 9).await)?,
            ttrpc::code_of(task.pids(id).await)?,
            ttrpc::code_of(task.wait_within(id, "", SOON).await)?,
            ttrpc::code_of(task.stats(id).await)?,
            ttrpc::code_of(task.pause(id).await)?,
        ];
        ensure!(codes.iter().all(|code| *code == Code::NotFound), "{id:?}: {codes:?}");
        if !id.is_empty() {
            ensure!(ttrpc::code_of(task.state("witness", id).await)? == Code::NotFound, "exec {id:?}");
            ensure!(ttrpc::code_of(task.delete("witness", id).await)? == Code::NotFound, "exec {id:?}");
        }
    }
    let entries = fs::read_dir(stand.folder().join("b"))?.flatten().map(|entry| entry.file_name());
    let mut names: Vec<_> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort();
    ensure!(names == ["named", "witness"], "{names:?}");
    witness.dismiss().await
}

pub(crate) async fn an_exec_that_cannot_be_is_refused_and_leaves_nothing(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let task = &witness.container.task;
    let bundle = &witness.container.bundle;
    let with = |bytes: &[u8]| {
        let spec = Any { type_url: shim_tests::messages::PROCESS.to_owned(), value: bytes.to_vec(), ..Any::default() };
        api::ExecProcessRequest { spec: MessageField::some(spec), ..bundle.exec_request("e", &[]) }
    };
    let mut refused = vec![with(b""), with(b"{"), with(b"[]"), with(&[0xff; 100])];
    refused.push(api::ExecProcessRequest { spec: MessageField::none(), ..bundle.exec_request("e", &[]) });
    refused.push(api::ExecProcessRequest { stdout: "carrier-pigeon:///x".into(), ..bundle.exec_request("e", &["true"]) });
    for request in refused {
        let (code, message) = refusal(task.exec(&request).await)?;
        ensure!(message.lines().count() == 1, "{code:?} {message}");
        ensure!(ttrpc::code_of(task.state("witness", "e").await)? == Code::NotFound);
    }
    // what only the runtime can find wrong fails its start, and the exec can be deleted
    for process in [serde_json::json!({}), serde_json::json!({"args": [], "cwd": "/"}), {
        let mut process = spec::process(&["true"]);
        process["cwd"] = "nowhere".into();
        process
    }] {
        task.exec(&with(process.to_string().as_bytes())).await?;
        let (code, message) = refusal(task.start("witness", "e").await)?;
        ensure!(!message.is_empty(), "{code:?}");
        task.delete("witness", "e").await?;
    }
    ensure!(witness.container.run("e", &["sh", "-c", "exit 5"]).await? == 5);
    witness.dismiss().await
}

/// Our control socket: `/run/containerd-shim-x/NAME.sock` beside `…/s/NAME`.
fn control_socket(container: &Container) -> PathBuf {
    let name = container.task.socket().file_name().unwrap_or_default();
    Path::new("/run/containerd-shim-x").join(name).with_extension("sock")
}

pub(crate) async fn garbage_on_the_control_socket_harms_nobody(stand: Stand) -> Result<()> {
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
            // nothing sensible can be said to it: it ends, and does not hang
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
    drop(held);
    eventually("ps works again", SOON, async || {
        let output = within("ps", SOON, stand.command(&["ps", "--json"]).output()).await??;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success() && text.contains("witness"), "{}: {text}", output.status);
        Ok(())
    })
    .await?;
    witness.dismiss().await
}

/// Whatever is long in a request is neither repeated in an answer nor too much for what the shim's parts tell each other.
pub(crate) async fn texts_of_megabytes_are_refused_and_not_repeated(stand: Stand) -> Result<()> {
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
    let annotations = std::collections::HashMap::from([("a".to_owned(), long.clone())]);
    let update = api::UpdateTaskRequest { id: "witness".to_owned(), annotations, ..Default::default() };
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
        ("update", task.call::<api::Empty>("Update", &update, SOON).await.map(drop)),
        ("method", task.call::<api::Empty>(&long, &api::Empty::default(), SOON).await.map(drop)),
    ];
    for (what, answer) in answers {
        let (code, message) = refusal(answer).context(what)?;
        ensure!(message.len() < 70_000, "{what}: {code:?}, a sentence of {} bytes", message.len());
    }
    ensure!(witness.container.worker_pid().await? == worker, "another worker");
    witness.dismiss().await
}

/// Processes can be added for as long as what is known of them can be handed over to the next worker.
pub(crate) async fn too_many_added_processes_are_refused_until_one_is_deleted(stand: Stand) -> Result<()> {
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
        ensure!(added < 2000, "{added} processes were added");
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

pub(crate) async fn values_that_make_no_sense_are_refused(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let task = &witness.container.task;
    for signal in [0, 65, 1000, u32::MAX] {
        let (code, message) = refusal(task.kill("witness", "", signal).await)?;
        ensure!(code == Code::InvalidArgument && message.contains(&signal.to_string()), "signal {signal}: {code:?} {message}");
    }
    for (width, height) in [(u32::MAX, 24), (80, 1 << 16)] {
        let resize = api::ResizePtyRequest { id: "witness".to_owned(), width, height, ..Default::default() };
        ensure!(ttrpc::code_of(task.call::<api::Empty>("ResizePty", &resize, SOON).await)? == Code::InvalidArgument);
    }
    for resources in [&b""[..], b"{", b"[1]", &[0xff; 50]] {
        let resources = Any { type_url: shim_tests::messages::RESOURCES.to_owned(), value: resources.to_vec(), ..Any::default() };
        let update = api::UpdateTaskRequest { id: "witness".to_owned(), resources: MessageField::some(resources), ..Default::default() };
        let (code, message) = refusal(task.call::<api::Empty>("Update", &update, SOON).await)?;
        ensure!(code == Code::InvalidArgument && !message.is_empty(), "{code:?} {message}");
    }
    for path in ["", "relative", "../up"] {
        let checkpoint = api::CheckpointTaskRequest { id: "witness".to_owned(), path: path.to_owned(), ..Default::default() };
        ensure!(ttrpc::code_of(task.call::<api::Empty>("Checkpoint", &checkpoint, SOON).await)? == Code::InvalidArgument, "{path:?}");
    }
    // one that a real-time system may send; not to init, for which its kernel would ignore it
    witness.container.exec("e", &["sleep", "1000"]).await?;
    task.kill("witness", "e", 37).await?;
    ensure!(task.wait("witness", "e").await? == 128 + 37);
    task.delete("witness", "e").await?;
    witness.dismiss().await
}
