//! Fifos that the test owns, as a client of containerd does: a reader that counts, is slow, or disconnects.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::eventually::{SOON, eventually};

/// Makes a fifo.
pub fn fifo(path: &Path) -> Result<()> {
    mkfifo(path, Mode::from_bits_truncate(0o600)).with_context(|| format!("make fifo {}", path.display()))
}

fn open_nonblocking(path: &Path, options: &mut OpenOptions) -> std::io::Result<File> {
    options.custom_flags(OFlag::O_NONBLOCK.bits() | OFlag::O_CLOEXEC.bits()).open(path)
}

/// How a reader reads.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// As fast as it can, and keeps the bytes.
    Keep,
    /// As fast as it can, and only counts.
    Count,
    /// After such a pause, as fast as it can, and only counts.
    Pausing(Duration),
    /// Nothing until [`Reader::proceed`], then as fast as it can, and keeps what it read.
    OnCue,
    /// At most that many bytes, then a pause.
    Slow {
        /// Bytes per turn.
        chunk: usize,
        /// The pause after each turn.
        pause: Duration,
    },
}

#[derive(Debug, Default)]
struct Seen {
    bytes: Vec<u8>,
    count: u64,
    ended: bool,
    proceed: bool,
    leave: bool,
}

/// Reads a fifo in a thread of its own.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    /// Opens the fifo and begins to read. It waits for a first writer, and ends when the last one has closed it.
    pub fn open(path: &Path, pace: Pace) -> Result<Self> {
        Self::open_and_show(path, pace, |_| ())
    }

    /// Like [`Self::open`]; `show` gets the bytes as they arrive.
    pub fn open_and_show(path: &Path, pace: Pace, show: impl FnMut(&[u8]) + Send + 'static) -> Result<Self> {
        let file = open_nonblocking(path, OpenOptions::new().read(true)).with_context(|| format!("open {} for reading", path.display()))?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let theirs = Arc::clone(&seen);
        let thread = thread::Builder::new().name("reader".to_owned()).spawn(move || read_loop(file, pace, &theirs, show))?;
        Ok(Self { path: path.to_owned(), seen, thread: Some(thread) })
    }

    /// The number of bytes so far.
    pub fn count(&self) -> u64 {
        self.lock().count
    }

    /// Whether the last writer has closed it.
    pub fn ended(&self) -> bool {
        self.lock().ended
    }

    /// The bytes so far, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    /// Waits for the end, and returns everything.
    pub async fn to_end(&self) -> Result<String> {
        self.to_end_within(SOON).await
    }

    /// Like [`Self::to_end`], with a deadline.
    pub async fn to_end_within(&self, deadline: Duration) -> Result<String> {
        eventually(format!("end of {}", self.path.display()), deadline, async || {
            let seen = self.lock();
            ensure!(seen.ended, "{} bytes, still open, the last of them {:?}", seen.count, tail(&seen.bytes));
            Ok(())
        })
        .await?;
        Ok(self.text())
    }

    /// Waits until the text contains `wanted`, and returns it.
    pub async fn until(&self, wanted: &str) -> Result<String> {
        eventually(format!("{wanted:?} in {}", self.path.display()), SOON, async || {
            let text = self.text();
            ensure!(text.contains(wanted), "{:?}", tail(text.as_bytes()));
            Ok(text)
        })
        .await
    }

    /// Lets a reader that waits for its cue read.
    pub fn proceed(&self) {
        self.lock().proceed = true;
    }

    /// Stops reading and closes the fifo.
    pub fn leave(&mut self) {
        self.lock().leave = true;
        if let Some(thread) = self.thread.take() {
            let _its_panic_is_its_own = thread.join();
        }
    }

    /// Opens the fifo again, as a restarted daemon does.
    pub fn again(&self, pace: Pace) -> Result<Self> {
        Self::open(&self.path, pace)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().expect("no panic under this lock")
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.leave();
    }
}

fn tail(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(200)..]).into_owned()
}

fn read_loop(mut file: File, pace: Pace, seen: &Mutex<Seen>, mut show: impl FnMut(&[u8])) {
    let size = match pace {
        Pace::Slow { chunk, .. } => chunk,
        Pace::Keep | Pace::Count | Pace::Pausing(_) | Pace::OnCue => 1 << 16,
    };
    if let Pace::Pausing(pause) = pace {
        thread::sleep(pause); // the pause is under test
    }
    let mut buffer = vec![0; size];
    loop {
        let (leave, proceed) = {
            let seen = seen.lock().expect("no panic under this lock");
            (seen.leave, seen.proceed)
        };
        if leave {
            return;
        }
        if matches!(pace, Pace::OnCue) && !proceed {
            thread::sleep(Duration::from_millis(5)); // how often it looks for its cue
            continue;
        }
        // a fifo that no process has opened for writing yet reads as ended, but polls as quiet
        let mut wanted = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
        if poll(&mut wanted, 50u16).is_ok_and(|ready| ready == 0) {
            continue;
        }
        match file.read(&mut buffer) {
            Ok(0) => {
                seen.lock().expect("no panic under this lock").ended = true;
                return;
            }
            Ok(read) => {
                show(&buffer[..read]);
                let mut seen = seen.lock().expect("no panic under this lock");
                seen.count += read as u64;
                if matches!(pace, Pace::Keep | Pace::OnCue) {
                    seen.bytes.extend_from_slice(&buffer[..read]);
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_broken) => return,
        }
        if let Pace::Slow { pause, .. } = pace {
            thread::sleep(pause); // the slowness is under test
        }
    }
}

/// The writing end of a fifo.
#[derive(Debug)]
pub struct Writer(File);

impl Writer {
    /// Opens the fifo, once it has a reader.
    pub async fn open(path: &Path) -> Result<Self> {
        eventually(format!("a reader of {}", path.display()), SOON, async || {
            Ok(Self(open_nonblocking(path, OpenOptions::new().write(true))?))
        })
        .await
    }

    /// Opens the fifo, with or without a reader.
    pub fn open_early(path: &Path) -> Result<Self> {
        let file = open_nonblocking(path, OpenOptions::new().read(true).write(true));
        file.map(Self).with_context(|| format!("open {} for writing", path.display()))
    }

    /// Writes everything; waits while the fifo is full.
    pub fn write_all(&mut self, mut bytes: &[u8]) -> Result<()> {
        let begin = Instant::now();
        while !bytes.is_empty() {
            match self.0.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if begin.elapsed() > SOON {
                        bail!("there is no reader: {} bytes are left", bytes.len());
                    }
                    let mut wanted = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
                    poll(&mut wanted, 50u16)?;
                }
                Err(error) => return Err(error).context("write to fifo"),
            }
        }
        Ok(())
    }
}
