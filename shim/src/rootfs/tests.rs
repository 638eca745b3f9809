//! Tests with real mounts, each in a mount namespace of its own. They need root.
use std::fs::{self, File};
use std::os::unix::fs::symlink;

use nix::mount::mount;
use nix::sched::{CloneFlags, unshare};

use super::*;

/// Runs `test` with a folder on a tmpfs of its own, in a thread with a mount namespace of its own.
fn in_private_namespace(test: impl FnOnce(&Path) + Send) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let folder = scratch::Folder::new("rootfs");
    let none = None::<&str>;
    std::thread::scope(|scope| {
        let work = || {
            unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("a private one");
            mount(Some("tmpfs"), &*folder, Some("tmpfs"), MsFlags::empty(), none).expect("a tmpfs");
            test(&folder);
        };
        scope.spawn(work).join()
    })
    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

fn wanted(kind: &str, source: &Path, target: &str, options: &[&str]) -> Mount {
    let options = options.iter().map(|&option| option.to_owned()).collect();
    Mount { kind: kind.into(), source: source.display().to_string(), target: target.into(), options }
}

/// Mount points and kinds at and below `path`, in the kernel's order.
fn seen(path: &Path) -> Vec<(String, String)> {
    let entries = mountinfo::blocking_list(|entry| entry.mount_point.starts_with(path)).expect("a list");
    entries.into_iter().map(|entry| (entry.mount_point.display().to_string(), entry.kind)).collect()
}

/// Unmounts. A child of another test that has not reached its exec yet has copies of our descriptors for a moment.
fn unmount(rootfs: &Path) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while let Err(error) = blocking_unmount_all(rootfs, Unmount::Clean) {
        assert!(matches!(error, MountError::Busy { .. }) && std::time::Instant::now() < deadline, "{error}");
        std::thread::yield_now();
    }
}

fn folders(base: &Path, names: &[&str]) {
    names.iter().for_each(|name| fs::create_dir_all(base.join(name)).expect("a folder"));
}

#[test]
fn an_overlay_is_mounted_once_however_often_it_is_asked_for_and_unmounted_whole() {
    in_private_namespace(|base| {
        folders(base, &["lower", "upper", "work", "b"]);
        fs::write(base.join("lower/hello"), "hi").expect("a file");
        let rootfs = base.join("b/rootfs");
        let at = |name: &str| base.join(name).display().to_string();
        let data = [format!("lowerdir={}", at("lower")), format!("upperdir={}", at("upper")), format!("workdir={}", at("work"))];
        let mounts = [wanted("overlay", Path::new("overlay"), "", &["index=off", &data[0], &data[1], &data[2]])];
        for _ in 0..3 {
            blocking_mount_all(&rootfs, &mounts).expect("mounts");
            assert_eq!(seen(&rootfs), [(rootfs.display().to_string(), "overlay".into())]);
        }
        assert_eq!(fs::read_to_string(rootfs.join("hello")).expect("the file"), "hi");
        let busy = File::open(rootfs.join("hello")).expect("the file");
        let error = blocking_unmount_all(&rootfs, Unmount::Clean).expect_err("in use");
        assert!(matches!(&error, MountError::Busy { path } if *path == rootfs), "{error}");
        drop(busy);
        for _ in 0..2 {
            unmount(&rootfs);
            assert_eq!(seen(&rootfs), []);
        }
        blocking_mount_all(&rootfs, &mounts).expect("mounts");
        let _busy = File::open(rootfs.join("hello")).expect("the file");
        blocking_unmount_all(&rootfs, Unmount::Detach).expect("out of sight");
        assert_eq!(seen(&rootfs), []);
        assert_eq!(blocking_unmount_all(&base.join("nowhere/rootfs"), Unmount::Clean).map_err(|e| e.to_string()), Ok(()));
    });
}

#[test]
fn an_overlay_with_more_lower_folders_than_fit_in_a_page_is_mounted() {
    in_private_namespace(|base| {
        let deep = "a-rather-long-name-as-the-roots-of-snapshotters-are/io.containerd.snapshotter.v1.overlayfs/snapshots";
        let lower: Vec<String> = (0..100).map(|n| base.join(deep).join(n.to_string()).join("fs").display().to_string()).collect();
        lower.iter().for_each(|folder| folders(Path::new("/"), &[folder]));
        fs::write(Path::new(&lower[99]).join("last"), "x").expect("a file");
        let before = std::env::current_dir().expect("a folder");
        let rootfs = base.join("rootfs");
        let data = format!("lowerdir={}", lower.join(":"));
        assert!(data.len() > 2 * 4096);
        blocking_mount_all(&rootfs, &[wanted("overlay", Path::new("overlay"), "", &[&data])]).expect("mounts");
        assert_eq!(fs::read_to_string(rootfs.join("last")).expect("the file"), "x");
        assert_eq!(std::env::current_dir().expect("a folder"), before);
        unmount(&rootfs);
        let data = format!("lowerdir=/:{}", lower.join(":"));
        let error = blocking_mount_all(&rootfs, &[wanted("overlay", Path::new("overlay"), "", &[&data])]).expect_err("too long");
        assert!(error.to_string().ends_with("its options are longer than the page that mount(2) takes"), "{error}");
    });
}

#[test]
fn a_bind_is_read_only_and_of_the_wanted_propagation_and_keeps_what_its_source_forbids() {
    in_private_namespace(|base| {
        folders(base, &["source/sub", "other"]);
        mount(Some("tmpfs"), &base.join("source"), Some("tmpfs"), MsFlags::MS_NOSUID, None::<&str>).expect("a tmpfs");
        folders(base, &["source/sub"]);
        mount(Some("tmpfs"), &base.join("source/sub"), Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("a tmpfs");
        let rootfs = base.join("rootfs");
        let mounts = [wanted("bind", &base.join("source"), "", &["rbind", "ro", "nodev", "rslave"])];
        for _ in 0..2 {
            blocking_mount_all(&rootfs, &mounts).expect("mounts");
            let line = fs::read_to_string(mountinfo::PATH).expect("a list");
            let line = line.lines().find(|line| line.contains(&format!(" {} ", rootfs.display()))).expect("the mount").to_owned();
            assert!(line.contains(" ro,nosuid,nodev,relatime "), "{line}");
            assert_eq!(seen(&rootfs).len(), 2);
        }
        assert_eq!(fs::write(rootfs.join("x"), "").map_err(|error| error.kind()), Err(io::ErrorKind::ReadOnlyFilesystem));
        unmount(&rootfs);
        assert_eq!(seen(&rootfs), []);
    });
}

#[test]
fn a_crash_after_any_mount_is_repaired_by_the_next_attempt() {
    in_private_namespace(|base| {
        folders(base, &["one/in", "two"]);
        let rootfs = base.join("rootfs");
        let mounts = [
            wanted("bind", &base.join("one"), "", &["bind"]),
            wanted("tmpfs", Path::new("tmpfs"), "/in", &["size=64k", "nosuid"]),
            wanted("bind", &base.join("two"), "in", &["bind", "ro"]),
        ];
        for count in 0..=3 {
            blocking_mount_all(&rootfs, &mounts[..count]).expect("some");
            blocking_mount_all(&rootfs, &mounts).expect("all");
            let inner = rootfs.join("in").display().to_string();
            assert_eq!(
                seen(&rootfs),
                [(rootfs.display().to_string(), "tmpfs".to_owned()), (inner.clone(), "tmpfs".into()), (inner, "tmpfs".into())]
            );
            unmount(&rootfs);
            assert_eq!(seen(&rootfs), []);
        }
    });
}

#[test]
fn links_lead_nowhere_but_below_rootfs() {
    in_private_namespace(|base| {
        folders(base, &["one/etc", "victim", "etc"]);
        symlink("/etc", base.join("one/link")).expect("a link");
        symlink(base.join("victim"), base.join("one/out")).expect("a link");
        symlink(base.join("victim"), base.join("rootlink")).expect("a link");
        let rootfs = base.join("rootfs");
        let bind = wanted("bind", &base.join("one"), "", &["bind"]);
        let tmpfs = |target: &str| wanted("tmpfs", Path::new("tmpfs"), target, &[]);
        blocking_mount_all(&rootfs, &[bind.clone(), tmpfs("link")]).expect("mounts");
        assert_eq!(seen(&rootfs)[1].0, rootfs.join("etc").display().to_string());
        unmount(&rootfs);
        for target in ["out", "../victim", "../../../victim"] {
            assert!(blocking_mount_all(&rootfs, &[bind.clone(), tmpfs(target)]).is_err(), "{target}");
            assert_eq!(seen(&base.join("victim")), []);
        }
        unmount(&rootfs);
        assert!(blocking_mount_all(&base.join("rootlink"), &[tmpfs("")]).is_err());
        // A mount is below a folder that turned into a link meanwhile: its name must not be followed either.
        mount(Some("tmpfs"), &base.join("victim"), Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("a tmpfs");
        blocking_unmount_all(&base.join("rootlink"), Unmount::Clean).expect("nothing to do");
        assert_eq!(seen(&base.join("victim")).len(), 1);
    });
}

#[test]
fn a_mount_that_hides_another_is_unmounted_with_it() {
    in_private_namespace(|base| {
        folders(base, &["one/in"]);
        let rootfs = base.join("rootfs");
        let bind = wanted("bind", &base.join("one"), "", &["bind"]);
        let tmpfs = |target: &str| wanted("tmpfs", Path::new("tmpfs"), target, &[]);
        blocking_mount_all(&rootfs, &[bind, tmpfs("in"), tmpfs("")]).expect("mounts");
        assert_eq!(seen(&rootfs).len(), 3);
        unmount(&rootfs);
        assert_eq!(seen(&rootfs), []);
    });
}

#[test]
fn an_image_is_mounted_through_a_loop_device_that_goes_away_with_it() {
    in_private_namespace(|base| {
        let image = base.join("image");
        fs::write(&image, vec![0; 2 << 20]).expect("a file");
        let made = std::process::Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image).status();
        if !Path::new("/dev/loop-control").exists() || !made.is_ok_and(|status| status.success()) {
            eprintln!("skipped: needs loop devices and mkfs.ext4");
            return;
        }
        let rootfs = base.join("rootfs");
        let mounts = [wanted("ext4", &image, "", &["loop", "ro", "direct-io"])];
        for _ in 0..2 {
            blocking_mount_all(&rootfs, &mounts).expect("mounts");
            assert_eq!(seen(&rootfs), [(rootfs.display().to_string(), "ext4".into())]);
        }
        assert!(rootfs.join("lost+found").is_dir());
        unmount(&rootfs);
        let is_backing = |device: fs::DirEntry| {
            fs::read_to_string(device.path().join("loop/backing_file")).is_ok_and(|file| file.trim().ends_with(&*image.to_string_lossy()))
        };
        // A child of another test that has not reached its exec yet keeps it for a moment.
        scratch::eventually("the loop device is gone", || !fs::read_dir("/sys/block").expect("devices").flatten().any(is_backing));
    });
}

#[test]
fn what_cannot_be_mounted_is_refused_with_a_sentence() {
    in_private_namespace(|base| {
        folders(base, &["one"]);
        let rootfs = base.join("rootfs");
        let shown = rootfs.display();
        let refusal = |mount: Mount| blocking_mount_all(&rootfs, &[mount]).expect_err("a refusal").to_string();
        for (mount, expected) in [
            (wanted("nosuchfs", Path::new("none"), "", &[]), format!("mount nosuchfs from \"none\" at {shown}")),
            (wanted("bind", Path::new("/no/such"), "", &["bind"]), format!("mount bind from \"/no/such\" at {shown}")),
            (
                wanted("fuse3.fuse-overlayfs", Path::new("overlay"), "", &[]),
                format!(
                    "mount fuse3.fuse-overlayfs at {shown}: file systems in user space need a helper program that this shim does not start"
                ),
            ),
            (wanted("ext4", &base.join("nofile"), "", &["loop"]), format!("attach a loop device to {}", base.join("nofile").display())),
            (wanted("tmpfs", Path::new("tmpfs"), "missing", &[]), format!("open {}", rootfs.join("missing").display())),
        ] {
            assert_eq!(refusal(mount), expected);
        }
        blocking_mount_all(&rootfs, &[wanted("tmpfs", Path::new("tmpfs"), "", &[])]).expect("mounts");
        assert_eq!(
            refusal(wanted("overlay", Path::new("overlay"), "", &["lowerdir=/x"])),
            format!("mount overlay at {shown}: tmpfs is mounted there already")
        );
    });
}

#[test]
fn files_belong_to_the_mapped_users() {
    use std::os::unix::fs::MetadataExt;
    in_private_namespace(|base| {
        folders(base, &["lower", "lower2", "upper", "work", "b"]);
        fs::write(base.join("lower/hello"), "hi").expect("a file");
        fs::write(base.join("lower2/deep"), "hi").expect("a file");
        let rootfs = base.join("b/rootfs");
        let at = |name: &str| base.join(name).display().to_string();
        let maps = ["uidmap=0:1000:100", "gidmap=0:2000:50,50:9000:50"];
        let overlay = [
            &format!("lowerdir={}:{}", at("lower"), at("lower2"))[..],
            &format!("upperdir={}", at("upper")),
            &format!("workdir={}", at("work")),
            maps[0],
            maps[1],
        ];
        // Leftovers of a crash in the middle do no harm.
        folders(base, &["b/x-staging/0"]);
        mount(Some("tmpfs"), &base.join("b/x-staging/0"), Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("a tmpfs");
        for (mount, file, kind) in [
            (wanted("overlay", Path::new("overlay"), "", &overlay), "deep", "overlay"),
            (wanted("bind", &base.join("lower"), "", &["bind", "ro", maps[0], maps[1]]), "hello", "tmpfs"),
            (wanted("tmpfs", Path::new("tmpfs"), "", &["size=64k", maps[0], maps[1]]), ".", "tmpfs"),
        ] {
            for _ in 0..2 {
                match blocking_mount_all(&rootfs, std::slice::from_ref(&mount)) {
                    Err(MountError::System { op: "map the users of", source: Errno::EINVAL, .. }) => {
                        eprintln!("skipped: this kernel does not map users of tmpfs");
                        return;
                    }
                    other => other.expect("mounts"),
                }
            }
            assert_eq!(seen(&base.join("b")), [(rootfs.display().to_string(), kind.to_owned())]);
            let about = rootfs.join(file).metadata().expect("the file");
            assert_eq!((about.uid(), about.gid()), (1000, 2000), "{mount:?}");
            assert!(!base.join("b/x-staging").exists());
            unmount(&rootfs);
        }
        let bad = wanted("bind", &base.join("lower"), "", &["bind", maps[0]]);
        let error = blocking_mount_all(&rootfs, &[bad]).expect_err("a refusal").to_string();
        assert!(error.ends_with("must both be given, as INSIDE:OUTSIDE:COUNT, more of them separated by commas"), "{error}");
        folders(base, &["b/x-staging/0"]);
        mount(Some("tmpfs"), &base.join("b/x-staging/0"), Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("a tmpfs");
        unmount(&rootfs);
        assert!(seen(&base.join("b")).is_empty() && !base.join("b/x-staging").exists());
    });
}

#[test]
fn a_mount_below_a_link_is_known_by_its_real_place() {
    in_private_namespace(|base| {
        folders(base, &["real/c1", "source"]);
        symlink(base.join("real"), base.join("link")).expect("a link");
        let rootfs = base.join("link/c1/rootfs");
        assert!(!blocking_is_mounted(&rootfs).expect("a list"));
        blocking_mount_all(&rootfs, &[wanted("bind", &base.join("source"), "", &["rbind"])]).expect("a mount");
        assert!(blocking_is_mounted(&rootfs).expect("a list"));
        unmount(&rootfs);
        assert!(!blocking_is_mounted(&rootfs).expect("a list"));
    });
}
