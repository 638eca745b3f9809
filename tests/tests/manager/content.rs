//! Content: written in lock-step, resumed, shared and listed.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::{
    AbortRequest, DeleteContentRequest, Info, ListContentRequest, ListStatusesRequest, Namespace, ReadContentRequest,
    UpdateNamespaceRequest, UpdateRequest, WriteContentRequest,
};
use prost_types::FieldMask;
use shim_tests::client::{Answer, Client};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::operator::{printed, upgrade};
use shim_tests::suite;
use shim_tests::upload::{self, Upload, commit, digest, info, read, refused, stat, status, store, write};
use tokio::task::JoinSet;
use tonic::{Code, Request};

fn folder(cx: &Context) -> PathBuf {
    cx.daemon().folder().join("root/io.containerd.content.v1.content")
}

fn blob(cx: &Context, digest: &str) -> PathBuf {
    folder(cx).join("blobs").join(digest.replace(':', "/"))
}

/// A client whose content is not collected while a test runs.
async fn kept(cx: &Context) -> Result<Client> {
    Ok(cx.client().with_lease("test").await?)
}

/// Folders of ingests.
fn ingests(cx: &Context) -> Result<usize> {
    Ok(fs::read_dir(folder(cx).join("ingest"))?.count())
}

/// Bytes that do not repeat.
fn bytes(count: usize) -> Vec<u8> {
    (0..count.div_ceil(8)).flat_map(|number| (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()).take(count).collect()
}

async fn delete(client: &Client, digest: &str) -> Answer<()> {
    client.api().content().delete(client.request(DeleteContentRequest { digest: digest.to_owned() })).await.map(drop)
}

async fn list(client: &Client, filters: &[&str]) -> Answer<Vec<Info>> {
    let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
    let mut pages = client.api().content().list(client.request(ListContentRequest { filters })).await?.into_inner();
    let mut all = Vec::new();
    while let Some(page) = pages.message().await? {
        all.extend(page.info);
    }
    Ok(all)
}

async fn statuses(client: &Client, filters: &[&str]) -> Answer<Vec<String>> {
    let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
    let answer = client.api().content().list_statuses(client.request(ListStatusesRequest { filters })).await?.into_inner();
    Ok(answer.statuses.into_iter().map(|status| status.r#ref).collect())
}

fn is_sound(cx: &Context) -> Result<()> {
    let output =
        Command::new(suite::manager().context("a manager")?).args(["check", "--root"]).arg(cx.daemon().folder().join("root")).output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

pub(crate) async fn content_is_written_in_lock_step_and_read_in_parts(cx: Context) -> Result<()> {
    let client = &kept(&cx).await?;
    let data = bytes(3 << 20);
    let expected = digest("sha256", &data)?;
    let first = WriteContentRequest { total: 3 << 20, expected: expected.clone(), ..stat("r") };
    let (mut upload, answer) = Upload::begin(client, first).await?;
    ensure!(answer.offset == 0 && answer.total == 3 << 20 && answer.started_at.is_some(), "{answer:?}");
    for offset in [0, 1 << 20] {
        let answer = upload.send(write(offset as i64, &data[offset..offset + (1 << 20)])).await?;
        ensure!(
            answer.offset == offset as i64 + (1 << 20) && answer.digest == digest("sha256", &data[..offset + (1 << 20)])?,
            "{answer:?}"
        );
    }
    let status = status(client, "r").await?;
    ensure!((status.offset, status.total) == (2 << 20, 3 << 20), "{status:?}");
    let mut last = commit(2 << 20, 3 << 20, &expected);
    last.data = data[2 << 20..].to_vec();
    last.labels = [("a".to_owned(), "1".to_owned())].into();
    let answer = upload.send(last).await?;
    ensure!((answer.offset, answer.digest.as_str()) == (3 << 20, expected.as_str()), "{answer:?}");
    let info = info(client, &expected).await?;
    ensure!(info.size == 3 << 20 && info.labels["a"] == "1" && info.created_at.is_some(), "{info:?}");
    ensure!(read(client, &expected, 0, 0).await? == data);
    ensure!(read(client, &expected, 1_000_001, 7).await? == data[1_000_001..1_000_008]);
    ensure!(read(client, &expected, (3 << 20) - 5, 100).await? == data[(3 << 20) - 5..], "no more than there is");
    ensure!(read(client, &expected, 3 << 20, 1).await?.is_empty());
    refused(read(client, &expected, (3 << 20) + 1, 1).await, Code::OutOfRange, "read past object length 3145728 bytes")?;
    // where containerd's tools look for it
    let file = blob(&cx, &expected);
    ensure!(fs::read(&file)? == data && fs::metadata(&file)?.permissions().readonly());
    ensure!(statuses(client, &[]).await?.is_empty());
    refused(upload::status(client, "r").await, Code::NotFound, "reference r: not found")?;
    delete(client, &expected).await?;
    refused(delete(client, &expected).await, Code::NotFound, &format!("content digest {expected}: not found"))?;
    refused(read(client, &expected, 0, 0).await, Code::NotFound, "content digest")?;
    eventually_true("its file is removed", SOON, || !file.exists()).await
}

pub(crate) async fn a_reference_has_one_writer_and_the_next_goes_on_where_it_stopped(cx: Context) -> Result<()> {
    let client = &kept(&cx).await?;
    let data = bytes(100_000);
    let (mut first, _) = Upload::begin(client, stat("r")).await?;
    first.send(write(0, &data[..40_000])).await?;
    refused(Upload::begin(client, stat("r")).await, Code::Unavailable, "locked")?;
    ensure!(statuses(client, &[]).await? == ["r"]);
    drop(first);
    let (mut second, answer) = Upload::begin(client, stat("r")).await?;
    ensure!((answer.offset, answer.digest) == (40_000, digest("sha256", &data[..40_000])?));
    let wrong = second.send(write(39_999, &data[..1])).await;
    refused(wrong, Code::OutOfRange, "write @39999 must occur at current offset 40000")?;
    let (mut third, _) = Upload::begin(client, stat("r")).await?;
    // from the beginning
    let answer = third.send(write(0, &data[..10])).await?;
    ensure!(answer.offset == 10, "{answer:?}");
    drop(third);
    let (mut fourth, answer) = Upload::begin(client, stat("r")).await?;
    ensure!(answer.offset == 10, "{answer:?}");
    let mut last = commit(10, 0, "");
    last.data = data[10..].to_vec();
    let stored = fourth.send(last).await?.digest;
    ensure!(read(client, &stored, 0, 0).await? == data);
    // one at a time in each namespace
    let other = cx.with_own_namespace().await?;
    let _here = Upload::begin(client, stat("same")).await?;
    let _there = Upload::begin(other.client(), stat("same")).await?;
    delete(client, &stored).await?;
    Ok(())
}

pub(crate) async fn content_that_is_there_is_not_written_again(cx: Context) -> Result<()> {
    let client = &kept(&cx).await?;
    let stored = store(client, "r", b"there", &[]).await?;
    let again = WriteContentRequest { expected: stored.clone(), ..stat("again") };
    refused(Upload::begin(client, again.clone()).await, Code::AlreadyExists, &format!("content {stored}: already exists"))?;
    let (mut upload, _) = Upload::begin(client, stat("again")).await?;
    upload.send(write(0, b"there")).await?;
    let late = upload.send(commit(5, 5, &stored)).await;
    refused(late, Code::AlreadyExists, &format!("blob with expected digest {stored} exists"))?;
    let (mut upload, answer) = Upload::begin(client, stat("again")).await?;
    ensure!(answer.offset == 0, "the ingest was dropped: {answer:?}");
    upload.send(write(0, b"there")).await?;
    refused(upload.send(commit(5, 5, "")).await, Code::AlreadyExists, &format!("content {stored}: already exists"))?;
    ensure!(statuses(client, &[]).await?.is_empty());
    // what was lost can be written again
    fs::remove_file(blob(&cx, &stored))?;
    let (mut upload, _) = Upload::begin(client, again).await?;
    let mut whole = commit(0, 5, &stored);
    whole.data = b"there".to_vec();
    refused(upload.send(whole).await, Code::AlreadyExists, "already exists")?;
    ensure!(read(client, &stored, 0, 0).await? == b"there");
    Ok(delete(client, &stored).await?)
}

pub(crate) async fn a_commit_of_something_else_is_refused_and_not_resumed(cx: Context) -> Result<()> {
    let client = &kept(&cx).await?;
    let (right, wrong) = (digest("sha256", b"right")?, digest("sha256", b"wrong")?);
    let (mut upload, _) = Upload::begin(client, WriteContentRequest { expected: right.clone(), ..stat("r") }).await?;
    upload.send(write(0, b"wrong")).await?;
    let message = format!("unexpected commit digest {wrong}, expected {right}");
    refused(upload.send(commit(5, 5, &right)).await, Code::FailedPrecondition, &message)?;
    let (mut upload, answer) = Upload::begin(client, stat("r")).await?;
    ensure!(answer.offset == 0, "what is wrong is not resumed: {answer:?}");
    upload.send(write(0, b"rig")).await?;
    refused(upload.send(commit(3, 5, &right)).await, Code::FailedPrecondition, "\"r\" failed size validation: 3 != 5")?;
    let (mut upload, answer) = Upload::begin(client, stat("r")).await?;
    ensure!(answer.offset == 3, "what is too short is: {answer:?}");
    upload.send(write(3, b"ht, and more")).await?;
    refused(upload.send(commit(15, 5, "")).await, Code::FailedPrecondition, "\"r\" failed size validation: 15 != 5")?;
    let (mut upload, answer) = Upload::begin(client, stat("r")).await?;
    ensure!(answer.offset == 0, "{answer:?}");
    let mut whole = commit(0, 5, &right);
    whole.data = b"right".to_vec();
    upload.send(whole).await?;
    Ok(delete(client, &right).await?)
}

pub(crate) async fn content_of_another_namespace_is_given_for_its_digest(cx: Context) -> Result<()> {
    let other = cx.with_own_namespace().await?;
    let (here, there) = (&kept(&cx).await?, &kept(&other).await?);
    let stored = store(here, "r", b"shared", &[("a", "1")]).await?;
    refused(info(there, &stored).await, Code::NotFound, "content digest")?;
    refused(read(there, &stored, 0, 0).await, Code::NotFound, "content digest")?;
    let first = WriteContentRequest { expected: stored.clone(), total: 6, ..stat("r") };
    let (mut upload, answer) = Upload::begin(there, first.clone()).await?;
    ensure!((answer.offset, answer.digest.as_str()) == (6, stored.as_str()), "{answer:?}");
    // it stays meanwhile
    delete(here, &stored).await?;
    upload.send(commit(6, 6, &stored)).await?;
    ensure!(read(there, &stored, 0, 0).await? == b"shared" && info(there, &stored).await?.labels.is_empty());
    refused(info(here, &stored).await, Code::NotFound, "content digest")?;
    // another size is a lie
    let (mut upload, answer) = Upload::begin(here, WriteContentRequest { total: 7, ..first.clone() }).await?;
    ensure!(answer.offset == 0, "{answer:?}");
    drop(upload.send(write(0, b"sh")).await?);
    drop(upload);
    // and what is written nevertheless follows what is there
    let (mut upload, _) = Upload::begin(here, WriteContentRequest { r#ref: "more".to_owned(), ..first }).await?;
    upload.send(write(6, b" and more")).await?;
    let more = digest("sha256", b"shared and more")?;
    upload.send(commit(15, 15, &more)).await?;
    ensure!(read(here, &more, 0, 0).await? == b"shared and more");
    delete(there, &stored).await?;
    eventually_true("the last row takes the file with it", SOON, || !blob(&cx, &stored).exists()).await?;
    Ok(delete(here, &more).await?)
}

pub(crate) async fn isolated_content_is_written_by_each_namespace(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    cx.daemon().stop()?;
    cx.daemon().configure("[content]\nsharing_policy = \"isolated\"\n")?;
    cx.revive_daemon().await?;
    let other = cx.with_own_namespace().await?;
    let (here, there) = (&kept(&cx).await?, &kept(&other).await?);
    let stored = store(here, "r", b"isolated", &[]).await?;
    let first = WriteContentRequest { expected: stored.clone(), ..stat("r") };
    let (mut upload, answer) = Upload::begin(there, first.clone()).await?;
    ensure!(answer.offset == 0, "{answer:?}");
    let mut whole = commit(0, 8, &stored);
    whole.data = b"isolated".to_vec();
    upload.send(whole).await?;
    delete(there, &stored).await?;
    let labels = [("containerd.io/namespace.shareable".to_owned(), "true".to_owned())].into();
    let namespace = Some(Namespace { name: here.namespace().to_owned(), labels });
    here.api().namespaces().update(Request::new(UpdateNamespaceRequest { namespace, update_mask: None })).await?;
    let (_upload, answer) = Upload::begin(there, first).await?;
    ensure!(answer.offset == 8, "from a namespace that shares: {answer:?}");
    Ok(())
}

pub(crate) async fn content_and_ingests_are_listed_labelled_and_removed(cx: Context) -> Result<()> {
    let client = &kept(&cx).await?;
    let mut stored = Vec::new();
    for (name, labels) in [("one", &[("a", "1")][..]), ("two", &[("a", "2"), ("b", "x")]), ("three", &[])] {
        stored.push(store(client, name, name.as_bytes(), labels).await?);
    }
    let digests =
        async |filters: &[&str]| -> Result<Vec<String>> { Ok(list(client, filters).await?.into_iter().map(|info| info.digest).collect()) };
    ensure!(digests(&[]).await?.len() == 3);
    ensure!(digests(&["labels.a==2"]).await? == [stored[1].clone()]);
    ensure!(digests(&["labels.b", &format!("digest=={}", stored[2])]).await?.len() == 2);
    refused(list(client, &["digest="]).await, Code::InvalidArgument, "filter")?;
    let update = async |labels: &[(&str, &str)], paths: &[&str]| -> Answer<Info> {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let update_mask = (!paths.is_empty()).then(|| FieldMask { paths: paths.iter().map(|path| (*path).to_owned()).collect() });
        let info = Some(Info { digest: stored[1].clone(), labels, ..Info::default() });
        let answer = client.api().content().update(client.request(UpdateRequest { info, update_mask })).await?;
        Ok(answer.into_inner().info.unwrap_or_default())
    };
    let updated = update(&[("b", "y"), ("c", "z")], &["labels.b"]).await?;
    ensure!(updated.labels.len() == 2 && updated.labels["b"] == "y" && updated.updated_at != updated.created_at, "{updated:?}");
    ensure!(update(&[], &["labels.a"]).await?.labels.len() == 1);
    ensure!(update(&[("c", "z")], &[]).await?.labels.len() == 1);
    refused(update(&[], &["size"]).await, Code::InvalidArgument, "cannot update \"size\" field on content info")?;
    for reference in ["ingest-one", "ingest-two"] {
        let (mut upload, _) = Upload::begin(client, stat(reference)).await?;
        upload.send(write(0, b"begun")).await?;
    }
    ensure!(statuses(client, &["ref~=one"]).await? == ["ingest-one"] && statuses(client, &[]).await?.len() == 2);
    let abort = async |reference: &str| client.api().content().abort(client.request(AbortRequest { r#ref: reference.to_owned() })).await;
    abort("ingest-one").await?;
    refused(abort("ingest-one").await, Code::NotFound, "reference ingest-one: not found")?;
    ensure!(statuses(client, &[]).await? == ["ingest-two"]);
    abort("ingest-two").await?;
    let namespace = containerd_client::services::v1::DeleteNamespaceRequest { name: client.namespace().to_owned() };
    let kept = client.api().namespaces().delete(Request::new(namespace)).await;
    refused(kept, Code::FailedPrecondition, "must be empty, but it still has blobs")?;
    for digest in stored {
        delete(client, &digest).await?;
    }
    Ok(())
}

pub(crate) async fn a_digest_that_is_none_is_refused_wherever_it_is_read(cx: Context) -> Result<()> {
    let client = &kept(&cx).await?;
    let long = format!("sha256:{}", "0".repeat(1 << 20));
    for bad in ["", "sha256:../../../meta.db", "sha256:", "md5:00", &format!("sha256:{}", "A".repeat(64)), &long] {
        refused(info(client, bad).await, Code::InvalidArgument, "failed validation")?;
        refused(read(client, bad, 0, 0).await, Code::InvalidArgument, "failed validation")?;
        refused(delete(client, bad).await, Code::InvalidArgument, "failed validation")?;
        let update = UpdateRequest { info: Some(Info { digest: bad.to_owned(), ..Info::default() }), update_mask: None };
        refused(client.api().content().update(client.request(update)).await, Code::InvalidArgument, "failed validation")?;
        if !bad.is_empty() {
            let begun = Upload::begin(client, WriteContentRequest { expected: bad.to_owned(), ..stat("r") }).await;
            refused(begun, Code::InvalidArgument, "failed validation")?;
        }
    }
    refused(Upload::begin(client, stat("")).await, Code::InvalidArgument, "first message must have a reference")?;
    refused(Upload::begin(client, stat(&"r".repeat(5000))).await, Code::InvalidArgument, "a ref of 5000 bytes")?;
    // references are no paths
    let stored = store(client, "../../../r/\u{1F980}\n", b"x", &[]).await?;
    for algorithm in ["sha384", "sha512"] {
        let expected = digest(algorithm, b"long")?;
        let (mut upload, _) = Upload::begin(client, WriteContentRequest { expected: expected.clone(), ..stat("long") }).await?;
        upload.send(write(0, b"long")).await?;
        ensure!(upload.send(commit(4, 4, &expected)).await?.digest == expected);
        ensure!(read(client, &expected, 1, 2).await? == b"on");
        // also when only the commit names it
        delete(client, &expected).await?;
        let (mut upload, _) = Upload::begin(client, stat("long")).await?;
        upload.send(write(0, b"long")).await?;
        ensure!(upload.send(commit(4, 4, &expected)).await?.digest == expected);
        delete(client, &expected).await?;
    }
    ensure!(statuses(client, &[]).await?.is_empty());
    Ok(delete(client, &stored).await?)
}

pub(crate) async fn a_write_that_a_crash_has_cut_off_is_resumed(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = &kept(&cx).await?;
    let data = bytes(4 << 20);
    let expected = digest("sha256", &data)?;
    let kept = store(client, "kept", b"kept", &[("containerd.io/gc.root", "x")]).await?;
    let (mut upload, _) = Upload::begin(client, stat("r")).await?;
    upload.send(write(0, &data[..3 << 20])).await?;
    cx.crash_daemon().await?;
    is_sound(&cx)?;
    let (mut upload, answer) = Upload::begin(client, stat("r")).await?;
    ensure!((answer.offset, answer.digest) == (3 << 20, digest("sha256", &data[..3 << 20])?));
    let mut last = commit(3 << 20, 4 << 20, &expected);
    last.data = data[3 << 20..].to_vec();
    last.labels = [("containerd.io/gc.root".to_owned(), "x".to_owned())].into();
    upload.send(last).await?;
    // what is half there begins again
    for (number, broken) in ["ref", "data", "startedat", "total"].into_iter().enumerate() {
        let reference = format!("broken-{number}");
        let (mut upload, _) = Upload::begin(client, WriteContentRequest { total: 9, ..stat(&reference) }).await?;
        upload.send(write(0, b"abc")).await?;
        drop(upload);
        // once the daemon has noticed
        let (upload, _) = Upload::begin(client, stat(&reference)).await?;
        let ingest = fs::read_dir(folder(&cx).join("ingest"))?.next().context("an ingest")??.path();
        fs::write(ingest.join(broken), "")?;
        drop(upload);
        let (mut upload, answer) = Upload::begin(client, stat(&reference)).await?;
        // empty data is whole, and so is what has no total
        ensure!(answer.offset == if broken == "total" { 3 } else { 0 }, "{broken}: {answer:?}");
        let mut whole = commit(answer.offset, 3, "");
        whole.data = b"abc"[usize::try_from(answer.offset)?..].to_vec();
        let stored = upload.send(whole).await?.digest;
        delete(client, &stored).await?;
    }
    // and what no row has is removed by the next start
    let stray = digest("sha256", b"stray")?;
    cx.daemon().kill()?;
    fs::write(blob(&cx, &stray), b"stray")?;
    cx.revive_daemon().await?;
    eventually_true("the stray file is removed", SOON, || !blob(&cx, &stray).exists()).await?;
    ensure!(read(client, &expected, 0, 0).await? == data && read(client, &kept, 0, 0).await? == b"kept");
    ensure!(ingests(&cx)? == 0);
    Ok(())
}

pub(crate) async fn a_write_and_a_read_go_on_over_upgrades(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = &kept(&cx).await?;
    let data = bytes(8 << 20);
    let expected = digest("sha256", &data)?;
    let long = store(client, "long", &data[1..], &[]).await?;
    let request = client.request(ReadContentRequest { digest: long, ..ReadContentRequest::default() });
    let mut reading = client.api().content().read(request).await?.into_inner();
    let mut received = reading.message().await?.context("a block")?.data;
    let first = WriteContentRequest { total: 8 << 20, ..stat("r") };
    let (mut upload, _) = Upload::begin(client, first).await?;
    let mut pids = Vec::new();
    for part in 0..7 {
        if part % 3 == 1 {
            // the process before it stays for its streams
            let printed = printed(&mut upgrade(cx.daemon())?)?;
            pids.push(printed.split(' ').nth(1).context("a pid")?.parse()?);
        }
        let offset = part << 20;
        let answer = upload.send(write(offset, &data[usize::try_from(offset)?..usize::try_from(offset)? + (1 << 20)])).await?;
        ensure!(answer.offset == offset + (1 << 20), "{answer:?}");
    }
    let mut last = commit(7 << 20, 8 << 20, &expected);
    last.data = data[7 << 20..].to_vec();
    last.labels = [("a".to_owned(), "1".to_owned())].into();
    ensure!(upload.send(last).await?.digest == expected);
    while let Some(block) = reading.message().await? {
        received.extend(block.data);
    }
    ensure!(received == data[1..]);
    ensure!(read(client, &expected, 0, 0).await? == data && info(client, &expected).await?.labels["a"] == "1");
    drop((upload, reading));
    for pid in pids {
        cx.daemon().is_succeeded_by(pid).await?;
    }
    is_sound(&cx)
}

/// Five crashes; `X_KILLS` for more, `X_SEED` for others.
pub(crate) async fn content_that_was_acknowledged_survives_kills_at_any_instant(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let (crashes, mut seed) = (number("X_KILLS", 5), number("X_SEED", 1));
    let mut below = move |end: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % end
    };
    // what must be there, and what may be: for it no answer came
    let (mut kept, mut maybe) = (HashMap::<String, Vec<u8>>::new(), HashSet::<String>::new());
    for crash in 0..crashes {
        let mut writers = JoinSet::new();
        for writer in 0..4_u64 {
            let (client, first) = (cx.client().clone(), crash * 1_000_000 + writer * 100_000);
            let removed: Vec<_> =
                kept.keys().filter(|digest| digest.as_bytes()[7] % 4 == u8::try_from(writer % 4).unwrap_or(0)).cloned().collect();
            let size = usize::try_from(1000 + below(400_000))?;
            writers.spawn(write_until_killed(client, first, size, removed));
        }
        tokio::time::sleep(Duration::from_millis(20 + below(150))).await; // the instant is what is tested
        cx.daemon().kill()?;
        while let Some(written) = writers.join_next().await {
            let written = written??;
            for digest in written.removed.iter().chain(&written.unknown) {
                kept.remove(digest);
            }
            kept.extend(written.stored);
            maybe.extend(written.unknown);
        }
        cx.revive_daemon().await?;
        cx.client().reconnected().await?;
        is_sound(&cx).with_context(|| format!("crash {crash}"))?;
        for (digest, data) in &kept {
            ensure!(&read(cx.client(), digest, 0, 0).await.with_context(|| format!("crash {crash}: {digest} was acknowledged"))? == data);
        }
        let there: HashSet<_> = list(cx.client(), &[]).await?.into_iter().map(|info| info.digest).collect();
        let unexpected: Vec<_> = there.iter().filter(|digest| !kept.contains_key(*digest) && !maybe.contains(*digest)).collect();
        ensure!(unexpected.is_empty(), "crash {crash}: {unexpected:?} were removed");
        eventually("every file has a row", SOON, async || {
            let files = fs::read_dir(folder(&cx).join("blobs/sha256"))?.count();
            ensure!(files == there.len(), "{files} files, {} rows", there.len());
            ensure!(fs::read_dir(folder(&cx).join("removed"))?.count() == 0, "files are being removed");
            Ok(())
        })
        .await?;
    }
    println!("{} blobs are there after {crashes} crashes", kept.len());
    Ok(())
}

/// What one client knows of its content when the daemon is gone.
#[derive(Debug, Default)]
struct Written {
    stored: HashMap<String, Vec<u8>>,
    removed: Vec<String>,
    unknown: Vec<String>,
}

async fn write_until_killed(client: Client, first: u64, size: usize, remove: Vec<String>) -> Result<Written> {
    let mut written = Written::default();
    let mut remove = remove.into_iter();
    for number in first.. {
        let data: Vec<u8> = number.to_be_bytes().into_iter().cycle().take(size).collect();
        match store(&client, &format!("r{number}"), &data, &[("containerd.io/gc.root", "x")]).await {
            Ok(digest) => drop(written.stored.insert(digest, data)),
            Err(_killed) => {
                written.unknown.push(digest("sha256", &data)?);
                break;
            }
        }
        if let Some(digest) = remove.next() {
            match delete(&client, &digest).await {
                Ok(()) => written.removed.push(digest),
                Err(_killed) => {
                    written.unknown.push(digest);
                    break;
                }
            }
        }
    }
    Ok(written)
}

pub(crate) async fn content_that_finds_no_room_leaves_nothing(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    cx.daemon().stop()?;
    let root = cx.daemon().folder().join("root");
    fs::rename(&root, cx.folder().join("root"))?;
    fs::create_dir(&root)?;
    nix::mount::mount(Some("tmpfs"), &root, Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=12m"))?;
    cx.revive_daemon().await?;
    let result = full(&cx, &root).await;
    cx.daemon().stop()?;
    nix::mount::umount(&root)?;
    result
}

async fn full(cx: &Context, root: &Path) -> Result<()> {
    let client = &kept(cx).await?;
    let kept = store(client, "kept", &bytes(1 << 20), &[("containerd.io/gc.root", "x")]).await?;
    let data = bytes(1 << 20);
    let (mut upload, _) = Upload::begin(client, stat("r")).await?;
    let mut offset = 0;
    let refusal = loop {
        match upload.send(write(offset, &data)).await {
            Ok(answer) => offset = answer.offset,
            Err(status) => break status,
        }
        ensure!(offset < 12 << 20, "the disk does not fill up");
    };
    ensure!(refusal.code() == Code::ResourceExhausted, "{refusal:?}");
    ensure!(read(client, &kept, 0, 0).await? == bytes(1 << 20), "reading needs no room");
    // nothing can be begun without room for a single file, and nothing is left of the attempt
    let ballast = root.join("ballast");
    let mut filler = 0;
    while fs::write(&ballast, vec![0; filler + 4096]).is_ok() {
        filler += 4096;
    }
    let begun = Upload::begin(client, stat("another")).await.map(drop);
    ensure!(ingests(cx)? <= 1 + usize::from(begun.is_ok()));
    client.api().content().abort(client.request(AbortRequest { r#ref: "r".to_owned() })).await?;
    fs::remove_file(&ballast)?;
    let again = store(client, "r", &data[1..], &[]).await?;
    ensure!(read(client, &again, 0, 0).await? == data[1..]);
    is_sound(cx)
}
