//! The side of the running process.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use log::{info, warn};

use super::protocol::{Channel, ProtocolError};
use super::{FAILED, GREETING, PREPARED, PREPARED_TO_MIGRATE, READY, SERVE, SERVING, SUBSCRIBER, YOURS};
use crate::error::{Error, IoContext as _, Result};
use crate::events::Exchange;
use crate::gate::{Closed, Gate};
use crate::images::Transfers;
use crate::invocation::TAKE_OVER;
use crate::notify;
use crate::sockets::Sockets;
use crate::store::{Aside, Store};
use crate::sys::children::{self, Group};

/// The state that is handed over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HandedOver<'a> {
    /// The lock of the data.
    pub(crate) lock: BorrowedFd<'a>,
    /// All sockets.
    pub(crate) sockets: &'a Sockets,
    /// The metadata.
    pub(crate) store: &'a Store,
    /// The right to change anything.
    pub(crate) gate: &'a Gate,
    /// Whose subscribers are handed over.
    pub(crate) events: &'a Exchange,
    /// They go on.
    pub(crate) transfers: &'a Transfers,
}

/// Has the program at `path` take over, unless `stop` comes first, and returns its pid. From then on this process serves no client.
///
/// Errors: why it did not; this process continues to serve.
pub(crate) async fn hand_over(handed_over: HandedOver<'_>, path: &Path, stop: impl Future<Output = ()>) -> Result<u32> {
    let mut stop = std::pin::pin!(stop);
    info!(program:% = path.display(); "starting a successor");
    let mut successor = Successor::start(path, handed_over).await?;
    let prepared = tokio::select! {
        message = successor.receive(PREPARE) => message?,
        () = stop.as_mut() => return Err(stopped()),
    };
    let migrates = match prepared.as_str() {
        PREPARED => false,
        PREPARED_TO_MIGRATE => true,
        message => {
            let error = ProtocolError::Unexpected(message.to_owned());
            return Err(successor.failure(error).await);
        }
    };
    let closed = tokio::select! {
        closed = handed_over.gate.close(DRAIN) => closed,
        () = stop.as_mut() => return Err(stopped()),
    };
    let closed = closed
        .ok_or_else(|| Error::Upgrade(format!("cancelled, because writes to the disk did not finish within {DRAIN:?}; try again")))?;
    let copy = if migrates { Some(handed_over.store.set_aside().await?) } else { None };
    match successor.let_take_over(closed, handed_over, stop).await {
        Ok(pid) => {
            if let Some(copy) = copy {
                remove(&copy);
            }
            Ok(pid)
        }
        Err((error, closed)) => {
            drop(successor);
            if let Some(copy) = copy {
                match handed_over.store.put_back(&copy).await {
                    Ok(()) => remove(&copy),
                    Err(error) => warn!(copy:?, error = error.chain(); "cannot put the metadata store back"),
                }
            }
            drop(closed);
            Err(error)
        }
    }
}

fn stopped() -> Error {
    Error::Upgrade("cancelled, because this process was asked to stop".to_owned())
}

/// The process that is to take over. It is killed unless it has.
#[derive(Debug)]
struct Successor {
    child: Child,
    path: PathBuf,
    channel: Channel,
    has_taken_over: bool,
}

impl Successor {
    async fn start(path: &Path, handed_over: HandedOver<'_>) -> Result<Self> {
        let (own, its) = UnixStream::pair().on("make a socket for", path)?;
        let arguments = std::env::args_os().skip(1).filter(|argument| argument != TAKE_OVER);
        let mut command = Command::new(path);
        command.args(arguments).arg(TAKE_OVER).stdin(OwnedFd::from(its)).process_group(0);
        children::restores_open_files(&mut command);
        let child = command.spawn().on("run", path)?;
        let channel = Channel::new(own.try_clone().on("make a socket for", path)?).on("make a socket for", path)?;
        let mut successor = Self { child, path: path.to_owned(), channel, has_taken_over: false };
        let descriptors: Vec<_> = [handed_over.lock].into_iter().chain(handed_over.sockets.all()).collect();
        match crate::sys::descriptors::send(own.as_fd(), format!("{GREETING}\n").as_bytes(), &descriptors) {
            Err(error) => Err(successor.failure(error.into()).await),
            Ok(()) => Ok(successor),
        }
    }

    async fn receive(&mut self, limit: Duration) -> Result<String> {
        match self.channel.receive(limit).await {
            Ok(message) => match message.strip_prefix(FAILED) {
                Some(sentence) => Err(Error::Upgrade(format!("{} did not take over: {sentence}", self.path.display()))),
                None => Ok(message),
            },
            Err(error) => Err(self.failure(error).await),
        }
    }

    async fn failure(&mut self, error: ProtocolError) -> Error {
        let mut how = String::new();
        if let ProtocolError::Ended = error {
            // the channel closes slightly before the process can be waited for
            let deadline = Instant::now() + EXIT_STATUS;
            while how.is_empty() && Instant::now() < deadline {
                match self.child.try_wait() {
                    Ok(Some(status)) => how = format!(" ({status})"),
                    _ => tokio::time::sleep(EXIT_STATUS / 100).await,
                }
            }
        }
        Error::Upgrade(format!("{} did not take over: {error}{how}", self.path.display()))
    }

    async fn expect(&mut self, expected: &str, limit: Duration) -> Result<()> {
        match self.receive(limit).await? {
            message if message == expected => Ok(()),
            message => Err(self.failure(ProtocolError::Unexpected(message)).await),
        }
    }

    /// Sends a message.
    async fn send(&mut self, message: &str) -> Result<()> {
        match self.channel.send(message).await {
            Err(error) => Err(self.failure(error.into()).await),
            Ok(()) => Ok(()),
        }
    }

    /// Lets it take over; from then on the gate refuses everyone.
    async fn let_take_over(
        &mut self,
        closed: Closed,
        handed_over: HandedOver<'_>,
        stop: impl Future<Output = ()>,
    ) -> Result<u32, (Error, Closed)> {
        let moving = async {
            if let Err(error) = handed_over.transfers.keep_leases().await {
                warn!(error = error.chain(); "leases of transfers end with this process");
            }
            self.send(YOURS).await?;
            self.expect(READY, OPEN).await?;
            // no client can subscribe while the gate is closed
            for client in handed_over.events.clients() {
                let client = serde_json::to_string(&client).expect("it has no map and no foreign type");
                self.send(&format!("{SUBSCRIBER}{client}")).await?;
            }
            self.send(SERVE).await?;
            self.expect(SERVING, BEGIN).await
        };
        let moved = tokio::select! {
            moved = moving => moved,
            () = stop => Err(stopped()),
        };
        match moved {
            Ok(()) => {
                handed_over.gate.succeed();
                self.has_taken_over = true;
                // only the main process may send MAINPID, and only the new one that it is ready
                notify::send(&format!("MAINPID={}", self.child.id()));
                Ok(self.child.id())
            }
            Err(error) => Err((error, closed)),
        }
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if !self.has_taken_over {
            // it may be a script that waits for the program that it has started
            if let Ok(None) = self.child.try_wait() {
                drop(Group::of(self.child.id()));
            }
            // it may have ended by itself
            let _ = self.child.wait();
        }
    }
}

/// Removes the store as it was before its tables changed.
fn remove(copy: &Aside) {
    if let Err(error) = copy.remove() {
        warn!(error = error.chain(); "cannot remove a copy of the metadata store");
    }
}

/// For a successor to read its settings and to rehearse.
const PREPARE: Duration = Duration::from_secs(10);
/// For calls that change something.
const DRAIN: Duration = Duration::from_secs(10);
/// For a successor to open the store and to find the shims.
const OPEN: Duration = Duration::from_secs(30);
/// For it to begin.
const BEGIN: Duration = Duration::from_secs(5);
/// For its exit status, once the channel is closed.
const EXIT_STATUS: Duration = Duration::from_secs(1);
