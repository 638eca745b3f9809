//! The side of the new process.

use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::protocol::{Channel, ProtocolError};
use super::{FAILED, GREETING, PREPARED, PREPARED_TO_MIGRATE, READY, SERVE, SERVING, SUBSCRIBER, YOURS};
use crate::error::{Error, IoContext as _, Result};
use crate::events::{Client, Exchange};
use crate::sockets::Inherited;
use crate::sys::descriptors;

/// The process that this one is to replace.
#[derive(Debug)]
pub(crate) struct Predecessor {
    channel: Channel,
}

impl Predecessor {
    /// Receives the lock of the data and the sockets from standard input.
    pub(crate) fn meet() -> Result<(Self, OwnedFd, Inherited)> {
        let input = Path::new("standard input");
        let socket = socket().on("take over from", input)?;
        socket.set_read_timeout(Some(GREETING_TIMEOUT)).on("take over from", input)?;
        let mut greeting = [0; 128];
        let (count, mut descriptors) = descriptors::receive(socket.as_fd(), &mut greeting).on("take over from", input)?;
        if greeting[..count].trim_ascii_end() != GREETING.as_bytes() || descriptors.is_empty() {
            return Err(Error::Precondition("the running x-manager uses another handover protocol; stop it and start this one".to_owned()));
        }
        let lock = descriptors.remove(0);
        let channel = Channel::new(socket).on("take over from", input)?;
        Ok((Self { channel }, lock, Inherited::HandedOver(descriptors)))
    }

    /// Reports that this process can take over, and waits until the running one has stopped all changes.
    pub(crate) async fn prepared(&mut self, migrates: bool) -> Result<()> {
        self.exchange(if migrates { PREPARED_TO_MIGRATE } else { PREPARED }, YOURS).await
    }

    /// Reports that this process can serve, and waits until it may. From then on `events` keeps the events that the other's subscribers would miss.
    pub(crate) async fn ready(mut self, events: &Arc<Exchange>) -> Result<()> {
        self.channel.send(READY).await.map_err(|error| gone(error.into()))?;
        let mut clients = Vec::new();
        loop {
            let message = self.channel.receive(ANSWER_TIMEOUT).await.map_err(gone)?;
            match message.strip_prefix(SUBSCRIBER).map(serde_json::from_str::<Client>) {
                Some(Ok(client)) => clients.push(client),
                None if message == SERVE => break,
                Some(Err(_)) | None => return Err(gone(ProtocolError::Unexpected(message))),
            }
        }
        events.expect(clients);
        self.channel.send(SERVING).await.map_err(|error| gone(error.into()))
    }

    async fn exchange(&mut self, message: &str, answer: &str) -> Result<()> {
        self.channel.send(message).await.map_err(|error| gone(error.into()))?;
        match self.channel.receive(ANSWER_TIMEOUT).await.map_err(gone)? {
            message if message == answer => Ok(()),
            message => Err(gone(ProtocolError::Unexpected(message))),
        }
    }
}

fn gone(reason: ProtocolError) -> Error {
    Error::Upgrade(format!("the running x-manager did not hand over: {reason}"))
}

/// Reports to the running process why this one gives up.
pub(crate) fn report_failure(sentence: &str) {
    let line = format!("{FAILED}{}\n", sentence.replace('\n', " "));
    // if that fails, it notices that this process exits
    let _ = socket().and_then(|mut socket| socket.write_all(line.as_bytes()));
}

fn socket() -> std::io::Result<UnixStream> {
    std::io::stdin().as_fd().try_clone_to_owned().map(UnixStream::from)
}

/// For the first message.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// For each of the others; the deadlines of the running process are shorter.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
