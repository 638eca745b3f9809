//! Images in the daemon's store: their names, their configuration, and a container's own snapshot of one.

use std::collections::HashMap;

use containerd_client::services::v1::snapshots::{
    MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, ViewSnapshotRequest,
};
use containerd_client::services::v1::{CreateRequest as CreateLeaseRequest, DeleteRequest as DeleteLeaseRequest, GetImageRequest, Image};
use containerd_client::types::Mount;
use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os};
use sha2::{Digest as _, Sha256};
use tonic::Code;

use crate::client::{Client, call};
use crate::content;
use crate::error::{Error, Result};

/// An image that is unpacked.
#[derive(Debug)]
pub(crate) struct Unpacked {
    /// The name in the store.
    pub(crate) name: String,
    /// Its configuration.
    pub(crate) configuration: ImageConfiguration,
    /// The snapshot of all its layers.
    pub(crate) chain: String,
}

/// What an image is on this machine.
#[derive(Debug)]
pub(crate) struct Manifest {
    /// Its own digest.
    pub(crate) digest: String,
    /// What containers get.
    pub(crate) configuration: ImageConfiguration,
    /// Lowest first.
    pub(crate) layers: Vec<containerd_client::types::Descriptor>,
}

/// The name that the store has for what people write: `busybox` is `docker.io/library/busybox:latest`.
pub(crate) fn full_name(text: &str) -> String {
    let (domain, rest) = match text.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" || first.chars().any(char::is_uppercase) => {
            (first, rest.to_owned())
        }
        _ => ("docker.io", text.to_owned()),
    };
    let domain = if domain == "index.docker.io" { "docker.io" } else { domain };
    let rest = if domain == "docker.io" && !rest.contains('/') { format!("library/{rest}") } else { rest };
    let last = rest.rsplit('/').next().unwrap_or_default();
    let tag = if last.contains([':', '@']) { "" } else { ":latest" };
    format!("{domain}/{rest}{tag}")
}

/// Finds an image, by the name as it is given or as Docker would complete it, and where it is unpacked.
pub(crate) async fn find(client: &Client, text: &str, snapshotter: &str) -> Result<Unpacked> {
    let image = get(client, text).await?;
    let target = image.target.as_ref().ok_or_else(|| Error::unreadable(format!("image {}", image.name), "it has no target"))?;
    let configuration = manifest(client, &image.name, &target.digest).await?.configuration;
    let chain = chain_id(configuration.rootfs().diff_ids());
    let stat = client.request(StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: chain.clone() });
    match call(format!("look for image {} in snapshotter {snapshotter}", image.name), client.api().snapshots().stat(stat)).await {
        Ok(_) => Ok(Unpacked { name: image.name, configuration, chain }),
        Err(error) if error.code() == Some(Code::NotFound) => Err(Error::refused(format!(
            "image {name} is not unpacked in snapshotter {snapshotter}; `xctl --namespace {namespace} pull {name}` unpacks it, \
             --snapshotter chooses another one",
            name = image.name,
            namespace = client.namespace()
        ))),
        Err(error) => Err(error),
    }
}

/// The record of an image, by the name as it is given or as Docker would complete it.
pub(crate) async fn get(client: &Client, text: &str) -> Result<Image> {
    lookup(client, text).await?.ok_or_else(|| {
        Error::refused(format!(
            "there is no image {full} in namespace {namespace}; `xctl --namespace {namespace} pull {full}` fetches it, `xctl images` lists those that \
             there are",
            full = full_name(text),
            namespace = client.namespace()
        ))
    })
}

/// The same, if there is one.
pub(crate) async fn lookup(client: &Client, text: &str) -> Result<Option<Image>> {
    let full = full_name(text);
    let names = if full == text { vec![full.as_str()] } else { vec![full.as_str(), text] };
    for name in &names {
        let request = client.request(GetImageRequest { name: (*name).to_owned() });
        match call(format!("get image {name}"), client.images().get(request)).await {
            Ok(answer) => {
                let image = answer.image.ok_or_else(|| Error::unreadable(format!("image {name}"), "the answer has no image"))?;
                return Ok(Some(image));
            }
            Err(error) if error.code() == Some(Code::NotFound) => {}
            Err(error) if error.code() == Some(Code::Unimplemented) => {
                return Err(Error::refused(format!(
                    "cannot use image {full}: this daemon has no image store; --rootfs FOLDER runs a root file system from disk"
                )));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// From the target of an image, through an index if it is one, to the manifest for this machine.
pub(crate) async fn manifest(client: &Client, name: &str, target: &str) -> Result<Manifest> {
    let mut digest = target.to_owned();
    for _level in 0..DEEPEST {
        let what = format!("manifest {digest} of image {name}");
        let bytes = content::read(client, &what, &digest).await?;
        let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|error| Error::unreadable(&what, error))?;
        if value.get("manifests").is_none() {
            let manifest = ImageManifest::from_reader(bytes.as_slice()).map_err(|error| Error::unreadable(&what, error))?;
            let configuration_digest = manifest.config().digest().to_string();
            let what = format!("configuration {configuration_digest} of image {name}");
            let bytes = content::read(client, &what, &configuration_digest).await?;
            let configuration = ImageConfiguration::from_reader(bytes.as_slice()).map_err(|error| Error::unreadable(what, error))?;
            let layers = manifest.layers().iter().map(wire).collect();
            return Ok(Manifest { digest, configuration, layers });
        }
        let index = ImageIndex::from_reader(bytes.as_slice()).map_err(|error| Error::unreadable(&what, error))?;
        let chosen = index.manifests().iter().find(|descriptor| is_for_this_machine(descriptor));
        let chosen = chosen.ok_or_else(|| Error::refused(format!("image {name} has nothing for {}/{}", Os::Linux, Arch::default())))?;
        digest = chosen.digest().to_string();
    }
    Err(Error::unreadable(format!("image {name}"), "its indexes are nested too deeply"))
}

/// The platform of this machine, as the API has it.
pub(crate) fn this_machine() -> containerd_client::types::Platform {
    let (os, architecture) = ("linux".to_owned(), Arch::default().to_string());
    containerd_client::types::Platform { os, architecture, ..containerd_client::types::Platform::default() }
}

fn wire(descriptor: &Descriptor) -> containerd_client::types::Descriptor {
    containerd_client::types::Descriptor {
        media_type: descriptor.media_type().to_string(),
        digest: descriptor.digest().to_string(),
        size: i64::try_from(descriptor.size()).unwrap_or(i64::MAX),
        annotations: descriptor.annotations().clone().unwrap_or_default(),
    }
}

fn is_for_this_machine(descriptor: &Descriptor) -> bool {
    let is_manifest = matches!(descriptor.media_type(), MediaType::ImageManifest | MediaType::ImageIndex)
        || descriptor.media_type().to_string().starts_with("application/vnd.docker.distribution.manifest");
    let fits = |platform: &oci_spec::image::Platform| *platform.os() == Os::Linux && *platform.architecture() == Arch::default();
    is_manifest && descriptor.platform().as_ref().is_none_or(fits)
}

/// The name of the snapshot that has these layers, lowest first.
pub(crate) fn chain_id(diff_ids: &[String]) -> String {
    let mut layers = diff_ids.iter();
    let first = layers.next().cloned().unwrap_or_default();
    layers.fold(first, |chain, layer| format!("sha256:{}", content::hex(&Sha256::digest(format!("{chain} {layer}")))))
}

/// Makes the writable snapshot of a container.
pub(crate) async fn prepare(client: &Client, snapshotter: &str, key: &str, parent: &str) -> Result<Vec<Mount>> {
    let request = client.request(PrepareSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        key: key.to_owned(),
        parent: parent.to_owned(),
        labels: HashMap::new(),
    });
    match call(format!("make snapshot {key} in snapshotter {snapshotter}"), client.api().snapshots().prepare(request)).await {
        Ok(answer) => Ok(answer.mounts),
        Err(error) if error.code() == Some(Code::AlreadyExists) => Err(Error::refused(format!(
            "a snapshot {key} exists in snapshotter {snapshotter}, perhaps of a container that is being made; --name chooses another name, \
             `ctr --namespace {} snapshots remove {key}` removes it",
            client.namespace()
        ))),
        Err(error) => Err(error),
    }
}

/// A snapshot to read from, under a name that is free again when its lease ends.
pub(crate) async fn view(client: &Client, snapshotter: &str, key: &str, parent: &str) -> Result<Vec<Mount>> {
    let request = client.request(ViewSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        key: key.to_owned(),
        parent: parent.to_owned(),
        labels: HashMap::new(),
    });
    Ok(call(format!("look into snapshot {parent}"), client.api().snapshots().view(request)).await?.mounts)
}

/// The mounts of a container's snapshot.
pub(crate) async fn mounts(client: &Client, snapshotter: &str, key: &str) -> Result<Vec<Mount>> {
    let request = client.request(MountsRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() });
    Ok(call(format!("get the mounts of snapshot {key}"), client.api().snapshots().mounts(request)).await?.mounts)
}

/// Removes a snapshot, if there is one.
pub(crate) async fn remove_snapshot(client: &Client, snapshotter: &str, key: &str) -> Result<()> {
    let request = client.request(RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() });
    match call(format!("remove snapshot {key}"), client.api().snapshots().remove(request)).await {
        Err(error) if error.code() != Some(Code::NotFound) => Err(error),
        _ => Ok(()),
    }
}

/// A lease for an hour at most: the daemon does not collect what its holder makes before a container refers to it.
pub(crate) async fn lease(client: &Client, id: &str) -> Result<Client> {
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs() + 3600;
    let labels = HashMap::from([("containerd.io/gc.expire".to_owned(), crate::output::time(seconds, 0))]);
    let request = client.request(CreateLeaseRequest { id: id.to_owned(), labels });
    call("create a lease", client.api().leases().create(request)).await?;
    client.with_lease(id)
}

/// Ends a lease.
pub(crate) async fn end_lease(client: &Client, id: &str) -> Result<()> {
    let request = client.request(DeleteLeaseRequest { id: id.to_owned(), sync: false });
    call("delete a lease", client.api().leases().delete(request)).await
}

/// An index of indexes is allowed, and rare.
const DEEPEST: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_completed_as_docker_does() {
        for (text, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("user/app", "docker.io/user/app:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app", "localhost:5000/app:latest"),
            ("registry.example.com/a/b:c", "registry.example.com/a/b:c"),
            ("busybox@sha256:00", "docker.io/library/busybox@sha256:00"),
        ] {
            assert_eq!(full_name(text), full);
        }
    }

    #[test]
    fn a_chain_id_is_folded_over_the_layers() {
        assert_eq!(chain_id(&["sha256:a".to_owned()]), "sha256:a");
        let two = chain_id(&["sha256:a".to_owned(), "sha256:b".to_owned()]);
        assert_eq!(two, format!("sha256:{}", content::hex(&Sha256::digest("sha256:a sha256:b"))));
    }
}
