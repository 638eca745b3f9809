//! A host's cgroup v1 hierarchies, in a mount namespace of tests.
//!
//! crun refuses a hybrid host whose v2 hierarchy has controllers. Each of them gets a v1 hierarchy, mounted where only the tests see it: the kernel
//! removes it with their namespace, and v2 gets the controller back.
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;
use std::{fs, io, thread};

use nix::mount::{MsFlags, mount};

const ROOT: &str = "/sys/fs/cgroup";
const NONE: Option<&str> = None;
/// How long the kernel may take to give a controller back: of a run of tests that has just ended.
const ATTEMPTS: u32 = 100;
const PAUSE: Duration = Duration::from_millis(50);

/// Gives each controller of v2 a v1 hierarchy. The calling process needs a mount namespace of its own, with private mounts; the host's folder is not
/// changed. `own` is an empty folder to build the new one in. A controller that is in use on v2 stays there: see [`are_mixed`].
pub fn show_v1(own: &Path) -> io::Result<()> {
    mount(Some("tmpfs"), own, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
    for _attempt in 0..ATTEMPTS {
        for controller in without_mount(own)? {
            let folder = own.join(&controller);
            fs::create_dir(&folder)?;
            if mount(Some("cgroup"), &folder, Some("cgroup"), MsFlags::empty(), Some(controller.as_str())).is_err() {
                fs::remove_dir(&folder)?;
            }
        }
        if without_mount(own)?.is_empty() {
            break;
        }
        thread::sleep(PAUSE);
    }
    take_place(own)
}

/// Whether there are v1 hierarchies here, and v2 has controllers beside them: crun does not work.
pub fn are_mixed() -> bool {
    !Path::new(ROOT).join("cgroup.controllers").exists() && !on_v2().is_empty()
}

/// The controllers of the v2 hierarchy beside those of v1.
fn on_v2() -> Vec<String> {
    let list = fs::read_to_string(Path::new(ROOT).join("unified/cgroup.controllers")).unwrap_or_default();
    list.split_whitespace().map(str::to_owned).collect()
}

/// The controllers of v2, and those of a v1 hierarchy that is not mounted: of a run that is ending, which v2 has again in a moment.
fn without_mount(own: &Path) -> io::Result<Vec<String>> {
    let mut controllers = on_v2();
    for line in fs::read_to_string("/proc/cgroups")?.lines() {
        if let [name, hierarchy, ..] = line.split_whitespace().collect::<Vec<_>>()[..]
            && !name.starts_with('#')
            && hierarchy != "0"
            && !controllers.iter().any(|controller| controller == name)
        {
            controllers.push(name.to_owned());
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let is_mounted =
        |name: &str| mounts.lines().any(|line| line.contains(" - cgroup ") && line.rsplit([' ', ',']).any(|word| word == name));
    controllers.retain(|controller| !is_mounted(controller) && !own.join(controller).exists());
    Ok(controllers)
}

/// Puts the host's hierarchies beside those in the folder `own`, and that in their place.
fn take_place(own: &Path) -> io::Result<()> {
    for entry in fs::read_dir(ROOT)? {
        let entry = entry?;
        let place = own.join(entry.file_name());
        match fs::read_link(entry.path()) {
            Ok(target) => symlink(target, place)?,
            Err(_) if place.exists() => {}
            Err(_) => {
                fs::create_dir(&place)?;
                // a folder where nothing is mounted stays behind
                if mount(Some(&entry.path()), &place, NONE, MsFlags::MS_MOVE, NONE).is_err() {
                    fs::remove_dir(&place)?;
                }
            }
        }
    }
    mount(Some(own), ROOT, NONE, MsFlags::MS_MOVE, NONE)?;
    Ok(())
}
