//! A proxy that this process serves itself: its answers are what a test says.

use super::*;

#[test]
fn a_proxys_keys_lead_back_to_numbers_of_their_namespace_alone() {
    assert_eq!(number_in("n", &key_of("n", 7, "a/b c")), Some(7));
    for foreign in ["n/7", "n/7/", "n/07/a", "n/-7/a", "n/x/a", "m/7/a", "nn/7/a", "7/a", "", "sha256:0f"] {
        assert_eq!(number_in("n", foreign), None, "{foreign}");
    }
}

#[test]
fn labels_are_inherited_as_in_containerd() {
    let labels: HashMap<_, _> =
        ["containerd.io/snapshot.ref", "containerd.io/snapshot/uidmapping", "containerd.io/snapshot.x", "containerd.io/gc.root", "other"]
            .map(|key| (key.to_owned(), "v".to_owned()))
            .into();
    let mut keys: Vec<_> = inherited(&labels).into_keys().collect();
    keys.sort();
    assert_eq!(keys, ["containerd.io/snapshot.ref", "containerd.io/snapshot/uidmapping"]);
}

#[tokio::test]
async fn a_proxy_that_is_gone_is_named_with_its_address() {
    let plugin = ProxyPlugin {
        name: "away".to_owned(),
        snapshotter: "away".to_owned(),
        address: "/nonexistent/s.sock".into(),
        platform: None,
        exports: BTreeMap::new(),
        capabilities: Vec::new(),
    };
    let proxies = all(&[plugin]);
    for _attempt in 0..2 {
        let error = proxies["away"].mounts("n", "n/1/a".to_owned()).await.expect_err("it is gone");
        assert_eq!(error.code(), Code::Unavailable);
        assert_eq!(error.chain(), "snapshotter away: cannot reach /nonexistent/s.sock: No such file or directory (os error 2)");
    }
    let has_left = AtomicBool::new(false);
    proxies["away"].remove_all(vec![("n".to_owned(), "n/1/a".to_owned())], &has_left).await;
    assert!(has_left.load(Ordering::Relaxed));
}
