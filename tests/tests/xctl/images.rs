//! Containers of an image in the daemon's store.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::operator::{ctr, output_text, printed};
use shim_tests::registry::Registry;
use shim_tests::rootfs;
use shim_tests::suite;

use crate::harness::Xctl;

/// As `docker save` would name it.
const IMAGE: &str = "docker.io/library/local:1";

/// An archive with busybox as an image that sets everything. No other test's is the same: content that another namespace has is not fetched.
fn archive(cx: &Context) -> Result<PathBuf> {
    let folder = cx.folder().join("image");
    fs::create_dir_all(&folder)?;
    printed(Command::new("tar").arg("-C").arg(rootfs::shared()?).arg("-cf").arg(folder.join("layer.tar")).arg("."))?;
    let digest = printed(Command::new("sha256sum").arg(folder.join("layer.tar")))?;
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux",
        "config": {
            "Env": ["PATH=/bin", "FROM=image"], "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo default"], "User": "user", "WorkingDir": "/tmp",
            "StopSignal": "SIGUSR1", "Labels": { "of": "the image", "in": cx.client().namespace() },
        },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", digest.split(' ').next().unwrap_or_default())] },
    });
    fs::write(folder.join("config.json"), config.to_string())?;
    let manifest = serde_json::json!([{ "Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"] }]);
    fs::write(folder.join("manifest.json"), manifest.to_string())?;
    let archive = cx.folder().join("image.tar");
    printed(Command::new("tar").arg("-C").arg(&folder).arg("-cf").arg(&archive).args(["manifest.json", "config.json", "layer.tar"]))?;
    Ok(archive)
}

/// Imports an archive by `ctr`.
fn ctr_import(cx: &Context, archive: &str) -> Result<String> {
    printed(ctr(cx).args(["images", "import", archive]))
}

pub(crate) async fn an_image_decides_what_the_command_line_does_not(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    xctl.prints(&["import", &archive(&cx)?.display().to_string()])?;
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
    eventually("it is ready", SOON, async || {
        ensure!(xctl.prints(&["exec", "keeps", "cat", "/tmp/ready"])? == "ready\n");
        Ok(())
    })
    .await?;
    xctl.prints(&["stop", "keeps"])?;
    ensure!(xctl.prints(&["ps", "--all"])?.contains("exited (7)"));
    let copied = cx.folder().join("copied").display().to_string();
    xctl.prints(&["cp", "keeps:/tmp/ready", &copied])?;
    ensure!(fs::read_to_string(&copied)? == "ready\n");
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

/// Each time with what it has written before: its snapshot is its root.
pub(crate) async fn a_container_of_an_image_is_restarted_by_the_daemon(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    xctl.prints(&["import", &archive(&cx)?.display().to_string()])?;
    let mut command = xctl.command(&["run", "--detach", "--name", "again", "--restart", "always"]);
    ensure!(command.args(xctl.place()).args(["local:1", "echo tried >> /tmp/tries; cat /tmp/tries; exit 9"]).output()?.status.success());
    eventually("it was started again", Duration::from_secs(30), async || {
        let logs = xctl.prints(&["logs", "again"])?;
        ensure!(logs.starts_with("tried\ntried\ntried\n"), "{logs:?}");
        Ok(())
    })
    .await?;
    xctl.prints(&["stop", "again"])?;
    // what the monitor had begun before may still end
    eventually("it is removed, and stays so", SOON, async || xctl.prints(&["rm", "--force", "again"]).map(drop)).await?;
    xctl.leaves_nothing().await
}

/// Nothing but what an image needs is kept, and nothing once it has no name.
async fn holds(xctl: &Xctl<'_>, blobs: usize, snapshots: usize) -> Result<()> {
    eventually("the daemon has collected the rest", SOON, async || {
        let content = printed(ctr(xctl.cx).args(["content", "list", "--quiet"]))?;
        let listed = printed(ctr(xctl.cx).args(["snapshots", "list"]))?;
        ensure!(content.lines().count() == blobs && listed.lines().count() == snapshots + 1, "{content}{listed}");
        let leases = printed(ctr(xctl.cx).args(["leases", "list", "--quiet"]))?;
        ensure!(leases.is_empty(), "{leases}");
        Ok(())
    })
    .await
}

pub(crate) async fn images_are_imported_listed_named_exported_and_removed(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    let saved = archive(&cx)?.display().to_string();
    ensure!(xctl.prints(&["import", &saved])? == format!("{IMAGE}\n"));
    let list = xctl.prints(&["images"])?;
    ensure!(list.starts_with("IMAGE ") && list.contains(IMAGE) && list.contains("MiB"), "{list}");
    holds(&xctl, 3, 1).await?;
    let mut command = xctl.command(&["run", "--rm"]);
    let output = command.args(xctl.place()).args(["local:1", "echo of $FROM"]).output()?;
    ensure!(output.stdout == b"of image\n", "{output:?}");
    // another client understands the image, and the archive
    let checked = printed(ctr(&cx).args(["images", "check"]))?;
    ensure!(checked.lines().any(|line| line.contains(IMAGE) && line.contains("complete (") && line.contains("true")), "{checked}");
    ensure!(xctl.prints(&["tag", "local:1", "other", "third:2"])? == "docker.io/library/other:latest\ndocker.io/library/third:2\n");
    let inspected: serde_json::Value = serde_json::from_str(&xctl.prints(&["inspect", "other"])?)?;
    ensure!(inspected[0]["configuration"]["config"]["User"] == "user" && inspected[0]["layers"][0]["stored"] == true, "{inspected}");
    let exported = cx.folder().join("exported.tar").display().to_string();
    xctl.prints(&["export", "--output", &exported, "local:1", "other"])?;
    let (_, text) = xctl.fails(&["export", "--output", &exported, "local:1"])?;
    ensure!(text.contains("exists"), "{text}");
    let elsewhere = cx.with_own_namespace().await?;
    let there = Xctl::new(&elsewhere)?;
    ctr_import(&elsewhere, &exported)?;
    let names = printed(ctr(&elsewhere).args(["images", "list", "--quiet"]))?;
    ensure!(names == format!("{IMAGE}\ndocker.io/library/other:latest\n"), "{names}");
    ensure!(there.prints(&["--format", "json", "images"])?.contains(inspected[0]["target"]["digest"].as_str().unwrap_or("none")));
    there.prints(&["rmi", "local:1", "other"])?;
    holds(&there, 0, 0).await?;
    ensure!(there.prints(&["import", &exported])? == format!("{IMAGE}\ndocker.io/library/other:latest\n"));
    there.prints(&["rmi", "local:1", "other"])?;
    // a name is not taken from another image without force
    let (_, text) = xctl.fails(&["rmi", "none"])?;
    ensure!(text.contains("there is no image docker.io/library/none:latest"), "{text}");
    let mut command = xctl.command(&["create", "--name", "holder"]);
    ensure!(command.args(xctl.place()).arg("local:1").output()?.status.success());
    let (_, text) = xctl.fails(&["rmi", "local:1"])?;
    ensure!(text.contains("is in use by a container"), "{text}");
    xctl.prints(&["rm", "holder"])?;
    xctl.prints(&["rmi", "local:1", "other"])?;
    holds(&xctl, 3, 1).await?;
    xctl.prints(&["rmi", "third:2"])?;
    holds(&xctl, 0, 0).await?;
    xctl.leaves_nothing().await
}

pub(crate) async fn a_damaged_archive_is_refused_and_leaves_nothing(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    let whole = fs::read(archive(&cx)?)?;
    let path = cx.folder().join("bad.tar");
    let layout = |index: &str| -> Result<Vec<u8>> {
        let folder = cx.folder().join("layout");
        fs::create_dir_all(folder.join("blobs/sha256"))?;
        fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        fs::write(folder.join("index.json"), index)?;
        let tar = cx.folder().join("layout.tar");
        printed(Command::new("tar").arg("-C").arg(&folder).arg("-cf").arg(&tar).args(["oci-layout", "index.json", "blobs"]))?;
        Ok(fs::read(tar)?)
    };
    let missing = format!(
        r#"{{"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:{}","size":1}}]}}"#,
        "0".repeat(64)
    );
    let wrong_diff = {
        // the configuration names another layer than the one that is there
        let folder = cx.folder().join("image");
        let config = fs::read_to_string(folder.join("config.json"))?;
        let mut config: serde_json::Value = serde_json::from_str(&config)?;
        config["rootfs"]["diff_ids"] = serde_json::json!([format!("sha256:{}", "1".repeat(64))]);
        fs::write(folder.join("config.json"), config.to_string())?;
        let tar = cx.folder().join("wrong.tar");
        printed(Command::new("tar").arg("-C").arg(&folder).arg("-cf").arg(&tar).args(["manifest.json", "config.json", "layer.tar"]))?;
        fs::read(tar)?
    };
    for (bytes, reason) in [
        (vec![], "neither index.json and oci-layout nor manifest.json"),
        (whole[..whole.len() / 2].to_vec(), "ends within"),
        (vec![b'x'; 2048], "header at byte 0"),
        (layout("{")?, "it is no document of an image"),
        (layout(r#"{"manifests":[{"digest":"sha256:../../etc/passwd","size":1}]}"#)?, "invalid digest"),
        (layout(&missing)?, "not found"),
        (wrong_diff, "sha256:1111"),
    ] {
        // containerd has sentences of its own
        let reason = if suite::manager().is_some() { reason } else { "import " };
        fs::write(&path, bytes)?;
        let (status, text) = xctl.fails(&["import", &path.display().to_string()])?;
        ensure!(status == 1 && text.contains(reason) && !text.contains("panicked"), "{reason}: {text}");
    }
    ensure!(xctl.prints(&["images", "--quiet"])?.is_empty());
    // blobs of what failed are collected when nothing keeps them
    holds(&xctl, 0, 0).await?;
    xctl.leaves_nothing().await
}

pub(crate) async fn an_image_is_pushed_and_pulled(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    xctl.prints(&["import", &archive(&cx)?.display().to_string()])?;
    // user:secret
    for password in [None, Some("dXNlcjpzZWNyZXQ=")] {
        let registry = Registry::start(password).await?;
        let name = registry.image("app:1");
        let flags: &[&str] = if password.is_some() { &["--plain-http", "--user", "user"] } else { &["--plain-http"] };
        let mut push = xctl.command(&[&["push"], flags, &["local:1", &name]].concat());
        let output = push.env("XCTL_PASSWORD", "secret").output()?;
        ensure!(output.status.success() && output.stdout == format!("{name}\n").as_bytes(), "{output:?}");
        if password.is_some() {
            let output = xctl.command(&["pull", "--plain-http", &name]).output()?;
            ensure!(output.status.code() == Some(1) && output_text(&output).contains("401"), "{output:?}");
            let output = xctl.command(&["pull", "--plain-http", "--user", "user", &name]).output()?;
            ensure!(output.status.code() == Some(1) && output_text(&output).contains("--user needs a password"), "{output:?}");
        }
        // all of it comes from the registry
        xctl.prints(&["rmi", "local:1"])?;
        holds(&xctl, 0, 0).await?;
        let mut pull = xctl.command(&[&["pull"], flags, &[&name]].concat());
        let output = pull.env("XCTL_PASSWORD", "secret").output()?;
        ensure!(output.status.success() && output_text(&output).contains(" a second"), "{output:?}");
        // a layer that another namespace has is not fetched again
        ensure!(registry.requests().iter().any(|request| request.starts_with("GET /v2/app/manifests/")), "{:?}", registry.requests());
        let run = |flags: &[&str]| {
            xctl.command(&[&["run", "--rm", "--plain-http"], flags].concat()).args(xctl.place()).args([&name, "echo of $FROM"]).output()
        };
        let output = run(&[])?;
        ensure!(output.stdout == b"of image\n", "{output:?}");
        if password.is_none() {
            xctl.prints(&["rmi", &name])?;
            let output = run(&["--pull", "never"])?;
            ensure!(output.status.code() == Some(125) && output_text(&output).contains("there is no image"), "{output:?}");
            let asked = registry.requests().len();
            let output = run(&[])?;
            ensure!(output.stdout == b"of image\n" && registry.requests().len() > asked, "an image that is missing is pulled: {output:?}");
            let asked = registry.requests().len();
            ensure!(run(&[])?.stdout == b"of image\n" && registry.requests().len() == asked, "it is there");
            ensure!(
                run(&["--pull", "always"])?.stdout == b"of image\n" && registry.requests().len() > asked,
                "the registry may have a newer one"
            );
        }
        let (status, text) = xctl.fails(&["pull", "--plain-http", &registry.image("none:1")])?;
        ensure!(status == 1 && text.contains("none:1"), "{text}");
        xctl.prints(&["tag", &name, "local:1"])?;
        xctl.prints(&["rmi", &name])?;
    }
    xctl.prints(&["rmi", "local:1"])?;
    holds(&xctl, 0, 0).await?;
    xctl.leaves_nothing().await
}

pub(crate) async fn why_names_what_keeps_a_blob_and_a_snapshot(cx: Context) -> Result<()> {
    let xctl = Xctl::new(&cx)?;
    xctl.prints(&["import", &archive(&cx)?.display().to_string()])?;
    let why = |what: &str| -> Result<Value> { Ok(serde_json::from_str(&xctl.prints(&["--format", "json", "why", what])?)?) };
    let by_image = why("local:1")?;
    let manifest = by_image[0]["id"].as_str().context("a digest")?.to_owned();
    let expected = json!([{ "kind": "images", "id": IMAGE, "way": [{ "by": "target", "kind": "content", "id": manifest }] }]);
    ensure!(by_image[0]["kept_by"] == expected, "{by_image}");
    // the only layer's snapshot is called as the layer
    let layer = printed(Command::new("sha256sum").arg(cx.folder().join("image/layer.tar")))?;
    let layer = layer.split(' ').next().context("a digest")?;
    let snapshot = |answer: &Value| answer.as_array().and_then(|all| all.iter().find(|one| one["kind"] == "snapshots/overlayfs").cloned());
    let found = snapshot(&why(&layer[..20])?).context("a snapshot")?;
    let way: Vec<_> = found["kept_by"][0]["way"].as_array().context("a way")?.iter().map(|step| step["by"].clone()).collect();
    ensure!(way == ["target", "containerd.io/gc.ref.content.config", "containerd.io/gc.ref.snapshot.overlayfs"], "{found}");
    let mut create = xctl.command(&["create", "--name", "web"]);
    ensure!(create.args(xctl.place()).args(["local:1", "true"]).status()?.success());
    let kept = xctl.prints(&["why", layer])?;
    let lines = [
        "kept by container web",
        "parent → snapshot sha256:",
        &format!("kept by image {IMAGE}"),
        "gc.ref.content.config → content sha256:",
    ];
    ensure!(lines.iter().all(|line| kept.contains(line)), "{kept}");
    xctl.prints(&["rm", "web"])?;
    xctl.prints(&["rmi", "local:1"])?;
    let (status, text) = xctl.fails(&["why", layer])?;
    ensure!(status == 1 && text.contains("there is no image, blob or snapshot"), "{status}: {text}");
    let client = cx.client().with_lease("l").await?;
    let blob = shim_tests::upload::store(&client, "r", cx.client().namespace().as_bytes(), &[]).await?;
    ensure!(xctl.prints(&["why", &blob])?.contains("kept by lease l\n    resource → content sha256:"));
    Ok(shim_tests::import::end_lease(cx.client(), "l").await?)
}
