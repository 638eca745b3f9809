//! The numbers are those of rows in a list of failures that other programs had: each is about one of them.

mod bounds;
mod links;
mod whiteouts;

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
