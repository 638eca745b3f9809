//! Performs plans: in a child made for it, which ends with it.
//!
//! Owns the order of the system calls, and what is reported when one fails.
//!
//! ```text
//!  keeper ──fork──▶ performer ──clone3(CLONE_PARENT)──▶ child: a child of the keeper's
//!    ▲                 │ makes cgroups                    │ joins cgroups and namespaces, makes the root, …
//!    │                 │ ◀──────────── Ready ─────────────┤
//!    │                 │ limits                           │
//!    │                 ├──────────────  go  ────────────▶ │ gives up privileges, looks for the program, filter
//!    │                 │ ◀───────── Prepared ─────────────┤
//!    └──── Report ─────┘ exits                            ▼ waits at the gate (init), executes
//! ```
//! In a user namespace init is the child of a leader: see `leader`.
//!
//! **Invariant:** both processes have one thread, and every descriptor that is not theirs is closed before anything else. Nothing is
//! read from or written to a path of the container, but through a descriptor that was resolved inside its root. A failure leaves neither process nor cgroup.
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use minicbor::{Decode, Encode};

mod agent;
pub(crate) mod cgroup;
mod checkpoint;
mod child;
mod copy;
mod criu;
mod descriptors;
mod devices;
mod entry;
mod hooks;
mod ids;
mod init;
mod labels;
mod leader;
mod masks;
mod mounts;
mod namespaces;
mod network;
mod pod;
mod privileges;
mod program;
mod restore;
mod root;
mod scheduling;
mod sources;
mod sync;
mod terminal;

pub use child::{checkpoint, create, exec, fork, fork_after, holder, placeholder, poststart, poststop, restore};
pub use pod::enter_pod;

/// What a performer needs beside its plan. All others of its descriptors are closed.
#[derive(Debug)]
pub struct Descriptors {
    /// The three streams of the process; `/dev/null` where it has a terminal.
    pub stdio: [OwnedFd; 3],
    /// A pipe's end: one [`Report`] is written to it, then it is closed.
    pub report: OwnedFd,
    /// A pipe's end that init reads: one byte starts the program, its closing ends init.
    pub gate: Option<OwnedFd>,
    /// A socket to which the terminal is sent, with its name.
    pub console: Option<OwnedFd>,
}

/// How performing a plan went.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Report {
    /// The process exists: init waits at its gate, any other executes its program.
    #[n(0)]
    Born {
        /// In the pid namespace of the performer.
        #[n(0)]
        pid: u32,
    },
    #[n(1)]
    Failed(#[n(0)] Failure),
}

/// What failed.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Failure {
    #[n(0)]
    pub step: Step,
    /// What was tried on what.
    #[n(1)]
    pub what: String,
    /// 0 if no system call failed.
    #[n(2)]
    pub errno: i32,
}

/// Steps of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Step {
    #[n(0)]
    Plan,
    #[n(1)]
    Cgroup,
    #[n(2)]
    Namespaces,
    #[n(3)]
    Root,
    #[n(4)]
    Mounts,
    #[n(5)]
    Devices,
    #[n(6)]
    Masks,
    #[n(7)]
    Settings,
    #[n(8)]
    Terminal,
    #[n(9)]
    Limits,
    #[n(10)]
    Identity,
    #[n(11)]
    Program,
    #[n(12)]
    Filter,
    /// The child exited without a report.
    #[n(13)]
    Child,
    #[n(14)]
    Hooks,
    /// The cgroup has processes: another container has it.
    #[n(15)]
    Taken,
    /// The container has exited.
    #[n(16)]
    Gone,
    /// A file system of the root.
    #[n(17)]
    RootMount,
    /// A checkpoint or a restore.
    #[n(18)]
    Criu,
}

/// The words of docker's and containerd's clients: the text of the error number alone decides about exit codes, so it is given as Go writes it.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if self.errno == 0 { Ok(()) } else { write!(f, ": {}", errno_text(self.errno)) }
    }
}

impl std::error::Error for Failure {}

impl Failure {
    /// Without the middle of a long text: it may quote anything of a configuration, and has to fit into a message.
    fn shortened(mut self) -> Self {
        if self.what.len() > MAX_WHAT_BYTES {
            let head = self.what.floor_char_boundary(MAX_WHAT_BYTES / 2);
            let tail = self.what.ceil_char_boundary(self.what.len() - MAX_WHAT_BYTES / 2);
            self.what = format!("{} … {}", &self.what[..head], &self.what[tail..]);
        }
        self
    }
}

/// `no such file or directory`.
pub(crate) fn errno_text(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    let text = text.rsplit_once(" (os error").map_or(text.as_str(), |(text, _)| text);
    let mut letters = text.chars();
    let is_word = text.chars().nth(1).is_some_and(char::is_lowercase);
    match letters.next() {
        Some(first) if is_word => first.to_lowercase().chain(letters).collect(),
        Some(_) | None => text.to_owned(),
    }
}

impl Report {
    /// Reads a report. `None` if there is none: the performer was killed.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        minicbor::decode(bytes).ok()
    }
}

/// Adds to an error what was tried.
trait Doing<T> {
    fn doing(self, step: Step, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, step: Step, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| failure(step, what(), error))
    }
}

fn failure(step: Step, what: String, error: impl Into<io::Error>) -> Failure {
    Failure { step, what, errno: error.into().raw_os_error().unwrap_or(libc::EIO) }
}

/// More than two paths have that the kernel takes.
const MAX_WHAT_BYTES: usize = 6 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_failure_keeps_its_beginning_and_its_end() {
        let failure =
            |length: usize| Failure { step: Step::Mounts, what: format!("mount {} on /x", "ü".repeat(length)), errno: libc::EPERM };
        assert_eq!(failure(1000).shortened(), failure(1000));
        for length in [MAX_WHAT_BYTES / 2, MAX_WHAT_BYTES, 1 << 20] {
            let text = failure(length).shortened().to_string();
            assert!(text.len() <= MAX_WHAT_BYTES + 40, "{}", text.len());
            assert!(
                text.starts_with("mount üü") && text.contains("ü … ü") && text.ends_with("üü on /x: operation not permitted"),
                "{text}"
            );
        }
    }

    #[test]
    fn errors_read_as_clients_expect() {
        let failure = |errno| Failure { step: Step::Program, what: "exec: \"/x\"".to_owned(), errno }.to_string();
        assert_eq!(failure(libc::ENOENT), "exec: \"/x\": no such file or directory");
        assert_eq!(failure(libc::EACCES), "exec: \"/x\": permission denied");
        assert_eq!(failure(libc::EISDIR), "exec: \"/x\": is a directory");
        assert_eq!(failure(libc::ENOTDIR), "exec: \"/x\": not a directory");
        assert_eq!(failure(0), "exec: \"/x\"");
    }

    #[test]
    fn reports_survive_the_pipe() {
        let reports =
            [Report::Born { pid: 7 }, Report::Failed(Failure { step: Step::Mounts, what: "mount x".to_owned(), errno: libc::EPERM })];
        for report in reports {
            assert_eq!(Report::parse(&minicbor::to_vec(&report).expect("encoded")), Some(report));
        }
        assert_eq!(Report::parse(&[]), None);
        assert_eq!(Report::parse(&[0xff; 9]), None);
    }
}
