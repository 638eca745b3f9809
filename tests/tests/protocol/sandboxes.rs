//! Sandboxes beyond the protocol: workers that crash or stop between the calls, messages of refusals, what expires.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::sandbox_api::{CreateSandboxRequest, StopSandboxRequest};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use protobuf::Message as _;
use protobuf::well_known_types::any::Any;
use shim_tests::bundle::{leave, worker_of};
use shim_tests::cgroups;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::proc::{self, Process, signal, stat};
use shim_tests::runner::skip;
use shim_tests::sandbox::{self, NOT_READY, POD, PodConfig, Profile, READY, Sandbox, Selinux, namespace_of};
use shim_tests::stand::Stand;
use shim_tests::ttrpc::{Answer, CallError, Code, Frame, Wire, refusal};
use tokio::task::JoinHandle;

/// Kills the worker of a sandbox's shim, and waits until it is dead.
async fn kill_worker(sandbox: &Sandbox) -> Result<()> {
    let worker = worker_of(sandbox.bundle.shim_pid()?).await?;
    proc::kill_hard(worker);
    eventually_true("the worker is dead", SOON, || !proc::is_alive(worker)).await
}

/// With process ids of its own, and with those of its containers.
pub(crate) async fn a_sandbox_outlives_workers_killed_between_all_its_calls(stand: Stand) -> Result<()> {
    for shares_pids in [false, true] {
        let number = u8::from(shares_pids);
        let mut sandbox = Sandbox::shim(&stand, &format!("s{number}")).await?;
        if shares_pids {
            sandbox.config.namespaces().pid = POD;
        }
        let id = sandbox.id.clone();
        kill_worker(&sandbox).await?;
        sandbox.create().await?;
        kill_worker(&sandbox).await?;
        ensure!(sandbox.service.status(&id).await?.state == NOT_READY);
        let holder = sandbox.start().await?;
        let ready = sandbox.service.status(&id).await?;
        ensure!(ready.state == READY && ready.pid == holder, "{ready}");
        let wait = sandbox.service.begin_wait(&id).await?;
        kill_worker(&sandbox).await?;
        ensure!(sandbox.service.status(&id).await? == ready, "Status has changed");
        sandbox.service.ping(&id).await?;
        let mut bundle = sandbox.member(&format!("c{number}"), holder, &["sh", "-c", "hostname | grep host && sleep 1000"]);
        if shares_pids {
            bundle = bundle.spec(|spec| spec.join_pids(holder));
        }
        bundle.start_shim().await?;
        let container = bundle.run_in(&sandbox.task).await?;
        kill_worker(&sandbox).await?;
        ensure!(container.task.state(&container.id, "").await?.status.value() == 2, "the container has ended");
        ensure!(container.destroy().await? == 137);
        kill_worker(&sandbox).await?;
        sandbox.stop().await?;
        kill_worker(&sandbox).await?;
        let end = wait.answer(SOON).await.context("Wait")?;
        ensure!(sandbox.service.wait(&id).await? == end, "a second Wait differs");
        ensure!(sandbox.service.status(&id).await?.state == NOT_READY);
        sandbox.end().await?;
    }
    Ok(())
}

/// The keeper does not read what a dead worker has sent: a cgroup that a worker has made must be in its record by then.
pub(crate) async fn a_worker_killed_before_the_keeper_has_read_its_messages_leaves_no_cgroup(stand: Stand) -> Result<()> {
    for shares_pids in [false, true] {
        let mut sandbox = Sandbox::shim(&stand, &format!("s{}", u8::from(shares_pids))).await?;
        if shares_pids {
            sandbox.config.namespaces().pid = POD;
        }
        sandbox.create().await?;
        let keeper = sandbox.bundle.shim_pid()?;
        let worker = worker_of(keeper).await?;
        signal(worker, Signal::SIGSTOP)?;
        let (service, id) = (sandbox.service.clone(), sandbox.id.clone());
        let starting = tokio::spawn(async move { service.start(&id).await });
        eventually("the keeper has the request", SOON, async || {
            let shown = stand.command(&["inspect", "--json", "--namespace", stand.namespace(), &sandbox.id]).output().await?;
            let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
            ensure!(shown.contains("StartSandbox"), "{shown}");
            Ok(())
        })
        .await?;
        // by the time of another answer it has handed it over
        stand.command(&["inspect", "--namespace", stand.namespace(), &sandbox.id]).output().await?;
        signal(keeper, Signal::SIGSTOP)?;
        eventually_true("the keeper is stopped", SOON, || Process::read(keeper).is_ok_and(|keeper| keeper.state == 'T')).await?;
        signal(worker, Signal::SIGCONT)?;
        waits(worker).await?;
        proc::kill_hard(worker);
        eventually_true("the worker is dead", SOON, || !proc::is_alive(worker)).await?;
        signal(keeper, Signal::SIGCONT)?;
        starting.await?.context("Start, by the next worker")?;
        ensure!(sandbox.service.status(&sandbox.id).await?.state == READY);
        sandbox.end().await?;
        drop(sandbox);
        stand.leaves_nothing().await?;
    }
    Ok(())
}

/// Waits until a process has nothing to do.
async fn waits(pid: i32) -> Result<()> {
    let used = || {
        Ok::<_, anyhow::Error>((
            Process::read(pid)?.state,
            stat(pid)?.field(14).to_owned(),
            proc::status_field(pid, "voluntary_ctxt_switches")?,
        ))
    };
    let (mut last, mut since) = (used()?, Instant::now());
    eventually("the process waits", SOON, async || {
        let now = used()?;
        if now != last || now.0 != 'S' {
            (last, since) = (now, Instant::now());
        }
        ensure!(since.elapsed() > Duration::from_millis(200), "{last:?}");
        Ok(())
    })
    .await
}

/// A folder that the kernel does not remove, because something is mounted on it.
struct Busy(PathBuf);

impl Busy {
    fn new(stand: &Stand, folder: PathBuf) -> Result<Self> {
        let over = stand.folder().join("over");
        fs::create_dir_all(&over)?;
        // as that of a cgroup without processes
        fs::write(over.join("cgroup.procs"), "")?;
        let none: Option<&str> = None;
        mount(Some(&over), &folder, none, MsFlags::MS_BIND, none).with_context(|| format!("mount on {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _the_run_goes_anyway = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A pod whose removal has come to its cgroup, which is busy, and the call that removes it.
async fn busy(stand: &Stand, id: &str) -> Result<(Sandbox, Busy, JoinHandle<Answer<()>>)> {
    let sandbox = Sandbox::run(stand, id).await?;
    let busy = Busy::new(stand, cgroups::folders(&sandbox.cgroup()).into_iter().next().context("no cgroup")?)?;
    let service = sandbox.service.clone();
    let (keeper, id) = (sandbox.bundle.shim_pid()?.cast_unsigned(), id.to_owned());
    let shutdown = tokio::spawn(async move { service.shutdown(&id).await });
    eventually("it has left its network, and its cgroup is being removed", SOON, async || {
        ensure!(namespace_of(keeper, "net")? == namespace_of(std::process::id(), "net")?);
        ensure!(cgroups::folders(&sandbox.cgroup()).len() == 1);
        Ok(())
    })
    .await?;
    Ok((sandbox, busy, shutdown))
}

pub(crate) async fn a_busy_cgroup_of_a_pod_is_removed_once_it_is_free_and_delays_no_other_call(stand: Stand) -> Result<()> {
    let (sandbox, busy, shutdown) = busy(&stand, "s1").await?;
    let other = sandbox.service.another().await?;
    // its worker answers that: once the pod is removed, with NotFound
    let (code, message) = refusal(other.ping("s1").await)?;
    ensure!(code == Code::FailedPrecondition, "{code:?}: {message}");
    drop(busy);
    shutdown.await??;
    drop(other);
    sandbox.dismiss().await
}

/// What names the cgroup for `delete` is removed after it.
pub(crate) async fn delete_removes_the_cgroup_that_a_shutdown_has_not_removed(stand: Stand) -> Result<()> {
    let (sandbox, busy, shutdown) = busy(&stand, "s1").await?;
    let keeper = sandbox.bundle.shim_pid()?;
    proc::kill_hard(keeper);
    eventually_true("the keeper is dead", SOON, || !proc::is_alive(keeper)).await?;
    ensure!(shutdown.await? == Err(CallError::Closed), "the shutdown was answered");
    drop(busy);
    sandbox.bundle.delete_command().await?;
    ensure!(cgroups::folders(&sandbox.cgroup()).is_empty(), "a cgroup is left");
    Ok(())
}

/// The daemon asks for each container of a pod: that must not wake a sleeping worker.
pub(crate) async fn the_keeper_answers_for_a_stopped_worker(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim(&stand, "s1").await?;
    sandbox.create().await?;
    sandbox.start().await?;
    let fresh = answers(&sandbox).await?;
    let worker = worker_of(sandbox.bundle.shim_pid()?).await?;
    signal(worker, Signal::SIGSTOP)?;
    let ready = answers(&sandbox).await;
    signal(worker, Signal::SIGCONT)?;
    ensure!(ready? == fresh, "not the same");
    sandbox.end().await
}

async fn answers(sandbox: &Sandbox) -> Result<[Vec<u8>; 3]> {
    let (id, service) = (sandbox.id.as_str(), &sandbox.service);
    let (connect, status, platform) = tokio::join!(sandbox.task.connect_to(id), service.status(id), service.platform(id));
    Ok([connect?.write_to_bytes()?, status?.write_to_bytes()?, platform?.write_to_bytes()?])
}

pub(crate) async fn a_shutdown_can_be_repeated(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::run(&stand, "s1").await?;
    let another = sandbox.service.another().await?;
    sandbox.stop().await?;
    let (one, other, third) = tokio::join!(sandbox.service.shutdown("s1"), another.shutdown("s1"), sandbox.service.shutdown("s1"));
    ensure!(one == Ok(()), "{one:?}");
    for answer in [other, third] {
        ensure!(matches!(answer, Ok(()) | Err(CallError::Closed)), "{answer:?}");
    }
    sandbox.dismiss().await
}

/// For a client that knows no sandbox service any more.
pub(crate) async fn a_shutdown_of_the_task_service_ends_a_sandbox_without_containers(stand: Stand) -> Result<()> {
    for is_started in [false, true] {
        let sandbox = Sandbox::shim(&stand, &format!("s{}", u8::from(is_started))).await?;
        sandbox.create().await?;
        if is_started {
            sandbox.start().await?;
        }
        leave(&sandbox.task, sandbox.bundle.shim_pid()?, &sandbox.id).await?;
        ensure!(!sandbox.bundle.folder.join("pod").exists() && cgroups::folders(&sandbox.cgroup()).is_empty(), "something is left");
    }
    Ok(())
}

/// What a client sees: an invalid argument, and a short sentence that contains `words`.
fn says<T: std::fmt::Debug>(answer: Answer<T>, words: &str) -> Result<()> {
    let (code, message) = refusal(answer)?;
    ensure!(code == Code::InvalidArgument && message.contains(words) && message.len() < 1000, "{code:?}: {message}");
    Ok(())
}

pub(crate) async fn an_invalid_pod_configuration_is_named(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim(&stand, "s1").await?;
    let good = sandbox.config.any();
    let named = |bytes: usize| PodConfig { hostname: "h".repeat(bytes), ..sandbox.config.clone() }.any();
    let cases = [
        (Any { value: good.value[..good.value.len() - 1].to_vec(), ..good.clone() }, "PodSandboxConfig"),
        (Any { value: vec![0xff; 1 << 20], ..good.clone() }, "PodSandboxConfig"),
        (Any { type_url: "runtime.v1.ContainerConfig".to_owned(), ..good }, "runtime.v1.ContainerConfig"),
        (named(3 << 20), "bytes"),
        (named(100_000), "hostname"),
    ];
    for (options, words) in cases {
        let request = CreateSandboxRequest { options: Some(options).into(), ..sandbox.request() };
        says(sandbox.service.create(&request).await, words).with_context(|| words.to_owned())?;
    }
    // none of them is in the way of a valid one
    sandbox.create().await?;
    sandbox.start().await?;
    sandbox.end().await
}

/// No process of a pod executes a program: a holder has a filter of its own, narrower than any profile, and the label of the shim. Of the label of the pod, its
/// shared memory gets the level, where SELinux is active.
pub(crate) async fn a_holder_is_confined_whatever_the_profile_of_its_pod(stand: Stand) -> Result<()> {
    let profiles = [None, Some((0, "")), Some((1, "")), Some((2, "/no/such/profile.json"))];
    for (number, profile) in profiles.into_iter().enumerate() {
        let mut sandbox = Sandbox::shim(&stand, &format!("s{number}")).await?;
        sandbox.config.namespaces().pid = POD;
        sandbox.config.security().seccomp = profile.map(|(kind, file)| Profile { kind, file: file.to_owned() });
        for level in ["s0:c1\"", "s0,x=y", "s0\n"] {
            let mut wrong = sandbox.config.clone();
            wrong.security().selinux = Some(Selinux { level: level.to_owned(), ..Selinux::default() });
            let request = CreateSandboxRequest { options: Some(wrong.any()).into(), ..sandbox.request() };
            says(sandbox.service.create(&request).await, "selinux_options.level").context(level)?;
        }
        sandbox.config.security().selinux = Some(Selinux { level: "s0:c1,c2".to_owned(), ..Selinux::default() });
        sandbox.create().await?;
        let holder = sandbox.start().await?.cast_signed();
        let keeper = sandbox.bundle.shim_pid()?;
        let filters = |pid: i32| anyhow::Ok(proc::status_field(pid, "Seccomp_filters")?.parse::<u32>()?);
        eventually("the holder has its filter", SOON, async || {
            ensure!(filters(holder)? == filters(keeper)? + 1, "{profile:?}");
            Ok(())
        })
        .await?;
        ensure!(filters(keeper)? == filters(std::process::id().cast_signed())?, "{profile:?}: the keeper has a filter");
        ensure!(proc::status_field(holder, "NoNewPrivs")? == "1" && proc::status_field(holder, "CapEff")?.trim_matches('0').is_empty());
        let label = |pid: i32| fs::read(format!("/proc/{pid}/attr/current")).unwrap_or_default();
        ensure!(label(holder) == label(keeper), "another label than the shim's");
        sandbox.end().await?;
    }
    Ok(())
}

pub(crate) async fn a_network_that_is_none_is_named(stand: Stand) -> Result<()> {
    let file = stand.folder().join("file");
    fs::write(&file, "")?;
    for (number, path) in [stand.folder().join("missing"), file].into_iter().enumerate() {
        let sandbox = Sandbox::shim(&stand, &format!("s{number}")).await?;
        let path = path.display().to_string();
        let request = CreateSandboxRequest { netns_path: path.clone(), ..sandbox.request() };
        let answer = match sandbox.service.create(&request).await {
            Ok(()) => sandbox.start().await.map(drop),
            refusal => refusal,
        };
        let (_, message) = refusal(answer)?;
        ensure!(message.contains(&path), "{message}");
        sandbox.dismiss().await?;
    }
    Ok(())
}

pub(crate) async fn a_second_sandbox_in_a_shim_is_refused(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::run(&stand, "s1").await?;
    let request = CreateSandboxRequest { sandbox_id: "s2".to_owned(), ..sandbox.request() };
    let (_, message) = refusal(sandbox.service.create(&request).await)?;
    ensure!(message.contains("s1") || message.contains("s2"), "{message}");
    ensure!(sandbox.service.status("s1").await?.state == READY);
    sandbox.end().await
}

/// The process of the sandbox is the keeper: its process ids are the host's.
pub(crate) async fn a_container_does_not_get_the_process_ids_of_a_keeper(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim(&stand, "s1").await?;
    sandbox.create().await?;
    let holder = sandbox.start().await?;
    let bundle = sandbox.member("c1", holder, &["sleep", "1000"]).spec(|spec| spec.join_pids(holder));
    bundle.write()?;
    let (_, message) = refusal(sandbox.task.create(&bundle.request()).await)?;
    ensure!(message.contains("pid"), "{message}");
    sandbox.end().await
}

/// A client that crashed between Create and Start has forgotten it.
pub(crate) async fn a_sandbox_that_is_never_started_expires(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim_of(stand.bundle("s1", &[]).env("X_SHIM_UNSTARTED_POD_SECONDS", "1")).await?;
    sandbox.create().await?;
    let shim = sandbox.bundle.shim_pid()?;
    eventually_true("the shim has exited", SOON, || !proc::is_alive(shim)).await?;
    sandbox.bundle.delete_command().await?;
    // one that was started stays
    let started = Sandbox::shim_of(stand.bundle("s2", &[]).env("X_SHIM_UNSTARTED_POD_SECONDS", "1")).await?;
    started.create().await?;
    started.start().await?;
    let expires = Sandbox::shim_of(stand.bundle("s3", &[]).env("X_SHIM_UNSTARTED_POD_SECONDS", "1")).await?;
    expires.create().await?;
    let shim = expires.bundle.shim_pid()?;
    eventually_true("the third shim has exited", SOON, || !proc::is_alive(shim)).await?;
    ensure!(started.service.status("s2").await?.state == READY, "it has expired, too");
    started.end().await
}

/// Its client may be about to remove it: a containerd that was restarted, and has met it among its pods.
pub(crate) async fn a_sandbox_that_is_never_started_does_not_expire_while_a_client_asks_about_it(stand: Stand) -> Result<()> {
    const EXPIRES_AFTER: Duration = Duration::from_secs(2);
    let sandbox = Sandbox::shim_of(stand.bundle("s1", &[]).env("X_SHIM_UNSTARTED_POD_SECONDS", "2")).await?;
    sandbox.create().await?;
    let shim = sandbox.bundle.shim_pid()?;
    let (begin, mut asked) = (Instant::now(), Instant::now());
    while begin.elapsed() < EXPIRES_AFTER * 2 {
        tokio::time::sleep(Duration::from_millis(20)).await; // a client's pause
        if sandbox.service.status("s1").await.is_err() {
            ensure!(asked.elapsed() >= EXPIRES_AFTER / 2, "it has expired {:?} after the last call", asked.elapsed());
            return skip("this machine is too busy: no call for a second");
        }
        asked = Instant::now();
    }
    eventually_true("the shim has exited", SOON, || !proc::is_alive(shim)).await?;
    ensure!(asked.elapsed() >= EXPIRES_AFTER, "it has expired {:?} after the last call", asked.elapsed());
    sandbox.bundle.delete_command().await.map(drop)
}

pub(crate) async fn a_request_that_has_half_arrived_when_its_sandbox_expires_is_answered(stand: Stand) -> Result<()> {
    let sandbox = Sandbox::shim_of(stand.bundle("s1", &[]).env("X_SHIM_UNSTARTED_POD_SECONDS", "1")).await?;
    sandbox.create().await?;
    let shim = sandbox.bundle.shim_pid()?;
    let mut wire = Wire::connect(sandbox.task.socket()).await?;
    let request = StopSandboxRequest { sandbox_id: "s1".to_owned(), ..Default::default() };
    let frame = Frame::request(1, sandbox::SERVICE, "StopSandbox", &request).encode();
    let (begin, end) = frame.split_at(frame.len() / 2);
    wire.send(begin).await?;
    eventually("it has expired", SOON, async || {
        let log = stand.log_of("s1");
        ensure!(log.contains("has expired"), "{log}");
        Ok(())
    })
    .await?;
    wire.send(end).await?;
    let answer = wire.answer(1).await?;
    ensure!(answer.as_ref().is_ok() || answer.as_ref().is_err_and(|error| error.code() == Some(Code::NotFound)), "{answer:?}");
    eventually_true("the shim has exited", SOON, || !proc::is_alive(shim)).await?;
    sandbox.bundle.delete_command().await.map(drop)
}
