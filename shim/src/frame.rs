//! Frames of ttrpc, and the fields of a request that the relay needs.
//!
//! Owns the 10-byte header and the few fields of `Request` and `Response` that the keeper reads. It knows no protobuf beyond
//! "a field has a number and a length", and never looks into a payload.
//!
//! Source: ttrpc's PROTOCOL.md and `request.proto` (service = 1, method = 2, payload = 3, timeout_nano = 4), `Response` (status = 1,
//! payload = 2), `Status` (code = 1, message = 2).

use std::time::Duration;

/// Length of a frame's header, in bytes.
pub(crate) const HEADER_BYTES: usize = 10;
/// The longest payload that ttrpc allows, in bytes.
pub(crate) const MAX_PAYLOAD_BYTES: usize = 4 << 20;

/// Frame type of a request.
pub(crate) const REQUEST: u8 = 1;
/// Frame type of a response.
pub(crate) const RESPONSE: u8 = 2;

/// Status codes of the keeper's own answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    InvalidArgument = 3,
    NotFound = 5,
    ResourceExhausted = 8,
    Internal = 13,
}

/// A frame's header: 4 bytes of length, 4 of stream id, both big-endian, type, flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) payload_bytes: u32,
    pub(crate) stream: u32,
    pub(crate) kind: u8,
    pub(crate) flags: u8,
}

impl Header {
    /// Decodes a header, if it is complete.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let (head, _) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let [a, b, c, d, e, f, g, h, kind, flags] = *head;
        Some(Self { payload_bytes: u32::from_be_bytes([a, b, c, d]), stream: u32::from_be_bytes([e, f, g, h]), kind, flags })
    }
}

/// The first frame in `input`, once it has arrived whole.
///
/// Errors: the header of one whose payload is longer than [`MAX_PAYLOAD_BYTES`].
pub(crate) fn first(input: &[u8]) -> Result<Option<(Header, &[u8])>, Header> {
    let Some(header) = Header::parse(input) else { return Ok(None) };
    let length = header.payload_bytes as usize;
    if length > MAX_PAYLOAD_BYTES {
        return Err(header);
    }
    Ok(input.get(HEADER_BYTES..HEADER_BYTES + length).map(|payload| (header, payload)))
}

/// Puts a header before a payload.
pub(crate) fn encode(stream: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER_BYTES + payload.len());
    frame.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(&[kind, 0]);
    frame.extend_from_slice(payload);
    frame
}

/// The fields of a request, still encoded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct RequestView<'a> {
    pub(crate) service: &'a [u8],
    pub(crate) method: &'a [u8],
    pub(crate) payload: &'a [u8],
    /// How long after sending it its client waits, if that has an end.
    pub(crate) timeout: Option<Duration>,
}

impl<'a> RequestView<'a> {
    /// Finds the fields of a `Request`; `None` if it is not well-formed.
    pub(crate) fn parse(message: &'a [u8]) -> Option<Self> {
        let mut view = Self::default();
        for field in Fields(message) {
            match field? {
                (1, Value::Bytes(bytes)) => view.service = bytes,
                (2, Value::Bytes(bytes)) => view.method = bytes,
                (3, Value::Bytes(bytes)) => view.payload = bytes,
                // an int64 of which what is not positive stands for none
                (4, Value::Number(nanos)) => view.timeout = Some(Duration::from_nanos(nanos)).filter(|_| nanos.cast_signed() > 0),
                _ => {}
            }
        }
        Some(view)
    }
}

/// The status code of a `Response`, 0 for OK; `None` if it is not well-formed.
pub(crate) fn response_code(message: &[u8]) -> Option<u64> {
    let mut code = 0;
    for field in Fields(message) {
        if let (1, Value::Bytes(status)) = field? {
            for field in Fields(status) {
                if let (1, Value::Number(number)) = field? {
                    code = number;
                }
            }
        }
    }
    Some(code)
}

/// Encodes a `Response` with an error alone.
pub(crate) fn error_response(code: Code, message: &str) -> Vec<u8> {
    let mut status = vec![0x08, code as u8, 0x12];
    write_varint(&mut status, message.len() as u64);
    status.extend_from_slice(message.as_bytes());
    let mut response = vec![0x0a];
    write_varint(&mut response, status.len() as u64);
    response.extend_from_slice(&status);
    response
}

fn write_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Other,
}

/// The fields of a protobuf message, in order. Yields `None` once, and ends, where the bytes are not well-formed.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    fn field(&mut self) -> Option<(u64, Value<'a>)> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Number(self.varint()?),
            1 => self.take(8).map(|_| Value::Other)?,
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Value::Bytes(self.take(length)?)
            }
            5 => self.take(4).map(|_| Value::Other)?,
            _ => return None,
        };
        Some((tag >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u64, Value<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}
