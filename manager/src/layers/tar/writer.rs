//! Writing an archive: POSIX headers, with PAX records where those have no room.

use std::io::{self, Write};

use super::{BLOCK, Entry, Kind, Time};

/// An archive that is being written.
#[derive(Debug)]
pub(crate) struct Writer<W> {
    sink: W,
    /// Of the current entry: bytes of data that have not been written.
    left: u64,
    padding: usize,
}

impl<W: Write> Writer<W> {
    pub(crate) fn new(sink: W) -> Self {
        Self { sink, left: 0, padding: 0 }
    }

    /// Begins an entry, whose data follows if it is a file.
    pub(crate) fn begin(&mut self, entry: &Entry) -> io::Result<()> {
        self.end()?;
        let mut records = Vec::new();
        let (flag, link, size, device) = match &entry.kind {
            Kind::File { size } => (b'0', &[][..], *size, (0, 0)),
            Kind::HardLink { target } => (b'1', &target[..], 0, (0, 0)),
            Kind::Symlink { target } => (b'2', &target[..], 0, (0, 0)),
            Kind::Char { major, minor } => (b'3', &[][..], 0, (*major, *minor)),
            Kind::Block { major, minor } => (b'4', &[][..], 0, (*major, *minor)),
            Kind::Folder => (b'5', &[][..], 0, (0, 0)),
            Kind::Fifo => (b'6', &[][..], 0, (0, 0)),
        };
        let mut block = [0; BLOCK];
        let mut named = |field: &mut [u8], key: &str, value: &[u8]| {
            let fits = value.len().min(field.len());
            field[..fits].copy_from_slice(&value[..fits]);
            if value.len() > field.len() {
                record(&mut records, key.as_bytes(), value);
            }
        };
        named(&mut block[..100], "path", &entry.path);
        named(&mut block[157..257], "linkpath", link);
        let mut counted = |field: &mut [u8], key: &str, value: u64| {
            let digits = field.len() - 1;
            let fits = value < 1 << (3 * digits);
            let text = format!("{:0digits$o}", if fits { value } else { 0 });
            field[..digits].copy_from_slice(text.as_bytes());
            if !fits {
                record(&mut records, key.as_bytes(), value.to_string().as_bytes());
            }
        };
        counted(&mut block[100..108], "mode", u64::from(entry.mode & 0o7777));
        counted(&mut block[108..116], "uid", u64::from(entry.uid));
        counted(&mut block[116..124], "gid", u64::from(entry.gid));
        counted(&mut block[124..136], "size", size);
        let has_room = (0..1 << 33).contains(&entry.mtime.seconds) && entry.mtime.nanos == 0;
        counted(&mut block[136..148], "mtime", if has_room { entry.mtime.seconds.cast_unsigned() } else { 0 });
        counted(&mut block[329..337], "devmajor", u64::from(device.0));
        counted(&mut block[337..345], "devminor", u64::from(device.1));
        if !has_room {
            record(&mut records, b"mtime", decimal(entry.mtime).as_bytes());
        }
        for (name, value) in &entry.xattrs {
            record(&mut records, &[b"SCHILY.xattr.", &name[..]].concat(), value);
        }
        if !records.is_empty() {
            let mut extended = [0; BLOCK];
            extended[..10].copy_from_slice(b"PaxHeaders");
            extended[100..107].copy_from_slice(b"0000644");
            for field in [108..115, 116..123] {
                extended[field].fill(b'0');
            }
            extended[124..135].copy_from_slice(format!("{:011o}", records.len()).as_bytes());
            extended[136..147].fill(b'0');
            self.header(extended, b'x')?;
            self.sink.write_all(&records)?;
            self.pad(records.len() as u64)?;
        }
        self.header(block, flag)?;
        self.left = size;
        self.padding = padding(size);
        Ok(())
    }

    /// More of the current entry's data.
    pub(crate) fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        let longer = || io::Error::other("a file grew while it was read");
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or_else(longer)?;
        self.sink.write_all(bytes)
    }

    /// Writes the end of the archive.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.end()?;
        self.sink.write_all(&[0; 2 * BLOCK])?;
        Ok(self.sink)
    }

    fn end(&mut self) -> io::Result<()> {
        if self.left > 0 {
            return Err(io::Error::other("a file shrank while it was read"));
        }
        let padding = std::mem::take(&mut self.padding);
        self.sink.write_all(&[0; BLOCK][..padding])
    }

    fn pad(&mut self, written: u64) -> io::Result<()> {
        self.sink.write_all(&[0; BLOCK][..padding(written)])
    }

    fn header(&mut self, mut block: [u8; BLOCK], flag: u8) -> io::Result<()> {
        block[156] = flag;
        block[257..265].copy_from_slice(b"ustar\x0000");
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.sink.write_all(&block)
    }
}

fn padding(bytes: u64) -> usize {
    usize::try_from(bytes.next_multiple_of(BLOCK as u64) - bytes).unwrap_or_default()
}

/// A time as PAX has it: the fraction counts towards the sign.
fn decimal(time: Time) -> String {
    let (sign, seconds, nanos) = if time.seconds < 0 && time.nanos > 0 {
        (if time.seconds == -1 { "-" } else { "" }, time.seconds + 1, 1_000_000_000 - time.nanos)
    } else {
        ("", time.seconds, time.nanos)
    };
    if nanos == 0 { seconds.to_string() } else { format!("{sign}{seconds}.{nanos:09}") }
}

/// Adds a record, whose length counts its own digits.
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(length.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}
