//! Standard input of a command: what containerd writes to it, until it closes it.
//!
//! **Invariant:** a client that writes too much, or never closes it, gets an error instead of a process that stays.
use std::io::{self, IsTerminal as _};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::{Error, wait};

/// The longest input that is read, in bytes.
const MAX_BYTES: usize = 4 << 20;
/// How long containerd may take to write it: it does at once, unless it was stopped meanwhile.
const WITHIN: Duration = Duration::from_secs(60);
/// Bytes read at once.
const CHUNK_BYTES: usize = 16 << 10;

/// What was read so far.
#[derive(Debug, Default)]
pub(super) struct Input {
    pub(super) bytes: Vec<u8>,
}

impl Input {
    /// All of standard input; nothing from a terminal, where an operator has typed the command.
    pub(super) fn of_client() -> Result<Vec<u8>, Error> {
        let mut input = Self::default();
        input.read_all()?;
        Ok(input.bytes)
    }

    /// Reads what is left of standard input.
    ///
    /// Errors: it is too much, or was not closed in time.
    pub(super) fn read_all(&mut self) -> Result<(), Error> {
        match self.read(io::stdin(), Instant::now() + WITHIN)? {
            true => Ok(()),
            false => Err(Error::OpenStdin { within: WITHIN }),
        }
    }

    /// Reads until `deadline` at most. Returns whether that was all.
    pub(super) fn read(&mut self, from: impl AsFd, deadline: Instant) -> Result<bool, Error> {
        let from = from.as_fd();
        if from.is_terminal() {
            return Ok(true);
        }
        let mut chunk = [0; CHUNK_BYTES];
        while wait::for_input(from, Some(deadline)).map_err(|source| Error::Stdin { source })? {
            match nix::unistd::read(from, &mut chunk) {
                Ok(0) => return Ok(true),
                Ok(count) => self.bytes.extend_from_slice(&chunk[..count]),
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(error) => return Err(Error::Stdin { source: error.into() }),
            }
            if self.bytes.len() > MAX_BYTES {
                return Err(Error::TooLong { what: "standard input".to_owned(), limit_bytes: MAX_BYTES as u64 });
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::thread;

    use super::*;

    fn late() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    #[test]
    fn an_input_that_stays_open_is_left_at_the_deadline_and_read_on_later() {
        let (reader, mut writer) = io::pipe().expect("a pipe");
        let mut input = Input::default();
        writer.write_all(b"one ").expect("it is empty");
        assert!(!input.read(&reader, Instant::now() + Duration::from_millis(20)).expect("it is read"));
        assert_eq!(input.bytes, b"one ");
        writer.write_all(b"two").expect("it is empty");
        drop(writer);
        assert!(input.read(&reader, late()).expect("it is read"));
        assert_eq!(input.bytes, b"one two");
    }

    #[test]
    fn an_input_of_any_length_up_to_the_limit_is_read_and_no_longer_one() {
        for (length, fits) in [(0, true), (1, true), (CHUNK_BYTES, true), (MAX_BYTES, true), (MAX_BYTES + 1, false)] {
            let (reader, mut writer) = io::pipe().expect("a pipe");
            let client = thread::spawn(move || writer.write_all(&vec![7; length]));
            let mut input = Input::default();
            let read = input.read(&reader, late());
            drop(reader);
            match read {
                Ok(is_whole) => assert!(fits && is_whole && input.bytes.len() == length, "{length}"),
                Err(error) => assert!(!fits && matches!(error, Error::TooLong { .. }), "{length}: {error}"),
            }
            // with what it has left, its pipe breaks
            let _ = client.join().expect("it does not panic");
        }
    }

    #[test]
    fn an_input_that_is_no_pipe_is_read_to_its_end() {
        let nothing = std::fs::File::open("/dev/null").expect("it is there");
        assert!(Input::default().read(&nothing, Instant::now()).expect("it is read"));
    }
}
