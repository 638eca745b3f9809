//! Plans a unit of systemd's: its name and place, what it is started with, and the properties that correspond to limits.
//!
//! systemd writes the files of a cgroup again whenever it looks at the unit (daemon-reload, another property): what is not among its properties is then
//! its default. So every limit that it knows is given to it as well.
//!
//! **Invariant:** a name is a file's name of systemd's alphabet, so a path made of it stays where it belongs. No annotation can name what the engine owns.
use oci_spec::runtime::Spec;

use super::devices::{Allowed, letters};
use super::gvariant::Value;
use super::{Cgroup, Folder, Hierarchy, KEEP, Write};
use crate::Refused;
use crate::host::MountedHierarchy;

/// A unit to start.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Unit {
    /// `PREFIX-NAME.scope`, or `NAME.slice`.
    pub name: String,
    /// Where systemd puts it, as its property `ControlGroup` has it.
    pub control_group: String,
    /// What it is started with, beside its processes.
    pub properties: Vec<Property>,
    /// What it gets once the container is made: its own making is not to run into its limits.
    pub limits: Vec<Property>,
}

/// A property of a unit.
#[derive(Debug, Clone, PartialEq)]
pub struct Property {
    pub name: String,
    pub value: Value,
    /// The first version of systemd that has it.
    pub since: u16,
}

/// A limit of processor time as it is: microseconds in each period of microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bandwidth {
    pub quota: Option<u64>,
    pub period: u64,
}

impl Unit {
    /// Whether it takes no processes at its start.
    #[must_use]
    pub fn is_slice(&self) -> bool {
        self.name.ends_with(SLICE)
    }

    /// What systemd shows of it to people.
    #[must_use]
    pub fn description(&self) -> Option<&str> {
        self.properties.iter().find_map(|property| match &property.value {
            Value::Text(text) if property.name == DESCRIPTION => Some(text.as_str()),
            _ => None,
        })
    }

    /// The same unit with another description.
    #[must_use]
    pub fn described(&self, text: &str) -> Self {
        let properties = self.properties.iter().cloned().chain([Property::new(DESCRIPTION, Value::Text(text.to_owned()))]).collect();
        Self { properties: last_of_each(properties), ..self.clone() }
    }
}

impl Default for Bandwidth {
    /// A new cgroup's.
    fn default() -> Self {
        Self { quota: None, period: 100_000 }
    }
}

impl Property {
    fn new(name: &str, value: Value) -> Self {
        Self { name: name.to_owned(), value, since: 0 }
    }

    fn number(name: &str, number: u64) -> Self {
        Self::new(name, Value::U64(number))
    }
}

/// Where a container is in systemd's tree.
pub(super) struct Place {
    pub(super) name: String,
    slice: String,
    /// Of the folder, below systemd's own.
    path: String,
}

impl Place {
    /// Reads a `cgroupsPath`: `SLICE:PREFIX:NAME`.
    pub(super) fn parse(wanted: &str, id: &str) -> Result<Self, Refused> {
        let invalid = |why: String| Refused::invalid("linux.cgroupsPath", why);
        let (slice, prefix, name) = match wanted.split(':').collect::<Vec<_>>()[..] {
            [""] => ("", "runc", id),
            [slice, prefix, name] => (slice, prefix, name),
            _ => return Err(invalid(format!("{wanted:?} is not of the form SLICE:PREFIX:NAME, which the option SystemdCgroup wants"))),
        };
        let slice = if slice.is_empty() { DEFAULT_SLICE } else { slice };
        let above = expand(slice).ok_or_else(|| invalid(format!("{slice:?} is not the name of a slice")))?;
        let name = if name.ends_with(SLICE) { name.to_owned() } else { format!("{prefix}-{name}.scope") };
        if !is_unit_name(&name) {
            return Err(invalid(format!("{name:?} is not the name of a unit: 1 to {MAX_NAME_BYTES} of letters, digits and :-_.\\@")));
        }
        let path = match name.ends_with(SLICE) {
            // The name alone decides where a slice is.
            true => expand(&name).ok_or_else(|| invalid(format!("{name:?} is not the name of a slice")))?,
            false if above.is_empty() => name.clone(),
            false => format!("{above}/{name}"),
        };
        if path.is_empty() {
            return Err(invalid(format!("{name} is the root of the cgroups")));
        }
        Ok(Self { name, slice: slice.to_owned(), path })
    }

    /// The path of the folder in a hierarchy, below what is mounted.
    pub(super) fn folder(&self, hierarchy: &MountedHierarchy) -> String {
        let base = base(hierarchy);
        let base = base.strip_prefix(hierarchy.root.trim_end_matches('/')).unwrap_or(base).trim_matches('/');
        if base.is_empty() { self.path.clone() } else { format!("{base}/{}", self.path) }
    }

    /// The unit of a slice without limits, on a host with these hierarchies.
    pub(super) fn slice(&self, hierarchies: &[MountedHierarchy]) -> Unit {
        let is_v2 = matches!(hierarchies, [only] if only.controllers.is_empty());
        let mut properties = vec![Property::new("Description", Value::Text("cgroups of a pod".to_owned()))];
        properties.extend(accounting(is_v2));
        Unit { name: self.name.clone(), control_group: self.control_group(hierarchies), properties, limits: Vec::new() }
    }

    /// Where systemd has it.
    fn control_group(&self, hierarchies: &[MountedHierarchy]) -> String {
        let systemds =
            hierarchies.iter().find(|one| one.controllers == [NAMED]).or_else(|| hierarchies.iter().find(|one| one.controllers.is_empty()));
        format!("{}/{}", systemds.map_or("", base).trim_end_matches('/'), self.path)
    }

    /// The unit, on a host with these hierarchies.
    pub(super) fn unit(
        &self,
        spec: &Spec,
        id: &str,
        allowed: &Allowed,
        hierarchies: &[MountedHierarchy],
        limits: Vec<Property>,
    ) -> Result<Unit, Refused> {
        let is_v2 = matches!(hierarchies, [only] if only.controllers.is_empty());
        let flag = |name: &str, value: bool| Property::new(name, Value::Bool(value));
        let mut properties = vec![Property::new(DESCRIPTION, Value::Text(format!("container {id}")))];
        if self.name.ends_with(SLICE) {
            properties.push(Property::new("Wants", Value::texts(&[&self.slice])));
        } else {
            properties.push(Property::new("Slice", Value::Text(self.slice.clone())));
            properties.push(flag("Delegate", true));
        }
        properties.extend(accounting(is_v2));
        // On v2 systemd asks programs of its own beside the engine's, which it leaves alone; on v1 there is one list, and it writes that again.
        if !is_v2 {
            properties.extend(devices(allowed));
        }
        properties.extend(annotated(spec, is_v2)?);
        let control_group = self.control_group(hierarchies);
        Ok(Unit { name: self.name.clone(), control_group, properties: last_of_each(properties), limits })
    }
}

/// What every unit has, whatever its limits.
fn accounting(is_v2: bool) -> impl Iterator<Item = Property> {
    let names = ["MemoryAccounting", "CPUAccounting", if is_v2 { "IOAccounting" } else { "BlockIOAccounting" }, "TasksAccounting"];
    let flag = |name, value| Property::new(name, Value::Bool(value));
    [flag("DefaultDependencies", false)].into_iter().chain(names.map(move |name| flag(name, true)))
}

/// The cgroup of systemd itself, without the scope that its first process is in.
fn base(hierarchy: &MountedHierarchy) -> &str {
    hierarchy.of_init.strip_suffix("init.scope").unwrap_or(&hierarchy.of_init).trim_end_matches('/')
}

/// The path of a slice: `a-b.slice` is in `a.slice`. That of `-.slice` is empty.
fn expand(slice: &str) -> Option<String> {
    let name = slice.strip_suffix(SLICE).filter(|_| is_unit_name(slice))?;
    if name == "-" {
        return Some(String::new());
    }
    let mut path = String::new();
    for (end, _) in name.match_indices('-').chain([(name.len(), "")]) {
        let before = &name[..end];
        // Neither `-a` nor `a--b` nor `a-`.
        if before.is_empty() || before.ends_with('-') {
            return None;
        }
        path = format!("{path}{}{before}{SLICE}", if path.is_empty() { "" } else { "/" });
    }
    Some(path)
}

fn is_unit_name(name: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(is_part) && !name.starts_with('.')
}

/// The devices that systemd allows, as it writes them to cgroup v1. What it has no words for stays forbidden when it writes them again.
fn devices(allowed: &Allowed) -> [Property; 2] {
    let list = |entries: Vec<Value>| Property::new(DEVICES[1], Value::Array("(ss)".to_owned(), entries));
    let policy = |word: &str| Property::new(DEVICES[0], Value::Text(word.to_owned()));
    if allowed.by_default && allowed.exceptions.is_empty() {
        return [policy("auto"), list(Vec::new())];
    }
    let always = Allowed::least();
    let exceptions = if allowed.by_default { &always.exceptions } else { &allowed.exceptions };
    let entry = |((kind, major, minor), bits): (&(char, Option<u32>, Option<u32>), &u8)| {
        let (group, folder) = if *kind == 'b' { ("block", "block") } else { ("char", "char") };
        let device = match (major, minor) {
            (None, None) => format!("{group}-*"),
            (Some(PTS), None) if *kind == 'c' => "char-pts".to_owned(),
            (Some(major), None) => format!("{group}-{major}"),
            (Some(major), Some(minor)) => format!("/dev/{folder}/{major}:{minor}"),
            (None, Some(_)) => return None,
        };
        Some(Value::Tuple(vec![Value::Text(device), Value::Text(letters(*bits))]))
    };
    [policy("strict"), list(exceptions.iter().filter_map(entry).collect())]
}

/// The properties that annotations name.
fn annotated(spec: &Spec, is_v2: bool) -> Result<Vec<Property>, Refused> {
    let mut named: Vec<(&String, &String)> = spec.annotations().iter().flatten().filter(|(key, _)| key.starts_with(ANNOTATION)).collect();
    named.sort();
    if named.len() > MAX_ANNOTATED {
        return Err(Refused::invalid(format!("annotations.{ANNOTATION}*"), format!("{} are more than {MAX_ANNOTATED}", named.len())));
    }
    let read = |(key, text): (&String, &String)| {
        let invalid = |why: String| Refused::invalid(format!("annotations.{key}"), why);
        let name = &key[ANNOTATION.len()..];
        if name.len() < 3 || name.len() > MAX_NAME_BYTES || !name.bytes().all(|byte| byte.is_ascii_alphabetic()) {
            return Err(invalid("the name of a property has letters alone, three at least".to_owned()));
        }
        // On v2 systemd's list of devices can only forbid more, on v1 it is the only one.
        if OWNED.contains(&name) || !is_v2 && DEVICES.contains(&name) {
            return Err(invalid(format!("{name} is the engine's to choose")));
        }
        let value = Value::parse(text).map_err(|why| invalid(format!("is no value in GVariant's text form: {why}")))?;
        match name.strip_suffix("Sec").filter(|stem| stem.ends_with(|letter: char| letter.is_ascii_lowercase())) {
            Some(stem) => match microseconds(&value) {
                Some(value) => Ok(Property::number(&format!("{stem}USec"), value)),
                None => Err(invalid(format!("{value} is not a number of seconds"))),
            },
            None => Ok(Property::new(name, value)),
        }
    };
    named.into_iter().map(read).collect()
}

fn microseconds(seconds: &Value) -> Option<u64> {
    let whole = match seconds {
        Value::Byte(number) => i128::from(*number),
        Value::I16(number) => i128::from(*number),
        Value::U16(number) => i128::from(*number),
        Value::I32(number) => i128::from(*number),
        Value::U32(number) => i128::from(*number),
        Value::I64(number) => i128::from(*number),
        Value::U64(number) => i128::from(*number),
        Value::Double(number) if (0.0..1e13).contains(number) => return Some((number * 1e6) as u64),
        _ => return None,
    };
    whole.checked_mul(1_000_000).and_then(|number| u64::try_from(number).ok())
}

/// A later property of a name replaces an earlier one.
fn last_of_each(properties: Vec<Property>) -> Vec<Property> {
    let mut kept: Vec<Property> = Vec::new();
    for property in properties {
        match kept.iter_mut().find(|other| other.name == property.name) {
            Some(other) => *other = property,
            None => kept.push(property),
        }
    }
    kept
}

/// Makes the limits of a cgroup such as systemd keeps them, and returns them as properties. `now`: what is limited of processor time until then.
///
/// systemd knows a share of processor time as a whole percentage: a quota is rounded up to the next.
pub fn settle(cgroup: &mut Cgroup, now: Bandwidth) -> Result<Vec<Property>, Refused> {
    let mut properties = Vec::new();
    for folder in &mut cgroup.folders {
        properties.extend(settle_bandwidth(folder, now)?);
        for write in &folder.limits {
            properties.extend(property(folder.hierarchy, write)?);
        }
    }
    // To systemd, to be idle is a weight.
    let is_idle =
        cgroup.folders.iter().flat_map(|folder| &folder.limits).any(|write| write.file == "cpu.idle" && write.value.trim() == "1");
    if is_idle && cgroup.unified().is_some() && cgroup.folders.len() == 1 {
        properties.push(Property { since: 252, ..Property::number("CPUWeight", 0) });
    }
    Ok(last_of_each(properties))
}

fn settle_bandwidth(folder: &mut Folder, now: Bandwidth) -> Result<Vec<Property>, Refused> {
    let number = |file: &str, text: &str| text.parse::<u64>().map_err(|_| unfit(file, text));
    let (mut quota, mut period) = (None, None);
    for write in &folder.limits {
        match (write.file.as_str(), folder.hierarchy) {
            ("cpu.max", Hierarchy::Unified) => {
                let mut halves = write.value.split_whitespace();
                if let Some(half) = halves.next().filter(|half| *half != KEEP) {
                    quota = Some(if half == "max" { None } else { Some(number("cpu.max", half)?) });
                }
                if let Some(half) = halves.next().filter(|half| *half != KEEP) {
                    period = Some(number("cpu.max", half)?);
                }
            }
            ("cpu.cfs_quota_us", _) => quota = Some(write.value.parse::<u64>().ok()),
            ("cpu.cfs_period_us", _) => period = Some(number("cpu.cfs_period_us", &write.value)?),
            _ => {}
        }
    }
    if quota.is_none() && period.is_none() {
        return Ok(Vec::new());
    }
    let mut properties = Vec::new();
    let is_quota_given = quota.is_some();
    if let Some(period) = period {
        properties.push(Property { since: 242, ..Property::number("CPUQuotaPeriodUSec", period) });
    }
    let period = period.unwrap_or(now.period);
    if period == 0 {
        return Err(unfit("the period of cpu.max", "0"));
    }
    let each_second = quota.unwrap_or(now.quota).map(|quota| {
        let exact = (u128::from(quota) * 1_000_000).div_ceil(u128::from(period));
        u64::try_from(exact.div_ceil(PERCENT) * PERCENT).unwrap_or(u64::MAX)
    });
    properties.push(Property::number("CPUQuotaPerSecUSec", each_second.unwrap_or(u64::MAX)));
    // The same to the files.
    let rounded =
        each_second.map(|each_second| u64::try_from(u128::from(each_second) * u128::from(period) / 1_000_000).unwrap_or(u64::MAX));
    for write in &mut folder.limits {
        match write.file.as_str() {
            "cpu.max" => write.value = format!("{} {period}", rounded.map_or_else(|| "max".to_owned(), |quota| quota.to_string())),
            "cpu.cfs_quota_us" if is_quota_given => write.value = rounded.map_or_else(|| "-1".to_owned(), |quota| quota.to_string()),
            _ => {}
        }
    }
    Ok(properties)
}

/// The property that systemd has for a file, if it has one.
fn property(hierarchy: Hierarchy, write: &Write) -> Result<Option<Property>, Refused> {
    let is_v2 = hierarchy == Hierarchy::Unified;
    let value = write.value.trim();
    let amount = || match value {
        "max" | "-1" => Ok(u64::MAX),
        value => value.parse::<u64>().map_err(|_| unfit(&write.file, value)),
    };
    let set = || bits(value).ok_or_else(|| unfit(&write.file, value));
    let named = |name: &str| amount().map(|amount| Some(Property::number(name, amount)));
    match (write.file.as_str(), is_v2) {
        ("memory.min", true) => named("MemoryMin"),
        ("memory.low", true) => named("MemoryLow"),
        ("memory.high", true) => named("MemoryHigh"),
        ("memory.max", true) => named("MemoryMax"),
        ("memory.swap.max", true) => named("MemorySwapMax"),
        ("cpu.weight", true) => named("CPUWeight"),
        // Lines for devices are the engine's alone.
        ("io.weight", true) if !value.contains(' ') => named("IOWeight"),
        ("pids.max", _) => named("TasksMax"),
        ("memory.limit_in_bytes", false) => named("MemoryLimit"),
        ("cpu.shares", false) => named("CPUShares"),
        // Below, systemd takes no weight.
        ("blkio.weight" | "blkio.bfq.weight", false) if amount().is_ok_and(|weight| weight >= 10) => named("BlockIOWeight"),
        ("cpuset.cpus", _) => Ok(Some(Property { since: 244, ..Property::new("AllowedCPUs", Value::bytes(&set()?)) })),
        ("cpuset.mems", _) => Ok(Some(Property { since: 244, ..Property::new("AllowedMemoryNodes", Value::bytes(&set()?)) })),
        _ => Ok(None),
    }
}

fn unfit(file: &str, value: &str) -> Refused {
    Refused::invalid(
        "linux.resources",
        format!("{file}: {value:?} cannot be given to systemd, which has to be given every limit that it knows"),
    )
}

/// Bit n for number n of a list like `0-3,5`, the lowest byte first.
fn bits(list: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for range in list.split(',').map(str::trim).filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= MAX_NUMBER {
            return None;
        }
        bytes.resize(bytes.len().max(last / 8 + 1), 0);
        (first..=last).for_each(|number| bytes[number / 8] |= 1 << (number % 8));
    }
    Some(bytes)
}

const DESCRIPTION: &str = "Description";
/// What annotations may name.
pub(crate) const ANNOTATION: &str = "org.systemd.property.";
const SLICE: &str = ".slice";
const DEFAULT_SLICE: &str = "system.slice";
/// systemd's own hierarchy of cgroup v1.
pub(super) const NAMED: &str = "name=systemd";
/// systemd's limit.
const MAX_NAME_BYTES: usize = 255;
const MAX_ANNOTATED: usize = 64;
/// Others' processes, another place, another owner.
const OWNED: [&str; 4] = ["PIDs", "Slice", "Delegate", "Controller"];
const DEVICES: [&str; 2] = ["DevicePolicy", "DeviceAllow"];
/// Of a second, in microseconds.
const PERCENT: u128 = 10_000;
/// The terminals' device.
const PTS: u32 = 136;
const MAX_NUMBER: usize = 8192;

#[cfg(test)]
mod tests;
