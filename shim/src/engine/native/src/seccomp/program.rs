//! Assembles filters.
//!
//! Instructions are laid down from the last to the first, since they only jump forward: a target is always there already.
use std::collections::BTreeMap;

use super::arch::{Arch, X32_BIT};
use super::rules::{Arm, Calls, Condition, Rule, Rules, Test};

/// An instruction of the kernel's filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Instruction {
    pub(super) code: u16,
    pub(super) if_true: u8,
    pub(super) if_false: u8,
    pub(super) operand: u32,
}

impl Instruction {
    /// As `struct sock_filter`.
    pub(super) fn encode(self) -> [u8; 8] {
        let [a, b] = self.code.to_ne_bytes();
        let [e, f, g, h] = self.operand.to_ne_bytes();
        [a, b, self.if_true, self.if_false, e, f, g, h]
    }
}

// <linux/bpf_common.h>
pub(super) const LOAD: u16 = 0x20;
pub(super) const AND: u16 = 0x54;
pub(super) const JUMP: u16 = 0x05;
pub(super) const IF_EQUAL: u16 = 0x15;
pub(super) const IF_GREATER: u16 = 0x25;
pub(super) const IF_GREATER_OR_EQUAL: u16 = 0x35;
pub(super) const RETURN: u16 = 0x06;

// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

/// For calls of an architecture that the profile does not list.
const FOREIGN: u32 = libc::SECCOMP_RET_KILL_THREAD;

const UNKNOWN: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

/// Assembles the filter of some rules.
pub(super) fn assemble(rules: &Rules) -> Vec<Instruction> {
    let mut program = Program::default();
    let mut next = program.give(FOREIGN);
    let x32 = rules.architectures.get(&Arch::X32);
    for (arch, calls) in rules.architectures.iter().filter(|(arch, _)| **arch != Arch::X32) {
        let mut block = program.calls(*arch, calls, rules.default);
        if *arch == Arch::X86_64 {
            let of_x32 = match x32 {
                Some(calls) => program.calls(Arch::X32, calls, rules.default),
                None => program.give(FOREIGN),
            };
            block = program.branch(IF_GREATER_OR_EQUAL, X32_BIT, of_x32, block);
        }
        let block = program.then(LOAD, NUMBER, block);
        next = program.branch(IF_EQUAL, arch.audit(), block, next);
    }
    program.then(LOAD, ARCH, next);
    program.backwards.reverse();
    program.backwards
}

/// A place in the program: the number of instructions from it to the end.
type Place = usize;

#[derive(Default)]
struct Program {
    backwards: Vec<Instruction>,
    /// Where a value was returned last.
    returns: BTreeMap<u32, Place>,
}

/// The farthest that a branch can jump.
const FAR: usize = u8::MAX as usize;

impl Program {
    fn push(&mut self, code: u16, operand: u32, if_true: u8, if_false: u8) -> Place {
        self.backwards.push(Instruction { code, if_true, if_false, operand });
        self.backwards.len()
    }

    fn distance(&self, place: Place) -> usize {
        self.backwards.len() - place
    }

    /// Returns a value.
    fn give(&mut self, value: u32) -> Place {
        match self.returns.get(&value) {
            // Jumping farther would take an instruction too.
            Some(place) if self.distance(*place) < FAR / 2 => *place,
            _ => {
                let place = self.push(RETURN, value, 0, 0);
                self.returns.insert(value, place);
                place
            }
        }
    }

    /// An instruction after which the program goes on at `next`.
    fn then(&mut self, code: u16, operand: u32, next: Place) -> Place {
        if self.distance(next) > 0 {
            self.jump(next);
        }
        self.push(code, operand, 0, 0)
    }

    fn jump(&mut self, to: Place) -> Place {
        let distance = self.distance(to) as u32;
        self.push(JUMP, distance, 0, 0)
    }

    /// Goes on at one of two places.
    fn branch(&mut self, code: u16, operand: u32, if_true: Place, if_false: Place) -> Place {
        // A jump for the other may come in between.
        let if_false = if self.distance(if_false) + 1 > FAR { self.jump(if_false) } else { if_false };
        let if_true = if self.distance(if_true) > FAR { self.jump(if_true) } else { if_true };
        self.push(code, operand, self.distance(if_true) as u8, self.distance(if_false) as u8)
    }

    /// The rules of an architecture; the number of the call is loaded.
    fn calls(&mut self, arch: Arch, calls: &Calls, default: u32) -> Place {
        // Where the behaviour changes, by ascending number.
        let mut changes: Vec<(u32, Option<&Rule>)> = vec![(0, None)];
        for (number, rule) in &calls.by_number {
            if changes.last().is_some_and(|(from, _)| from == number) {
                changes.pop();
            }
            let is_same = |before: &(u32, Option<&Rule>)| {
                before.1.is_some_and(|before| before == rule && rule.arms.iter().all(|arm| arm.conditions.is_empty()))
            };
            if !changes.last().is_some_and(is_same) {
                changes.push((*number, Some(rule)));
            }
            changes.push((number + 1, None));
        }
        let search = self.search(arch, &changes, default);
        match calls.last {
            Some(last) => {
                let unknown = self.give(UNKNOWN);
                self.branch(IF_GREATER, last, unknown, search)
            }
            None => search,
        }
    }

    fn search(&mut self, arch: Arch, changes: &[(u32, Option<&Rule>)], default: u32) -> Place {
        match changes {
            [] | [(_, None)] => self.give(default),
            [(_, Some(rule))] => self.rule(arch, rule, default),
            _ => {
                let middle = changes.len() / 2;
                let upper = self.search(arch, &changes[middle..], default);
                let lower = self.search(arch, &changes[..middle], default);
                self.branch(IF_GREATER_OR_EQUAL, changes[middle].0, upper, lower)
            }
        }
    }

    fn rule(&mut self, arch: Arch, rule: &Rule, default: u32) -> Place {
        if let [Arm { conditions, action }] = &rule.arms[..]
            && conditions.is_empty()
        {
            return self.give(*action);
        }
        let mut otherwise = self.give(default);
        for arm in rule.arms.iter().rev() {
            let mut next = self.give(arm.action);
            for condition in arm.conditions.iter().rev() {
                next = self.condition(arch, *condition, next, otherwise);
            }
            otherwise = next;
        }
        otherwise
    }

    fn condition(&mut self, arch: Arch, condition: Condition, holds: Place, fails: Place) -> Place {
        let at = condition.argument;
        match condition.test {
            Test::Eq(value) => self.equal(arch, at, u64::MAX, value, holds, fails),
            Test::Ne(value) => self.equal(arch, at, u64::MAX, value, fails, holds),
            Test::Masked(mask, value) => self.equal(arch, at, mask, value, holds, fails),
            Test::Gt(value) => self.greater(arch, at, IF_GREATER, value, holds, fails),
            Test::Ge(value) => self.greater(arch, at, IF_GREATER_OR_EQUAL, value, holds, fails),
            Test::Le(value) => self.greater(arch, at, IF_GREATER, value, fails, holds),
            Test::Lt(value) => self.greater(arch, at, IF_GREATER_OR_EQUAL, value, fails, holds),
        }
    }

    fn equal(&mut self, arch: Arch, argument: u32, mask: u64, value: u64, equal: Place, other: Place) -> Place {
        let low = self.half(argument, Half::Low, mask as u32, value as u32, equal, other);
        if arch.is_short() { low } else { self.half(argument, Half::High, (mask >> 32) as u32, (value >> 32) as u32, low, other) }
    }

    fn half(&mut self, argument: u32, half: Half, mask: u32, value: u32, equal: Place, other: Place) -> Place {
        let compare = self.branch(IF_EQUAL, value, equal, other);
        let masked = if mask == u32::MAX { compare } else { self.then(AND, mask, compare) };
        self.then(LOAD, offset(argument, half), masked)
    }

    /// `code` compares the lower half if the upper ones are equal.
    fn greater(&mut self, arch: Arch, argument: u32, code: u16, value: u64, greater: Place, other: Place) -> Place {
        let compare = self.branch(code, value as u32, greater, other);
        let low = self.then(LOAD, offset(argument, Half::Low), compare);
        if arch.is_short() {
            return low;
        }
        let high = (value >> 32) as u32;
        let equal = self.branch(IF_EQUAL, high, low, other);
        let compare = self.branch(IF_GREATER, high, greater, equal);
        self.then(LOAD, offset(argument, Half::High), compare)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Half {
    Low,
    High,
}

fn offset(argument: u32, half: Half) -> u32 {
    let first = if cfg!(target_endian = "little") { Half::Low } else { Half::High };
    ARGUMENTS + 8 * argument + if half == first { 0 } else { 4 }
}
