//! Hands the descriptor of a filter to the agent that decides about system calls.
//!
//! **Invariant:** the agent's socket is the host's: it is connected before this process joins anything of a container.
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::{Doing, Failure, Step, failure};
use crate::plan::{self, Process, State};
use crate::sys;

/// A connection to an agent, with what it is to know.
pub(super) struct Agent<'a> {
    socket: UnixStream,
    agent: &'a plan::Agent,
    state: &'a State,
    status: &'static str,
    /// The container's init; its own process for init.
    init: Option<u32>,
}

impl<'a> Agent<'a> {
    /// Connects to the agent of a process's filter, if it has one. `init` is a handle of the container's, for an added process.
    pub(super) fn connect(process: &'a Process, state: &'a State, init: Option<BorrowedFd<'_>>) -> Result<Option<Self>, Failure> {
        let Some(agent) = process.filter.as_ref().and_then(|filter| filter.agent.as_ref()) else { return Ok(None) };
        let socket = UnixStream::connect(&agent.path).map_err(|error| {
            failure(Step::Filter, format!("connect to the seccomp agent at {} (linux.seccomp.listenerPath)", agent.path), error)
        })?;
        let init = init.map(|init| pid(init).doing(Step::Filter, || "find the pid of init".to_owned())).transpose()?;
        let status = if init.is_some() { "running" } else { "creating" };
        Ok(Some(Self { socket, agent, state, status, init }))
    }

    /// Closes the child's copy of the socket: the agent waits for its end.
    pub(super) fn close(&self) -> io::Result<()> {
        let number = self.socket.as_raw_fd() as u32;
        sys::close_range(number, number)
    }

    /// Sends descriptor `listener` of the process `pid`, of which `process` is a handle.
    pub(super) fn send(&self, pid: u32, process: BorrowedFd<'_>, listener: i32) -> Result<(), Failure> {
        let send = || -> io::Result<()> {
            let listener = sys::fetch(process, listener)?;
            let state = self.state.process_json(self.status, pid, self.init.unwrap_or(pid), &self.agent.metadata);
            let descriptors = [listener.as_raw_fd()];
            let message = [ControlMessage::ScmRights(&descriptors)];
            let sent = sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(state.as_bytes())], &message, MsgFlags::MSG_NOSIGNAL, None)?;
            // The descriptor goes with the first bytes.
            io::Write::write_all(&mut &self.socket, &state.as_bytes()[sent..])
        };
        send().doing(Step::Filter, || format!("send the seccomp descriptor to the agent at {}", self.agent.path))
    }
}

/// The pid of a process, in the namespace of the host's procfs.
fn pid(process: BorrowedFd<'_>) -> io::Result<u32> {
    let about = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", process.as_raw_fd()))?;
    let pid = about.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
    pid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
}
