//! The Transfer service: archives that are imported.

use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, bail, ensure};
use containerd_client::events::ContentCreate;
use containerd_client::services::v1::SubscribeRequest;
use containerd_client::to_any;
use containerd_client::types::transfer::{ImageImportStream, ImageReference, ImageStore};
use prost::Message as _;
use serde_json::{Value, json};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::transfers::{
    OCI_LAYER, OCI_MANIFEST, Parts, header, image, import, import_store, import_with, labels, names, nothing_is_left, own, remove, sha256,
    snapshots, tar, this_machine, transfer,
};
use shim_tests::upload::{refused, store as store_blob};
use tonic::Code;

/// An archive as Docker before 25 writes it.
fn docker_archive(files: &[(&str, &[u8])], links: &[(&str, &str)], config: &[u8], manifest: &Value) -> Vec<u8> {
    let mut archive = tar(files);
    archive.truncate(archive.len() - 1024);
    for (name, target) in links {
        archive.extend(header(name, 0, b'2', target));
    }
    archive.extend(tar(&[("config.json", config), ("manifest.json", manifest.to_string().as_bytes())]));
    archive
}

pub(crate) async fn archives_of_docker_and_of_tools_are_imported(cx: Context) -> Result<()> {
    let client = cx.client();
    let (one, other) = (own(&cx, "one"), own(&cx, "other"));
    let layers = [tar(&[(&one, b"1")]), tar(&[(&other, b"2")])];
    let ids: Vec<_> = layers.iter().map(|layer| sha256(layer)).collect();
    let rootfs = json!({ "type": "layers", "diff_ids": [ids[0], ids[1], ids[0]] });
    let config = json!({ "architecture": this_machine().architecture, "os": "linux", "rootfs": rootfs }).to_string();
    // the third layer is a link to the first, as old versions of Docker write it
    let files = [("0a/layer.tar", layers[0].as_slice()), ("0b/layer.tar", &layers[1]), ("0b/VERSION", b"1.0"), ("repositories", b"{}")];
    let saved =
        |tags: Value| json!([{ "Config": "config.json", "RepoTags": tags, "Layers": ["0a/layer.tar", "0b/layer.tar", "0c/layer.tar"] }]);
    let with = |tags: Value| docker_archive(&files, &[("0c/layer.tar", "../0a/layer.tar")], config.as_bytes(), &saved(tags));
    import(client, with(json!(["local:1", "h.example/x"])), import_store()).await?;
    ensure!(names(client).await? == ["docker.io/library/local:1", "h.example/x:latest"], "{:?}", names(client).await?);
    ensure!(snapshots(client).await?.len() == 3);
    for name in names(client).await? {
        remove(client, &name).await?;
    }
    nothing_is_left(client).await?;
    // with its layers compressed
    let compress = ImageImportStream { force_compress: true, ..ImageImportStream::default() };
    import_with(client, with(json!(["local:1"])), import_store(), compress).await?;
    let target = image(client, "docker.io/library/local:1").await?.target.context("a target")?;
    let layer = labels(client, &json!(target.digest)).await?["containerd.io/gc.ref.content.l.0"].clone();
    let uncompressed = labels(client, &json!(layer)).await?["containerd.io/uncompressed"].clone();
    ensure!(layer != ids[0] && uncompressed == ids[0] && snapshots(client).await?.len() == 3, "{layer} {uncompressed}");
    remove(client, "docker.io/library/local:1").await?;
    nothing_is_left(client).await?;
    // without a name, by its digest
    import(client, with(Value::Null), import_store()).await?;
    let [name] = &names(client).await?[..] else { bail!("one image") };
    ensure!(name.starts_with("p@sha256:"), "{name}");
    remove(client, name).await?;
    // a tag alone
    let mut parts = Parts::default();
    let mut tagged = parts.image(&this_machine().architecture, &[&own(&cx, "tagged")]);
    tagged["annotations"] = json!({ "org.opencontainers.image.ref.name": "7" });
    let whole = ImageStore { name: "index".to_owned(), ..import_store() };
    import(client, parts.layout(&[tagged]), whole).await?;
    ensure!(names(client).await? == ["index", "p:7"]);
    // and another name for it, which may be another image's
    for _ in 0..2 {
        let (from, to) = (
            ImageStore { name: "p:7".to_owned(), ..ImageStore::default() },
            ImageStore { name: "index".to_owned(), ..ImageStore::default() },
        );
        transfer(client, to_any(&from), to_any(&to), "").await?;
    }
    ensure!(image(client, "index").await?.target == image(client, "p:7").await?.target);
    for name in ["index", "p:7"] {
        remove(client, name).await?;
    }
    nothing_is_left(client).await
}

pub(crate) async fn an_archive_that_is_wrong_is_refused_and_leaves_nothing(cx: Context) -> Result<()> {
    let client = cx.client();
    let mut parts = Parts::default();
    let architecture = this_machine().architecture;
    let mut entry = parts.image(&architecture, &[&own(&cx, "layer")]);
    entry["annotations"] = json!({ "io.containerd.image.name": "example.com/x:1" });
    let whole = parts.layout(&[entry.clone()]);
    let layer = parts.blobs.iter().find(|(_, (media_type, _))| media_type == OCI_LAYER).map(|(digest, _)| digest.clone());
    let layer = layer.context("a layer")?;
    let mut lacking = parts.clone();
    lacking.blobs.remove(&layer);
    let mut flipped = parts.clone();
    flipped.blobs.get_mut(&layer).context("a layer")?.1[0] ^= 1;
    let config =
        json!({ "architecture": architecture, "os": "linux", "rootfs": { "type": "layers", "diff_ids": [sha256(b"x")] } }).to_string();
    let saved = |layers: Value| json!([{ "Config": "config.json", "RepoTags": ["local:1"], "Layers": layers }]);
    let of_docker = |links: &[(&str, &str)], layers: Value| docker_archive(&[], links, config.as_bytes(), &saved(layers));
    let long = json!({ "x": "x".repeat(9 << 20) }).to_string();
    for (what, archive, sentence) in [
        ("empty", Vec::new(), "neither index.json"),
        ("cut off", whole[..whole.len() / 2].to_vec(), "ends within"),
        ("no archive", vec![b'x'; 4096], "header at byte 0"),
        ("a blob is missing", lacking.layout(&[entry.clone()]), &layer[..]),
        ("a blob is another", flipped.layout(&[entry.clone()]), "unexpected commit digest"),
        ("no index", tar(&[("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)]), "no index.json"),
        ("another version", tar(&[("oci-layout", br#"{"imageLayoutVersion":"9"}"#), ("index.json", b"{}")]), "version 9"),
        ("a long document", tar(&[("manifest.json", long.as_bytes())]), "8388608 at most"),
        ("a layer is missing", of_docker(&[], json!(["layer.tar"])), "which the archive does not have"),
        ("a link out of it", of_docker(&[("layer.tar", "../../etc/passwd")], json!(["layer.tar"])), "leads out of it"),
        ("a link to the root", of_docker(&[("layer.tar", "/etc/passwd")], json!(["layer.tar"])), "leads out of it"),
        ("a link to nothing", of_docker(&[("layer.tar", "nothing")], json!(["layer.tar"])), "which the archive does not have"),
        ("a path as a digest", parts.layout(&[json!({ "mediaType": OCI_MANIFEST, "digest": "sha256:../x", "size": 1 })]), "invalid digest"),
    ] {
        let Err(status) = import(client, archive, import_store()).await else { bail!("{what}: it was imported") };
        ensure!(status.message().contains(sentence) && status.code() != Code::Internal, "{what}: {status:?}");
        nothing_is_left(client).await.context(what)?;
    }
    // none of its names begins as they all should
    let names = ImageReference { name: "other".to_owned(), is_prefix: true, ..ImageReference::default() };
    let strict = ImageStore { extra_references: vec![names], ..import_store() };
    refused(import(client, whole, strict).await, Code::InvalidArgument, "no image of the archive has a name that begins as it should")?;
    nothing_is_left(client).await
}

pub(crate) async fn an_import_that_was_made_before_writes_nothing(cx: Context) -> Result<()> {
    let client = cx.client();
    let mut parts = Parts::default();
    let mut entry = parts.image(&this_machine().architecture, &[&own(&cx, "layer")]);
    entry["annotations"] = json!({ "io.containerd.image.name": "example.com/x:1" });
    let archive = parts.layout(&[entry]);
    import(client, archive.clone(), import_store()).await?;
    let filters = vec![format!("namespace=={},topic==/content/create", client.namespace())];
    let mut events = client.api().events().subscribe(client.request(SubscribeRequest { filters })).await?.into_inner();
    let created = Arc::<Mutex<Vec<String>>>::default();
    let receiving = tokio::spawn({
        let created = Arc::clone(&created);
        async move {
            while let Ok(Some(envelope)) = events.message().await {
                let event = envelope.event.and_then(|event| ContentCreate::decode(event.value.as_slice()).ok()).unwrap_or_default();
                created.lock().expect("no panic under this lock").push(event.digest);
            }
        }
    });
    import(client, archive, import_store()).await?;
    // a subscription is not confirmed, and its events come in their order: this one comes after all others
    let last = eventually("an event comes", SOON, async || {
        let last = store_blob(client, "last", cx.client().namespace().as_bytes(), &[]).await?;
        let seen = created.lock().expect("no panic under this lock").contains(&last);
        ensure!(seen, "none of {last}");
        Ok(last)
    })
    .await?;
    receiving.abort();
    let created = created.lock().expect("no panic under this lock").clone();
    // the index of an archive has no name, so that it was collected
    ensure!(created.iter().all(|digest| *digest == last || !parts.blobs.contains_key(digest)), "{created:?}");
    // another client sees the image, and finds all of it
    ensure!(names(client).await? == ["example.com/x:1"]);
    remove(client, "example.com/x:1").await?;
    nothing_is_left(client).await
}
