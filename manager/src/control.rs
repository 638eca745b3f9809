//! The control socket, used by `x-manager upgrade` and `x-manager verify`: one line of request, one line of answer.
//!
//! ```text
//! upgrade            ok 4711                it is process 4711 that serves now
//! upgrade /PROGRAM   error SENTENCE         nothing has changed
//! verify             ok SENTENCE            every blob was read, and is sound
//!                    error SENTENCE         some are not, or it could not be done
//! ```

use std::io::{self, Read as _, Write as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use log::debug;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::content::{Content, Digest, Verified};
use crate::error::{Error, IoContext as _, Result};
use crate::gate::Gate;

/// A request of a control client.
#[derive(Debug)]
pub(crate) struct UpgradeRequest {
    /// The program that is to take over; none for the file that is now at the daemon's own path.
    pub(crate) program: Option<PathBuf>,
    /// Where the answer goes: the pid of the process that serves now.
    pub(crate) answer: oneshot::Sender<Result<u32>>,
}

/// Serves control clients until this process retires; later ones reach the next process.
pub(crate) async fn serve(listener: UnixListener, upgrades: mpsc::Sender<UpgradeRequest>, content: Arc<Content>, gate: Gate) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let accepted = tokio::select! {
            biased;
            () = gate.retired() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((socket, _root)) => {
                let (upgrades, content) = (upgrades.clone(), Arc::clone(&content));
                tokio::spawn(async move {
                    if let Err(error) = converse(socket, upgrades, &content).await {
                        debug!(error:%; "a control connection failed");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                debug!(error:%; "cannot accept a control connection");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

async fn converse(socket: tokio::net::UnixStream, upgrades: mpsc::Sender<UpgradeRequest>, content: &Content) -> io::Result<()> {
    let mut socket = BufReader::new(socket);
    let mut line = Vec::new();
    tokio::time::timeout(SLOWEST, (&mut socket).take(LINE_BYTES).read_until(b'\n', &mut line)).await??;
    let text = line.trim_ascii_end();
    if text == VERIFY.as_bytes() {
        let verified = tokio::select! {
            verified = content.verify() => verified,
            // its client does not wait any more
            _closed = socket.read_u8() => return Ok(()),
        };
        return socket.get_mut().write_all(format!("{}\n", sentence(&verified)).as_bytes()).await;
    }
    let program = match text.strip_prefix(UPGRADE.as_bytes()) {
        Some([]) => None,
        Some([b' ', path @ ..]) => Some(PathBuf::from(std::ffi::OsStr::from_bytes(path))),
        _ => return socket.get_mut().write_all(b"error unknown request\n").await,
    };
    let (answer, answered) = oneshot::channel();
    // if the daemon stops, the connection closes without an answer
    let _ = upgrades.send(UpgradeRequest { program, answer }).await;
    let answer = match answered.await {
        Ok(Ok(pid)) => format!("{OK}{pid}\n"),
        Ok(Err(error)) => format!("{ERROR}{}\n", error.chain().replace('\n', " ")),
        Err(_) => return Ok(()),
    };
    socket.get_mut().write_all(answer.as_bytes()).await
}

/// What a verification is answered with.
fn sentence(verified: &Result<Verified>) -> String {
    let Verified { sound, damaged, missing } = match verified {
        Ok(verified) => verified,
        Err(error) => return format!("{ERROR}{}", error.chain().replace('\n', " ")),
    };
    let list = |digests: &[Digest]| digests.iter().take(LISTED).map(Digest::as_str).collect::<Vec<_>>().join(", ");
    match (damaged.len(), missing.len()) {
        (0, 0) => format!("{OK}{sound} blobs are sound"),
        (0, count) => format!("{ERROR}{count} blobs are missing; pull their images again: {}", list(missing)),
        (count, 0) => format!("{ERROR}{count} blobs were damaged, and are taken away; pull their images again: {}", list(damaged)),
        (count, lost) => format!(
            "{ERROR}{count} blobs were damaged, and are taken away; {lost} are missing; pull their images again: {}, {}",
            list(damaged),
            list(missing)
        ),
    }
}

/// Has the daemon at `address` read all content, and returns what it says.
///
/// Errors: what is not sound.
pub(crate) fn verify(address: &Path) -> Result<String> {
    for _attempt in 0..ATTEMPTS {
        let answer = ask(address, VERIFY.into(), None)?;
        if let Some(sentence) = answer.strip_prefix(ERROR) {
            return Err(Error::DataLoss(sentence.trim_end().to_owned()));
        }
        if let Some(sentence) = answer.strip_prefix(OK) {
            return Ok(sentence.trim_end().to_owned());
        }
        // an upgrade has ended it
    }
    Err(Error::Silent("it has exited; see its log".to_owned()))
}

/// Has the daemon at `address` replaced, and returns the pid of the process that serves now.
///
/// Errors: why that one did not take over.
pub(crate) fn upgrade(address: &Path, program: Option<&Path>) -> Result<u32> {
    for _attempt in 0..ATTEMPTS {
        let mut request = std::ffi::OsString::from(UPGRADE);
        if let Some(program) = program {
            request.push(" ");
            request.push(program);
        }
        let answer = ask(address, request, Some(ANSWERED))?;
        if let Some(sentence) = answer.strip_prefix(ERROR) {
            return Err(Error::Upgrade(sentence.trim_end().to_owned()));
        }
        if let Some(pid) = answer.strip_prefix(OK).and_then(|pid| pid.trim_end().parse().ok()) {
            return Ok(pid);
        }
        // another upgrade was about to replace it: repeat the request to the next process
    }
    Err(Error::Silent("it has exited; see its log".to_owned()))
}

fn ask(address: &Path, mut request: std::ffi::OsString, limit: Option<Duration>) -> Result<String> {
    let mut socket = UnixStream::connect(address).map_err(|why| Error::NoDaemon { address: address.to_owned(), why })?;
    socket.set_read_timeout(limit).on("wait for", address)?;
    request.push("\n");
    let mut answer = String::new();
    let asked = socket.write_all(&request.into_vec()).and_then(|()| socket.read_to_string(&mut answer));
    match asked {
        Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => Ok(String::new()),
        asked => asked.on("wait for the answer of", address).map(|_bytes| answer),
    }
}

const UPGRADE: &str = "upgrade";
const VERIFY: &str = "verify";
/// Digests of an answer.
const LISTED: usize = 100;
const OK: &str = "ok ";
const ERROR: &str = "error ";
/// The most connections at a time; further ones wait.
const MAX_CONNECTIONS: usize = 8;
/// A request that a process accepts while it is being replaced is repeated to the next one.
const ATTEMPTS: usize = 3;
/// The longest request.
const LINE_BYTES: u64 = 5000;
/// For the request line.
const SLOWEST: Duration = Duration::from_secs(5);
/// Upper bound of an upgrade.
const ANSWERED: Duration = Duration::from_secs(90);
/// After a failed accept.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
