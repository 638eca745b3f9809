//! The numbers are those of rows in a list of failures that other programs had: each is about one of them.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use super::*;
use crate::layers::Beneath;
use crate::layers::tar::{BLOCK, Kind};
use crate::layers::testing::{Archive, entry, is_root, merge, new, overlay, view};
use crate::snapshots::in_own_mounts;

/// What is seen of layers, the lowest first: as overlays, and merged. Both must be the same.
fn seen(layers: &[Vec<u8>]) -> BTreeMap<String, String> {
    let folder = scratch::Folder::new("seen");
    let merged = new(&folder, "merged");
    let mut uppers: Vec<PathBuf> = Vec::new();
    for (number, layer) in layers.iter().enumerate() {
        merge(layer, &merged).unwrap_or_else(|error| panic!("merged: {}", crate::error::chain(&error)));
        let upper = new(&folder, &format!("upper{number}"));
        let lowers: Vec<&Path> = uppers.iter().rev().map(PathBuf::as_path).collect();
        if let Some(lower) = lowers.first() {
            // as snapshots are prepared
            let about = fs::metadata(lower).expect("a folder");
            std::os::unix::fs::chown(&upper, Some(about.uid()), Some(about.gid())).expect("an owner");
            fs::set_permissions(&upper, about.permissions()).expect("a mode");
        }
        overlay(layer, &upper, &lowers).unwrap_or_else(|error| panic!("overlay: {}", crate::error::chain(&error)));
        if number == 0 {
            // as snapshots are committed
            crate::layers::measure(&upper, Beneath::Nothing, &Cancel::default()).expect("measured");
        }
        uppers.push(upper);
    }
    let (overlaid, merged) = (mounted(&folder, &uppers), view(&merged));
    assert_eq!(plain(&overlaid), plain(&merged), "overlay on the left, merged on the right");
    merged
}

/// Without links between files, which are an overlay's own matter.
fn plain(all: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    all.iter().map(|(name, text)| (name.clone(), text.split(" linked to").next().unwrap_or_default().to_owned())).collect()
}

/// What is seen of upper folders, the lowest first, mounted on each other.
fn mounted(folder: &scratch::Folder, uppers: &[PathBuf]) -> BTreeMap<String, String> {
    // an overlay has two at least
    let lowers: Vec<_> = [new(folder, "none")].iter().chain(uppers).rev().map(|upper| upper.display().to_string()).collect();
    let point = new(folder, "point");
    let seen = in_own_mounts(|| {
        let options = format!("lowerdir={}", lowers.join(":"));
        mount(Some("overlay"), &point, Some("overlay"), MsFlags::empty(), Some(&*options)).expect("an overlay");
        Ok(view(&point))
    });
    seen.expect("a namespace")
}

/// What is seen of layers that were applied in any order, and put on each other afterwards.
fn put_together(layers: &[Vec<u8>]) -> BTreeMap<String, String> {
    let folder = scratch::Folder::new("together");
    let uppers: Vec<_> = (0..layers.len()).map(|number| new(&folder, &format!("upper{number}"))).collect();
    let apply = |(layer, upper): (&Vec<u8>, &PathBuf)| overlay(layer, upper, &[]).expect("applied").implicit;
    let mut implicit: Vec<_> = layers.iter().zip(&uppers).rev().map(apply).collect();
    implicit.reverse();
    for (number, upper) in uppers.iter().enumerate() {
        let below: Vec<_> = uppers[..number].iter().rev().cloned().collect();
        let lowers = Lowers::open(&below).expect("folders");
        crate::layers::rebase(upper, &lowers, &implicit[number]).expect("put right");
        let beneath = if number == 0 { Beneath::Nothing } else { Beneath::Layers(&lowers) };
        crate::layers::measure(upper, beneath, &Cancel::default()).expect("measured");
    }
    mounted(&folder, &uppers)
}

fn names(layers: &[Archive]) -> Vec<String> {
    let layers: Vec<_> = layers.iter().map(|layer| layer.clone().end()).collect();
    seen(&layers).into_keys().filter(|name| !name.is_empty()).collect()
}

fn tar() -> Archive {
    Archive::default()
}

#[test]
fn a_layer_cannot_leave_its_folder() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("escape");
    let host = new(&folder, "host");
    fs::write(host.join("precious"), "data").expect("a file");
    let before = view(&host);
    let up = "../".repeat(20);
    let host_text = host.display().to_string();
    for (archive, expected) in [
        (tar().file("../x", ""), "leads out"),
        (tar().file("a/../../x", ""), "leads out"),
        (tar().folder("a").link("a/l", "../../host/precious"), "leads out"),
        (tar().link("l", &format!("{host_text}/precious")), "not there"),
        (tar().symlink("l", &host_text).file("l/precious", "x"), ""),
        (tar().symlink("l", &format!("{up}{host_text}")).file("l/precious", "x").file("l/.wh..wh..opq", ""), "no folder there"),
        (tar().symlink("l", &host_text).file("l/.wh.precious", ""), ""),
        (tar().symlink("l", &format!("{host_text}/precious")).link("h", "l").file("h", "x"), ""),
        // an entry through a link of its own name
        (tar().symlink("precious", &format!("{host_text}/precious")).file("precious", "x"), ""),
        (tar().symlink("d", &host_text).folder("d"), ""),
        (tar().file(".wh.", ""), "whiteout of no file"),
        (tar().file(".wh..", ""), "whiteout of no file"),
        (tar().file("d/.wh...", ""), "whiteout of no file"),
        (tar().file(".wh.a/b", ""), "within a whiteout"),
        (tar().file([b'n'; 256], ""), "longer than 255"),
        (tar().file(b"n/".repeat(3000), ""), "4095"),
        (tar().folder("d").link("l", "d"), "hard link to a folder"),
        (tar().symlink("a", "b").symlink("b", "a").file("a/x", ""), "leads to itself"),
        (tar().file("f", "").file("f/x", ""), "needs a folder"),
        (tar().entry(&entry("/", Kind::Fifo), b""), "is a folder"),
    ] {
        for is_overlay in [false, true] {
            let target = new(&folder, "target");
            let bytes = archive.clone().end();
            let applied = if is_overlay { overlay(&bytes, &target, &[]) } else { merge(&bytes, &target) };
            match applied {
                Ok(_) => assert_eq!(expected, "", "it was applied"),
                Err(error) => {
                    let sentence = crate::error::chain(&error);
                    assert!(!expected.is_empty() && sentence.contains(expected), "{expected}: {sentence}");
                }
            }
            assert_eq!(view(&host), before, "{expected}");
            assert!(!folder.join("x").exists());
            fs::remove_dir_all(&target).expect("it is removed");
        }
    }
}

#[test]
fn absolute_names_are_below_the_layers_root() {
    if is_root() {
        assert_eq!(
            names(&[tar().folder("/ko-app").file("/ko-app/x", "y").file("./a//b/./c", "").file("d/../e", "")]),
            ["a", "a/b", "a/b/c", "e", "ko-app", "ko-app/x"]
        );
    }
}

/// 47 to 51.
#[test]
fn whiteouts_delete_what_is_below_and_nothing_of_their_own_layer() {
    if !is_root() {
        return;
    }
    let below = tar().folder("d").file("d/old", "1").folder("d/sub").file("d/sub/deep", "1").file("f", "1").symlink("s", "d");
    let all = |more: &[&str]| -> Vec<String> { more.iter().map(|name| (*name).to_owned()).collect() };
    for (layer, expected) in [
        (tar().file(".wh.d", ""), all(&["f", "s"])),
        (tar().file(".wh.s", ""), all(&["d", "d/old", "d/sub", "d/sub/deep", "f"])),
        (tar().file("d/.wh.old", "").file("d/new", ""), all(&["d", "d/new", "d/sub", "d/sub/deep", "f", "s"])),
        // in all orders
        (tar().file(".wh.d", "").folder("d").file("d/new", ""), all(&["d", "d/new", "f", "s"])),
        (tar().folder("d").file("d/new", "").file(".wh.d", ""), all(&["d", "d/new", "f", "s"])),
        (tar().folder("d").file(".wh.d", "").file("d/new", ""), all(&["d", "d/new", "f", "s"])),
        (tar().file("d/new", "").file(".wh.d", ""), all(&["d", "d/new", "f", "s"])),
        (tar().file(".wh.d", "").file("d/new", ""), all(&["d", "d/new", "f", "s"])),
        (tar().folder("d").file("d/.wh..wh..opq", "").file("d/new", ""), all(&["d", "d/new", "f", "s"])),
        (tar().folder("d").file("d/new", "").file("d/.wh..wh..opq", ""), all(&["d", "d/new", "f", "s"])),
        (tar().file("d/.wh..wh..opq", ""), all(&["d", "f", "s"])),
        (tar().file(".wh.d", "").folder("d").folder("d/sub"), all(&["d", "d/sub", "f", "s"])),
        (tar().folder("d").file("d/.wh..wh..opq", "").folder("d/sub"), all(&["d", "d/sub", "f", "s"])),
        (tar().file(".wh.f", "").file("f", "2"), all(&["d", "d/old", "d/sub", "d/sub/deep", "f", "s"])),
        (tar().file("f", "2").file(".wh.f", ""), all(&["d", "d/old", "d/sub", "d/sub/deep", "f", "s"])),
        (tar().link("l", "f").file(".wh.f", ""), all(&["d", "d/old", "d/sub", "d/sub/deep", "l", "s"])),
        // an opaque folder where there was a link to one: its target keeps its files
        (tar().file("s/.wh..wh..opq", ""), all(&["d", "d/old", "d/sub", "d/sub/deep", "f", "s"])),
        (tar().file(".wh..wh..opq", "").file("n", ""), all(&["n"])),
        (tar().file(".wh.none", ""), all(&["d", "d/old", "d/sub", "d/sub/deep", "f", "s"])),
        (
            tar().folder(".wh..wh.plnk").file(".wh..wh.plnk/1.2", "").file(".wh..wh.aufs", ""),
            all(&["d", "d/old", "d/sub", "d/sub/deep", "f", "s"]),
        ),
        // as overlayfs has them, from a copy of an upper folder
        (tar().entry(&entry("f", Kind::Char { major: 0, minor: 0 }), b""), all(&["d", "d/old", "d/sub", "d/sub/deep", "s"])),
        // only what is in the root
        (tar().file(".wh.old", ""), all(&["d", "d/old", "d/sub", "d/sub/deep", "f", "s"])),
    ] {
        println!("{}", String::from_utf8_lossy(&layer.0.iter().copied().filter(u8::is_ascii_graphic).take(80).collect::<Vec<_>>()));
        let once = names(&[below.clone(), layer.clone()]);
        assert_eq!(once, expected);
        let again = [below.clone().end(), layer.clone().end(), tar().end()];
        assert_eq!(seen(&again).len(), expected.len() + 1);
    }
}

#[test]
fn a_layer_applied_twice_gives_the_same() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("twice");
    let below = new(&folder, "below");
    merge(&tar().folder("d").file("d/old", "1").file("f", "1").end(), &below).expect("a layer");
    let layer = tar().file(".wh.f", "").folder("d").file("d/.wh..wh..opq", "").file("d/a", "x").link("d/b", "d/a").symlink("s", "d").end();
    let upper = new(&folder, "upper");
    let first = overlay(&layer, &upper, &[&below]).expect("applied");
    let once = view(&upper);
    let second = overlay(&layer, &upper, &[&below]).expect("applied");
    assert_eq!((view(&upper), second.diff_id), (once, first.diff_id));
}

/// 52, 53.
#[test]
fn a_folder_without_an_entry_is_like_the_one_below() {
    if !is_root() {
        return;
    }
    let mode = |mode, uid, path: &str| Entry { mode, uid, gid: uid, ..entry(path, Kind::Folder) };
    let below = tar().entry(&mode(0o1777, 5, "a"), b"").entry(&mode(0o750, 6, "a/b"), b"").entry(&mode(0o555, 7, "./"), b"");
    let seen = seen(&[below.clone().end(), tar().file("a/b/c", "").file("n/m/o", "").end()]);
    assert_eq!([&seen["a"], &seen["a/b"], &seen["n"], &seen["n/m"]], ["41777 5:5", "40750 6:6", "40755 0:0", "40755 0:0"]);
    // without knowing what is below: put right afterwards
    let folder = scratch::Folder::new("rebase");
    let (lower, upper) = (new(&folder, "lower"), new(&folder, "upper"));
    merge(&below.end(), &lower).expect("applied");
    let applied = overlay(&tar().file("a/b/c", "").file("n/m/o", "").end(), &upper, &[]).expect("applied");
    let named = |paths: &[&str]| paths.iter().map(|path| path.as_bytes().to_vec()).collect::<Vec<_>>();
    assert_eq!(applied.implicit, named(&["", "a", "a/b", "n", "n/m"]));
    assert_eq!(view(&upper)["a"], "40755 0:0");
    for _again in 0..2 {
        crate::layers::rebase(&upper, &Lowers::open(std::slice::from_ref(&lower)).expect("a folder"), &applied.implicit)
            .expect("it is put right");
        let seen = view(&upper);
        assert_eq!([&seen[""], &seen["a"], &seen["a/b"], &seen["n"]], ["40555 7:7", "41777 5:5", "40750 6:6", "40755 0:0"]);
    }
}

/// 54.
#[test]
fn hard_links_lead_to_files_of_their_layer_and_of_those_below() {
    if !is_root() {
        return;
    }
    let below = tar().folder("d").entry(&Entry { uid: 5, mode: 0o4711, ..entry("d/old", Kind::File { size: 1 }) }, b"1").end();
    let seen = seen(&[
        below,
        tar().file("a", "x").link("p/q/b", "./a").link("/c", "/p/q/b").link("e", "d/old").symlink("s", "a").link("t", "s").end(),
    ]);
    for name in ["p/q/b", "c"] {
        assert!(seen[name].contains("1 bytes") && seen[name].ends_with("linked to a"), "{seen:?}");
    }
    assert!(seen["e"].starts_with("104711 5:0 1 bytes") && seen["t"].contains("-> a"), "{seen:?}");
    let later_folder = scratch::Folder::new("later");
    let later = merge(&tar().link("a", "b").file("b", "").end(), &new(&later_folder, "x")).expect_err("its target is not there yet");
    assert!(crate::error::chain(&later).contains("\"a\""), "{later:?}");
}

/// 55, 56.
#[test]
fn a_parent_that_is_a_link_is_followed_within_the_layers() {
    if !is_root() {
        return;
    }
    let below = tar()
        .folder("usr")
        .folder("usr/bin")
        .file("usr/bin/sh", "1")
        .symlink("bin", "usr/bin")
        .symlink("abs", "/usr/bin")
        .symlink("far", "nowhere");
    let expected = ["abs", "bin", "far", "new", "new/x", "usr", "usr/bin", "usr/bin/sh", "usr/bin/x", "usr/bin/y"];
    assert_eq!(names(&[below.clone(), tar().file("bin/x", "2").file("abs/y", "2").file("new/x", "2")]), expected);
    // the same when the link is of the same layer, and leads to a folder that only a lower one has
    let below = tar().folder("usr").folder("usr/bin").file("usr/bin/sh", "1");
    assert_eq!(names(&[below, tar().symlink("bin", "usr/bin").file("bin/x", "2")]), ["bin", "usr", "usr/bin", "usr/bin/sh", "usr/bin/x"]);
}

/// 57.
#[test]
fn the_last_entry_of_a_name_counts() {
    if !is_root() {
        return;
    }
    let kinds: [fn(Archive) -> Archive; 6] = [
        |tar| tar.file("n", "data"),
        |tar| tar.folder("n").file("n/below", ""),
        |tar| tar.symlink("n", "other"),
        |tar| tar.link("n", "other"),
        |tar| tar.entry(&entry("n", Kind::Char { major: 1, minor: 3 }), b""),
        |tar| tar.entry(&entry("n", Kind::Fifo), b""),
    ];
    for first in kinds {
        for second in kinds {
            let alone = seen(&[second(tar().file("other", "o")).end()]);
            let in_one = seen(&[second(first(tar().file("other", "o"))).end()]);
            let in_two = seen(&[first(tar().file("other", "o")).end(), second(tar()).end()]);
            let names = |seen: &BTreeMap<String, String>| seen.keys().cloned().collect::<Vec<_>>();
            if !alone["n"].starts_with("40") || !in_one["n"].starts_with("40") {
                assert_eq!(in_one["n"].split(" linked").next(), alone["n"].split(" linked").next());
            }
            assert_eq!((names(&in_one), names(&in_two)), (names(&alone), names(&alone)));
        }
    }
}

/// 58, 59.
#[test]
fn set_id_bits_and_capabilities_stay_and_an_overlays_own_attributes_do_not() {
    if !is_root() {
        return;
    }
    let capability = vec![1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let xattrs = ["trusted.overlay.opaque", "trusted.overlay.redirect", "user.overlay.origin", "security.selinux"]
        .map(|key| (key.into(), b"y".to_vec()));
    let kept = [(b"security.capability".to_vec(), capability), (b"user.note".to_vec(), Vec::new())];
    let xattrs: Vec<_> = xattrs.into_iter().chain(kept).collect();
    let file = Entry { uid: 5, gid: 6, mode: 0o6755, xattrs: xattrs.clone(), ..entry("f", Kind::File { size: 2 }) };
    let folder = Entry { uid: 5, mode: 0o2755, xattrs: xattrs[..3].to_vec(), ..entry("d", Kind::Folder) };
    let seen = seen(&[tar().folder("d").file("d/old", "").end(), tar().entry(&file, b"xx").entry(&folder, b"").end()]);
    assert!(
        seen["f"].starts_with("106755 5:6 2 bytes")
            && seen["f"].contains("security.capability=\\x01\\x00\\x00\\x02")
            && seen["f"].ends_with("user.note="),
        "{seen:?}"
    );
    assert_eq!((&*seen["d"], seen.contains_key("d/old")), ("42755 5:0", true));
}

/// 64.
#[test]
fn times_are_the_entries_own_also_of_folders_and_links() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("times");
    let target = new(&folder, "target");
    let at = |path: &str, kind, seconds, nanos| Entry { mtime: Time { seconds, nanos }, ..entry(path, kind) };
    let layer = tar()
        .entry(&at("./", Kind::Folder, 5, 0), b"")
        .entry(&at("d", Kind::Folder, 1_000, 7), b"")
        .entry(&at("d/f", Kind::File { size: 0 }, -1, 0), b"")
        .entry(&at("d/s", Kind::Symlink { target: "f".into() }, 1 << 33, 999_999_999), b"")
        .link("d/l", "d/f")
        .end();
    merge(&layer, &target).expect("applied");
    let time = |path: &str| {
        let about = fs::symlink_metadata(target.join(path)).expect("it is there");
        (about.mtime(), about.mtime_nsec())
    };
    assert_eq!([time(""), time("d"), time("d/f"), time("d/s")], [(5, 0), (1_000, 7), (-1, 0), (1 << 33, 999_999_999)]);
}

/// 65, 66.
#[test]
fn every_member_and_frame_is_read_and_every_byte_is_hashed() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("framing");
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).and_then(|()| encoder.finish()).expect("memory")
    };
    let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 3).expect("memory");
    let skippable = [0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
    let plain = tar().file("a", [7; 3000]).file("b", "x").end();
    for behind in [0, 1, 10_240, 1 << 20] {
        let bytes = [&plain[..], &vec![9; behind]].concat();
        let parts: Vec<&[u8]> = vec![&bytes[..100], &bytes[100..700], b"", &bytes[700..]];
        let members: Vec<u8> = parts.iter().flat_map(|part| gzip(part)).collect();
        let frames: Vec<u8> = parts.iter().flat_map(|part| [&skippable[..], &zstd(part)].concat()).collect();
        for (compressed, compression) in [(bytes.clone(), Compression::Plain), (members, Compression::Gzip), (frames, Compression::Zstd)] {
            let target = new(&folder, "target");
            let applied = merge(&compressed, &target).unwrap_or_else(|error| panic!("{compression:?}: {}", crate::error::chain(&error)));
            let expected: [u8; 32] = <sha2::Sha256 as sha2::Digest>::digest(&bytes).into();
            assert_eq!((applied.diff_id, applied.bytes, applied.compression), (expected, bytes.len() as u64, compression));
            assert_eq!(view(&target).len(), 3);
            fs::remove_dir_all(&target).expect("removed");
        }
    }
    let target = new(&folder, "target");
    let unmarked = &plain[..plain.len() - 2 * BLOCK];
    assert_eq!(merge(unmarked, &target).expect("no end marker").bytes, unmarked.len() as u64);
    assert_eq!(merge(b"", &target).expect("nothing").bytes, 0);
    let whole = (gzip(&plain), zstd(&plain));
    for (damaged, expected) in [
        ([&whole.0[..], b"garbage"].concat(), "followed by something else"),
        ([&whole.1[..], b"garbage"].concat(), "followed by something else"),
        (whole.0[..whole.0.len() - 5].to_vec(), "cut off"),
        (whole.1[..whole.1.len() - 5].to_vec(), "cut off"),
    ] {
        let sentence = crate::error::chain(&merge(&damaged, &target).expect_err("damaged"));
        assert!(sentence.contains(expected), "{sentence}");
    }
}

/// 67.
#[test]
fn zeros_take_no_room_and_a_layer_too_long_is_refused() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("zeros");
    let target = new(&folder, "target");
    let mut data = vec![0; 8 << 20];
    data[5 << 20] = 1;
    let layer = tar().file("zeros", &data).raw(b'0', b"sparse", "", |_| {}, b"");
    let sparse = layer.pax(&[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"lastlog"),
        ("GNU.sparse.realsize", b"107374182400"),
    ]);
    let layer = sparse.raw(b'0', b"x", "00000001000", |_| {}, b"0\n").end();
    merge(&layer, &target).expect("applied");
    let about = |name: &str| fs::metadata(target.join(name)).expect("it is there");
    assert!(about("zeros").blocks() * 512 <= 128 << 10, "{}", about("zeros").blocks());
    assert!(fs::read(target.join("zeros")).expect("a file") == data);
    assert_eq!((about("lastlog").len(), about("lastlog").blocks()), (100 << 30, 0));
    let limits = LayerLimits { layer_bytes: 1 << 20, entries: 3 };
    let limited =
        |bytes: &[u8]| crate::error::chain(&apply(bytes, Target::Merged(&target), limits, &Cancel::default()).expect_err("too much"));
    assert!(limited(&layer).contains("longer than 1048576 bytes"));
    assert!(limited(&tar().file("a", "").file("b", "").file("c", "").file("d", "").end()).contains("more than 3 entries"));
    let huge = tar().pax(&[("GNU.sparse.size", b"99999999999999999"), ("GNU.sparse.map", b"0,0")]).raw(b'0', b"x", "", |_| {}, b"").end();
    assert!(crate::error::chain(&merge(&huge, &target).expect_err("too long")).contains("the limit is"));
}

/// 110.
#[test]
fn what_is_cancelled_ends() {
    let folder = scratch::Folder::new("cancel");
    let target = new(&folder, "target");
    let cancel = Cancel::default();
    struct Endless(Option<Cancel>, u64);
    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 += 1;
            // in the middle of a file
            if self.1 == 100 {
                drop(self.0.take().map(|cancel| cancel.guard()));
            }
            let head = Archive::default().raw(b'0', b"long", "77777777777", |_| {}, b"").0;
            let count = buffer.len().min(512);
            buffer[..count].copy_from_slice(if self.1 == 1 { &head[..count] } else { &[7; 512][..count] });
            Ok(count)
        }
    }
    // the first bytes are asked for alone
    let archive = Archive::default().raw(b'0', b"long", "77777777777", |_| {}, b"").0;
    let source = io::Cursor::new(archive).chain(Endless(Some(cancel.clone()), 1));
    let error = apply(source, Target::Merged(&target), LayerLimits::default(), &cancel).expect_err("cancelled");
    assert!(crate::error::chain(&error).contains("the client has gone"), "{error:?}");
}

/// What GNU tar writes of a tree is that tree again, in each of its formats.
#[test]
fn what_gnu_tar_writes_is_read() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("gnu");
    let source = new(&folder, "source");
    let long = "l".repeat(90);
    let deep = source.join(&long).join(&long);
    fs::create_dir_all(&deep).expect("folders");
    fs::write(deep.join("file"), "deep").expect("a file");
    fs::write(source.join("short"), "x").expect("a file");
    fs::hard_link(source.join("short"), source.join("hard")).expect("a link");
    symlink("short", source.join("soft")).expect("a link");
    let mut sparse = fs::File::create(source.join("sparse")).expect("a file");
    for at in 0..30 {
        std::io::Seek::seek(&mut sparse, std::io::SeekFrom::Start(at * 100_000 + 5)).expect("a place");
        sparse.write_all(&[u8::try_from(at).expect("small") + 1; 5000]).expect("data");
    }
    sparse.set_len(4_000_000).expect("a length");
    nix::unistd::mkfifo(&source.join("fifo"), nix::sys::stat::Mode::from_bits_truncate(0o620)).expect("a fifo");
    std::os::unix::fs::chown(source.join("fifo"), Some(70_000), Some(3)).expect("an owner");
    fs::set_permissions(source.join("short"), fs::Permissions::from_mode(0o4750)).expect("a mode");
    let expected = view(&source);
    for format in ["v7", "ustar", "oldgnu", "gnu", "pax"] {
        let versions: &[&str] = match format {
            "gnu" => &["", "1.0"],
            "pax" => &["", "0.0", "0.1", "1.0"],
            _ => &[""],
        };
        for version in versions {
            let mut tar = std::process::Command::new("tar");
            tar.arg("--numeric-owner").arg(format!("--format={format}")).arg("-C").arg(&source);
            if !version.is_empty() {
                tar.arg("--sparse").arg(format!("--sparse-version={version}"));
            }
            let mut left_out = Vec::new();
            if matches!(format, "v7") {
                // names of at most 99 bytes
                tar.arg(format!("--exclude={long}/{long}")).arg("--exclude=fifo");
                left_out = expected.keys().filter(|name| name.contains(&format!("{long}/")) || *name == "fifo").cloned().collect();
            }
            let made = tar.args(["-cf", "-", "."]).output().expect("GNU tar");
            assert!(made.status.success(), "{format}: {}", String::from_utf8_lossy(&made.stderr));
            let target = new(&folder, "target");
            merge(&made.stdout, &target).unwrap_or_else(|error| panic!("{format} {version}: {}", crate::error::chain(&error)));
            let found = view(&target);
            for (name, text) in &expected {
                if left_out.contains(name) {
                    continue;
                }
                let links = |text: &str| text.split(" linked").next().unwrap_or_default().to_owned();
                assert_eq!(links(&found[name]), links(text), "{format} {version} {name}");
            }
            assert_eq!(found.len() + left_out.len(), expected.len(), "{format} {version}");
            fs::remove_dir_all(&target).expect("removed");
        }
    }
}

/// Whatever layers have, in whatever order: an overlay of them shows what one tree shows to which they were all applied, also if they were
/// applied without knowing each other.
#[test]
fn overlays_and_merged_trees_show_the_same() {
    if !is_root() {
        return;
    }
    let mut seed = std::env::var("X_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(7_u64);
    let times = std::env::var("X_TIMES").ok().and_then(|times| times.parse().ok()).unwrap_or(1);
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).expect("31 bits") % below
    };
    let names = ["a", "b", "a/a", "a/b", "b/a", "b/b", "a/a/a", "a/b/a", "b/a/b"];
    for _round in 0..60 * times {
        let mut story = Vec::new();
        let layers: Vec<Vec<u8>> = (0..2 + random(3))
            .map(|number| {
                let mut layer = tar();
                for _entry in 0..random(7) {
                    let name = names[random(names.len())];
                    let (above, last) = name.rsplit_once('/').unwrap_or(("", name));
                    let slash = if above.is_empty() { "" } else { "/" };
                    let (what, next) = match random(7) {
                        0 | 1 => ("file", layer.clone().file(name, name)),
                        2 | 3 => ("folder", layer.clone().folder(name)),
                        4 => ("whiteout", layer.clone().file(format!("{above}{slash}.wh.{last}"), "")),
                        5 => ("opaque", layer.clone().file(format!("{name}/.wh..wh..opq"), "")),
                        _ => ("implicit", layer.clone().file(format!("{name}/x"), "y")),
                    };
                    // what no layer can have is refused by both, and not the subject
                    let folder = scratch::Folder::new("possible");
                    let (one, other) = (new(&folder, "one"), new(&folder, "other"));
                    if merge(&next.clone().end(), &one).is_ok() && overlay(&next.clone().end(), &other, &[]).is_ok() {
                        story.push(format!("{number}: {what} {name}"));
                        layer = next;
                    }
                }
                layer.end()
            })
            .collect();
        println!("{}", story.join(", "));
        assert_eq!(plain(&put_together(&layers)), plain(&seen(&layers)));
    }
}

/// `X_BENCH_MIB=512 cargo test --release … apply_in_figures -- --nocapture`: how fast layers are applied, without writing back.
#[test]
fn apply_in_figures() {
    let Some(mib) = std::env::var("X_BENCH_MIB").ok().and_then(|mib| mib.parse::<usize>().ok()) else { return };
    let folder = scratch::Folder::new("bench");
    // half of it can be compressed, as files of programs can
    let mut seed = 7_u64;
    let block: Vec<u8> = (0..1 << 20)
        .map(|at| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            if at / 64 % 2 == 0 { (seed >> 56) as u8 } else { (at / 100) as u8 }
        })
        .collect();
    for (name, size) in [("1 MiB", 1 << 20), ("16 KiB", 16 << 10), ("4 KiB", 4 << 10)] {
        let mut archive = tar().folder("d");
        for number in 0..(mib << 20) / size {
            if number % 500 == 0 {
                archive = archive.folder(format!("d/{}", number / 500));
            }
            let at = number * 4096 % (block.len() - size + 1);
            archive = archive.file(format!("d/{}/{number}", number / 500), &block[at..at + size]);
        }
        let plain = archive.end();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(&plain).expect("memory");
        let compressed =
            [("plain", plain.clone()), ("gzip", gzip.finish().expect("memory")), ("zstd", zstd::encode_all(&*plain, 3).expect("memory"))];
        for (kind, bytes) in compressed {
            let target = new(&folder, "target");
            let begin = std::time::Instant::now();
            overlay(&bytes, &target, &[]).expect("applied");
            let took = begin.elapsed();
            let rate = plain.len() as f64 / took.as_secs_f64() / f64::from(1 << 20);
            let begin = std::time::Instant::now();
            rustix::fs::syncfs(tree::open_root(&target).expect("a folder")).expect("written back");
            let synced = begin.elapsed();
            println!("files of {name}, {kind}: {} MiB compressed, {took:.2?}, {rate:.0} MiB/s; syncfs {synced:.2?}", bytes.len() >> 20);
            fs::remove_dir_all(&target).expect("removed");
        }
    }
}

#[test]
fn a_link_to_a_file_of_a_lower_layer_copies_no_holes() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("copied-holes");
    let (lower, upper) = (new(&folder, "lower"), new(&folder, "upper"));
    let file = fs::File::create(lower.join("sparse")).expect("a file");
    let length = 1 << 30;
    std::os::unix::fs::FileExt::write_all_at(&file, b"within", length / 2).expect("data");
    file.set_len(length).expect("a length");
    overlay(&Archive::default().link("link", "sparse").end(), &upper, &[&lower]).expect("applied");
    let about = fs::metadata(upper.join("link")).expect("a file");
    assert_eq!((about.len(), about.nlink()), (length, 2));
    assert!(about.blocks() * 512 < 1 << 20, "{} blocks", about.blocks());
    let mut found = [0; 8];
    let copy = fs::File::open(upper.join("link")).expect("a file");
    std::os::unix::fs::FileExt::read_exact_at(&copy, &mut found, length / 2 - 1).expect("data");
    assert_eq!(&found, b"\0within\0");
}

#[test]
fn links_to_files_of_lower_layers_copy_no_more_than_a_layer_may_have() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("copied-bytes");
    let (lower, upper) = (new(&folder, "lower"), new(&folder, "upper"));
    for name in ["a", "b", "c"] {
        fs::write(lower.join(name), [1; 20_000]).expect("a file");
    }
    let layer = Archive::default().link("x", "a").link("y", "b").link("z", "c").end();
    let limits = LayerLimits { layer_bytes: 50_000, ..LayerLimits::default() };
    let lowers = Lowers::open(std::slice::from_ref(&lower)).expect("a folder");
    let error = apply(&layer[..], Target::Upper(&upper, lowers), limits, &Cancel::default()).expect_err("too much");
    assert!(error.to_string().contains("\"c\": with it, links to files of lower layers need more bytes"), "{error}");
    assert!(upper.join("y").exists() && !upper.join("z").exists());
}

#[test]
fn names_of_folders_that_a_layer_has_kept_in_memory_are_bounded() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("names");
    for (kind, path) in [(Kind::Fifo, "a/b/c/d/f"), (Kind::Folder, "folder")] {
        let root = tree::open_root(&new(&folder, path.get(..1).expect("a name"))).expect("a folder");
        let bounds = Bounds { copied: 0, names: 4 * (NAME_COSTS + 8), cancel: Cancel::default() };
        let mut layer = Layer::new(root, Lowers::default(), false, bounds);
        let mut reader = Reader::new(io::empty(), Limits::default());
        let mut refusals =
            (0..8).map(|number| layer.entry(&entry(format!("{number}/{path}"), kind.clone()), &mut reader)).skip_while(Result::is_ok);
        let error = refusals.next().expect("a refusal").expect_err("the first");
        assert!(error.to_string().contains("names of folders up to it have more than"), "{error}");
    }
}

/// Bytes whose reader's priority is looked at.
struct Looked<'b>(&'b [u8], std::sync::mpsc::Sender<Option<i32>>);

impl std::io::Read for Looked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let stat = fs::read_to_string("/proc/thread-self/stat")?;
        // behind the name, which may have spaces
        let nice = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(16)).and_then(|nice| nice.parse().ok());
        let _ = self.1.send(nice);
        let count = self.0.len().min(buffer.len()).min(100);
        buffer[..count].copy_from_slice(&self.0[..count]);
        self.0 = &self.0[count..];
        Ok(count)
    }
}

#[test]
fn a_layer_is_applied_at_a_lower_priority_than_the_thread_that_asks_for_it() {
    let folder = scratch::Folder::new("priority");
    let upper = new(&folder, "upper");
    let layer = Archive::default().file("a", "x".repeat(1000)).end();
    let nice = || -> i32 {
        let stat = fs::read_to_string("/proc/thread-self/stat").expect("a thread");
        stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(16)).and_then(|nice| nice.parse().ok()).expect("a number")
    };
    let own = nice();
    let (looked, seen) = std::sync::mpsc::channel();
    apply(Looked(&layer, looked), Target::Merged(&upper), LayerLimits::default(), &Cancel::default()).expect("applied");
    let last = seen.iter().last().flatten().expect("it was read");
    assert!(last >= own.max(10), "{last}");
    assert_eq!(nice(), own, "this thread is as before");
}

/// The same bytes for ever.
struct Endless {
    bytes: Vec<u8>,
    at: usize,
}

impl std::io::Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = (self.bytes.len() - self.at).min(buffer.len());
        buffer[..count].copy_from_slice(&self.bytes[self.at..self.at + count]);
        self.at = (self.at + count) % self.bytes.len();
        Ok(count)
    }
}

#[test]
fn a_layer_of_which_nothing_comes_ends_when_it_is_cancelled() {
    let folder = scratch::Folder::new("endless");
    let upper = new(&folder, "upper");
    let empty = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()).finish().expect("memory");
    // a frame of zstd that is skipped
    let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0][..], &[0; 4]].concat();
    for bytes in [empty, skipped] {
        let cancel = Cancel::default();
        let (cancels, target) = (cancel.guard(), upper.clone());
        let (done, ends) = std::sync::mpsc::channel();
        let begun = Endless { bytes: bytes.repeat(1000), at: 0 };
        std::thread::spawn(move || {
            let applied = apply(begun, Target::Merged(&target), LayerLimits::default(), &cancel);
            let _ = done.send(applied.is_err());
        });
        std::thread::sleep(std::time::Duration::from_millis(50));
        drop(cancels);
        assert_eq!(ends.recv_timeout(std::time::Duration::from_secs(20)), Ok(true));
    }
}

#[test]
fn a_deep_folder_costs_as_much_as_it_is_deep() {
    let folder = scratch::Folder::new("deep");
    let (lower, upper) = (new(&folder, "lower"), new(&folder, "upper"));
    let deep = |name: &str| vec![name; 2000].join("/");
    let mut archive = Archive::default();
    for name in ["a", "b", "c", "d", "e"] {
        archive = archive.file(deep(name), "x");
    }
    let archive = archive.end();
    merge(&archive, &lower).expect("applied");
    let begin = std::time::Instant::now();
    overlay(&archive, &upper, &[&lower]).expect("applied");
    // from the root again for each folder of them, it took a minute
    assert!(begin.elapsed() < std::time::Duration::from_secs(15), "{:?}", begin.elapsed());
    tree::remove(tree::open_root(&folder).expect("a folder").as_fd(), b"upper").expect("removed");
    tree::remove(tree::open_root(&folder).expect("a folder").as_fd(), b"lower").expect("removed");
}

#[test]
fn a_link_in_a_path_may_lead_up_again() {
    let folder = scratch::Folder::new("up");
    let upper = new(&folder, "upper");
    let lowest = Archive::default().folder("a").folder("a/b").symlink("a/b/up", "../../x/./y").symlink("a/top", "/").folder("x").end();
    merge(&lowest, &upper).expect("applied");
    let layer = Archive::default().file("a/b/up/z/file", "1").file("a/top/w/file", "2").end();
    merge(&layer, &upper).expect("applied");
    assert_eq!(fs::read_to_string(upper.join("x/y/z/file")).expect("a file"), "1");
    assert_eq!(fs::read_to_string(upper.join("w/file")).expect("a file"), "2");
}

#[test]
fn a_deep_tree_is_measured_and_removed_with_few_descriptors() {
    let folder = scratch::Folder::new("descriptors");
    let target = new(&folder, "target");
    merge(&Archive::default().file(vec!["a"; 1500].join("/"), "x").end(), &target).expect("applied");
    let measured = crate::layers::measure(&target, Beneath::Known, &Cancel::default()).expect("measured");
    assert_eq!(measured.inodes, 1501, "the root and all in it");
    let most = std::cell::Cell::new(0);
    let count = || most.set(most.get().max(fs::read_dir("/proc/self/fd").expect("descriptors").count()));
    let mut keeps = |_stat: &Stat| {
        count();
        false
    };
    tree::clear(tree::open_root(&target).expect("a folder"), &mut keeps, &|| false).expect("removed");
    assert!(most.get() < 700, "{} descriptors", most.get());
    assert_eq!(fs::read_dir(&target).expect("a folder").count(), 0);
}
