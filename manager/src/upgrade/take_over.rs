//! The side of the new process.

use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::words::{Silence, Words};
use super::{FAILED, GREETING, PREPARED, PREPARED_TO_MIGRATE, READY, SERVE, SERVING, SUBSCRIBER, YOURS};
use crate::error::{Error, IoContext as _, Result};
use crate::events::{Client, Exchange};
use crate::sockets::Inherited;
use crate::sys::descriptors;

/// The process that this one is to replace.
#[derive(Debug)]
pub(crate) struct Predecessor {
    words: Words,
}

impl Predecessor {
    /// Receives the lock of the data and the sockets from standard input.
    pub(crate) fn meet() -> Result<(Self, OwnedFd, Inherited)> {
        let input = Path::new("standard input");
        let socket = socket().on("take over from", input)?;
        socket.set_read_timeout(Some(GREETED)).on("take over from", input)?;
        let mut greeting = [0; 128];
        let (count, mut descriptors) = descriptors::receive(socket.as_fd(), &mut greeting).on("take over from", input)?;
        if greeting[..count].trim_ascii_end() != GREETING.as_bytes() || descriptors.is_empty() {
            return Err(Error::Precondition("the running x-manager hands over in a way that this one does not know".to_owned()));
        }
        let lock = descriptors.remove(0);
        let words = Words::new(socket).on("take over from", input)?;
        Ok((Self { words }, lock, Inherited::HandedOver(descriptors)))
    }

    /// Says that this process could do it, and waits until nobody changes anything.
    pub(crate) async fn prepared(&mut self, migrates: bool) -> Result<()> {
        self.say(if migrates { PREPARED_TO_MIGRATE } else { PREPARED }, YOURS).await
    }

    /// Says that this process could serve, and waits until it may. From then on `events` keeps what the other's subscribers would miss.
    pub(crate) async fn ready(mut self, events: &Arc<Exchange>) -> Result<()> {
        self.words.say(READY).await.map_err(|error| gone(error.into()))?;
        let mut clients = Vec::new();
        loop {
            let word = self.words.hear(ANSWERED).await.map_err(gone)?;
            match word.strip_prefix(SUBSCRIBER).map(serde_json::from_str::<Client>) {
                Some(Ok(client)) => clients.push(client),
                None if word == SERVE => break,
                Some(Err(_)) | None => return Err(gone(Silence::Nonsense(word))),
            }
        }
        events.expect(clients);
        self.words.say(SERVING).await.map_err(|error| gone(error.into()))
    }

    async fn say(&mut self, word: &str, answer: &str) -> Result<()> {
        self.words.say(word).await.map_err(|error| gone(error.into()))?;
        match self.words.hear(ANSWERED).await.map_err(gone)? {
            word if word == answer => Ok(()),
            word => Err(gone(Silence::Nonsense(word))),
        }
    }
}

fn gone(reason: Silence) -> Error {
    Error::Unavailable(format!("the process that was to hand over did not: {reason}"))
}

/// Tells the running process why this one gives up.
pub(crate) fn report_failure(sentence: &str) {
    let line = format!("{FAILED}{}\n", sentence.replace('\n', " "));
    // if it cannot be told, it notices the end of this process
    let _ = socket().and_then(|mut socket| socket.write_all(line.as_bytes()));
}

fn socket() -> std::io::Result<UnixStream> {
    std::io::stdin().as_fd().try_clone_to_owned().map(UnixStream::from)
}

/// For the first word.
const GREETED: Duration = Duration::from_secs(10);
/// For each of the others; the running process is the one that decides when it is too late.
const ANSWERED: Duration = Duration::from_secs(60);
