//! The conversation of two processes: lines, each with a deadline.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};

/// One end of it.
#[derive(Debug)]
pub(super) struct Words {
    socket: BufReader<tokio::net::UnixStream>,
}

/// Why the other end says nothing more.
#[derive(Debug, thiserror::Error)]
pub(super) enum Silence {
    /// It has closed its end.
    #[error("it ended without a word")]
    Ended,
    /// The deadline has passed.
    #[error("it said nothing for {0:?}")]
    Late(Duration),
    /// It says what it should not.
    #[error("it said {0:?}")]
    Nonsense(String),
    /// The socket fails.
    #[error(transparent)]
    Io(io::Error),
}

impl From<io::Error> for Silence {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // it has not even read what it was told
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Ended,
            _ => Self::Io(error),
        }
    }
}

impl Words {
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket: BufReader::new(tokio::net::UnixStream::from_std(socket)?) })
    }

    pub(super) async fn say(&mut self, word: &str) -> io::Result<()> {
        self.socket.get_mut().write_all(format!("{word}\n").as_bytes()).await
    }

    /// The next line, without its end.
    pub(super) async fn hear(&mut self, limit: Duration) -> Result<String, Silence> {
        let mut line = Vec::new();
        let mut bounded = (&mut self.socket).take(LINE_BYTES);
        let read = tokio::time::timeout(limit, bounded.read_until(b'\n', &mut line)).await;
        read.map_err(|_| Silence::Late(limit))??;
        match (line.pop(), String::from_utf8_lossy(&line)) {
            (None, _) => Err(Silence::Ended),
            (Some(b'\n'), text) => Ok(text.into_owned()),
            (Some(_), text) => Err(Silence::Nonsense(text.chars().take(200).collect())),
        }
    }
}

/// The longest line: all filters of one subscriber.
const LINE_BYTES: u64 = 16 << 20;
