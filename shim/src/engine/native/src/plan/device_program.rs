//! The program with which cgroup v2 asks about devices: instructions of the kernel's eBPF.
//!
//! It reads type, access and numbers once, tests one exception after the other, and ends with the default.
use super::devices::{Allowed, MAKE, READ, WRITE};

/// Assembles the program of what is allowed, as the kernel takes it.
pub(super) fn assemble(allowed: &Allowed) -> Vec<u8> {
    let mut program = Program(Vec::new());
    // r1 is `struct bpf_cgroup_dev_ctx`: access and type, major, minor.
    program.push(LOAD_32, TYPE, CONTEXT, 0, 0);
    program.push(MOVE, ACCESS, TYPE, 0, 0);
    program.push(AND_CONSTANT, TYPE, 0, 0, 0xffff);
    program.push(SHIFT_RIGHT_CONSTANT, ACCESS, 0, 0, 16);
    program.push(LOAD_32, MAJOR, CONTEXT, 4, 0);
    program.push(LOAD_32, MINOR, CONTEXT, 8, 0);
    for ((kind, major, minor), bits) in &allowed.exceptions {
        let kind = if *kind == 'b' { BLOCK } else { CHARACTER };
        let access = kernel_access(*bits);
        let mut tests = vec![(TYPE, kind)];
        tests.extend(major.map(|major| (MAJOR, major)));
        tests.extend(minor.map(|minor| (MINOR, minor)));
        // What is left to the end of this exception: the tests, the access, the verdict.
        let mut left = tests.len() as i16 + 3 + 2;
        for (register, value) in tests {
            left -= 1;
            program.push(JUMP_UNLESS_CONSTANT, register, 0, left, value);
        }
        program.push(MOVE, CONTEXT, ACCESS, 0, 0);
        if allowed.by_default {
            // Denied if any of it is asked for.
            program.push(AND_CONSTANT, CONTEXT, 0, 0, access);
            program.push(JUMP_IF_CONSTANT, CONTEXT, 0, 2, 0);
        } else {
            // Allowed if nothing else is asked for.
            program.push(AND_CONSTANT, CONTEXT, 0, 0, !access & 0xffff);
            program.push(JUMP_UNLESS_CONSTANT, CONTEXT, 0, 2, 0);
        }
        program.end(!allowed.by_default);
    }
    program.end(allowed.by_default);
    program.0
}

struct Program(Vec<u8>);

impl Program {
    fn push(&mut self, code: u8, destination: u8, source: u8, offset: i16, constant: u32) {
        let registers = if cfg!(target_endian = "little") { source << 4 | destination } else { destination << 4 | source };
        self.0.extend([code, registers]);
        self.0.extend(offset.to_ne_bytes());
        self.0.extend(constant.to_ne_bytes());
    }

    fn end(&mut self, allow: bool) {
        self.push(MOVE_CONSTANT, RESULT, 0, 0, u32::from(allow));
        self.push(EXIT, 0, 0, 0, 0);
    }
}

fn kernel_access(bits: u8) -> u32 {
    [(MAKE, 1), (READ, 2), (WRITE, 4)].into_iter().filter(|(bit, _)| bits & bit != 0).fold(0, |all, (_, kernel)| all | kernel)
}

// <linux/bpf.h>; registers.
const RESULT: u8 = 0;
/// Later: what is left of the access.
const CONTEXT: u8 = 1;
const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

// Instructions on 32 bits.
const LOAD_32: u8 = 0x61;
const MOVE: u8 = 0xbc;
const MOVE_CONSTANT: u8 = 0xb4;
const AND_CONSTANT: u8 = 0x54;
const SHIFT_RIGHT_CONSTANT: u8 = 0x74;
const JUMP_IF_CONSTANT: u8 = 0x16;
const JUMP_UNLESS_CONSTANT: u8 = 0x56;
const EXIT: u8 = 0x95;

// `BPF_DEVCG_DEV_*`.
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;
