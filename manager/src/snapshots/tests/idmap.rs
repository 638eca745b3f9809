//! Id-mapped snapshots.

use super::*;

fn mapped(map: &str) -> HashMap<String, String> {
    ["uid", "gid"].map(|kind| (format!("containerd.io/snapshot/{kind}mapping"), map.to_owned())).into()
}

async fn prepare(f: &Fixture, snapshotter: &str, key: &str, parent: &str, kind: Kind, map: &str) -> Result<Vec<Mount>> {
    let new = New { key: key.to_owned(), parent: parent.to_owned(), kind, labels: mapped(map), lease: None };
    f.snapshots.prepare(&place(snapshotter), new).await
}

#[tokio::test]
async fn an_id_mapped_snapshot_is_mounted_as_containerd_says_and_owned_by_who_is_root_in_it() {
    let Some(f) = Fixture::new("idmap") else { return };
    f.layer("overlayfs", "one", "").await;
    f.layer("overlayfs", "two", "one").await;
    if let Some(why) = f.snapshots.cannot_remap(Snapshotter::Overlayfs) {
        eprintln!("skipped: {why}");
        let (code, _) = sentence(prepare(&f, "overlayfs", "a", "two", Kind::Active, "0:1000:10").await);
        assert_eq!(code, tonic::Code::Unimplemented);
        return;
    }
    let map = "0:100000:65536";
    let expected = ["uidmap=0:100000:65536", "gidmap=0:100000:65536"];
    let active = prepare(&f, "overlayfs", "a", "two", Kind::Active, map).await.expect("prepared");
    assert_eq!((active[0].r#type.as_str(), &options(&active)[..2]), ("overlay", &expected[..]));
    let owner = fs::metadata(writable(&active)).expect("a folder");
    assert_eq!((owner.uid(), owner.gid()), (100_000, 100_000));
    let parent = fs::metadata(f.snapshots.tree(Snapshotter::Overlayfs, 2)).expect("a folder");
    assert_eq!(parent.uid(), 0, "the image's files stay as they are");
    for (key, parent) in [("v", "two"), ("w", "one")] {
        let view = prepare(&f, "overlayfs", key, parent, Kind::View, map).await.expect("prepared");
        assert_eq!(options(&view)[..2], expected);
    }
    let alone = prepare(&f, "overlayfs", "alone", "", Kind::Active, map).await.expect("prepared");
    assert_eq!(options(&alone), [expected[0], expected[1], "rw", "rbind"]);
    assert_eq!(fs::metadata(writable(&alone)).expect("a folder").uid(), 0, "all of it is mapped");
    for bad in ["0:1", "1:1000:10"] {
        assert_eq!(sentence(prepare(&f, "overlayfs", "b", "two", Kind::Active, bad).await).0, tonic::Code::InvalidArgument);
    }
    let (code, why) = sentence(prepare(&f, "native", "n", "", Kind::Active, map).await);
    assert_eq!((code, why.contains("cannot map users and groups")), (tonic::Code::Unimplemented, true), "{why}");
}
