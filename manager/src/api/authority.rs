//! Clients of gRPC's C core (Python, Ruby, C++, …) and some others call a unix socket's path the authority of their requests, with `%2F` for
//! each slash. The `http` crate takes no `%` there, and the `h2` crate resets such a request before any handler sees it. No service
//! looks at the authority, so every `%` in one is made a `-` as the bytes come in.
//!
//! ```text
//! socket ─▶ preface, 24 bytes ─▶ frame header ─▶ HEADERS, CONTINUATION: fields one after the other ─▶ hyper
//!                                     ▲────────── any other frame: passed over ◀─┘
//! ```
//! A field's length can be read without knowing the table that its names and values are looked up in (RFC 7541, section 6), so that this
//! needs no decoder. A value in Huffman's code is left alone: those clients send it plain.
//!
//! **Invariant:** no byte is held back, added or removed; what cannot be understood is passed on, for `h2` to refuse.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A connection whose incoming authorities have no `%`.
#[derive(Debug)]
pub(super) struct Mended<S> {
    socket: S,
    frames: Frames,
}

impl<S> Mended<S> {
    /// One at its very beginning.
    pub(super) fn new(socket: S) -> Self {
        Self { socket, frames: Frames::default() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Mended<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buffer))?;
        self.frames.mend(&mut buffer.filled_mut()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Mended<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    // so that the head of a frame and its data are written by one system call
    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// Where in the frames of a connection its bytes are.
#[derive(Debug)]
struct Frames {
    /// Bytes that are of no interest.
    skip: usize,
    header: [u8; HEADER_BYTES],
    /// How much of the header is known.
    known: usize,
    /// Bytes before the fields of HEADERS; the first is the length of the padding if it is padded.
    before: usize,
    is_padded: bool,
    /// Bytes of fields.
    left: usize,
    /// Bytes after them.
    padding: usize,
    fields: Fields,
}

impl Default for Frames {
    fn default() -> Self {
        let fields = Fields::default();
        Self { skip: PREFACE_BYTES, header: [0; HEADER_BYTES], known: 0, before: 0, is_padded: false, left: 0, padding: 0, fields }
    }
}

impl Frames {
    fn mend(&mut self, mut bytes: &mut [u8]) {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &mut bytes[skipped..];
            let Some((byte, rest)) = bytes.split_first_mut() else { return };
            self.take(byte);
            bytes = rest;
        }
    }

    fn take(&mut self, byte: &mut u8) {
        if self.before > 0 {
            self.before -= 1;
            if std::mem::take(&mut self.is_padded) {
                self.padding = usize::from(*byte).min(self.left);
                self.left -= self.padding;
            }
        } else if self.left > 0 {
            self.left -= 1;
            self.fields.mend(byte);
        } else {
            self.header[self.known] = *byte;
            self.known += 1;
            if self.known == HEADER_BYTES {
                self.known = 0;
                self.begin();
            }
            return;
        }
        if self.before == 0 && self.left == 0 {
            self.skip = std::mem::take(&mut self.padding);
        }
    }

    fn begin(&mut self) {
        let [a, b, c, kind, flags, ..] = self.header;
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        match kind {
            HEADERS => {
                self.fields = Fields::default();
                self.is_padded = flags & PADDED != 0;
                self.before = usize::from(self.is_padded) + if flags & PRIORITY == 0 { 0 } else { PRIORITY_BYTES };
                self.left = length.saturating_sub(self.before);
            }
            CONTINUATION => self.left = length,
            _ => self.skip = length,
        }
    }
}

/// Where in the fields of a block its bytes are.
#[derive(Debug, Default)]
struct Fields {
    at: At,
    /// Whether the field is the authority.
    is_authority: bool,
}

#[derive(Debug, Clone, Copy, Default)]
enum At {
    #[default]
    Field,
    /// In the rest of a number, after which comes a value if there is one.
    Number { has_value: bool },
    /// Before a text.
    Text(Part),
    /// In the rest of a text's length.
    Length { part: Part, is_coded: bool, length: usize, shift: u32 },
    /// In a text.
    Within { part: Part, is_coded: bool, length: usize, left: usize },
    /// In something that makes no sense.
    Lost,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Name,
    Value,
}

impl Fields {
    fn mend(&mut self, byte: &mut u8) {
        self.at = match self.at {
            At::Field => self.field(*byte),
            At::Number { .. } if *byte & 0x80 != 0 => self.at,
            At::Number { has_value } => {
                if has_value {
                    At::Text(Part::Value)
                } else {
                    At::Field
                }
            }
            At::Text(part) => {
                let (is_coded, length) = (*byte & 0x80 != 0, usize::from(*byte & 0x7f));
                if length == 0x7f { At::Length { part, is_coded, length, shift: 0 } } else { self.begin(part, is_coded, length) }
            }
            At::Length { shift: 28.., .. } | At::Lost => At::Lost,
            At::Length { part, is_coded, length, shift } => {
                let length = length + (usize::from(*byte & 0x7f) << shift);
                if *byte & 0x80 == 0 { self.begin(part, is_coded, length) } else { At::Length { part, is_coded, length, shift: shift + 7 } }
            }
            At::Within { part, is_coded, length, left } => {
                match part {
                    Part::Name => self.is_authority = self.is_authority && AUTHORITY[length - left] == *byte,
                    Part::Value if self.is_authority && !is_coded && *byte == b'%' => *byte = b'-',
                    Part::Value => {}
                }
                if left == 1 { self.end(part) } else { At::Within { part, is_coded, length, left: left - 1 } }
            }
        };
    }

    /// What a field begins with.
    fn field(&mut self, byte: u8) -> At {
        let (has_value, most) = match byte {
            0x80.. => (false, 0x7f),
            0x40.. => (true, 0x3f),
            0x20.. => (false, 0x1f),
            _ => (true, 0x0f),
        };
        let number = byte & most;
        self.is_authority = number <= 1;
        match (has_value, number) {
            (_, number) if number == most => At::Number { has_value },
            (false, _) => At::Field,
            (true, 0) => At::Text(Part::Name),
            (true, _) => At::Text(Part::Value),
        }
    }

    fn begin(&mut self, part: Part, is_coded: bool, length: usize) -> At {
        if part == Part::Name {
            self.is_authority = !is_coded && length == AUTHORITY.len();
        }
        if length == 0 { self.end(part) } else { At::Within { part, is_coded, length, left: length } }
    }

    fn end(&self, part: Part) -> At {
        match part {
            Part::Name => At::Text(Part::Value),
            Part::Value => At::Field,
        }
    }
}

/// The field, which is the first of those that have a number.
const AUTHORITY: &[u8] = b":authority";
/// The connection preface.
const PREFACE_BYTES: usize = 24;
const HEADER_BYTES: usize = 9;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const PADDED: u8 = 8;
const PRIORITY: u8 = 0x20;
const PRIORITY_BYTES: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("short");
        [&length.to_be_bytes()[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn text(text: &[u8]) -> Vec<u8> {
        let length = text.len();
        let mut all =
            if length < 127 { vec![length as u8] } else { vec![127, (length - 127) as u8 & 0x7f | 0x80, ((length - 127) >> 7) as u8] };
        all.extend(text);
        all
    }

    /// A connection's bytes, with this authority and everything that may be around it.
    fn connection(authority: &[u8]) -> Vec<u8> {
        let path = [&[0x44][..], &text(b"/a%2F")].concat();
        let by_number = [&[0x83, 0x3f, 0xe1, 0x1f, 0x41][..], &text(authority), &path, &[0xbf, 0xff, 0x01]].concat();
        let by_name =
            [&path, &[0x40][..], &text(b":authority"), &text(authority), &[0x10], &text(b"a%"), &text(b"%"), &[0x0f, 0x30], &text(b"%")]
                .concat();
        let padded = [&[3][..], &[0; 5], &by_name, b"%%%"].concat();
        let (first, rest) = by_name.split_at(20);
        [
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
            frame(4, 0, b"%%%%%%"),
            frame(HEADERS, 4, &by_number),
            frame(0, 1, b"A%2F"),
            frame(HEADERS, 4 | PADDED | PRIORITY, &padded),
            frame(HEADERS, 0, first),
            frame(CONTINUATION, 4, rest),
            frame(HEADERS, 4, &by_number),
        ]
        .concat()
    }

    #[test]
    fn the_authority_alone_is_mended_wherever_the_bytes_are_torn() {
        for authority in [b"run%2Fx.sock".to_vec(), b"%".repeat(300)] {
            let sent = connection(&authority);
            let mended = connection(&String::from_utf8_lossy(&authority).replace('%', "-").into_bytes());
            for piece in 1..sent.len() {
                let (mut frames, mut bytes) = (Frames::default(), sent.clone());
                bytes.chunks_mut(piece).for_each(|chunk| frames.mend(chunk));
                assert!(bytes == mended, "in pieces of {piece}");
            }
        }
    }

    #[test]
    fn what_makes_no_sense_is_passed_on() {
        let mut seed = 7_u64;
        for _attempt in 0..2000 {
            let mut bytes: Vec<u8> = (0..200)
                .map(|_| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (seed >> 56) as u8
                })
                .collect();
            bytes.splice(24..29, [0, 0, 150, HEADERS, bytes[28]]);
            let before = bytes.clone();
            Frames::default().mend(&mut bytes);
            assert!(bytes.iter().zip(&before).all(|(now, then)| now == then || (*then, *now) == (b'%', b'-')));
        }
    }
}
