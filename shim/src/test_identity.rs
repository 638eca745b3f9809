//! The test identity: which build this executable claims to be, and how it misbehaves in tests. Without the feature `fault-injection`, it is
//! the real build and never misbehaves.
//!
//! A test makes another build of the shim by copying it and appending a line to the copy:
//! `x-test-identity: NAME=VALUE …`. Names: `build`; `oldest` and `newest`, the versions of the messages; `records`, the newest version of
//! containers' records that it reads; `state`, the same for a keeper's state; `at` and `do`: where it misbehaves (`hello`, `fit`, `welcome`,
//! `later`, `rehearsal`, `resume`), and how (`crash`, `exit`, `kill`, `hang`, `spin`, at `resume` `refuse`); `rehearsal`: how it does there
//! besides; `request` and `exit`: a text which makes it misbehave in the request whose bytes, or in the exit whose key, contain it.
#[cfg(feature = "fault-injection")]
pub(crate) use active::{build, meet_exit, meet_request, misbehave, record_version, refuse, state_version, versions};
#[cfg(not(feature = "fault-injection"))]
pub(crate) use inert::{build, meet_exit, meet_request, misbehave, record_version, refuse, state_version, versions};

/// Where a build may misbehave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// A worker, before it sends Hello.
    Hello,
    /// A worker, asked whether it can take over.
    Fit,
    /// A worker that takes over.
    Welcome,
    /// A worker, half a second after it has taken over.
    Later,
    /// A new keeper executable, asked whether it can take over.
    Rehearsal,
    /// A new keeper executable that takes over.
    Resume,
}

#[cfg(not(feature = "fault-injection"))]
mod inert {
    use super::Place;
    use crate::handover::Versions;

    /// The version of this build and its commit.
    pub(crate) fn build() -> &'static str {
        env!("X_BUILD")
    }

    pub(crate) fn versions() -> Versions {
        Versions::OURS
    }

    pub(crate) fn record_version(ours: u32) -> u32 {
        ours
    }

    pub(crate) fn state_version(ours: u16) -> u16 {
        ours
    }

    pub(crate) fn misbehave(_place: Place) {}

    pub(crate) fn refuse(_place: Place) -> Result<(), &'static str> {
        Ok(())
    }

    pub(crate) fn meet_request(_payload: &[u8]) {}

    pub(crate) fn meet_exit(_key: &str) {}
}

#[cfg(feature = "fault-injection")]
mod active {
    use std::fs::File;
    use std::io::{Read, Seek, SeekFrom};
    use std::sync::OnceLock;
    use std::time::Duration;

    use super::Place;
    use crate::handover::Versions;

    const MARK: &str = "\nx-test-identity: ";
    const TAIL_BYTES: i64 = 512;

    /// The line at the end of this executable; empty without one.
    fn line() -> &'static str {
        static LINE: OnceLock<String> = OnceLock::new();
        LINE.get_or_init(|| {
            let mut tail = Vec::new();
            let read = File::open("/proc/self/exe").and_then(|mut file| {
                file.seek(SeekFrom::End(-TAIL_BYTES))?;
                file.read_to_end(&mut tail)
            });
            let text = String::from_utf8_lossy(&tail);
            let found = read.ok().and_then(|_| text.rsplit_once(MARK).map(|(_, line)| line.trim().to_owned()));
            found.unwrap_or_default()
        })
    }

    fn value(name: &str) -> Option<&'static str> {
        line().split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    fn number<N: std::str::FromStr>(name: &str) -> Option<N> {
        value(name).and_then(|text| text.parse().ok())
    }

    pub(crate) fn build() -> &'static str {
        value("build").unwrap_or(env!("X_BUILD"))
    }

    pub(crate) fn versions() -> Versions {
        let ours = Versions::OURS;
        Versions { oldest: number("oldest").unwrap_or(ours.oldest), newest: number("newest").unwrap_or(ours.newest) }
    }

    pub(crate) fn record_version(ours: u32) -> u32 {
        number("records").unwrap_or(ours)
    }

    pub(crate) fn state_version(ours: u16) -> u16 {
        number("state").unwrap_or(ours)
    }

    pub(crate) fn misbehave(place: Place) {
        let name = match place {
            Place::Hello => "hello",
            Place::Fit => "fit",
            Place::Welcome => "welcome",
            Place::Later => "later",
            Place::Rehearsal => "rehearsal",
            Place::Resume => "resume",
        };
        if let (Place::Rehearsal, Some(how)) = (place, value("rehearsal")) {
            perform(Some(how));
        }
        if value("at") != Some(name) || value("do") == Some("refuse") {
            return;
        }
        match (place, value("do")) {
            // In a thread of its own, so that the worker does some work before.
            (Place::Later, how) => drop(std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(500));
                perform(how);
            })),
            (_, how) => perform(how),
        }
    }

    /// Whether it claims that it cannot read the state.
    pub(crate) fn refuse(place: Place) -> Result<(), &'static str> {
        let refuses = place == Place::Resume && value("at") == Some("resume") && value("do") == Some("refuse");
        if refuses { Err("refused by its test identity") } else { Ok(()) }
    }

    pub(crate) fn meet_request(payload: &[u8]) {
        if value("request").is_some_and(|text| payload.windows(text.len()).any(|window| window == text.as_bytes())) {
            perform(value("do"));
        }
    }

    pub(crate) fn meet_exit(key: &str) {
        if value("exit").is_some_and(|text| key.contains(text)) {
            perform(value("do"));
        }
    }

    fn perform(how: Option<&str>) {
        match how {
            Some("kill") => while nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).is_ok() {},
            Some("exit") => std::process::exit(7),
            Some("spin") => loop {
                std::hint::spin_loop();
            },
            Some("hang") => loop {
                std::thread::sleep(Duration::from_secs(3600));
            },
            _ => std::process::abort(),
        }
    }
}
