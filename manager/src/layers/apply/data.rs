//! The bytes of a file, with holes where they are zeros.

use std::io::BufRead;
use std::os::fd::OwnedFd;

use rustix::fs::ftruncate;
use rustix::io::{Errno, pwrite};

use crate::layers::tar::Reader;
use crate::layers::{OnFile as _, Result};
use crate::sys::writeback;

/// Writes the data of the current entry to a new file.
pub(super) fn write<R: BufRead>(file: &OwnedFd, size: u64, reader: &mut Reader<R>, path: &[u8]) -> Result<()> {
    // how far the file is written
    let (mut end, mut begun) = (0, 0);
    while let Some((offset, bytes)) = reader.data()? {
        for (at, run) in runs(offset, bytes) {
            write_all(file, run, at).file("write", path)?;
            end = at + run.len() as u64;
            if end - begun >= WRITEBACK_BYTES {
                // so that the commit of the snapshot waits for the last part only; if it fails, that reports it
                let _ = writeback::begin(file, begun, end - begun);
                begun = end;
            }
        }
    }
    if end - begun >= WORTH_WRITEBACK_BYTES {
        let _ = writeback::begin(file, begun, end - begun);
    }
    if end < size {
        ftruncate(file, size).file("set length of", path)?;
    }
    Ok(())
}

pub(super) fn write_all(file: &OwnedFd, mut bytes: &[u8], mut at: u64) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match pwrite(file, bytes, at) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => {
                bytes = &bytes[count..];
                at += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The parts of some bytes that are to be written, with their offsets: without pieces of zeros.
fn runs(offset: u64, bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < bytes.len() && is_zero(piece(offset, bytes, at)) {
            at += piece(offset, bytes, at).len();
        }
        let begin = at;
        while at < bytes.len() && !is_zero(piece(offset, bytes, at)) {
            at += piece(offset, bytes, at).len();
        }
        (begin < at).then(|| (offset + begin as u64, &bytes[begin..at]))
    })
}

/// The bytes from a place on, up to where a piece ends in the file.
fn piece(offset: u64, bytes: &[u8], at: usize) -> &[u8] {
    let within = usize::try_from((offset + at as u64) % PIECE_BYTES as u64).unwrap_or_default();
    &bytes[at..(at + PIECE_BYTES - within).min(bytes.len())]
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<32>();
    words.iter().all(|word| *word == [0; 32]) && rest.iter().all(|byte| *byte == 0)
}

/// Of one file, written at once.
const WRITEBACK_BYTES: u64 = 4 << 20;
/// The shortest file, or end of one, whose write-back is begun early. Smaller ones are written when the kernel does so, or at the commit: one request to
/// the disk for each of them would cost more than the wait.
const WORTH_WRITEBACK_BYTES: u64 = 256 << 10;
/// The smallest hole: smaller ones would only cut files into many extents.
const PIECE_BYTES: usize = 32 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_zeros_are_left_out_and_everything_else_is_written_once() {
        let mut bytes = vec![0; 300_000];
        bytes[100_000] = 1;
        bytes[299_999] = 2;
        for offset in [0, 1, 32_767, 32_768, 70_000] {
            let mut written = vec![0; bytes.len()];
            let mut count = 0;
            for (at, run) in runs(offset, &bytes) {
                let begin = usize::try_from(at - offset).expect("it is within");
                written[begin..begin + run.len()].copy_from_slice(run);
                count += run.len();
            }
            assert!(written == bytes && count <= 2 * PIECE_BYTES, "{offset}: {count}");
        }
        assert_eq!(runs(0, &[]).count(), 0);
    }
}
