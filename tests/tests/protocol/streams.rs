//! Output and input in trouble: full disks, slow readers, loggers that take their time, grandchildren that hold on.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use containerd_shim_protos::api;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use shim_tests::bundle::leave;
use shim_tests::eventually::{SOON, a_second, eventually, within};
use shim_tests::proc;
use shim_tests::stand::Stand;
use shim_tests::stdio::{self, Pace, Reader, Writer};
use shim_tests::ttrpc::refusal;
use shim_tests::witness::Witness;

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// A background process of an exec holds its output open: nobody waits for it for ever, and nothing is kept because of it.
pub(crate) async fn grandchildren_that_hold_the_output_cost_nothing_lasting(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let shim = container.shim_pid()?;
    let mut files = None;
    for round in 0..3 {
        let mut readers = Vec::new();
        for number in 0..15 {
            let exec = format!("e{round}-{number}");
            let path = stand.folder().join(&exec);
            stdio::fifo(&path)?;
            readers.push(Reader::open(&path, Pace::Keep)?);
            let add = api::ExecProcessRequest {
                stdout: text(&path),
                stderr: text(&path),
                ..container.bundle.exec_request(&exec, &["sh", "-c", "sleep 1000 & echo said; exit 2"])
            };
            container.task.exec(&add).await?;
            container.task.start("c1", &exec).await?;
            let begin = Instant::now();
            ensure!(container.task.wait("c1", &exec).await? == 2);
            ensure!(begin.elapsed() < a_second(), "Wait took {:?}", begin.elapsed());
        }
        for (number, reader) in readers.iter().enumerate() {
            ensure!(reader.to_end_within(Duration::from_secs(5)).await? == "said\n", "{round}-{number}");
            container.task.delete("c1", &format!("e{round}-{number}")).await?;
        }
        let open = proc::open_files(shim)?.len();
        ensure!(files.is_none_or(|files| open <= files), "{open} files are open, {files:?} before");
        files.get_or_insert(open);
    }
    container.shut_down().await.map(drop)
}

/// No byte more goes into the file: the container is held up for a while only, what is lost is counted, and it goes on with the next.
pub(crate) async fn a_full_disk_does_not_stop_a_container_for_good(stand: Stand) -> Result<()> {
    let disk = stand.folder().join("disk");
    fs::create_dir(&disk)?;
    mount(Some("tmpfs"), &disk, Some("tmpfs"), MsFlags::empty(), Some("size=64k"))?;
    let filler = disk.join("filler");
    let _full = fs::write(&filler, vec![0; 1 << 20]);
    let (log, go) = (disk.join("out"), stand.folder().join("go"));
    stdio::fifo(&go)?;
    // more than a pipe holds
    let script = "i=0; while [ $i -lt 4000 ]; do i=$((i+1)); echo line $i of those that nobody will see; done; read go; echo last; exit 3";
    let bundle = stand.bundle("c1", &["sh", "-c", script]).stdio(&text(&go), &format!("file://{}", text(&log)), "");
    let container = bundle.run().await?;
    let pid = container.pid.cast_signed();
    // with its output in the pipe's way it would not get there
    eventually("it goes on", Duration::from_secs(15), async || {
        let place = fs::read_to_string(format!("/proc/{pid}/wchan"))?;
        ensure!(place.contains("pipe_read") || place.contains("poll"), "{place}");
        Ok(())
    })
    .await?;
    // what is not thrown away yet is on its way
    let size = || fs::metadata(&log).map_or(0, |about| about.len());
    let before = size();
    fs::remove_file(&filler)?;
    let mut stdin = Writer::open(&go).await?;
    stdin.write_all(b"go\n")?;
    ensure!(container.task.wait("c1", "").await? == 3);
    ensure!(container.finish().await? == 3);
    let written = fs::read_to_string(&log)?;
    ensure!(written.ends_with("last\n"), "{} bytes before, {} now: {:?}", before, size(), &written[written.len().saturating_sub(100)..]);
    eventually("the loss is told", SOON, async || {
        let said = stand.log_of("c1");
        ensure!(said.contains("lost_bytes="), "{said}");
        Ok(())
    })
    .await?;
    umount2(&disk, MntFlags::MNT_DETACH)?;
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// A program for `binary://` that is a script.
fn logger(stand: &Stand, name: &str, script: &str) -> Result<String> {
    let path = stand.folder().join(name);
    fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
    fs::set_permissions(&path, Permissions::from_mode(0o755))?;
    Ok(format!("binary://{}", text(&path)))
}

pub(crate) async fn a_slow_logger_holds_up_its_own_container_only_and_gets_everything(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let out = stand.folder().join("out");
    let script = format!("sleep 1; exec 5>&-; sleep 1; cat <&3 > {0}.part; mv {0}.part {0}", text(&out));
    let uri = logger(&stand, "slow", &script)?;
    let bundle = witness.sibling("c1", &["sh", "-c", "seq 1 50000; exit 3"]).stdio("", &uri, &uri);
    let task = witness.container.task.another().await?;
    let begin = Instant::now();
    let create = tokio::spawn(async move { bundle.run_in(&task).await });
    while !create.is_finished() {
        witness.is_untouched().await?;
    }
    let container = create.await??;
    ensure!(begin.elapsed() >= Duration::from_secs(1), "it was not waited for");
    // half a megabyte does not fit the pipe: the container waits for the logger, and nothing is lost
    ensure!(container.finish().await? == 3);
    eventually("the logger has everything", SOON, async || {
        let seen = fs::read_to_string(&out)?;
        ensure!(seen.lines().count() == 50_000 && seen.ends_with("50000\n"), "{} bytes", seen.len());
        Ok(())
    })
    .await?;
    witness.dismiss().await
}

/// Create waits for a logger that will never be ready: containerd gives up, and `delete` ends it.
pub(crate) async fn a_logger_that_is_never_ready_is_ended_by_delete(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let mark = stand.folder().join("mark");
    let uri = logger(&stand, "never", &format!("echo > {}; exec sleep 1000", text(&mark)))?;
    let bundle = witness.sibling("c1", &["true"]).stdio("", &uri, &uri);
    bundle.start_shim().await?;
    let (task, request) = (witness.container.task.another().await?, bundle.request());
    let create = tokio::spawn(async move { task.create(&request).await });
    eventually("the logger runs", SOON, async || Ok(fs::metadata(&mark)?)).await?;
    witness.is_untouched().await?;
    let begin = Instant::now();
    ensure!(bundle.delete_command().await?.exit_status == 137);
    ensure!(begin.elapsed() < Duration::from_secs(5), "it took {:?}", begin.elapsed());
    refusal(within("create", SOON, create).await??)?;
    // and the id is free
    let again = witness.sibling("c1", &["sh", "-c", "exit 3"]).run_in(&witness.container.task).await?;
    ensure!(again.finish().await? == 3);
    witness.dismiss().await
}
