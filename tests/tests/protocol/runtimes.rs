//! The OCI runtime and its state: another daemon's container under the same id, a runtime that was killed half-way, moved or
//! removed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use protobuf::MessageField;
use shim_tests::bundle::{Container, leave};
use shim_tests::cgroups;
use shim_tests::eventually::{SOON, eventually, eventually_true, within};
use shim_tests::isolation;
use shim_tests::proc;
use shim_tests::programs;
use shim_tests::runner::needs_criu;
use shim_tests::stand::Stand;
use shim_tests::suite::{Runtime, Shim, Suite};
use shim_tests::task::any_json;
use shim_tests::ttrpc::{Answer, Code, refusal};

/// The runtime's state folder of a container.
fn kept(stand: &Stand, id: &str) -> PathBuf {
    Path::new("/run/containerd/runc").join(stand.namespace()).join(id)
}

async fn kill_shim(shim: i32) -> Result<()> {
    proc::kill_hard(shim);
    eventually_true("the shim is dead", SOON, || !proc::is_alive(shim)).await
}

/// Checks that it runs, is in its cgroup, and can run an exec.
async fn is_well(container: &Container, exec: &str) -> Result<()> {
    let state = container.task.state(&container.id, "").await?;
    ensure!(state.status.value() == 2 && proc::is_alive(container.pid.cast_signed()), "{state:?}");
    ensure!(container.run(exec, &["sh", "-c", "exit 6"]).await? == 6, "exec {exec}");
    Ok(())
}

/// Two daemons with one namespace and one root of the runtime.
pub(crate) async fn a_refused_create_leaves_the_container_of_another_daemon_alone(stand: Stand) -> Result<()> {
    for (id, runtime) in Runtime::programs().into_iter().map(|runtime| (runtime.name(), runtime)) {
        let runtime = Suite::Bookworm.runtime(runtime);
        let container = stand.bundle(id, &["sleep", "1000"]).runtime(&runtime).run().await?;
        let second = stand.bundle(id, &["sleep", "1000"]).runtime(&runtime).of_another_daemon();
        let task = second.shim().await?;
        ensure!(second.shim_pid()? != container.shim_pid()?, "both containers have the same shim");
        for exec in ["first", "again"] {
            let (code, message) = refusal(task.create(&second.request()).await)?;
            ensure!(code == Code::AlreadyExists && message.contains(id), "{code:?} {message}");
            is_well(&container, exec).await.context(id)?;
        }
        // containerd runs delete after every failed Create
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
    for (id, runtime) in Runtime::programs().into_iter().map(|runtime| (runtime.name(), runtime)) {
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

/// The journal records that the runtime was called, but not that it refused: the keeper was killed in between.
pub(crate) async fn delete_leaves_the_winner_of_a_race_alone_when_the_losers_keeper_was_killed(stand: Stand) -> Result<()> {
    for (id, runtime) in Runtime::programs().into_iter().map(|runtime| (runtime.name(), runtime)) {
        let runtime = Suite::Bookworm.runtime(runtime);
        let gate = stand.gate(&runtime)?;
        let second = stand.bundle(id, &["sleep", "1000"]).runtime(&gate.binary()).of_another_daemon();
        let task = second.shim().await?;
        gate.hold("create")?;
        let request = second.request();
        let create = tokio::spawn(async move { task.create(&request).await });
        gate.held("create").await?;
        let container = stand.bundle(id, &["sleep", "1000"]).runtime(&runtime).run().await?;
        gate.hold_after("create")?;
        gate.let_run("create")?;
        gate.held("create").await?;
        kill_shim(second.shim_pid()?).await?;
        gate.release("create")?;
        ensure!(within("create", SOON, create).await??.is_err(), "a container was made");
        let deleted = second.delete_command().await?;
        ensure!(deleted.exit_status == 137, "{deleted}");
        is_well(&container, "last").await.with_context(|| format!("{id}, after delete"))?;
        ensure!(container.shut_down().await? == 137);
    }
    Ok(())
}

/// A runtime's refusal of a taken id in words that no list has.
pub(crate) async fn a_create_that_fails_in_unknown_words_leaves_a_container_of_another_bundle_alone(stand: Stand) -> Result<()> {
    for (id, runtime) in Runtime::programs().into_iter().map(|runtime| (runtime.name(), runtime)) {
        let runtime = Suite::Bookworm.runtime(runtime);
        let gate = stand.gate(&runtime)?;
        let second = stand.bundle(id, &["sleep", "1000"]).runtime(&gate.binary()).of_another_daemon();
        let task = second.shim().await?;
        gate.hold("create")?;
        let (other, request) = (task.clone(), second.request());
        let create = tokio::spawn(async move { other.create(&request).await });
        gate.held("create").await?;
        let container = stand.bundle(id, &["sleep", "1000"]).runtime(&runtime).run().await?;
        gate.fail("create", Some("that one is there"))?;
        gate.release("create")?;
        let (_, message) = refusal(within("create", SOON, create).await??)?;
        ensure!(message.contains("that one is there"), "{message}");
        is_well(&container, "first").await.context(id)?;
        second.delete_command().await?;
        is_well(&container, "last").await.with_context(|| format!("{id}, after delete"))?;
        leave(&task, second.shim_pid()?, id).await?;
        ensure!(container.shut_down().await? == 137);
    }
    Ok(())
}

/// The keeper was killed before it recorded the container that the runtime had created, completely or half.
pub(crate) async fn delete_removes_what_a_create_had_made_when_its_keeper_was_killed(stand: Stand) -> Result<()> {
    for (name, runtime) in Runtime::programs().into_iter().map(|runtime| (runtime.name(), runtime)) {
        for is_whole in [true, false] {
            let id = format!("{name}-{is_whole}");
            let gate = stand.gate(&Suite::Bookworm.runtime(runtime))?;
            let bundle = stand.bundle(&id, &["sleep", "1000"]).runtime(&gate.binary());
            let (task, request) = (bundle.shim().await?, bundle.request());
            if is_whole {
                gate.hold_after("create")?
            } else {
                gate.hold("create")?
            }
            let create = tokio::spawn(async move { task.create(&request).await });
            let held = gate.held("create").await?;
            kill_shim(bundle.shim_pid()?).await?;
            proc::kill_hard(held);
            if !is_whole {
                fs::create_dir_all(kept(&stand, &id))?;
            }
            ensure!(within("create", SOON, create).await??.is_err(), "a container was made");
            ensure!(kept(&stand, &id).exists(), "the runtime has made nothing");
            gate.release("create")?;
            ensure!(bundle.delete_command().await?.exit_status == 137);
            ensure!(!kept(&stand, &id).exists(), "{id}: the runtime has kept it");
            ensure!(bundle.run().await?.shut_down().await? == 137);
        }
    }
    Ok(())
}

/// The worker that looked whether the id is free is dead when the runtime fails.
pub(crate) async fn what_a_killed_create_has_made_is_removed_by_the_next_worker(stand: Stand) -> Result<()> {
    for (id, runtime) in Runtime::programs().into_iter().map(|runtime| (runtime.name(), runtime)) {
        let gate = stand.gate(&Suite::Bookworm.runtime(runtime))?;
        let bundle = stand.bundle(id, &["sleep", "1000"]).runtime(&gate.binary());
        let task = bundle.shim().await?;
        gate.hold_after("create")?;
        let (other, request) = (task.clone(), bundle.request());
        let create = tokio::spawn(async move { other.create(&request).await });
        let held = gate.held("create").await?;
        ensure!(kept(&stand, id).exists(), "the runtime has created nothing");
        let worker = shim_tests::bundle::worker_of(bundle.shim_pid()?).await?;
        proc::kill_hard(worker);
        eventually_true("the worker is dead", SOON, || !proc::is_alive(worker)).await?;
        proc::kill_hard(held);
        let refused = within("create", SOON, create).await??;
        ensure!(refused.is_err(), "a container was made");
        ensure!(!kept(&stand, id).exists(), "the runtime still has its state");
        gate.release("create")?;
        let again = bundle.run_in(&task).await?;
        ensure!(again.shut_down().await? == 137);
    }
    Ok(())
}

/// Checks the error of a call that needs the missing runtime.
fn names_the_program<T: std::fmt::Debug>(call: &str, answer: Answer<T>, program: &Path) -> Result<()> {
    let (code, message) = refusal(answer).context(call.to_owned())?;
    let is_helpful = message.contains(&program.display().to_string()) && message.contains("install it again");
    ensure!(code == Code::Unavailable && is_helpful, "{call}: {code:?} {message}");
    Ok(())
}

pub(crate) async fn without_the_runtimes_program_every_call_is_refused_with_its_path_and_delete_works_once_it_is_back(
    stand: Stand,
) -> Result<()> {
    for (id, runtime) in Runtime::programs().into_iter().map(|runtime| (runtime.name(), runtime)) {
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

        // calls that need no runtime work
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
        ensure!(task.state(id, "").await?.exit_status == 137, "the shim has forgotten the container");
        ensure!(kept(&stand, id).exists());

        fs::rename(&away, &program)?;
        ensure!(task.delete(id, "").await?.exit_status == 137);
        ensure!(task.delete(&created.id, "").await?.exit_status == 137);
        ensure!(!kept(&stand, id).exists() && !kept(&stand, &created.id).exists(), "the runtime still has its state");
        let shim = container.shim_pid()?;
        leave(task, shim, id).await?;
    }
    Ok(())
}

/// The daemon removes the bundle afterwards, so `delete` must clean up everything.
pub(crate) async fn delete_removes_a_container_whose_runtime_is_gone(stand: Stand) -> Result<()> {
    for (id, runtime) in Runtime::programs().into_iter().map(|runtime| (runtime.name(), runtime)) {
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
        ensure!(!kept(&stand, "c1").exists(), "the runtime still has its state");
        fs::rename(folder.join("away"), &program)?;
        fs::remove_dir_all(&container.bundle.folder)?;
    }
    Ok(())
}

/// With a broken pipe for one of its outputs, SIGPIPE would kill the shell.
pub(crate) async fn a_runtime_may_write_to_both_of_its_outputs(stand: Stand) -> Result<()> {
    let talk = "case \" $* \" in *' start '*) echo output; echo error >&2 ;; esac";
    let runtime = programs::script(stand.folder(), "runtime", &format!("#!/bin/sh\n{talk}\nexec {} \"$@\"\n", stand.runtime().display()))?;
    let container = stand.bundle("c1", &["sh", "-c", "exit 5"]).runtime(&runtime).run().await?;
    let shim = container.shim_pid()?;
    ensure!(container.finish().await? == 5);
    leave(&container.task, shim, "c1").await
}

/// The runtime has started it without delivering its terminal: without a kill it would run for ever.
pub(crate) async fn a_process_whose_start_fails_after_the_runtimes_success_is_killed(stand: Stand) -> Result<()> {
    let text = format!(
        "#!/bin/bash\nargs=()\nwhile [ $# -gt 0 ]; do case $1 in\n--console-socket) shift ;;\n--process) sed 's/\"terminal\": *true/\"terminal\":false/' \"$2\" \
         > \"$2.plain\"; args+=(--process \"$2.plain\"); shift ;;\n*) args+=(\"$1\") ;;\nesac; shift; done\nexec {} \"${{args[@]}}\"\n",
        stand.runtime().display()
    );
    let runtime = programs::script(stand.folder(), "runtime", &text)?;
    let container = stand.bundle("c1", &["sleep", "1000"]).runtime(&runtime).run().await?;
    let mut request = container.bundle.exec_request("e", &["sleep", "1234"]);
    request.terminal = true;
    let mut process = shim_tests::spec::process(&["sleep", "1234"]);
    process["terminal"] = true.into();
    request.spec = MessageField::some(any_json(shim_tests::messages::PROCESS, &process));
    container.task.exec(&request).await?;
    let (_, message) = refusal(container.task.start("c1", "e").await)?;
    ensure!(message.contains("no terminal arrived"), "{message}");
    eventually("it is gone", SOON, async || {
        let left = container.task.pids("c1").await?;
        ensure!(left == [container.pid], "{left:?}");
        Ok(())
    })
    .await?;
    container.shut_down().await.map(drop)
}

/// The OCI runtime does not know init's descendants any more; the worker does not answer, the keeper does.
pub(crate) async fn delete_has_the_keeper_drop_a_container_that_its_runtime_has_deleted(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sh", "-c", "exit 3"]).run().await?;
    ensure!(container.task.wait("c1", "").await? == 3);
    let root = kept(&stand, "c1").parent().context("a folder")?.to_owned();
    let deleted = std::process::Command::new(stand.runtime()).arg("--root").arg(root).args(["delete", "--force", "c1"]).output()?;
    ensure!(deleted.status.success() && !kept(&stand, "c1").exists(), "{deleted:?}");
    nix::mount::umount2(&container.bundle.folder.join("rootfs"), nix::mount::MntFlags::MNT_DETACH)?;
    let shim = container.shim_pid()?;
    ensure!(container.bundle.delete_command().await?.exit_status == 3);
    eventually_true("the shim has exited", SOON, || !proc::is_alive(shim)).await
}

/// A container that is removed without its worker leaves nothing of its execs in the keeper of its pod.
pub(crate) async fn what_is_removed_without_a_worker_leaves_no_descriptors_of_its_execs(stand: Stand) -> Result<()> {
    let anchor = stand.bundle("anchor", &["sleep", "1000"]).group("pod").run().await?;
    let shim = anchor.shim_pid()?;
    let before = proc::fewest_open_files(shim).await?;
    let member = stand.bundle("member", &["sleep", "1000"]).group("pod").run_in(&anchor.task).await?;
    for number in 0..5 {
        let exec = format!("e{number}");
        let mut request = member.bundle.exec_request(&exec, &["sleep", "1000"]);
        for (name, path) in [("in", &mut request.stdin), ("out", &mut request.stdout)] {
            let fifo = stand.folder().join(format!("{exec}-{name}"));
            shim_tests::stdio::fifo(&fifo)?;
            *path = fifo.display().to_string();
        }
        anchor.task.exec(&request).await?;
        anchor.task.start("member", &exec).await?;
    }
    let worker = anchor.worker_pid().await?;
    proc::signal(worker, nix::sys::signal::Signal::SIGSTOP)?;
    let deleted = member.bundle.delete_command().await;
    let _it_was_killed_or_not = proc::signal(worker, nix::sys::signal::Signal::SIGCONT);
    ensure!(deleted?.exit_status == 137);
    eventually("its descriptors are closed", SOON, async || {
        let now = proc::fewest_open_files(shim).await?;
        ensure!(now <= before, "{before} before, {now} now: {:?}", proc::open_files(shim)?);
        Ok(())
    })
    .await?;
    anchor.shut_down().await.map(drop)
}

pub(crate) async fn a_failed_restore_reports_the_message_of_criu(stand: Stand) -> Result<()> {
    needs_criu(&Suite::Forky.program("criu"))?;
    for runtime in Runtime::programs() {
        let real = Suite::Forky.runtime(runtime);
        let text = format!("#!/bin/sh\nPATH={}:$PATH exec {} \"$@\"\n", Suite::Forky.bin().display(), real.display());
        let with_criu = programs::script(stand.folder(), runtime.name(), &text)?;
        let container = stand.bundle(runtime.name(), &["sleep", "1000"]).runtime(&with_criu).run().await?;
        let image = stand.folder().join(format!("image-{runtime}"));
        let id = container.id.clone();
        proc::executes(container.pid, "sleep").await?;
        let request = api::CheckpointTaskRequest { id: id.clone(), path: image.display().to_string(), ..Default::default() };
        container.task.call::<api::Empty>("Checkpoint", &request, SOON * 3).await?;
        ensure!(container.shut_down().await? == 137);
        fs::remove_dir_all(&container.bundle.folder)?;
        for entry in fs::read_dir(&image)? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("core-")) {
                fs::write(&path, "damaged")?;
            }
        }
        let bundle = stand.bundle(&id, &["sleep", "1000"]).runtime(&with_criu);
        let task = bundle.shim().await?;
        let mut request = bundle.request();
        request.checkpoint = image.display().to_string();
        request.parent_checkpoint = "/elsewhere".to_owned();
        let (code, message) = refusal(task.create(&request).await)?;
        ensure!(code == Code::Unimplemented && message.contains("parent_checkpoint"), "{code:?} {message}");
        request.parent_checkpoint.clear();
        task.create(&request).await?;
        let (_, message) = refusal(task.start(&id, "").await)?;
        ensure!(message.contains("restore.log: ") && message.contains("Error (") && message.len() < 8000, "{runtime}: {message}");
        task.delete(&id, "").await?;
        ensure!(!kept(&stand, &id).exists(), "the runtime still has its state");
        leave(&task, bundle.shim_pid()?, &id).await?;
        // crun leaves them behind when criu fails, and does not know the container then
        cgroups::remove(&format!("{}/{}/{id}", isolation::cgroup(), stand.namespace()));
    }
    Ok(())
}

/// The stock shim's conversion of numbers that others refuse.
pub(crate) async fn signal_zero_and_sizes_beyond_sixteen_bits_are_answered_as_the_stock_shim_does(stand: Stand) -> Result<()> {
    let stock = stand.with_shim(&Shim::stock())?;
    let mut answers = Vec::new();
    for stand in [&stock, &stand] {
        let runtime = Suite::Bookworm.runtime(Runtime::Runc);
        let container = stand.bundle("c1", &["sleep", "1000"]).runtime(&runtime).run().await?;
        container.exec("e", &["sleep", "1000"]).await?;
        let mut of_this = Vec::new();
        for exec in ["", "e"] {
            of_this.push(format!("signal 0 for {exec:?}: {:?}", container.task.kill("c1", exec, 0).await));
            for (width, height) in [(u32::MAX, 24), (80, 1 << 16)] {
                let resize = api::ResizePtyRequest { id: "c1".to_owned(), exec_id: exec.to_owned(), width, height, ..Default::default() };
                let answer = container.task.call::<api::Empty>("ResizePty", &resize, SOON).await;
                of_this.push(format!("{width}x{height} for {exec:?}: {}", answer.is_ok()));
            }
        }
        container.task.kill("c1", "e", 9).await?;
        container.task.wait("c1", "e").await?;
        of_this.push(format!("signal 0 when it has ended: {:?}", container.task.kill("c1", "e", 0).await.map_err(|error| error.code())));
        container.shut_down().await?;
        answers.push(of_this);
    }
    stock.leaves_nothing().await?;
    ensure!(answers[0] == answers[1], "{answers:#?}");
    Ok(())
}
