//! Rows of images, content, snapshots and leases.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use shim_tests::registry::Registry;
use shim_tests::suite::Suite;
use shim_tests::{rootfs, upload};

use super::{Ctr, finish, has, retry};

/// Ingests bytes under a reference, and returns their digest.
fn ingest(ctr: &Ctr<'_>, reference: &str, bytes: &[u8]) -> Result<String> {
    let mut child = ctr.start(&["content", "ingest", reference])?;
    child.stdin.take().context("a pipe")?.write_all(bytes)?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{output:?}");
    upload::digest("sha256", bytes)
}

/// The same for bytes that are not collected, also when that happens before they have a label.
fn keep(ctr: &Ctr<'_>, reference: &str, bytes: &[u8]) -> Result<String> {
    retry(|| {
        let digest = ingest(ctr, reference, bytes)?;
        ctr.run(&["content", "label", &digest, "containerd.io/gc.root=x"])?;
        Ok(digest)
    })
}

pub(super) fn content(ctr: &Ctr<'_>) -> Result<()> {
    let bytes = "some content, again and again; ".repeat(100_000);
    let digest = keep(ctr, "one", bytes.as_bytes())?;
    let other = keep(ctr, "two", b"{}")?;
    ensure!(ctr.run(&["content", "get", &digest])? == bytes);
    has(&ctr.run(&["content", "ls"])?, &[&digest, &other, "3.1MB"])?;
    ctr.run(&["content", "label", &digest, "a=1"])?;
    ensure!(ctr.run(&["content", "ls", "--quiet", "labels.a==1"])?.trim() == digest);
    ensure!(ctr.run(&["content", "active"])?.lines().count() <= 1);
    let expected = upload::digest("sha256", b"something")?;
    let mut child = ctr.start(&["content", "ingest", "--expected-digest", &expected, "three"])?;
    child.stdin.take().context("a pipe")?.write_all(b"something else")?;
    ensure!(!child.wait()?.success());
    ctr.run(&["content", "rm", &digest, &other])?;
    ensure!(ctr.run(&["content", "ls", "--quiet"])?.is_empty());
    ctr.refused(&["content", "get", &digest], "not found")
}

/// An archive of an image without a layer that could be unpacked, and the digest of its manifest.
fn archive(ctr: &Ctr<'_>, name: &str) -> Result<(String, String)> {
    archive_of(ctr, name, ("layer.v1.tar", b"no tar, but a layer"), &[])
}

/// The same with a layer, and what the configuration says of it.
fn archive_of(ctr: &Ctr<'_>, name: &str, (kind, layer): (&str, &[u8]), diff_ids: &[String]) -> Result<(String, String)> {
    let folder = PathBuf::from(ctr.file("oci"));
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let put = |kind: &str, bytes: &[u8]| -> Result<Value> {
        let digest = upload::digest("sha256", bytes)?;
        fs::write(blobs.join(&digest[7..]), bytes)?;
        let media_type = format!("application/vnd.oci.image.{kind}");
        Ok(json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() }))
    };
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = json!({ "architecture": architecture, "os": "linux", "rootfs": { "type": "layers", "diff_ids": diff_ids } });
    let config = put("config.v1+json", config.to_string().as_bytes())?;
    let layer = put(kind, layer)?;
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer] });
    let mut manifest = put("manifest.v1+json", manifest.to_string().as_bytes())?;
    let digest = manifest["digest"].as_str().context("a digest")?.to_owned();
    manifest["annotations"] = json!({ "io.containerd.image.name": name, "org.opencontainers.image.ref.name": "1" });
    fs::write(folder.join("index.json"), json!({ "schemaVersion": 2, "manifests": [manifest] }).to_string())?;
    fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let file = ctr.file("oci.tar");
    let status = Command::new("tar").arg("-cf").arg(&file).arg("-C").arg(&folder).arg(".").status()?;
    ensure!(status.success(), "tar: {status}");
    Ok((file, digest))
}

/// Imports an image without unpacking it.
fn import(ctr: &Ctr<'_>, name: &str) -> Result<String> {
    let (file, digest) = archive(ctr, name)?;
    ctr.run(&[&["images", "import", "--no-unpack"][..], local(ctr), &[&file[..]]].concat())?;
    Ok(digest)
}

/// Newer ones leave it to the daemon otherwise.
fn local(ctr: &Ctr<'_>) -> &'static [&'static str] {
    if ctr.suite == Suite::Forky { &["--local"] } else { &[] }
}

pub(super) fn images(ctr: &Ctr<'_>) -> Result<()> {
    let target = import(ctr, "example.com/one:1")?;
    // 1.7's tag leaves it to the daemon too
    let tag_local: &[&str] = if ctr.suite == Suite::Bookworm { &[] } else { &["--local"] };
    let tag = [&["images", "tag"][..], tag_local, &["example.com/one:1", "example.com/two:2"]].concat();
    ctr.run(&tag)?;
    ctr.refused(&tag, "already exists")?;
    has(&ctr.run(&["images", "ls"])?, &["example.com/one:1", "example.com/two:2", &target, "linux/"])?;
    ctr.run(&["images", "label", "example.com/two:2", "a=1"])?;
    ensure!(ctr.run(&["images", "ls", "--quiet", "labels.a==1"])?.trim() == "example.com/two:2");
    ensure!(ctr.run(&["images", "ls", "--quiet", "name~=/one/"])?.trim() == "example.com/one:1");
    let exported = ctr.file("exported.tar");
    ctr.run(&[&["images", "export"][..], local(ctr), &[&exported[..], "example.com/two:2"]].concat())?;
    ensure!(fs::metadata(&exported)?.len() > 0);
    ctr.run(&["images", "rm", "--sync", "example.com/one:1"])?;
    ensure!(ctr.run(&["content", "ls", "--quiet"])?.lines().count() >= 3, "another image leads there");
    ctr.run(&["images", "rm", "--sync", "example.com/two:2"])?;
    let left = ctr.run(&["content", "ls", "--quiet"])?;
    ensure!(left.is_empty(), "{left:?}");
    ensure!(ctr.run(&["images", "ls", "--quiet"])?.is_empty());
    Ok(())
}

/// Uses a registry, which serves from a thread of its own.
fn with_registry(use_it: impl FnOnce(&Registry) -> Result<()>) -> Result<()> {
    let (begun, begins) = std::sync::mpsc::channel();
    let (end, ends) = tokio::sync::oneshot::channel::<()>();
    let serving = std::thread::spawn(move || -> Result<()> {
        let executor = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        executor.block_on(async {
            begun.send(Registry::start(None).await?)?;
            // dropped, too, it is the end
            let _ = ends.await;
            Ok(())
        })
    });
    let used = use_it(&begins.recv()?);
    drop(end);
    serving.join().map_err(|_| anyhow::anyhow!("the registry has panicked"))??;
    used
}

pub(super) fn transfers(ctr: &Ctr<'_>) -> Result<()> {
    let by_daemon: &[&str] = if ctr.suite == Suite::Trixie { &["--local=false"] } else { &[] };
    let folder = PathBuf::from(ctr.file("layer"));
    fs::create_dir_all(&folder)?;
    // content that another namespace has is not fetched
    fs::write(folder.join("file"), &ctr.namespace)?;
    let layer = Command::new("tar").arg("-c").arg("-C").arg(&folder).arg("file").output()?.stdout;
    let (file, digest) = archive_of(ctr, "example.com/one:1", ("layer.v1.tar", &layer), &[upload::digest("sha256", &layer)?])?;
    let images = |command: &str, words: &[&str]| ctr.run(&[&["images", command][..], by_daemon, words].concat());
    images("import", &[&file])?;
    ensure!(ctr.run(&["snapshots", "ls"])?.lines().count() == 2, "{}", ctr.run(&["snapshots", "ls"])?);
    has(&ctr.run(&["images", "check"])?, &["example.com/one:1", "complete (2/2)"])?;
    with_registry(|registry| {
        let name = registry.image("app:1");
        images("tag", &["example.com/one:1", &name])?;
        images("push", &[&name])?;
        ensure!(registry.requests().iter().any(|request| request == "PUT /v2/app/manifests/1"), "{:?}", registry.requests());
        let exported = ctr.file("by-daemon.tar");
        images("export", &[&exported, &name])?;
        let listed = finish({
            let mut tar = Command::new("tar");
            tar.arg("-tf").arg(&exported);
            tar
        })?;
        has(&listed, &["oci-layout", "index.json", "manifest.json", &format!("blobs/sha256/{}", &digest[7..])])?;
        for name in ["example.com/one:1", &name] {
            ctr.run(&["images", "rm", "--sync", name])?;
        }
        ensure!(ctr.run(&["content", "ls", "--quiet"])?.is_empty());
        let shown = images("pull", &[&name])?;
        has(&shown, &["layer (", "complete"])?;
        has(&ctr.run(&["images", "check"])?, &[&name, "complete (2/2)"])?;
        has(&ctr.run(&["images", "ls"])?, &[&name, &digest])?;
        ctr.run(&["images", "rm", "--sync", &name])?;
        images("import", &[&exported])?;
        ensure!(ctr.run(&["images", "ls", "--quiet"])?.trim() == name);
        ctr.run(&["images", "rm", "--sync", &name])?;
        ensure!(ctr.run(&["snapshots", "ls"])?.lines().count() == 1 && ctr.run(&["leases", "ls", "--quiet"])?.is_empty());
        Ok(())
    })
}

pub(super) fn leases_sync(ctr: &Ctr<'_>) -> Result<()> {
    let digest = ingest(ctr, "one", b"nothing leads here")?;
    ctr.run(&["leases", "create", "--id", "mine"])?;
    ctr.run(&["leases", "delete", "--sync", "mine"])?;
    ctr.refused(&["content", "get", &digest], "not found")
}

/// An image that can be run, with a file `note` that says the namespace.
struct Runnable {
    file: String,
    /// Of its manifest.
    digest: String,
    /// Of its one layer, which is compressed.
    layer: String,
    /// Its snapshot.
    chain: String,
}

impl Runnable {
    fn make(ctr: &Ctr<'_>, name: &str) -> Result<Self> {
        let folder = PathBuf::from(ctr.file("app"));
        fs::create_dir_all(&folder)?;
        // content that another namespace has is neither fetched nor collected
        fs::write(folder.join("note"), &ctr.namespace)?;
        let plain = ctr.file("app.tar");
        let mut tar = Command::new("tar");
        tar.arg("-cf").arg(&plain).arg("-C").arg(rootfs::shared()?).arg(".").arg("-C").arg(&folder).arg("note");
        finish(tar)?;
        let chain = upload::digest("sha256", &fs::read(&plain)?)?;
        let compressed = Command::new("gzip").args(["-nc", &plain]).output()?.stdout;
        let (file, digest) = archive_of(ctr, name, ("layer.v1.tar+gzip", &compressed), std::slice::from_ref(&chain))?;
        Ok(Self { file, digest, layer: upload::digest("sha256", &compressed)?, chain })
    }

    fn import(&self, ctr: &Ctr<'_>, flags: &[&str]) -> Result<()> {
        ctr.run(&[&["images", "import"][..], local(ctr), flags, &[&self.file[..]]].concat()).map(drop)
    }
}

/// Names of snapshots.
fn snapshot_names(ctr: &Ctr<'_>) -> Result<Vec<String>> {
    let listed = ctr.run(&["snapshots", "ls"])?;
    Ok(listed.lines().skip(1).filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect())
}

fn is_empty(ctr: &Ctr<'_>) -> Result<()> {
    retry(|| {
        let left = [ctr.run(&["images", "ls", "--quiet"])?, ctr.run(&["content", "ls", "--quiet"])?].concat();
        let snapshots = snapshot_names(ctr)?;
        ensure!(left.is_empty() && snapshots.is_empty(), "{left}{snapshots:?}");
        Ok(())
    })
}

/// Mounts that a mount command leads to, until they are dropped.
struct Mounted(String);

impl Mounted {
    /// Runs the command that ctr has printed.
    fn by(command: &str, target: &str) -> Result<Self> {
        let mut mount = Command::new("sh");
        mount.args(["-c", command]);
        finish(mount)?;
        Ok(Self(target.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _already_gone = nix::mount::umount2(Path::new(&self.0), nix::mount::MntFlags::MNT_DETACH);
    }
}

pub(super) fn run_image(ctr: &Ctr<'_>) -> Result<()> {
    let (name, folder) = ("example.com/app:1", ctr.file("bound"));
    Runnable::make(ctr, name)?.import(ctr, &[])?;
    fs::create_dir_all(&folder)?;
    fs::write(Path::new(&folder).join("file"), "bound")?;
    let mount = format!("type=bind,src={folder},dst=/mnt,options=rbind:ro");
    let cgroup = ctr.cgroup("c");
    let command = |flags: &[&str], program: &[&str]| -> Vec<String> {
        let fixed = ["run", "--runtime", &ctr.cx.shim().runtime_type, "--cgroup", &cgroup, "--env", "PATH=/bin"];
        [&fixed[..], flags, &[name, "c"], program].concat().into_iter().map(str::to_owned).collect()
    };
    let run = |flags: &[&str], program: &[&str]| -> Result<String> {
        ctr.run(&command(flags, program).iter().map(String::as_str).collect::<Vec<_>>())
    };
    let out = run(&["--rm", "--env", "A=b", "--cwd", "/bin", "--mount", &mount], &["sh", "-c", "echo $A; pwd; cat /note /mnt/file"])?;
    ensure!(out == format!("b\n/bin\n{}bound", ctr.namespace), "{out:?}");
    let out = run(&["--rm", "--read-only"], &["sh", "-c", "touch /made 2> /dev/null || echo refused"])?;
    ensure!(out == "refused\n", "{out:?}");
    let failing = command(&["--rm"], &["sh", "-c", "touch /made && exit 3"]);
    let failed = ctr.command(&failing.iter().map(String::as_str).collect::<Vec<_>>()).output()?;
    ensure!(failed.status.code() == Some(3), "{failed:?}");
    ensure!(snapshot_names(ctr)?.len() == 1, "--rm removes the container's snapshot: {:?}", snapshot_names(ctr)?);
    run(&["--detach"], &["sleep", "1000"])?;
    let snapshots = snapshot_names(ctr);
    ctr.run(&["tasks", "delete", "--force", "c"])?;
    ctr.run(&["containers", "delete", "c"])?;
    ensure!(snapshots?.iter().any(|snapshot| snapshot == "c"));
    ensure!(snapshot_names(ctr)?.len() == 1, "{:?}", snapshot_names(ctr)?);
    ctr.run(&["images", "rm", "--sync", name])?;
    is_empty(ctr)
}

pub(super) fn unpacked(ctr: &Ctr<'_>) -> Result<()> {
    let (name, target) = ("example.com/app:1", ctr.file("mounted"));
    let image = Runnable::make(ctr, name)?;
    image.import(ctr, &[])?;
    has(&ctr.run(&["images", "check"])?, &[name, "complete (2/2)", "true"])?;
    fs::create_dir_all(&target)?;
    for flags in [&[][..], &["--rw"]] {
        ctr.run(&[&["images", "mount"][..], flags, &[name, &target]].concat())?;
        let mounted = Mounted(target.clone());
        ensure!(fs::read_to_string(Path::new(&target).join("note"))? == ctr.namespace);
        ensure!(fs::write(Path::new(&target).join("made"), "").is_ok() == (flags == ["--rw"]), "{flags:?}");
        ctr.run(&["images", "unmount", "--rm", &target])?;
        ensure!(!Path::new(&target).join("note").exists());
        drop(mounted);
    }
    let converted = "example.com/converted:1";
    let digest = ctr.run(&["images", "convert", "--uncompress", "--oci", name, converted])?;
    let manifest: Value = serde_json::from_str(&ctr.run(&["content", "get", digest.trim()])?)?;
    let layer = &manifest["layers"][0];
    ensure!(layer["digest"] == image.chain.as_str() && layer["mediaType"] == "application/vnd.oci.image.layer.v1.tar", "{manifest}");
    ctr.run(&["images", "rm", "--sync", name, converted])?;
    is_empty(ctr)
}

pub(super) fn usage_and_prune(ctr: &Ctr<'_>) -> Result<()> {
    let name = "example.com/app:1";
    let image = Runnable::make(ctr, name)?;
    image.import(ctr, &[])?;
    has(&ctr.run(&["images", "usage", name])?, &[&image.chain, "iB"])?;
    ctr.run(&["images", "prune"])?;
    has(&ctr.run(&["images", "ls", "--quiet"])?, &[name])?;
    ctr.run(&["images", "prune", "--all"])?;
    is_empty(ctr)
}

pub(super) fn inspect(ctr: &Ctr<'_>) -> Result<()> {
    let name = "example.com/app:1";
    let image = Runnable::make(ctr, name)?;
    image.import(ctr, &["--no-unpack"])?;
    has(&ctr.run(&["images", "inspect", name])?, &[name, &image.digest, &image.layer])?;
    has(&ctr.run(&["images", "inspect", "--content", name])?, &["rootfs", &image.chain])?;
    ctr.run(&["images", "rm", "--sync", name])?;
    is_empty(ctr)
}

/// By the client, which reads and writes the daemon's content.
pub(super) fn pulls(ctr: &Ctr<'_>) -> Result<()> {
    let image = Runnable::make(ctr, "example.com/app:1")?;
    image.import(ctr, &["--no-unpack"])?;
    let tag_local: &[&str] = if ctr.suite == Suite::Bookworm { &[] } else { &["--local"] };
    with_registry(|registry| {
        let name = registry.image("app:1");
        ctr.run(&[&["images", "tag"][..], tag_local, &["example.com/app:1", &name]].concat())?;
        ctr.run(&[&["images", "push"][..], local(ctr), &["--plain-http", &name]].concat())?;
        ensure!(registry.requests().iter().any(|request| request == "PUT /v2/app/manifests/1"), "{:?}", registry.requests());
        let remove = |name: &str| ctr.run(&["images", "rm", "--sync", name]);
        remove("example.com/app:1")?;
        remove(&name)?;
        is_empty(ctr)?;
        // unpacks nothing, unlike a pull
        ctr.run(&["content", "fetch", "--plain-http", &name])?;
        ensure!(snapshot_names(ctr)?.is_empty() && ctr.run(&["content", "ls", "--quiet"])?.contains(&image.layer));
        ctr.run(&["content", "push-object", "--plain-http", &registry.image("other:1"), &image.layer, "application/octet-stream"])?;
        let is_upload = |request: &String| request.starts_with("PUT /v2/other/blobs/uploads/");
        ensure!(registry.requests().iter().any(is_upload), "{:?}", registry.requests());
        remove(&name)?;
        is_empty(ctr)?;
        has(&ctr.run(&["content", "fetch-object", "--plain-http", &name])?, &["schemaVersion", &image.layer])?;
        let before = registry.fetches(&image.layer);
        ctr.run(&[&["images", "pull"][..], local(ctr), &["--plain-http", &name]].concat())?;
        ensure!(registry.fetches(&image.layer) == before + 1, "the layer is fetched once");
        has(&ctr.run(&["images", "check"])?, &[&name, "complete (2/2)", "true"])?;
        ensure!(snapshot_names(ctr)? == [image.chain.as_str()]);
        // of a layer that is unpacked the content may go
        ctr.run(&["content", "prune", "references"])?;
        ensure!(!ctr.run(&["content", "ls", "--quiet"])?.contains(&image.layer));
        ensure!(snapshot_names(ctr)? == [image.chain.as_str()]);
        remove(&name)?;
        is_empty(ctr)
    })
}

pub(super) fn fetch_blob(ctr: &Ctr<'_>) -> Result<()> {
    with_registry(|registry| {
        let digest = registry.put_blob("app", b"of a registry");
        let blob = ctr.run(&["content", "fetch-blob", "--plain-http", &registry.image("app:1"), &digest])?;
        ensure!(blob == "of a registry", "{blob:?}");
        Ok(())
    })
}

pub(super) fn edit(ctr: &Ctr<'_>) -> Result<()> {
    let digest = keep(ctr, "one", b"{\"a\":1}")?;
    let edited = ctr.run(&["content", "edit", "--editor", "sed -i s/1/2/", &digest])?;
    ensure!(edited.trim() == upload::digest("sha256", b"{\"a\":2}")?, "{edited:?}");
    ctr.run(&["content", "rm", &digest]).map(drop)
}

pub(super) fn install(ctr: &Ctr<'_>) -> Result<()> {
    let (name, folder) = ("example.com/app:1", ctr.file("installed"));
    Runnable::make(ctr, name)?.import(ctr, &["--no-unpack"])?;
    fs::create_dir_all(&folder)?;
    ctr.run(&["install", "--path", &folder, name])?;
    ensure!(Path::new(&folder).join("bin/busybox").exists());
    ctr.run(&["images", "rm", "--sync", name])?;
    is_empty(ctr)
}

pub(super) fn snapshots(ctr: &Ctr<'_>) -> Result<()> {
    let (name, target) = ("example.com/app:1", ctr.file("snapshot"));
    let image = Runnable::make(ctr, name)?;
    let chain = image.chain.as_str();
    image.import(ctr, &["--no-unpack"])?;
    ctr.run(&["snapshots", "unpack", &image.digest])?;
    ensure!(snapshot_names(ctr)? == [chain]);
    fs::create_dir_all(&target)?;
    let mount = ctr.run(&["snapshots", "prepare", "--target", &target, "active", chain])?;
    ensure!(ctr.run(&["snapshots", "mounts", &target, "active"])? == mount);
    {
        let _mounted = Mounted::by(&mount, &target)?;
        fs::write(Path::new(&target).join("made"), "made")?;
        fs::remove_file(Path::new(&target).join("bin/wget"))?;
    }
    let difference = ctr.command(&["snapshots", "diff", "active"]).output()?;
    ensure!(difference.status.success(), "{difference:?}");
    let file = ctr.file("difference");
    fs::write(&file, &difference.stdout)?;
    let mut tar = Command::new("tar");
    tar.arg("-tzf").arg(&file);
    let listed = finish(tar)?;
    ensure!(["made", "bin/.wh.wget"].iter().all(|name| listed.lines().any(|line| line == *name)), "{listed}");
    let usage = ctr.run(&["snapshots", "usage", "-b", "active"])?;
    let size = usage.lines().nth(1).and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).context("a size")?;
    ensure!(size > 0, "{usage}");
    ctr.run(&["snapshots", "commit", "done", "active"])?;
    let info: Value = serde_json::from_str(&ctr.run(&["snapshots", "info", "done"])?)?;
    ensure!(info["Kind"] == "Committed" && info["Parent"] == chain, "{info}");
    has(&ctr.run(&["snapshots", "label", "done", "a=1"])?, &["a=1"])?;
    has(&ctr.run(&["snapshots", "tree"])?, &[&format!(" {chain}\n  \\_ done")])?;
    // a view has no label of its own: it is collected unless it gets one in time
    retry(|| {
        let _exists = ctr.command(&["snapshots", "view", "seen", "done"]).output()?;
        ctr.run(&["snapshots", "label", "seen", "containerd.io/gc.root=x"])
    })?;
    {
        let _mounted = Mounted::by(&ctr.run(&["snapshots", "mounts", &target, "seen"])?, &target)?;
        ensure!(fs::read(Path::new(&target).join("made"))? == b"made" && !Path::new(&target).join("bin/wget").exists());
        ensure!(fs::write(Path::new(&target).join("more"), "").is_err(), "a view is read only");
    }
    ctr.refused(&["snapshots", "rm", "done"], "cannot remove snapshot with child")?;
    for name in ["seen", "done"] {
        ctr.run(&["snapshots", "rm", name])?;
    }
    ctr.refused(&["snapshots", "info", "done"], "not found")?;
    ctr.run(&["images", "rm", "--sync", name])?;
    is_empty(ctr)
}
