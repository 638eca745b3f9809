//! Plans device nodes, and the list of devices that a cgroup allows.
use std::collections::BTreeMap;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::make::absolute_path;
use super::{Device, Write};
use crate::Refused;

/// Path, major, minor.
const DEFAULT_NODES: [(&str, u32, u32); 6] =
    [("/dev/null", 1, 3), ("/dev/zero", 1, 5), ("/dev/full", 1, 7), ("/dev/random", 1, 8), ("/dev/urandom", 1, 9), ("/dev/tty", 5, 0)];

/// Links: target, path.
const DEFAULT_LINKS: [(&str, &str); 5] = [
    ("pts/ptmx", "/dev/ptmx"),
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Allowed at last in every container, so that no rule can forbid them: making nodes, the default nodes, terminals, tunnels.
const ALWAYS_ALLOWED: [(char, Option<u32>, Option<u32>, &str); 11] = [
    ('c', None, None, "m"),
    ('b', None, None, "m"),
    ('c', Some(1), Some(3), "rwm"),
    ('c', Some(1), Some(8), "rwm"),
    ('c', Some(1), Some(7), "rwm"),
    ('c', Some(5), Some(0), "rwm"),
    ('c', Some(1), Some(5), "rwm"),
    ('c', Some(1), Some(9), "rwm"),
    ('c', Some(136), None, "rwm"),
    ('c', Some(5), Some(2), "rwm"),
    // /dev/net/tun: programs for private networks make the node themselves.
    ('c', Some(10), Some(200), "rwm"),
];

const DEFAULT_MODE: u32 = 0o666;

/// The nodes of a container: its own, and the default ones that it does not replace.
pub(super) fn nodes(wanted: &[LinuxDevice]) -> Result<Vec<Device>, Refused> {
    let mut nodes: Vec<Device> = Vec::new();
    for (index, device) in wanted.iter().enumerate() {
        let field = format!("linux.devices[{index}]");
        let path = absolute_path(device.path(), &format!("{field}.path"))?;
        // It is a link to the container's own terminals.
        if path == "/dev/ptmx" {
            continue;
        }
        let kind = match device.typ() {
            LinuxDeviceType::C | LinuxDeviceType::U => libc::S_IFCHR,
            LinuxDeviceType::B => libc::S_IFBLK,
            LinuxDeviceType::P => libc::S_IFIFO,
            LinuxDeviceType::A => return Err(Refused::invalid(format!("{field}.type"), "a node has one type")),
        };
        let number = |number: i64, field: String| u32::try_from(number).map_err(|_range| Refused::invalid(field, "out of range"));
        nodes.retain(|other| other.path != path);
        nodes.push(Device {
            path,
            mode: kind | device.file_mode().unwrap_or(DEFAULT_MODE) & 0o7777,
            major: number(device.major(), format!("{field}.major"))?,
            minor: number(device.minor(), format!("{field}.minor"))?,
            uid: device.uid().unwrap_or(0),
            gid: device.gid().unwrap_or(0),
        });
    }
    let defaults = DEFAULT_NODES
        .into_iter()
        .filter(|(path, ..)| nodes.iter().all(|node| node.path != *path))
        .map(|(path, major, minor)| Device { path: path.to_owned(), mode: libc::S_IFCHR | DEFAULT_MODE, major, minor, uid: 0, gid: 0 });
    Ok(defaults.collect::<Vec<_>>().into_iter().chain(nodes).collect())
}

/// The links in `/dev`.
pub(super) fn links(has_kcore: bool) -> Vec<(String, String)> {
    let core = has_kcore.then_some(("/proc/kcore", "/dev/core"));
    DEFAULT_LINKS.into_iter().chain(core).map(|(target, path)| (target.to_owned(), path.to_owned())).collect()
}

/// Type, major and minor; `None` is any.
pub(super) type Key = (char, Option<u32>, Option<u32>);

/// What a list of rules amounts to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Allowed {
    pub(super) by_default: bool,
    /// Accesses that differ from the default: bits of [`access`].
    pub(super) exceptions: BTreeMap<Key, u8>,
}

/// Follows the rules. The kernel's own handling of holes in wildcards would leave more allowed than they say, so such rules are refused.
pub(super) fn allowed(wanted: &[LinuxDeviceCgroup]) -> Result<Allowed, Refused> {
    let mut emulator = Allowed::default();
    for (index, rule) in wanted.iter().enumerate() {
        let field = format!("linux.resources.devices[{index}]");
        let bits = access(rule.access().as_deref().unwrap_or("rwm"), &field)?;
        let number = |number: Option<i64>| match number {
            None | Some(-1) => Ok(None),
            Some(number) => u32::try_from(number).map(Some).map_err(|_range| Refused::invalid(&field, "a number is out of range")),
        };
        let (major, minor) = (number(rule.major())?, number(rule.minor())?);
        let kind = match rule.typ().unwrap_or(LinuxDeviceType::A) {
            LinuxDeviceType::A => 'a',
            LinuxDeviceType::C | LinuxDeviceType::U => 'c',
            LinuxDeviceType::B => 'b',
            LinuxDeviceType::P => return Err(Refused::invalid(format!("{field}.type"), "a fifo is no device")),
        };
        emulator.apply(rule.allow(), (kind, major, minor), bits).map_err(|why| Refused::invalid(&field, why))?;
    }
    emulator.always_allow().map_err(|why| Refused::invalid("linux.resources.devices", why))?;
    Ok(emulator)
}

impl Allowed {
    /// What no rule can forbid, and nothing else.
    pub(super) fn least() -> Self {
        let mut least = Self::default();
        least.always_allow().expect("nothing is there to contradict");
        least
    }

    fn always_allow(&mut self) -> Result<(), String> {
        ALWAYS_ALLOWED.into_iter().try_for_each(|(kind, major, minor, letters)| {
            let bits = access(letters, "").map_err(|refused| refused.to_string())?;
            self.apply(true, (kind, major, minor), bits)
        })
    }

    fn apply(&mut self, allow: bool, key: Key, bits: u8) -> Result<(), String> {
        if key.0 == 'a' {
            if key.1.is_some() || key.2.is_some() || bits != EVERY {
                return Err("a rule for all devices can neither have numbers nor leave out an access".to_owned());
            }
            *self = Self { by_default: allow, exceptions: BTreeMap::new() };
            return Ok(());
        }
        if allow != self.by_default {
            *self.exceptions.entry(key).or_default() |= bits;
            return Ok(());
        }
        // Back to the default: an exception of the same numbers gives way, a wider one would be left with a hole.
        let is_wider = |other: &Key| {
            *other != key && other.0 == key.0 && (other.1.is_none() || other.1 == key.1) && (other.2.is_none() || other.2 == key.2)
        };
        if self.exceptions.iter().any(|(other, theirs)| is_wider(other) && theirs & bits != 0) {
            return Err("contradicts a part of an earlier rule with a wildcard".to_owned());
        }
        let is_inside = |other: &Key| other.0 == key.0 && (key.1.is_none() || other.1 == key.1) && (key.2.is_none() || other.2 == key.2);
        self.exceptions.retain(|other, theirs| {
            if is_inside(other) {
                *theirs &= !bits;
            }
            *theirs != 0
        });
        Ok(())
    }

    /// The content of cgroup v1's lists for it, in a new cgroup.
    pub(super) fn v1(&self) -> Vec<Write> {
        let (default, exception) = if self.by_default { (ALLOW, DENY) } else { (DENY, ALLOW) };
        let write = |file: &str, value: String| Write { file: file.to_owned(), value, ..Write::default() };
        let number = |number: Option<u32>| number.map_or_else(|| "*".to_owned(), |number| number.to_string());
        let exceptions = self.exceptions.iter().map(|((kind, major, minor), bits)| {
            write(exception, format!("{kind} {}:{} {}", number(*major), number(*minor), letters(*bits)))
        });
        std::iter::once(write(default, "a".to_owned())).chain(exceptions).collect()
    }
}

const ALLOW: &str = "devices.allow";
const DENY: &str = "devices.deny";
/// Bit n of an access is letter n.
const LETTERS: [char; 3] = ['r', 'w', 'm'];
pub(super) const READ: u8 = 0b001;
pub(super) const WRITE: u8 = 0b010;
pub(super) const MAKE: u8 = 0b100;
const EVERY: u8 = READ | WRITE | MAKE;

fn access(text: &str, field: &str) -> Result<u8, Refused> {
    let mut bits = 0;
    for letter in text.chars() {
        let position = LETTERS.iter().position(|known| *known == letter);
        bits |= 1 << position.ok_or_else(|| Refused::invalid(format!("{field}.access"), format!("{text:?} is not of r, w and m")))?;
    }
    if bits == 0 {
        return Err(Refused::invalid(format!("{field}.access"), "empty"));
    }
    Ok(bits)
}

pub(super) fn letters(bits: u8) -> String {
    LETTERS.iter().enumerate().filter(|(position, _)| bits & (1 << position) != 0).map(|(_, letter)| *letter).collect()
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxDeviceCgroupBuilder;

    use super::*;

    fn rule(allow: bool, kind: Option<LinuxDeviceType>, major: Option<i64>, minor: Option<i64>, access: &str) -> LinuxDeviceCgroup {
        let mut rule = LinuxDeviceCgroupBuilder::default().allow(allow).access(access);
        if let Some(kind) = kind {
            rule = rule.typ(kind);
        }
        if let Some(major) = major {
            rule = rule.major(major);
        }
        if let Some(minor) = minor {
            rule = rule.minor(minor);
        }
        rule.build().expect("a rule")
    }

    fn written(rules: &[LinuxDeviceCgroup]) -> Vec<String> {
        allowed(rules)
            .expect("rules")
            .v1()
            .iter()
            .map(|write| format!("{} {}", write.file.trim_start_matches("devices."), write.value))
            .collect()
    }

    #[test]
    fn a_container_without_rules_may_use_the_default_devices_only() {
        let written = written(&[rule(false, None, None, None, "rwm")]);
        assert_eq!(written[0], "deny a");
        assert!(written.contains(&"allow c *:* m".to_owned()) && written.contains(&"allow c 136:* rwm".to_owned()));
        assert_eq!(written.len(), 12);
        assert_eq!(written, self::written(&[]));
    }

    #[test]
    fn a_rule_for_all_resets_those_before_it() {
        let privileged = written(&[rule(true, Some(LinuxDeviceType::C), Some(10), Some(1), "r"), rule(true, None, None, None, "rwm")]);
        assert_eq!(privileged, ["allow a"]);
    }

    #[test]
    fn what_is_always_allowed_cannot_be_forbidden() {
        let written = written(&[rule(true, None, None, None, "rwm"), rule(false, Some(LinuxDeviceType::C), Some(1), Some(3), "rw")]);
        assert_eq!(written, ["allow a"]);
    }

    #[test]
    fn a_hole_in_a_wildcard_is_refused() {
        let rules =
            [rule(true, Some(LinuxDeviceType::C), Some(10), None, "rwm"), rule(false, Some(LinuxDeviceType::C), Some(10), Some(200), "w")];
        assert!(allowed(&rules).is_err());
    }

    #[test]
    fn own_nodes_replace_the_default_ones() {
        use oci_spec::runtime::LinuxDeviceBuilder;
        let own =
            LinuxDeviceBuilder::default().path("/dev/null").typ(LinuxDeviceType::C).major(1).minor(5).uid(7_u32).build().expect("a device");
        let nodes = nodes(&[own]).expect("nodes");
        assert_eq!(nodes.len(), 6);
        let null = nodes.iter().find(|node| node.path == "/dev/null").expect("present");
        assert_eq!((null.minor, null.uid, null.mode), (5, 7, libc::S_IFCHR | 0o666));
    }
}
