//! The side of the running process.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use log::{info, warn};

use super::words::{Silence, Words};
use super::{FAILED, GREETING, PREPARED, PREPARED_TO_MIGRATE, READY, SERVE, SERVING, SUBSCRIBER, YOURS};
use crate::error::{Error, IoContext as _, Result};
use crate::events::Exchange;
use crate::gate::{Closed, Gate};
use crate::invocation::TAKE_OVER;
use crate::notify;
use crate::sockets::Sockets;
use crate::store::{Aside, Store};
use crate::sys::children::{self, Group};

/// What is handed over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Estate<'a> {
    /// The lock of the data.
    pub(crate) lock: BorrowedFd<'a>,
    /// All sockets.
    pub(crate) sockets: &'a Sockets,
    /// The metadata.
    pub(crate) store: &'a Store,
    /// The right to change anything.
    pub(crate) gate: &'a Gate,
    /// Whose subscribers the successor is told.
    pub(crate) events: &'a Exchange,
}

/// Has the program at `path` take over, unless this process is told to `stop` meanwhile, and returns its pid. From then on this process serves
/// nobody.
///
/// Errors: why it did not; this process goes on.
pub(crate) async fn hand_over(estate: Estate<'_>, path: &Path, stop: impl Future<Output = ()>) -> Result<u32> {
    let mut stop = std::pin::pin!(stop);
    info!(program:% = path.display(); "starting a successor");
    let mut successor = Successor::start(path, estate).await?;
    let prepared = tokio::select! {
        word = successor.hear(PREPARE) => word?,
        () = stop.as_mut() => return Err(stopped()),
    };
    let migrates = match prepared.as_str() {
        PREPARED => false,
        PREPARED_TO_MIGRATE => true,
        word => {
            let nonsense = Silence::Nonsense(word.to_owned());
            return Err(successor.failure(nonsense).await);
        }
    };
    let closed = tokio::select! {
        closed = estate.gate.close(DRAIN) => closed,
        () = stop.as_mut() => return Err(stopped()),
    };
    let closed = closed.ok_or_else(|| {
        Error::Unavailable(format!("called off, as the disk did not take what is being written within {DRAIN:?}; try it again"))
    })?;
    let copy = if migrates { Some(estate.store.set_aside().await?) } else { None };
    match successor.move_in(closed, estate, stop).await {
        Ok(pid) => {
            if let Some(copy) = copy {
                remove(&copy);
            }
            Ok(pid)
        }
        Err((error, closed)) => {
            drop(successor);
            if let Some(copy) = copy {
                match estate.store.put_back(&copy).await {
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
    Error::Unavailable("called off, as this process was told to stop".to_owned())
}

/// The process that is to take over. It is killed unless it has.
#[derive(Debug)]
struct Successor {
    child: Child,
    path: PathBuf,
    words: Words,
    has_taken_over: bool,
}

impl Successor {
    async fn start(path: &Path, estate: Estate<'_>) -> Result<Self> {
        let (own, its) = UnixStream::pair().on("make a socket for", path)?;
        let arguments = std::env::args_os().skip(1).filter(|argument| argument != TAKE_OVER);
        let mut command = Command::new(path);
        command.args(arguments).arg(TAKE_OVER).stdin(OwnedFd::from(its)).process_group(0);
        children::inherits_nothing_of_ours(&mut command);
        let child = command.spawn().on("run", path)?;
        let words = Words::new(own.try_clone().on("make a socket for", path)?).on("make a socket for", path)?;
        let mut successor = Self { child, path: path.to_owned(), words, has_taken_over: false };
        let descriptors: Vec<_> = [estate.lock].into_iter().chain(estate.sockets.all()).collect();
        match crate::sys::descriptors::send(own.as_fd(), format!("{GREETING}\n").as_bytes(), &descriptors) {
            Err(error) => Err(successor.failure(error.into()).await),
            Ok(()) => Ok(successor),
        }
    }

    async fn hear(&mut self, limit: Duration) -> Result<String> {
        match self.words.hear(limit).await {
            Ok(word) => match word.strip_prefix(FAILED) {
                Some(sentence) => Err(Error::Launch(format!("{} did not take over: {sentence}", self.path.display()))),
                None => Ok(word),
            },
            Err(silence) => Err(self.failure(silence).await),
        }
    }

    async fn failure(&mut self, silence: Silence) -> Error {
        let mut how = String::new();
        if let Silence::Ended = silence {
            // its end and the end of its words are not quite the same moment
            let deadline = Instant::now() + LAST_BREATH;
            while how.is_empty() && Instant::now() < deadline {
                match self.child.try_wait() {
                    Ok(Some(status)) => how = format!(" ({status})"),
                    _ => tokio::time::sleep(LAST_BREATH / 100).await,
                }
            }
        }
        Error::Launch(format!("{} did not take over: {silence}{how}", self.path.display()))
    }

    async fn expect(&mut self, expected: &str, limit: Duration) -> Result<()> {
        match self.hear(limit).await? {
            word if word == expected => Ok(()),
            word => Err(self.failure(Silence::Nonsense(word)).await),
        }
    }

    /// Says something; that it has ended is heard.
    async fn say(&mut self, word: &str) -> Result<()> {
        match self.words.say(word).await {
            Err(error) => Err(self.failure(error.into()).await),
            Ok(()) => Ok(()),
        }
    }

    /// Lets it take over; then nobody gets through the gate any more.
    async fn move_in(&mut self, closed: Closed, estate: Estate<'_>, stop: impl Future<Output = ()>) -> Result<u32, (Error, Closed)> {
        let moving = async {
            self.say(YOURS).await?;
            self.expect(READY, OPEN).await?;
            // nobody subscribes while the gate is closed
            for client in estate.events.clients() {
                let client = serde_json::to_string(&client).expect("it has no map and no foreign type");
                self.say(&format!("{SUBSCRIBER}{client}")).await?;
            }
            self.say(SERVE).await?;
            self.expect(SERVING, BEGIN).await
        };
        let moved = tokio::select! {
            moved = moving => moved,
            () = stop => Err(stopped()),
        };
        match moved {
            Ok(()) => {
                estate.gate.retire();
                self.has_taken_over = true;
                // only the main process may say which one that is, and that one that it is ready
                notify::tell(&format!("MAINPID={}", self.child.id()));
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
/// For its status, once it is silent for ever.
const LAST_BREATH: Duration = Duration::from_secs(1);
