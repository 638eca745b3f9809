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
use crate::plan::Filter;

mod arch;
#[cfg(test)]
mod interpret;
mod program;
mod rules;
#[cfg(test)]
mod tests;

/// Compiles a profile.
pub(crate) fn compile(profile: &LinuxSeccomp) -> Result<Filter, Refused> {
    let flags = match profile.flags() {
        // What a filter changes in the mitigation of speculation is decided by the kernel's own settings, not by its presence.
        None => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        Some(flags) => flags.iter().try_fold(0, |all, flag| Ok(all | bit(*flag)?))?,
    };
    let rules = rules::sort(profile)?;
    let program = program::assemble(&rules);
    if program.len() > MAX_INSTRUCTIONS {
        return Err(Refused::unsupported(format!("linux.seccomp of {} instructions", program.len())));
    }
    Ok(Filter { program: program.iter().flat_map(|instruction| instruction.encode()).collect(), flags })
}

fn bit(flag: LinuxSeccompFilterFlag) -> Result<libc::c_ulong, Refused> {
    match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => Ok(libc::SECCOMP_FILTER_FLAG_LOG),
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => Ok(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW),
        // There is one thread.
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => Ok(0),
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
            Err(Refused::unsupported("linux.seccomp.flags SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"))
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
        LinuxSeccompAction::ScmpActNotify => Err(Refused::unsupported(format!("{field} SCMP_ACT_NOTIFY"))),
    }
}

/// The kernel's `BPF_MAXINSNS`.
const MAX_INSTRUCTIONS: usize = 4096;
