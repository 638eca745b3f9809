//! Agents that decide about system calls of containers.
use std::fs;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};

use crate::differences::{Other, is_installed};
use crate::stage::{Stage, repeated};
use crate::users;

crate::cases![
    an_agent_decides_about_calls_of_init,
    an_agent_decides_about_calls_of_an_added_process,
    an_agent_decides_about_calls_in_a_user_namespace,
    calls_on_the_way_to_the_program_are_the_agents_too,
    without_an_agent_nothing_is_made,
    an_agent_receives_what_runc_sends,
    nothing_holds_the_filters_of_processes_that_have_exited,
];

const PROFILE_METADATA: &str = "{\"some\":\"thing\"}";

/// Long enough for a container to be made on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// Starts an agent that refuses new folders with EXDEV and allows all else. What it receives with each descriptor comes out of the channel.
fn start(socket: &Path) -> Receiver<Value> {
    start_counting(socket, &Arc::default())
}

/// Counts the descriptors whose processes have not all exited.
fn start_counting(socket: &Path, open: &Arc<AtomicUsize>) -> Receiver<Value> {
    let open = Arc::clone(open);
    let listener = UnixListener::bind(socket).expect("a socket");
    let (send, receive) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut text = vec![0; 64 << 10];
            let mut buffer = nix::cmsg_space!([i32; 1]);
            let (length, descriptor) = {
                let mut parts = [IoSliceMut::new(&mut text)];
                let message =
                    recvmsg::<()>(stream.expect("a stream").as_raw_fd(), &mut parts, Some(&mut buffer), MsgFlags::MSG_CMSG_CLOEXEC);
                let message = message.expect("a message");
                let descriptor = message.cmsgs().expect("descriptors").find_map(|part| match part {
                    ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
                    _ => None,
                });
                (message.bytes, descriptor.expect("a descriptor"))
            };
            let state = serde_json::from_slice(&text[..length]).expect("JSON");
            let notified = own(descriptor);
            open.fetch_add(1, Ordering::SeqCst);
            let open = Arc::clone(&open);
            std::thread::spawn(move || {
                while decide(&notified) {}
                open.fetch_sub(1, Ordering::SeqCst);
            });
            if send.send(state).is_err() {
                return;
            }
        }
    });
    receive
}

#[allow(unsafe_code, reason = "a received descriptor is a number")]
fn own(descriptor: i32) -> OwnedFd {
    // SAFETY: the kernel has just made it, for this process alone.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// `struct seccomp_notif`.
#[derive(Default)]
#[repr(C)]
struct Notification {
    id: u64,
    pid: u32,
    flags: u32,
    number: i32,
    arch: u32,
    instruction: u64,
    arguments: [u64; 6],
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
struct Answer {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

const RECEIVE: libc::c_ulong = 0xc050_2100;
const SEND: libc::c_ulong = 0xc018_2101;
const CONTINUE: u32 = 1;

/// Decides about one call. Whether there may be more.
#[allow(unsafe_code, reason = "no wrapper is at hand")]
fn decide(notified: &OwnedFd) -> bool {
    let mut events = [PollFd::new(notified.as_fd(), PollFlags::POLLIN)];
    let is_called =
        poll(&mut events, nix::poll::PollTimeout::NONE).is_ok() && events[0].revents().is_some_and(|seen| seen.contains(PollFlags::POLLIN));
    if !is_called {
        return false;
    }
    let mut call = Notification::default();
    // SAFETY: the structure has the kernel's layout.
    if unsafe { libc::ioctl(notified.as_raw_fd(), RECEIVE, &raw mut call) } != 0 {
        // The caller was killed meanwhile.
        return true;
    }
    let is_folder = [libc::SYS_mkdir, libc::SYS_mkdirat].contains(&i64::from(call.number));
    let (error, flags) = if is_folder { (-libc::EXDEV, 0) } else { (0, CONTINUE) };
    let answer = Answer { id: call.id, value: 0, error, flags };
    // SAFETY: as above.
    unsafe { libc::ioctl(notified.as_raw_fd(), SEND, &raw const answer) };
    true
}

fn filter(config: &mut Value, socket: &Path, more: &[&str]) {
    let mut names = vec!["mkdir", "mkdirat"];
    names.extend(more);
    config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": socket, "listenerMetadata": PROFILE_METADATA,
        "syscalls": [{ "names": names, "action": "SCMP_ACT_NOTIFY" }],
    });
    config["annotations"] = json!({ "a": "b" });
}

/// A call that the agent refuses, and the descriptors that are open.
const SCRIPT: &str = "mkdir /tmp/x 2>&1; grep Seccomp: /proc/self/status; exec ls /proc/self/fd";
const OUTPUT: &str = "mkdir: can't create directory '/tmp/x': Invalid cross-device link\nSeccomp:\t2\n0\n1\n2\n3\n";

fn an_agent_decides_about_calls_of_init() {
    for no_new_privileges in [true, false] {
        let stage = Stage::new();
        let socket = stage.folder.join("agent");
        let states = start(&socket);
        let mut config = stage.config(&["sh", "-c", SCRIPT]);
        filter(&mut config, &socket, &[]);
        config["process"]["noNewPrivileges"] = json!(no_new_privileges);
        let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
        let state = states.recv_timeout(SOON).expect("a state");
        let expected = json!({
            "ociVersion": "1.0.2-dev", "fds": ["seccompFd"], "pid": init.pid, "metadata": PROFILE_METADATA,
            "state": { "ociVersion": "1.0.2-dev", "id": "c", "status": "creating", "pid": init.pid, "bundle": stage.folder, "annotations": { "a": "b" } },
        });
        assert_eq!(state, expected);
        stage.start("c");
        assert_eq!(init.end(), (0, OUTPUT.to_owned()));
        stage.delete("c").expect("deleted");
    }
}

fn an_agent_decides_about_calls_of_an_added_process() {
    let stage = Stage::new();
    let socket = stage.folder.join("agent");
    let states = start(&socket);
    let mut config = stage.config(&["sleep", "1000"]);
    filter(&mut config, &socket, &[]);
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    states.recv_timeout(SOON).expect("a state");
    // The socket is the host's: the container has nothing at its path.
    for no_new_privileges in [true, false] {
        let mut process = crate::bundle::process(&["sh", "-c", SCRIPT]);
        process["noNewPrivileges"] = json!(no_new_privileges);
        process["user"] = json!({ "uid": 1000, "gid": 1000 });
        let added = stage.exec("c", &process).unwrap_or_else(|error| panic!("exec: {error}"));
        assert_eq!(added.end(), (0, OUTPUT.to_owned()));
        let state = states.recv_timeout(SOON).expect("a state");
        assert_eq!((&state["pid"], &state["state"]["pid"]), (&json!(added.pid), &json!(init.pid)));
        assert_eq!((&state["state"]["status"], &state["state"]["id"]), (&json!("running"), &json!("c")));
        assert_eq!((&state["metadata"], &state["state"]["annotations"]), (&json!(PROFILE_METADATA), &json!({ "a": "b" })));
    }
}

fn calls_on_the_way_to_the_program_are_the_agents_too() {
    let stage = Stage::new();
    let socket = stage.folder.join("agent");
    let states = start(&socket);
    for no_new_privileges in [true, false] {
        let output = stage.shell("id -u", |config| {
            filter(
                config,
                &socket,
                &["read", "close", "setresuid", "capset", "prctl", "chdir", "getcwd", "execve", "faccessat2", "newfstatat"],
            );
            config["process"]["noNewPrivileges"] = json!(no_new_privileges);
            config["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
        });
        assert_eq!(output, "1000\n");
        states.recv_timeout(SOON).expect("a state");
    }
}

fn without_an_agent_nothing_is_made() {
    let stage = Stage::new();
    let socket = stage.folder.join("agent");
    let mut config = stage.config(&["true"]);
    filter(&mut config, &socket, &[]);
    let error = stage.create("c", &config).err().expect("refused");
    assert!(error.contains("linux.seccomp.listenerPath") && error.ends_with("no such file or directory"), "{error}");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}

fn an_agent_receives_what_runc_sends() {
    if !is_installed("runc") {
        return;
    }
    let stage = Stage::new();
    let socket = stage.folder.join("agent");
    let states = start(&socket);
    let mut config = stage.config(&["sh", "-c", SCRIPT]);
    filter(&mut config, &socket, &[]);
    let (_, ours) = stage.run(&config);
    let our_state = states.recv_timeout(SOON).expect("a state");
    let other = Other { runtime: "runc", stage: &stage };
    assert_eq!(ours, other.output(&["run", "other"]));
    let mut their_state = states.recv_timeout(SOON).expect("a state");
    // What names a moment, or the version of runc.
    for place in ["/pid", "/state/pid", "/state/id", "/ociVersion", "/state/ociVersion"] {
        let ours = our_state.pointer(place).expect("a field");
        *their_state.pointer_mut(place).expect("a field") = ours.clone();
    }
    assert_eq!(our_state, their_state);
    drop(fs::remove_file(socket));
}

/// The leader hands nothing on: init and added processes are the agent's as without one.
fn an_agent_decides_about_calls_in_a_user_namespace() {
    let stage = Stage::new();
    let socket = stage.folder.join("agent");
    let states = start(&socket);
    let create = |script: &str| {
        let mut config = stage.config(&["sh", "-c", script]);
        filter(&mut config, &socket, &[]);
        users::map(&stage, &mut config);
        let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
        let state = states.recv_timeout(SOON).expect("a state");
        assert_eq!((&state["pid"], &state["state"]["pid"]), (&json!(init.pid), &json!(init.pid)));
        stage.start("c");
        init
    };
    assert_eq!(create(SCRIPT).end(), (0, OUTPUT.to_owned()));
    stage.delete("c").expect("deleted");
    let init = create("exec sleep 1000");
    for no_new_privileges in [true, false] {
        let mut process = crate::bundle::process(&["sh", "-c", SCRIPT]);
        process["noNewPrivileges"] = json!(no_new_privileges);
        process["user"] = json!({ "uid": 1000, "gid": 1000 });
        let added = stage.exec("c", &process).unwrap_or_else(|error| panic!("exec: {error}"));
        assert_eq!(added.end(), (0, OUTPUT.to_owned()));
        let state = states.recv_timeout(SOON).expect("a state");
        assert_eq!((&state["pid"], &state["state"]["pid"]), (&json!(added.pid), &json!(init.pid)));
    }
}

/// The kernel tells an agent of the last process of a filter: not before every copy of it is gone.
fn nothing_holds_the_filters_of_processes_that_have_exited() {
    let stage = Stage::new();
    let socket = stage.folder.join("agent");
    let open = Arc::default();
    let states = start_counting(&socket, &open);
    let mut config = stage.config(&["sleep", "1000"]);
    filter(&mut config, &socket, &[]);
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    states.recv_timeout(SOON).expect("a state");
    let before = stage.descriptors();
    for round in 0..repeated(20) {
        assert_eq!(stage.exec_shell("c", "ls -l /proc/[0-9]*/fd 2> /dev/null | grep seccomp; true", |_| {}), "", "{round}");
        states.recv_timeout(SOON).expect("a state");
        // It fails once the filter is loaded.
        let mut process = crate::bundle::process(&["no-such-program"]);
        process["noNewPrivileges"] = json!(false);
        assert!(stage.exec("c", &process).is_err());
        states.recv_timeout(SOON).expect("a state");
    }
    assert_eq!(stage.descriptors(), before);
    scratch::eventually("init's filter alone is left", || open.load(Ordering::SeqCst) == 1);
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
    scratch::eventually("none is left", || open.load(Ordering::SeqCst) == 0);
}
