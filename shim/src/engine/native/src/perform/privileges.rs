//! The privileges of processes that come from an image.
//!
//! **Invariant:** an image gives a process nothing that the configuration does not: an image can be of another container, or written by anyone.
use std::fs;

use super::child::plain;
use super::{Doing, Failure, Step};
use crate::control;
use crate::plan::{Create, Process};

/// Checks every thread in the cgroup of a container.
pub(super) fn check(create: &Create) -> Result<(), Failure> {
    for pid in control::pids(&create.cgroup) {
        // criu is in there too. It is the container's by its cgroup alone.
        if is_of_host(pid) {
            continue;
        }
        let doing = || format!("read the privileges of process {pid}");
        for thread in fs::read_dir(format!("/proc/{pid}/task")).doing(Step::Criu, doing)?.flatten() {
            let status = fs::read_to_string(thread.path().join("status")).doing(Step::Criu, doing)?;
            if let Some(why) = excess(&create.process, &status) {
                return Err(plain(Step::Criu, &format!("the checkpoint has a process {why}")));
            }
        }
    }
    Ok(())
}

/// Whether a process is in this one's mount namespace, and so none of a container's.
fn is_of_host(pid: u32) -> bool {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    namespace("self") == namespace(&pid.to_string())
}

/// What a thread has more than a process of the configuration.
fn excess(process: &Process, status: &str) -> Option<String> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim));
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
