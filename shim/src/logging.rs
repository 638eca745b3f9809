//! The shim's own log: lines as containerd writes them, to the fifo `log` of the bundle.
//!
//! ```text
//! time="2026-01-02T03:04:05.000000006Z" level=info msg="process exited" container=c1 pid=7 status=0
//! ```
//!
//! **Invariant:** logging never blocks, never fails and takes no memory but one line's. Lines that are not read in time are dropped and
//! counted, and the next written line gives the count.
use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use log::kv::{Key, Value, VisitSource};
use log::{Level, LevelFilter, Log, Metadata, Record};

/// Makes every `log` macro write to the fifo `log` in `bundle`, or to stderr without one. The first call counts.
///
/// The fifo may appear later, be replaced, or go away with its bundle.
pub(crate) fn install(bundle: Option<&Path>, level: LevelFilter) {
    log::set_max_level(level);
    if log::set_logger(&SUBSCRIBER).is_ok() {
        SUBSCRIBER.lock().target = match bundle {
            Some(bundle) => Target::Fifo { path: bundle.join("log"), file: None },
            None => Target::Stderr,
        };
    }
}

/// The one global: the `log` crate asks for it.
static SUBSCRIBER: Subscriber = Subscriber(Mutex::new(Sink::new(Target::Stderr)));

struct Subscriber(Mutex<Sink>);

impl Subscriber {
    fn lock(&self) -> std::sync::MutexGuard<'_, Sink> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Log for Subscriber {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            self.lock().write(record, now);
        }
    }

    fn flush(&self) {}
}

enum Target {
    Stderr,
    Fifo { path: PathBuf, file: Option<File> },
}

struct Sink {
    target: Target,
    /// Lines lost since the last written one.
    dropped: u64,
    line: Line,
}

impl Sink {
    const fn new(target: Target) -> Self {
        Self { target, dropped: 0, line: Line { bytes: [0; LINE_BYTES], length: 0, is_cut: false } }
    }

    fn write(&mut self, record: &Record<'_>, now: Duration) {
        self.line.fill(record, now, self.dropped);
        let bytes = &self.line.bytes[..self.line.length];
        let written = match &mut self.target {
            Target::Stderr => io::stderr().write_all(bytes),
            Target::Fifo { path, file } => write_to_fifo(path, file, bytes),
        };
        self.dropped = if written.is_ok() { 0 } else { self.dropped + 1 };
    }
}

/// Writes a whole line or nothing: one of [`LINE_BYTES`] at most is atomic in a pipe.
fn write_to_fifo(path: &Path, file: &mut Option<File>, line: &[u8]) -> io::Result<()> {
    // An unlinked fifo will not be read; the daemon may have created another one.
    if !file.as_ref().is_some_and(|file| file.metadata().is_ok_and(|about| about.nlink() > 0)) {
        *file = None;
    }
    let mut fifo: &File = match file {
        Some(file) => file,
        None => file.insert(open_fifo(path)?),
    };
    fifo.write(line).map(drop)
}

/// Opens for reading too, so that neither this nor a write depends on a reader, and written lines wait for one.
fn open_fifo(path: &Path) -> io::Result<File> {
    let flags = nix::libc::O_NONBLOCK | nix::libc::O_NOFOLLOW | nix::libc::O_CLOEXEC;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
    if file.metadata()?.file_type().is_fifo() { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// A line under construction. Fields that do not fit are left out, and marked as cut.
struct Line {
    bytes: [u8; LINE_BYTES],
    length: usize,
    is_cut: bool,
}

impl Line {
    fn fill(&mut self, record: &Record<'_>, now: Duration, dropped: u64) {
        (self.length, self.is_cut) = (0, false);
        self.push("time=\"");
        self.timestamp(now);
        self.push("\" level=");
        self.push(match record.level() {
            Level::Error => "error",
            Level::Warn => "warning",
            Level::Info => "info",
            Level::Debug => "debug",
            Level::Trace => "trace",
        });
        self.push(" msg=");
        self.quoted(record.args());
        // A source that fails has been visited up to the failure; the line is still useful.
        let _ = record.key_values().visit(self);
        if self.is_cut {
            self.push(" cut=true");
        }
        if dropped > 0 {
            let _ = write!(Raw(self), " dropped={dropped}");
        }
        self.push("\n");
    }

    /// Appends, using the reserve.
    fn push(&mut self, text: &str) {
        let end = self.length + text.len();
        if let Some(space) = self.bytes.get_mut(self.length..end) {
            space.copy_from_slice(text.as_bytes());
            self.length = end;
        } else {
            self.is_cut = true;
        }
    }

    fn has_room_for(&self, count: usize) -> bool {
        self.length + count <= LINE_BYTES - RESERVED_BYTES
    }

    fn quoted(&mut self, value: &dyn fmt::Display) {
        self.push("\"");
        let _ = write!(Escaped(self), "{value}");
        self.push("\"");
    }

    /// RFC 3339 with nanoseconds, UTC.
    fn timestamp(&mut self, now: Duration) {
        let seconds = now.as_secs();
        let (year, month, day) = date(seconds / 86_400);
        let (hour, minute, second, nanos) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60, now.subsec_nanos());
        let _ = write!(Raw(self), "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z");
    }
}

impl<'kvs> VisitSource<'kvs> for Line {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), log::kv::Error> {
        if !self.has_room_for(key.as_str().len() + 8) {
            self.is_cut = true;
            return Ok(());
        }
        self.push(" ");
        self.push(key.as_str());
        self.push("=");
        let mut check = Check { is_plain: true, length: 0 };
        let _ = write!(check, "{value}");
        if check.is_plain && check.length > 0 && self.has_room_for(check.length) {
            let _ = write!(Raw(self), "{value}");
        } else {
            self.quoted(&value);
        }
        Ok(())
    }
}

struct Raw<'a>(&'a mut Line);

impl fmt::Write for Raw<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.push(text);
        Ok(())
    }
}

/// Escapes as Go quotes, and stops where the reserve begins.
struct Escaped<'a>(&'a mut Line);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            if !self.0.has_room_for(4) {
                self.0.is_cut = true;
                return Err(fmt::Error);
            }
            match c {
                '"' => self.0.push("\\\""),
                '\\' => self.0.push("\\\\"),
                '\n' => self.0.push("\\n"),
                '\r' => self.0.push("\\r"),
                '\t' => self.0.push("\\t"),
                c if c.is_ascii_control() => write!(Raw(self.0), "\\x{:02x}", u32::from(c))?,
                c => self.0.push(c.encode_utf8(&mut [0; 4])),
            }
        }
        Ok(())
    }
}

/// Detects whether a value needs quotes.
struct Check {
    is_plain: bool,
    length: usize,
}

impl fmt::Write for Check {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.length += text.len();
        self.is_plain &= text.chars().all(|c| c.is_ascii_alphanumeric() || "-._/@^+".contains(c));
        Ok(())
    }
}

/// Year, month and day of a day counted from 1970-01-01 (the proleptic Gregorian calendar, years that begin in March).
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

/// The longest line: PIPE_BUF, up to which a write to a pipe is all or nothing.
const LINE_BYTES: usize = 4096;
/// Kept free for the end of a line: `" cut=true dropped=…` and a line feed.
const RESERVED_BYTES: usize = 48;

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn text(sink: &Sink) -> String {
        String::from_utf8(sink.line.bytes[..sink.line.length].to_vec()).expect("text")
    }

    fn record<'a>(args: fmt::Arguments<'a>, pairs: &'a [(&'a str, &'a str)]) -> String {
        let mut sink = Sink::new(Target::Fifo { path: "/nonexistent/log".into(), file: None });
        sink.write(&Record::builder().args(args).level(Level::Warn).key_values(&pairs).build(), Duration::new(1_767_323_045, 6));
        text(&sink)
    }

    #[test]
    fn a_line_looks_like_containerds() {
        assert_eq!(
            record(
                format_args!("cannot \"publish\"\n{}", 1),
                &[("container", "c1"), ("error", "no such file"), ("empty", ""), ("bell", "\u{7}ä")]
            ),
            "time=\"2026-01-02T03:04:05.000000006Z\" level=warning msg=\"cannot \\\"publish\\\"\\n1\" container=c1 error=\"no such file\" empty=\"\" bell=\"\\x07ä\"\n"
        );
    }

    #[test]
    fn days_become_dates() {
        for (days, expected) in
            [(0, (1970, 1, 1)), (59, (1970, 3, 1)), (11_016, (2000, 2, 29)), (19_722, (2023, 12, 31)), (20_512, (2026, 2, 28))]
        {
            assert_eq!(date(days), expected);
        }
    }

    #[test]
    fn a_line_of_any_length_is_one_line_that_fits() {
        for count in [3900, 4000, 4096, 100_000] {
            let long = "é\n".repeat(count);
            let line = record(format_args!("{long}"), &[("container", "c1")]);
            assert!(line.len() <= LINE_BYTES && line.ends_with("\" cut=true\n") && line.matches('\n').count() == 1, "{line}");
            let line = record(format_args!("short"), &[("error", &long), ("container", "c1")]);
            assert!(line.len() <= LINE_BYTES && line.ends_with("\" cut=true\n"), "{line}");
        }
    }

    #[test]
    fn a_missing_reader_never_blocks_and_dropped_bytes_are_reported() {
        let folder = scratch::Folder::new("logging");
        let path = folder.join("log");
        let mut sink = Sink::new(Target::Fifo { path: path.clone(), file: None });
        let mut write = |message: &str| {
            sink.write(&Record::builder().args(format_args!("{message}")).level(Level::Info).build(), Duration::ZERO);
            sink.dropped
        };
        assert_eq!(write("before there is a fifo"), 1);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
        assert_eq!(write("there it is"), 0);
        let mut reader = open_fifo(&path).expect("a reader");
        let mut buffer = vec![0; 1 << 20];
        let count = reader.read(&mut buffer).expect("a line");
        assert!(buffer[..count].ends_with(b"msg=\"there it is\" dropped=1\n"));
        let long = "x".repeat(3000);
        let dropped = (0..1000).map(|_| write(&long)).max().expect("some");
        assert!(dropped > 900, "{dropped}");
        let mut whole = Vec::new();
        while let Ok(count) = reader.read(&mut buffer) {
            whole.extend_from_slice(&buffer[..count]);
        }
        assert!(whole.split_inclusive(|byte| *byte == b'\n').all(|line| line.len() > 3000 && line.ends_with(b"\"\n")));
        assert_eq!(write("again"), 0);
        let count = reader.read(&mut buffer).expect("a line");
        assert!(buffer[..count].ends_with(format!("msg=\"again\" dropped={dropped}\n").as_bytes()));
        std::fs::remove_file(&path).expect("removal");
        assert_eq!(write("lost with its bundle"), 1);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
        assert_eq!(write("found"), 0);
        std::fs::remove_file(&path).expect("removal");
        std::fs::write(&path, "").expect("a file");
        assert_eq!(write("not a fifo"), 1);
    }
}
