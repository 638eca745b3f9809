//! Limits: disk space, memory, connections and descriptors.

use std::fs;
use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::events::TaskExit;
use containerd_client::services::v1::{self as leases, CreateTaskRequest, ListContainersRequest, SubscribeRequest};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use prost::Message as _;
use prost_types::Any;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::operator::{Own, binary, printed};
use shim_tests::proc;
use shim_tests::programs::script;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Code, Request};

fn spec(bytes: usize) -> Any {
    Any { type_url: "example.test/spec".to_owned(), value: vec![b'x'; bytes] }
}

pub(crate) async fn a_full_disk_refuses_new_entries_and_loses_nothing(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let root = own.folder().join("root");
    fs::create_dir_all(&root)?;
    mount(Some("tmpfs"), &root, Some("tmpfs"), MsFlags::empty(), Some("size=8m"))?;
    let result = fill(&mut own).await;
    drop(own);
    umount2(&root, MntFlags::MNT_DETACH)?;
    result
}

async fn fill(own: &mut Own) -> Result<()> {
    fs::write(own.folder().join("root/ballast"), vec![1; 1_500_000])?;
    let client = own.start().await?;
    let mut count = 0;
    let status = loop {
        match client.create_container(&format!("c{count}"), "io.containerd.x.v2", None, spec(20_000)).await {
            Ok(()) => count += 1,
            Err(status) => break status,
        }
        ensure!(count < 1000, "it is never full");
    };
    ensure!(status.code() == Code::ResourceExhausted, "{status:?}");
    ensure!(status.message().contains("full"), "{status:?}");
    ensure!(count > 10, "{count}");
    // reads work, so do a restart and an upgrade, and no acknowledged change is missing
    printed(&mut own.command(&["upgrade"])?)?;
    ensure!(own.ended().await?, "{}", own.log());
    let client = own.client().await?;
    for id in 0..count {
        let status = client.create_container(&format!("c{id}"), "io.containerd.x.v2", None, spec(1)).await.expect_err("taken");
        ensure!(status.code() == Code::AlreadyExists, "c{id}: {status:?}");
    }
    // space is freed
    fs::remove_file(own.folder().join("root/ballast"))?;
    for id in 0..count / 2 {
        client.delete_container(&format!("c{id}")).await?;
    }
    client.create_container("new", "io.containerd.x.v2", None, spec(1000)).await?;
    printed(&mut own.command(&["check"])?).map(drop)
}

pub(crate) async fn containers_can_be_deleted_on_a_disk_that_is_full_to_the_last_byte(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let root = own.folder().join("root");
    fs::create_dir_all(&root)?;
    mount(Some("tmpfs"), &root, Some("tmpfs"), MsFlags::empty(), Some("size=8m"))?;
    let result = delete_on_a_full_disk(&mut own).await;
    drop(own);
    umount2(&root, MntFlags::MNT_DETACH)?;
    result
}

async fn delete_on_a_full_disk(own: &mut Own) -> Result<()> {
    let client = own.start().await?;
    for number in 0..60 {
        client.create_container(&format!("c{number}"), "io.containerd.x.v2", None, spec(10_000)).await?;
    }
    let mut ballast = fs::File::create(own.folder().join("root/ballast"))?;
    for piece in [1 << 20, 4096, 1] {
        while ballast.write_all(&vec![1; piece]).is_ok() {}
    }
    // SQLite first fills the space that its log already has
    let mut count = 60;
    while client.create_container(&format!("c{count}"), "io.containerd.x.v2", None, spec(100_000)).await.is_ok() {
        count += 1;
    }
    for number in 0..count {
        client.delete_container(&format!("c{number}")).await.with_context(|| format!("c{number}: {}", own.log()))?;
    }
    ballast.set_len(0)?;
    client.create_container("new", "io.containerd.x.v2", None, spec(10_000)).await?;
    let reserve = own.folder().join("root/reserve");
    eventually_true("the reserve is made again", SOON, || reserve.exists()).await?;
    printed(&mut own.command(&["check"])?).map(drop)
}

pub(crate) async fn a_store_that_was_large_becomes_small_again(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let client = own.start().await?;
    let bytes = || Ok::<_, std::io::Error>(fs::metadata(own.folder().join("root/meta.db"))?.len());
    for number in 0..200 {
        client.create_container(&format!("c{number}"), "io.containerd.x.v2", None, spec(50_000)).await?;
    }
    eventually_true("it is large", SOON, || bytes().is_ok_and(|bytes| bytes > 8 << 20)).await?;
    for number in 0..200 {
        client.delete_container(&format!("c{number}")).await?;
    }
    eventually_true("it is small", SOON, || bytes().is_ok_and(|bytes| bytes < 1 << 20)).await
}

pub(crate) async fn memory_used_by_a_burst_of_calls_is_freed(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let client = own.start().await?;
    let pid = own.pid().map_or(0, u32::cast_signed);
    for number in 0..200 {
        client.create_container(&format!("c{number}"), "io.containerd.x.v2", None, spec(50_000)).await?;
    }
    let before = proc::private_kib(pid)?;
    let mut storm = tokio::task::JoinSet::new();
    for _client in 0..32 {
        let client = own.client().await?;
        storm.spawn(async move {
            let request = client.request(ListContainersRequest::default());
            client.api().containers().max_decoding_message_size(16 << 20).list(request).await.map(drop)
        });
    }
    for answered in storm.join_all().await {
        answered?;
    }
    eventually("it is small again", SOON * 3, async || {
        let grown = proc::private_kib(pid)?.saturating_sub(before);
        ensure!(grown < 16 << 10, "memory has grown by {grown} KiB");
        Ok(())
    })
    .await
}

pub(crate) async fn a_lease_is_removed_when_its_expiry_label_has_passed(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let client = own.start().await?;
    for (id, expiry) in [("past", "2026-01-02T03:04:05Z"), ("future", "2226-01-02T03:04:05.6+07:00"), ("never", "whenever")] {
        let labels = [("containerd.io/gc.expire".to_owned(), expiry.to_owned())].into();
        client.api().leases().create(client.request(leases::CreateRequest { id: id.to_owned(), labels })).await?;
        let resource = Some(leases::Resource { id: "i".to_owned(), r#type: "images".to_owned() });
        client.api().leases().add_resource(client.request(leases::AddResourceRequest { id: id.to_owned(), resource })).await?;
    }
    eventually("expired entries are removed", SOON, async || {
        let leases = client.api().leases().list(client.request(leases::ListRequest::default())).await?.into_inner().leases;
        let ids: Vec<_> = leases.iter().map(|lease| lease.id.as_str()).collect();
        ensure!(ids == ["future", "never"], "{ids:?}");
        Ok(())
    })
    .await?;
    let held = client.api().leases().list_resources(client.request(leases::ListResourcesRequest { id: "future".to_owned() })).await?;
    ensure!(held.into_inner().resources.len() == 1);
    printed(&mut own.command(&["check"])?).map(drop)
}

pub(crate) async fn a_client_that_never_reads_its_events_is_dropped_with_an_error(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let client = own.start().await?;
    let pid = own.pid().map_or(0, u32::cast_signed);
    let mut silent = own.client().await?.subscribe().await?;
    let before = proc::private_kib(pid)?;
    for _event in 0..100 {
        tokio::time::timeout(Duration::from_secs(2), client.publish("/test/long", spec(500_000))).await??;
    }
    let grown = proc::private_kib(pid)?.saturating_sub(before);
    ensure!(grown < 16 << 10, "memory has grown by {grown} KiB");
    let mut received = 0;
    let last = loop {
        match tokio::time::timeout(SOON, silent.message()).await? {
            Ok(Some(_)) => received += 1,
            last => break last,
        }
    };
    ensure!((2..30).contains(&received), "{received}");
    ensure!(last.as_ref().is_err_and(|status| status.code() == Code::ResourceExhausted), "{last:?}");
    Ok(())
}

pub(crate) async fn a_costly_filter_ends_its_subscription_and_no_call_waits_for_it(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let client = own.start().await?;
    let subscribe = async |filters: Vec<String>| {
        let request = Request::new(SubscribeRequest { filters });
        anyhow::Ok(client.api().events().subscribe(request).await?.into_inner())
    };
    let mut costly = Vec::new();
    for _subscriber in 0..20 {
        costly.push(subscribe((0..16).map(|number| format!("event.id~=/(x?){{50}}y{number}/")).collect()).await?);
    }
    let mut modest = subscribe(vec!["namespace==default, topic~=|^/test/|".to_owned()]).await?;
    let event = TaskExit { container_id: "c".to_owned(), id: "x".repeat(4000), ..TaskExit::default() };
    let event = Any { type_url: "containerd.events.TaskExit".to_owned(), value: event.encode_to_vec() };
    for number in 0..10 {
        let topic = format!("/test/n{number}");
        let published = client.publish(&topic, event.clone());
        tokio::time::timeout(Duration::from_secs(2), published).await.context("a call waits")??;
    }
    for mut costly in costly {
        let last = tokio::time::timeout(Duration::from_secs(20), costly.message()).await?;
        let is_clear = |status: &tonic::Status| status.code() == Code::ResourceExhausted && status.message().contains("CPU time");
        ensure!(last.as_ref().is_err_and(is_clear), "{last:?}");
        tokio::time::timeout(Duration::from_secs(2), client.version()).await.context("a call waits")??;
    }
    for number in 0..10 {
        let envelope = tokio::time::timeout(SOON, modest.message()).await??.context("an event")?;
        ensure!(envelope.topic == format!("/test/n{number}"), "{envelope:?}");
    }
    Ok(())
}

/// The `:authority` that gRPC's C core sends over `unix:/run/x.sock`; no Rust client can send it.
pub(crate) async fn an_authority_with_percent_signs_is_served(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    own.start().await?;
    let text = |text: &str| [&[u8::try_from(text.len()).expect("short")], text.as_bytes()].concat();
    let field = |name: &str, value: &str| [vec![0x40], text(name), text(value)].concat();
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        let length = u8::try_from(payload.len()).expect("short");
        [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat()
    };
    for authority in [field(":authority", "run%2Fx-manager%2Fx.sock"), [vec![0x41], text("run%2Fx.sock")].concat()] {
        let fields = [
            field(":path", "/containerd.services.version.v1.Version/Version"),
            authority,
            vec![0x83, 0x86],
            field("content-type", "application/grpc"),
            field("te", "trailers"),
        ]
        .concat();
        let mut socket = tokio::net::UnixStream::connect(own.address()).await?;
        let opening = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(4, 0, 0, &[]), &frame(1, 4, 1, &fields), &frame(0, 1, 1, &[0; 5])];
        socket.write_all(&opening.concat()).await?;
        let answered = async {
            loop {
                let mut header = [0; 9];
                socket.read_exact(&mut header).await?;
                let mut payload = vec![0; usize::from(header[1]) << 8 | usize::from(header[2])];
                socket.read_exact(&mut payload).await?;
                match (header[3], header[8]) {
                    (0, 1) => return Ok(String::from_utf8_lossy(&payload).into_owned()),
                    (3, 1) => anyhow::bail!("the request is reset: {payload:?}"),
                    _ => {}
                }
            }
        };
        let answer = tokio::time::timeout(SOON, answered).await??;
        ensure!(answer.contains("x-manager"), "{answer:?}");
    }
    Ok(())
}

pub(crate) async fn excess_clients_are_refused_and_the_others_served(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "[limits]\nconnections = 5\nsubscribers = 2\n")?;
    let first = own.start().await?;
    let mut held = Vec::new();
    let refused = loop {
        match own.client().await {
            Ok(client) => held.push(client),
            Err(error) => break error,
        }
        ensure!(held.len() < 10, "no connection is refused");
    };
    ensure!((3..6).contains(&held.len()), "{} and then {refused:#}", held.len());
    first.version().await?;
    held.clear();
    let client = shim_tests::eventually::eventually("a place is free again", SOON, async || own.client().await).await?;
    let _two = (client.subscribe().await?, client.subscribe().await?);
    let status = client.subscribe().await.err();
    ensure!(status.as_ref().is_some_and(|status| status.code() == Code::ResourceExhausted), "{status:?}");
    Ok(())
}

pub(crate) async fn ten_thousand_idle_connections_delay_no_call(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let first = own.start().await?;
    let pid = own.pid().map_or(0, u32::cast_signed);
    let before = proc::private_kib(pid)?;
    let mut idle = Vec::new();
    for _connection in 0..10_000 {
        idle.push(tokio::net::UnixStream::connect(own.address()).await?);
    }
    // one that is connected already is served meanwhile
    tokio::time::timeout(Duration::from_secs(2), first.version()).await??;
    let mut turned_away = 0;
    for connection in &idle {
        let mut byte = [0];
        // refused connections are closed; accepted ones have received settings
        if matches!(
            tokio::time::timeout(SOON, async {
                connection.readable().await?;
                connection.try_read(&mut byte)
            })
            .await?,
            Ok(0) | Err(_)
        ) {
            turned_away += 1;
        }
    }
    ensure!((8_900..=9_000).contains(&turned_away), "{turned_away} of 10,000 were turned away");
    let grown = proc::private_kib(pid)?.saturating_sub(before);
    ensure!(grown < 64 << 10, "memory has grown by {grown} KiB");
    drop(idle);
    shim_tests::eventually::eventually("a place is free again", SOON, async || own.client().await).await.map(drop)
}

pub(crate) async fn the_limit_on_open_files_is_raised_for_the_daemon_alone(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let seen = own.folder().join("seen");
    let shim = script(own.folder(), "shim", &format!("#!/bin/sh\nulimit -Sn >> {}\nexit 1\n", seen.display()))?;
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "ulimit -Sn 1000; exec \"$0\" \"$@\""]).arg(binary()?).arg("--config").arg(own.folder().join("config.toml"));
    let client = own.start_as(command).await?;
    client.create_namespace().await?;
    client.create_container("c", &shim.display().to_string(), None, spec(2)).await?;
    for _process in 0..2 {
        let pid = proc::all()
            .into_values()
            .find(|process| process.comm == "x-manager" && proc::mentions(process.pid, &own.folder().display().to_string()));
        let limits = fs::read_to_string(format!("/proc/{}/limits", pid.context("it runs")?.pid))?;
        let own_limit = limits.lines().find(|line| line.starts_with("Max open files")).context("a limit")?.split_whitespace().nth(3);
        ensure!(own_limit.is_some_and(|limit| limit != "1000"), "{own_limit:?}");
        let client = own.client().await?;
        let request = CreateTaskRequest { container_id: "c".to_owned(), ..CreateTaskRequest::default() };
        ensure!(client.create_task(request).await.is_err(), "the shim does not start");
        let text = fs::read_to_string(&seen)?;
        ensure!(!text.is_empty() && text.lines().all(|limit| limit == "1000"), "{text:?}");
        // the successor raises the limit again, and restores the original one for its shims
        printed(&mut own.command(&["upgrade"])?)?;
    }
    Ok(())
}
