//! Values of options: sizes, volumes, signals, names, policies. Parsed where the command line is, so that nothing is made for a typing error.

use std::path::PathBuf;
use std::str::FromStr;

use nix::sys::signal::Signal;

/// A number of bytes, as `64m` or `1g`; without a letter bytes.
pub(crate) fn bytes(text: &str) -> Result<i64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..).unwrap_or_default().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err("should be a number of bytes, with k, m, g or t after it if you like".to_owned()),
    };
    let number: i64 = digits.parse().map_err(|_| "should be a number of bytes, like 64m".to_owned())?;
    match number.checked_mul(1 << shift) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err("should be more than nothing and less than 8 EiB".to_owned()),
    }
}

/// A number of processors, in microseconds of each 100,000.
pub(crate) fn cpus(text: &str) -> Result<i64, String> {
    let number: f64 = text.parse().map_err(|_| "should be a number of processors, like 1.5".to_owned())?;
    if !(0.01..=100_000.0).contains(&number) {
        return Err("should be at least 0.01".to_owned());
    }
    #[expect(clippy::cast_possible_truncation, reason = "the range was checked")]
    Ok((number * 100_000.0).round() as i64)
}

/// A signal by name, with or without SIG, or number.
pub(crate) fn signal(text: &str) -> Result<u32, String> {
    if let Ok(number) = text.parse::<u32>() {
        return if (1..=64).contains(&number) { Ok(number) } else { Err("should be from 1 to 64".to_owned()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    let real_time = |rest: &str, base: i32, sign: i32| {
        let offset: i32 = if rest.is_empty() { 0 } else { rest[1..].parse().ok()? };
        u32::try_from(base + sign * offset).ok().filter(|number| (34..=64).contains(number))
    };
    if let Some(rest) = name.strip_prefix("SIGRTMIN").filter(|rest| rest.is_empty() || rest.starts_with('+')) {
        return real_time(rest, 34, 1).ok_or_else(|| "there is no such signal".to_owned());
    }
    if let Some(rest) = name.strip_prefix("SIGRTMAX").filter(|rest| rest.is_empty() || rest.starts_with('-')) {
        return real_time(rest, 64, -1).ok_or_else(|| "there is no such signal".to_owned());
    }
    Signal::from_str(&name).map(|signal| (signal as i32).cast_unsigned()).map_err(|_| "there is no such signal".to_owned())
}

/// The id of a container, as containerd takes them.
pub(crate) fn name(text: &str) -> Result<String, String> {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric();
    let bytes = text.as_bytes();
    let ends = bytes.first().zip(bytes.last()).is_some_and(|(first, last)| is_word(*first) && is_word(*last));
    let separators = |pair: &[u8]| !is_word(pair[0]) && !is_word(pair[1]);
    if ends && bytes.len() <= 76 && bytes.iter().all(|byte| is_word(*byte) || b"._-".contains(byte)) && !bytes.windows(2).any(separators) {
        Ok(text.to_owned())
    } else {
        Err("should be up to 76 letters, digits, and single '.', '_' or '-' between them".to_owned())
    }
}

/// A restart policy, as the restart monitors of containerd and x-manager know it.
pub(crate) fn restart(text: &str) -> Result<String, String> {
    let is_known = match text.split_once(':') {
        None => ["no", "always", "unless-stopped", "on-failure"].contains(&text),
        Some(("on-failure", most)) => most.parse::<u64>().is_ok(),
        Some(_) => false,
    };
    if is_known { Ok(text.to_owned()) } else { Err("should be no, always, unless-stopped, or on-failure[:NUMBER]".to_owned()) }
}

/// A folder or file of the host for a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Volume {
    /// On the host: absolute, and it exists.
    pub(crate) source: PathBuf,
    /// In the container: absolute.
    pub(crate) target: PathBuf,
    /// Whether the container may only read.
    pub(crate) is_read_only: bool,
}

/// `SOURCE:TARGET`, with `:ro` after it to forbid writing.
pub(crate) fn volume(text: &str) -> Result<Volume, String> {
    let mut parts = text.split(':');
    let (source, target, mode) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default(), parts.next().unwrap_or("rw"));
    if source.is_empty() || !target.starts_with('/') || parts.next().is_some() {
        return Err("should be SOURCE:TARGET or SOURCE:TARGET:ro, TARGET an absolute path".to_owned());
    }
    let is_read_only = match mode {
        "rw" => false,
        "ro" => true,
        _ => return Err("should end with :ro or :rw, or with neither".to_owned()),
    };
    let source =
        std::fs::canonicalize(source).map_err(|error| format!("{source}: {error}; a folder must exist, and be a path, not a name"))?;
    Ok(Volume { source, target: target.into(), is_read_only })
}

/// A tmpfs in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tmpfs {
    /// Absolute.
    pub(crate) target: PathBuf,
    /// As mount(8) knows them.
    pub(crate) options: Vec<String>,
}

/// `TARGET`, with `:OPTION,OPTION…` after it.
pub(crate) fn tmpfs(text: &str) -> Result<Tmpfs, String> {
    let (target, options) = text.split_once(':').unwrap_or((text, ""));
    if !target.starts_with('/') {
        return Err("should be an absolute path, or one with options like /run:size=64m".to_owned());
    }
    let options = options.split(',').filter(|option| !option.is_empty()).map(str::to_owned).collect();
    Ok(Tmpfs { target: target.into(), options })
}

/// A variable: `NAME=VALUE`, or `NAME` for that of `xctl`'s own environment, which may have none.
pub(crate) fn variable(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some(("", _)) => Err("should be NAME=VALUE, or NAME".to_owned()),
        Some(_) => Ok(text.to_owned()),
        None if text.is_empty() => Err("should be NAME=VALUE, or NAME".to_owned()),
        None => Ok(std::env::var(text).map_or_else(|_| text.to_owned(), |value| format!("{text}={value}"))),
    }
}

/// `KEY=VALUE`, or `KEY` alone for an empty value.
pub(crate) fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    if key.is_empty() { Err("should be KEY=VALUE".to_owned()) } else { Ok((key.to_owned(), value.to_owned())) }
}

/// An absolute path, as it is or below the current folder; it must be a folder.
pub(crate) fn folder(text: &str) -> Result<PathBuf, String> {
    let path = std::fs::canonicalize(text).map_err(|error| error.to_string())?;
    if path.is_dir() { Ok(path) } else { Err("should be a folder".to_owned()) }
}

/// An absolute path.
pub(crate) fn absolute(text: &str) -> Result<PathBuf, String> {
    if text.starts_with('/') { Ok(text.into()) } else { Err("should be an absolute path".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_letters() {
        for (text, value) in [("1", 1), ("64m", 64 << 20), ("1G", 1 << 30), ("2kib", 2048), ("7b", 7)] {
            assert_eq!(bytes(text), Ok(value), "{text}");
        }
        for bad in ["", "m", "0", "-1", "1x", "1.5g", "99999999999t", "1 m"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
        assert_eq!(cpus("1.5"), Ok(150_000));
        for bad in ["", "0", "-1", "NaN", "inf", "two"] {
            assert!(cpus(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, value) in [("9", 9), ("KILL", 9), ("sigterm", 15), ("SIGRTMIN", 34), ("RTMIN+3", 37), ("SIGRTMAX-1", 63)] {
            assert_eq!(signal(text), Ok(value), "{text}");
        }
        for bad in ["", "0", "65", "NOPE", "SIGRTMIN+31", "RTMIN-1", "-9"] {
            assert!(signal(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_those_that_containerd_takes() {
        let longest = "a".repeat(76);
        for good in ["a", "web-1", "a.b_c", longest.as_str()] {
            assert!(name(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "a--b", "a/b", "..", "ü", &format!("{longest}a")] {
            assert!(name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn volumes_have_a_source_that_exists() {
        assert_eq!(volume("/tmp:/data"), Ok(Volume { source: "/tmp".into(), target: "/data".into(), is_read_only: false }));
        assert_eq!(volume("/tmp:/data:ro").map(|volume| volume.is_read_only), Ok(true));
        for bad in ["", "/tmp", ":/data", "/tmp:data", "/tmp:/a:rw:x", "/tmp:/a:loud", "/nonexistent:/a"] {
            assert!(volume(bad).is_err(), "{bad}");
        }
        assert_eq!(tmpfs("/run:size=1m,mode=700").map(|tmpfs| tmpfs.options.len()), Ok(2));
        assert!(tmpfs("run").is_err());
    }

    #[test]
    fn policies_are_those_of_the_restart_monitor() {
        for good in ["no", "always", "unless-stopped", "on-failure", "on-failure:3"] {
            assert!(restart(good).is_ok(), "{good}");
        }
        for bad in ["", "never", "always:1", "on-failure:", "on-failure:x"] {
            assert!(restart(bad).is_err(), "{bad}");
        }
    }
}
