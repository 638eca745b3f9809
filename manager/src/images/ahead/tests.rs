use std::fs;
use std::time::Duration;

use containerd_client::services::v1::Lease as LeaseRow;
use containerd_client::services::v1::snapshots::Kind;

use super::adopt::Upper;
use super::*;
use crate::images::unpack::Unpacked;
use crate::images::unpack::tests::{Fixture, digest_of, layers, namespace, zipped};
use crate::snapshots::{Commit, New};
use crate::store::{leases, namespaces};

/// A client with a lease.
struct Client {
    ahead: Ahead,
    f: Fixture,
    alive: Option<watch::Sender<()>>,
    connection: Connection,
}

const LEASE: &str = "lease";

impl Client {
    async fn new(name: &str) -> Option<Self> {
        let f = Fixture::new(name)?;
        let ahead = Ahead::new(f.unpacker.clone(), true);
        let (alive, connection) = watch::channel(());
        let lease = LeaseRow { id: LEASE.to_owned(), created_at: None, labels: HashMap::new() };
        let written = f.unpacker.store.write(move |db| {
            namespaces::ensure(db, "n")?;
            leases::put(db, "n", LEASE, &lease)
        });
        written.await.expect("room");
        Some(Self { ahead, f, alive: Some(alive), connection })
    }

    fn seen(&self, digest: &Digest) {
        self.ahead.seen(&namespace(), Some(LEASE), Some(&self.connection), digest);
    }

    fn meant(&self) {
        self.ahead.meant(&namespace(), Some(LEASE), Some(&self.connection));
    }

    async fn settle(&self, chain: &Digest) -> bool {
        let place = Fixture::place(Snapshotter::Overlayfs);
        self.ahead.settle(&place, chain.as_str(), Some(LEASE), Some(&self.connection)).await;
        self.is_there(chain).await
    }

    async fn is_there(&self, chain: &Digest) -> bool {
        let place = Fixture::place(Snapshotter::Overlayfs);
        self.f.unpacker.snapshots.committed(&place, vec![chain.to_string()], None).await.expect("read") == [true]
    }

    /// Writes manifest and config, as a client that pulls.
    async fn image(&self, tars: &[Vec<u8>], blobs: &[Vec<u8>]) -> Plan {
        let manifest = self.f.image(tars, blobs).await;
        let plan = Plan::read(&self.f.unpacker.content, &namespace(), &manifest).await.expect("a plan");
        self.seen(&manifest);
        self.seen(&plan.config);
        plan
    }

    async fn prepare(&self, key: &str, parent: &str) -> Upper {
        let new = New { key: key.to_owned(), parent: parent.to_owned(), kind: Kind::Active, labels: HashMap::new(), lease: None };
        let mounts = self.f.unpacker.snapshots.prepare(&Fixture::place(Snapshotter::Overlayfs), new).await.expect("prepared");
        let option = |name: &str| mounts[0].options.iter().find_map(|option| option.strip_prefix(name));
        match option("upperdir=") {
            Some(upper) => {
                let below = option("lowerdir=").map(|lowers| lowers.split(':').map(Into::into).collect());
                Upper { tree: upper.into(), below }
            }
            None => Upper { tree: mounts[0].source.clone().into(), below: None },
        }
    }

    async fn commit(&self, key: &str, name: &Digest) {
        let commit = Commit { key: key.to_owned(), name: name.to_string(), parent: String::new(), labels: HashMap::new(), lease: None };
        self.f.unpacker.snapshots.commit(&Fixture::place(Snapshotter::Overlayfs), commit).await.expect("committed");
    }

    async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let waits = async {
            while !is_so(self) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        assert!(tokio::time::timeout(Duration::from_secs(20), waits).await.is_ok(), "{what}: {:?}", self.f.folders());
    }
}

fn zipped_all(tars: &[Vec<u8>]) -> Vec<Vec<u8>> {
    tars.iter().map(|tar| zipped(tar)).collect()
}

#[tokio::test]
async fn what_is_too_long_for_a_manifest_is_not_looked_at() {
    let Some(client) = Client::new("ahead-long").await else { return };
    let config = digest_of(b"config");
    for (spaces, is_looked_at) in [(0, true), (plan::LOOKED_AT_BYTES, false)] {
        let text = format!(r#"{{"config":{{"digest":"{config}","size":1}},"layers":[]}}{}"#, " ".repeat(spaces));
        let manifest = client.f.blob(text.as_bytes()).await;
        let found = plan::config_of(&client.f.unpacker.content, &namespace(), &manifest).await.expect("read");
        assert_eq!(found.is_some(), is_looked_at, "{spaces}");
    }
}

#[tokio::test]
async fn a_manifest_is_read_again_only_when_its_config_is_there() {
    let Some(client) = Client::new("ahead-again").await else { return };
    let missing = digest_of(b"config");
    let text = format!(r#"{{"config":{{"digest":"{missing}","size":6}},"layers":[]}}"#);
    let manifest = client.f.blob(text.as_bytes()).await;
    client.seen(&manifest);
    let key = (namespace(), LEASE.to_owned());
    lock(&client.ahead.0.sessions).get_mut(&key).expect("a session").mean();
    client.ahead.look(&key).await;
    let state = || lock(&client.ahead.0.sessions).get(&key).expect("a session").to_look_at();
    assert_eq!(state(), Some(vec![(manifest.clone(), Some(missing))]));
    // another read would find that it is gone
    client.f.unpacker.content.delete(&namespace(), &manifest, None).await.expect("deleted");
    let reads = client.ahead.0.examined.load(std::sync::atomic::Ordering::Relaxed);
    client.ahead.look(&key).await;
    assert_eq!(client.ahead.0.examined.load(std::sync::atomic::Ordering::Relaxed), reads);
    client.f.blob(b"config").await;
    client.ahead.look(&key).await;
    assert_eq!(client.ahead.0.examined.load(std::sync::atomic::Ordering::Relaxed), reads + 1);
}

#[tokio::test]
async fn nothing_is_unpacked_before_a_client_shows_that_it_unpacks_and_nothing_recorded_before_it_asks() {
    let Some(client) = Client::new("ahead").await else { return };
    let (tars, blobs) = (layers(), zipped_all(&layers()));
    let plan = client.image(&tars, &blobs).await;
    for blob in &blobs {
        client.seen(&client.f.blob(blob).await);
    }
    tokio::task::yield_now().await;
    assert!(lock(&client.ahead.0.sessions).values().all(|session| session.jobs.is_empty()));
    client.meant();
    client.until("drafts", |client| client.f.folders().len() >= 4).await;
    assert!(!client.is_there(&plan.layers[0].chain).await, "not asked for");
    assert!(client.settle(&plan.layers[0].chain).await);
    let top = plan.layers[4].chain.clone();
    assert!(client.is_there(&top).await, "those on it are recorded with it");
    let unpacked = Unpacked { config: plan.config.clone(), chain: Some(top), new_layers: 5 };
    let seen = client.f.seen(Snapshotter::Overlayfs, &unpacked).await;
    assert!(seen.contains_key("usr/bin/cat") && seen.contains_key("etc/other") && !seen.contains_key("etc/shadow"), "{seen:?}");
}

#[tokio::test]
async fn a_client_that_asks_first_and_has_everything_gets_it_unpacked_at_once() {
    let Some(client) = Client::new("ahead-asks").await else { return };
    let (tars, blobs) = (layers(), zipped_all(&layers()));
    let plan = client.image(&tars, &blobs).await;
    for blob in &blobs {
        client.f.blob(blob).await;
    }
    assert!(client.settle(&plan.layers[0].chain).await, "no sign before it was needed");
}

#[tokio::test]
async fn a_client_waits_for_what_arrives_and_for_nothing_else() {
    let Some(client) = Client::new("ahead-waits").await else { return };
    let (tars, blobs) = (layers(), zipped_all(&layers()));
    let plan = client.image(&tars, &blobs).await;
    client.meant();
    // it is not on its way: the client may be about to fetch it once it has its answer
    assert!(!client.settle(&plan.layers[0].chain).await);
    let mut writer = client.f.writer(&blobs[0]).await;
    let half = blobs[0].len() / 2;
    writer.write(blobs[0][..half].to_vec().into()).await.expect("written");
    let chain = plan.layers[0].chain.clone();
    {
        let mut asks = std::pin::pin!(client.settle(&chain));
        assert!(tokio::time::timeout(Duration::from_millis(200), asks.as_mut()).await.is_err(), "half of it is there");
        writer.write(blobs[0][half..].to_vec().into()).await.expect("written");
        assert!(tokio::time::timeout(Duration::from_millis(200), asks.as_mut()).await.is_err(), "its digest is not checked");
        writer.commit(0, None, HashMap::new()).await.expect("committed");
        assert!(asks.await);
    }
    assert!(!client.is_there(&plan.layers[1].chain).await);
}

#[tokio::test]
async fn a_write_that_is_cut_off_ends_the_wait_of_its_client() {
    let Some(client) = Client::new("ahead-cut").await else { return };
    let (tars, blobs) = (layers(), zipped_all(&layers()));
    let plan = client.image(&tars, &blobs).await;
    client.meant();
    let mut writer = client.f.writer(&blobs[0]).await;
    writer.write(blobs[0][..10].to_vec().into()).await.expect("written");
    let mut asks = std::pin::pin!(client.settle(&plan.layers[0].chain));
    assert!(tokio::time::timeout(Duration::from_millis(100), asks.as_mut()).await.is_err());
    drop(writer);
    assert!(!tokio::time::timeout(Duration::from_secs(10), asks).await.expect("it ends"));
}

#[tokio::test]
async fn the_end_of_a_connection_or_of_a_lease_leaves_nothing() {
    for ends_with_lease in [false, true] {
        let Some(mut client) = Client::new("ahead-ends").await else { return };
        let ahead = client.ahead.clone();
        let watching = tokio::spawn(async move { ahead.watch().await });
        let (tars, blobs) = (layers(), zipped_all(&layers()));
        client.image(&tars, &blobs).await;
        for blob in &blobs[..4] {
            client.f.blob(blob).await;
        }
        client.meant();
        // of the four, one says nothing without those below it, and its draft goes at once
        client.until("drafts", |client| client.f.folders().len() >= 3).await;
        if ends_with_lease {
            client.f.unpacker.store.remove(|db| leases::remove(db, "n", LEASE)).await.expect("removed");
        } else {
            client.alive = None;
        }
        client.f.eventually_empty().await;
        assert!(lock(&client.ahead.0.sessions).is_empty());
        watching.abort();
    }
}

#[tokio::test]
async fn a_layer_with_another_diff_id_is_left_to_its_client() {
    let Some(client) = Client::new("ahead-wrong").await else { return };
    let (mut tars, blobs) = (layers(), zipped_all(&layers()));
    tars.swap(1, 2);
    let plan = client.image(&tars, &blobs).await;
    for blob in &blobs {
        client.f.blob(blob).await;
    }
    assert!(client.settle(&plan.layers[0].chain).await, "that one is right");
    assert!(!client.settle(&plan.layers[1].chain).await && !client.is_there(&plan.layers[4].chain).await);
}

#[tokio::test]
async fn a_layer_that_is_unpacked_becomes_the_snapshot_that_a_client_applies_it_to() {
    let Some(client) = Client::new("ahead-adopt").await else { return };
    let (tars, blobs) = (layers(), zipped_all(&layers()));
    let plan = client.image(&tars, &blobs).await;
    client.meant();
    let mut below = String::new();
    for (number, blob) in blobs.iter().enumerate() {
        let upper = client.prepare(&format!("extract-{number}"), &below).await;
        let digest = client.f.blob(blob).await;
        let adopted = client.ahead.adopt(&namespace(), &digest, upper.clone()).await.expect("no error");
        // those that only the layers below explain are applied as ever
        let is_simple = !matches!(number, 2 | 3);
        assert_eq!(adopted.is_some(), is_simple, "{number}");
        if let Some(adopted) = adopted {
            assert_eq!((&adopted.diff_id, adopted.bytes), (&plan.layers[number].diff_id, tars[number].len() as u64));
            assert_eq!(digest_of(&tars[number]), adopted.diff_id);
            assert!(fs::read_dir(&upper.tree).expect("a folder").next().is_some());
        } else {
            let lowers = crate::layers::Lowers::open(&upper.below.clone().unwrap_or_default()).expect("folders");
            let target = crate::layers::Target::Upper(&upper.tree, lowers);
            crate::layers::apply(&**blob, target, crate::layers::LayerLimits::default(), &crate::layers::Cancel::default())
                .expect("applied");
        }
        let chain = plan.layers[number].chain.clone();
        client.commit(&format!("extract-{number}"), &chain).await;
        below = chain.to_string();
    }
    let unpacked = Unpacked { config: plan.config.clone(), chain: plan.layers.last().map(|layer| layer.chain.clone()), new_layers: 5 };
    let seen = client.f.seen(Snapshotter::Overlayfs, &unpacked).await;
    assert!(seen.contains_key("usr/bin/cat") && seen.contains_key("etc/other") && !seen.contains_key("hidden/old"), "{seen:?}");
    assert!(seen["tmp"].starts_with("40755 0:0") && !seen.contains_key("etc/.wh.nothing"), "{seen:?}");
    // what is left of the drafts goes
    client.until("folders", |client| client.f.folders().len() == 6).await;
}

#[tokio::test]
async fn two_clients_that_pull_one_image_have_it_unpacked_once() {
    let Some(client) = Client::new("ahead-two").await else { return };
    let (tars, blobs) = (layers(), zipped_all(&layers()));
    let plan = client.image(&tars, &blobs).await;
    for blob in &blobs {
        client.f.blob(blob).await;
    }
    let place = Fixture::place(Snapshotter::Overlayfs);
    let (top, lowest) = (plan.layers[4].chain.clone(), plan.layers[0].chain.clone());
    client.meant();
    let both = async {
        let other = client.ahead.settle(&place, top.as_str(), None, Some(&client.connection));
        tokio::join!(client.settle(&lowest), other)
    };
    assert!(both.await.0 && client.is_there(&top).await);
    client.until("one folder for each layer", |client| client.f.folders().len() == 5).await;
}

#[tokio::test]
async fn turned_off_it_does_nothing() {
    let Some(mut client) = Client::new("ahead-off").await else { return };
    client.ahead = Ahead::new(client.f.unpacker.clone(), false);
    let (tars, blobs) = (layers(), zipped_all(&layers()));
    let plan = client.image(&tars, &blobs).await;
    for blob in &blobs {
        client.f.blob(blob).await;
    }
    client.meant();
    assert!(!client.settle(&plan.layers[0].chain).await && client.f.folders().is_empty());
}
