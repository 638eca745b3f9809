//! A root file system of nothing but static busybox.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context as _, Result};

use crate::{isolation, programs};

/// The folder of the root file system that all containers of a run share, created on first use.
///
/// Containers get it by a bind mount, so no image and no snapshotter is in the way.
pub fn shared() -> Result<PathBuf> {
    static MAKING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = MAKING.lock().expect("no panic under this lock");
    let folder = Path::new(isolation::RUN).join("rootfs");
    if !folder.join("etc/group").exists() {
        make(&folder)?;
    }
    Ok(folder)
}

/// Creates one in `folder`.
pub fn make(folder: &Path) -> Result<()> {
    for name in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "mnt"] {
        fs::create_dir_all(folder.join(name))?;
    }
    fs::set_permissions(folder.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .context("no busybox: install busybox-static")?;
    programs::copy(Path::new(busybox), &folder.join("bin/busybox"))?;
    let list = Command::new(busybox).arg("--list").output()?;
    for applet in String::from_utf8_lossy(&list.stdout).lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", folder.join("bin").join(applet))?;
    }
    fs::write(folder.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n")?;
    fs::write(folder.join("etc/group"), "root:x:0:\nuser:x:1000:\n")?;
    Ok(())
}
