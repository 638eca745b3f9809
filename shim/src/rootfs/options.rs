//! The options of a mount, as in fstab: flags of mount(2), and data for the file system.
use nix::mount::MsFlags;

/// Id mappings of users and groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Maps {
    pub(super) uid: String,
    pub(super) gid: String,
}

/// Mappings that cannot be parsed, or one without the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BadMap;

/// Parsed options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Options {
    /// For the first call.
    pub(super) flags: MsFlags,
    /// Flags that an option clears (`dev`, `suid`, …): a bind mount loses them.
    pub(super) cleared: MsFlags,
    /// For a separate call; empty for none.
    pub(super) propagation: MsFlags,
    /// For the file system.
    pub(super) data: Vec<String>,
    /// The source is a file: mount it through a loop device.
    pub(super) is_loop: bool,
    /// `uidmap=` and `gidmap=`, in the format of `/proc/PID/uid_map`.
    pub(super) maps: Option<Result<Maps, BadMap>>,
    /// An option for containerd's mount manager only.
    pub(super) managers: Option<String>,
}

impl Options {
    /// Parses options in order: a later one wins.
    pub(super) fn parse(options: &[String]) -> Self {
        let none = MsFlags::empty();
        let mut parsed =
            Self { flags: none, cleared: none, propagation: none, data: Vec::new(), is_loop: false, maps: None, managers: None };
        let (mut uid, mut gid) = (None, None);
        for option in options.iter().flat_map(|option| split(option)) {
            if let Some((_, flag, sets)) = FLAGS.iter().find(|(name, ..)| *name == option) {
                parsed.flags.set(*flag, *sets);
                parsed.cleared.set(*flag, !*sets);
            } else if let Some((_, flags)) = PROPAGATIONS.iter().find(|(name, _)| *name == option) {
                parsed.propagation = *flags;
            } else if option == "loop" {
                parsed.is_loop = true;
            } else if let Some(map) = option.strip_prefix("uidmap=") {
                uid = Some(read_map(map));
            } else if let Some(map) = option.strip_prefix("gidmap=") {
                gid = Some(read_map(map));
            } else if option.starts_with("X-containerd.") {
                parsed.managers = Some(option.to_owned());
            } else if !matches!(option, "defaults" | "") && !option.starts_with("x-") && !option.starts_with("X-") {
                // `x-…` is for programs that read fstab, never for a file system.
                parsed.data.push(option.to_owned());
            }
        }
        parsed.maps = match (uid, gid) {
            (None, None) => None,
            (Some(Some(uid)), Some(Some(gid))) => Some(Ok(Maps { uid, gid })),
            _ => Some(Err(BadMap)),
        };
        parsed
    }
}

/// `0:1000:65536,…` becomes a line `0 1000 65536` for each.
fn read_map(map: &str) -> Option<String> {
    let line = |range: &str| {
        let numbers: Vec<u32> = range.split(':').map(|number| number.parse().ok()).collect::<Option<_>>()?;
        let [inside, outside, count] = numbers[..] else { return None };
        Some(format!("{inside} {outside} {count}\n"))
    };
    map.split(',').map(line).collect()
}

/// `ro,nodev` in one string is two options; an option with a value may contain commas.
fn split(option: &str) -> impl Iterator<Item = &str> {
    let is_list = option.contains(',') && !option.contains('=');
    option.split(move |c| is_list && c == ',')
}

const FLAGS: [(&str, MsFlags, bool); 28] = [
    ("async", MsFlags::MS_SYNCHRONOUS, false),
    ("atime", MsFlags::MS_NOATIME, false),
    ("bind", MsFlags::MS_BIND, true),
    ("dev", MsFlags::MS_NODEV, false),
    ("diratime", MsFlags::MS_NODIRATIME, false),
    ("dirsync", MsFlags::MS_DIRSYNC, true),
    ("exec", MsFlags::MS_NOEXEC, false),
    ("lazytime", MsFlags::MS_LAZYTIME, true),
    ("loud", MsFlags::MS_SILENT, false),
    ("mand", MsFlags::MS_MANDLOCK, true),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("nodev", MsFlags::MS_NODEV, true),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("nomand", MsFlags::MS_MANDLOCK, false),
    ("norelatime", MsFlags::MS_RELATIME, false),
    ("nostrictatime", MsFlags::MS_STRICTATIME, false),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("rbind", MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("remount", MsFlags::MS_REMOUNT, true),
    ("ro", MsFlags::MS_RDONLY, true),
    ("rw", MsFlags::MS_RDONLY, false),
    ("silent", MsFlags::MS_SILENT, true),
    ("strictatime", MsFlags::MS_STRICTATIME, true),
    ("suid", MsFlags::MS_NOSUID, false),
    ("sync", MsFlags::MS_SYNCHRONOUS, true),
    ("nolazytime", MsFlags::MS_LAZYTIME, false),
];

const PROPAGATIONS: [(&str, MsFlags); 8] = [
    ("private", MsFlags::MS_PRIVATE),
    ("rprivate", MsFlags::MS_PRIVATE.union(MsFlags::MS_REC)),
    ("shared", MsFlags::MS_SHARED),
    ("rshared", MsFlags::MS_SHARED.union(MsFlags::MS_REC)),
    ("slave", MsFlags::MS_SLAVE),
    ("rslave", MsFlags::MS_SLAVE.union(MsFlags::MS_REC)),
    ("unbindable", MsFlags::MS_UNBINDABLE),
    ("runbindable", MsFlags::MS_UNBINDABLE.union(MsFlags::MS_REC)),
];

/// Shortens the data of an overlay whose list of lower folders is too long for mount(2): the folder they are all in, and the data
/// with names relative to it. `None` where that does not apply.
pub(super) fn compact_overlay(data: &[String]) -> Option<(String, Vec<String>)> {
    let at = data.iter().position(|option| option.starts_with("lowerdir="))?;
    let (base, list) = x_engine::plan::relative_layers(&data[at]["lowerdir=".len()..])?;
    let mut data = data.to_vec();
    data[at] = format!("lowerdir={list}");
    Some((base, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).collect()
    }

    #[test]
    fn flags_and_data_are_distinguished_and_the_later_wins() {
        let parsed = Options::parse(&strings(&[
            "rbind",
            "ro",
            "rw",
            "ro",
            "nosuid",
            "suid",
            "rslave",
            "defaults",
            "",
            "x-systemd.automount",
            "size=1m",
            "nodev,noexec",
            "upperdir=/a,b",
        ]));
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        assert_eq!((parsed.flags, parsed.cleared), (flags, MsFlags::MS_NOSUID));
        assert_eq!(parsed.propagation, MsFlags::MS_SLAVE | MsFlags::MS_REC);
        assert_eq!(parsed.data, strings(&["size=1m", "upperdir=/a,b"]));
        assert!(!parsed.is_loop && parsed.maps.is_none() && parsed.managers.is_none());
        let parsed = Options::parse(&strings(&["loop", "X-containerd.mkfs.size=1"]));
        assert!(parsed.is_loop && parsed.managers.is_some() && parsed.data.is_empty());
    }

    #[test]
    fn maps_come_in_pairs() {
        let maps = |options: &[&str]| Options::parse(&strings(options)).maps;
        let expected = Maps { uid: "0 1000 10\n10 5000 1\n".into(), gid: "0 1 2\n".into() };
        assert_eq!(maps(&["uidmap=0:1000:10,10:5000:1", "gidmap=0:1:2"]), Some(Ok(expected)));
        for wrong in
            [&["uidmap=0:1:2"][..], &["uidmap=0:1:2", "gidmap=0:1"], &["uidmap=", "gidmap=0:1:2"], &["uidmap=0:-1:2", "gidmap=0:1:2"]]
        {
            assert_eq!(maps(wrong), Some(Err(BadMap)), "{wrong:?}");
        }
    }

    #[test]
    fn the_list_of_lower_folders_is_shortened_in_its_place() {
        let data = strings(&["index=off", "lowerdir=/s/12/fs:/s/17/fs", "upperdir=/u"]);
        let expected = strings(&["index=off", "lowerdir=12/fs:17/fs", "upperdir=/u"]);
        assert_eq!(compact_overlay(&data), Some(("/s/".to_owned(), expected)));
        assert_eq!(compact_overlay(&strings(&["lowerdir=/a/fs:/b/fs"])), None);
        assert_eq!(compact_overlay(&strings(&["upperdir=/u"])), None);
    }
}
