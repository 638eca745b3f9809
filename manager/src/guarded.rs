//! A socket that keeps something for as long as it is open.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;

/// Drops `G` together with the connection: for libraries that do not report when a connection ends.
#[derive(Debug)]
pub(crate) struct Guarded<G> {
    socket: UnixStream,
    _guard: G,
}

impl<G> Guarded<G> {
    /// Puts them together.
    pub(crate) fn new(socket: UnixStream, guard: G) -> Self {
        Self { socket, _guard: guard }
    }
}

impl<G: Unpin> AsyncRead for Guarded<G> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buffer)
    }
}

impl<G: Unpin> AsyncWrite for Guarded<G> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
