//! Hands the descriptor of a filter to the agent that decides about system calls.
//!
//! **Invariant:** the agent's socket is the host's: it is connected before this process joins anything of a container.
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

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
        let init = init.map(|init| sys::pid_of(init).doing(Step::Filter, || "find the pid of init".to_owned())).transpose()?;
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
            let sent = sys::send_descriptor(self.socket.as_fd(), state.as_bytes(), listener.as_fd())?;
            // The descriptor goes with the first bytes.
            io::Write::write_all(&mut &self.socket, &state.as_bytes()[sent..])
        };
        send().doing(Step::Filter, || format!("send the seccomp descriptor to the agent at {}", self.agent.path))
    }
}
