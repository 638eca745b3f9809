//! Plans how the kernel schedules a process, and for which processors, memory and kind of machine it runs.
use minicbor::{Decode, Encode};
use oci_spec::runtime::{
    ExecCPUAffinity, IOPriorityClass, LinuxIOPriority, LinuxMemoryPolicy, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, MemoryPolicyFlagType, MemoryPolicyModeType, Process as SpecProcess, Scheduler as SpecScheduler,
};

use crate::Refused;

/// What is not given stays as it is, but for the processors: without a list they are all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Scheduling {
    #[n(0)]
    pub scheduler: Option<Scheduler>,
    /// As ioprio_set(2) takes it: class and priority.
    #[n(1)]
    pub io_priority: Option<u32>,
    /// As personality(2) takes it.
    #[n(2)]
    pub personality: Option<u32>,
    #[n(3)]
    pub memory_policy: Option<MemoryPolicy>,
    /// The processors of added processes; init's are all.
    #[n(4)]
    pub affinity: Option<Affinity>,
}

/// As sched_setattr(2) takes it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct Scheduler {
    #[n(0)]
    pub policy: u32,
    #[n(1)]
    pub flags: u64,
    #[n(2)]
    pub nice: i32,
    #[n(3)]
    pub priority: u32,
    #[n(4)]
    pub runtime: u64,
    #[n(5)]
    pub deadline: u64,
    #[n(6)]
    pub period: u64,
}

/// As set_mempolicy(2) takes it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MemoryPolicy {
    /// With its flags.
    #[n(0)]
    pub mode: u32,
    #[n(1)]
    pub nodes: Vec<Range>,
}

/// The processors of a process that is added to a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Affinity {
    /// Before it joins the container's cgroup.
    #[n(0)]
    pub initial: Option<Vec<Range>>,
    /// Afterwards.
    #[n(1)]
    pub last: Option<Vec<Range>>,
}

/// Numbers from the first to the last.
pub type Range = (u32, u32);

/// Of a process alone: what the container decides is added by [`Scheduling::of_container`].
pub(super) fn plan(process: &SpecProcess, field: &str) -> Result<Scheduling, Refused> {
    Ok(Scheduling {
        scheduler: process.scheduler().as_ref().map(|wanted| scheduler(wanted, &format!("{field}.scheduler"))).transpose()?,
        io_priority: process.io_priority().as_ref().map(|wanted| io_priority(*wanted, &format!("{field}.ioPriority"))).transpose()?,
        affinity: match process.exec_cpu_affinity() {
            Some(wanted) => affinity(wanted, &format!("{field}.execCPUAffinity"))?,
            None => None,
        },
        ..Scheduling::default()
    })
}

impl Scheduling {
    /// Adds what a container decides for all of its processes.
    pub(super) fn of_container(self, personality: Option<&LinuxPersonality>, policy: Option<&LinuxMemoryPolicy>) -> Result<Self, Refused> {
        Ok(Self {
            personality: personality.map(|wanted| match wanted.domain() {
                LinuxPersonalityDomain::PerLinux => PER_LINUX,
                LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
            }),
            memory_policy: policy.map(memory_policy).transpose()?,
            ..self
        })
    }

    /// What is not given is as for init.
    pub(super) fn or(self, init: &Self) -> Self {
        Self {
            scheduler: self.scheduler.or(init.scheduler),
            io_priority: self.io_priority.or(init.io_priority),
            personality: self.personality.or(init.personality),
            memory_policy: self.memory_policy.or_else(|| init.memory_policy.clone()),
            affinity: self.affinity.or_else(|| init.affinity.clone()),
        }
    }
}

fn scheduler(wanted: &SpecScheduler, field: &str) -> Result<Scheduler, Refused> {
    use LinuxSchedulerPolicy as Policy;
    let policy = wanted.policy();
    let nice = wanted.nice().unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        return Err(Refused::invalid(format!("{field}.nice"), format!("{nice} is not between -20 and 19")));
    }
    let priority = wanted.priority().unwrap_or(0);
    if priority != 0 && !matches!(policy, Policy::SchedFifo | Policy::SchedRr) {
        return Err(Refused::invalid(format!("{field}.priority"), "needs the policy SCHED_FIFO or SCHED_RR"));
    }
    let priority = u32::try_from(priority).map_err(|_negative| Refused::invalid(format!("{field}.priority"), "is below 0"))?;
    let [runtime, deadline, period] = [wanted.runtime(), wanted.deadline(), wanted.period()].map(|time| time.unwrap_or(0));
    if [runtime, deadline, period] != [0; 3] && *policy != Policy::SchedDeadline {
        return Err(Refused::invalid(field, "runtime, deadline and period need the policy SCHED_DEADLINE"));
    }
    let flags = wanted.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSchedulerFlag::SchedResetOnFork => 0x01,
                LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
                LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
                LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
                LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
                LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
                LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
            }
    });
    let policy = match policy {
        Policy::SchedOther => 0,
        Policy::SchedFifo => 1,
        Policy::SchedRr => 2,
        Policy::SchedBatch => 3,
        Policy::SchedIso => 4,
        Policy::SchedIdle => 5,
        Policy::SchedDeadline => 6,
    };
    Ok(Scheduler { policy, flags, nice, priority, runtime, deadline, period })
}

fn io_priority(wanted: LinuxIOPriority, field: &str) -> Result<u32, Refused> {
    let class = match wanted.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    match u32::try_from(wanted.priority()) {
        Ok(priority @ 0..=7) => Ok(class << IO_PRIORITY_CLASS_SHIFT | priority),
        Ok(_) | Err(_) => Err(Refused::invalid(format!("{field}.priority"), format!("{} is not between 0 and 7", wanted.priority()))),
    }
}

fn affinity(wanted: &ExecCPUAffinity, field: &str) -> Result<Option<Affinity>, Refused> {
    let list = |list: &Option<String>, name: &str| match list.as_deref() {
        None | Some("") => Ok(None),
        Some(list) => ranges(list, MAX_PROCESSORS, &format!("{field}.{name}")).map(Some),
    };
    let planned = Affinity { initial: list(wanted.initial(), "initial")?, last: list(wanted.cpu_affinity_final(), "final")? };
    Ok(Some(planned).filter(|planned| *planned != Affinity::default()))
}

fn memory_policy(wanted: &LinuxMemoryPolicy) -> Result<MemoryPolicy, Refused> {
    use MemoryPolicyModeType as Mode;
    const FIELD: &str = "linux.memoryPolicy";
    let nodes = match wanted.nodes().as_deref() {
        None | Some("") => Vec::new(),
        Some(nodes) => ranges(nodes, MAX_NODES, &format!("{FIELD}.nodes"))?,
    };
    let mode = match wanted.mode() {
        Mode::MpolDefault => 0,
        Mode::MpolPreferred => 1,
        Mode::MpolBind => 2,
        Mode::MpolInterleave => 3,
        Mode::MpolLocal => 4,
        Mode::MpolPreferredMany => 5,
        Mode::MpolWeightedInterleave => 6,
    };
    match wanted.mode() {
        Mode::MpolDefault | Mode::MpolLocal if !nodes.is_empty() => {
            return Err(Refused::invalid(format!("{FIELD}.nodes"), format!("{} takes none", wanted.mode())));
        }
        Mode::MpolBind | Mode::MpolInterleave | Mode::MpolPreferredMany | Mode::MpolWeightedInterleave if nodes.is_empty() => {
            return Err(Refused::invalid(format!("{FIELD}.nodes"), format!("{} needs one at least", wanted.mode())));
        }
        _ => {}
    }
    let flags = wanted.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                MemoryPolicyFlagType::MpolFNumaBalancing => 1 << 13,
                MemoryPolicyFlagType::MpolFRelativeNodes => 1 << 14,
                MemoryPolicyFlagType::MpolFStaticNodes => 1 << 15,
            }
    });
    Ok(MemoryPolicy { mode: mode | flags, nodes })
}

/// `0-3,7`.
fn ranges(list: &str, end: u32, field: &str) -> Result<Vec<Range>, Refused> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let range: Range = (first.parse().ok().filter(|_| is_number(first))?, last.parse().ok().filter(|_| is_number(last))?);
        (range.0 <= range.1 && range.1 < end).then_some(range)
    };
    let all: Option<Vec<Range>> = list.split(',').map(|part| range(part.trim())).collect();
    all.ok_or_else(|| Refused::invalid(field, format!("{list:?} is not a list of numbers below {end}")))
}

// <linux/personality.h>
const PER_LINUX: u32 = 0;
const PER_LINUX32: u32 = 8;

/// <linux/ioprio.h>
const IO_PRIORITY_CLASS_SHIFT: u32 = 13;

/// More than any kernel's.
pub(crate) const MAX_PROCESSORS: u32 = 8192;
pub(crate) const MAX_NODES: u32 = 1024;

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn lists_are_ranges_of_numbers() {
        assert_eq!(ranges("0-3,7, 9", 10, "f").expect("valid"), [(0, 3), (7, 7), (9, 9)]);
        for wrong in ["", "3-1", "10", "a", "1-", "-1", "1--2", "+1", "1;2", "99999999999"] {
            assert!(ranges(wrong, 10, "f").is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn schedulers_are_checked_as_runc_checks_them() {
        let plan = |wanted: Value| scheduler(&serde_json::from_value(wanted).expect("a scheduler"), "process.scheduler");
        let fifo = plan(json!({ "policy": "SCHED_FIFO", "priority": 3 })).expect("accepted");
        assert_eq!((fifo.policy, fifo.priority), (1, 3));
        let deadline = plan(json!({ "policy": "SCHED_DEADLINE", "runtime": 1, "deadline": 2, "period": 3 })).expect("accepted");
        assert_eq!((deadline.policy, deadline.runtime, deadline.deadline, deadline.period), (6, 1, 2, 3));
        for (wanted, field) in [
            (json!({ "policy": "SCHED_OTHER", "nice": 20 }), "process.scheduler.nice"),
            (json!({ "policy": "SCHED_BATCH", "nice": -21 }), "process.scheduler.nice"),
            (json!({ "policy": "SCHED_OTHER", "priority": 1 }), "process.scheduler.priority"),
            (json!({ "policy": "SCHED_RR", "priority": -1 }), "process.scheduler.priority"),
            (json!({ "policy": "SCHED_RR", "priority": 1, "runtime": 1 }), "process.scheduler: runtime"),
        ] {
            assert!(plan(wanted).expect_err("refused").to_string().contains(field));
        }
    }

    #[test]
    fn a_memory_policy_has_as_many_nodes_as_its_mode_takes() {
        let plan = |wanted: Value| memory_policy(&serde_json::from_value(wanted).expect("a policy"));
        let planned = plan(json!({ "mode": "MPOL_BIND", "nodes": "0-1", "flags": ["MPOL_F_STATIC_NODES"] })).expect("accepted");
        assert_eq!(planned, MemoryPolicy { mode: 2 | 1 << 15, nodes: vec![(0, 1)] });
        assert!(plan(json!({ "mode": "MPOL_PREFERRED" })).is_ok() && plan(json!({ "mode": "MPOL_PREFERRED", "nodes": "0" })).is_ok());
        for wanted in [
            json!({ "mode": "MPOL_LOCAL", "nodes": "0" }),
            json!({ "mode": "MPOL_INTERLEAVE" }),
            json!({ "mode": "MPOL_BIND", "nodes": "1024" }),
        ] {
            assert!(plan(wanted).expect_err("refused").to_string().contains("linux.memoryPolicy.nodes"));
        }
    }
}
