//! The protocol between the two processes: lines, each with a deadline.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};

/// One end of the connection.
#[derive(Debug)]
pub(super) struct Channel {
    socket: BufReader<tokio::net::UnixStream>,
}

/// Why no message was received.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProtocolError {
    /// It has closed its end.
    #[error("it exited without a message")]
    Ended,
    /// The deadline has passed.
    #[error("it sent nothing for {0:?}")]
    Late(Duration),
    /// The message is not one that is expected here.
    #[error("it sent the unexpected message {0:?}")]
    Unexpected(String),
    /// The socket fails.
    #[error(transparent)]
    Io(io::Error),
}

impl From<io::Error> for ProtocolError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // it exited before it read the last message
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Ended,
            _ => Self::Io(error),
        }
    }
}

impl Channel {
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket: BufReader::new(tokio::net::UnixStream::from_std(socket)?) })
    }

    pub(super) async fn send(&mut self, message: &str) -> io::Result<()> {
        self.socket.get_mut().write_all(format!("{message}\n").as_bytes()).await
    }

    /// The next line, without its end.
    pub(super) async fn receive(&mut self, limit: Duration) -> Result<String, ProtocolError> {
        let mut line = Vec::new();
        let mut bounded = (&mut self.socket).take(LINE_BYTES);
        let read = tokio::time::timeout(limit, bounded.read_until(b'\n', &mut line)).await;
        read.map_err(|_| ProtocolError::Late(limit))??;
        match (line.pop(), String::from_utf8_lossy(&line)) {
            (None, _) => Err(ProtocolError::Ended),
            (Some(b'\n'), text) => Ok(text.into_owned()),
            (Some(_), text) => Err(ProtocolError::Unexpected(text.chars().take(200).collect())),
        }
    }
}

/// The longest line: all filters of one subscriber.
const LINE_BYTES: u64 = 16 << 20;
