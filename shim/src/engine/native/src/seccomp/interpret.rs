//! Runs filters as the kernel does, for tests: on programs that the kernel would refuse, it panics.
use super::program::{AND, IF_EQUAL, IF_GREATER, IF_GREATER_OR_EQUAL, Instruction, JUMP, LOAD, RETURN};

/// A system call, as a filter sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) number: u32,
    pub(super) audit: u32,
    pub(super) arguments: [u64; 6],
}

/// What a filter returns, and how many instructions that took.
pub(super) fn run(program: &[Instruction], call: &Call) -> (u32, usize) {
    let (mut at, mut accumulator, mut steps) = (0, 0, 0);
    loop {
        let instruction = program[at];
        at += 1;
        steps += 1;
        let mut branch = |holds: bool| at += usize::from(if holds { instruction.if_true } else { instruction.if_false });
        match instruction.code {
            LOAD => accumulator = load(call, instruction.operand),
            AND => accumulator &= instruction.operand,
            JUMP => at += instruction.operand as usize,
            IF_EQUAL => branch(accumulator == instruction.operand),
            IF_GREATER => branch(accumulator > instruction.operand),
            IF_GREATER_OR_EQUAL => branch(accumulator >= instruction.operand),
            // `ret a` of other compilers is not used by any.
            RETURN => return (instruction.operand, steps),
            code => panic!("unknown instruction {code:#x}"),
        }
    }
}

fn load(call: &Call, offset: u32) -> u32 {
    match offset {
        0 => call.number,
        4 => call.audit,
        16..64 if offset.is_multiple_of(4) => {
            let argument = call.arguments[(offset as usize - 16) / 8];
            let is_low = offset.is_multiple_of(8) == cfg!(target_endian = "little");
            if is_low { argument as u32 } else { (argument >> 32) as u32 }
        }
        offset => panic!("load from {offset}"),
    }
}
