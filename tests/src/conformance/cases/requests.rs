//! Requests that cannot be carried out: each gets one clear error, and a container of the same shim does not notice.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;

use crate::clauses;
use crate::conformance::Case;
use crate::eventually::SOON;
use crate::spec;
use crate::stand::Stand;
use crate::ttrpc::{self, Code, refusal};
use crate::witness::Witness;

pub(super) fn cases() -> Vec<Case> {
    clauses![requests:
        "B1" => a_bundle_that_cannot_be_run_is_refused;
        "B2" => a_request_that_cannot_be_carried_out_is_refused;
        "B3" => a_text_that_is_no_id_is_refused;
        "B4" => an_exec_that_cannot_be_is_refused_and_leaves_nothing;
        "B5" => values_that_make_no_sense_are_refused;
    ]
}

async fn a_bundle_that_cannot_be_run_is_refused(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let task = &witness.container.task;
    let bundle = witness.sibling("bad", &["true"]);
    let root = "\"root\":{\"path\":\"rootfs\"}";
    let other_version = format!("{{\"ociVersion\":\"7.0.0\",{root}}}");
    let no_version = format!("{{{root}}}");
    let nested = format!("{{\"ociVersion\":\"1.0.2\",\"x\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    for config in [
        None,
        Some("{\"ociVersion\": "),
        Some(""),
        Some("[]"),
        Some("\0\u{1}"),
        Some(nested.as_str()),
        Some(other_version.as_str()),
        Some(no_version.as_str()),
        Some("{\"ociVersion\":\"1.0.2\"}"),
    ] {
        bundle.write()?;
        let path = bundle.folder.join("config.json");
        match config {
            Some(config) => fs::write(&path, config)?,
            None => fs::remove_file(&path)?,
        }
        let beginning = config.map(|config| &config[..config.len().min(40)]);
        let (_, message) = refusal(task.create(&bundle.request()).await).with_context(|| format!("{beginning:?}"))?;
        ensure!(!message.is_empty(), "{beginning:?}: no word");
    }
    // and the id is free
    let repaired = bundle.create_in(task).await?;
    ensure!(repaired.destroy().await? == 137);
    witness.dismiss().await
}

async fn a_request_that_cannot_be_carried_out_is_refused(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let task = &witness.container.task;
    let bundle = witness.sibling("bad", &["true"]);
    bundle.write()?;
    let good = bundle.request();
    let gone = |path: &str| vec![containerd_shim_protos::types::mount::Mount { source: path.to_owned(), ..good.rootfs[0].clone() }];
    let any = |name: &str, value: &[u8]| MessageField::some(Any { type_url: name.to_owned(), value: value.to_vec(), ..Any::default() });
    let no_runtime = {
        use containerd_shim_protos::shim::oci::Options;
        let options = Options { binary_name: "/no/such/runtime".to_owned(), ..Options::default() };
        any("containerd.runc.v1.Options", &protobuf::Message::write_to_bytes(&options)?)
    };
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
        ("a runtime that is not there", api::CreateTaskRequest { options: no_runtime.clone(), ..good.clone() }, "/no/such/runtime"),
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
        ensure!(message.contains(words), "{what}: {code:?} {message}");
        ensure!(task.state("bad", "").await.is_err(), "{what}: something was made");
    }
    // no root file system at all: the bundle's folder for it is gone, and nothing is mounted there
    fs::remove_dir(bundle.folder.join("rootfs"))?;
    drop(refusal(task.create(&api::CreateTaskRequest { rootfs: Vec::new(), ..good.clone() }).await).context("no root file system")?);
    ensure!(task.create(&good).await.is_ok(), "the id is free again");
    task.kill("bad", "", 9).await?;
    task.wait("bad", "").await?;
    task.delete("bad", "").await?;
    witness.dismiss().await
}

async fn a_text_that_is_no_id_is_refused(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let task = &witness.container.task;
    let long = "a".repeat(300);
    for id in ["", ".", "..", "a/b", "../witness", "/etc", "a\0b", "-rf", "a b", "ä", "witness/", long.as_str()] {
        let bundle = witness.sibling("named", &["true"]);
        bundle.write()?;
        let (code, message) = refusal(task.create(&api::CreateTaskRequest { id: id.to_owned(), ..bundle.request() }).await)?;
        ensure!(code == Code::InvalidArgument, "create {id:?}: {code:?} {message}");
        let exec = api::ExecProcessRequest { exec_id: id.to_owned(), ..witness.container.bundle.exec_request("e", &["true"]) };
        let (code, message) = refusal(task.exec(&exec).await)?;
        ensure!(code == Code::InvalidArgument, "exec {id:?}: {code:?} {message}");
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

async fn an_exec_that_cannot_be_is_refused_and_leaves_nothing(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let task = &witness.container.task;
    let bundle = &witness.container.bundle;
    let with = |bytes: &[u8]| {
        let spec = Any { type_url: crate::messages::PROCESS.to_owned(), value: bytes.to_vec(), ..Any::default() };
        api::ExecProcessRequest { spec: MessageField::some(spec), ..bundle.exec_request("e", &[]) }
    };
    let mut refused = vec![with(b""), with(b"{"), with(b"[]"), with(&[0xff; 100])];
    refused.push(api::ExecProcessRequest { spec: MessageField::none(), ..bundle.exec_request("e", &[]) });
    refused.push(api::ExecProcessRequest { stdout: "carrier-pigeon:///x".into(), ..bundle.exec_request("e", &["true"]) });
    for request in refused {
        let (code, message) = refusal(task.exec(&request).await)?;
        ensure!(!message.is_empty(), "{code:?}");
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

async fn values_that_make_no_sense_are_refused(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let task = &witness.container.task;
    for signal in [0, 65, 1000, u32::MAX] {
        let (code, message) = refusal(task.kill("witness", "", signal).await)?;
        ensure!(!message.is_empty(), "signal {signal}: {code:?}");
    }
    for (width, height) in [(u32::MAX, 24), (80, 1 << 16)] {
        let resize = api::ResizePtyRequest { id: "witness".to_owned(), width, height, ..Default::default() };
        // without a terminal it may be taken for nothing
        if let Err(error) = task.call::<api::Empty>("ResizePty", &resize, SOON).await {
            ensure!(error.code().is_some(), "{error}");
        }
    }
    for resources in [&b""[..], b"{", b"[1]", &[0xff; 50]] {
        let resources = Any { type_url: crate::messages::RESOURCES.to_owned(), value: resources.to_vec(), ..Any::default() };
        let update = api::UpdateTaskRequest { id: "witness".to_owned(), resources: MessageField::some(resources), ..Default::default() };
        let (code, message) = refusal(task.call::<api::Empty>("Update", &update, SOON).await)?;
        ensure!(!message.is_empty(), "{code:?}");
    }
    // one that a real-time system may send; not to init, for which its kernel would ignore it
    witness.container.exec("e", &["sleep", "1000"]).await?;
    task.kill("witness", "e", 37).await?;
    ensure!(task.wait("witness", "e").await? == 128 + 37);
    task.delete("witness", "e").await?;
    witness.dismiss().await
}
