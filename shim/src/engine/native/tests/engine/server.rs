//! The keeper as a program: performs what it reads, a line each.
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair};
use nix::unistd::Pid;
use serde_json::{Value, json};
use x_engine::Host;
use x_engine::plan::{CgroupMode, Create, Criu, Request, RootMount};

use crate::keeper::{self, Made, Streams};
use crate::{beside, stage, verbs};

#[derive(Default)]
struct Keeper {
    made: BTreeMap<String, Made>,
    /// The plans that they were made from.
    plans: BTreeMap<String, Create>,
    /// The keeper's side of terminals.
    terminals: BTreeMap<u32, OwnedFd>,
    /// Plans are made as if these were active.
    pretends_security_modules: bool,
}

pub(crate) fn serve() -> ExitCode {
    protect();
    keeper::become_keeper().expect("a subreaper");
    if std::env::var(stage::KEEPER).is_ok_and(|value| value == stage::KEEPER_V2) {
        show_v2();
    }
    let mut keeper = Keeper::default();
    let mut line = String::new();
    // Unbuffered, so that a performer has no copy of lines.
    while read_line(&mut line) {
        let request: Value = serde_json::from_str(&line).expect("JSON");
        let answer = keeper.perform(&request).unwrap_or_else(|error| json!({ "error": error }));
        writeln!(io::stdout(), "{answer}").expect("an open pipe");
    }
    for made in keeper.made.values() {
        if let Err(error) = made.delete() {
            eprintln!("delete: {error}");
        }
    }
    ExitCode::SUCCESS
}

/// Executes this program again, from a mount on which it cannot be written.
fn protect() {
    const PROTECTED: &str = "X_ENGINE_TESTS_PROTECTED";
    if std::env::var_os(PROTECTED).is_some() {
        return;
    }
    let handle = x_engine::readonly_executable(&std::env::current_exe().expect("this program")).expect("a handle");
    let error = Command::new(format!("/proc/self/fd/{}", handle.as_raw_fd())).env(PROTECTED, "1").exec();
    panic!("execute again: {error}");
}

/// In the keeper's own mount namespace.
fn show_v2() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    if stage::is_v2_alone() {
        return;
    }
    umount2("/sys/fs/cgroup", MntFlags::MNT_DETACH).expect("unmounted");
    mount(Some("cgroup2"), "/sys/fs/cgroup", Some("cgroup2"), MsFlags::empty(), None::<&str>).expect("cgroup v2");
}

fn read_line(line: &mut String) -> bool {
    line.clear();
    io::stdin().lock().read_line(line).is_ok_and(|length| length > 0)
}

impl Keeper {
    fn perform(&mut self, request: &Value) -> Result<Value, String> {
        let text = |key: &str| request[key].as_str().unwrap_or_default();
        let id = text("id");
        match text("do") {
            "create" => {
                let host = self.host()?;
                let (streams, console) = streams(request)?;
                let no_pivot_root = request["no_pivot_root"] == json!(true);
                let bundle = Path::new(text("bundle"));
                let root_mounts: Vec<(String, String, Vec<String>)> =
                    serde_json::from_value(request["root_mounts"].clone()).map_err(|error| error.to_string())?;
                let root_mounts: Vec<RootMount<'_>> =
                    root_mounts.iter().map(|(kind, source, options)| RootMount { kind, source, options }).collect();
                let no_new_keyring = request["no_new_keyring"] == json!(true);
                let request = Request { no_pivot_root, no_new_keyring, root_mounts: &root_mounts, ..Request::new(id, bundle) };
                let plan = keeper::planned(&request, &host)?;
                let made = keeper::create(&plan, streams)?;
                self.keep(id, plan, made, console)
            }
            "checkpoint" => {
                let is = |key: &str| request[key] == json!(true);
                self.made[id].checkpoint(&self.plans[id], criu(request)?, is("exit"), is("paused")).map(|()| json!({}))
            }
            "restore" => {
                let host = self.host()?;
                let (streams, console) = streams(request)?;
                let plan = keeper::planned(&Request::new(id, Path::new(text("bundle"))), &host)?;
                let made = verbs::restore(&plan, criu(request)?, streams)?;
                self.keep(id, plan, made, console)
            }
            "create-killed" => {
                let host = self.host()?;
                let (streams, _) = streams(request)?;
                let plan = keeper::planned(&Request::new(id, Path::new(text("bundle"))), &host)?;
                let was_late = verbs::create_killed(&plan, streams, after(request))?;
                Ok(json!({ "late": was_late }))
            }
            "holder" => verbs::holder(request["label"].as_str()).map(|pid| json!({ "pid": pid })),
            "start" => self.made[id].start().map(|()| json!({})),
            "freeze" => self.made[id].freeze(request["freeze"] == json!(true)).map(|()| json!({})),
            "update" => self.made[id].update(request["resources"].to_string().as_bytes()).map(|()| json!({})),
            "count" => Ok(json!({ "count": self.made[id].count() })),
            "exec" => {
                let host = self.host()?;
                let (streams, console) = streams(request)?;
                let pid = self.made[id].exec(request["process"].to_string().as_bytes(), &host, streams)?;
                self.receive(pid, console)
            }
            "wait" => keeper::wait(pid(request)).map(|status| json!({ "status": status })).map_err(|error| error.to_string()),
            "exited" => {
                use nix::sys::wait::{Id, WaitPidFlag, waitid};
                let pid = Pid::from_raw(pid(request) as i32);
                waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).map(|_| json!({})).map_err(|error| error.to_string())
            }
            "access" => {
                let executable = format!("/proc/{}/exe", pid(request));
                nix::unistd::access(executable.as_str(), nix::unistd::AccessFlags::W_OK)
                    .map(|()| json!({}))
                    .map_err(|error| error.to_string())
            }
            "kill" => kill(Pid::from_raw(pid(request) as i32), Signal::SIGKILL).map(|()| json!({})).map_err(|error| error.to_string()),
            "read" => {
                let terminal = self.terminals.remove(&pid(request)).ok_or("no terminal")?;
                let mut output = Vec::new();
                // EIO once the other side is closed.
                let _ = File::from(terminal).read_to_end(&mut output);
                Ok(json!({ "output": String::from_utf8_lossy(&output) }))
            }
            "delete" => {
                let made = self.made.remove(id).ok_or("no such container")?;
                made.delete().map(|()| json!({}))
            }
            "freeze-beside" => {
                let cgroup = &self.made[id].container.cgroup;
                beside::freeze(cgroup, Path::new(text("until")), Path::new(text("report"))).map(|pid| json!({ "pid": pid }))
            }
            "look-beside" => {
                let cgroup = &self.made[id].container.cgroup;
                beside::look(cgroup, Path::new(text("until"))).map(|pid| json!({ "pid": pid }))
            }
            "kill-beside" => beside::kill_later(pid(request), after(request)).map(|pid| json!({ "pid": pid })),
            "use-up-keys" => beside::use_up_keys(request["user"].as_u64().unwrap_or_default() as u32).map(|pid| json!({ "pid": pid })),
            "descriptors" => {
                let count = std::fs::read_dir("/proc/self/fd").map_err(|error| error.to_string())?.count();
                Ok(json!({ "count": count }))
            }
            "wait-for-page" => beside::wait_for_page(Path::new(text("cgroup"))).map(|pid| json!({ "pid": pid })),
            "real-time" => set_real_time(request["on"] == json!(true)).map(|()| json!({})).map_err(|error| error.to_string()),
            "pretend" => {
                self.pretends_security_modules = true;
                Ok(json!({}))
            }
            "run" => {
                let output = Command::new("sh").args(["-c", text("script")]).output().map_err(|error| error.to_string())?;
                if !output.status.success() {
                    return Err(String::from_utf8_lossy(&output.stderr).into_owned());
                }
                Ok(json!({ "output": String::from_utf8_lossy(&output.stdout) }))
            }
            "leak" => {
                // A descriptor that every child inherits.
                let file = File::open("/").map_err(|error| error.to_string())?;
                nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).map_err(|error| error.to_string())?;
                std::mem::forget(file);
                Ok(json!({}))
            }
            other => Err(format!("unknown request {other}")),
        }
    }

    /// Keeps what was made.
    fn keep(&mut self, id: &str, plan: Create, made: Made, console: Option<Ours>) -> Result<Value, String> {
        let pid = made.init;
        self.made.insert(id.to_owned(), made);
        self.plans.insert(id.to_owned(), plan);
        self.receive(pid, console)
    }

    fn host(&self) -> Result<Host, String> {
        let host = Host::read().map_err(|error| error.to_string())?;
        let pretends = self.pretends_security_modules;
        Ok(Host { has_apparmor: host.has_apparmor || pretends, has_selinux: host.has_selinux || pretends, ..host })
    }

    fn receive(&mut self, pid: u32, console: Option<Ours>) -> Result<Value, String> {
        if let Some(console) = console {
            let terminal = match console {
                Ours::Console(socket) => receive(&socket).map_err(|error| error.to_string())?,
                Ours::Pipe(output) => output,
            };
            self.terminals.insert(pid, terminal);
        }
        Ok(json!({ "pid": pid }))
    }
}

fn pid(request: &Value) -> u32 {
    request["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).unwrap_or_default()
}

/// After how many microseconds something is to be done.
fn after(request: &Value) -> Duration {
    Duration::from_micros(request["after"].as_u64().unwrap_or_default())
}

/// The keeper's side of a process's streams.
enum Ours {
    Console(OwnedFd),
    /// What it writes to.
    Pipe(OwnedFd),
}

/// How criu is run for a request.
fn criu(request: &Value) -> Result<Criu, String> {
    let criu = &request["criu"];
    let text = |key: &str| criu[key].as_str().unwrap_or_default().to_owned();
    let is = |key: &str| criu[key] == json!(true);
    Ok(Criu {
        program: text("program"),
        search_path: "/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        image: text("image"),
        work: text("image"),
        open_tcp: is("tcp"),
        external_unix_sockets: is("unix"),
        shell_job: false,
        file_locks: is("locks"),
        cgroups: CgroupMode::parse(&text("cgroups")).map_err(|error| error.to_string())?,
        within_seconds: criu["within"].as_u64().map_or(120, |seconds| seconds as u32),
    })
}

fn streams(request: &Value) -> Result<(Streams, Option<Ours>), String> {
    let output = request["output"].as_str().unwrap_or("/dev/null");
    if request["pipe"] == json!(true) {
        let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|error| error.to_string());
        let (ours, theirs) = pipe()?;
        let copy = theirs.try_clone().map_err(|error| error.to_string())?;
        let null = File::open("/dev/null").map_err(|error| error.to_string())?;
        return Ok((Streams { stdio: [null.into(), theirs, copy], console: None }, Some(Ours::Pipe(ours))));
    }
    let mut streams = Streams::to_file(Path::new(output)).map_err(|error| error.to_string())?;
    if request["terminal"] != json!(true) {
        return Ok((streams, None));
    }
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).map_err(|error| error.to_string())?;
    streams.console = Some(theirs);
    Ok((streams, Some(Ours::Console(ours))))
}

#[allow(unsafe_code, reason = "no wrapper is at hand")]
fn set_real_time(is_real_time: bool) -> io::Result<()> {
    let policy = if is_real_time { libc::SCHED_RR } else { libc::SCHED_OTHER };
    let parameter = libc::sched_param { sched_priority: i32::from(is_real_time) };
    // SAFETY: the structure is only read, during the call.
    if unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[allow(unsafe_code, reason = "a received descriptor is a number")]
fn receive(console: &OwnedFd) -> io::Result<OwnedFd> {
    let mut name = [0; 64];
    let mut buffer = nix::cmsg_space!([i32; 1]);
    let mut parts = [IoSliceMut::new(&mut name)];
    let message = recvmsg::<()>(console.as_raw_fd(), &mut parts, Some(&mut buffer), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let descriptor = message.cmsgs()?.find_map(|part| match part {
        ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
        _ => None,
    });
    // SAFETY: the kernel has just made it, for this process alone.
    descriptor.map(|descriptor| unsafe { OwnedFd::from_raw_fd(descriptor) }).ok_or_else(|| io::Error::from_raw_os_error(libc::EPROTO))
}
