//! The OCI runtime and what it keeps: a container of another daemon's under the same id, a runtime that was killed half-way, moved or
//! removed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use shim_tests::bundle::{Container, leave};
use shim_tests::eventually::{SOON, eventually, eventually_true, within};
use shim_tests::proc;
use shim_tests::programs;
use shim_tests::stand::Stand;
use shim_tests::suite::{Runtime, Suite};
use shim_tests::ttrpc::{Answer, Code, refusal};

/// What the runtime keeps of a container.
fn kept(stand: &Stand, id: &str) -> PathBuf {
    Path::new("/run/containerd/runc").join(stand.namespace()).join(id)
}

/// It runs, its cgroup has it, and another process can be added to it.
async fn is_well(container: &Container, exec: &str) -> Result<()> {
    let state = container.task.state(&container.id, "").await?;
    ensure!(state.status.value() == 2 && proc::is_alive(container.pid.cast_signed()), "{state:?}");
    ensure!(container.run(exec, &["sh", "-c", "exit 6"]).await? == 6, "exec {exec}");
    Ok(())
}

/// Two daemons with one namespace and one root of the runtime.
pub(crate) async fn a_refused_create_leaves_the_container_of_another_daemon_alone(stand: Stand) -> Result<()> {
    for (id, runtime) in [("runc", Runtime::Runc), ("crun", Runtime::Crun)] {
        let runtime = Suite::Bookworm.runtime(runtime);
        let container = stand.bundle(id, &["sleep", "1000"]).runtime(&runtime).run().await?;
        let second = stand.bundle(id, &["sleep", "1000"]).runtime(&runtime).of_another_daemon();
        let task = second.shim().await?;
        ensure!(second.shim_pid()? != container.shim_pid()?, "there is one shim");
        for exec in ["first", "again"] {
            let (code, message) = refusal(task.create(&second.request()).await)?;
            ensure!(code == Code::AlreadyExists && message.contains(id), "{code:?} {message}");
            is_well(&container, exec).await.context(id)?;
        }
        // containerd runs it after every Create that fails
        second.delete_command().await?;
        is_well(&container, "last").await.with_context(|| format!("{id}, after delete"))?;
        let left = fs::read_to_string("/proc/self/mountinfo")?;
        let rootfs = second.folder.join("rootfs").display().to_string();
        ensure!(!left.contains(&rootfs), "mounts of the refused Create: {left}");
        let shim = second.shim_pid()?;
        leave(&task, shim, id).await?;
        ensure!(container.shut_down().await? == 137);
    }
    Ok(())
}

/// The id is free when Create looks, and taken when its runtime does.
pub(crate) async fn a_create_that_loses_a_race_for_its_id_leaves_the_winner_alone(stand: Stand) -> Result<()> {
    for (id, runtime) in [("runc", Runtime::Runc), ("crun", Runtime::Crun)] {
        let runtime = Suite::Bookworm.runtime(runtime);
        let gate = stand.gate(&runtime)?;
        let second = stand.bundle(id, &["sleep", "1000"]).runtime(&gate.binary()).of_another_daemon();
        let task = second.shim().await?;
        gate.hold("create")?;
        let (other, request) = (task.clone(), second.request());
        let create = tokio::spawn(async move { other.create(&request).await });
        gate.held("create").await?;
        let container = stand.bundle(id, &["sleep", "1000"]).runtime(&runtime).run().await?;
        gate.release("create")?;
        let (code, message) = refusal(within("create", SOON, create).await??)?;
        ensure!(code == Code::AlreadyExists && message.contains("exists"), "{code:?} {message}");
        is_well(&container, "first").await.context(id)?;
        second.delete_command().await?;
        is_well(&container, "last").await.with_context(|| format!("{id}, after delete"))?;
        let shim = second.shim_pid()?;
        leave(&task, shim, id).await?;
        ensure!(container.shut_down().await? == 137);
    }
    Ok(())
}

/// The worker that looked whether the id is free is dead when the runtime fails.
pub(crate) async fn what_a_killed_create_has_made_is_removed_by_the_next_worker(stand: Stand) -> Result<()> {
    for (id, runtime) in [("runc", Runtime::Runc), ("crun", Runtime::Crun)] {
        let gate = stand.gate(&Suite::Bookworm.runtime(runtime))?;
        let bundle = stand.bundle(id, &["sleep", "1000"]).runtime(&gate.binary());
        let task = bundle.shim().await?;
        gate.hold_after("create")?;
        let (other, request) = (task.clone(), bundle.request());
        let create = tokio::spawn(async move { other.create(&request).await });
        let held = gate.held("create").await?;
        ensure!(kept(&stand, id).exists(), "the runtime has made nothing");
        let worker = shim_tests::bundle::worker_of(bundle.shim_pid()?).await?;
        proc::kill_hard(worker);
        eventually_true("the worker is dead", SOON, || !proc::is_alive(worker)).await?;
        proc::kill_hard(held);
        let refused = within("create", SOON, create).await??;
        ensure!(refused.is_err(), "a container was made");
        ensure!(!kept(&stand, id).exists(), "the runtime has kept it");
        gate.release("create")?;
        let again = bundle.run_in(&task).await?;
        ensure!(again.shut_down().await? == 137);
    }
    Ok(())
}

/// What a call that needs the runtime says without one.
fn names_the_program<T: std::fmt::Debug>(call: &str, answer: Answer<T>, program: &Path) -> Result<()> {
    let (code, message) = refusal(answer).context(call.to_owned())?;
    let is_helpful = message.contains(&program.display().to_string()) && message.contains("install it again");
    ensure!(code == Code::Unavailable && is_helpful, "{call}: {code:?} {message}");
    Ok(())
}

pub(crate) async fn without_the_runtimes_program_every_call_is_refused_with_its_path_and_delete_works_once_it_is_back(
    stand: Stand,
) -> Result<()> {
    for (id, runtime) in [("runc", Runtime::Runc), ("crun", Runtime::Crun)] {
        let gate = stand.gate(&Suite::Bookworm.runtime(runtime))?;
        let (program, away) = (gate.binary(), gate.binary().with_extension("away"));
        let container = stand.bundle(id, &["sleep", "1000"]).runtime(&program).group("pod").run().await?;
        let created = stand.bundle(&format!("{id}-created"), &["sleep", "1000"]).runtime(&program).group("pod");
        let created = created.create_in(&container.task).await?;
        container.add("added", &["true"]).await?;
        fs::rename(&program, &away)?;

        let task = &container.task;
        names_the_program("Start", task.start(&created.id, "").await, &program)?;
        names_the_program("Start of an added process", task.start(id, "added").await, &program)?;
        names_the_program("Pause", task.pause(id).await, &program)?;
        names_the_program("Update", task.update(id, &serde_json::json!({ "cpu": { "shares": 512 } })).await, &program)?;
        let term_all = api::KillRequest { id: id.to_owned(), signal: 15, all: true, ..Default::default() };
        names_the_program("Kill of all", task.call::<api::Empty>("Kill", &term_all, SOON).await, &program)?;
        let image = stand.folder().join("image").display().to_string();
        let checkpoint = api::CheckpointTaskRequest { id: id.to_owned(), path: image, ..Default::default() };
        names_the_program("Checkpoint", task.call::<api::Empty>("Checkpoint", &checkpoint, SOON).await, &program)?;
        let another = stand.bundle(&format!("{id}-new"), &["true"]).runtime(&program).group("pod");
        another.write()?;
        let (code, message) = refusal(task.create(&another.request()).await)?;
        ensure!(code == Code::InvalidArgument && message.contains(&program.display().to_string()), "Create: {code:?} {message}");

        // what needs no runtime works
        ensure!(task.pids(id).await?.contains(&container.pid));
        task.stats(id).await?;
        ensure!(task.state(id, "").await?.status.value() == 2);
        task.delete(id, "added").await?;
        task.kill(id, "", 9).await?;
        ensure!(task.wait(id, "").await? == 137);
        for _ in 0..2 {
            names_the_program("Delete", task.delete(id, "").await, &program)?;
            names_the_program("Delete of one that never ran", task.delete(&created.id, "").await, &program)?;
        }
        ensure!(task.state(id, "").await?.exit_status == 137, "it was forgotten");
        ensure!(kept(&stand, id).exists());

        fs::rename(&away, &program)?;
        ensure!(task.delete(id, "").await?.exit_status == 137);
        ensure!(task.delete(&created.id, "").await?.exit_status == 137);
        ensure!(!kept(&stand, id).exists() && !kept(&stand, &created.id).exists(), "the runtime has kept it");
        let shim = container.shim_pid()?;
        leave(task, shim, id).await?;
    }
    Ok(())
}

/// The command is the last chance: with the bundle, all knowledge of the container goes.
pub(crate) async fn delete_removes_a_container_whose_runtime_is_gone(stand: Stand) -> Result<()> {
    for (id, runtime) in [("runc", Runtime::Runc), ("crun", Runtime::Crun)] {
        let runtime = Suite::Bookworm.runtime(runtime);
        for is_shim_alive in [true, false] {
            let gate = stand.gate(&runtime)?;
            let container = stand.bundle(id, &["sh", "-c", "sleep 1000 & exec sleep 1000"]).runtime(&gate.binary()).run().await?;
            let shim = container.shim_pid()?;
            fs::remove_file(gate.binary())?;
            if !is_shim_alive {
                proc::kill_hard(shim);
                eventually_true("the shim is dead", SOON, || !proc::is_alive(shim)).await?;
            }
            for _ in 0..2 {
                let deleted = container.bundle.delete_command().await?;
                ensure!(deleted.exit_status == 137 && deleted.pid == container.pid, "{id}: {deleted}");
            }
            ensure!(!kept(&stand, id).exists(), "the runtime's state is there");
            eventually("nothing of it is left", SOON, async || {
                let left: Vec<_> = stand.leftovers().into_iter().filter(|left| !left.starts_with("socket")).collect();
                ensure!(left.is_empty(), "{left:#?}");
                Ok(())
            })
            .await?;
            fs::remove_dir_all(&container.bundle.folder)?;
        }
    }
    Ok(())
}

pub(crate) async fn a_runtime_that_was_moved_is_found_in_path(stand: Stand) -> Result<()> {
    let runtime = stand.runtime();
    let folder = stand.folder().join("old");
    fs::create_dir_all(&folder)?;
    let program = folder.join(runtime.file_name().context("a path of a program")?);
    programs::script(
        &folder,
        &program.file_name().unwrap_or_default().to_string_lossy(),
        &format!("#!/bin/sh\nexec {} \"$@\"\n", runtime.display()),
    )?;
    for is_shim_alive in [true, false] {
        let container = stand.bundle("c1", &["sleep", "1000"]).runtime(&program).run().await?;
        fs::rename(&program, folder.join("away"))?;
        is_well(&container, "e").await?;
        if is_shim_alive {
            ensure!(container.shut_down().await? == 137);
        } else {
            let shim = container.shim_pid()?;
            proc::kill_hard(shim);
            eventually_true("the shim is dead", SOON, || !proc::is_alive(shim)).await?;
            ensure!(container.bundle.delete_command().await?.exit_status == 137);
        }
        ensure!(!kept(&stand, "c1").exists(), "the runtime has kept it");
        fs::rename(folder.join("away"), &program)?;
        fs::remove_dir_all(&container.bundle.folder)?;
    }
    Ok(())
}
