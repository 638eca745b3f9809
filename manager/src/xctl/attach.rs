//! A process in the foreground: its output is copied, its input and signals are passed on, until it exits or the keys are typed that detach it.
//!
//! ```text
//!  fifo of stdout, stderr ──▶ a thread each ──▶ standard output, standard error
//!  standard input ──▶ a thread ──▶ keys that detach? ──▶ fifo of stdin; its end: CloseIO
//!  signals ──▶ Kill; a new size of the terminal ──▶ ResizePty; Wait ──▶ the status
//! ```

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::pipe;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tonic::Code;

use crate::client::Client;
use crate::error::{Error, IoContext as _, Result};
use crate::keys::{Keys, Scanner};
use crate::stdio::Uris;
use crate::tasks::{self, Id};
use crate::terminal::{self, Raw};

/// How an attachment ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The process has exited, with this status.
    Exited(u32),
    /// The process runs, and this `xctl` does not show it any more.
    Detached,
}

/// The ends of fifos that are read, opened before the shim opens its own: containerd's shims wait for that.
#[derive(Debug)]
pub(crate) struct Outputs {
    stdout: Option<File>,
    stderr: Option<File>,
}

impl Outputs {
    /// Opens the fifos.
    pub(crate) fn open(uris: &Uris) -> Result<Self> {
        let open = |path: &str| match path {
            "" => Ok(None),
            path => {
                // not blocked by a shim that never comes
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                rustix::fs::open(path, flags, Mode::empty()).on("open", path).map(|file| Some(File::from(file)))
            }
        };
        Ok(Self { stdout: open(&uris.stdout)?, stderr: open(&uris.stderr)? })
    }

    /// Copies until the other ends are closed. To be called when the shim has opened them: a fifo without a writer is at its end.
    fn copy(self) -> Result<Vec<oneshot::Receiver<()>>> {
        let mut ends = Vec::new();
        for (fifo, target) in [(self.stdout, Target::Stdout), (self.stderr, Target::Stderr)] {
            let Some(fifo) = fifo else { continue };
            let flags = rustix::fs::fcntl_getfl(&fifo).on("use", target.name())?;
            rustix::fs::fcntl_setfl(&fifo, flags - OFlags::NONBLOCK).on("use", target.name())?;
            let (ended, end) = oneshot::channel();
            std::thread::spawn(move || {
                blocking_copy(fifo, target);
                // the receiver may have stopped waiting
                let _ = ended.send(());
            });
            ends.push(end);
        }
        Ok(ends)
    }
}

#[derive(Debug, Clone, Copy)]
enum Target {
    Stdout,
    Stderr,
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "standard output",
            Self::Stderr => "standard error",
        }
    }

    fn write(self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(bytes).and_then(|()| out.flush())
            }
            Self::Stderr => io::stderr().lock().write_all(bytes),
        }
    }
}

/// Without a reader of its own output `xctl` still reads the container's, which would block otherwise.
fn blocking_copy(mut fifo: File, target: Target) {
    let mut buffer = vec![0; 64 << 10];
    let mut is_read = true;
    loop {
        match fifo.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => is_read = is_read && target.write(&buffer[..length]).is_ok(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Signals that are passed on, from the moment that this is made.
#[derive(Debug)]
pub(crate) struct Signals {
    receiver: mpsc::Receiver<u32>,
}

impl Signals {
    /// Takes them from now on: none ends `xctl` any more.
    pub(crate) fn take() -> Result<Self> {
        let (sender, receiver) = mpsc::channel(16);
        for kind in [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::quit(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
        ] {
            let mut stream = listen(kind)?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() {
                    // with sixteen not yet sent, one more would change nothing
                    let _ = sender.try_send(kind.as_raw_value().cast_unsigned());
                }
            });
        }
        Ok(Self { receiver })
    }
}

fn listen(kind: SignalKind) -> Result<Signal> {
    signal(kind).on("listen for signals of", "this process")
}

/// What is attached to.
#[derive(Debug)]
pub(crate) struct Attachment {
    /// The process.
    pub(crate) process: Id,
    /// The fifo of its stdin, if it has one.
    pub(crate) stdin: String,
    /// Whether it has a terminal.
    pub(crate) is_terminal: bool,
    /// Whether standard input is passed on.
    pub(crate) is_interactive: bool,
    /// What detaches.
    pub(crate) keys: Keys,
}

/// An attachment whose output is being copied.
#[derive(Debug)]
pub(crate) struct Running {
    what: Attachment,
    outputs: Vec<oneshot::Receiver<()>>,
    typed: JoinHandle<Result<bool>>,
    raw: Option<Raw>,
}

impl Attachment {
    /// Begins to copy. The process exists; if it has not started yet, no byte is lost.
    pub(crate) fn begin(self, client: &Client, outputs: Option<Outputs>) -> Result<Running> {
        let raw = if self.is_terminal && terminal::is_there() { Some(Raw::enter()?) } else { None };
        let outputs = outputs.map_or_else(|| Ok(Vec::new()), Outputs::copy)?;
        let typed = if self.is_interactive && !self.stdin.is_empty() {
            let fifo = pipe::OpenOptions::new().read_write(true).open_sender(&self.stdin).on("open", &self.stdin)?;
            let keys = if self.is_terminal { self.keys.clone() } else { Keys::none() };
            tokio::spawn(pass_on(client.clone(), self.process.clone(), fifo, keys))
        } else {
            tokio::spawn(std::future::pending())
        };
        Ok(Running { what: self, outputs, typed, raw })
    }
}

impl Running {
    /// Until the process exits, or is detached from.
    pub(crate) async fn until_end(&mut self, client: &Client, signals: &mut Signals) -> Result<End> {
        let mut resized = listen(SignalKind::window_change())?;
        self.resize(client).await;
        let waiting = tasks::wait(client, &self.what.process);
        tokio::pin!(waiting);
        let mut is_typing = true;
        loop {
            tokio::select! {
                status = &mut waiting => return status.map(End::Exited),
                typed = &mut self.typed, if is_typing => match typed {
                    Ok(Ok(true)) => return Ok(End::Detached),
                    Ok(Ok(false)) => is_typing = false,
                    Ok(Err(error)) => {
                        is_typing = false;
                        eprintln!("xctl: {}\r", error.chain());
                    }
                    Err(_panic) => is_typing = false,
                },
                Some(number) = signals.receiver.recv() => {
                    // a process that is about to exit takes no signal: its exit is next
                    if let Err(error) = tasks::kill(client, &self.what.process, number, false).await {
                        eprintln!("xctl: {}\r", error.chain());
                    }
                }
                Some(()) = resized.recv() => self.resize(client).await,
            }
        }
    }

    /// Waits for the rest of the output, for as long as the shim may take. Then the terminal is as it was.
    pub(crate) async fn finish(self) {
        let all = async {
            for end in self.outputs {
                // a thread that has panicked copies nothing more
                let _ = end.await;
            }
        };
        // a process in the background holds it open for longer: its output is not waited for
        let _ = tokio::time::timeout(DRAINED, all).await;
        drop(self.raw);
    }

    /// Gives the process' terminal the size of this one.
    pub(crate) async fn resize(&self, client: &Client) {
        if !self.what.is_terminal {
            return;
        }
        if let Some((width, height)) = terminal::size() {
            // it may have exited, or not have started: a terminal of another size is no reason to give up
            let _ = tasks::resize(client, &self.what.process, width, height).await;
        }
    }
}

/// Passes typed bytes on. True if they detach; false at their end, which the process sees.
async fn pass_on(client: Client, process: Id, mut fifo: pipe::Sender, keys: Keys) -> Result<bool> {
    let mut scanner = Scanner::new(keys);
    let mut typed = blocking_stdin();
    while let Some(bytes) = typed.recv().await {
        let (passed, detaches) = scanner.scan(&bytes);
        fifo.write_all(&passed).await.on("write", "the stdin of the container")?;
        if detaches {
            return Ok(true);
        }
    }
    drop(fifo);
    match tasks::close_stdin(&client, &process).await {
        // it has exited
        Err(error) if matches!(error.code(), Some(Code::NotFound | Code::FailedPrecondition)) => Ok(false),
        closed => closed.map(|()| false),
    }
}

/// A thread reads standard input: a read of it cannot be given up, and is left behind when `xctl` ends.
fn blocking_stdin() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 32 << 10];
        loop {
            match io::stdin().lock().read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => {
                    if sender.blocking_send(buffer[..length].to_vec()).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    receiver
}

/// Whether a path is one of a fifo, that `attach` can open.
pub(crate) fn is_fifo(path: &str) -> bool {
    use std::os::unix::fs::FileTypeExt as _;
    std::fs::metadata(Path::new(path)).is_ok_and(|about| about.file_type().is_fifo())
}

/// As long as shims wait for a reader.
const DRAINED: Duration = Duration::from_secs(10);
impl Keys {
    /// Nothing detaches.
    fn none() -> Self {
        Self::parse("").unwrap_or_else(|_| unreachable!("an empty list is one"))
    }
}

/// Errors of a shim that was asked for a container's stdio by a client before.
pub(crate) fn not_attachable(container: &str) -> Error {
    Error::refused(format!(
        "container {container} has no output that can be attached to: it was started by another client; `xctl exec -it {container} sh` runs a shell in it"
    ))
}
