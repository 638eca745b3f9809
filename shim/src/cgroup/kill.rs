//! Kills every process of a cgroup, thaws it, lets one process of it exit.
use std::fs;
use std::path::Path;

use x_engine::control;

use super::{Cgroup, CgroupError, files};

/// See [`Cgroup::kill_all`].
pub(super) fn kill_all(cgroup: &Cgroup) -> Result<(), CgroupError> {
    let (unified, freezer) = match cgroup {
        Cgroup::None => return Ok(()),
        Cgroup::V1(folders) => (folders.get("unified"), folders.get("freezer")),
        Cgroup::V2(folder) => (Some(folder), None),
    };
    let Some(folder) = cgroup.processes() else { return Ok(()) };
    let freezers: Vec<&Path> = freezer.into_iter().map(|folder| folder.as_path()).collect();
    control::kill_in(&[folder], unified.map(|folder| folder.as_path()), &freezers).map_err(|source| CgroupError::Io {
        op: "kill every process of",
        path: folder.to_owned(),
        source,
    })
}

/// See [`Cgroup::thaw`].
pub(super) fn thaw(cgroup: &Cgroup) {
    let (folder, file, thawed) = match cgroup {
        Cgroup::None => return,
        Cgroup::V1(folders) => (folders.get("freezer"), V1_STATE, "THAWED"),
        Cgroup::V2(folder) => (Some(folder), "cgroup.freeze", "0"),
    };
    if let Some(folder) = folder {
        // Parents first: a cgroup cannot thaw below a frozen one.
        files::each_below(folder, &mut |folder| drop(fs::write(folder.join(file), thawed)));
    }
}

/// See [`Cgroup::let_die`].
pub(super) fn let_die(cgroup: &Cgroup, pid: u32) {
    let Cgroup::V1(folders) = cgroup else { return };
    let Some(folder) = folders.get("freezer") else { return };
    let is_below = files::pids_below(folder).contains(&pid);
    let is_frozen = files::any_below(folder, |folder| files::read(folder, V1_STATE).is_some_and(|state| state.trim() != "THAWED"));
    if let (true, true, Some(above)) = (is_below, is_frozen, folder.parent()) {
        let _ = fs::write(above.join("cgroup.procs"), pid.to_string());
    }
}

/// The file of cgroup v1's freezer.
const V1_STATE: &str = "freezer.state";
