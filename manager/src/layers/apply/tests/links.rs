//! Names and links: where they lead, and never out of the layers.

use super::*;

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
