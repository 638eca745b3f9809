use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use nix::mount::{MsFlags, mount};

use super::*;
use crate::layers::testing::{Archive, is_root, merge, new, view};
use crate::snapshots::in_own_mounts;

fn written(source: &Source<'_>, compression: Compression, times: Times) -> (Vec<u8>, Created) {
    let mut bytes = Vec::new();
    match create(&mut bytes, source, compression, times, &Cancel::default())
        .unwrap_or_else(|error| panic!("{}", crate::error::chain(&error)))
    {
        Change::Written(created) => (bytes, created),
        Change::NeedsMount => panic!("it needs a mount"),
    }
}

fn shell(folder: &Path, script: &str) {
    let ran = Command::new("sh").args(["-ec", script]).current_dir(folder).output().expect("a shell");
    assert!(ran.status.success(), "{script}: {}", String::from_utf8_lossy(&ran.stderr));
}

/// What a tree is made of before each of the changes.
const BEFORE: &str = "mkdir -p d/sub e; echo 1 > f; echo 2 > d/old; echo 3 > d/sub/deep; ln -s f s; ln f hard; chmod 1777 e; mkfifo p
    chown 5:6 d/old; touch -d @1000000000.5 f; mkdir -p stays; echo x > stays/file";

/// Changes, each with names that its layer has.
const CHANGES: &[(&str, &[&str])] = &[
    ("true", &[]),
    ("rm f hard", &[".wh.f", ".wh.hard"]),
    ("rm -r d", &[".wh.d"]),
    ("rm -r d; mkdir d; echo n > d/new", &["d/", "d/new"]),
    ("rm -r d; mkdir -p d/sub", &["d/", "d/sub/"]),
    ("rm -r d; echo n > d", &["d"]),
    ("rm s; mkdir s; echo n > s/x", &["s/", "s/x"]),
    ("chmod 700 d", &["d/"]),
    ("chmod 600 d/old", &["d/", "d/old"]),
    ("mkdir n; mkdir n/m; echo n > n/m/x; ln n/m/x n/y", &["n/", "n/m/", "n/m/x", "n/y"]),
    ("mv d/old d/new", &["d/", "d/.wh.old", "d/new"]),
    ("ln -sf d s", &["s"]),
    ("touch -d @5 d/old", &["d/", "d/old"]),
    ("echo 4 >> d/sub/deep", &["d/", "d/sub/", "d/sub/deep"]),
    ("chown 7 p; mknod c c 1 3", &["c", "p"]),
    ("rm d/sub/deep", &["d/", "d/sub/", "d/sub/.wh.deep"]),
    ("chmod 4755 f", &["f"]),
];

fn names(bytes: &[u8]) -> Vec<String> {
    let mut reader = crate::layers::tar::Reader::new(bytes, crate::layers::tar::Limits::default());
    let mut names = Vec::new();
    while let Some(entry) = reader.next().expect("an archive") {
        names.push(String::from_utf8_lossy(&entry.path).into_owned());
    }
    names
}

#[test]
fn a_layer_of_two_trees_makes_one_the_other() {
    if !is_root() {
        return;
    }
    for (change, expected) in CHANGES {
        let folder = scratch::Folder::new("trees");
        let (left, right) = (new(&folder, "left"), folder.join("right"));
        shell(&left, BEFORE);
        shell(&folder, "cp -a left right");
        shell(&right, change);
        let (bytes, created) = written(&Source::Trees(Some(&left), &right), Compression::Plain, Times::Seconds(None));
        let found = names(&bytes);
        for name in *expected {
            assert!(found.iter().any(|other| other == name), "{change}: {found:?}");
        }
        assert!(!found.iter().any(|name| name.starts_with("stays")), "{change}: {found:?}");
        let digest: [u8; 32] = Sha256::digest(&bytes).into();
        assert_eq!((created.diff_id, created.bytes), (digest, bytes.len() as u64));
        merge(&bytes, &left).unwrap_or_else(|error| panic!("{change}: {}", crate::error::chain(&error)));
        let plain = |path: &Path| -> Vec<String> {
            view(path).into_iter().map(|(name, text)| format!("{name} {}", text.split(" linked").next().unwrap_or_default())).collect()
        };
        assert_eq!(plain(&left), plain(&right), "{change}");
    }
}

#[test]
fn a_layer_of_an_upper_folder_makes_of_the_lower_one_what_was_mounted() {
    if !is_root() {
        return;
    }
    for (change, expected) in CHANGES {
        let folder = scratch::Folder::new("upper");
        let (lower, upper, work, point) = (new(&folder, "lower"), new(&folder, "upper"), new(&folder, "work"), new(&folder, "point"));
        shell(&lower, BEFORE);
        let (seen, mounted) = in_own_mounts(|| {
            let options = format!("index=off,lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
            mount(Some("overlay"), &point, Some("overlay"), MsFlags::empty(), Some(&*options)).expect("an overlay");
            shell(&point, change);
            let mounted = written(&Source::Trees(Some(&lower), &point), Compression::Plain, Times::Seconds(None)).0;
            Ok((view(&point), mounted))
        })
        .expect("a namespace");
        let lowers = Lowers::open(std::slice::from_ref(&lower)).expect("a folder");
        let (bytes, _) = written(&Source::Upper(&upper, lowers), Compression::Plain, Times::Seconds(None));
        let found = names(&bytes);
        for name in *expected {
            assert!(found.iter().any(|other| other == name), "{change}: {found:?}");
        }
        assert!(!found.iter().any(|name| name.starts_with("stays")), "{change}: {found:?}");
        for bytes in [bytes, mounted] {
            let target = folder.join("target");
            shell(&folder, "rm -rf target; cp -a lower target");
            merge(&bytes, &target).unwrap_or_else(|error| panic!("{change}: {}", crate::error::chain(&error)));
            let plain = |all: &std::collections::BTreeMap<String, String>| -> Vec<String> {
                all.iter().map(|(name, text)| format!("{name} {}", text.split(" linked").next().unwrap_or_default())).collect()
            };
            assert_eq!(plain(&view(&target)), plain(&seen), "{change}");
        }
    }
}

#[test]
fn the_same_trees_give_the_same_bytes_and_every_compression_the_same_layer() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("same");
    let tree = new(&folder, "tree");
    shell(&tree, BEFORE);
    let odd: Vec<u8> = (0x80..=0xff).chain(0x80..=0xfe).collect();
    fs::write(tree.join(std::ffi::OsStr::new(&*<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(odd))), "x")
        .expect("a file");
    symlink("y".repeat(3000), tree.join("long")).expect("a link");
    let source = || Source::Trees(None, &tree);
    let (plain, created) = written(&source(), Compression::Plain, Times::Seconds(None));
    for compression in [Compression::Plain, Compression::Gzip, Compression::Zstd] {
        let (once, again) = (written(&source(), compression, Times::Seconds(None)), written(&source(), compression, Times::Seconds(None)));
        assert_eq!(once, again);
        assert_eq!(once.1, created);
        let target = new(&folder, "target");
        let applied = merge(&once.0, &target).expect("applied");
        assert_eq!((applied.compression, applied.diff_id), (compression, created.diff_id));
        assert_eq!(view(&target), view(&tree));
        fs::remove_dir_all(&target).expect("removed");
    }
    let (early, _) = written(&source(), Compression::Plain, Times::Seconds(Some(7)));
    let target = new(&folder, "target");
    merge(&early, &target).expect("applied");
    let time = |name: &str| std::os::unix::fs::MetadataExt::mtime(&fs::symlink_metadata(target.join(name)).expect("it is there"));
    assert_eq!((time("f"), time("d/sub/deep"), time("s")), (7, 7, 7));
    assert!(names(&plain).is_sorted_by(|one, other| one.trim_end_matches('/').split('/').le(other.trim_end_matches('/').split('/'))));
    assert_eq!(Archive::default().end(), written(&Source::Trees(Some(&tree), &tree), Compression::Plain, Times::Seconds(None)).0);
}

#[test]
fn an_upper_folder_that_names_files_of_lower_ones_needs_a_mount() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("redirect");
    let (lower, upper, work, point) = (new(&folder, "lower"), new(&folder, "upper"), new(&folder, "work"), new(&folder, "point"));
    shell(&lower, BEFORE);
    in_own_mounts(|| {
        let folders = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        let options = format!("redirect_dir=on,index=off,{folders}");
        mount(Some("overlay"), &point, Some("overlay"), MsFlags::empty(), Some(&*options)).expect("an overlay");
        std::fs::rename(point.join("d"), point.join("moved")).expect("renamed, not copied");
        let lowers = Lowers::open(std::slice::from_ref(&lower)).expect("a folder");
        let changes = create(Vec::new(), &Source::Upper(&upper, lowers), Compression::Plain, Times::Seconds(None), &Cancel::default());
        assert_eq!(changes.expect("compared"), Change::NeedsMount);
        let (bytes, _) = written(&Source::Trees(Some(&lower), &point), Compression::Plain, Times::Seconds(None));
        let found = names(&bytes);
        assert!([".wh.d", "moved/", "moved/old", "moved/sub/deep"].iter().all(|name| found.iter().any(|other| other == name)), "{found:?}");
        Ok(())
    })
    .expect("a namespace");
}

#[test]
fn what_was_a_file_a_moment_ago_is_not_opened_if_it_is_none_any_more() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("no-file");
    let root = crate::layers::tree::open_root(&folder).expect("a folder");
    // /dev/zero, as a container can make it, and does while its files are read
    let device = rustix::fs::makedev(1, 5);
    rustix::fs::mknodat(&root, "device", rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::RUSR, device).expect("a device");
    rustix::fs::symlinkat("device", &root, "link").expect("a link");
    fs::write(folder.join("file"), "text").expect("a file");
    for name in ["device", "link"] {
        same::open_file(&root, name.as_bytes()).expect_err(name);
    }
    assert_eq!(io::read_to_string(same::open_file(&root, b"file").expect("a file")).expect("read"), "text");
}
