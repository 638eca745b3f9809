//! The privileges and namespaces of processes that come from an image.
//!
//! **Invariant:** an image gives a process no capability that the configuration does not, and leaves it in no namespace of the host's: an image can be of another
//! container, or written by anyone.
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use super::child::plain;
use super::{Doing, Failure, Step, namespaces};
use crate::control;
use crate::plan::{Create, Kind, Process};

/// Checks every thread in the cgroup of a container but those of criu, which is in there too.
pub(super) fn check(create: &Create, criu: u32) -> Result<(), Failure> {
    let hosts = hosts_namespaces(create).doing(Step::Criu, || "look at the namespaces of the host".to_owned())?;
    for pid in control::pids(&create.cgroup) {
        let doing = || format!("read the privileges of process {pid}");
        if is_below(pid, criu) {
            continue;
        }
        for (kind, host) in &hosts {
            if inode(&pid.to_string(), *kind).doing(Step::Criu, doing)? == *host {
                let name = namespaces::file(*kind);
                return Err(plain(Step::Criu, &format!("the checkpoint has a process in the {name} namespace of the host")));
            }
        }
        for thread in fs::read_dir(format!("/proc/{pid}/task")).doing(Step::Criu, doing)?.flatten() {
            let status = fs::read_to_string(thread.path().join("status")).doing(Step::Criu, doing)?;
            if let Some(why) = excess(&create.process, &status) {
                return Err(plain(Step::Criu, &format!("the checkpoint has a process {why}")));
            }
        }
    }
    Ok(())
}

/// The namespaces of this process in which no process of the container may be. criu makes a cgroup namespace only where it restores cgroups.
fn hosts_namespaces(create: &Create) -> io::Result<Vec<(Kind, u64)>> {
    let mut hosts = Vec::new();
    for kind in [Kind::Mount, Kind::Pid, Kind::Network, Kind::Ipc, Kind::Uts] {
        if !create.has(kind) {
            continue;
        }
        let host = inode("self", kind)?;
        let joined = create.joined(kind).map(fs::metadata).transpose()?;
        if joined.is_none_or(|joined| joined.ino() != host) {
            hosts.push((kind, host));
        }
    }
    Ok(hosts)
}

fn inode(process: &str, kind: Kind) -> io::Result<u64> {
    Ok(fs::metadata(format!("/proc/{process}/ns/{}", namespaces::file(kind)))?.ino())
}

/// Whether a process is another or a descendant of it. What is restored descends from criu's sibling.
fn is_below(pid: u32, ancestor: u32) -> bool {
    let parent = |pid: u32| field(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?, "PPid")?.parse().ok().filter(|pid| *pid != 0);
    std::iter::successors(Some(pid), |pid| parent(*pid)).take(MAX_DEPTH).any(|pid| pid == ancestor)
}

/// A field of a process's status.
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
}

/// What a thread has more than a process of the configuration.
fn excess(process: &Process, status: &str) -> Option<String> {
    let field = |name: &str| field(status, name);
    if let Some(allowed) = &process.capabilities {
        for name in ["CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb"] {
            // Without a readable field, everything.
            let has = field(name).and_then(|set| u64::from_str_radix(set, 16).ok()).unwrap_or(u64::MAX);
            if has & !(allowed.bounding | allowed.permitted) != 0 {
                return Some(format!("with capabilities that process.capabilities does not have ({name} {has:x})"));
            }
        }
    }
    if process.no_new_privileges && field("NoNewPrivs") != Some("1") {
        return Some("without process.noNewPrivileges".to_owned());
    }
    if process.filter.is_some() && field("Seccomp") != Some("2") {
        return Some("without a filter of linux.seccomp".to_owned());
    }
    None
}

/// Of descendants: criu's own are few.
const MAX_DEPTH: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Capabilities, Filter};

    fn process() -> Process {
        Process {
            args: Vec::new(),
            env: Vec::new(),
            cwd: String::new(),
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            umask: 0,
            capabilities: Some(Capabilities { bounding: 0xb, permitted: 0x3, ..Capabilities::default() }),
            no_new_privileges: true,
            rlimits: Vec::new(),
            filter: Some(Filter { program: Vec::new(), flags: 0, agent: None }),
            terminal: None,
            oom_score_adj: None,
            keyring: None,
            apparmor_profile: None,
            selinux_label: None,
            scheduling: crate::plan::Scheduling::default(),
        }
    }

    fn status(bounding: &str, no_new_privileges: u32, seccomp: u32) -> String {
        format!(
            "Name:\tsh\nCapInh:\t0\nCapPrm:\t3\nCapEff:\t3\nCapBnd:\t{bounding}\nCapAmb:\t0\nNoNewPrivs:\t{no_new_privileges}\n\
             Seccomp:\t{seccomp}\nSeccomp_filters:\t1\n"
        )
    }

    #[test]
    fn a_process_may_have_what_the_configuration_gives_and_no_more() {
        for (status, found) in [
            (status("000000000000000b", 1, 2), None),
            (status("0", 1, 2), None),
            (status("f", 1, 2), Some("CapBnd f")),
            (status("b", 0, 2), Some("noNewPrivileges")),
            (status("b", 1, 0), Some("linux.seccomp")),
            (String::new(), Some("CapBnd")),
        ] {
            let excess = excess(&process(), &status);
            match found {
                Some(words) => assert!(excess.as_ref().is_some_and(|why| why.contains(words)), "{status}: {excess:?}"),
                None => assert_eq!(excess, None, "{status}"),
            }
        }
        let free = Process { capabilities: None, no_new_privileges: false, filter: None, ..process() };
        assert_eq!(excess(&free, &status("ffffffff", 0, 0)), None);
    }
}
