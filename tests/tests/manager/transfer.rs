//! The Transfer and Streaming services: images that are pulled and pushed.

use anyhow::{Context as _, Result, bail, ensure};
use containerd_client::services::v1::ListStatusesRequest;
use containerd_client::to_any;
use containerd_client::types::Platform;
use containerd_client::types::transfer::{AuthRequest, AuthResponse, AuthType, ImageExportStream, ImageStore, Progress, WindowUpdate};
use prost::Message as _;
use prost_types::Any;
use serde_json::{Value, json};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, within};
use shim_tests::registry::Registry;
use shim_tests::transfers::{
    OCI_INDEX, OCI_LAYER, OCI_MANIFEST, OTHER, Parts, Stream, blobs, export, gzip, image, import, import_store, labels, names,
    nothing_is_left, own, pull, registry_of, remove, sha256, snapshots, store, tar, this_machine, transfer,
};
use shim_tests::upload::refused;
use tonic::Code;

pub(crate) async fn streams_are_opened_under_a_name_and_taken_once(cx: Context) -> Result<()> {
    let client = cx.client();
    let _open = Stream::named(client, "s").await?;
    refused(Stream::named(client, "s").await.map(drop), Code::AlreadyExists, "stream \"s\": already exists")?;
    refused(Stream::named(client, "").await.map(drop), Code::InvalidArgument, "a stream id of 0 bytes")?;
    refused(Stream::named(client, &"x".repeat(300)).await.map(drop), Code::InvalidArgument, "a stream id of 300 bytes")?;
    let other = to_any(&WindowUpdate { update: 1 });
    refused(Stream::open(client, other).await.map(drop), Code::InvalidArgument, "a stream begins with StreamInit")?;
    // it is closed with its client
    drop(Stream::named(client, "t").await?);
    eventually("the name is free again", SOON, async || {
        let _opened = Stream::named(client, "t").await?;
        Ok(())
    })
    .await?;
    let (from, to) = (ImageStore { name: "none".to_owned(), ..ImageStore::default() }, registry_of("localhost:1/x:1"));
    let progress = transfer(client, to_any(&from), to_any(&to), "nothing").await;
    refused(progress, Code::NotFound, "stream \"nothing\": not found")?;
    // the stream is taken, though the transfer fails
    refused(transfer(client, to_any(&from), to_any(&to), "s").await, Code::NotFound, "image \"none\": not found")?;
    refused(transfer(client, to_any(&from), to_any(&to), "s").await, Code::NotFound, "stream \"s\": not found")?;
    let pair = transfer(client, to_any(&to), to_any(&to), "").await;
    refused(pair, Code::Unimplemented, "unable to transfer from a registry to a registry")?;
    let unknown = Any { type_url: "x.y/Z".to_owned(), value: Vec::new() };
    refused(transfer(client, unknown, to_any(&to), "").await, Code::Unimplemented, "\"Z\" as the source of a transfer")
}

pub(crate) async fn an_image_that_ten_clients_pull_is_fetched_once(cx: Context) -> Result<()> {
    let registry = Registry::start(None).await?;
    let mut parts = Parts::default();
    let (one, other) = (own(&cx, "one"), own(&cx, "other"));
    // the first digest comes twice
    let manifest = parts.image(&this_machine().architecture, &[&one, &other, &one]);
    parts.publish(&registry, "app:1", &manifest)?;
    let name = registry.image("app:1");
    let elsewhere = cx.with_own_namespace().await?;
    let clients = [cx.client().clone(), elsewhere.client().clone()];
    let pulls = (0..10).map(|number| {
        let (client, name) = (clients[number % 2].clone(), name.clone());
        tokio::spawn(async move { pull(&client, &name).await })
    });
    for pulled in pulls.collect::<Vec<_>>() {
        pulled.await??;
    }
    for (digest, (media_type, _)) in &parts.blobs {
        let count = registry.fetches(digest);
        ensure!(media_type == OCI_MANIFEST || count == 1, "{digest} was fetched {count} times");
    }
    for client in &clients {
        ensure!(names(client).await? == [name.clone()] && snapshots(client).await?.len() == 3);
        let image = image(client, &name).await?;
        let target = image.target.context("a target")?;
        ensure!(target.digest == manifest["digest"] && target.media_type == OCI_MANIFEST, "{target:?}");
        let labels = labels(client, &manifest["digest"]).await?;
        let keys = ["config", "l.0", "l.1", "l.2"].map(|key| format!("containerd.io/gc.ref.content.{key}"));
        ensure!(keys.iter().all(|key| labels.contains_key(key)), "{labels:?}");
        let source = registry.image("").trim_end_matches('/').to_owned();
        ensure!(labels.get(&format!("containerd.io/distribution.source.{source}")).is_some_and(|value| value == "app"), "{labels:?}");
        let config = labels["containerd.io/gc.ref.content.config"].clone();
        let config = self::labels(client, &json!(config)).await?;
        let top = config.get("containerd.io/gc.ref.snapshot.overlayfs").context("a snapshot")?;
        ensure!(snapshots(client).await?.contains(top), "{top}");
        let layer = self::labels(client, &json!(labels["containerd.io/gc.ref.content.l.0"])).await?;
        ensure!(layer.contains_key("containerd.io/uncompressed"), "{layer:?}");
        // a collection leaves it whole, and nothing once it has no name
        remove(client, &name).await?;
        nothing_is_left(client).await?;
    }
    Ok(())
}

pub(crate) async fn a_registry_that_is_slow_holds_up_no_other(cx: Context) -> Result<()> {
    let client = cx.client();
    let (slow, quick) = (Registry::start(None).await?, Registry::start(None).await?);
    let mut parts = Parts::default();
    let large = "x".repeat(1_200_000);
    let layer = tar(&[(&own(&cx, "base"), large.as_bytes())]);
    let diff_id = sha256(&layer);
    let layer = parts.put(OCI_LAYER, layer);
    let manifest = parts.manifest(&this_machine().architecture, &[layer], std::slice::from_ref(&diff_id));
    for registry in [&slow, &quick] {
        parts.publish(registry, "app:1", &manifest)?;
    }
    slow.hold(&diff_id);
    let waiting = tokio::spawn({
        let (client, name) = (client.clone(), slow.image("app:1"));
        async move { pull(&client, &name).await }
    });
    eventually("half of the layer is here", SOON, async || {
        let statuses = client.api().content().list_statuses(client.request(ListStatusesRequest::default())).await?.into_inner().statuses;
        ensure!(statuses.iter().any(|status| status.r#ref.contains(&diff_id) && status.offset > 0), "{statuses:?}");
        Ok(())
    })
    .await?;
    pull(client, &quick.image("app:1")).await?;
    ensure!(!waiting.is_finished() && snapshots(client).await?.len() == 1);
    slow.release();
    within("the slow one ends", SOON, waiting).await???;
    for registry in [&slow, &quick] {
        remove(client, &registry.image("app:1")).await?;
    }
    nothing_is_left(client).await
}

pub(crate) async fn a_layer_that_waits_for_its_turn_has_no_file_open(cx: Context) -> Result<()> {
    // its downloads would hold up those of other tests
    let cx = cx.with_own_daemon().await?;
    let client = cx.client();
    let registry = Registry::start(None).await?;
    let mut parts = Parts::default();
    let large = "x".repeat(1_200_000);
    let layers: Vec<_> = (0..12).map(|number| tar(&[(&own(&cx, &format!("layer-{number}")), large.as_bytes())])).collect();
    let diff_ids: Vec<_> = layers.iter().map(|layer| sha256(layer)).collect();
    let descriptors: Vec<_> = layers.into_iter().map(|layer| parts.put(OCI_LAYER, layer)).collect();
    let manifest = parts.manifest(&this_machine().architecture, &descriptors, &diff_ids);
    parts.publish(&registry, "app:1", &manifest)?;
    diff_ids.iter().for_each(|digest| registry.hold(digest));
    let name = registry.image("app:1");
    let pulling = tokio::spawn({
        let (client, name) = (client.clone(), name.clone());
        async move { pull(&client, &name).await }
    });
    let begun = async || {
        let statuses = client.api().content().list_statuses(client.request(ListStatusesRequest::default())).await?.into_inner().statuses;
        anyhow::Ok(statuses.into_iter().filter(|status| status.r#ref.starts_with("layer-")).collect::<Vec<_>>())
    };
    eventually("three layers arrive", SOON, async || {
        let begun = begun().await?;
        ensure!(begun.iter().filter(|status| status.offset > 0).count() == 3, "{begun:?}");
        Ok(())
    })
    .await?;
    ensure!(begun().await?.len() == 3, "{:?}", begun().await?);
    registry.release();
    within("the pull ends", SOON, pulling).await???;
    ensure!(snapshots(client).await?.len() == 12);
    remove(client, &name).await?;
    nothing_is_left(client).await
}

pub(crate) async fn a_pull_that_is_cancelled_leaves_nothing(cx: Context) -> Result<()> {
    let client = cx.client();
    let registry = Registry::start(None).await?;
    let mut parts = Parts::default();
    let large = "x".repeat(3_000_000);
    let layers = [own(&cx, "a"), own(&cx, "b")].map(|name| tar(&[(&name, large.as_bytes())]));
    let diff_ids: Vec<_> = layers.iter().map(|layer| sha256(layer)).collect();
    let descriptors: Vec<_> = layers.into_iter().map(|layer| parts.put(OCI_LAYER, layer)).collect();
    let manifest = parts.manifest(&this_machine().architecture, &descriptors, &diff_ids);
    parts.publish(&registry, "app:1", &manifest)?;
    registry.hold(&diff_ids[1]);
    let name = registry.image("app:1");
    let pulling = tokio::spawn({
        let (client, name) = (client.clone(), name.clone());
        async move { pull(&client, &name).await }
    });
    eventually("half of a layer is here", SOON, async || {
        let statuses = client.api().content().list_statuses(client.request(ListStatusesRequest::default())).await?.into_inner().statuses;
        ensure!(statuses.iter().any(|status| status.r#ref.contains(&diff_ids[1]) && status.offset > 1_000_000), "{statuses:?}");
        Ok(())
    })
    .await?;
    pulling.abort();
    nothing_is_left(client).await?;
    // a second one is not in the way of what the first has left
    registry.release();
    pull(client, &name).await?;
    ensure!(snapshots(client).await?.len() == 2);
    remove(client, &name).await?;
    nothing_is_left(client).await
}

/// What is wrong, a sentence of the refusal, and how it is made.
type Wrong = (&'static str, &'static str, fn(&mut Parts, &str) -> Value);

pub(crate) async fn an_image_that_is_wrong_is_refused_with_its_reason_and_leaves_nothing(cx: Context) -> Result<()> {
    let client = cx.client();
    let registry = Registry::start(None).await?;
    let architecture = this_machine().architecture;
    let cases: [Wrong; 13] = [
        ("schema1", "schema 1", |parts, _| {
            let old = json!({ "schemaVersion": 1, "name": "x", "fsLayers": [{ "blobSum": "sha256:0" }], "history": [] });
            parts.put("application/vnd.docker.distribution.manifest.v1+prettyjws", old.to_string().into_bytes())
        }),
        ("both", "both ", |parts, own| {
            let image = parts.image("amd64", &[own]);
            let both = json!({ "schemaVersion": 2, "manifests": [image], "layers": [], "config": image });
            parts.put(OCI_MANIFEST, both.to_string().into_bytes())
        }),
        ("named-otherwise", "calls itself", |parts, own| {
            let image = parts.image("amd64", &[own]);
            let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [image] });
            parts.put(OCI_MANIFEST, index.to_string().into_bytes())
        }),
        ("path", "invalid digest", |parts, own| {
            let mut image = parts.image("amd64", &[own]);
            image["digest"] = json!("sha256:../../../../etc/passwd");
            parts.index(&[image])
        }),
        ("deep", "deep", |parts, own| {
            let mut image = parts.image("amd64", &[own]);
            for _ in 0..10 {
                image = parts.index(&[image]);
            }
            image
        }),
        ("other", "has nothing for linux/", |parts, own| {
            let image = parts.image(OTHER, &[own]);
            parts.index(&[image])
        }),
        ("config-of-another", "has nothing for linux/", |parts, own| parts.image(OTHER, &[own])),
        ("long", "8388608", |parts, own| {
            let image = parts.image("amd64", &[own]);
            let index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [image], "x": "x".repeat(9 << 20) });
            parts.put(OCI_INDEX, index.to_string().into_bytes())
        }),
        ("diff-id", "sha256:", |parts, own| {
            let layer = parts.put(OCI_LAYER, tar(&[(own, b"x")]));
            let architecture = this_machine().architecture;
            parts.manifest(&architecture, &[layer], &[sha256(b"something else")])
        }),
        ("unknown-manifest", "404", |parts, own| {
            let mut image = parts.image("amd64", &[own]);
            image["digest"] = json!(sha256(own.as_bytes()));
            parts.index(&[image])
        }),
        ("unknown-layer", "404", |parts, own| {
            let layer = json!({ "mediaType": OCI_LAYER, "digest": sha256(own.as_bytes()), "size": 7 });
            parts.manifest(&this_machine().architecture, &[layer], &[sha256(b"x")])
        }),
        ("longer-than-it-says", "bytes instead of", |parts, own| resized(parts, own, |size| size - 1)),
        ("shorter-than-it-says", "bytes instead of", |parts, own| resized(parts, own, |size| size + 1)),
    ];
    for (what, sentence, make) in cases {
        let mut parts = Parts::default();
        let root = make(&mut parts, &own(&cx, what));
        parts.publish(&registry, &format!("{what}:1"), &root)?;
        let Err(status) = pull(client, &registry.image(&format!("{what}:1"))).await else { bail!("{what} was pulled") };
        ensure!(status.message().contains(sentence) && status.code() != Code::Internal, "{what}: {status:?}");
        nothing_is_left(client).await.context(what)?;
    }
    // a layer of other bytes, and then of the right ones
    let mut parts = Parts::default();
    let manifest = parts.image(&architecture, &[&own(&cx, "layer")]);
    parts.publish(&registry, "bytes:1", &manifest)?;
    let (layer, (_, good)) = parts.blobs.iter().find(|(_, (media_type, _))| media_type == OCI_LAYER).context("a layer")?;
    let mut bad = good.clone();
    bad[0] ^= 1;
    registry.falsify_blob("bytes", layer, &bad);
    ensure!(pull(client, &registry.image("bytes:1")).await.is_err());
    nothing_is_left(client).await?;
    registry.falsify_blob("bytes", layer, good);
    pull(client, &registry.image("bytes:1")).await?;
    remove(client, &registry.image("bytes:1")).await?;
    nothing_is_left(client).await
}

/// An image whose layer has another size than its descriptor says.
fn resized(parts: &mut Parts, own: &str, change: fn(usize) -> usize) -> Value {
    let layer = tar(&[(own, b"x")]);
    let (size, diff_id) = (layer.len(), sha256(&layer));
    let mut layer = parts.put(OCI_LAYER, layer);
    layer["size"] = json!(change(size));
    parts.manifest(&this_machine().architecture, &[layer], &[diff_id])
}

pub(crate) async fn odd_images_are_pulled_as_far_as_they_can_be(cx: Context) -> Result<()> {
    let client = cx.client();
    let registry = Registry::start(None).await?;
    let architecture = this_machine().architecture;
    let mut parts = Parts::default();
    // no layers; an artifact; three indexes deep, with an attestation; an index that says another machine than the configuration
    let empty = parts.manifest(&architecture, &[], &[]);
    let chart = parts.put("application/vnd.cncf.helm.chart.content.v1.tar+gzip", own(&cx, "chart").into_bytes());
    let about = parts.put("application/vnd.cncf.helm.config.v1+json", own(&cx, "{}").into_bytes());
    let artifact = json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": about, "layers": [chart] });
    let artifact = parts.put(OCI_MANIFEST, artifact.to_string().into_bytes());
    let mut attestation = parts.manifest("unknown", &[], &[]);
    attestation["platform"] = json!({ "os": "unknown", "architecture": "unknown" });
    let image = parts.image(&architecture, &[&own(&cx, "image")]);
    let mut nested = parts.index(&[attestation, image]);
    for _ in 0..2 {
        nested = parts.index(&[nested]);
    }
    let mut lying = parts.image(OTHER, &[&own(&cx, "lying")]);
    lying["platform"]["architecture"] = json!(architecture);
    let lying = parts.index(&[lying]);
    let mut expected = 0;
    for (name, root, new_snapshots) in [("empty:1", &empty, 0), ("chart:1", &artifact, 0), ("nested:1", &nested, 1), ("lying:1", &lying, 1)]
    {
        parts.publish(&registry, name, root)?;
        pull(client, &registry.image(name)).await.with_context(|| name.to_owned())?;
        expected += new_snapshots;
        ensure!(snapshots(client).await?.len() == expected, "{name}");
    }
    // all platforms, with attestations, which are not unpacked
    let all = ImageStore { platforms: Vec::new(), ..store("all") };
    transfer(client, to_any(&registry_of(&registry.image("nested:1"))), to_any(&all), "").await?;
    ensure!(snapshots(client).await?.len() == expected);
    for name in ["empty:1", "chart:1", "nested:1", "lying:1"] {
        ensure!(!export(client, &registry.image(name), ImageExportStream::default()).await?.is_empty(), "{name}");
        remove(client, &registry.image(name)).await?;
    }
    remove(client, "all").await?;
    nothing_is_left(client).await
}

pub(crate) async fn of_an_index_what_is_here_is_exported_and_pushed(cx: Context) -> Result<()> {
    let client = cx.client();
    let registry = Registry::start(None).await?;
    let mut parts = Parts::default();
    let here = parts.image(&this_machine().architecture, &[&own(&cx, "here")]);
    let other = parts.image(OTHER, &[&own(&cx, "other")]);
    let index = parts.index(&[other.clone(), here.clone()]);
    parts.publish(&registry, "app:1", &index)?;
    let name = registry.image("app:1");
    pull(client, &name).await?;
    ensure!(image(client, &name).await?.target.context("a target")?.digest == index["digest"]);
    let all = export(client, &name, ImageExportStream { all_platforms: true, ..ImageExportStream::default() }).await;
    let missing = other["digest"].as_str().context("a digest")?;
    refused(all.map(drop), Code::FailedPrecondition, &format!("image {name} is incomplete: the store does not have {missing}"))?;
    let archive = export(client, &name, ImageExportStream::default()).await?;
    let whole = transfer(
        client,
        to_any(&ImageStore { name: name.clone(), ..ImageStore::default() }),
        to_any(&registry_of(&registry.image("copy:1"))),
        "",
    )
    .await;
    refused(whole, Code::FailedPrecondition, &format!("image {name} is incomplete: the store does not have {missing}"))?;
    let one = ImageStore { name: name.clone(), platforms: vec![this_machine()], ..ImageStore::default() };
    transfer(client, to_any(&one), to_any(&registry_of(&registry.image("copy:1"))), "").await?;
    let requests = registry.requests();
    ensure!(requests.iter().any(|request| request == "PUT /v2/copy/manifests/1"), "{requests:?}");
    // the archive is imported where nothing is
    remove(client, &name).await?;
    nothing_is_left(client).await?;
    import(client, archive.clone(), import_store()).await?;
    ensure!(names(client).await? == std::slice::from_ref(&name));
    ensure!(image(client, &name).await?.target.context("a target")?.digest == index["digest"]);
    ensure!(snapshots(client).await?.len() == 1);
    remove(client, &name).await?;
    nothing_is_left(client).await?;
    let wrong = Platform { architecture: OTHER.to_owned(), ..this_machine() };
    let lacking = import(client, archive, ImageStore { platforms: vec![wrong], unpacks: Vec::new(), ..import_store() }).await;
    refused(lacking, Code::NotFound, missing)?;
    nothing_is_left(client).await
}

pub(crate) async fn a_registry_asks_the_client_for_its_secret(cx: Context) -> Result<()> {
    let client = cx.client();
    // user:secret
    let registry = Registry::start(Some("dXNlcjpzZWNyZXQ=")).await?;
    let mut parts = Parts::default();
    let manifest = parts.image(&this_machine().architecture, &[&own(&cx, "layer")]);
    parts.publish(&registry, "app:1", &manifest)?;
    let name = registry.image("app:1");
    let Err(status) = pull(client, &name).await else { bail!("without a secret it was pulled") };
    ensure!(status.message().contains("401"), "{status:?}");
    for (secret, works) in [("wrong", false), ("secret", true)] {
        let mut stream = Stream::named(client, "auth").await?;
        let mut progress = Stream::named(client, "progress").await?;
        let asked = tokio::spawn(async move {
            let requests = stream.requests.take().expect("it is open");
            let mut questions = Vec::new();
            while let Ok(Some(any)) = stream.answers.message().await {
                questions.push(AuthRequest::decode(any.value.as_slice()).unwrap_or_default());
                let (username, secret) = ("user".to_owned(), secret.to_owned());
                let answer = AuthResponse { auth_type: AuthType::Credentials.into(), username, secret, ..AuthResponse::default() };
                let _ = requests.send(to_any(&answer)).await;
            }
            questions
        });
        let reported = tokio::spawn(async move {
            let mut events = Vec::new();
            while let Ok(Some(any)) = progress.answers.message().await {
                events.push(Progress::decode(any.value.as_slice()).unwrap_or_default());
            }
            events
        });
        let mut source = registry_of(&name);
        source.resolver.get_or_insert_default().auth_stream = "auth".to_owned();
        let pulled = transfer(client, to_any(&source), to_any(&store(&name)), "progress").await;
        ensure!(pulled.is_ok() == works, "{secret}: {pulled:?}");
        let questions = within("the stream of secrets is closed", SOON, asked).await??;
        ensure!(!questions.is_empty() && questions.len() < 5, "{questions:?}");
        ensure!(questions.iter().all(|question| question.reference.contains("/app")), "{questions:?}");
        let events = within("the stream of progress is closed", SOON, reported).await??;
        if works {
            let seen = |event: &str, name: &str| events.iter().any(|seen| seen.event == event && seen.name.starts_with(name));
            let expected = [
                ("fetching image content", name.as_str()),
                ("waiting", "manifest-sha256:"),
                ("complete", "config-sha256:"),
                ("complete", "layer-sha256:"),
                ("extracted", "layer-sha256:"),
                ("saved", &name),
            ];
            for (event, name) in expected {
                ensure!(seen(event, name), "no {event} of {name}: {events:?}");
            }
            ensure!(events.last().is_some_and(|last| last.event.starts_with("Completed pull from OCI Registry (")), "{events:?}");
        }
    }
    remove(client, &name).await?;
    nothing_is_left(client).await
}

pub(crate) async fn layers_with_the_same_contents_keep_their_own_blobs(cx: Context) -> Result<()> {
    let client = cx.client();
    let registry = Registry::start(None).await?;
    let mut parts = Parts::default();
    let architecture = this_machine().architecture;
    let plain = tar(&[(&own(&cx, "layer"), b"x")]);
    let id = sha256(&plain);
    let gzip = gzip(&plain)?;
    // one configuration, two manifests
    let layers = [parts.put(OCI_LAYER, plain), parts.put(&format!("{OCI_LAYER}+gzip"), gzip)];
    let manifests = layers.map(|layer| parts.manifest(&architecture, &[layer], std::slice::from_ref(&id)));
    let index = parts.index(&manifests);
    parts.publish(&registry, "both:1", &index)?;
    let name = registry.image("both:1");
    pull(client, &name).await?;
    let here = blobs(client).await?;
    ensure!(parts.blobs.keys().all(|digest| here.contains(digest)) && here.len() == 6, "{here:?}");
    ensure!(snapshots(client).await?.len() == 1);
    // by names of their own, the second is not fetched for its snapshot that is there, and whole nevertheless
    remove(client, &name).await?;
    nothing_is_left(client).await?;
    for (number, manifest) in manifests.iter().enumerate() {
        parts.publish(&registry, &format!("one:{number}"), manifest)?;
        pull(client, &registry.image(&format!("one:{number}"))).await?;
    }
    ensure!(snapshots(client).await?.len() == 1);
    for number in 0..2 {
        let name = registry.image(&format!("one:{number}"));
        export(client, &name, ImageExportStream::default()).await?;
        remove(client, &name).await?;
    }
    nothing_is_left(client).await
}
