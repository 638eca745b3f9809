//! What clients ask for and cannot have.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::CreateTaskRequest;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use prost_types::Any;
use shim_tests::context::Context;
use shim_tests::eventually::SOON;
use shim_tests::operator::{Own, binary, printed};
use shim_tests::proc;
use shim_tests::programs::script;
use tonic::Code;

fn spec(bytes: usize) -> Any {
    Any { type_url: "example.test/spec".to_owned(), value: vec![b'x'; bytes] }
}

pub(crate) async fn a_full_disk_refuses_what_is_new_and_loses_nothing(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let root = own.folder().join("root");
    fs::create_dir_all(&root)?;
    mount(Some("tmpfs"), &root, Some("tmpfs"), MsFlags::empty(), Some("size=4m"))?;
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
    // reading goes on, a restart and an upgrade are no problem, and nothing that was acknowledged is missing
    printed(&mut own.command(&["upgrade"])?)?;
    ensure!(own.ended().await?, "{}", own.log());
    let client = own.client().await?;
    for id in 0..count {
        let status = client.create_container(&format!("c{id}"), "io.containerd.x.v2", None, spec(1)).await.expect_err("taken");
        ensure!(status.code() == Code::AlreadyExists, "c{id}: {status:?}");
    }
    // somebody makes room
    fs::remove_file(own.folder().join("root/ballast"))?;
    for id in 0..count / 2 {
        client.delete_container(&format!("c{id}")).await?;
    }
    client.create_container("new", "io.containerd.x.v2", None, spec(1000)).await?;
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
    ensure!(grown < 16 << 10, "it holds {grown} KiB more");
    let mut heard = 0;
    let last = loop {
        match tokio::time::timeout(SOON, silent.message()).await? {
            Ok(Some(_)) => heard += 1,
            last => break last,
        }
    };
    ensure!((2..30).contains(&heard), "{heard}");
    ensure!(last.as_ref().is_err_and(|status| status.code() == Code::ResourceExhausted), "{last:?}");
    Ok(())
}

pub(crate) async fn too_many_clients_are_turned_away_and_the_others_served(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "[limits]\nconnections = 5\nsubscribers = 2\n")?;
    let first = own.start().await?;
    let mut held = Vec::new();
    let refused = loop {
        match own.client().await {
            Ok(client) => held.push(client),
            Err(error) => break error,
        }
        ensure!(held.len() < 10, "they are never too many");
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
        // what is turned away is closed; what is kept has been sent settings
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
    ensure!(grown < 64 << 10, "it holds {grown} KiB more");
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
        // what takes over has its program's limit raised, and knows the first one all the same
        printed(&mut own.command(&["upgrade"])?)?;
    }
    Ok(())
}
