//! Requests that cannot be carried out.

use std::fs;

use anyhow::{Result, ensure};
use containerd_shim_protos::api;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;

use super::Refusal;
use crate::eventually::{SOON, eventually};
use crate::messages::{PROCESS, RESOURCES};
use crate::stand::Stand;
use crate::ttrpc::{self, Code};
use crate::witness::Witness;
use crate::{proc, spec};

/// Create of bundles whose `config.json` cannot be run.
pub async fn of_bundles(stand: &Stand) -> Result<Vec<Refusal>> {
    let witness = Witness::start(stand).await?;
    let task = &witness.container.task;
    let bundle = witness.sibling("bad", &["true"]);
    let root = "\"root\":{\"path\":\"rootfs\"}";
    let nested = format!("{{\"ociVersion\":\"1.0.2\",\"x\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    let configs = [
        ("missing", None),
        ("cut off", Some("{\"ociVersion\": ".to_owned())),
        ("empty", Some(String::new())),
        ("a list", Some("[]".to_owned())),
        ("garbage", Some("\0\u{1}".to_owned())),
        ("nested", Some(nested)),
        ("another version", Some(format!("{{\"ociVersion\":\"7.0.0\",{root}}}"))),
        ("no version", Some(format!("{{{root}}}"))),
        ("no root", Some("{\"ociVersion\":\"1.0.2\"}".to_owned())),
    ];
    let mut refusals = Vec::new();
    for (what, config) in configs {
        bundle.write()?;
        let path = bundle.folder.join("config.json");
        match config {
            Some(config) => fs::write(&path, config)?,
            None => fs::remove_file(&path)?,
        }
        refusals.push(Refusal::of(what, task.create(&bundle.request()).await)?);
    }
    // and the id is free
    let repaired = bundle.create_in(task).await?;
    ensure!(repaired.destroy().await? == 137);
    witness.dismiss().await?;
    Ok(refusals)
}

/// Create with invalid fields: each error message names the field.
pub async fn of_creates(stand: &Stand) -> Result<Vec<Refusal>> {
    let witness = Witness::start(stand).await?;
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
    let mut refusals = Vec::new();
    for (what, request, words) in cases {
        let refused = Refusal::of(what, task.create(&request).await)?;
        ensure!(refused.message.contains(words), "{refused:?}");
        ensure!(task.state("bad", "").await.is_err(), "{what}: the container exists");
        refusals.push(refused);
    }
    // no root file system: its folder in the bundle is removed, and nothing is mounted there
    fs::remove_dir(bundle.folder.join("rootfs"))?;
    let without = api::CreateTaskRequest { rootfs: Vec::new(), ..good.clone() };
    refusals.push(Refusal::of("no root file system", task.create(&without).await)?);
    ensure!(task.create(&good).await.is_ok(), "the id is free again");
    task.kill("bad", "", 9).await?;
    task.wait("bad", "").await?;
    task.delete("bad", "").await?;
    witness.dismiss().await?;
    Ok(refusals)
}

/// Strings that are no valid ids: InvalidArgument where an id would be created, NotFound elsewhere.
pub async fn of_ids(stand: &Stand) -> Result<Vec<Refusal>> {
    let witness = Witness::start(stand).await?;
    let task = &witness.container.task;
    let (long, mut refusals) = ("a".repeat(300), Vec::new());
    for id in ["", ".", "..", "a/b", "../witness", "/etc", "a\0b", "-rf", "a b", "ä", "witness/", long.as_str()] {
        let bundle = witness.sibling("named", &["true"]);
        bundle.write()?;
        let create = task.create(&api::CreateTaskRequest { id: id.to_owned(), ..bundle.request() }).await;
        let exec = api::ExecProcessRequest { exec_id: id.to_owned(), ..witness.container.bundle.exec_request("e", &["true"]) };
        for refused in [Refusal::of("create", create)?, Refusal::of("exec", task.exec(&exec).await)?] {
            ensure!(refused.code == Code::InvalidArgument, "{id:?}: {refused:?}");
            refusals.push(refused);
        }
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
    witness.dismiss().await?;
    Ok(refusals)
}

/// Execs that cannot run, refused at Exec or at Start.
pub async fn of_execs(stand: &Stand) -> Result<Vec<Refusal>> {
    let witness = Witness::start(stand).await?;
    let task = &witness.container.task;
    let bundle = &witness.container.bundle;
    let with = |bytes: &[u8]| {
        let spec = Any { type_url: PROCESS.to_owned(), value: bytes.to_vec(), ..Any::default() };
        api::ExecProcessRequest { spec: MessageField::some(spec), ..bundle.exec_request("e", &[]) }
    };
    let mut refused = vec![with(b""), with(b"{"), with(b"[]"), with(&[0xff; 100])];
    refused.push(api::ExecProcessRequest { spec: MessageField::none(), ..bundle.exec_request("e", &[]) });
    refused.push(api::ExecProcessRequest { stdout: "carrier-pigeon:///x".into(), ..bundle.exec_request("e", &["true"]) });
    let mut refusals = Vec::new();
    for request in refused {
        refusals.push(Refusal::of("exec", task.exec(&request).await)?);
        ensure!(ttrpc::code_of(task.state("witness", "e").await)? == Code::NotFound);
    }
    // errors that only the runtime can detect fail Start, and the exec can be deleted
    for process in [serde_json::json!({}), serde_json::json!({"args": [], "cwd": "/"}), {
        let mut process = spec::process(&["true"]);
        process["cwd"] = "nowhere".into();
        process
    }] {
        task.exec(&with(process.to_string().as_bytes())).await?;
        refusals.push(Refusal::of("start", task.start("witness", "e").await)?);
        task.delete("witness", "e").await?;
    }
    ensure!(witness.container.run("e", &["sh", "-c", "exit 5"]).await? == 5);
    witness.dismiss().await?;
    Ok(refusals)
}

/// Invalid signals and resources, and a real-time signal, which is sent. A size for a process without a terminal may be ignored.
pub async fn of_values(stand: &Stand) -> Result<Vec<Refusal>> {
    let witness = Witness::start(stand).await?;
    let task = &witness.container.task;
    let mut refusals = Vec::new();
    for (what, signal) in [("signal 65", 65), ("signal 1000", 1000), ("signal 4294967295", u32::MAX)] {
        refusals.push(Refusal::of(what, task.kill("witness", "", signal).await)?);
    }
    for (width, height) in [(u32::MAX, 24), (80, 1 << 16)] {
        let resize = api::ResizePtyRequest { id: "witness".to_owned(), width, height, ..Default::default() };
        if let Err(error) = task.call::<api::Empty>("ResizePty", &resize, SOON).await {
            ensure!(error.code().is_some(), "{error}");
            refusals.push(Refusal::of::<()>("size", Err(error))?);
        }
    }
    for resources in [&b""[..], b"{", b"[1]", &[0xff; 50]] {
        let resources = Any { type_url: RESOURCES.to_owned(), value: resources.to_vec(), ..Any::default() };
        let update = api::UpdateTaskRequest { id: "witness".to_owned(), resources: MessageField::some(resources), ..Default::default() };
        refusals.push(Refusal::of("resources", task.call::<api::Empty>("Update", &update, SOON).await)?);
    }
    // not to init, for which its kernel would ignore it
    let pid = witness.container.exec("e", &["sleep", "1000"]).await?;
    // until then it is the runtime, which may take the signal for itself
    eventually("it sleeps", SOON, async || {
        let name = proc::Process::read(pid.cast_signed())?.comm;
        ensure!(name == "sleep", "{name}");
        Ok(())
    })
    .await?;
    task.kill("witness", "e", 37).await?;
    ensure!(task.wait("witness", "e").await? == 128 + 37);
    task.delete("witness", "e").await?;
    witness.dismiss().await?;
    Ok(refusals)
}
