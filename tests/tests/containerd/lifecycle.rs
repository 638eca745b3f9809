//! Create, start, wait, kill, delete: exit codes, events, refusals.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::types::v1::Status as Phase;
use prost_types::Any;
use serde_json::Value;
use shim_tests::container::{Stdio, bind, code_of};
use shim_tests::context::Context;
use shim_tests::eventually::within;
use shim_tests::messages::{GenericOptions, any};
use shim_tests::operator::{ctr, ctr_run, output_text};
use shim_tests::programs;
use shim_tests::runner::{needs_controller, skip};
use shim_tests::suite::Suite;
use tokio::task::JoinSet;
use tonic::Code;

pub(crate) async fn the_exit_code_is_the_same_in_wait_state_delete_and_event(cx: Context) -> Result<()> {
    let events = cx.events().await?;
    for status in [0, 3, 255] {
        let container = cx.container(&["sh", "-c", &format!("exit {status}")]).start().await?;
        ensure!(container.wait().await? == status);
        let state = container.phase(Phase::Stopped).await?;
        ensure!(state.exit_status == status, "{state:?}");
        ensure!(state.pid == container.pid, "{state:?}");
        let deleted = container.delete().await?;
        ensure!(deleted.exit_status == status && deleted.pid == container.pid, "{deleted:?}");
        events.until("an exit", |_| !events.exits(&container.id, "").is_empty()).await?;
        let exits = events.exits(&container.id, "");
        ensure!(exits.len() == 1 && exits[0].status == status && exits[0].pid == container.pid, "{exits:?}");
    }
    Ok(())
}

pub(crate) async fn events_come_in_order_and_once(cx: Context) -> Result<()> {
    let events = cx.events().await?;
    let container = cx.container(&["echo", "hello"]).stdio(Stdio::OUTPUT).start().await?;
    ensure!(container.finish().await? == 0);
    ensure!(container.io.out().to_end().await? == "hello\n");
    let published = cx.history(&events, &container.id).await?;
    ensure!(published == ["create", "start", "exit", "delete"], "{published:?}");
    Ok(())
}

pub(crate) async fn a_signal_is_reported_as_128_plus_its_number(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).start().await?;
    container.kill(9).await?;
    ensure!(container.finish().await? == 137);
    let script = "trap 'exit 7' TERM; echo ready; sleep 1000 & wait";
    let container = cx.container(&["sh", "-c", script]).stdio(Stdio::OUTPUT).start().await?;
    container.io.out().until("ready").await?;
    container.kill(15).await?;
    ensure!(container.finish().await? == 7);
    Ok(())
}

pub(crate) async fn many_wait_before_and_after_the_exit(cx: Context) -> Result<()> {
    let container = cx.container(&["sh", "-c", "read line; exit 5"]).stdio(Stdio::ALL).start().await?;
    let mut waits = JoinSet::new();
    for _waiter in 0..50 {
        let (client, id) = (cx.client().clone(), container.id.clone());
        waits.spawn(async move { client.wait(&id, "").await });
    }
    container.io.stdin().await?.write_all(b"go\n")?;
    while let Some(answer) = waits.join_next().await {
        ensure!(answer??.exit_status == 5);
    }
    for _late in 0..50 {
        ensure!(container.wait().await? == 5);
    }
    ensure!(container.delete().await?.exit_status == 5);
    ensure!(code_of(container.wait().await)? == Code::NotFound);
    Ok(())
}

pub(crate) async fn a_wait_on_a_created_container_ends_with_its_exit(cx: Context) -> Result<()> {
    let container = cx.container(&["sh", "-c", "exit 6"]).create().await?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let wait = tokio::spawn(async move { client.wait(&id, "").await });
    container.start().await?;
    ensure!(wait.await??.exit_status == 6);
    container.delete().await?;
    Ok(())
}

pub(crate) async fn delete_works_in_created_and_stopped_and_is_refused_in_between(cx: Context) -> Result<()> {
    let created = cx.container(&["sleep", "1000"]).create().await?;
    ensure!(created.state().await?.status() == Phase::Created);
    created.delete().await?;
    ensure!(code_of(created.state().await)? == Code::NotFound);

    let container = cx.container(&["sleep", "1000"]).start().await?;
    ensure!(container.state().await?.status() == Phase::Running);
    cx.refuses(container.delete().await, Code::FailedPrecondition)?;
    cx.client().pause(&container.id).await?;
    ensure!(container.state().await?.status() == Phase::Paused);
    cx.refuses(container.delete().await, Code::FailedPrecondition)?;
    cx.client().resume(&container.id).await?;
    ensure!(container.state().await?.status() == Phase::Running);
    container.kill(9).await?;
    container.phase(Phase::Stopped).await?;
    ensure!(container.delete().await?.exit_status == 137);
    ensure!(code_of(container.delete().await)? == Code::NotFound);
    Ok(())
}

pub(crate) async fn a_killed_created_container_ends_with_137(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).create().await?;
    container.kill(9).await?;
    ensure!(container.finish().await? == 137);
    Ok(())
}

pub(crate) async fn refusals_have_the_code_that_clients_act_on(cx: Context) -> Result<()> {
    let client = cx.client();
    ensure!(code_of(client.state("missing", "").await)? == Code::NotFound);
    ensure!(code_of(client.start("missing", "").await)? == Code::NotFound);
    ensure!(code_of(client.kill("missing", "", 9, false).await)? == Code::NotFound);
    ensure!(code_of(client.delete("missing").await)? == Code::NotFound);

    let container = cx.container(&["sleep", "1000"]).start().await?;
    let id = container.id.as_str();
    cx.refuses(container.start().await, Code::FailedPrecondition)?;
    cx.refuses(client.resume(id).await, Code::FailedPrecondition)?;
    ensure!(code_of(cx.container(&["true"]).id(id).create_task().await)? == Code::AlreadyExists);
    ensure!(code_of(client.state(id, "missing").await)? == Code::NotFound);
    ensure!(code_of(client.start(id, "missing").await)? == Code::NotFound);
    ensure!(code_of(client.kill(id, "missing", 9, false).await)? == Code::NotFound);
    ensure!(code_of(client.delete_exec(id, "missing").await)? == Code::NotFound);
    let exec = container.exec("e", &["sleep", "1000"]).start().await?;
    ensure!(code_of(container.exec("e", &["true"]).add().await)? == Code::AlreadyExists);
    cx.refuses(exec.start().await, Code::FailedPrecondition)?;
    cx.refuses(exec.delete().await, Code::FailedPrecondition)?;
    exec.kill(9).await?;
    ensure!(exec.finish().await? == 137);

    container.kill(9).await?;
    container.wait().await?;
    ensure!(code_of(container.kill(9).await)? == Code::NotFound);
    cx.refuses(container.exec("late", &["true"]).run().await, Code::FailedPrecondition)?;
    cx.refuses(client.pause(id).await, Code::FailedPrecondition)?;
    container.delete().await?;
    Ok(())
}

pub(crate) async fn the_longest_id_works(cx: Context) -> Result<()> {
    let id = format!("{}.{}", "a".repeat(38), "b".repeat(37));
    ensure!(cx.container(&["sh", "-c", "exit 4"]).id(&id).run().await? == 4);
    Ok(())
}

pub(crate) async fn an_id_is_free_again_after_delete(cx: Context) -> Result<()> {
    for status in 0..5 {
        let container = cx.container(&["sh", "-c", &format!("exit {status}")]).id("again").create().await?;
        ensure!(container.run().await? == status);
        container.remove().await?;
    }
    Ok(())
}

pub(crate) async fn options_of_an_unknown_type_are_refused(cx: Context) -> Result<()> {
    let options = Any { type_url: "no.such.Options".to_owned(), value: vec![1, 2, 3] };
    code_of(cx.container(&["true"]).options(Some(options)).create().await)?;
    Ok(())
}

pub(crate) async fn options_that_cri_sends_to_other_runtimes_are_accepted(cx: Context) -> Result<()> {
    if !cx.shim().is_ours() {
        return skip("the stock shim does not take them");
    }
    let options = GenericOptions { type_url: "io.containerd.x.v2.Options".to_owned(), ..GenericOptions::default() };
    ensure!(cx.container(&["sh", "-c", "exit 3"]).options(Some(any(&options))).run().await? == 3);
    Ok(())
}

pub(crate) async fn no_options_mean_a_runtime_from_path(cx: Context) -> Result<()> {
    ensure!(cx.container(&["sh", "-c", "exit 3"]).options(None).run().await? == 3);
    Ok(())
}

pub(crate) async fn a_missing_program_is_named_and_leaves_nothing(cx: Context) -> Result<()> {
    let Err(error) = cx.container(&["/no/such/program"]).start().await else { anyhow::bail!("it was accepted") };
    ensure!(format!("{error:#}").contains("/no/such/program"), "{error:#}");
    // runc fails at create, crun at start: then there is a task to delete
    for task in cx.client().list().await? {
        let _may_have_ended = cx.client().kill(&task.id, "", 9, false).await;
        cx.client().delete(&task.id).await?;
    }
    Ok(())
}

pub(crate) async fn a_missing_root_file_system_is_refused(cx: Context) -> Result<()> {
    code_of(cx.container(&["true"]).rootfs(vec![bind("/no/such/folder")]).create().await)?;
    Ok(())
}

pub(crate) async fn two_root_file_system_mounts_are_stacked_and_both_unmounted(cx: Context) -> Result<()> {
    let upper = cx.folder().join("upper");
    let lower = shim_tests::rootfs::shared()?;
    std::fs::create_dir_all(upper.join("data"))?;
    std::fs::create_dir_all(upper.join("work"))?;
    let overlay = containerd_client::types::Mount {
        r#type: "overlay".to_owned(),
        source: "overlay".to_owned(),
        target: String::new(),
        options: vec![
            format!("lowerdir={}", lower.display()),
            format!("upperdir={}", upper.join("data").display()),
            format!("workdir={}", upper.join("work").display()),
        ],
    };
    let container = cx.container(&["touch", "/written"]).rootfs(vec![bind(&lower.display().to_string()), overlay]);
    ensure!(container.run().await? == 0);
    ensure!(upper.join("data/written").exists());
    Ok(())
}

pub(crate) async fn the_runtimes_own_message_reaches_the_client(cx: Context) -> Result<()> {
    let gate = cx.gate()?;
    for verb in ["create", "start"] {
        gate.fail(verb, Some("injected failure"))?;
        let error = match cx.container(&["true"]).runtime_binary(&gate.binary()).create().await {
            Ok(container) => {
                let error = container.start().await;
                container.delete().await?;
                anyhow::Error::new(error.err().ok_or_else(|| anyhow::anyhow!("{verb} was accepted"))?)
            }
            Err(error) => error,
        };
        ensure!(format!("{error:#}").contains("injected failure"), "{verb}: {error:#}");
        gate.fail(verb, None)?;
    }
    Ok(())
}

pub(crate) async fn a_runtime_that_prints_a_megabyte_blocks_nothing(cx: Context) -> Result<()> {
    let gate = cx.gate()?;
    for verb in ["create", "start", "exec", "kill", "delete"] {
        gate.flood(verb, 1 << 20)?;
    }
    let container = cx.container(&["sh", "-c", "trap 'exit 3' TERM; echo ready; sleep 1000 & wait"]);
    let container = container.runtime_binary(&gate.binary()).stdio(Stdio::OUTPUT).start().await?;
    container.io.out().until("ready").await?;
    ensure!(container.exec("e", &["sh", "-c", "exit 9"]).run().await? == 9);
    container.kill(15).await?;
    ensure!(container.finish().await? == 3);
    Ok(())
}

pub(crate) async fn one_containers_slow_create_delays_no_other(cx: Context) -> Result<()> {
    let gate = cx.gate()?;
    let group = |spec: shim_tests::spec::Spec| spec.annotation("io.containerd.runc.v2.group", "pod");
    let sibling = cx.container(&["sleep", "1000"]).spec(group).start().await?;
    gate.hold("create")?;
    let slow = cx.container(&["sh", "-c", "exit 3"]).spec(group).runtime_binary(&gate.binary());
    let local = tokio::task::LocalSet::new();
    let slow = local.run_until(async move {
        let slow = tokio::task::spawn_local(slow.create());
        gate.held("create").await?;
        for _call in 0..20 {
            within("state of a sibling", Duration::from_secs(1), sibling.state()).await??;
        }
        ensure!(sibling.exec("e", &["sh", "-c", "exit 8"]).run().await? == 8);
        sibling.destroy().await?;
        gate.release("create")?;
        slow.await?
    });
    ensure!(slow.await?.run().await? == 3);
    Ok(())
}

pub(crate) async fn a_group_shares_one_shim_until_its_last_container_is_deleted(cx: Context) -> Result<()> {
    for annotation in ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"] {
        let pod = format!("pod-{}", annotation.len());
        let member = |spec: shim_tests::spec::Spec| spec.annotation(annotation, &pod);
        let first = cx.container(&["sleep", "1000"]).id(&pod).spec(member).start().await?;
        let shim = cx.shim_pid(&pod)?;
        let second = cx.container(&["sleep", "1000"]).spec(member).start().await?;
        let third = cx.container(&["sh", "-c", "exit 3"]).spec(member).create().await?;
        ensure!(cx.shims().len() == 1, "{:?}", cx.shims());
        ensure!(third.run().await? == 3);
        // the container with the group's id is deleted first
        first.destroy().await?;
        ensure!(second.exec("e", &["sh", "-c", "exit 2"]).run().await? == 2);
        ensure!(cx.shims().iter().map(|shim| shim.pid).eq([shim]), "{:?}", cx.shims());
        second.destroy().await?;
        cx.leaves_nothing().await?;
    }
    Ok(())
}

pub(crate) async fn sockets_are_for_root_alone(cx: Context) -> Result<()> {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let mut checked = 0;
    for folder in ["/run/containerd/s", "/run/containerd-shim-x"] {
        let Ok(entries) = std::fs::read_dir(folder) else { continue };
        for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_socket())) {
            let Ok(found) = entry.metadata() else { continue };
            ensure!(found.mode() & 0o077 == 0, "{}: {:o}", entry.path().display(), found.mode());
            checked += 1;
        }
    }
    ensure!(checked > 0, "no socket found");
    container.destroy().await?;
    Ok(())
}

/// `ctr shim` computes where the shim listens from the daemon's address, the namespace and the id. Of its commands, `exec` needs a
/// client that does not crash, and `delete` names no container: the stock shim refuses that as well.
pub(crate) async fn ctr_finds_the_shim_by_the_containers_id(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let shim = |words: &[&str]| ctr(&cx).args(["shim", "--id", &container.id]).args(words).output();
    let state = shim(&["state"])?;
    let printed: Value = serde_json::from_slice(&state.stdout).with_context(|| output_text(&state))?;
    ensure!(printed["id"] == *container.id && printed["pid"] == container.pid && printed["status"] == 2, "{printed:#}");
    for (words, refusal) in [(["start", container.id.as_str()], "start"), (["delete", ""], "NotFound")] {
        let output = shim(&words)?;
        ensure!(!output.status.success() && output_text(&output).contains(refusal), "{words:?}: {}", output_text(&output));
    }
    if cx.suite() == Suite::Forky {
        let output = shim(&["shutdown"])?;
        ensure!(output.status.success(), "{}", output_text(&output));
    }
    ensure!(container.destroy().await? == 137);
    Ok(())
}

/// A program in front of an OCI runtime looks for init's pid in the file that containerd's own shims write.
pub(crate) async fn a_wrapper_of_the_runtime_finds_init_pid(cx: Context) -> Result<()> {
    let pid = cx.folder().join("pid");
    let text = format!(
        "#!/bin/sh\ncase \" $* \" in *' create '*) {real} \"$@\" && cat init.pid > {} ;; *) exec {real} \"$@\" ;; esac\n",
        pid.display(),
        real = cx.runtime_program().display()
    );
    let wrapper = programs::script(cx.folder(), "wrapper", &text)?;
    let container = cx.container(&["sleep", "1000"]).runtime_binary(&wrapper).start().await?;
    let found: u32 = std::fs::read_to_string(&pid)?.trim().parse()?;
    ensure!(found == container.pid, "{found}, not {}", container.pid);
    ensure!(container.destroy().await? == 137);
    Ok(())
}

/// As the next one. The native engine leaves the class of a processor's resources to the runtime, which here notes its call and fails.
pub(crate) async fn what_ctr_asks_for_reaches_the_runtime(cx: Context) -> Result<()> {
    needs_controller("cpu")?;
    let cx = cx.with_own_daemon().await?;
    let calls = cx.folder().join("calls");
    for name in ["crun", "runc"] {
        programs::script(&cx.daemon().bin(), name, &format!("#!/bin/sh\necho \"$@\" >> {}; exit 1\n", calls.display()))?;
    }
    let output = ctr_run(&cx, "c1", &["--detach", "--no-pivot", "--null-io", "--rdt-class", "x"])?.args(["/bin/true"]).output()?;
    ensure!(!output.status.success(), "{}", output_text(&output));
    let calls = std::fs::read_to_string(&calls).with_context(|| output_text(&output))?;
    ensure!(calls.lines().any(|call| call.contains(" create ") && call.contains("--no-pivot")), "{calls}");
    cx.daemon().is_alone().await
}

/// containerd's Go client up to 1.7 requests `--no-pivot` from a runtime other than runc's in an older message.
pub(crate) async fn what_ctr_asks_for_is_taken(cx: Context) -> Result<()> {
    // ctr gives each container a share of it
    needs_controller("cpu")?;
    let cx = cx.with_own_daemon().await?;
    let output = ctr_run(&cx, "c1", &["--detach", "--no-pivot", "--null-io"])?.args(["/bin/sleep", "1000"]).output()?;
    ensure!(output.status.success(), "{}", output_text(&output));
    let state = cx.client().state("c1", "").await?;
    ensure!(shim_tests::proc::is_alive(state.pid.cast_signed()), "{state:?}");
    cx.client().kill("c1", "", 9, false).await?;
    cx.client().wait("c1", "").await?;
    cx.client().delete("c1").await?;
    cx.daemon().is_alone().await
}
