//! The lifecycle through containerd's own command line client, with an image, a snapshot and a spec that the daemon writes.

use std::fs;
use std::process::{Command, Output};

use anyhow::{Result, ensure};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::runner::needs_controller;
use shim_tests::{isolation, rootfs};

const IMAGE: &str = "example.test/busybox:1";

/// Runs a tool and returns what it printed.
fn run(command: &mut Command) -> Result<String> {
    let output: Output = command.output()?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned());
    ensure!(output.status.success(), "{command:?}: {}: {out}{err}", output.status);
    Ok(out)
}

fn ctr(cx: &Context) -> Command {
    let mut command = Command::new(cx.suite().program("ctr"));
    command.args(["--address", &cx.daemon().address().display().to_string(), "--namespace", cx.client().namespace()]);
    command
}

/// Imports an image of one layer, as `docker save` writes it.
fn import(cx: &Context) -> Result<()> {
    let folder = cx.folder().join("image");
    fs::create_dir_all(&folder)?;
    let layer = folder.join("layer.tar");
    run(Command::new("tar").arg("-C").arg(rootfs::shared()?).arg("-cf").arg(&layer).arg("."))?;
    let digest = run(Command::new("sha256sum").arg(&layer))?;
    let digest = digest.split(' ').next().unwrap_or_default();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": { "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    fs::write(folder.join("config.json"), config.to_string())?;
    let manifest = serde_json::json!([{ "Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"] }]);
    fs::write(folder.join("manifest.json"), manifest.to_string())?;
    let archive = cx.folder().join("image.tar");
    run(Command::new("tar").arg("-C").arg(&folder).arg("-cf").arg(&archive).args(["manifest.json", "config.json", "layer.tar"]))?;
    run(ctr(cx).args(["images", "import"]).arg(&archive))?;
    Ok(())
}

/// The cgroup that ctr's containers go to.
fn cgroup(cx: &Context, id: &str) -> String {
    format!("/{}/{}/{id}", isolation::cgroup(), cx.client().namespace())
}

pub(crate) async fn ctr_imports_an_image_and_runs_it(cx: Context) -> Result<()> {
    // of which ctr gives each container a share
    needs_controller("cpu")?;
    import(&cx)?;
    let runtime = &cx.shim().runtime_type;
    let out =
        run(ctr(&cx).args(["run", "--rm", "--runtime", runtime, "--cgroup", &cgroup(&cx, "hello"), IMAGE, "hello", "echo", "hello"]))?;
    ensure!(out == "hello\n", "{out:?}");
    let failed = ctr(&cx)
        .args(["run", "--rm", "--runtime", runtime, "--cgroup", &cgroup(&cx, "failing"), IMAGE, "failing", "sh", "-c", "exit 3"])
        .output()?;
    ensure!(failed.status.code() == Some(3), "{failed:?}");
    ensure!(run(ctr(&cx).args(["containers", "list", "--quiet"]))?.is_empty());
    Ok(())
}

pub(crate) async fn ctr_execs_and_kills(cx: Context) -> Result<()> {
    // of which ctr gives each container a share
    needs_controller("cpu")?;
    import(&cx)?;
    let runtime = &cx.shim().runtime_type;
    run(ctr(&cx).args(["run", "--detach", "--runtime", runtime, "--cgroup", &cgroup(&cx, "long"), IMAGE, "long", "sleep", "1000"]))?;
    let out = run(ctr(&cx).args(["task", "exec", "--exec-id", "e1", "long", "sh", "-c", "echo from $0; cat /proc/1/comm"]))?;
    ensure!(out == "from sh\nsleep\n", "{out:?}");
    let failed = ctr(&cx).args(["task", "exec", "--exec-id", "e2", "long", "sh", "-c", "exit 5"]).output()?;
    ensure!(failed.status.code() == Some(5), "{failed:?}");
    let listed = run(ctr(&cx).args(["task", "list"]))?;
    ensure!(listed.contains("RUNNING"), "{listed}");
    run(ctr(&cx).args(["task", "metrics", "long"]))?;
    run(ctr(&cx).args(["task", "kill", "--signal", "KILL", "long"]))?;
    eventually("it can be deleted", SOON, async || run(ctr(&cx).args(["task", "delete", "--force", "long"])).map(drop)).await?;
    run(ctr(&cx).args(["containers", "delete", "long"]))?;
    Ok(())
}
