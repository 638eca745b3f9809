//! What layers delete, and what they leave as it is below.

use super::*;

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
        // its own links, whose files are of lower layers
        (tar().link("d/l", "f").file("d/.wh..wh..opq", ""), all(&["d", "d/l", "f", "s"])),
        (tar().link("d/l", "f").file(".wh.d", ""), all(&["d", "d/l", "f", "s"])),
        (tar().link("d/sub/l", "f").file("d/.wh..wh..opq", ""), all(&["d", "d/sub", "d/sub/l", "f", "s"])),
        (tar().link("s/l", "f").file("d/.wh..wh..opq", ""), all(&["d", "d/l", "f", "s"])),
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
fn a_hard_link_to_what_its_layer_has_deleted_is_refused() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("deleted");
    let lower = new(&folder, "lower");
    let below = tar().folder("d").folder("d/sub").file("d/sub/old", "1").end();
    merge(&below, &lower).expect("applied");
    for mark in [".wh.d", "d/.wh..wh..opq", "d/.wh.sub", "d/sub/.wh..wh..opq", "d/sub/.wh.old", ".wh..wh..opq"] {
        let layer = tar().file(mark, "").link("l", "d/sub/old").end();
        let (merged, upper) = (new(&folder, "merged"), new(&folder, "upper"));
        merge(&below, &merged).expect("applied");
        for applied in [merge(&layer, &merged), overlay(&layer, &upper, &[&lower])] {
            let error = crate::error::chain(&applied.expect_err(mark));
            assert!(error.contains("\"l\": a hard link to \"d/sub/old\", which is not there"), "{mark}: {error}");
        }
        assert!(!upper.join("d/sub/old").is_file(), "{mark}");
        fs::remove_dir_all(&merged).and_then(|()| fs::remove_dir_all(&upper)).expect("removed");
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
