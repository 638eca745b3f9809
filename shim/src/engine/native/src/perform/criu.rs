//! A conversation with criu, the program that saves and restores processes.
//!
//! Owns its process, the messages of its protocol, and its time. It is started as `criu swrk FD`: a worker for the requests of one socket.
//!
//! ```text
//!  performer ── VERSION ──▶ criu        ── DUMP or RESTORE ──▶   ◀── NOTIFY ──   ── NOTIFY, done ──▶  …   ◀── the response ──
//! ```
//!
//! **Invariant:** criu gets PATH of the environment, the socket and what is named in the request of descriptors, and nothing else. It ends with the performer,
//! or at its deadline, with what it has started.
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, killpg};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use nix::unistd::Pid;

mod wire;

use super::cgroup::Joining;
use super::{Doing, Failure, Step};
use crate::plan::{CgroupMode, Create, Criu, Kind};
use crate::sys;
use wire::{Message, Value, fields};

/// A criu that waits for requests.
pub(super) struct Session<'a> {
    criu: &'a Criu,
    socket: OwnedFd,
    child: Child,
    /// What it has written beside its log.
    output: File,
    deadline: Instant,
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Dump,
    Restore,
}

/// A report of criu's in the middle of a request, which waits for the answer.
pub(super) struct Notice {
    pub(super) name: String,
    /// Of the container's init.
    pub(super) pid: u32,
    pub(super) descriptor: Option<OwnedFd>,
}

/// The options of a request.
pub(super) struct Options(Message);

impl<'a> Session<'a> {
    /// Starts it, in the cgroups of `joining` if there are any, and checks its version. `inherited`: descriptors that it keeps, by their numbers.
    pub(super) fn start(criu: &'a Criu, joining: Option<&Joining>, inherited: &[&OwnedFd]) -> Result<Self, Failure> {
        let doing = || format!("start {}", criu.program);
        let (socket, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).doing(Step::Criu, doing)?;
        let output = memfd_create("criu", MFdFlags::MFD_CLOEXEC).map(File::from).doing(Step::Criu, doing)?;
        let copy = || output.try_clone().doing(Step::Criu, doing);
        let mut command = Command::new(&criu.program);
        command.arg("swrk").arg(theirs.as_raw_fd().to_string()).env_clear().env("PATH", &criu.search_path).current_dir("/");
        command.stdin(Stdio::null()).stdout(copy()?).stderr(copy()?).process_group(0);
        sys::end_with_this_process(&mut command);
        sys::keep_open(&mut command, inherited.iter().copied().chain([&theirs]));
        if let Some(joining) = joining {
            sys::write_before(&mut command, joining.lists().doing(Step::Criu, doing)?, b"0");
        }
        let child = command.spawn().doing(Step::Criu, doing)?;
        let deadline = Instant::now() + Duration::from_secs(criu.within_seconds.into());
        let mut session = Self { criu, socket, child, output, deadline };
        drop(theirs);
        session.check_version()?;
        Ok(session)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn check_version(&mut self) -> Result<(), Failure> {
        let mut request = Message::default();
        request.number(REQUEST_TYPE, TYPE_VERSION).flag(REQUEST_KEEP_OPEN, true);
        self.send(&request)?;
        let (answer, _) = self.receive()?;
        let mut version = (0, 0);
        let body = fields(&answer)
            .find_map(|(field, value)| if let (RESPONSE_VERSION, Value::Bytes(body)) = (field, value) { Some(body) } else { None });
        for field in fields(body.unwrap_or_default()) {
            match field {
                (1, Value::Number(major)) => version.0 = major,
                (2, Value::Number(minor)) => version.1 = minor,
                _ => {}
            }
        }
        if version >= LEAST_VERSION {
            return Ok(());
        }
        let (program, (major, minor), (least, least_minor)) = (&self.criu.program, version, LEAST_VERSION);
        Err(self.end(format!("{program} has version {major}.{minor}, {least}.{least_minor} or later is needed")))
    }

    /// Makes a request, and returns the pid in the response: of the restored init. `notified` acts on criu's reports, before criu goes on.
    pub(super) fn request(
        mut self,
        request: Request,
        options: &Options,
        mut notified: impl FnMut(Notice) -> Result<(), Failure>,
    ) -> Result<u32, Failure> {
        let (kind, what) = match request {
            Request::Dump => (TYPE_DUMP, "checkpoint"),
            Request::Restore => (TYPE_RESTORE, "restore"),
        };
        let mut message = Message::default();
        message.number(REQUEST_TYPE, kind).message(REQUEST_OPTIONS, &options.0);
        self.send(&message)?;
        loop {
            let (bytes, descriptor) = self.receive()?;
            let response = Response::read(&bytes);
            if response.kind == TYPE_NOTIFY {
                let acted = notified(Notice { name: response.notice, pid: response.notice_pid, descriptor });
                let mut answer = Message::default();
                answer.number(REQUEST_TYPE, TYPE_NOTIFY).flag(REQUEST_NOTIFY_SUCCESS, acted.is_ok());
                if let Err(failure) = acted {
                    // criu undoes what it has done; what matters is why.
                    let _ = self.send(&answer);
                    let _ = self.receive();
                    self.kill();
                    return Err(failure);
                }
                self.send(&answer)?;
                continue;
            }
            if response.kind == kind && response.success {
                self.finish();
                return Ok(response.pid);
            }
            let text = if response.message.is_empty() { String::new() } else { format!(": {}", response.message) };
            let number = if response.number == 0 { String::new() } else { format!(" (error {})", response.number) };
            return Err(self.end(format!("criu failed to {what} the container{number}{text}")));
        }
    }

    fn send(&mut self, message: &Message) -> Result<(), Failure> {
        match send(self.socket.as_raw_fd(), message.as_bytes(), MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(nix::errno::Errno::EPIPE) => Err(self.end(EXITED.to_owned())),
            Err(error) => Err(self.end(format!("send a request to criu: {}", super::errno_text(error as i32)))),
        }
    }

    fn receive(&mut self) -> Result<(Vec<u8>, Option<OwnedFd>), Failure> {
        if !self.wait_until_readable().doing(Step::Criu, || "wait for criu".to_owned())? {
            let seconds = self.criu.within_seconds;
            return Err(self.end(format!("criu was not done after {seconds} s and was killed")));
        }
        let mut buffer = vec![0; MAX_MESSAGE_BYTES];
        let (length, descriptor) = match sys::receive_descriptor(self.socket.as_fd(), &mut buffer) {
            // It has exited without reading the request.
            Err(error) if error.raw_os_error() == Some(libc::ECONNRESET) => (0, None),
            other => other.doing(Step::Criu, || "receive from criu".to_owned())?,
        };
        if length == 0 {
            return Err(self.end(EXITED.to_owned()));
        }
        buffer.truncate(length);
        Ok((buffer, descriptor))
    }

    fn wait_until_readable(&self) -> io::Result<bool> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now()).as_millis();
            let mut ends = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ends, u16::try_from(left).unwrap_or(u16::MAX)) {
                Ok(0) if left == 0 => return Ok(false),
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Ends criu, and makes a failure of what it has written.
    fn end(&mut self, what: String) -> Failure {
        let status = self.kill();
        let written = self.written();
        let status = status.filter(|status| !status.is_empty()).map(|status| format!(" ({status})")).unwrap_or_default();
        let written = if written.is_empty() { written } else { format!("; it has written: {written}") };
        Failure { step: Step::Criu, what: format!("{what}{status}{written}"), errno: 0 }
    }

    /// Kills it with the programs that it has started, and returns how it ended if it had ended by itself.
    fn kill(&mut self) -> Option<String> {
        // Its socket is closed before it has exited.
        let _ = sys::open_pidfd(self.child.id()).and_then(|handle| sys::wait_for_exit(handle.as_fd(), LAST_MILLISECONDS));
        let ended = self.child.try_wait().ok().flatten().map(|status| status.to_string());
        // Its group is its own; it is not reaped, so the number is no other's.
        if ended.is_none() {
            let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        ended
    }

    /// Lets it exit: it does when there is nothing more to do for it.
    fn finish(mut self) {
        let _ = nix::sys::socket::shutdown(self.socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        let left = self.deadline.saturating_duration_since(Instant::now()).min(EXIT_WITHIN).as_millis();
        let has_exited = sys::open_pidfd(self.child.id())
            .and_then(|handle| sys::wait_for_exit(handle.as_fd(), u16::try_from(left).unwrap_or(u16::MAX)))
            .unwrap_or(false);
        if has_exited {
            let _ = self.child.wait();
        } else {
            self.kill();
        }
    }

    fn written(&mut self) -> String {
        let mut text = Vec::new();
        let length = self.output.metadata().map(|about| about.len()).unwrap_or(0);
        let from = SeekFrom::Start(length.saturating_sub(MAX_OUTPUT_BYTES));
        let read = self.output.seek(from).and_then(|_| (&self.output).take(MAX_OUTPUT_BYTES).read_to_end(&mut text));
        if read.is_err() { String::new() } else { String::from_utf8_lossy(&text).trim().to_owned() }
    }
}

impl Options {
    /// Those of a checkpoint and of a restore.
    pub(super) fn new(criu: &Criu, plan: &Create, image: &OwnedFd, work: &OwnedFd, log: &str) -> Self {
        let mut options = Message::default();
        options.number(1, image.as_raw_fd() as u64).number(17, work.as_raw_fd() as u64).number(9, LOG_LEVEL).text(10, log);
        options.flag(4, criu.external_unix_sockets).flag(5, criu.open_tcp).flag(7, criu.shell_job).flag(8, criu.file_locks);
        options.text(13, &plan.root).flag(12, true).number(34, cgroup_mode(criu.cgroups)).flag(50, true);
        // What is in a new network namespace is made by those who make the container's network.
        if plan.makes(Kind::Network) {
            options.number(38, libc::CLONE_NEWNET as u64);
        }
        Self(options)
    }

    /// Of a checkpoint: the process to begin with, and the folder that freezes it with its descendants.
    pub(super) fn dump(&mut self, pid: u32, leave_running: bool, freezer: &str) {
        self.0.number(2, pid.into()).flag(3, leave_running).flag(18, true).text(44, freezer);
        // A connection that is being made is made again by its client.
        self.0.flag(46, true);
    }

    /// Of a restore: init is born as criu's sibling.
    pub(super) fn restore(&mut self) {
        self.0.flag(26, true).flag(6, true);
    }

    /// A mount from outside. In a checkpoint: where it is, and its name in the image. In a restore: that name, and its source.
    pub(super) fn external_mount(&mut self, key: &str, value: &str) {
        let mut pair = Message::default();
        pair.text(1, key).text(2, value);
        self.0.message(23, &pair);
    }

    /// Something else from outside that is saved by its name.
    pub(super) fn external(&mut self, text: &str) {
        self.0.text(37, text);
    }

    /// A descriptor in place of what the image has under a name.
    pub(super) fn inherit(&mut self, name: &str, descriptor: &OwnedFd) {
        let mut pair = Message::default();
        pair.text(1, name).number(2, descriptor.as_raw_fd() as u64);
        self.0.message(27, &pair);
    }

    /// The cgroup of the container in the hierarchy of a controller; of none: in all others.
    pub(super) fn cgroup_root(&mut self, controller: Option<&str>, path: &str) {
        let mut root = Message::default();
        if let Some(controller) = controller {
            root.text(1, controller);
        }
        root.text(2, path);
        self.0.message(25, &root);
    }

    /// The profile of a security module for the processes: `apparmor:NAME`.
    pub(super) fn security_profile(&mut self, profile: &str) {
        self.0.text(53, profile);
    }
}

/// A message of criu's, without what is not used.
#[derive(Debug, Default, PartialEq, Eq)]
struct Response {
    kind: u64,
    success: bool,
    pid: u32,
    notice: String,
    notice_pid: u32,
    number: u64,
    message: String,
}

impl Response {
    fn read(bytes: &[u8]) -> Self {
        let mut response = Self::default();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let pid = |number| u32::try_from(number).unwrap_or(0);
        for field in fields(bytes) {
            match field {
                (1, Value::Number(kind)) => response.kind = kind,
                (2, Value::Number(success)) => response.success = success != 0,
                (4, Value::Bytes(restored)) => {
                    let found = fields(restored).find_map(|field| if let (1, Value::Number(pid)) = field { Some(pid) } else { None });
                    response.pid = found.map_or(0, pid);
                }
                (5, Value::Bytes(notice)) => {
                    for field in fields(notice) {
                        match field {
                            (1, Value::Bytes(name)) => response.notice = text(name),
                            (2, Value::Number(number)) => response.notice_pid = pid(number),
                            _ => {}
                        }
                    }
                }
                (7, Value::Number(number)) => response.number = number,
                (9, Value::Bytes(message)) => response.message = text(message),
                _ => {}
            }
        }
        response
    }
}

fn cgroup_mode(mode: CgroupMode) -> u64 {
    match mode {
        CgroupMode::Ignore => 0,
        CgroupMode::None => 1,
        CgroupMode::Properties => 2,
        CgroupMode::Soft => 3,
        CgroupMode::Full => 4,
        CgroupMode::Strict => 5,
    }
}

/// The names by which images know namespaces that are joined by their paths: those of runc, so that it can restore them.
pub(super) const EXTERNAL_NAMESPACES: [(Kind, &str, &str); 2] =
    [(Kind::Network, "net", "extRootNetNS"), (Kind::Pid, "pid", "extRootPidNS")];

const REQUEST_TYPE: u32 = 1;
const REQUEST_OPTIONS: u32 = 2;
const REQUEST_NOTIFY_SUCCESS: u32 = 3;
const REQUEST_KEEP_OPEN: u32 = 4;
const RESPONSE_VERSION: u32 = 10;

const TYPE_DUMP: u64 = 1;
const TYPE_RESTORE: u64 = 2;
const TYPE_NOTIFY: u64 = 6;
const TYPE_VERSION: u64 = 10;

/// Pid namespaces by their paths are known since then.
const LEAST_VERSION: (u64, u64) = (3, 15);

/// All but what is written for each page.
const LOG_LEVEL: u64 = 4;

/// More than criu sends.
const MAX_MESSAGE_BYTES: usize = 64 << 10;
const MAX_OUTPUT_BYTES: u64 = 2 << 10;

/// It may exit before it is sent a request, or after.
const EXITED: &str = "criu has exited";

/// How long it is given to exit by itself before it is killed.
const LAST_MILLISECONDS: u16 = 100;

/// How long it may take to exit after its response.
const EXIT_WITHIN: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn responses_of_criu_are_read() {
        let (mut restored, mut notice) = (Message::default(), Message::default());
        restored.number(1, 77);
        notice.text(1, "setup-namespaces").number(2, 78);
        let mut message = Message::default();
        message.number(1, TYPE_RESTORE).flag(2, true).message(4, &restored).message(5, &notice).number(7, 9).text(9, "why");
        let expected = Response {
            kind: TYPE_RESTORE,
            success: true,
            pid: 77,
            notice: "setup-namespaces".to_owned(),
            notice_pid: 78,
            number: 9,
            message: "why".to_owned(),
        };
        assert_eq!(Response::read(message.as_bytes()), expected);
        assert_eq!(Response::read(&[0xff; 40]), Response::default());
    }
}
