//! Compiles seccomp profiles into the kernel's filters.
//!
//! ```text
//!  LinuxSeccomp ── rules::sort ──▶ rules by architecture and number ── program::assemble ──▶ instructions
//! ```
//!
//! A profile becomes a binary search by number for each architecture, so that a call costs some ten instructions, whatever its number. Semantics are
//! those of libseccomp as runc uses it: a call of an architecture that is not listed kills; a rule for a call that always applies covers the others, and those that can apply to one call must
//! have the same action; calls with numbers above every one that the profile names give ENOSYS, so that programs fall back as on an older kernel.
//!
//! **Invariant:** what cannot be expressed is refused, never weakened.
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag};

use crate::Refused;
use crate::plan::{Agent, Filter};

mod arch;
mod cache;
#[cfg(test)]
mod interpret;
mod program;
mod rules;
#[cfg(test)]
mod tests;

pub(crate) use cache::compile as compile_cached;

/// Compiles a profile.
fn compile(profile: &LinuxSeccomp) -> Result<Filter, Refused> {
    let agent = agent(profile)?;
    let flags = match profile.flags() {
        // What a filter changes in the mitigation of speculation is decided by the kernel's own settings, not by its presence.
        None => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        Some(flags) => flags.iter().try_fold(0, |all, flag| Ok(all | bit(*flag, agent.is_some())?))?,
    };
    let rules = rules::sort(profile)?;
    let program = program::assemble(&rules);
    if program.len() > MAX_INSTRUCTIONS {
        return Err(Refused::unsupported(format!("linux.seccomp of {} instructions", program.len())));
    }
    Ok(Filter { program: program.iter().flat_map(|instruction| instruction.encode()).collect(), flags, agent })
}

/// Who decides about the calls that are handed on. A profile that hands none on has no use for an agent.
fn agent(profile: &LinuxSeccomp) -> Result<Option<Agent>, Refused> {
    let path = profile.listener_path().as_deref().filter(|path| !path.as_os_str().is_empty());
    let metadata = profile.listener_metadata().clone().unwrap_or_default();
    if path.is_none() && !metadata.is_empty() {
        return Err(Refused::invalid("linux.seccomp.listenerMetadata", "needs listenerPath"));
    }
    if profile.default_action() == LinuxSeccompAction::ScmpActNotify {
        return Err(Refused::invalid("linux.seccomp.defaultAction", "SCMP_ACT_NOTIFY cannot be used as default action"));
    }
    let mut notified = profile.syscalls().iter().flatten().filter(|call| call.action() == LinuxSeccompAction::ScmpActNotify).peekable();
    if notified.peek().is_none() {
        return Ok(None);
    }
    // With it, the child reports that there is a descriptor for the agent.
    if notified.any(|call| call.names().iter().any(|name| name == "write")) {
        return Err(Refused::invalid("linux.seccomp.syscalls", "SCMP_ACT_NOTIFY cannot be used for the write syscall"));
    }
    let Some(path) = path else { return Err(Refused::invalid("linux.seccomp.listenerPath", "is not set, but SCMP_ACT_NOTIFY is used")) };
    let path = path.to_str().filter(|path| path.starts_with('/') && path.len() < MAX_SOCKET_PATH && !path.contains('\0'));
    let path = path.ok_or_else(|| Refused::invalid("linux.seccomp.listenerPath", "is not an absolute path of a socket"))?;
    Ok(Some(Agent { path: path.to_owned(), metadata }))
}

fn bit(flag: LinuxSeccompFilterFlag, has_agent: bool) -> Result<libc::c_ulong, Refused> {
    match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => Ok(libc::SECCOMP_FILTER_FLAG_LOG),
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => Ok(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW),
        // There is one thread.
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => Ok(0),
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv if has_agent => Ok(WAIT_KILLABLE_RECEIVE),
        // The kernel refuses it without an agent.
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
            Err(Refused::invalid("linux.seccomp.flags", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV needs SCMP_ACT_NOTIFY"))
        }
    }
}

/// What a filter returns for an action.
fn value(action: LinuxSeccompAction, errno: Option<u32>, field: &str) -> Result<u32, Refused> {
    let data = || match errno {
        None => Ok(libc::EPERM as u32),
        Some(errno @ 0..=0xffff) => Ok(errno),
        Some(errno) => Err(Refused::invalid(format!("{field}.errnoRet"), format!("{errno} is too large"))),
    };
    match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => Ok(libc::SECCOMP_RET_KILL_THREAD),
        LinuxSeccompAction::ScmpActKillProcess => Ok(libc::SECCOMP_RET_KILL_PROCESS),
        LinuxSeccompAction::ScmpActTrap => Ok(libc::SECCOMP_RET_TRAP),
        LinuxSeccompAction::ScmpActErrno => Ok(libc::SECCOMP_RET_ERRNO | data()?),
        LinuxSeccompAction::ScmpActTrace => Ok(libc::SECCOMP_RET_TRACE | data()?),
        LinuxSeccompAction::ScmpActLog => Ok(libc::SECCOMP_RET_LOG),
        LinuxSeccompAction::ScmpActAllow => Ok(libc::SECCOMP_RET_ALLOW),
        LinuxSeccompAction::ScmpActNotify => Ok(libc::SECCOMP_RET_USER_NOTIF),
    }
}

/// <linux/seccomp.h>, since Linux 5.19.
const WAIT_KILLABLE_RECEIVE: libc::c_ulong = 1 << 5;

/// With the NUL byte at its end.
const MAX_SOCKET_PATH: usize = 108;

/// The kernel's `BPF_MAXINSNS`.
const MAX_INSTRUCTIONS: usize = 4096;
