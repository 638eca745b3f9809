//! Words of mount options.
//!
//! A word that is not one of these is for the file system. Of contradicting words the last one counts; a cleared attribute is remembered, since a
//! bind mount would otherwise keep its source's.
use super::Attributes;

/// The options of a mount, sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) attributes: Attributes,
    pub(super) recursive: Attributes,
    /// `MS_*` flags.
    pub(super) propagation: Vec<u64>,
    /// `bind` or `rbind`: whether recursively.
    pub(super) bind: Option<bool>,
    /// For the file system: with values, and the flags that it has itself.
    pub(super) parameters: Vec<(String, Option<String>)>,
    /// `idmap` or `ridmap`: whether recursively.
    pub(super) idmap: Option<bool>,
    /// Whether `ro` was the last of `ro` and `rw`.
    pub(super) readonly: bool,
    /// Change what is mounted at the target.
    pub(super) remount: bool,
    /// Copy what the mount covers into it.
    pub(super) copy_up: bool,
}

// <linux/mount.h>; attributes of a mount.
pub(crate) const RDONLY: u64 = 0x01;
pub(crate) const NOSUID: u64 = 0x02;
pub(crate) const NODEV: u64 = 0x04;
pub(crate) const NOEXEC: u64 = 0x08;
/// The field of access times; 0 is relatime.
pub(crate) const ATIME: u64 = 0x70;
pub(crate) const NOATIME: u64 = 0x10;
pub(crate) const STRICTATIME: u64 = 0x20;
pub(crate) const NODIRATIME: u64 = 0x80;
/// Needs a descriptor of a user namespace.
pub(crate) const IDMAP: u64 = 0x10_0000;
pub(crate) const NOSYMFOLLOW: u64 = 0x20_0000;

/// What a word does to attributes: sets some, clears some.
fn attribute(word: &str) -> Option<Attributes> {
    let set = |set| Some(Attributes { set, clear: 0 });
    let clear = |clear| Some(Attributes { set: 0, clear });
    let atime = |set| Some(Attributes { set, clear: ATIME });
    match word {
        "ro" => set(RDONLY),
        "rw" => clear(RDONLY),
        "nosuid" => set(NOSUID),
        "suid" => clear(NOSUID),
        "nodev" => set(NODEV),
        "dev" => clear(NODEV),
        "noexec" => set(NOEXEC),
        "exec" => clear(NOEXEC),
        "nodiratime" => set(NODIRATIME),
        "diratime" => clear(NODIRATIME),
        "nosymfollow" => set(NOSYMFOLLOW),
        "symfollow" => clear(NOSYMFOLLOW),
        "noatime" => atime(NOATIME),
        "strictatime" => atime(STRICTATIME),
        "relatime" | "atime" | "norelatime" | "nostrictatime" => atime(0),
        _ => None,
    }
}

/// Words that are propagations.
fn propagation(word: &str) -> Option<u64> {
    let (word, recursive) = word.strip_prefix('r').map_or((word, 0), |word| (word, libc::MS_REC));
    let flag = match word {
        "private" => libc::MS_PRIVATE,
        "shared" => libc::MS_SHARED,
        "slave" => libc::MS_SLAVE,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    };
    Some(flag | recursive)
}

/// Words about access times. They are flags of mount(2), where it does not matter which comes last: strict times are before none, and these before relative ones.
#[derive(Default)]
struct Times {
    is_named: bool,
    none: bool,
    strict: bool,
}

impl Times {
    /// Whether it is a word about them.
    fn take(&mut self, word: &str) -> bool {
        match word {
            "noatime" => self.none = true,
            "atime" => self.none = false,
            "strictatime" => self.strict = true,
            "nostrictatime" => self.strict = false,
            "relatime" | "norelatime" => {}
            _ => return false,
        }
        self.is_named = true;
        true
    }

    fn attributes(&self) -> Attributes {
        let set = if self.strict { STRICTATIME } else { NOATIME * u64::from(self.none) };
        Attributes { set, clear: if self.is_named { ATIME } else { 0 } }
    }
}

impl Attributes {
    fn apply(&mut self, next: Self) {
        self.set = self.set & !next.clear | next.set;
        self.clear = self.clear & !next.set | next.clear;
        // The field of access times is cleared as a whole before a value is set.
        if next.clear & ATIME == ATIME {
            self.clear |= ATIME;
        }
    }
}

/// Sorts the words.
pub(super) fn sort<'a>(words: impl IntoIterator<Item = &'a str>) -> Options {
    let mut options = Options::default();
    let mut times = Times::default();
    for word in words {
        if times.take(word) {
            continue;
        }
        if let Some(attribute) = attribute(word) {
            options.attributes.apply(attribute);
            options.readonly = options.attributes.set & RDONLY != 0;
        } else if let Some(attribute) = word.strip_prefix('r').and_then(attribute) {
            options.recursive.apply(attribute);
        } else if let Some(flags) = propagation(word) {
            options.propagation.push(flags);
        } else {
            match word {
                "" | "defaults" => {}
                "bind" => options.bind = Some(options.bind.unwrap_or(false)),
                "rbind" => options.bind = Some(true),
                // Flags of the file system rather than of the mount.
                "async" | "nomand" | "nolazytime" | "norelmand" | "loud" | "noiversion" | "silent" => {}
                "sync" | "dirsync" | "lazytime" | "mand" | "iversion" => options.parameters.push((word.to_owned(), None)),
                "idmap" => options.idmap = Some(options.idmap.unwrap_or(false)),
                "ridmap" => options.idmap = Some(true),
                "remount" => options.remount = true,
                "tmpcopyup" => options.copy_up = true,
                // What file systems do that have them. As a flag of mount(2), which these words are elsewhere, it changes nothing.
                "acl" | "noacl" => {}
                word => options.parameters.push(match word.split_once('=') {
                    Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                    None => (word.to_owned(), None),
                }),
            }
        }
    }
    options.attributes.apply(times.attributes());
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_contradicting_words_counts() {
        let options = sort(["ro", "nosuid", "rw", "noatime", "strictatime"]);
        assert_eq!(options.attributes, Attributes { set: NOSUID | STRICTATIME, clear: RDONLY | ATIME });
        assert!(!options.readonly);
    }

    #[test]
    fn of_words_about_access_times_the_strictest_counts() {
        for (words, set) in [
            (&["noatime", "relatime"][..], NOATIME),
            (&["relatime", "noatime"], NOATIME),
            (&["strictatime", "noatime"], STRICTATIME),
            (&["noatime", "strictatime"], STRICTATIME),
            (&["noatime", "nostrictatime"], NOATIME),
            (&["strictatime", "nostrictatime"], 0),
            (&["noatime", "atime"], 0),
            (&["norelatime"], 0),
        ] {
            assert_eq!(sort(words.iter().copied()).attributes, Attributes { set, clear: ATIME }, "{words:?}");
        }
        assert_eq!(sort(["ro"]).attributes, Attributes { set: RDONLY, clear: 0 });
    }

    #[test]
    fn words_that_begin_with_r_are_what_they_are() {
        let options = sort(["rro", "ro", "rbind", "rprivate", "rnoexec", "relatime", "rrelatime"]);
        assert_eq!(options.attributes, Attributes { set: RDONLY, clear: ATIME });
        assert_eq!(options.recursive, Attributes { set: RDONLY | NOEXEC, clear: ATIME });
        assert_eq!(options.propagation, [libc::MS_PRIVATE | libc::MS_REC]);
        assert_eq!(options.bind, Some(true));
        assert_eq!(options.parameters, []);
    }

    #[test]
    fn any_other_word_is_for_the_file_system() {
        let options = sort(["mode=0620", "newinstance", "gid=5", "sync", "defaults"]);
        let expected = [("mode", Some("0620")), ("newinstance", None), ("gid", Some("5")), ("sync", None)];
        let expected: Vec<_> = expected.iter().map(|(key, value)| ((*key).to_owned(), value.map(str::to_owned))).collect();
        assert_eq!(options.parameters, expected);
    }
}
