//! Errors of a command-line runtime.
//!
//! Owns the parsing of its log. runc and crun write lines of JSON; each has failures that reach only its stderr, and any other
//! runtime may write anything, so text is taken as it is.
//!
//! **Invariant:** any bytes give a sentence, of a bounded length.
use std::path::Path;

use serde::Deserialize;

use super::{EngineError, Verb};
use crate::handover::Exited;

/// One line of the log of runc or crun.
#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
    /// The reason that runc adds to some messages.
    #[serde(default)]
    error: serde_json::Value,
}

impl Line {
    /// The message, and the reason after it.
    fn text(&self) -> String {
        let reason = self.error.as_str().map_or_else(|| self.error.to_string(), str::to_owned);
        match (self.msg.trim(), reason.trim()) {
            (message, "" | "null") => message.to_owned(),
            ("", reason) => reason.to_owned(),
            (message, reason) => format!("{message}: {reason}"),
        }
    }
}

/// Converts the failure of a verb into the error that names its cause.
pub(super) fn read(binary: &Path, verb: Verb, exited: &Exited) -> EngineError {
    let reported = message(&exited.log).or_else(|| message(&exited.output));
    let message = match (reported, exited.status) {
        (Some(message), _) => message,
        (None, status @ 129..) => format!("{} was killed by signal {}", binary.display(), status - 128),
        (None, status) => format!("{} exited with status {status} without an error message", binary.display()),
    };
    if is_about_a_missing_container(&message) {
        EngineError::NoContainer { verb, message }
    } else if is_about_a_taken_id(verb, &message) {
        EngineError::Exists { verb, message }
    } else if concerns_an_idle_container(&message) {
        EngineError::NotRunning { verb, message }
    } else if is_about_a_missing_verb(&message) {
        EngineError::Unsupported { verb, message }
    } else {
        EngineError::Failed { verb, message: in_clients_words(message) }
    }
}

/// Messages of crun, and runc's for the same. Clients match runc's: dockerd exits `run` and `exec` with 127 for a program that is
/// missing and with 126 for one that cannot be executed. crun 1.8 to 1.28 reports a directory, or a file that is not executable, as
/// "Operation not permitted".
const CLIENTS_WORDS: [(&str, &str); 8] = [
    ("open executable: Operation not permitted", "open executable: permission denied"),
    (" exists but it is not executable: Operation not permitted", " exists but it is not executable: permission denied"),
    (" is not a regular file: Operation not permitted", " is not a regular file: permission denied"),
    (": No such file or directory", ": no such file or directory"),
    (": Permission denied", ": permission denied"),
    (": Is a directory", ": is a directory"),
    (": Not a directory", ": not a directory"),
    (": Exec format error", ": exec format error"),
];

fn in_clients_words(message: String) -> String {
    CLIENTS_WORDS.iter().fold(message, |message, (crun, runc)| if message.contains(crun) { message.replace(crun, runc) } else { message })
}

/// The runtime's own message. The last error is the one that it exited with; earlier ones are often the cause (`nsexec`, `setns`).
fn message(bytes: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(bytes);
    let (mut errors, mut others) = (Vec::new(), Vec::new());
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        // A value may take several lines (crun since 1.2x), and text may stand between values.
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Line>();
        if let Some(Ok(line)) = values.next() {
            // Warnings and debug lines explain nothing by themselves.
            if matches!(line.level.as_str(), "error" | "fatal" | "panic") {
                errors.push(line.text());
            }
            rest = rest[values.byte_offset()..].trim_start();
        } else {
            let (line, after) = rest.split_once('\n').unwrap_or((rest, ""));
            others.push(line.trim_end().to_owned());
            rest = after.trim_start();
        }
    }
    errors.retain(|message| !message.is_empty());
    errors.dedup();
    let reported = match errors.pop() {
        None => others.join("; "),
        Some(last) if errors.is_empty() => last,
        Some(last) => format!("{last} (before that: {})", errors.join("; ")),
    };
    (!reported.is_empty()).then(|| shorten(reported))
}

/// Keeps the beginning and the end of a text that is too long for an error.
fn shorten(text: String) -> String {
    if text.len() <= MAX_MESSAGE_BYTES {
        return text;
    }
    let boundary = |at: usize| (at..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    let (head, tail) = (boundary(MAX_MESSAGE_BYTES / 2), boundary(text.len() - MAX_MESSAGE_BYTES / 2));
    format!("{} … {} … {}", &text[..head], tail - head, &text[tail..])
}

// A command line has no error codes, only messages. These are the messages of runc 1.0–1.3 and crun 1.8–1.28; where a runtime uses
// others, the error is `Failed`, which is correct too.

fn is_about_a_missing_container(message: &str) -> bool {
    message.ends_with("container does not exist")
        || message.contains("container `") && message.contains("does not exist")
        || message.ends_with("/status`: No such file or directory")
        || message.starts_with("cannot open directory ") && message.ends_with(": No such file or directory")
}

fn is_about_a_taken_id(verb: Verb, message: &str) -> bool {
    let makes_a_container = matches!(verb, Verb::Create | Verb::Restore);
    let is_named = message.contains("container with given ID already exists")
        || message.contains("container with id exists")
        || message.contains("container `") && message.ends_with("` already exists");
    makes_a_container && is_named
}

fn concerns_an_idle_container(message: &str) -> bool {
    const TEXTS: [&str; 6] = [
        "container not running",
        "container is not running",
        "process already finished",
        "cannot exec in a stopped container",
        "cannot exec a container that has stopped",
        "cannot exec in a stopped state",
    ];
    TEXTS.iter().any(|text| message.contains(text)) || message.contains("container `") && message.ends_with("is not running")
}

fn is_about_a_missing_verb(message: &str) -> bool {
    message.starts_with("unknown command ") || message.starts_with("No help topic for ")
}

/// The longest message in bytes: a ttrpc answer can hold more, logs and terminals cannot.
const MAX_MESSAGE_BYTES: usize = 32 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn exited(status: u32, log: &str, output: &str) -> Exited {
        Exited { status, log: log.as_bytes().to_vec(), output: output.as_bytes().to_vec(), terminal: false }
    }

    fn complaint(status: u32, log: &str, output: &str) -> EngineError {
        read(Path::new("/usr/bin/rt"), Verb::Exec, &exited(status, log, output))
    }

    #[test]
    fn a_message_that_takes_several_lines_is_one_message() {
        let log = "{\n  \"msg\": \"executable file `\\/no` not found\",\n  \"level\": \"error\"\n}\nafterthought\n";
        assert_eq!(message(log.as_bytes()), Some("executable file `/no` not found".to_owned()));
    }

    #[test]
    fn the_message_of_runc_is_given_whole() {
        let error = complaint(
            255,
            "{\"level\":\"error\",\"msg\":\"exec failed: unable to start container process: exec: \\\"nosuch\\\": executable file not found in $PATH\",\"time\":\"2026-01-01T00:00:00Z\"}\n",
            "",
        );
        assert_eq!(
            error.to_string(),
            "OCI runtime exec failed: exec failed: unable to start container process: exec: \"nosuch\": executable file not found in $PATH"
        );
        assert!(matches!(error, EngineError::Failed { .. }));
    }

    #[test]
    fn the_reason_beside_a_message_is_part_of_it() {
        for (fields, expected) in [
            (r#""msg": "cannot do it", "error": "disk full""#, "cannot do it: disk full"),
            (r#""msg": "cannot do it", "error": {"code": 5}"#, r#"cannot do it: {"code":5}"#),
            (r#""msg": "", "error": "disk full""#, "disk full"),
            (r#""msg": "cannot do it", "error": null"#, "cannot do it"),
            (r#""msg": "cannot do it", "error": """#, "cannot do it"),
        ] {
            let log = format!("{{{fields}, \"level\": \"error\"}}\n");
            assert_eq!(complaint(1, &log, "").to_string(), format!("OCI runtime exec failed: {expected}"), "{fields}");
        }
    }

    #[test]
    fn what_cannot_be_executed_is_told_in_the_words_that_clients_match() {
        for (message, words) in [
            ("executable file `nosuch` not found in $PATH: No such file or directory", "no such file or directory"),
            ("executable file `/no/such` not found: No such file or directory", "no such file or directory"),
            ("open executable: Permission denied", "permission denied"),
            ("open executable: Operation not permitted", "permission denied"),
            ("the path `/bin/plain` exists but it is not executable: Operation not permitted", "permission denied"),
            ("the path `/dir` is not a regular file: Operation not permitted", "permission denied"),
            ("exec `/bin/x`: Exec format error", "exec format error"),
            ("mount `x` to `y`: Operation not permitted", "Operation not permitted"),
        ] {
            let before = message.rsplit_once(": ").expect("a reason").0;
            for (log, output) in [(format!("{{\"level\":\"error\",\"msg\":{message:?}}}"), ""), (String::new(), message)] {
                assert_eq!(complaint(1, &log, output).to_string(), format!("OCI runtime exec failed: {before}: {words}"));
            }
        }
    }

    #[test]
    fn earlier_errors_are_not_lost_and_warnings_are_left_out() {
        let log = "{\"level\":\"warning\",\"msg\":\"cgroups\"}\n{\"level\":\"fatal\",\"msg\":\"nsexec-1[9]: failed to open\"}\n{\"msg\":\"exec failed\",\"level\":\"error\"}\n";
        assert_eq!(complaint(1, log, "").to_string(), "OCI runtime exec failed: exec failed (before that: nsexec-1[9]: failed to open)");
    }

    #[test]
    fn what_is_not_json_is_taken_as_it_is() {
        for (log, output, expected) in [
            ("panic: boom\ngoroutine 1\n", "", "panic: boom; goroutine 1"),
            ("", "unknown option\n", "unknown option"),
            ("\u{0}\n", "", "\u{0}"),
            ("", "", "/usr/bin/rt exited with status 1 without an error message"),
            ("{\"level\":\"info\",\"msg\":\"fine\"}\n", "", "/usr/bin/rt exited with status 1 without an error message"),
            ("{\"level\":\"error\"", "", "{\"level\":\"error\""),
            ("7\n", "", "7"),
        ] {
            assert_eq!(complaint(1, log, output).to_string(), format!("OCI runtime exec failed: {expected}"), "{log:?} {output:?}");
        }
        assert_eq!(complaint(139, "", "").to_string(), "OCI runtime exec failed: /usr/bin/rt was killed by signal 11");
    }

    #[test]
    fn messages_of_runc_and_crun_are_distinguished() {
        for (message, kind) in [
            ("container does not exist", "none"),
            ("exec failed: container does not exist", "none"),
            ("error opening file `/run/x/c1/status`: No such file or directory", "none"),
            ("cannot open directory '/run/x/c1': No such file or directory", "none"),
            ("cannot open directory `/run/x/c1`: No such file or directory", "none"),
            ("container `c1` does not exist: open `/run/x/c1/status`: No such file or directory", "none"),
            ("container `c1` does not exist", "none"),
            ("container not running", "rest"),
            ("cannot kill container: os: process already finished", "rest"),
            ("exec failed: cannot exec in a stopped container", "rest"),
            ("the container `c1` is not running", "rest"),
            ("unknown command checkpoint", "verb"),
            ("No help topic for 'features'", "verb"),
            ("executable file `does not exist` not found in $PATH: No such file or directory", "failed"),
            ("runc create failed: chdir /nope: no such file or directory", "failed"),
        ] {
            let kind_of = match complaint(1, &format!("{{\"level\":\"error\",\"msg\":{message:?}}}"), "") {
                EngineError::NoContainer { .. } => "none",
                EngineError::Exists { .. } | EngineError::Gone { .. } | EngineError::Rootfs { .. } => "other",
                EngineError::NotRunning { .. } => "rest",
                EngineError::Unsupported { .. } => "verb",
                EngineError::Failed { .. } => "failed",
            };
            assert_eq!(kind_of, kind, "{message}");
        }
    }

    #[test]
    fn only_a_create_or_a_restore_finds_an_id_taken() {
        for message in ["container with given ID already exists", "container with id exists: c1", "container `c1` already exists"] {
            let exited = exited(1, &format!("{{\"level\":\"error\",\"msg\":{message:?}}}"), "");
            for (verb, is_taken) in [(Verb::Create, true), (Verb::Restore, true), (Verb::Exec, false)] {
                let error = read(Path::new("/usr/bin/rt"), verb, &exited);
                assert_eq!(matches!(error, EngineError::Exists { .. }), is_taken, "{error}");
            }
        }
        let error = complaint(1, "mkdir /x: file already exists", "");
        assert!(matches!(error, EngineError::Failed { .. }), "{error}");
    }

    #[test]
    fn a_message_of_any_length_or_bytes_stays_bounded() {
        let long = "ä".repeat(200_000);
        let text = complaint(1, &long, "").to_string();
        assert!(text.len() < MAX_MESSAGE_BYTES + 100 && text.contains(" … "));
        let garbage = Exited { status: 1, log: vec![0xff; 300], output: Vec::new(), terminal: false };
        assert!(!read(Path::new("/x"), Verb::Start, &garbage).to_string().is_empty());
    }
}
