//! The encoding of criu's messages: protocol buffers, of which these few functions are all that is needed.
//!
//! **Invariant:** any bytes can be read; what is malformed ends the reading.

/// A message under construction.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Message(Vec<u8>);

/// The value of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value<'a> {
    Number(u64),
    /// A text, bytes, or a message.
    Bytes(&'a [u8]),
    /// Of a fixed width: in none of the fields that are read.
    Other,
}

impl Message {
    pub(super) fn number(&mut self, field: u32, value: u64) -> &mut Self {
        self.varint(u64::from(field) << 3);
        self.varint(value);
        self
    }

    /// A flag; false is what an absent one means.
    pub(super) fn flag(&mut self, field: u32, value: bool) -> &mut Self {
        if value { self.number(field, 1) } else { self }
    }

    pub(super) fn text(&mut self, field: u32, value: &str) -> &mut Self {
        self.bytes(field, value.as_bytes())
    }

    pub(super) fn message(&mut self, field: u32, value: &Self) -> &mut Self {
        self.bytes(field, &value.0)
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    fn bytes(&mut self, field: u32, value: &[u8]) -> &mut Self {
        self.varint(u64::from(field) << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
        self
    }

    fn varint(&mut self, mut value: u64) {
        while value > 0x7f {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

/// The fields of a message, in order.
pub(super) fn fields(bytes: &[u8]) -> impl Iterator<Item = (u32, Value<'_>)> {
    let mut rest = bytes;
    std::iter::from_fn(move || next(&mut rest))
}

fn next<'a>(rest: &mut &'a [u8]) -> Option<(u32, Value<'a>)> {
    let tag = varint(rest)?;
    let value = match tag & 7 {
        0 => Value::Number(varint(rest)?),
        1 => take(rest, 8).map(|_| Value::Other)?,
        2 => {
            let length = usize::try_from(varint(rest)?).ok()?;
            Value::Bytes(take(rest, length)?)
        }
        5 => take(rest, 4).map(|_| Value::Other)?,
        _ => return None,
    };
    Some((u32::try_from(tag >> 3).ok()?, value))
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(length)?;
    *rest = left;
    Some(taken)
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (first, left) = rest.split_first()?;
        *rest = left;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut inner = Message::default();
        inner.text(1, "pipe:[7]").number(2, 300);
        let mut message = Message::default();
        message.number(1, 2).flag(3, false).flag(4, true).message(27, &inner).number(38, u64::from(u32::MAX));
        let read: Vec<_> = fields(message.as_bytes()).collect();
        assert_eq!(read.len(), 4);
        assert_eq!((read[0], read[1], read[3]), ((1, Value::Number(2)), (4, Value::Number(1)), (38, Value::Number(u64::from(u32::MAX)))));
        let (27, Value::Bytes(inner)) = read[2] else { panic!("{read:?}") };
        assert_eq!(fields(inner).collect::<Vec<_>>(), [(1, Value::Bytes(b"pipe:[7]")), (2, Value::Number(300))]);
    }

    #[test]
    fn a_message_has_the_bytes_of_protocol_buffers() {
        let mut message = Message::default();
        message.number(1, 150).text(2, "testing");
        assert_eq!(message.as_bytes(), [8, 0x96, 1, 0x12, 7, b't', b'e', b's', b't', b'i', b'n', b'g']);
    }

    #[test]
    fn malformed_messages_end_where_they_are_malformed() {
        for bytes in [&[0xff; 12][..], &[8], &[0x12, 200, b'x'], &[0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f], &[0x0b]] {
            assert_eq!(fields(bytes).count(), 0, "{bytes:?}");
        }
        assert_eq!(fields(&[8, 1, 0x12]).collect::<Vec<_>>(), [(1, Value::Number(1))]);
        assert_eq!(
            fields(&[0x0d, 1, 2, 3, 4, 0x09, 1, 2, 3, 4, 5, 6, 7, 8]).map(|(_, value)| value).collect::<Vec<_>>(),
            [Value::Other; 2]
        );
    }
}
