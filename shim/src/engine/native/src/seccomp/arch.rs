//! Architectures and the numbers of their calls.
use std::str::FromStr;

use oci_spec::runtime::Arch as SpecArch;
use syscalls::{aarch64, arm, x86, x86_64};

use crate::Refused;

/// An architecture whose calls a filter sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Arch {
    X86_64,
    /// The x86-64 with short pointers: the same `AUDIT_ARCH`, and a bit in the number.
    X32,
    X86,
    Aarch64,
    Arm,
}

/// In the number of a call of x32.
pub(super) const X32_BIT: u32 = 0x4000_0000;

impl Arch {
    pub(super) fn native() -> Result<Self, Refused> {
        match std::env::consts::ARCH {
            "x86_64" => Ok(Self::X86_64),
            "aarch64" => Ok(Self::Aarch64),
            other => Err(Refused::unsupported(format!("linux.seccomp on {other}"))),
        }
    }

    pub(super) fn parse(arch: SpecArch) -> Result<Self, Refused> {
        match arch {
            SpecArch::ScmpArchNative => Self::native(),
            SpecArch::ScmpArchX86_64 => Ok(Self::X86_64),
            SpecArch::ScmpArchX32 => Ok(Self::X32),
            SpecArch::ScmpArchX86 => Ok(Self::X86),
            SpecArch::ScmpArchAarch64 => Ok(Self::Aarch64),
            SpecArch::ScmpArchArm => Ok(Self::Arm),
            other => Err(Refused::unsupported(format!("linux.seccomp.architectures {other}"))),
        }
    }

    /// <linux/audit.h>
    pub(super) fn audit(self) -> u32 {
        match self {
            Self::X86_64 | Self::X32 => 0xc000_003e,
            Self::X86 => 0x4000_0003,
            Self::Aarch64 => 0xc000_00b7,
            Self::Arm => 0x4000_0028,
        }
    }

    /// Whether arguments have 32 bits. x32's registers have more, which its calls ignore: so must a rule.
    pub(super) fn is_short(self) -> bool {
        matches!(self, Self::X86 | Self::X32 | Self::Arm)
    }

    /// The number of a call, as filters see it.
    pub(super) fn number(self, name: &str) -> Option<u32> {
        match self {
            Self::X86_64 => {
                x86_64::Sysno::from_str(name).ok().map(|call| call as u32).filter(|number| *number < X32_FIRST || *number > X32_LAST)
            }
            // Numbers that mean nothing to x32 are the kernel's to refuse.
            Self::X32 => X32_OWN
                .iter()
                .position(|own| *own == name)
                .map(|position| X32_FIRST + position as u32)
                .or_else(|| Self::X86_64.number(name))
                .map(|number| number | X32_BIT),
            Self::X86 => x86::Sysno::from_str(name).ok().map(|call| call as u32),
            Self::Aarch64 => aarch64::Sysno::from_str(name).ok().map(|call| call as u32),
            Self::Arm => arm::Sysno::from_str(name).ok().map(|call| call as u32),
        }
    }

    /// The other way to make a call: the number of the call that does several things, and its first argument.
    pub(super) fn multiplexed(self, name: &str) -> Option<(u32, u64)> {
        if self != Self::X86 {
            return None;
        }
        let among = |calls: &[(u64, &str)]| calls.iter().find(|(_, call)| *call == name).map(|(argument, _)| *argument);
        let socket = || Some((self.number("socketcall")?, among(&SOCKETCALLS)?));
        let ipc = || Some((self.number("ipc")?, among(&IPC_CALLS)?));
        socket().or_else(ipc)
    }
}

/// Calls that have other numbers on x32, from 512.
const X32_OWN: [&str; 36] = [
    "rt_sigaction",
    "rt_sigreturn",
    "ioctl",
    "readv",
    "writev",
    "recvfrom",
    "sendmsg",
    "recvmsg",
    "execve",
    "ptrace",
    "rt_sigpending",
    "rt_sigtimedwait",
    "rt_sigqueueinfo",
    "sigaltstack",
    "timer_create",
    "mq_notify",
    "kexec_load",
    "waitid",
    "set_robust_list",
    "get_robust_list",
    "vmsplice",
    "move_pages",
    "preadv",
    "pwritev",
    "rt_tgsigqueueinfo",
    "recvmmsg",
    "sendmmsg",
    "process_vm_readv",
    "process_vm_writev",
    "setsockopt",
    "getsockopt",
    "io_setup",
    "io_submit",
    "execveat",
    "preadv2",
    "pwritev2",
];
const X32_FIRST: u32 = 512;
const X32_LAST: u32 = X32_FIRST + X32_OWN.len() as u32 - 1;

/// <linux/net.h>
const SOCKETCALLS: [(u64, &str); 20] = [
    (1, "socket"),
    (2, "bind"),
    (3, "connect"),
    (4, "listen"),
    (5, "accept"),
    (6, "getsockname"),
    (7, "getpeername"),
    (8, "socketpair"),
    (9, "send"),
    (10, "recv"),
    (11, "sendto"),
    (12, "recvfrom"),
    (13, "shutdown"),
    (14, "setsockopt"),
    (15, "getsockopt"),
    (16, "sendmsg"),
    (17, "recvmsg"),
    (18, "accept4"),
    (19, "recvmmsg"),
    (20, "sendmmsg"),
];

/// <linux/ipc.h>
const IPC_CALLS: [(u64, &str); 12] = [
    (1, "semop"),
    (2, "semget"),
    (3, "semctl"),
    (4, "semtimedop"),
    (11, "msgsnd"),
    (12, "msgrcv"),
    (13, "msgget"),
    (14, "msgctl"),
    (21, "shmat"),
    (22, "shmdt"),
    (23, "shmget"),
    (24, "shmctl"),
];
