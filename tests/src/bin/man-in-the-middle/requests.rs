//! How a fault changes a request.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use containerd_shim_protos::shim::oci::Options;
use containerd_shim_protos::ttrpc::Code;
use containerd_shim_protos::{api, sandbox_api};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message as _;
use protobuf::Message as _;
use serde_json::Value;
use shim_tests::cgroups;
use shim_tests::programs;
use shim_tests::sandbox::{CONTAINER, Linux, NODE, PodConfig};
use shim_tests::task::{V2, V3};

use super::calls::{Call, Link, edit};
use super::stdout;

/// The effect on a request.
enum Then {
    /// Refuses.
    Refuse(Code),
    /// Accepts, and does nothing.
    Answer,
    /// Never answers.
    Silence,
    /// Forwards it, and closes the connection before there is an answer.
    HangUp,
    /// Forwards it when this is no longer in progress: a method, [`HALF_A_FRAME`], [`AN_EVENT`] or the connection's name.
    After(fn(&Link) -> String),
    /// Forwards it with this change.
    Change(fn(&Link, &mut Call) -> Result<()>),
}

use Then::{After, Answer, Change, HangUp, Refuse, Silence};

pub(super) const HALF_A_FRAME: &str = "half a frame";
pub(super) const AN_EVENT: &str = "an event";

/// What was done to the request.
pub(super) enum Met {
    Passed,
    Kept,
    Answered,
    Refused(Code),
    Lost,
}

struct Rule {
    fault: &'static str,
    /// Empty for all.
    method: &'static str,
    when: fn(&Link, &Call) -> bool,
    then: Then,
}

const fn rule(fault: &'static str, method: &'static str, when: fn(&Link, &Call) -> bool, then: Then) -> Rule {
    Rule { fault, method, when, then }
}

const ALWAYS: fn(&Link, &Call) -> bool = |_, _| true;
const CREATED: fn(&Link, &Call) -> bool = |link, call| is_in(link, call, 1);
const STOPPED: fn(&Link, &Call) -> bool = |link, call| is_in(link, call, 3);
const PAUSED: fn(&Link, &Call) -> bool = |link, call| is_in(link, call, 4);

fn is_in(link: &Link, call: &Call, phase: i32) -> bool {
    link.shared.state(call).is_some_and(|state| state.status.value() == phase)
}

const RULES: &[Rule] = &[
    rule("no-v2", "", |_, call| call.service == V2, Refuse(Code::UNIMPLEMENTED)),
    rule("no-v3", "", |_, call| call.service == V3, Refuse(Code::UNIMPLEMENTED)),
    rule("no-close-io", "CloseIO", ALWAYS, Answer),
    rule("no-resize", "ResizePty", ALWAYS, Answer),
    rule("no-pause", "Pause", ALWAYS, Answer),
    rule("no-update", "Update", ALWAYS, Answer),
    rule("stay", "Shutdown", ALWAYS, Answer),
    rule("silent-stats", "Stats", ALWAYS, Silence),
    rule("no-stats-at-the-end", "Stats", STOPPED, Refuse(Code::NOT_FOUND)),
    rule("no-pids-at-the-end", "Pids", STOPPED, Answer),
    rule("no-kill-before-start", "Kill", CREATED, Refuse(Code::FAILED_PRECONDITION)),
    rule("no-kill-when-paused", "Kill", PAUSED, Refuse(Code::FAILED_PRECONDITION)),
    rule("no-wait-before-start", "Wait", CREATED, Refuse(Code::FAILED_PRECONDITION)),
    rule("no-kill-for-all", "Kill", is_for_all, Refuse(Code::UNIMPLEMENTED)),
    rule("short-ids", "Create", |_, call| call.id.len() > 64, Refuse(Code::INVALID_ARGUMENT)),
    rule("one-life", "Create", |link, call| link.shared.done(call, "Delete").is_some(), Refuse(Code::ALREADY_EXISTS)),
    rule("one-exec", "Exec", |link, call| link.shared.done(call, "Delete").is_some(), Refuse(Code::ALREADY_EXISTS)),
    rule("close-io-once", "CloseIO", |link, call| link.shared.done(call, "CloseIO").is_some(), Refuse(Code::FAILED_PRECONDITION)),
    rule("forget-execs", "State", was_added_on_another_connection, Refuse(Code::NOT_FOUND)),
    rule("busy-with-kill", "Wait", |link, _| link.shared.is_busy("Kill"), Refuse(Code::UNAVAILABLE)),
    rule("one-create-at-a-time", "State", ALWAYS, After(|_| "Create".to_owned())),
    rule("starts-first", "State", ALWAYS, After(|_| "Start".to_owned())),
    rule("half-frame-blocks", "", ALWAYS, After(|_| HALF_A_FRAME.to_owned())),
    rule("events-first", "", ALWAYS, After(|_| AN_EVENT.to_owned())),
    rule("in-order", "", ALWAYS, After(Link::name)),
    rule("leave-early", "Shutdown", ALWAYS, Change(kill_the_shim)),
    rule("leak", "Create", ALWAYS, Change(lose_a_descriptor)),
    rule("leak-to-container", "Create", ALWAYS, Change(give_it_another_descriptor)),
    rule("no-masks", "Create", ALWAYS, Change(take_the_masks_away)),
    rule("written-program", "Create", ALWAYS, Change(write_to_the_runtime)),
    rule("kill-init-only", "Kill", ALWAYS, Change(|_, call| edit(&mut call.payload, |kill: &mut api::KillRequest| kill.all = false))),
    rule(
        "kill-wrong-process",
        "Kill",
        ALWAYS,
        Change(|_, call| edit(&mut call.payload, |kill: &mut api::KillRequest| kill.exec_id.clear())),
    ),
    rule("exec-as-root", "Exec", ALWAYS, Change(|_, call| edit_process(call, |process| process["user"]["uid"] = 0.into()))),
    rule("no-exec-terminal", "Exec", ALWAYS, Change(take_its_terminal)),
    rule("lost-byte", "Create", ALWAYS, Change(intercept_stdout)),
    rule("late-end", "Create", ALWAYS, Change(intercept_stdout)),
    rule("impatient", "Create", ALWAYS, Change(intercept_stdout)),
    rule("impatient", "Exec", ALWAYS, Change(intercept_stdout_of_exec)),
    rule("quiet-is-the-end", "Exec", ALWAYS, Change(intercept_stdout_of_exec)),
    rule("survivor", "Delete", |_, call| call.exec.is_empty(), Change(leave_a_process)),
    rule("late-cgroup", "Delete", |_, call| call.exec.is_empty(), Change(note_the_cgroups)),
    rule("hasty-wait", "WaitSandbox", ALWAYS, Answer),
    rule("endless-wait", "WaitSandbox", ALWAYS, Silence),
    rule("stop-once", "StopSandbox", |link, call| link.shared.done(call, "StopSandbox").is_some(), Refuse(Code::FAILED_PRECONDITION)),
    rule("lost-shutdown", "ShutdownSandbox", ALWAYS, HangUp),
    rule("no-shutdown", "ShutdownSandbox", ALWAYS, Answer),
    rule("no-ping", "PingSandbox", ALWAYS, Refuse(Code::UNIMPLEMENTED)),
    rule("forget-sandboxes", "SandboxStatus", was_created_on_another_connection, Refuse(Code::NOT_FOUND)),
    rule("no-host-network", "CreateSandbox", has_no_network, Refuse(Code::INVALID_ARGUMENT)),
    rule("hosts-network", "CreateSandbox", ALWAYS, Change(take_its_network)),
    rule("no-pod-cgroup", "CreateSandbox", ALWAYS, Change(|_, call| edit_pod(call, |pod| linux_of(pod).cgroup_parent.clear()))),
    rule("other-hostname", "CreateSandbox", ALWAYS, Change(|_, call| edit_pod(call, |pod| pod.hostname = "elsewhere".to_owned()))),
    rule("no-dns", "CreateSandbox", ALWAYS, Change(|_, call| edit_pod(call, |pod| pod.dns = None))),
    rule("no-shared-pids", "CreateSandbox", ALWAYS, Change(|_, call| edit_pod(call, |pod| pod.namespaces().pid = CONTAINER))),
];

/// Applies the fault.
pub(super) fn meet(link: &Link, call: &mut Call) -> Met {
    let applies =
        |rule: &&Rule| rule.fault == link.shared.fault && (rule.method.is_empty() || rule.method == call.method) && (rule.when)(link, call);
    match RULES.iter().find(applies).map(|rule| &rule.then) {
        None => Met::Passed,
        Some(Refuse(code)) => Met::Refused(*code),
        Some(Answer) => Met::Answered,
        Some(Silence) => Met::Kept,
        Some(HangUp) => Met::Lost,
        Some(After(what)) => {
            link.shared.wait(&what(link));
            Met::Passed
        }
        Some(Change(change)) => {
            let _as_it_was = change(link, call);
            Met::Passed
        }
    }
}

fn is_for_all(_: &Link, call: &Call) -> bool {
    api::KillRequest::parse_from_bytes(&call.payload).is_ok_and(|kill| kill.all)
}

fn was_created_on_another_connection(link: &Link, call: &Call) -> bool {
    link.shared.done(call, "CreateSandbox").is_some_and(|number| number != link.number)
}

fn has_no_network(_: &Link, call: &Call) -> bool {
    sandbox_api::CreateSandboxRequest::parse_from_bytes(&call.payload).is_ok_and(|create| create.netns_path.is_empty())
}

fn take_its_network(_: &Link, call: &mut Call) -> Result<()> {
    edit_pod(call, |pod| pod.namespaces().network = NODE)?;
    edit(&mut call.payload, |create: &mut sandbox_api::CreateSandboxRequest| create.netns_path.clear())
}

fn edit_pod(call: &mut Call, change: impl FnOnce(&mut PodConfig)) -> Result<()> {
    let mut create = sandbox_api::CreateSandboxRequest::parse_from_bytes(&call.payload)?;
    let mut pod = PodConfig::decode(create.options.value.as_slice())?;
    change(&mut pod);
    create.options.mut_or_insert_default().value = pod.encode_to_vec();
    call.payload = create.write_to_bytes()?;
    Ok(())
}

fn linux_of(pod: &mut PodConfig) -> &mut Linux {
    pod.linux.get_or_insert_default()
}

fn was_added_on_another_connection(link: &Link, call: &Call) -> bool {
    link.shared.done(call, "Exec").is_some_and(|number| number != link.number)
}

fn kill_the_shim(link: &Link, _: &mut Call) -> Result<()> {
    let connect: api::ConnectResponse = link.shared.ask("Connect", &api::ConnectRequest::default())?;
    Ok(kill(Pid::from_raw(connect.shim_pid.cast_signed()), Signal::SIGKILL)?)
}

fn lose_a_descriptor(link: &Link, _: &mut Call) -> Result<()> {
    link.shared.lost.lock().expect("no panic under this lock").push(File::open("/dev/null")?);
    Ok(())
}

/// The effect comes from an OCI runtime of this program.
fn give_it_another_descriptor(_: &Link, call: &mut Call) -> Result<()> {
    let mut create = api::CreateTaskRequest::parse_from_bytes(&call.payload)?;
    let any = create.options.as_mut().context("no options")?;
    let mut options = Options::parse_from_bytes(&any.value)?;
    let insert = "for word; do shift; set -- \"$@\" \"$word\"; [ \"$word\" = create ] && set -- \"$@\" --preserve-fds 1; done";
    let text = format!("#!/bin/sh\n{insert}\nexec 3</etc/passwd\nexec {} \"$@\"\n", options.binary_name);
    let runtime = programs::script(Path::new(&create.bundle), "runtime", &text)?;
    options.binary_name = runtime.display().to_string();
    any.value = options.write_to_bytes()?;
    call.payload = create.write_to_bytes()?;
    Ok(())
}

fn take_the_masks_away(_: &Link, call: &mut Call) -> Result<()> {
    let create = api::CreateTaskRequest::parse_from_bytes(&call.payload)?;
    let path = Path::new(&create.bundle).join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    let linux = config["linux"].as_object_mut().context("no platform")?;
    linux.remove("maskedPaths").context("the spec masks no path")?;
    Ok(fs::write(path, config.to_string())?)
}

/// As if the container had.
fn write_to_the_runtime(_: &Link, call: &mut Call) -> Result<()> {
    let create = api::CreateTaskRequest::parse_from_bytes(&call.payload)?;
    let runtime = Options::parse_from_bytes(&create.options.value)?.binary_name;
    programs::copy_with(Path::new(&runtime), Path::new(&runtime), b"x")
}

fn edit_process(call: &mut Call, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut exec = api::ExecProcessRequest::parse_from_bytes(&call.payload)?;
    let spec = exec.spec.as_mut().context("no process")?;
    let mut process = serde_json::from_slice(&spec.value)?;
    change(&mut process);
    spec.value = process.to_string().into_bytes();
    call.payload = exec.write_to_bytes()?;
    Ok(())
}

fn take_its_terminal(_: &Link, call: &mut Call) -> Result<()> {
    edit_process(call, |process| process["terminal"] = false.into())?;
    edit(&mut call.payload, |exec: &mut api::ExecProcessRequest| exec.terminal = false)
}

fn intercept_stdout(link: &Link, call: &mut Call) -> Result<()> {
    edit(&mut call.payload, |create: &mut api::CreateTaskRequest| create.stdout = stdout::intercept(&create.stdout, &link.shared.fault))
}

fn intercept_stdout_of_exec(link: &Link, call: &mut Call) -> Result<()> {
    edit(&mut call.payload, |exec: &mut api::ExecProcessRequest| exec.stdout = stdout::intercept(&exec.stdout, &link.shared.fault))
}

/// As if it had been in the container, which is over.
fn leave_a_process(_: &Link, _: &mut Call) -> Result<()> {
    Command::new("/bin/sleep").arg0("sleep").arg("2000").env_clear().current_dir("/").process_group(0).spawn()?;
    Ok(())
}

fn note_the_cgroups(link: &Link, call: &mut Call) -> Result<()> {
    let bundle = link.shared.state(call).context("no state")?.bundle;
    let config: Value = serde_json::from_slice(&fs::read(Path::new(&bundle).join("config.json"))?)?;
    let path = config["linux"]["cgroupsPath"].as_str().context("no cgroup")?;
    call.folders = cgroups::folders(path.trim_start_matches('/'));
    Ok(())
}
