//! Files in containers, what is removed, what is held, and the daemon's replacement.

use std::fs;
use std::os::unix::fs::symlink;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::operator::output_text;
use shim_tests::{rootfs, suite};

use crate::harness::Xctl;

pub(crate) async fn files_are_copied_in_and_out_and_no_link_leads_to_the_host(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    let (root, tree) = (cx.folder().join("root"), cx.folder().join("tree"));
    rootfs::make(&root)?;
    fs::create_dir_all(tree.join("sub"))?;
    fs::write(tree.join("sub/file"), "content\n")?;
    fs::write(cx.folder().join("secret"), "of the host")?;
    symlink(cx.folder(), root.join("mnt/trap"))?;
    let mut command = xctl.command(&["run", "--detach", "--name", "box", "--tmpfs", "/tmp", "--rootfs"]);
    let output = command.arg(&root).args(xctl.place()).args(["sleep", "1000"]).output()?;
    ensure!(output.status.success(), "{}", output_text(&output));
    let (from, to) = (tree.display().to_string(), cx.folder().join("out").display().to_string());
    // a file system of the container alone, which the host does not have
    xctl.prints(&["cp", &from, "box:/tmp"])?;
    ensure!(xctl.prints(&["exec", "box", "cat", "/tmp/tree/sub/file"])? == "content\n");
    xctl.prints(&["exec", "box", "sh", "-c", "echo changed > /tmp/tree/sub/file"])?;
    xctl.prints(&["cp", "box:/tmp/tree", &to])?;
    ensure!(fs::read_to_string(cx.folder().join("out/sub/file"))? == "changed\n");
    for path in ["box:/mnt/trap/secret", "box:/proc/1/root/../secret"] {
        let (status, text) = xctl.fails(&["cp", path, &to])?;
        ensure!(status == 1 && !cx.folder().join("out/secret").exists(), "{path}: {text}");
    }
    let (_, text) = xctl.fails(&["cp", &from, "box:/mnt/trap/"])?;
    ensure!(text.contains("there is no folder /mnt/trap/"), "{text}");
    ensure!(!cx.folder().join("tree/tree").exists());
    let (_, text) = xctl.fails(&["cp", "/etc/hostname", "/tmp/x"])?;
    ensure!(text.contains("CONTAINER:PATH"), "{text}");
    let (_, text) = xctl.fails(&["cp", "box:/dev/null", &to])?;
    ensure!(text.contains("is a device"), "{text}");
    // of a container that does not run
    xctl.prints(&["stop", "--time", "0", "box"])?;
    xctl.prints(&["cp", &from, "box:/root/new"])?;
    ensure!(fs::read_to_string(root.join("root/new/sub/file"))? == "content\n");
    xctl.prints(&["rm", "box"])?;
    xctl.leaves_nothing().await
}

pub(crate) async fn prune_removes_what_has_exited_and_nothing_else(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    for (name, program) in [("ended", &["echo", "said"][..]), ("runs", &["sleep", "1000"])] {
        ensure!(xctl.run(&["--detach", "--name", name], program)?.status.success());
    }
    ensure!(xctl.container("create", &["--name", "waits"], &["true"])?.output()?.status.success());
    // of another client, which may still want it
    let other = cx.container(&["true"]).start().await?;
    other.wait().await?;
    let (status, text) = eventually("one has exited", SOON, async || xctl.fails(&["prune"])).await?;
    ensure!(status == 1 && text.contains("ended would be removed; --force"), "{text}");
    let held: Value = serde_json::from_str(&xctl.prints(&["--format", "json", "df"])?)?;
    let row = |kind: &str| held.as_array().and_then(|rows| rows.iter().find(|row| row["kind"] == kind)).cloned().unwrap_or_default();
    ensure!(row("logs")["size_bytes"] == 5 && row("logs")["removable_bytes"] == 5 && row("containers")["count"] == 4, "{held}");
    ensure!(row("content")["count"].is_u64() && row("layers")["count"].is_u64(), "{held}");
    ensure!(xctl.prints(&["df"])?.starts_with("WHAT "));
    ensure!(xctl.prints(&["prune", "--force"])? == "ended\n");
    ensure!(xctl.prints(&["prune", "--force"])?.is_empty());
    let mut left: Vec<_> = xctl.prints(&["ps", "--all", "--quiet"])?.lines().map(str::to_owned).collect();
    left.sort();
    let mut expected = vec![other.id.clone(), "runs".to_owned(), "waits".to_owned()];
    expected.sort();
    ensure!(left == expected, "{left:?}");
    other.delete().await?;
    other.remove().await?;
    xctl.prints(&["rm", "--force", "runs", "waits"])?;
    xctl.leaves_nothing().await
}

pub(crate) async fn an_upgrade_is_the_managers(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let xctl = Xctl::new(&cx)?;
    let state = cx.daemon().folder().join("state").display().to_string();
    if suite::manager().is_none() {
        let (status, text) = xctl.fails(&["upgrade", "--manager-state", &state])?;
        ensure!(status == 1 && text.contains("no x-manager can be asked at"), "{text}");
        return Ok(());
    }
    let (_, text) = xctl.fails(&["upgrade", "--manager-state", &state, "--binary", "/no/such/program"])?;
    ensure!(text.contains("x-manager is not upgraded, and the running one stays: "), "{text}");
    let printed = xctl.prints(&["upgrade", "--manager-state", &state])?;
    let pid = printed.strip_prefix("process ").and_then(|rest| rest.strip_suffix(" has taken over\n")).context(printed.clone())?;
    cx.daemon().is_succeeded_by(pid.parse()?).await?;
    ensure!(xctl.run(&["--rm"], &["echo", "hello"])?.stdout == b"hello\n");
    xctl.leaves_nothing().await
}
