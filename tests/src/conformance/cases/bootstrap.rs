//! The commands: `start`, `delete`, `-info` and `-v`, as each containerd gives them.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::shim::oci::Options;
use protobuf::Message as _;

use super::{sleeper, text};
use crate::bundle::{self, Bundle, leave};
use crate::cgroups::Version;
use crate::clauses;
use crate::conformance::Case;
use crate::eventually::{SOON, eventually, eventually_true};
use crate::isolation;
use crate::runner::skip;
use crate::stand::Stand;
use crate::task::Task;

pub(super) fn cases() -> Vec<Case> {
    clauses![bootstrap:
        "C1" => start_answers_an_address_that_can_be_dialled;
        "C2" => options_on_standard_input_are_taken;
        "C3" => bootstrap_params_are_answered_in_kind;
        "C4" => garbage_on_standard_input_does_not_fail_start;
        "C5" => start_writes_the_address_into_the_bundle;
        "C6" => a_second_start_in_a_group_answers_the_living_shims_address, a_pod_shares_one_shim;
        "C7" => two_concurrent_starts_of_a_group_make_one_shim;
        "C8" => a_shim_stays_for_a_member_whose_start_was_answered;
        "C9" => the_version_is_printed;
        "C10" => info_names_the_runtime;
        "C11" => the_shims_oom_score_is_above_the_daemons, an_oom_score_of_1000_is_kept, an_oom_score_of_minus_999_is_raised;
        "C12" => the_shim_is_placed_in_shim_cgroup;
        "C13" => a_log_without_a_reader_blocks_nothing;
        "C14" => a_path_that_is_too_long_is_refused;
    ]
}

/// Starts a shim with that on standard input, and runs a container in it.
async fn serves(bundle: Bundle, flags: &[&str], input: &[u8]) -> Result<()> {
    let task = Task::connect(&bundle.start_shim_with(flags, input).await?).await?;
    let container = bundle.run_in(&task).await?;
    ensure!(container.finish().await? == 3);
    leave(&task, container.shim_pid()?, &container.id).await
}

async fn start_answers_an_address_that_can_be_dialled(stand: Stand) -> Result<()> {
    serves(stand.bundle("c1", &["sh", "-c", "exit 3"]), &[], &[]).await?;
    serves(stand.bundle("c2", &["sh", "-c", "exit 3"]), &["-debug"], &[]).await
}

async fn options_on_standard_input_are_taken(stand: Stand) -> Result<()> {
    let bundle = stand.bundle("c1", &["sh", "-c", "exit 3"]);
    let options = bundle.options().write_to_bytes()?;
    serves(bundle, &[], &options).await
}

async fn garbage_on_standard_input_does_not_fail_start(stand: Stand) -> Result<()> {
    for (number, input) in [&b"garbage"[..], &[0xff; 100_000]].into_iter().enumerate() {
        serves(stand.bundle(&format!("c{number}"), &["sh", "-c", "exit 3"]), &[], input).await?;
    }
    Ok(())
}

async fn bootstrap_params_are_answered_in_kind(stand: Stand) -> Result<()> {
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
    let output = bundle::run(command, &params.write_to_bytes()?).await?;
    ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let result = BootstrapResult::parse_from_bytes(&output.stdout)?;
    ensure!([2, 3].contains(&result.version) && result.protocol == "ttrpc", "{result:?}");
    let socket = result.address.strip_prefix("unix://").context("not an address")?;
    ensure!(Path::new(socket).parent() == Some(&sockets), "{socket}");
    let task = Task::connect(Path::new(socket)).await?;
    let container = bundle.run_in(&task).await?;
    ensure!(container.finish().await? == 3);
    stand.containerd().events().of_until("c1", "delete").await?;
    bundle::leave(&task, container.shim_pid()?, "c1").await
}

/// containerd 1.6 reads it there when it starts again.
async fn start_writes_the_address_into_the_bundle(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    let address = fs::read_to_string(container.bundle.folder.join("address")).context("no file called address in the bundle")?;
    let address = address.trim();
    ensure!(address.trim_start_matches("unix://") == text(container.task.socket()), "{address:?}");
    container.shut_down().await.map(drop)
}

async fn a_second_start_in_a_group_answers_the_living_shims_address(stand: Stand) -> Result<()> {
    let first = stand.bundle("c1", &["sleep", "1000"]).group("pod").run().await?;
    for number in 2..5 {
        let bundle = stand.bundle(&format!("c{number}"), &["sh", "-c", "exit 5"]).group("pod");
        ensure!(bundle.start_shim().await? == first.task.socket());
        let container = bundle.run_in(&Task::connect(first.task.socket()).await?).await?;
        ensure!(container.finish().await? == 5);
    }
    ensure!(stand.shims().len() == 1, "{:?}", stand.shims());
    first.shut_down().await.map(drop)
}

/// With the annotations that the kubelet sets.
async fn a_pod_shares_one_shim(stand: Stand) -> Result<()> {
    let member = |id: &str, args: &[&str]| stand.bundle(id, args).spec(|spec| spec.annotation("io.kubernetes.cri.sandbox-id", "pod"));
    let pause = member("pod", &["sleep", "1000"]).run().await?;
    let second = member("c2", &["sh", "-c", "exit 5"]);
    ensure!(second.start_shim().await? == pause.task.socket());
    let second = second.run_in(&Task::connect(pause.task.socket()).await?).await?;
    ensure!(second.finish().await? == 5);
    pause.shut_down().await.map(drop)
}

async fn two_concurrent_starts_of_a_group_make_one_shim(stand: Stand) -> Result<()> {
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
        bundle::leave(&Task::connect(&socket).await?, shim, "c").await?;
    }
    Ok(())
}

/// Shutdown comes between the answer to a member's `start` and its Create: the shim must stay.
async fn a_shim_stays_for_a_member_whose_start_was_answered(stand: Stand) -> Result<()> {
    let first = stand.bundle("c1", &["true"]).group("pod").run().await?;
    let second = stand.bundle("c2", &["sh", "-c", "exit 5"]).group("pod");
    let socket = second.start_shim().await?;
    first.finish().await?;
    first.task.shutdown("c1").await?;
    let task = Task::connect(&socket).await?;
    let second = second.run_in(&task).await?;
    ensure!(second.finish().await? == 5);
    bundle::leave(&task, first.shim_pid()?, "c2").await
}

async fn the_version_is_printed(stand: Stand) -> Result<()> {
    let output = bundle::run(stand.command(&["-v"]), &[]).await?;
    ensure!(output.status.success() && !output.stdout.trim_ascii().is_empty(), "{output:?}");
    Ok(())
}

async fn info_names_the_runtime(stand: Stand) -> Result<()> {
    let options = stand.bundle("c1", &["true"]).options().write_to_bytes()?;
    let output = bundle::run(stand.command(&["-info"]), &options).await?;
    ensure!(output.status.success(), "{output:?}");
    let info = containerd_shim_protos::types::introspection::RuntimeInfo::parse_from_bytes(&output.stdout)?;
    ensure!(!info.name.is_empty(), "{info:?}");
    Ok(())
}

/// The OOM killer must choose a container first, then its shim, then the daemon.
async fn the_shims_oom_score_is_above_the_daemons(stand: Stand) -> Result<()> {
    let (shim, init) = scores_under(&stand, 500).await?;
    ensure!(shim > 500 && init >= shim, "the daemon has 500, the shim {shim}, the container {init}");
    Ok(())
}

/// 1000 is the highest score.
async fn an_oom_score_of_1000_is_kept(stand: Stand) -> Result<()> {
    let (shim, init) = scores_under(&stand, 1000).await?;
    ensure!(shim == 1000 && init == 1000, "the daemon has 1000, the shim {shim}, the container {init}");
    Ok(())
}

/// A service manager protects its daemons with such a score: the shim and its containers are protected less.
async fn an_oom_score_of_minus_999_is_raised(stand: Stand) -> Result<()> {
    if fs::write("/proc/self/oom_score_adj", "-999").is_err() {
        return skip("this process may not lower an OOM score");
    }
    let (shim, init) = scores_under(&stand, -999).await?;
    ensure!(shim > -999 && shim < 0 && init >= shim, "the daemon has -999, the shim {shim}, the container {init}");
    Ok(())
}

/// The OOM scores of a shim and of its container, under a daemon (this process) with that score.
async fn scores_under(stand: &Stand, daemon: i32) -> Result<(i32, i32)> {
    fs::write("/proc/self/oom_score_adj", daemon.to_string())?;
    let container = sleeper(stand, "c1").await?;
    let score = |pid: i32| anyhow::Ok(fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?.trim().parse::<i32>()?);
    let scores = (score(container.shim_pid()?)?, score(container.pid.cast_signed())?);
    container.shut_down().await?;
    Ok(scores)
}

async fn the_shim_is_placed_in_shim_cgroup(stand: Stand) -> Result<()> {
    let name = format!("{}/{}-shims", isolation::cgroup(), stand.namespace());
    let hierarchies: &[&str] = if Version::here() == Version::V1 { &["memory/", "pids/", "freezer/"] } else { &[""] };
    let folders: Vec<_> = hierarchies.iter().map(|hierarchy| format!("/sys/fs/cgroup/{hierarchy}{name}")).collect();
    folders.iter().try_for_each(fs::create_dir_all)?;
    let options = Options { shim_cgroup: format!("/{name}"), binary_name: text(&stand.runtime()), ..Options::default() };
    let any = protobuf::well_known_types::any::Any {
        type_url: "containerd.runc.v1.Options".to_owned(),
        value: options.write_to_bytes()?,
        ..Default::default()
    };
    let bundle = stand.bundle("c1", &["sleep", "1000"]);
    let task = Task::connect(&bundle.start_shim_with(&[], &any.write_to_bytes()?).await?).await?;
    let shim = bundle.shim_pid()?;
    let place = fs::read_to_string(format!("/proc/{shim}/cgroup"))?;
    let container = bundle.run_in(&task).await?;
    let theirs = fs::read_to_string(format!("/proc/{}/cgroup", container.pid))?;
    container.shut_down().await?;
    let controller = if Version::here() == Version::V1 { ":memory:" } else { "0::" };
    let is_there = |text: &str| text.lines().any(|line| line.contains(controller) && line.ends_with(&name));
    ensure!(is_there(&place), "{place}");
    ensure!(!is_there(&theirs), "the container is there too: {theirs}");
    eventually("the cgroups are free", SOON, async || Ok(folders.iter().try_for_each(fs::remove_dir)?)).await
}

/// The fifo `log` has no reader, and the shim logs more than it holds.
async fn a_log_without_a_reader_blocks_nothing(stand: Stand) -> Result<()> {
    let bundle = stand.bundle("c1", &["sleep", "1000"]).without_log_reader();
    let task = Task::connect(&bundle.start_shim_with(&["-debug"], &[]).await?).await?;
    let container = bundle.run_in(&task).await?;
    for _ in 0..2000 {
        ensure!(task.kill("missing", "", 9).await.is_err());
    }
    ensure!(container.run("e", &["sh", "-c", "exit 4"]).await? == 4);
    container.shut_down().await.map(drop)
}

/// The kernel takes 107 bytes of a socket's path.
async fn a_path_that_is_too_long_is_refused(stand: Stand) -> Result<()> {
    let bundle = stand.bundle("c1", &["true"]);
    bundle.write()?;
    stand.read_log_of("c1", &bundle.folder.join("log"))?;
    let params = BootstrapParams {
        instance_id: bundle.id.clone(),
        namespace: stand.namespace().to_owned(),
        socket_dir: Some(format!("{}/{}", stand.folder().display(), "x".repeat(100))),
        ..Default::default()
    };
    let output = bundle::run(bundle.command("start", &[]), &params.write_to_bytes()?).await?;
    if output.status.success() {
        // one that does not know the message listens elsewhere
        let task = Task::connect(&bundle::read_address(&output.stdout)?).await.context("its answer cannot be dialled")?;
        return leave(&task, bundle.shim_pid()?, "c1").await;
    }
    ensure!(!output.stderr.is_empty() || !output.stdout.is_empty(), "it failed without a message");
    eventually_true("no shim is left", SOON, || stand.shims().is_empty()).await
}
