//! Images and leases, and what is collected when they go.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::{
    AbortRequest, CreateImageRequest, CreateRequest, DeleteImageRequest, DeleteRequest, GetImageRequest, Image, ListImagesRequest,
    ListResourcesRequest, SubscribeRequest, UpdateImageRequest,
};
use containerd_client::types::Descriptor;
use prost_types::{FieldMask, Timestamp};
use shim_tests::client::{Answer, Client};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::upload::{Upload, info, refused, stat, status, store, write};
use tonic::Code;

fn image(name: &str, digest: &str) -> Image {
    let media_type = "application/vnd.oci.image.manifest.v1+json".to_owned();
    let target = Some(Descriptor { media_type, digest: digest.to_owned(), size: 7, ..Descriptor::default() });
    Image { name: name.to_owned(), target, ..Image::default() }
}

async fn create(client: &Client, image: Image) -> Answer<Image> {
    let request = CreateImageRequest { image: Some(image), ..CreateImageRequest::default() };
    Ok(client.api().images().create(client.request(request)).await?.into_inner().image.unwrap_or_default())
}

async fn get(client: &Client, name: &str) -> Answer<Image> {
    let answer = client.api().images().get(client.request(GetImageRequest { name: name.to_owned() })).await?;
    Ok(answer.into_inner().image.unwrap_or_default())
}

async fn list(client: &Client, filters: &[&str]) -> Answer<Vec<String>> {
    let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
    let answer = client.api().images().list(client.request(ListImagesRequest { filters })).await?.into_inner();
    Ok(answer.images.into_iter().map(|image| image.name).collect())
}

async fn update(client: &Client, image: Image, paths: &[&str]) -> Answer<Image> {
    let update_mask = (!paths.is_empty()).then(|| FieldMask { paths: paths.iter().map(|path| (*path).to_owned()).collect() });
    let request = UpdateImageRequest { image: Some(image), update_mask, ..UpdateImageRequest::default() };
    Ok(client.api().images().update(client.request(request)).await?.into_inner().image.unwrap_or_default())
}

async fn delete(client: &Client, name: &str) -> Answer<()> {
    let request = DeleteImageRequest { name: name.to_owned(), sync: true, ..DeleteImageRequest::default() };
    client.api().images().delete(client.request(request)).await.map(drop)
}

async fn delete_lease(client: &Client, id: &str) -> Answer<()> {
    client.api().leases().delete(client.request(DeleteRequest { id: id.to_owned(), sync: true })).await.map(drop)
}

/// Topics of the namespace's events, as they come.
async fn topics(client: &Client) -> Result<Arc<Mutex<Vec<String>>>> {
    let filters = vec![format!("namespace=={}", client.namespace())];
    let mut events = client.api().events().subscribe(client.request(SubscribeRequest { filters })).await?.into_inner();
    let topics = Arc::<Mutex<Vec<String>>>::default();
    let received = Arc::clone(&topics);
    tokio::spawn(async move {
        while let Ok(Some(envelope)) = events.message().await {
            received.lock().expect("no panic under this lock").push(envelope.topic);
        }
    });
    Ok(topics)
}

fn of_images(topics: &Mutex<Vec<String>>) -> Vec<String> {
    let topics = topics.lock().expect("no panic under this lock");
    topics.iter().filter(|topic| topic.starts_with("/images/")).cloned().collect()
}

/// A collection that takes place now.
async fn collect(client: &Client) -> Result<()> {
    client.with_lease("collect").await?;
    Ok(delete_lease(client, "collect").await?)
}

async fn is_there(client: &Client, digest: &str) -> Result<bool> {
    match info(client, digest).await {
        Err(status) if status.code() == Code::NotFound => Ok(false),
        found => Ok(found.map(|_| true)?),
    }
}

const NONE: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

pub(crate) async fn an_image_is_created_updated_listed_and_deleted(cx: Context) -> Result<()> {
    let client = cx.client();
    let events = topics(client).await?;
    let epoch = Some(Timestamp { seconds: 7, nanos: 0 });
    let new = Image { labels: [("a".to_owned(), "1".to_owned())].into(), ..image("example.com/i:1", NONE) };
    let request = CreateImageRequest { image: Some(new.clone()), source_date_epoch: epoch };
    let made = client.api().images().create(client.request(request)).await?.into_inner().image.unwrap_or_default();
    ensure!((made.created_at, made.updated_at) == (epoch, epoch), "{made:?}");
    refused(create(client, new.clone()).await, Code::AlreadyExists, "image \"example.com/i:1\": already exists")?;
    create(client, image("example.com/j:1", NONE)).await?;
    ensure!(list(client, &[]).await? == ["example.com/i:1", "example.com/j:1"]);
    ensure!(list(client, &["name==example.com/j:1"]).await? == ["example.com/j:1"]);
    ensure!(list(client, &["labels.a==1,target.digest~=/^sha256:0+$/"]).await? == ["example.com/i:1"]);
    ensure!(list(client, &["target.mediatype==x"]).await?.is_empty());
    let other = Image { labels: [("b".to_owned(), "2".to_owned())].into(), ..image("example.com/i:1", &NONE.replace('0', "1")) };
    let updated = update(client, other.clone(), &["labels.b"]).await?;
    ensure!(updated.labels.len() == 2 && updated.target == made.target && updated.created_at == epoch, "{updated:?}");
    let updated = update(client, other, &[]).await?;
    ensure!(updated.labels.len() == 1 && updated.target != made.target && updated.created_at == epoch, "{updated:?}");
    ensure!(get(client, "example.com/i:1").await? == updated);
    let wrong = Some(Descriptor { digest: NONE.to_owned(), ..Descriptor::default() });
    let request = DeleteImageRequest { name: "example.com/i:1".into(), target: wrong, ..DeleteImageRequest::default() };
    let kept = client.api().images().delete(client.request(request)).await;
    refused(kept, Code::NotFound, "image \"example.com/i:1\" has target sha256:1")?;
    for name in ["example.com/i:1", "example.com/j:1"] {
        delete(client, name).await?;
    }
    refused(delete(client, "example.com/i:1").await, Code::NotFound, "image \"example.com/i:1\": not found")?;
    refused(get(client, "example.com/i:1").await, Code::NotFound, "image \"example.com/i:1\": not found")?;
    let expected = ["/images/create", "/images/create", "/images/update", "/images/update", "/images/delete", "/images/delete"];
    eventually("all is published", SOON, async || {
        let topics = of_images(&events);
        ensure!(topics == expected, "{topics:?}");
        Ok(())
    })
    .await
}

pub(crate) async fn an_image_is_refused_with_a_reason(cx: Context) -> Result<()> {
    let client = cx.client();
    let with = |change: fn(&mut Descriptor)| {
        let mut image = image("i", NONE);
        change(image.target.get_or_insert_default());
        image
    };
    for (bad, message) in [
        (image("", NONE), "image name is required for create"),
        (with(|target| target.digest = "sha256:../..".to_owned()), "Target.Digest \"sha256:../..\" invalid"),
        (with(|target| target.size = 0), "Target.Size must be greater than zero"),
        (with(|target| target.media_type.clear()), "Target.MediaType must be set"),
        (Image { target: None, ..image("i", NONE) }, "Target.Digest"),
        (Image { labels: [("k".to_owned(), "v".repeat(5000))].into(), ..image("i", NONE) }, "label key and value length"),
    ] {
        refused(create(client, bad).await, Code::InvalidArgument, message)?;
    }
    refused(update(client, image("", NONE), &[]).await, Code::InvalidArgument, "image name is required for update")?;
    refused(update(client, image("i", NONE), &[]).await, Code::NotFound, "image \"i\": not found")?;
    create(client, image("i", NONE)).await?;
    refused(update(client, image("i", NONE), &["name"]).await, Code::InvalidArgument, "cannot update \"name\" field on image \"i\"")?;
    let namespace = containerd_client::services::v1::DeleteNamespaceRequest { name: client.namespace().to_owned() };
    let kept = client.api().namespaces().delete(tonic::Request::new(namespace)).await;
    refused(kept, Code::FailedPrecondition, "must be empty, but it still has images")?;
    Ok(delete(client, "i").await?)
}

pub(crate) async fn content_stays_as_long_as_something_leads_to_it(cx: Context) -> Result<()> {
    let client = cx.client();
    let leased = client.with_lease("l").await?;
    let layer = store(&leased, "layer", b"a layer", &[]).await?;
    let config = store(&leased, "config", b"a config", &[]).await?;
    let labels = [("containerd.io/gc.ref.content.config", config.as_str()), ("containerd.io/gc.ref.content.l.0", layer.as_str())];
    let manifest = store(&leased, "manifest", b"a manifest", &labels).await?;
    let rooted = store(&leased, "rooted", b"a root", &[("containerd.io/gc.root", "now")]).await?;
    let stray = store(&leased, "stray", b"a stray", &[]).await?;
    create(client, image("i", &manifest)).await?;
    delete_lease(client, "l").await?;
    for kept in [&layer, &config, &manifest, &rooted] {
        ensure!(is_there(client, kept).await?, "{kept}");
    }
    ensure!(!is_there(client, &stray).await?);
    delete(client, "i").await?;
    for gone in [&layer, &config, &manifest] {
        ensure!(!is_there(client, gone).await?, "{gone}");
    }
    ensure!(is_there(client, &rooted).await?);
    // removed and stored again at once, nothing is lost
    for round in 0..20 {
        let leased = client.with_lease("again").await?;
        let (removed, stored) = tokio::join!(delete_lease_of(client, round), store(&leased, "r", b"again", &[]));
        removed?;
        let stored = stored?;
        collect(client).await?;
        ensure!(shim_tests::upload::read(client, &stored, 0, 0).await? == b"again", "round {round}");
        delete_lease(client, "again").await?;
    }
    let request = containerd_client::services::v1::DeleteContentRequest { digest: rooted };
    client.api().content().delete(client.request(request)).await?;
    Ok(())
}

/// Something to collect meanwhile.
async fn delete_lease_of(client: &Client, round: u32) -> Result<()> {
    let id = format!("other-{round}");
    let leased = client.with_lease(&id).await?;
    store(&leased, "other", format!("other {round}").as_bytes(), &[]).await?;
    Ok(delete_lease(client, &id).await?)
}

pub(crate) async fn a_lease_holds_what_its_calls_create_until_it_ends(cx: Context) -> Result<()> {
    let client = cx.client();
    let first = client.with_lease("first").await?;
    let stored = store(&first, "r", b"leased", &[]).await?;
    let held = async |lease: &str| -> Result<Vec<String>> {
        let request = client.request(ListResourcesRequest { id: lease.to_owned() });
        let held = client.api().leases().list_resources(request).await?.into_inner().resources;
        Ok(held.into_iter().map(|resource| format!("{} {}", resource.r#type, resource.id)).collect())
    };
    ensure!(held("first").await? == [format!("content {stored}")]);
    // one who finds it there holds it too
    let second = client.with_lease("second").await?;
    let begun = containerd_client::services::v1::WriteContentRequest { expected: stored.clone(), ..stat("r") };
    refused(Upload::begin(&second, begun).await, Code::AlreadyExists, "already exists")?;
    create(&second, image("i", &stored)).await?;
    // an image needs no lease, unless it expires
    ensure!(held("second").await? == [format!("content {stored}")]);
    let expires = [("containerd.io/gc.expire".to_owned(), "2100-01-01T00:00:00Z".to_owned())].into();
    create(&second, Image { labels: expires, ..image("e", &stored) }).await?;
    ensure!(held("second").await? == [format!("content {stored}"), "images e".to_owned()]);
    delete(client, "i").await?;
    delete(&second, "e").await?;
    ensure!(held("second").await? == [format!("content {stored}")]);
    delete_lease(client, "first").await?;
    ensure!(is_there(client, &stored).await?);
    delete_lease(client, "second").await?;
    ensure!(!is_there(client, &stored).await?);
    // without such a lease nothing is stored
    refused(store_with(&second, "r").await, Code::NotFound, "lease does not exist: not found")?;
    let expires = [("containerd.io/gc.expire".to_owned(), "2100-01-01T00:00:00Z".to_owned())].into();
    refused(create(&second, Image { labels: expires, ..image("i", NONE) }).await, Code::NotFound, "lease does not exist: not found")?;
    // one that expires is collected without a call
    let soon = Timestamp::from(SystemTime::now() + Duration::from_secs(2)).to_string();
    let labels = [("containerd.io/gc.expire".to_owned(), soon)].into();
    client.api().leases().create(client.request(CreateRequest { id: "third".into(), labels })).await?;
    let third = client.with_existing_lease("third");
    let stored = store(&third, "r", b"expires", &[]).await?;
    ensure!(is_there(client, &stored).await?);
    eventually("it is collected", SOON, async || {
        ensure!(!is_there(client, &stored).await?, "it is there");
        Ok(())
    })
    .await
}

async fn store_with(client: &Client, reference: &str) -> Answer<()> {
    Upload::begin(client, stat(reference)).await.map(drop)
}

pub(crate) async fn an_image_that_expires_is_deleted_and_published(cx: Context) -> Result<()> {
    let client = cx.client();
    let events = topics(client).await?;
    let leased = client.with_lease("l").await?;
    let stored = store(&leased, "r", b"expires with its image", &[]).await?;
    let soon = Timestamp::from(SystemTime::now() + Duration::from_secs(2)).to_string();
    let labels = [("containerd.io/gc.expire".to_owned(), soon)].into();
    create(client, Image { labels, ..image("i", &stored) }).await?;
    delete_lease(client, "l").await?;
    ensure!(is_there(client, &stored).await? && list(client, &[]).await? == ["i"]);
    eventually("it is deleted", SOON, async || {
        ensure!(!is_there(client, &stored).await? && list(client, &[]).await?.is_empty(), "it is there");
        ensure!(of_images(&events) == ["/images/create", "/images/delete"], "{:?}", of_images(&events));
        Ok(())
    })
    .await
}

pub(crate) async fn an_ingest_goes_with_its_lease(cx: Context) -> Result<()> {
    let client = cx.client();
    let leased = client.with_lease("l").await?;
    for (client, reference) in [(&leased, "leased"), (client, "free")] {
        let (mut upload, _) = Upload::begin(client, stat(reference)).await?;
        upload.send(write(0, b"begun")).await?;
    }
    collect(client).await?;
    ensure!(status(client, "leased").await?.offset == 5);
    delete_lease(client, "l").await?;
    eventually("the ingest is removed", SOON, async || {
        collect(client).await?;
        ensure!(status(client, "leased").await.is_err_and(|status| status.code() == Code::NotFound), "it is there");
        Ok(())
    })
    .await?;
    ensure!(status(client, "free").await.context("it stays for a day")?.offset == 5);
    client.api().content().abort(client.request(AbortRequest { r#ref: "free".into() })).await?;
    Ok(())
}
