//! Containers of an image in the daemon's store.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use shim_tests::context::Context;
use shim_tests::operator::{ctr, output_text, printed};
use shim_tests::rootfs;
use shim_tests::runner::needs_images;

use crate::harness::Xctl;

/// As `docker save` would name it.
const IMAGE: &str = "docker.io/library/local:1";

/// Imports busybox as an image that sets everything.
fn import(cx: &Context) -> Result<()> {
    let folder = cx.folder().join("image");
    fs::create_dir_all(&folder)?;
    printed(Command::new("tar").arg("-C").arg(rootfs::shared()?).arg("-cf").arg(folder.join("layer.tar")).arg("."))?;
    let digest = printed(Command::new("sha256sum").arg(folder.join("layer.tar")))?;
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux",
        "config": {
            "Env": ["PATH=/bin", "FROM=image"], "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo default"], "User": "user", "WorkingDir": "/tmp",
            "StopSignal": "SIGUSR1", "Labels": { "of": "the image" },
        },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", digest.split(' ').next().unwrap_or_default())] },
    });
    fs::write(folder.join("config.json"), config.to_string())?;
    let manifest = serde_json::json!([{ "Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"] }]);
    fs::write(folder.join("manifest.json"), manifest.to_string())?;
    let archive = cx.folder().join("image.tar");
    printed(Command::new("tar").arg("-C").arg(&folder).arg("-cf").arg(&archive).args(["manifest.json", "config.json", "layer.tar"]))?;
    printed(ctr(cx).args(["images", "import"]).arg(&archive))?;
    Ok(())
}

pub(crate) async fn an_image_decides_what_the_command_line_does_not(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    if needs_images().is_err() {
        let (status, text) = xctl.fails(&["run", "local:1"])?;
        ensure!(status == 125 && text.contains("this daemon has no image store; --rootfs FOLDER"), "{text}");
        return needs_images();
    }
    import(&cx)?;
    let run = |flags: &[&str], words: &[&str]| {
        let mut command = xctl.command(&["run", "--rm"]);
        command.args(xctl.place()).args(flags).arg("local:1").args(words).output()
    };
    for (flags, words, expected) in [
        (&[][..], &[][..], "default\n"),
        (&[], &["echo $FROM $(id -u) $(pwd)"], "image 1000 /tmp\n"),
        (&["-e", "FROM=here", "-u", "0", "-w", "/"], &["echo $FROM $(id -u) $(pwd)"], "here 0 /\n"),
        (&["--entrypoint", "echo"], &["other"], "other\n"),
        (&["-u", "root"], &["touch /written && ls /written"], "/written\n"),
    ] {
        let output = run(flags, words)?;
        ensure!(output.stdout == expected.as_bytes() && output.status.success(), "{flags:?} {words:?}: {output:?}");
    }
    let output = run(&["--user", "nobody-such"], &[])?;
    ensure!(output.status.code() == Some(125) && output_text(&output).contains("there is no user \"nobody-such\""), "{output:?}");
    let mut command = xctl.command(&["run", "--detach", "--name", "keeps"]);
    command.args(xctl.place()).args(["local:1", "trap 'exit 7' USR1; echo ready > /tmp/ready; sleep 1000 & wait"]);
    ensure!(command.output()?.status.success());
    let inspected: serde_json::Value = serde_json::from_str(&xctl.prints(&["inspect", "keeps"])?)?;
    ensure!(inspected[0]["labels"]["of"] == "the image" && inspected[0]["image"] == IMAGE, "{inspected}");
    shim_tests::eventually::eventually("it is ready", shim_tests::eventually::SOON, async || {
        ensure!(xctl.prints(&["exec", "keeps", "cat", "/tmp/ready"])? == "ready\n");
        Ok(())
    })
    .await?;
    xctl.prints(&["stop", "keeps"])?;
    ensure!(xctl.prints(&["ps", "--all"])?.contains("exited (7)"));
    // its own layer is kept over a restart, and goes with it
    xctl.prints(&["start", "keeps"])?;
    ensure!(xctl.prints(&["exec", "keeps", "cat", "/tmp/ready"])? == "ready\n");
    xctl.prints(&["rm", "--force", "keeps"])?;
    let snapshots = printed(ctr(&cx).args(["snapshots", "list"]))?;
    let kinds: Vec<_> = snapshots.lines().skip(1).filter_map(|line| line.split_whitespace().last()).collect();
    ensure!(kinds == ["Committed"], "only the image's own is left: {snapshots}");
    let leases = printed(ctr(&cx).args(["leases", "list", "--quiet"]))?;
    ensure!(!leases.contains("xctl"), "{leases}");
    xctl.leaves_nothing().await
}
