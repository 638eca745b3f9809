//! Id-mapped snapshots (`remap-ids`): one image for containers in user namespaces, without a copy of its files.
//!
//! ```text
//! labels containerd.io/snapshot/{uid,gid}mapping = INSIDE:OUTSIDE:COUNT[,…]
//!   overlay      lower folders are mapped by who mounts it (options uidmap=, gidmap=); the upper folder has ids as they are outside
//!   bind mount   all of it is mapped by who mounts it: its files have ids as they are inside
//! ```

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use crate::error::{Error, IoContext as _, Result};

/// Which users and groups outside are those inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Maps {
    users: Vec<Range>,
    groups: Vec<Range>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    inside: u32,
    outside: u32,
    count: u32,
}

impl Maps {
    /// Those in a snapshot's labels.
    ///
    /// Errors: they are no maps, or one of the two is missing.
    pub(crate) fn in_labels(labels: &HashMap<String, String>) -> Result<Option<Self>> {
        Self::of(labels.get(USERS).map(String::as_str), labels.get(GROUPS).map(String::as_str))
    }

    /// Those in a mount's options.
    pub(crate) fn in_options(options: &[String]) -> Result<Option<Self>> {
        let option = |name: &str| options.iter().find_map(|option| option.strip_prefix(name));
        Self::of(option(USER_OPTION), option(GROUP_OPTION))
    }

    fn of(users: Option<&str>, groups: Option<&str>) -> Result<Option<Self>> {
        match (users, groups) {
            (None, None) => Ok(None),
            (Some(users), Some(groups)) => Ok(Some(Self { users: parse(users)?, groups: parse(groups)? })),
            (Some(_), None) | (None, Some(_)) => Err(Error::Invalid(format!("{USERS} and {GROUPS} must both be given, or none"))),
        }
    }

    /// The user and the group outside that are root inside.
    ///
    /// Errors: none are.
    pub(super) fn root(&self) -> Result<(u32, u32)> {
        let root = |ranges: &[Range]| ranges.iter().find(|range| range.inside == 0).map(|range| range.outside);
        root(&self.users).zip(root(&self.groups)).ok_or_else(|| Error::Invalid("no user and group outside are root inside".to_owned()))
    }

    /// A user namespace in which a mount shows files, whose ids are those outside, with those inside.
    pub(crate) fn blocking_inverse(&self) -> Result<OwnedFd> {
        let lines = |ranges: &[Range]| {
            inverse(ranges).iter().map(|range| format!("{} {} {}\n", range.inside, range.outside, range.count)).collect::<String>()
        };
        let made = x_idmap::blocking_user_namespace(&lines(&self.users), &lines(&self.groups));
        made.on("make a user namespace for", std::path::Path::new("id-mapped files"))
    }
}

/// The map that leads back. What it would leave without an id, like root's own folders, gets one of those that become free: the kernel
/// refuses every access to files without one.
fn inverse(ranges: &[Range]) -> Vec<Range> {
    let span = |first: u32, count: u32| (first, count);
    let (inside, outside): (Vec<_>, Vec<_>) =
        ranges.iter().map(|range| (span(range.inside, range.count), span(range.outside, range.count))).unzip();
    let mut all: Vec<_> = ranges.iter().map(|range| Range { inside: range.outside, outside: range.inside, count: range.count }).collect();
    let (mut left, mut free) = (without(&inside, &outside), without(&outside, &inside));
    while let (Some((id, count)), Some((place, room))) = (left.pop(), free.pop()) {
        let both = count.min(room);
        all.push(Range { inside: id, outside: place, count: both });
        left.extend((count > both).then(|| (id + both, count - both)));
        free.extend((room > both).then(|| (place + both, room - both)));
    }
    all.truncate(MOST_RANGES);
    all
}

/// What is in some spans, each a first number and a count, and not in others.
fn without(spans: &[(u32, u32)], others: &[(u32, u32)]) -> Vec<(u32, u32)> {
    let mut left = spans.to_vec();
    for (first, count) in others {
        let (from, to) = (*first, first + count);
        let cut = |(first, count): (u32, u32)| {
            let end = first + count;
            let (before, after) = ((first, end.min(from)), (first.max(to), end));
            [before, after].into_iter().filter(|(first, end)| first < end).map(|(first, end)| (first, end - first)).collect::<Vec<_>>()
        };
        left = left.into_iter().flat_map(cut).collect();
    }
    left
}

/// Whether an option of a mount is one of ours.
pub(crate) fn is_map(option: &str) -> bool {
    option.starts_with(USER_OPTION) || option.starts_with(GROUP_OPTION)
}

/// The options for a mount of a snapshot with these labels.
pub(super) fn options(labels: &HashMap<String, String>) -> Vec<String> {
    let option = |name: &str, label: &str| labels.get(label).map(|map| format!("{name}{map}"));
    [option(USER_OPTION, USERS), option(GROUP_OPTION, GROUPS)].into_iter().flatten().collect()
}

fn parse(text: &str) -> Result<Vec<Range>> {
    let shown = || text.chars().take(100).collect::<String>();
    let range = |part: &str| {
        let numbers: Vec<u32> = part.split(':').map(|number| number.parse().ok()).collect::<Option<_>>()?;
        let [inside, outside, count] = numbers[..] else { return None };
        let fits = |first: u32| count > 0 && first.checked_add(count).is_some();
        (fits(inside) && fits(outside)).then_some(Range { inside, outside, count })
    };
    let ranges: Option<Vec<_>> = text.split(',').map(range).collect();
    let ranges = ranges.filter(|ranges| ranges.len() <= MOST_RANGES);
    ranges.ok_or_else(|| {
        Error::Invalid(format!("id map {:?}: should be INSIDE:OUTSIDE:COUNT, {MOST_RANGES} of them at most, separated by commas", shown()))
    })
}

/// Labels of snapshots, as in containerd.
const USERS: &str = "containerd.io/snapshot/uidmapping";
const GROUPS: &str = "containerd.io/snapshot/gidmapping";
const USER_OPTION: &str = "uidmap=";
const GROUP_OPTION: &str = "gidmap=";
/// As many as the kernel takes.
const MOST_RANGES: usize = 340;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_read_as_containerd_writes_them() {
        let labels =
            |users: &str, groups: &str| HashMap::from([(USERS.to_owned(), users.to_owned()), (GROUPS.to_owned(), groups.to_owned())]);
        let maps = Maps::in_labels(&labels("1:5:7,0:1000:1", "0:2000:65536")).expect("maps").expect("there are some");
        assert_eq!(maps.root().expect("there is one"), (1000, 2000));
        assert_eq!(options(&labels("0:1:2", "0:3:4")), ["uidmap=0:1:2", "gidmap=0:3:4"]);
        let same = Maps::in_options(&["ro".to_owned(), "uidmap=1:5:7,0:1000:1".to_owned(), "gidmap=0:2000:65536".to_owned()]);
        assert_eq!(same.expect("maps"), Some(maps));
        assert_eq!(Maps::in_labels(&HashMap::new()).expect("none"), None);
        Maps::in_labels(&labels("1:1:1", "1:1:1")).expect("maps").expect("there are some").root().expect_err("no root");
        for bad in ["", "0", "0:1", "0:1:2:3", "a:1:2", "-1:1:2", "0:1:0", "0:4294967295:2", "0:1:2,", "0:1:2 ", &["0:0:1"; 341].join(",")]
        {
            assert_eq!(Maps::in_labels(&labels(bad, "0:1:2")).expect_err(bad).code(), tonic::Code::InvalidArgument);
        }
        Maps::in_labels(&[(USERS.to_owned(), "0:1:2".to_owned())].into()).expect_err("groups are missing");
    }

    #[test]
    fn the_map_that_leads_back_gives_every_id_another() {
        for text in ["0:100000:65536", "0:1000:65536", "0:0:10", "0:5:10,10:1000:5", "0:1:1", "5:0:5,0:100:5"] {
            let (ranges, mut seen) = (parse(text).expect("a map"), std::collections::BTreeMap::new());
            let back = inverse(&ranges);
            for range in &back {
                for number in 0..range.count {
                    assert_eq!(seen.insert(range.inside + number, range.outside + number), None, "{text}");
                }
            }
            for range in &ranges {
                assert_eq!(seen[&range.outside], range.inside, "{text}");
                assert!(seen.contains_key(&range.inside), "{text}: what has an id inside has none");
            }
            let shown: std::collections::BTreeSet<_> = seen.values().collect();
            assert_eq!(shown.len(), seen.len(), "{text}: {back:?}");
        }
    }
}
