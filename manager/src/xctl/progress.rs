//! Progress of a transfer: on a terminal a line for each part, redrawn; elsewhere a line when a part is complete, and when it is unpacked.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use containerd_client::types::transfer::Progress as Event;

use crate::output;

/// What has been received or sent so far.
#[derive(Debug)]
pub(crate) struct Progress {
    parts: BTreeMap<String, Part>,
    /// In the order in which they came.
    order: Vec<String>,
    is_terminal: bool,
    drawn: usize,
    redrawn: Option<Instant>,
    begun: Instant,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    event: String,
    bytes: u64,
    total: u64,
    is_complete: bool,
    /// When this event of it came first, and with how many bytes.
    since: Instant,
    had: u64,
}

impl Part {
    /// Bytes a second, once there is something to measure.
    fn speed(&self) -> Option<u64> {
        let (bytes, millis) = (self.bytes.checked_sub(self.had)?, self.since.elapsed().as_millis());
        let speed = u128::from(bytes) * 1000 / millis.max(1);
        (bytes > 0 && millis > 100 && !self.is_complete).then(|| u64::try_from(speed).unwrap_or(u64::MAX))
    }
}

impl Progress {
    /// On standard error.
    pub(crate) fn new() -> Self {
        let is_terminal = rustix::termios::isatty(io::stderr().as_fd());
        Self { parts: BTreeMap::new(), order: Vec::new(), is_terminal, drawn: 0, redrawn: None, begun: Instant::now() }
    }

    /// Takes what the daemon reports.
    pub(crate) fn take(&mut self, event: &Event) {
        if event.name.is_empty() {
            if !self.is_terminal {
                eprintln!("{}", output::printable(&event.event));
            }
            return;
        }
        let before = self.parts.get(&event.name);
        let was_complete = before.is_some_and(|part| part.is_complete && part.event == event.event);
        if !self.parts.contains_key(&event.name) && self.order.len() < MOST_PARTS {
            self.order.push(event.name.clone());
        }
        let number = |value: i64| u64::try_from(value).unwrap_or(0);
        let (since, had) = match before.filter(|before| before.event == event.event) {
            Some(before) => (before.since, before.had),
            None => (Instant::now(), number(event.progress)),
        };
        let part = Part {
            event: event.event.clone(),
            bytes: number(event.progress),
            total: number(event.total),
            is_complete: is_complete(&event.event),
            since,
            had,
        };
        if !self.is_terminal && part.is_complete && !was_complete {
            eprintln!("{}", line(&event.name, &part));
        }
        if self.order.contains(&event.name) {
            self.parts.insert(event.name.clone(), part);
        }
        if self.redrawn.is_none_or(|then| then.elapsed() > REDRAWN) {
            self.draw();
        }
    }

    /// Shows how far it was when it failed.
    pub(crate) fn stop(mut self) {
        self.draw();
    }

    /// Shows the end, and the total.
    pub(crate) fn finish(mut self) {
        self.draw();
        // what this program sends the daemon reports once more, part by part
        let own = self.parts.values().find(|part| matches!(part.event.as_str(), "sending" | "sent"));
        let bytes: u64 = own.map_or_else(|| self.parts.values().map(|part| part.bytes).sum(), |own| own.bytes);
        let seconds = self.begun.elapsed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a speed for people")]
        let speed = (bytes as f64 / seconds.max(0.001)) as u64;
        eprintln!("{} in {seconds:.1} s, {} a second", output::size(bytes), output::size(speed));
    }

    fn draw(&mut self) {
        if !self.is_terminal {
            return;
        }
        self.redrawn = Some(Instant::now());
        let mut text = if self.drawn > 0 { format!("\x1b[{}A", self.drawn) } else { String::new() };
        for name in &self.order {
            if let Some(part) = self.parts.get(name) {
                // to the end of the line: what was there may have been longer
                text.push_str(&format!("{}\x1b[K\r\n", line(name, part)));
            }
        }
        self.drawn = self.order.len();
        // a closed terminal shows nothing
        let _ = io::stderr().write_all(text.as_bytes());
    }
}

/// The words that containerd's transfer has for a part of which nothing more comes.
fn is_complete(event: &str) -> bool {
    matches!(event, "complete" | "extracted" | "already exists" | "saved" | "sent" | "done")
}

fn line(name: &str, part: &Part) -> String {
    let name = name.rsplit_once("sha256:").map_or(name, |(_, hex)| hex.get(..12).unwrap_or(hex));
    let size = match part.total {
        0 if part.bytes == 0 => String::new(),
        0 => output::size(part.bytes),
        total if part.is_complete => output::size(total),
        total => format!("{} of {}", output::size(part.bytes), output::size(total)),
    };
    let bar = match part.total {
        0 => String::new(),
        _ if part.is_complete => "█".repeat(WIDTH),
        total => {
            let filled = usize::try_from(u128::from(part.bytes.min(total)) * WIDTH as u128 / u128::from(total)).unwrap_or(0);
            format!("{}{}", "█".repeat(filled), "·".repeat(WIDTH - filled))
        }
    };
    let speed = part.speed().map(|speed| format!(", {}/s", output::size(speed))).unwrap_or_default();
    format!("{:<40} {:<14} {bar:WIDTH$} {size}{speed}", output::shorten(&output::printable(name), 40), output::printable(&part.event))
        .trim_end()
        .to_owned()
}

/// Of a bar, in characters.
const WIDTH: usize = 20;
/// Lines; an image has fewer.
const MOST_PARTS: usize = 200;
const REDRAWN: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_has_a_bar_as_long_as_it_is_far() {
        let part = |bytes, total, event: &str| {
            let (event, is_complete) = (event.to_owned(), is_complete(event));
            Part { event, bytes, total, is_complete, since: Instant::now(), had: 0 }
        };
        let text = line("layer-sha256:0123456789abcdef", &part(512, 1024, "downloading"));
        assert!(text.starts_with("0123456789ab ") && text.contains(&format!("{}{}", "█".repeat(10), "·".repeat(10))), "{text}");
        assert!(text.ends_with("512 B of 1.0 KiB"), "{text}");
        assert!(line("x\u{1b}[2J", &part(0, 0, "waiting")).starts_with("x?[2J"));
        assert!(line("x", &part(0, 10, "complete")).contains(&"█".repeat(20)));
        assert!(line("x", &part(u64::MAX, 1, "downloading")).contains(&"█".repeat(20)));
        let second = Instant::now().checked_sub(Duration::from_secs(1)).expect("the machine runs longer");
        let text = line("x", &Part { since: second, ..part(10 << 20, 20 << 20, "downloading") });
        assert!(text.contains("10.0 MiB of 20.0 MiB, ") && text.ends_with("MiB/s"), "{text}");
    }
}
