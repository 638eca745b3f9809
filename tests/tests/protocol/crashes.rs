//! Keepers and workers that crash, stop or cannot start: calls are answered, and exit codes are right.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api::{self, DeleteResponse};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;
use protobuf::Message as _;
use shim_tests::bundle::{self, Container, worker_of};
use shim_tests::cgroups;
use shim_tests::eventually::{SOON, a_second, eventually, eventually_true, within};
use shim_tests::proc;
use shim_tests::proc::signal;
use shim_tests::programs;
use shim_tests::stand::Stand;
use shim_tests::suite::Shim;
use shim_tests::task::{Task, V3};
use shim_tests::ttrpc::Code;

/// Kills a shim and waits until it is dead.
async fn kill_shim(shim: i32) -> Result<()> {
    proc::kill_hard(shim);
    eventually_true("the shim is dead", SOON, || !proc::is_alive(shim)).await
}

/// The container exited by itself after its shim was dead: only the kernel knows the exit.
pub(crate) async fn an_unobserved_exit_is_reported_as_killed(stand: Stand) -> Result<()> {
    let gate = stand.folder().join("gate");
    shim_tests::stdio::fifo(&gate)?;
    let container = stand.bundle("c1", &["sh", "-c", "read go; exit 3"]).stdio(&gate.display().to_string(), "", "").run().await?;
    kill_shim(container.shim_pid()?).await?;
    // the shim's death closes its stdin, so it exits, and init of the run reaps it
    let pid = container.pid.cast_signed();
    eventually_true("it has exited and is reaped", SOON, || proc::Process::read(pid).is_err()).await?;
    let deleted = container.bundle.delete_command().await?;
    ensure!(deleted.exit_status == 137, "{deleted:?}");
    Ok(())
}

/// `delete` after a normal deletion, the shim alive or gone: containerd runs it every time.
pub(crate) async fn delete_after_a_deletion_repeats_its_answer(stand: Stand) -> Result<()> {
    let anchor = stand.bundle("anchor", &["sleep", "1000"]).group("pod").run().await?;
    let container = stand.bundle("c1", &["sh", "-c", "exit 3"]).group("pod").run_in(&anchor.task).await?;
    ensure!(container.finish().await? == 3);
    ensure!(container.bundle.delete_command().await?.exit_status == 3, "beside its shim");
    anchor.shut_down().await?;
    ensure!(container.bundle.delete_command().await?.exit_status == 3, "without a shim");
    ensure!(anchor.bundle.delete_command().await?.exit_status == 137);
    Ok(())
}

/// The file that names the shim was removed; the shim of a pod has the id of another container.
pub(crate) async fn delete_ends_a_container_whose_bundle_was_removed(stand: Stand) -> Result<()> {
    let anchor = stand.bundle("anchor", &["sleep", "1000"]).group("pod").run().await?;
    let other = stand.bundle("other", &["sleep", "1000"]).run().await?;
    for id in ["member", "alone"] {
        let build = |args: &[&str]| {
            let bundle = stand.bundle(id, args);
            if id == "member" { bundle.group("pod") } else { bundle }
        };
        let container = build(&["sleep", "1000"]).run().await?;
        let rootfs = container.bundle.folder.join("rootfs");
        umount2(&rootfs, MntFlags::MNT_DETACH)?;
        fs::remove_dir_all(&container.bundle.folder)?;
        let mut command = container.bundle.command("delete", &[]);
        command.current_dir("/");
        let output = bundle::run(command, &[]).await?;
        ensure!(output.status.success(), "{id}: {output:?}");
        let deleted = DeleteResponse::parse_from_bytes(&output.stdout)?;
        ensure!(deleted.exit_status == 137 && deleted.pid == container.pid, "{id}: {deleted}");
        ensure!(!proc::is_alive(container.pid.cast_signed()), "{id} is alive");
        // its name is free, for the runtime as well
        let again = build(&["sh", "-c", "exit 5"]).run().await?;
        ensure!(again.finish().await? == 5);
        if id == "alone" {
            shim_tests::bundle::leave(&again.task, again.shim_pid()?, id).await?;
        }
    }
    // no other container was affected
    for container in [anchor, other] {
        ensure!(container.shut_down().await? == 137);
    }
    Ok(())
}

/// Like the newest daemons: they use the v3 service, and run `start` only for the first container of a pod.
pub(crate) async fn a_killed_keeper_ends_a_pod_of_the_newest_daemon_with_true_exit_codes(stand: Stand) -> Result<()> {
    let first = stand.bundle("pod", &["sleep", "1000"]).group("pod");
    first.write()?;
    let params = BootstrapParams {
        instance_id: "pod".to_owned(),
        namespace: stand.namespace().to_owned(),
        containerd_ttrpc_address: stand.containerd().path().display().to_string(),
        ..Default::default()
    };
    let output = bundle::run(first.command("start", &[]), &params.write_to_bytes()?).await?;
    let result = BootstrapResult::parse_from_bytes(&output.stdout)?;
    let socket = Path::new(result.address.strip_prefix("unix://").context("not an address")?).to_owned();
    let task = Task::connect(&socket).await?.service(V3);
    let mut pod = vec![(first.run_in(&task).await?, 137)];
    for (id, script, status) in [("running", "exec sleep 1000", 137), ("ended", "exit 3", 3), ("paused", "exec sleep 1000", 137)] {
        let bundle = stand.bundle(id, &["sh", "-c", script]).group("pod");
        pod.push((bundle.run_in(&task).await?, status));
    }
    task.pause("paused").await?;
    ensure!(task.wait("ended", "").await? == 3);
    ensure!(stand.shims().len() == 1, "{:?}", stand.shims());
    kill_shim(pod[0].0.shim_pid()?).await?;
    for round in 0..2 {
        for (container, status) in &pod {
            let deleted = container.bundle.delete_command().await?;
            ensure!(deleted.exit_status == *status && deleted.pid == container.pid, "{} in round {round}: {deleted}", container.id);
            let pid = container.pid.cast_signed();
            eventually_true(format!("{} is dead", container.id), SOON, || !proc::is_alive(pid)).await?;
        }
    }
    // the pod can be created again
    let again = stand.bundle("pod", &["sh", "-c", "exit 5"]).group("pod").run().await?;
    ensure!(again.finish().await? == 5);
    shim_tests::bundle::leave(&again.task, again.shim_pid()?, "pod").await
}

/// A runtime that is killed in the middle of a create leaves processes behind that continue to set the container up: their files would
/// be in the bundle, below the root file system that is unmounted meanwhile, and prevent the daemon from removing it.
pub(crate) async fn children_of_a_runtime_do_not_outlive_its_create(stand: Stand) -> Result<()> {
    let mark = stand.folder().join("mark");
    // one in a session of its own, as runc's, and one below that
    let left = format!("sleep 1000 & echo $$ $! > {0}.part; mv {0}.part {0}; wait", mark.display());
    let create = format!("setsid sh -c '{left}' & exec sleep 1000");
    let text = format!("#!/bin/sh\ncase \" $* \" in *' create '*) {create};; esac\nexec {} \"$@\"\n", stand.runtime().display());
    let runtime = programs::script(stand.folder(), "runtime", &text)?;
    let bundle = stand.bundle("c1", &["true"]).runtime(&runtime);
    let (task, request) = (bundle.shim().await?, bundle.request());
    let create = tokio::spawn(async move { task.create(&request).await });
    let pids = eventually("the runtime has started something", SOON, async || Ok(fs::read_to_string(&mark)?)).await?;
    ensure!(bundle.delete_command().await?.exit_status == 137);
    let pids = pids.split_whitespace().map(str::parse).collect::<Result<Vec<i32>, _>>()?;
    ensure!(pids.len() == 2, "{pids:?}");
    eventually_true("it is dead", SOON, || pids.iter().all(|pid| !proc::is_alive(*pid))).await?;
    let refused = within("create", SOON, create).await??;
    ensure!(refused.is_err(), "a container was created");
    Ok(())
}

/// The calls that containerd makes at its start, with a timeout of a second.
async fn answers_at_once(container: &Container) -> Result<()> {
    let (task, id, second) = (container.task.another().await?, container.id.as_str(), a_second());
    let (connect, state, pids) =
        tokio::join!(task.connect_within(id, second), task.state_within(id, "", second), task.pids_within(id, second));
    let (connect, state, pids) = (connect.context("Connect")?, state.context("State")?, pids.context("Pids")?);
    ensure!(connect.shim_pid.cast_signed() == container.shim_pid()? && connect.task_pid == container.pid, "{connect:?}");
    ensure!(state.pid == container.pid && pids.contains(&container.pid), "{state:?} {pids:?}");
    Ok(())
}

pub(crate) async fn what_containerd_asks_at_its_start_is_answered_without_a_worker(stand: Stand) -> Result<()> {
    // with an executable of its own, so that it can be made impossible to execute
    let program = stand.folder().join(stand.shim().binary_name());
    programs::copy(stand.binary(), &program)?;
    let stand = stand.with_shim(&Shim { binary: Some(program.clone()), ..stand.shim().clone() })?;
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let keeper = container.shim_pid()?;
    answers_at_once(&container).await?;

    let worker = container.worker_pid().await?;
    signal(worker, Signal::SIGSTOP)?;
    answers_at_once(&container).await.context("while the worker is stopped")?;
    signal(worker, Signal::SIGCONT)?;
    answers_at_once(&container).await?;

    fs::set_permissions(&program, Permissions::from_mode(0o600))?;
    proc::kill_hard(worker);
    eventually_true("the worker is dead", SOON, || !proc::is_alive(worker)).await?;
    let waiting = container.task.begin_wait("c1", "").await?;
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(2) {
        answers_at_once(&container).await.context("while no worker can be executed")?;
    }
    ensure!(proc::children(keeper).iter().all(|child| !child.command.contains(" worker")), "there is a worker");
    // calls that need a worker wait for it
    fs::set_permissions(&program, Permissions::from_mode(0o755))?;
    container.task.kill("c1", "", 9).await?;
    ensure!(waiting.status(SOON).await? == 137);
    worker_of(keeper).await?;
    container.shut_down().await?;
    stand.leaves_nothing().await
}

/// Every new worker is killed: the keeper gives its ready answers, and nothing is lost when a container exits.
pub(crate) async fn a_crash_looping_worker_does_not_prevent_ready_answers(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let keeper = container.shim_pid()?;
    let killer = tokio::spawn(async move {
        let mut killed = 0;
        loop {
            for child in proc::children(keeper).into_iter().filter(|child| child.command.contains(" worker")) {
                proc::kill_hard(child.pid);
                killed += 1;
            }
            tokio::time::sleep(Duration::from_millis(2)).await; // the polling interval
            if killed > 100_000 {
                return;
            }
        }
    });
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(2) {
        answers_at_once(&container).await?;
    }
    let other = container.task.another().await?;
    let exec = tokio::spawn(async move { other.state("c1", "missing").await });
    killer.abort();
    ensure!(exec.await?.is_err_and(|error| error.code() == Some(Code::NotFound)));
    ensure!(container.run("e", &["sh", "-c", "exit 6"]).await? == 6);
    container.shut_down().await.map(drop)
}

/// The worker hangs and does not answer `delete`.
pub(crate) async fn delete_beside_a_stopped_worker_kills_the_container_in_time(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let worker = container.worker_pid().await?;
    signal(worker, Signal::SIGSTOP)?;
    let begin = Instant::now();
    let first = container.bundle.delete_command().await;
    let took = begin.elapsed();
    let second = container.bundle.delete_command().await;
    // a shim without containers may have exited, and its worker with it
    let _gone_or_not = signal(worker, Signal::SIGCONT);
    ensure!(first?.exit_status == 137 && second?.exit_status == 137);
    ensure!(took < Duration::from_secs(5), "it took {took:?}");
    let shim = container.shim_pid()?;
    let _it_may_have_left = container.task.delete("c1", "").await;
    let _as_before = container.task.shutdown("c1").await;
    eventually_true("the shim has exited", SOON, || !proc::is_alive(shim)).await
}

/// Others freeze containers too, and on cgroup v1 a frozen process does not exit.
pub(crate) async fn a_frozen_container_is_deleted(stand: Stand) -> Result<()> {
    let freeze = |pid: u32| cgroups::freeze(&cgroups::of(pid, "freezer")?);
    let created = stand.bundle("created", &["sleep", "1000"]).group("pod").create().await?;
    let task = created.task.clone();
    freeze(created.pid)?;
    created.task.delete("created", "").await.context("Delete of one that was never started")?;
    ensure!(!proc::is_alive(created.pid.cast_signed()), "it is alive");

    let running = stand.bundle("running", &["sleep", "1000"]).group("pod").run_in(&task).await?;
    freeze(running.pid)?;
    let deleted = running.bundle.delete_command().await.context("the command delete")?;
    ensure!(deleted.exit_status == 137 && deleted.pid == running.pid, "{deleted}");
    ensure!(!proc::is_alive(running.pid.cast_signed()), "it is alive");

    let orphan = stand.bundle("orphan", &["sleep", "1000"]).run().await?;
    freeze(orphan.pid)?;
    kill_shim(orphan.shim_pid()?).await?;
    let deleted = orphan.bundle.delete_command().await.context("the command delete without a shim")?;
    ensure!(deleted.exit_status == 137 && deleted.pid == orphan.pid, "{deleted}");
    stand.leaves_nothing().await
}

/// The sockets for terminals of runtimes that were under way when the keeper was killed.
pub(crate) async fn delete_removes_the_console_sockets_of_a_killed_keeper(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime())?;
    for verb in ["create", "exec"] {
        let bundle = stand.bundle(verb, &["sleep", "1000"]).runtime(&gate.binary()).terminal();
        let task = bundle.shim().await?;
        let keeper = bundle.shim_pid()?;
        if verb == "exec" {
            bundle.clone().run_in(&task).await?;
            let request = api::ExecProcessRequest { terminal: true, ..bundle.exec_request("e", &["sleep", "1000"]) };
            task.exec(&request).await?;
        }
        gate.hold(verb)?;
        let request = bundle.request();
        let (task, id) = (task.clone(), bundle.id.clone());
        let asked = tokio::spawn(async move {
            match id.as_str() {
                "exec" => task.start(&id, "e").await.map(drop),
                _ => task.create(&request).await.map(drop),
            }
        });
        let held = gate.held(verb).await?;
        ensure!(console_sockets(keeper)?.len() == 1, "{:?}", console_sockets(keeper)?);
        kill_shim(keeper).await?;
        proc::kill_hard(held);
        ensure!(within("the answer", SOON, asked).await??.is_err(), "it succeeded");
        gate.release(verb)?;
        ensure!(bundle.delete_command().await?.exit_status == 137);
        ensure!(console_sockets(keeper)?.is_empty(), "{verb}: {:?}", console_sockets(keeper)?);
    }
    stand.leaves_nothing().await
}

/// The console sockets of a keeper, in the folder that all keepers share.
fn console_sockets(keeper: i32) -> Result<Vec<String>> {
    let names = fs::read_dir("/run/containerd-shim-x")?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let names: Vec<String> = names.collect::<Result<_>>()?;
    Ok(names.into_iter().filter(|name| name.starts_with(&format!("c{keeper}-"))).collect())
}
