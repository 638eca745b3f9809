//! The socket of `x-manager upgrade`: a line is asked, a line is answered.
//!
//! ```text
//! upgrade            ok 4711                it is process 4711 that serves now
//! upgrade /PROGRAM   error SENTENCE         nothing has changed
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

use crate::error::{Error, IoContext as _, Result};
use crate::gate::Gate;

/// What somebody wants of the daemon.
#[derive(Debug)]
pub(crate) struct Order {
    /// The program that shall take over; none for what is now where the daemon's own was.
    pub(crate) program: Option<PathBuf>,
    /// Where the answer goes: the pid of the process that serves now.
    pub(crate) answer: oneshot::Sender<Result<u32>>,
}

/// Takes orders until this process retires: then they are for the next one.
pub(crate) async fn serve(listener: UnixListener, orders: mpsc::Sender<Order>, gate: Gate) {
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
                let orders = orders.clone();
                tokio::spawn(async move {
                    if let Err(error) = converse(socket, orders).await {
                        debug!(error:%; "a connection for orders ended");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                debug!(error:%; "cannot accept a connection for orders");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

async fn converse(socket: tokio::net::UnixStream, orders: mpsc::Sender<Order>) -> io::Result<()> {
    let mut socket = BufReader::new(socket);
    let mut line = Vec::new();
    tokio::time::timeout(SLOWEST, (&mut socket).take(LINE_BYTES).read_until(b'\n', &mut line)).await??;
    let words = line.trim_ascii_end();
    let program = match words.strip_prefix(UPGRADE.as_bytes()) {
        Some([]) => None,
        Some([b' ', path @ ..]) => Some(PathBuf::from(std::ffi::OsStr::from_bytes(path))),
        _ => return socket.get_mut().write_all(b"error no such order\n").await,
    };
    let (answer, answered) = oneshot::channel();
    // without the daemon there is nobody to answer, which the socket's end says
    let _ = orders.send(Order { program, answer }).await;
    let answer = match answered.await {
        Ok(Ok(pid)) => format!("{OK}{pid}\n"),
        Ok(Err(error)) => format!("{ERROR}{}\n", error.chain().replace('\n', " ")),
        Err(_) => return Ok(()),
    };
    socket.get_mut().write_all(answer.as_bytes()).await
}

/// Has the daemon that takes orders at `address` replaced, and returns the pid of the process that serves now.
///
/// Errors: why that one did not take over.
pub(crate) fn upgrade(address: &Path, program: Option<&Path>) -> Result<u32> {
    for _attempt in 0..ATTEMPTS {
        let answer = ask(address, program)?;
        if let Some(sentence) = answer.strip_prefix(ERROR) {
            return Err(Error::Launch(sentence.trim_end().to_owned()));
        }
        if let Some(pid) = answer.strip_prefix(OK).and_then(|pid| pid.trim_end().parse().ok()) {
            return Ok(pid);
        }
        // it was about to be replaced by another order: this one is for the next process
    }
    Err(Error::Launch("the daemon ended without an answer; its log says more".to_owned()))
}

fn ask(address: &Path, program: Option<&Path>) -> Result<String> {
    let mut socket = UnixStream::connect(address).on("no x-manager takes orders at", address)?;
    socket.set_read_timeout(Some(ANSWERED)).on("wait for", address)?;
    let mut order = std::ffi::OsString::from(UPGRADE);
    if let Some(program) = program {
        order.push(" ");
        order.push(program);
    }
    order.push("\n");
    let mut answer = String::new();
    let asked = socket.write_all(&order.into_vec()).and_then(|()| socket.read_to_string(&mut answer));
    match asked {
        Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => Ok(String::new()),
        asked => asked.on("wait for the answer of", address).map(|_bytes| answer),
    }
}

const UPGRADE: &str = "upgrade";
const OK: &str = "ok ";
const ERROR: &str = "error ";
/// The most connections at a time; further ones wait.
const MAX_CONNECTIONS: usize = 8;
/// An order that a process takes in its last moment is given again to the next.
const ATTEMPTS: usize = 3;
/// The longest order.
const LINE_BYTES: u64 = 5000;
/// To say what one wants.
const SLOWEST: Duration = Duration::from_secs(5);
/// An upgrade is called off or done in less.
const ANSWERED: Duration = Duration::from_secs(90);
/// After a failed accept.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
