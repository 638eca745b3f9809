//! Inputs of parsers: those of `fuzz/corpus`, and mutations of them, the same in every run.
//!
//! `X_FUZZ_ROUNDS` sets how many mutations a test tries; `X_SEED` selects them.

use std::path::Path;
use std::{env, fs};

/// Numbers that are lengths, counts and limits where parsers go wrong.
const NUMBERS: [u32; 10] = [0, 1, 0x7f, 0x80, 0xff, 0xffff, 4 << 20, (4 << 20) + 1, 0x7fff_ffff, u32::MAX];
/// What means something in the text formats.
const MARKS: &[u8] = b"\"\\[]={},:. \n\t#'";
/// The longest mutation: parsers are bounded, and so is this.
const MOST_BYTES: usize = 1 << 16;

/// The corpus of a target of `fuzz/`: valid inputs, and those that once failed.
///
/// Panics: when there is none.
pub fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("read {}: {error}", folder.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "nothing in {}", folder.display());
    paths.iter().map(|path| fs::read(path).expect("a file")).collect()
}

/// Calls `parse` with each of `corpus`, and with `rounds` mutations of them.
pub fn each(corpus: &[Vec<u8>], rounds: u64, mut parse: impl FnMut(&[u8])) {
    let number = |name: &str, default: u64| env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let mut dice = Dice(number("X_SEED", 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    corpus.iter().for_each(|bytes| parse(bytes));
    for _ in 0..number("X_FUZZ_ROUNDS", rounds) {
        let mut bytes = corpus[dice.below(corpus.len())].clone();
        for _ in 0..1 + dice.below(4) {
            mutate(&mut bytes, corpus, &mut dice);
        }
        parse(&bytes);
    }
}

fn mutate(bytes: &mut Vec<u8>, corpus: &[Vec<u8>], dice: &mut Dice) {
    let at = dice.below(bytes.len() + 1);
    let end = at + dice.below(bytes.len() + 1 - at);
    match dice.below(9) {
        0 => bytes.truncate(at),
        1 => drop(bytes.drain(at..end)),
        2 => bytes.insert(at, dice.below(256) as u8),
        3 => {
            let part = bytes[at..end].to_vec();
            bytes.splice(at..at, part);
        }
        4 => {
            let other = &corpus[dice.below(corpus.len())];
            let from = dice.below(other.len() + 1);
            bytes.splice(at..end, other[from..].iter().copied());
        }
        5 => {
            let number = NUMBERS[dice.below(NUMBERS.len())];
            let number = if dice.below(2) == 0 { number.to_be_bytes() } else { number.to_le_bytes() };
            bytes.splice(at..bytes.len().min(at + 4), number);
        }
        6 => bytes.insert(at, MARKS[dice.below(MARKS.len())]),
        _ if at < bytes.len() => bytes[at] ^= 1 << dice.below(8),
        _ => bytes.push(0xff),
    }
    bytes.truncate(MOST_BYTES);
}

struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }
}
