//! Plans the ids of user namespaces, and the clocks of time namespaces.
use std::collections::HashMap;

use minicbor::{Decode, Encode};
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxTimeOffset};

use super::{Namespace, Process};
use crate::Refused;

/// What the ids of a user namespace are outside of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Mappings {
    #[n(0)]
    pub uids: Vec<IdRange>,
    #[n(1)]
    pub gids: Vec<IdRange>,
}

/// Consecutive ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub struct IdRange {
    /// The first, as the namespace has it.
    #[n(0)]
    pub inside: u32,
    /// The first, as the runtime has it.
    #[n(1)]
    pub outside: u32,
    #[n(2)]
    pub count: u32,
}

impl Mappings {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.uids.is_empty() && self.gids.is_empty()
    }
}

impl IdRange {
    /// What an id of the namespace is outside.
    pub(crate) fn outside(ranges: &[Self], id: u32) -> Option<u32> {
        ranges
            .iter()
            .find_map(|range| id.checked_sub(range.inside).filter(|offset| *offset < range.count).map(|offset| range.outside + offset))
    }
}

/// Plans the mappings of the container's user namespace. Empty where it has none, or joins one whose mappings are not given.
pub(super) fn mappings(linux: &Linux, namespace: Option<&Namespace>) -> Result<Mappings, Refused> {
    let planned = pair(linux.uid_mappings().as_ref(), linux.gid_mappings().as_ref(), "linux")?;
    match namespace {
        None if !planned.is_empty() => Err(Refused::invalid("linux.uidMappings", "needs a user namespace")),
        Some(Namespace { path: None, .. }) if planned.is_empty() => {
            Err(Refused::invalid("linux.uidMappings", "missing for a new user namespace"))
        }
        // Every process begins as root of the namespace, which also owns what the engine makes.
        Some(_) if !planned.is_empty() && IdRange::outside(&planned.uids, 0).is_none() => {
            Err(Refused::invalid("linux.uidMappings", "id 0 is not mapped"))
        }
        Some(_) if !planned.is_empty() && IdRange::outside(&planned.gids, 0).is_none() => {
            Err(Refused::invalid("linux.gidMappings", "id 0 is not mapped"))
        }
        None | Some(_) => Ok(planned),
    }
}

/// Plans both lists of mappings of `field`: neither, or each with something in it.
pub(super) fn pair(uids: Option<&Vec<LinuxIdMapping>>, gids: Option<&Vec<LinuxIdMapping>>, field: &str) -> Result<Mappings, Refused> {
    let planned = Mappings { uids: ranges(uids, &format!("{field}.uidMappings"))?, gids: ranges(gids, &format!("{field}.gidMappings"))? };
    match (planned.uids.is_empty(), planned.gids.is_empty()) {
        (true, false) => Err(Refused::invalid(format!("{field}.uidMappings"), "missing beside gidMappings")),
        (false, true) => Err(Refused::invalid(format!("{field}.gidMappings"), "missing beside uidMappings")),
        (true, true) | (false, false) => Ok(planned),
    }
}

fn ranges(wanted: Option<&Vec<LinuxIdMapping>>, field: &str) -> Result<Vec<IdRange>, Refused> {
    let mut planned = Vec::new();
    for (index, mapping) in wanted.into_iter().flatten().enumerate() {
        let range = IdRange { inside: mapping.container_id(), outside: mapping.host_id(), count: mapping.size() };
        // The last id of all is no id.
        let fits = |first: u32| first.checked_add(range.count).is_some();
        if range.count == 0 || !fits(range.inside) || !fits(range.outside) {
            return Err(Refused::invalid(format!("{field}[{index}]"), format!("size {} is not possible", range.count)));
        }
        planned.push(range);
    }
    planned.sort_unstable();
    Ok(planned)
}

/// What a uid of the container is outside, if that is known.
pub(super) fn outside(mappings: &Mappings, is_mapped: bool, uid: u32) -> Option<u32> {
    if is_mapped { IdRange::outside(&mappings.uids, uid) } else { Some(uid) }
}

/// Refuses ids of a process that its user namespace does not have.
pub(super) fn check(mappings: &Mappings, process: &Process, field: &str) -> Result<(), Refused> {
    if mappings.is_empty() {
        return Ok(());
    }
    let groups = process.groups.iter().map(|group| ("user.additionalGids", *group, &mappings.gids));
    let ids = [("user.uid", process.uid, &mappings.uids), ("user.gid", process.gid, &mappings.gids)];
    match ids.into_iter().chain(groups).find(|(_, id, ranges)| IdRange::outside(ranges, *id).is_none()) {
        Some((name, id, _)) => {
            Err(Refused::invalid(format!("{field}.{name}"), format!("{id} is not mapped in the container's user namespace")))
        }
        None => Ok(()),
    }
}

/// Plans how much later the clocks of a new time namespace are, as lines of `timens_offsets`.
pub(super) fn clocks(wanted: Option<&HashMap<String, LinuxTimeOffset>>, namespace: Option<&Namespace>) -> Result<Vec<String>, Refused> {
    let mut planned = Vec::new();
    for (clock, offset) in wanted.into_iter().flatten() {
        let field = format!("linux.timeOffsets.{clock}");
        if !matches!(namespace, Some(Namespace { path: None, .. })) {
            return Err(Refused::invalid(field, "needs a new time namespace"));
        }
        if clock != "monotonic" && clock != "boottime" {
            return Err(Refused::invalid(field, "is not a clock of time namespaces"));
        }
        planned.push(format!("{clock} {} {}", offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0)));
    }
    planned.sort();
    Ok(planned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_found_in_their_range() {
        let ranges = [IdRange { inside: 0, outside: 1000, count: 10 }, IdRange { inside: 65_534, outside: 5, count: 1 }];
        assert_eq!(IdRange::outside(&ranges, 0), Some(1000));
        assert_eq!(IdRange::outside(&ranges, 9), Some(1009));
        assert_eq!(IdRange::outside(&ranges, 10), None);
        assert_eq!(IdRange::outside(&ranges, 65_534), Some(5));
        assert_eq!(IdRange::outside(&ranges, u32::MAX), None);
    }
}
