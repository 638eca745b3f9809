//! The daemon's own log: lines as containerd writes them, to stderr.
//!
//! ```text
//! time="2026-01-02T03:04:05.000000006Z" level=info msg="process exited" container=c1 pid=7 status=0
//! ```

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::SystemTime;

use log::kv::{Key, Value, VisitSource};
use log::{Level, LevelFilter, Log, Metadata, Record};
use prost_types::Timestamp;

/// Makes every `log` macro write to stderr. The first call counts.
pub(crate) fn install(level: LevelFilter) {
    if log::set_logger(&Subscriber).is_ok() {
        log::set_max_level(level);
    }
}

struct Subscriber;

impl Log for Subscriber {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // libraries log about bytes; their callers log what it means
        metadata.target().starts_with("x_manager") || log::max_level() == LevelFilter::Trace
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // a failed write to stderr cannot be reported
            let _ = std::io::stderr().write_all(line(record, SystemTime::now()).as_bytes());
        }
    }

    fn flush(&self) {}
}

fn line(record: &Record<'_>, now: SystemTime) -> String {
    let level = match record.level() {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    let mut line = Line(format!("time=\"{}\" level={level} msg={:?}", Timestamp::from(now), record.args().to_string()));
    // a source that fails has been visited as far as it goes; the line is still worth having
    let _ = record.key_values().visit(&mut line);
    line.0.push('\n');
    line.0
}

struct Line(String);

impl<'kvs> VisitSource<'kvs> for Line {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), log::kv::Error> {
        let value = value.to_string();
        let plain = !value.is_empty() && value.chars().all(|c| c.is_ascii_alphanumeric() || "-._/@^+".contains(c));
        // writing to a string does not fail
        let _ = if plain { write!(self.0, " {key}={value}") } else { write!(self.0, " {key}={value:?}") };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_line_looks_like_containerds() {
        let pairs = [("container", "c1"), ("error", "no such file")];
        let record = Record::builder().args(format_args!("cannot \"start\"\n")).level(Level::Warn).key_values(&pairs).build();
        assert_eq!(
            line(&record, SystemTime::UNIX_EPOCH + Duration::new(1_767_323_045, 6)),
            "time=\"2026-01-02T03:04:05.000000006Z\" level=warning msg=\"cannot \\\"start\\\"\\n\" container=c1 error=\"no such file\"\n"
        );
    }
}
