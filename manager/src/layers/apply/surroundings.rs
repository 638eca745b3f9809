//! Layers where the process, its user or the file system is not as usual. The numbers are those of `tests.rs`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use nix::mount::{MsFlags, mount};

use crate::layers::tar::{Entry, Kind};
use crate::layers::testing::{Archive, entry, is_root, merge, new, overlay, view};
use crate::snapshots::in_own_mounts;

fn tar() -> Archive {
    Archive::default()
}

/// 53.
#[test]
fn the_umask_changes_no_mode() {
    if !is_root() {
        return;
    }
    let folder = |mode, path: &str| Entry { mode, ..entry(path, Kind::Folder) };
    let rest = |archive: Archive| {
        let set_id = Entry { mode: 0o6777, ..entry("d/f", Kind::File { size: 0 }) };
        archive.entry(&folder(0o1777, "d"), b"").entry(&set_id, b"").file("implicit/x", "").entry(&entry("d/p", Kind::Fifo), b"").end()
    };
    for (layer, root) in [(rest(tar().entry(&folder(0o555, "./"), b"")), "40555 0:0"), (rest(tar()), "40755 0:0")] {
        let mut seen: Vec<BTreeMap<String, String>> = Vec::new();
        for umask in [0, 0o027, 0o077] {
            let scratch = scratch::Folder::new("umask");
            let (merged, upper) = (new(&scratch, "merged"), new(&scratch, "upper"));
            // a mask of a thread's own
            in_own_mounts(|| {
                nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(umask));
                merge(&layer, &merged).expect("applied");
                overlay(&layer, &upper, &[]).expect("applied");
                Ok(())
            })
            .expect("a namespace");
            seen.extend([view(&merged), view(&upper)]);
        }
        assert!(seen.windows(2).all(|pair| pair[0] == pair[1]), "{seen:#?}");
        let modes =
            ["", "d", "d/f", "implicit", "implicit/x", "d/p"].map(|name| seen[0][name].split(' ').next().unwrap_or_default().to_owned());
        assert_eq!(seen[0][""], root);
        assert_eq!(modes[1..], ["41777", "106777", "40755", "100644", "10644"]);
    }
}

/// 59.
#[test]
fn attributes_that_a_file_system_does_not_take_are_left_out() {
    if !is_root() {
        return;
    }
    let scratch = scratch::Folder::new("attributes");
    let point = new(&scratch, "point");
    let xattrs = vec![(b"user.note".to_vec(), b"x".to_vec())];
    let layer = tar().entry(&Entry { xattrs, ..entry("f", Kind::File { size: 1 }) }, b"x").file("g", "y").end();
    in_own_mounts(|| {
        // which has none of users
        mount(Some("ramfs"), &point, Some("ramfs"), MsFlags::empty(), None::<&str>).expect("a file system");
        merge(&layer, &point).expect("it is applied without them");
        assert_eq!(fs::read_to_string(point.join("f")).expect("a file"), "x");
        assert!(point.join("g").exists());
        Ok(())
    })
    .expect("a namespace");
}

/// 68: as root of a user namespace, which makes no devices. Whiteouts are none since Linux 5.8, but nothing there may make a folder opaque.
#[test]
fn what_a_user_namespace_refuses_is_named() {
    const INNER: &str = "X_TEST_IN_USER_NAMESPACE";
    if let Ok(folder) = std::env::var(INNER) {
        let folder = Path::new(&folder);
        let refusal = |name: &str, layer: Archive| {
            let (lower, upper) = (folder.join("lower"), folder.join(name));
            fs::create_dir(&upper).expect("a folder");
            overlay(&layer.end(), &upper, &[&lower]).map(drop).map_err(|error| crate::error::chain(&error))
        };
        let device = refusal("device", tar().entry(&entry("dev/null", Kind::Char { major: 1, minor: 3 }), b"")).expect_err("no device");
        assert!(device.contains("\"dev/null\": a user namespace allows no devices"), "{device}");
        let opaque = refusal("opaque", tar().folder("d").file("d/.wh..wh..opq", "").file("d/new", "")).expect_err("nothing is opaque");
        assert!(opaque.contains("\"d\"") && opaque.contains("does not allow trusted.overlay.opaque"), "{opaque}");
        let owner = refusal("owner", tar().entry(&Entry { uid: 5, ..entry("theirs", Kind::Fifo) }, b"")).expect_err("no such user here");
        assert!(owner.contains("\"theirs\""), "{owner}");
        refusal("plain", tar().folder("d").file("d/new", "").file("d/.wh.old", "")).expect("a whiteout is a file of no device");
        return;
    }
    if !is_root() {
        return;
    }
    let scratch = scratch::Folder::new("user-namespace");
    fs::create_dir_all(scratch.join("lower/d")).expect("folders");
    fs::write(scratch.join("lower/d/old"), "").expect("a file");
    let name = format!("{}::what_a_user_namespace_refuses_is_named", module_path!().split_once("::").expect("a crate's").1);
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user"]).arg(std::env::current_exe().expect("a test")).args(["--exact", &name]);
    let ran = command.env(INNER, scratch.as_os_str()).output().expect("unshare");
    let output = format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    if output.contains("unshare failed") {
        eprintln!("skipped: {output}");
        return;
    }
    assert!(ran.status.success() && output.contains("1 passed"), "{output}");
}
