//! Has criu make a container from an image of its processes.
//!
//! ```text
//!  performer ── root, targets of mounts, in a mount namespace of its own ──▶ criu, in the container's cgroup
//!      │ ◀── setup-namespaces: `lo`, network devices, hooks on the host
//!      │ ◀── post-restore: limits, attributes of mounts, masks
//!      │ ◀── pre-resume: are privileges and namespaces within the configuration? No process has gone on yet
//!      └─ poststart hooks, report                                            init: a child of the performer's, then of the keeper's
//! ```
//!
//! **Invariant:** the host's table of mounts is not changed. What comes from the image is in names that the configuration has: sources of mounts,
//! namespaces, cgroup and streams are the plan's, and the processes have no more privileges than it gives. A failure leaves neither process nor cgroup.
//! File systems that the image mounts by itself are not compared with the plan.
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;

use super::cgroup::{self, Joining};
use super::checkpoint::{open_folder, read_descriptors};
use super::child::{cwd, plain};
use super::criu::{EXTERNAL_NAMESPACES, Notice, Options, Request, Session};
use super::descriptors::Kept;
use super::root::{self, Root};
use super::{Doing, Failure, Step, hooks, masks, mounts, namespaces, network, privileges, sources, terminal};
use crate::plan::{Create, Hierarchy, Imaged, Kind, Source};
use crate::sys::{self, Tree};

/// Makes the container. Its processes run. Returns init's pid.
pub(super) fn restore(plan: &Imaged, kept: &Kept) -> Result<u32, Failure> {
    let (joining, made) = Joining::make(&plan.create.cgroup)?;
    restore_in(plan, kept, &joining).inspect_err(|_| made.remove())
}

fn restore_in(plan: &Imaged, kept: &Kept, joining: &Joining) -> Result<u32, Failure> {
    let (criu, create) = (&plan.criu, &plan.create);
    let namespaces = open_namespaces(create)?;
    make_root(create)?;
    // In the mount namespace of that root: criu mounts in its working directory.
    let (image, work) = (open_folder(&criu.image)?, open_folder(&criu.work)?);
    let descriptors =
        read_descriptors(&image).map_err(|error| plain(Step::Criu, &format!("read descriptors.json in {}: {error}", criu.image)))?;
    let mut options = Options::new(criu, create, &image, &work, "restore.log");
    options.restore();
    for (name, source) in create.external_mounts() {
        options.external_mount(name, source);
    }
    // Other runtimes save masked files as mounts of the null device from outside.
    for path in &create.masked {
        options.external_mount(path, "/dev/null");
    }
    for folder in &create.cgroup.folders {
        let path = format!("/{}", folder.path.trim_matches('/'));
        match folder.hierarchy {
            // Of every hierarchy that is not named.
            Hierarchy::Unified => options.cgroup_root(None, &path),
            Hierarchy::V1 | Hierarchy::Cpuset => folder.of.iter().for_each(|controller| options.cgroup_root(Some(controller), &path)),
        }
    }
    for (profile, module) in [(&create.process.apparmor_profile, "apparmor"), (&create.process.selinux_label, "selinux")] {
        if let Some(profile) = profile {
            options.security_profile(&format!("{module}:{profile}"));
        }
    }
    let streams = streams()?;
    let mut inherited = Vec::new();
    for (stream, name) in streams.iter().zip(&descriptors) {
        if name.starts_with("pipe:") {
            options.inherit(name, stream);
            inherited.push(stream);
        }
    }
    for (name, namespace) in &namespaces {
        options.inherit(name, namespace);
        inherited.push(namespace);
    }

    let session = Session::start(criu, Some(joining), &inherited)?;
    let criu = session.pid();
    let pid = session.request(Request::Restore, &options, |notice| act(create, kept, criu, notice))?;
    if pid == 0 {
        return Err(plain(Step::Criu, "criu has reported no pid"));
    }
    let hooks = &create.hooks;
    hooks::run(&hooks.poststart, "poststart", &hooks.state.json("running", pid), cwd(hooks), &[])?;
    Ok(pid)
}

/// Acts on a report of criu's.
fn act(create: &Create, kept: &Kept, criu: u32, notice: Notice) -> Result<(), Failure> {
    match notice.name.as_str() {
        "setup-namespaces" => {
            if create.makes(Kind::Network) {
                network::loopback_up(notice.pid)?;
            }
            network::move_devices(&create.net_devices, notice.pid)?;
            let hooks = &create.hooks;
            hooks::run(&hooks.on_host, "createRuntime", &hooks.state.json("creating", notice.pid), cwd(hooks), &[])
        }
        "post-restore" => {
            cgroup::limit(&create.cgroup)?;
            confirm_mounts(create, notice.pid)
        }
        // Every process has its ids, capabilities and filters, and none has gone on.
        "pre-resume" => privileges::check(create, criu),
        "orphan-pts-master" => match (&notice.descriptor, &kept.console) {
            (Some(master), Some(console)) => terminal::send(master, console).doing(Step::Terminal, || "send the terminal".to_owned()),
            (None, _) => Err(plain(Step::Terminal, "criu has sent no terminal")),
            (Some(_), None) => Err(plain(Step::Terminal, "the checkpoint is of a container with a terminal, and this one has none")),
        },
        _ => Ok(()),
    }
}

/// Sees to what the configuration says of mounts, whatever the image has.
fn confirm_mounts(create: &Create, pid: u32) -> Result<(), Failure> {
    let init = sys::open_pidfd(pid).doing(Step::Criu, || "open a handle of init".to_owned())?;
    let confirm = || -> Result<(), Failure> {
        let root = Root::new(root::absolute(Path::new("/")).doing(Step::Root, || "open the root".to_owned())?);
        create
            .mounts
            .iter()
            .filter(|mount| matches!(mount.source, Source::Bind { .. }))
            .try_for_each(|mount| mounts::confirm(&root, mount))?;
        masks::confirm_readonly(&root, &create.readonly)?;
        masks::confirm_hidden(&root, &create.masked, create.mount_label.as_deref())?;
        if create.root_readonly {
            mounts::readonly(root.as_fd(), Tree::Top).doing(Step::Root, || "make the root read-only".to_owned())?;
        }
        Ok(())
    };
    namespaces::within_mounts_of(init, confirm).doing(Step::Namespaces, || "join the mount namespace of the container".to_owned())?
}

/// Makes the root a mount of its own, as criu needs it, in a mount namespace of this performer's. Targets of mounts that are missing are made.
fn make_root(create: &Create) -> Result<(), Failure> {
    let doing = || format!("mount the root {}", create.root);
    unshare(CloneFlags::CLONE_NEWNS).doing(Step::Root, || "make a mount namespace".to_owned())?;
    mounts::separate("/", libc::MS_SLAVE | libc::MS_REC)?;
    let root = sources::open_root(create)?;
    mounts::propagate(root.as_fd(), libc::MS_PRIVATE | libc::MS_REC).doing(Step::Root, doing)?;
    let root = Root::new(root);
    for mount in &create.mounts {
        let Source::Bind { path, .. } = &mount.source else { continue };
        // What is in another mount comes with its content.
        let is_inside = |other: &str| Path::new(&mount.target).starts_with(other) && other != mount.target;
        if create.mounts.iter().any(|other| is_inside(&other.target)) {
            continue;
        }
        let target = || -> std::io::Result<OwnedFd> {
            if root::is_folder(root::absolute(Path::new(path))?)? { root.folder(&mount.target) } else { root.file(&mount.target) }
        };
        target().doing(Step::Mounts, || format!("mount {path} on {}", mount.target))?;
    }
    Ok(())
}

/// Namespaces to join, with their names in images.
fn open_namespaces(create: &Create) -> Result<Vec<(&'static str, OwnedFd)>, Failure> {
    let joined = EXTERNAL_NAMESPACES.iter().filter_map(|(kind, _, name)| Some((*name, create.joined(*kind)?)));
    joined
        .map(|(name, path)| {
            let opened = nix::fcntl::open(Path::new(path), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
            Ok((name, opened.doing(Step::Namespaces, || format!("open the namespace {path}"))?))
        })
        .collect()
}

/// Copies of the three streams: criu gets others for its own.
fn streams() -> Result<[OwnedFd; 3], Failure> {
    let copy = |stream: &dyn AsRawFd| sys::duplicate(&stream.as_raw_fd(), 3).doing(Step::Criu, || "copy a stream".to_owned());
    Ok([copy(&std::io::stdin())?, copy(&std::io::stdout())?, copy(&std::io::stderr())?])
}
