//! Plans what a process is allowed: ids, capabilities, limits; and its arguments, environment and working directory.
use std::collections::HashSet;

use oci_spec::runtime::{Capability, PosixRlimitType, Process as SpecProcess};

use super::make::absolute_path;
use super::{Capabilities, Process, Rlimit, Terminal};
use super::{labels, scheduling};
use crate::{Host, Refused};

pub(super) const DEFAULT_UMASK: u32 = 0o022;

/// Plans a process; what the container decides is left at nothing.
pub(super) fn plan(process: &SpecProcess, field: &str, host: &Host) -> Result<Process, Refused> {
    let user = process.user();
    Ok(Process {
        args: arguments(process, field)?,
        env: environment(process.env().as_deref().unwrap_or_default(), field)?,
        cwd: absolute_path(process.cwd(), &format!("{field}.cwd"))?,
        uid: id(user.uid(), &format!("{field}.user.uid"))?,
        gid: id(user.gid(), &format!("{field}.user.gid"))?,
        groups: {
            let groups = user.additional_gids().iter().flatten();
            groups.map(|group| id(*group, &format!("{field}.user.additionalGids"))).collect::<Result<_, _>>()?
        },
        umask: DEFAULT_UMASK,
        capabilities: process.capabilities().as_ref().map(|sets| {
            let bits = |set: &Option<_>| capabilities(set.as_ref(), host.last_capability);
            Capabilities {
                bounding: bits(sets.bounding()),
                effective: bits(sets.effective()),
                permitted: bits(sets.permitted()),
                inheritable: bits(sets.inheritable()),
                ambient: bits(sets.ambient()),
            }
        }),
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        rlimits: rlimits(process, field)?,
        filter: None,
        terminal: terminal(process, field)?,
        oom_score_adj: oom_score_adj(process, field)?,
        keyring: None,
        apparmor_profile: labels::profile(process.apparmor_profile().as_deref(), field, host)?,
        selinux_label: labels::label(process.selinux_label().as_deref(), &format!("{field}.selinuxLabel"), host)?,
        scheduling: scheduling::plan(process, field)?,
    })
}

fn arguments(process: &SpecProcess, field: &str) -> Result<Vec<String>, Refused> {
    let args = process.args().clone().unwrap_or_default();
    match args.first() {
        None => Err(Refused::invalid(format!("{field}.args"), "empty")),
        Some(_) if args.iter().any(|arg| arg.contains('\0')) => Err(Refused::invalid(format!("{field}.args"), "contains a NUL byte")),
        Some(_) => Ok(args),
    }
}

/// Of a name that is given twice the last value counts; the order stays.
fn environment(entries: &[String], field: &str) -> Result<Vec<String>, Refused> {
    let mut seen = HashSet::new();
    let mut kept = Vec::new();
    for entry in entries.iter().rev() {
        let name = match entry.split_once('=') {
            Some((name, _)) if !name.is_empty() && !entry.contains('\0') => name,
            Some(_) | None => return Err(Refused::invalid(format!("{field}.env"), format!("{entry:?} is not NAME=value"))),
        };
        if seen.insert(name) {
            kept.push(entry.clone());
        }
    }
    kept.reverse();
    Ok(kept)
}

/// `u32::MAX` means "unchanged" to the kernel, so a process with it would stay root.
fn id(id: u32, field: &str) -> Result<u32, Refused> {
    if id == u32::MAX { Err(Refused::invalid(field, "4294967295 is not an id")) } else { Ok(id) }
}

/// A set as bits. Capabilities that the kernel does not have are left out.
fn capabilities<'a>(set: Option<impl IntoIterator<Item = &'a Capability>>, last: u32) -> u64 {
    set.into_iter()
        .flatten()
        .map(|capability| number(*capability))
        .filter(|number| *number <= last)
        .fold(0, |bits, number| bits | 1 << number)
}

/// <linux/capability.h>
pub(crate) fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

fn rlimits(process: &SpecProcess, field: &str) -> Result<Vec<Rlimit>, Refused> {
    let mut found: Vec<Rlimit> = Vec::new();
    for limit in process.rlimits().iter().flatten() {
        let resource = resource(limit.typ());
        if found.iter().any(|other| other.resource == resource) {
            return Err(Refused::invalid(format!("{field}.rlimits"), format!("{:?} is listed twice", limit.typ())));
        }
        found.push(Rlimit { resource, soft: limit.soft(), hard: limit.hard() });
    }
    Ok(found)
}

fn resource(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

fn terminal(process: &SpecProcess, field: &str) -> Result<Option<Terminal>, Refused> {
    if process.terminal() != Some(true) {
        return Ok(None);
    }
    let side = |side: u64| u16::try_from(side).map_err(|_range| Refused::invalid(format!("{field}.consoleSize"), "too large"));
    let size = match process.console_size() {
        Some(size) if size.height() != 0 && size.width() != 0 => Some((side(size.height())?, side(size.width())?)),
        Some(_) | None => None,
    };
    Ok(Some(Terminal { size }))
}

fn oom_score_adj(process: &SpecProcess, field: &str) -> Result<Option<i32>, Refused> {
    match process.oom_score_adj() {
        Some(score) if !(-1000..=1000).contains(&score) => {
            Err(Refused::invalid(format!("{field}.oomScoreAdj"), format!("{score} is not between -1000 and 1000")))
        }
        score => Ok(score),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_equal_variables_counts_and_the_order_stays() {
        let entries = ["A=1", "B=2", "A=3", "C=", "B=a=b"].map(str::to_owned);
        assert_eq!(environment(&entries, "process").expect("valid"), ["A=3", "C=", "B=a=b"]);
        for wrong in ["A", "=x", "A=\0", ""] {
            assert!(environment(&[wrong.to_owned()], "process").is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn an_id_that_would_change_nothing_is_refused() {
        assert!(id(u32::MAX, "process.user.uid").is_err());
        assert_eq!(id(u32::MAX - 1, "process.user.uid").expect("an id"), u32::MAX - 1);
    }
}
