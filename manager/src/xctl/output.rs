//! What is printed: tables for people, JSON for programs, times and sizes.

use std::io::{self, Write as _};

use serde::Serialize;

use crate::error::{IoContext as _, Result};

/// How lists are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Format {
    /// Columns, with a heading
    #[default]
    Table,
    /// One JSON value
    Json,
}

/// A list with the heading of its columns.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With this heading.
    pub(crate) fn new(heading: &[&str]) -> Self {
        Self { rows: vec![heading.iter().map(|word| (*word).to_owned()).collect()] }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells.iter().map(|cell| printable(cell)).collect());
    }

    fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width =
            |column| self.rows.iter().filter_map(|row| row.get(column)).map(|cell: &String| cell.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let line: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            text.push_str(line.join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

/// Prints a list as it was asked for.
pub(crate) fn print_list<T: Serialize>(format: Format, items: &[T], table: impl FnOnce(&[T]) -> Table) -> Result<()> {
    match format {
        Format::Table => print(&table(items).text()),
        Format::Json => print_json(&items),
    }
}

/// Prints a value as JSON.
pub(crate) fn print_json<T: Serialize + ?Sized>(value: &T) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(io::Error::from).on("write", "standard output")?;
    print(&format!("{text}\n"))
}

/// Prints text; nothing more is wanted when a reader like `head` is gone.
pub(crate) fn print(text: &str) -> Result<()> {
    print_bytes(text.as_bytes())
}

/// The same, with bytes of a container.
pub(crate) fn print_bytes(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.on("write", "standard output"),
    }
}

/// Text from outside, which must not command the terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// The first `most` characters.
pub(crate) fn shorten(text: &str, most: usize) -> String {
    if text.chars().count() <= most { text.to_owned() } else { text.chars().take(most.saturating_sub(1)).chain(['…']).collect() }
}

/// A number of bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = (bytes.max(1).ilog2() / 10) as usize;
    if unit == 0 {
        return format!("{bytes} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "one digit is shown")]
    let value = bytes as f64 / f64::from(10 * unit as u32).exp2();
    format!("{value:.1} {}", units[unit])
}

/// A time in UTC, as RFC 3339 writes it; nanoseconds only where there are any.
pub(crate) fn time(seconds: u64, nanos: u32) -> String {
    let days = i64::try_from(seconds / 86_400).unwrap_or(0);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    // days since 0000-03-01, in eras of 400 years: the civil calendar
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let fraction = if nanos == 0 { String::new() } else { format!(".{nanos:09}") };
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
}

/// A time of the daemon's; none before 1970, as Go writes a time that is not set.
pub(crate) fn timestamp(timestamp: Option<&prost_types::Timestamp>) -> Option<String> {
    let timestamp = timestamp?;
    let seconds = u64::try_from(timestamp.seconds).ok().filter(|seconds| *seconds > 0)?;
    Some(time(seconds, u32::try_from(timestamp.nanos).unwrap_or(0)))
}

/// How long ago a time of the daemon's is.
pub(crate) fn age(timestamp: Option<&prost_types::Timestamp>) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    let Some(then) = timestamp.and_then(|timestamp| u64::try_from(timestamp.seconds).ok()).filter(|then| *then > 0) else {
        return String::new();
    };
    let seconds = now.saturating_sub(then);
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_control_characters_are_not_printed() {
        let mut table = Table::new(&["A", "LONG"]);
        table.row(vec!["x\u{1b}[31my".to_owned(), "1".to_owned()]);
        assert_eq!(table.text(), "A        LONG\nx?[31my  1\n");
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(time(seconds, 0), text);
        }
        assert_eq!(time(1, 5), "1970-01-01T00:00:01.000000005Z");
    }

    #[test]
    fn sizes_have_units() {
        for (bytes, text) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (u64::MAX, "16.0 EiB")] {
            assert_eq!(size(bytes), text);
        }
        assert_eq!(shorten("abcdef", 4), "abc…");
    }
}
