//! An image's layers, from its blobs to snapshots, by the daemon's own services: as other clients do it that use no transfer.

use std::collections::HashMap;

use containerd_client::services::v1::ApplyRequest;
use containerd_client::services::v1::snapshots::{CommitSnapshotRequest, PrepareSnapshotRequest, StatSnapshotRequest};
use containerd_client::types::Descriptor;
use tonic::Code;

use crate::client::{Client, call, call_within};
use crate::error::{Error, Result};
use crate::image::{self, Manifest};
use crate::{content, create};

/// Unpacks the layers that are not unpacked yet. `client` holds a lease. `report` is called for each layer.
pub(crate) async fn unpack(client: &Client, manifest: &Manifest, snapshotter: &str, mut report: impl FnMut(&str)) -> Result<()> {
    let diff_ids = manifest.configuration.rootfs().diff_ids();
    if diff_ids.len() != manifest.layers.len() {
        let counts = format!("it has {} layers, and its configuration {}", manifest.layers.len(), diff_ids.len());
        return Err(Error::unreadable(format!("manifest {}", manifest.digest), counts));
    }
    let mut parent = String::new();
    for (index, (layer, diff_id)) in manifest.layers.iter().zip(diff_ids).enumerate() {
        let chain = image::chain_id(&diff_ids[..=index]);
        if !is_there(client, snapshotter, &chain).await? {
            apply(client, snapshotter, layer, diff_id, &parent, &chain).await?;
            report(&layer.digest);
        }
        // other clients find by this what a blob has in it
        content::label(client, &layer.digest, HashMap::from([(UNCOMPRESSED.to_owned(), diff_id.clone())])).await?;
        parent = chain;
    }
    // the configuration is what keeps the snapshots
    let label = HashMap::from([(format!("containerd.io/gc.ref.snapshot.{snapshotter}"), parent)]);
    content::label(client, &manifest.configuration_digest, label).await
}

async fn is_there(client: &Client, snapshotter: &str, chain: &str) -> Result<bool> {
    let request = client.request(StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: chain.to_owned() });
    match call(format!("look for snapshot {chain}"), client.api().snapshots().stat(request)).await {
        Ok(_) => Ok(true),
        Err(error) if error.code() == Some(Code::NotFound) => Ok(false),
        Err(error) => Err(error),
    }
}

async fn apply(client: &Client, snapshotter: &str, layer: &Descriptor, diff_id: &str, parent: &str, chain: &str) -> Result<()> {
    let key = format!("extract-xctl-{} {chain}", create::random()?);
    let labels = HashMap::from([("containerd.io/snapshot.ref".to_owned(), chain.to_owned())]);
    let request =
        PrepareSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.clone(), parent: parent.to_owned(), labels: labels.clone() };
    let prepared =
        call(format!("prepare a snapshot for layer {}", layer.digest), client.api().snapshots().prepare(client.request(request))).await;
    let mounts = match prepared {
        Ok(answer) => answer.mounts,
        // a snapshotter that has the layer in another way, or a daemon that has unpacked it by itself
        Err(error) if error.code() == Some(Code::AlreadyExists) && is_there(client, snapshotter, chain).await? => return Ok(()),
        Err(error) => return Err(error),
    };
    let applied = async {
        let request = ApplyRequest { diff: Some(layer.clone()), mounts, ..ApplyRequest::default() };
        let answer =
            call_within(APPLIED, format!("unpack layer {}", layer.digest), client.api().diff().apply(client.request(request))).await?;
        let found = answer.applied.map(|applied| applied.digest).unwrap_or_default();
        if found != diff_id {
            return Err(Error::unreadable(
                format!("layer {}", layer.digest),
                format!("it is {found} unpacked, and not {diff_id} as the image says"),
            ));
        }
        let request = CommitSnapshotRequest { snapshotter: snapshotter.to_owned(), name: chain.to_owned(), key: key.clone(), labels };
        match call(format!("commit snapshot {chain}"), client.api().snapshots().commit(client.request(request))).await {
            Err(error) if error.code() == Some(Code::AlreadyExists) => image::remove_snapshot(client, snapshotter, &key).await,
            committed => committed,
        }
    }
    .await;
    if applied.is_err() {
        // half a layer is of no use
        let _ = image::remove_snapshot(client, snapshotter, &key).await;
    }
    applied
}

const UNCOMPRESSED: &str = "containerd.io/uncompressed";
/// A layer may have gigabytes.
const APPLIED: std::time::Duration = std::time::Duration::from_secs(3600);
