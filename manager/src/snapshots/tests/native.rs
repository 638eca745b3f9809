//! Copies of trees.

use std::os::unix::fs::FileTypeExt as _;

use rustix::fs::{Mode, SeekFrom};

use super::*;
use crate::layers::{Cancel, copy_tree};

#[tokio::test]
async fn a_copy_has_every_file_as_it_is_whatever_its_name_means_in_a_layer() {
    let Some(f) = Fixture::new("native-all") else { return };
    let tree = writable(&f.prepare("native", "a", "", Kind::Active).await.expect("prepared"));
    for name in [".wh.file", "file", ".wh..wh..opq"] {
        fs::write(tree.join(name), name).expect("a file");
    }
    let hole = fs::File::create(tree.join("hole")).expect("a file");
    hole.set_len(1 << 40).expect("a hole");
    std::os::unix::fs::FileExt::write_all_at(&hole, b"middle", 1 << 39).expect("data");
    for (name, kind) in [("fifo", rustix::fs::FileType::Fifo), ("socket", rustix::fs::FileType::Socket)] {
        rustix::fs::mknodat(rustix::fs::CWD, tree.join(name), kind, Mode::RWXU, 0).expect("a special file");
    }
    rustix::fs::mknodat(rustix::fs::CWD, tree.join("null"), rustix::fs::FileType::CharacterDevice, Mode::RWXU, rustix::fs::makedev(1, 3))
        .expect("a device");
    std::os::unix::fs::chown(tree.join("file"), Some(7), Some(8)).expect("an owner");
    fs::set_permissions(tree.join("file"), fs::Permissions::from_mode(0o4751)).expect("a mode");
    rustix::fs::setxattr(tree.join("file"), "trusted.x", b"value", rustix::fs::XattrFlags::empty()).expect("an attribute");
    fs::create_dir_all(tree.join("d/e")).expect("folders");
    fs::hard_link(tree.join("file"), tree.join("d/e/link")).expect("a link");
    let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    fs::File::open(tree.join("d")).and_then(|folder| folder.set_modified(long_ago)).expect("a time");
    f.commit("native", "a", "one", "").await.expect("committed");
    let copy = writable(&f.prepare("native", "b", "one", Kind::Active).await.expect("prepared"));
    for name in [".wh.file", "file", ".wh..wh..opq"] {
        assert_eq!(fs::read_to_string(copy.join(name)).expect("it is there"), name);
    }
    let about = |path: &str| fs::symlink_metadata(copy.join(path)).expect("it is there");
    let (hole, file) = (about("hole"), about("file"));
    assert_eq!((hole.len(), hole.blocks() <= 16), (1 << 40, true), "{} blocks", hole.blocks());
    let opened = fs::File::open(copy.join("hole")).expect("it is there");
    assert_eq!(rustix::fs::seek(&opened, SeekFrom::Data(0)).expect("data"), 1 << 39);
    assert!(about("fifo").file_type().is_fifo() && about("socket").file_type().is_socket());
    assert_eq!(about("null").rdev(), rustix::fs::makedev(1, 3));
    assert_eq!((file.uid(), file.gid(), file.mode() & 0o7777), (7, 8, 0o4751));
    assert_eq!(about("d/e/link").ino(), file.ino());
    assert_eq!(about("d").modified().expect("a time"), long_ago, "not when its files were copied");
    let mut value = [0; 8];
    let length = rustix::fs::getxattr(copy.join("file"), "trusted.x", &mut value[..]).expect("an attribute");
    assert_eq!(&value[..length], b"value");
}

#[tokio::test]
async fn a_copy_ends_when_its_client_has_left_and_leaves_nothing() {
    let Some(f) = Fixture::new("native-gone") else { return };
    f.layer("native", "one", "").await;
    let gone = Cancel::default();
    drop(gone.guard());
    let new = New { key: "b".to_owned(), parent: "one".to_owned(), kind: Kind::Active, labels: HashMap::new(), lease: None };
    let error = f.snapshots.prepare_unless(&place("native"), new, gone).await.expect_err("it was cancelled");
    assert!(error.chain().contains("canceled"), "{}", error.chain());
    assert_eq!(f.numbers(Snapshotter::Native), ["1"]);
    // between two parts of one file, too
    let (from, to) = (f.folder.join("from"), f.folder.join("to"));
    for folder in [&from, &to] {
        fs::create_dir(folder).expect("a folder");
    }
    fs::write(from.join("large"), vec![7; 40 << 20]).expect("a file");
    let asked = std::cell::Cell::new(0);
    let stops = || asked.replace(asked.get() + 1) == 2;
    copy_tree(&from, &to, &stops).expect_err("it is to stop");
    assert!(asked.get() == 3);
}
