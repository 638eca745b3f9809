//! Kills every process of a cgroup, freezes and thaws it, lets some of its processes exit.
use std::fs;
use std::path::{Path, PathBuf};

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
    if let Some(Freezer { folder, file, thawed }) = freezer(cgroup) {
        // Parents first: a cgroup cannot thaw below a frozen one.
        files::each_below(folder, &mut |folder| drop(fs::write(folder.join(file), thawed)));
    }
}

/// See [`Cgroup::freeze`].
pub(super) fn freeze(cgroup: &Cgroup) -> Option<Frozen> {
    let Freezer { folder, file, thawed } = freezer(cgroup)?;
    if files::read(folder, file).is_none_or(|state| state.trim() != thawed) {
        return None;
    }
    let frozen = Frozen { file: folder.join(file), thawed };
    match control::freeze_in(folder) {
        Ok(()) => Some(frozen),
        Err(error) => {
            log::warn!(path:% = folder.display(), error:%; "cannot freeze a cgroup");
            None
        }
    }
}

/// A cgroup that is thawed when this is dropped.
#[derive(Debug)]
pub(crate) struct Frozen {
    file: PathBuf,
    thawed: &'static str,
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.file, self.thawed) {
            log::warn!(path:% = self.file.display(), error:%; "cannot thaw a cgroup");
        }
    }
}

/// See [`Cgroup::let_die`].
pub(super) fn let_die(cgroup: &Cgroup, pids: &[u32]) {
    let Cgroup::V1(folders) = cgroup else { return };
    let Some(folder) = folders.get("freezer") else { return };
    let is_frozen = files::any_below(folder, |folder| files::read(folder, V1_STATE).is_some_and(|state| state.trim() != "THAWED"));
    let (true, Some(above)) = (is_frozen, folder.parent()) else { return };
    let below = files::pids_below(folder);
    for pid in pids.iter().filter(|pid| below.contains(pid)) {
        let _ = fs::write(above.join("cgroup.procs"), pid.to_string());
    }
}

/// What freezes a cgroup.
struct Freezer<'a> {
    folder: &'a Path,
    file: &'static str,
    /// What thaws it, and what the file holds then.
    thawed: &'static str,
}

fn freezer(cgroup: &Cgroup) -> Option<Freezer<'_>> {
    match cgroup {
        Cgroup::None => None,
        Cgroup::V1(folders) => folders.get("freezer").map(|folder| Freezer { folder, file: V1_STATE, thawed: "THAWED" }),
        Cgroup::V2(folder) => Some(Freezer { folder, file: "cgroup.freeze", thawed: "0" }),
    }
}

/// The file of cgroup v1's freezer.
const V1_STATE: &str = "freezer.state";
