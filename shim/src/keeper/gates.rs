//! The gates of containers that the native engine has made: pipes at whose other ends their inits wait, and the placeholders of units of systemd's.
//!
//! Owns when a gate opens, by one byte, and when it closes. A closed gate ends an init that still waits, so a keeper that dies leaves none behind.
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use nix::errno::Errno;

use crate::handover::Cause;
use crate::saved::{Reader, Saved, Writer};

/// By the key of the init, each with the cause that made it.
#[derive(Debug, Default)]
pub(crate) struct Gates(BTreeMap<String, (Cause, OwnedFd)>);

impl Gates {
    pub(crate) fn add(&mut self, key: &str, cause: Cause, gate: OwnedFd) {
        self.0.insert(key.to_owned(), (cause, gate));
    }

    /// A placeholder's: closed with its cause.
    pub(crate) fn add_placeholder(&mut self, key: &str, cause: Cause, gate: OwnedFd) {
        self.add(&format!("{key}{PLACEHOLDER}"), cause, gate);
    }

    /// Lets the init of a key execute its program.
    ///
    /// Errors: ESRCH if it does not wait: it was let through before, or is dead.
    pub(crate) fn open(&mut self, key: &str) -> io::Result<()> {
        let (_, gate) = self.0.remove(key).ok_or(Errno::ESRCH)?;
        match File::from(gate).write_all(&[1]) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Errno::ESRCH.into()),
            other => other,
        }
    }

    pub(crate) fn close(&mut self, key: &str) {
        self.0.remove(key);
    }

    /// Closes what a cause has made.
    pub(crate) fn close_of(&mut self, cause: Cause) {
        self.0.retain(|_, (made_by, _)| *made_by != cause);
    }
}

impl Gates {
    /// Closes those of placeholders that a cause has made.
    pub(crate) fn close_placeholders_of(&mut self, cause: Cause) {
        self.0.retain(|key, (made_by, _)| *made_by != cause || !key.ends_with(PLACEHOLDER));
    }
}

/// No id has a space.
const PLACEHOLDER: &str = " placeholder";

/// A keeper of an earlier version has saved none.
impl Saved for Gates {
    fn save(&self, writer: &mut Writer) {
        self.0.save(writer);
    }

    fn load(reader: &mut Reader<'_>) -> Result<Self, minicbor::decode::Error> {
        Option::load(reader).map(Option::unwrap_or_default).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;

    use super::*;

    fn read(end: OwnedFd) -> Vec<u8> {
        let mut bytes = Vec::new();
        File::from(end).read_to_end(&mut bytes).expect("a pipe");
        bytes
    }

    #[test]
    fn a_gate_opens_once_and_closes_with_its_container_or_cause() {
        let mut gates = Gates::default();
        let mut make = |key: &str, cause| {
            let (end, gate) = pipe2(OFlag::O_CLOEXEC).expect("a pipe");
            gates.add(key, cause, gate);
            end
        };
        let (first, second, third, dead) = (make("c1", 1), make("c2", 2), make("c3", 3), make("c4", 4));
        drop(dead);
        let is_absent = |result: io::Result<()>| result.is_err_and(|error| error.raw_os_error() == Some(Errno::ESRCH as i32));
        gates.open("c1").expect("it waits");
        assert!(is_absent(gates.open("c1")) && is_absent(gates.open("c4")) && is_absent(gates.open("c5")));
        gates.close("c2");
        gates.close_of(3);
        assert_eq!((read(first), read(second), read(third)), (vec![1], vec![], vec![]));
    }

    #[test]
    fn the_gate_of_a_placeholder_closes_with_its_cause_and_not_with_its_container() {
        let mut gates = Gates::default();
        let (end, gate) = pipe2(OFlag::O_CLOEXEC).expect("a pipe");
        let (placeholders_end, placeholders_gate) = pipe2(OFlag::O_CLOEXEC).expect("a pipe");
        gates.add("c1", 1, gate);
        gates.add_placeholder("c1", 1, placeholders_gate);
        gates.close_placeholders_of(2);
        assert_eq!(gates.0.len(), 2);
        gates.close_placeholders_of(1);
        assert_eq!((read(placeholders_end), gates.0.len()), (vec![], 1));
        gates.open("c1").expect("init waits for its own");
        assert_eq!(read(end), [1]);
    }
}
