//! Workloads that the conformance suite and our own tests share; each checks its own expectations afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tokio::task::JoinSet;

use crate::bundle::{Container, leave};
use crate::eventually::eventually;
use crate::stand::Stand;
use crate::stdio::{self, Writer};

/// `total` of the shortest execs, `at_once` at a time, and the end of their container: each is published as added, started and exited, and
/// perhaps as deleted. Returns the events of the container.
pub async fn short_execs(container: &Container, total: usize, at_once: usize) -> Result<Vec<String>> {
    let mut runs = JoinSet::new();
    let mut statuses = 0;
    for number in 0..total {
        let (task, id, request) =
            (container.task.clone(), container.id.clone(), container.bundle.exec_request(&format!("e{number}"), &["true"]));
        runs.spawn(async move {
            task.exec(&request).await?;
            task.start(&id, &request.exec_id).await?;
            let status = task.wait(&id, &request.exec_id).await?;
            task.delete(&id, &request.exec_id).await?;
            anyhow::Ok(status)
        });
        if runs.len() >= at_once {
            statuses += runs.join_next().await.context("it was spawned")???;
        }
    }
    while let Some(status) = runs.join_next().await {
        statuses += status??;
    }
    ensure!(statuses == 0, "{statuses}");
    ensure!(container.destroy().await? == 137);
    let published = container.stand().containerd().events().of_until(&container.id, "delete").await?;
    let mut by_exec: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for event in &published {
        if let Some((_, exec)) = event.split_once('(') {
            by_exec.entry(exec).or_default().push(event);
        }
    }
    for number in 0..total {
        let of_it = by_exec.remove(format!("e{number})").as_str()).unwrap_or_default();
        let expected = ["exec-added", "exec-started", "exit"].map(|topic| format!("{topic}(e{number})"));
        ensure!(of_it.len() >= 3 && of_it[..3] == expected, "e{number}: {of_it:?}");
        ensure!(of_it[3..].iter().all(|event| event.starts_with("delete")) && of_it.len() <= 4, "e{number}: {of_it:?}");
    }
    Ok(published)
}

/// A log file on a full disk: the container `c1` is delayed for a while only, and continues with the next byte that can be written.
pub async fn full_disk(stand: &Stand) -> Result<()> {
    let disk = stand.folder().join("disk");
    fs::create_dir(&disk)?;
    mount(Some("tmpfs"), &disk, Some("tmpfs"), MsFlags::empty(), Some("size=64k"))?;
    let filler = disk.join("filler");
    let _full = fs::write(&filler, vec![0; 1 << 20]);
    let (log, go) = (disk.join("out"), stand.folder().join("go"));
    stdio::fifo(&go)?;
    // more than a pipe holds
    let script = "i=0; while [ $i -lt 4000 ]; do i=$((i+1)); echo line $i that is not written; done; read go; echo last; exit 3";
    let uri = format!("file://{}", text(&log));
    let container = stand.bundle("c1", &["sh", "-c", script]).stdio(&text(&go), &uri, &uri).run().await?;
    let pid = container.pid.cast_signed();
    eventually("it gets past the bytes that cannot be written", Duration::from_secs(15), async || {
        let place = fs::read_to_string(format!("/proc/{pid}/wchan"))?;
        ensure!(place.contains("pipe_read") || place.contains("poll"), "{place}");
        Ok(())
    })
    .await?;
    fs::remove_file(&filler)?;
    Writer::open(&go).await?.write_all(b"go\n")?;
    ensure!(container.finish().await? == 3);
    let written = fs::read_to_string(&log)?;
    ensure!(written.ends_with("last\n"), "{:?}", &written[written.len().saturating_sub(100)..]);
    leave(&container.task, container.shim_pid()?, "c1").await?;
    umount2(&disk, MntFlags::MNT_DETACH)?;
    Ok(())
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
