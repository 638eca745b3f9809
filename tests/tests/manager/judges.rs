//! Other programs that keep images, as judges: what they unpack is what we unpack, and what they copy comes back byte by byte.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::GetImageRequest;
use serde_json::{Value, json};
use shim_tests::client::Client;
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::suite::Suite;
use shim_tests::upload::{self, digest};
use shim_tests::{image_tools, isolation};

/// Layers that are legal, and that programs have got wrong, the lowest first: a script in an empty folder, and what tar takes of it.
const LAYERS: &[(&str, &str)] = &[
    // kinds, owners, modes, times, names, links, holes
    (
        r#"mkdir -p usr/bin etc/dir var/tmp d/sub opaque/below replaced/folder none/at/all
    printf program > usr/bin/program; ln usr/bin/program usr/bin/hard; ln usr/bin/program third
    chown 7:8 usr/bin/program; chmod 6755 usr/bin/program; printf capable > usr/bin/capable; chown 5 usr/bin/capable
    ln -s usr/bin bin; ln -s /etc/target absolute; ln -s ../../outside up; ln -s nowhere dangling; ln -s d link-to-folder
    mkfifo -m 620 pipe; mknod -m 666 null c 1 3; mknod -m 600 disk b 8 1; chown 1:2 pipe null
    printf 1 > d/old; printf 1 > d/sub/deep; printf 1 > d/kept; chown 5:6 d; chmod 2755 d; chmod 1777 var/tmp
    printf 1 > opaque/old; printf 1 > opaque/below/old; printf 1 > file; printf 1 > gone; printf 1 > replaced/file
    printf odd > "$(printf 'odd\377\200name')"; printf line > "$(printf 'new\nline')"; printf dash > ./-dash; printf x > ' space '; printf x > .wh
    printf long > "$(head -c 255 /dev/zero | tr '\0' n)"; mkdir -p "$(seq -s / 1 50)"
    truncate -s 4000000 sparse; printf middle | dd of=sparse bs=1 seek=2000000 conv=notrunc status=none
    printf none > mode-0; chmod 0 mode-0; printf run > mode-111; chmod 111 mode-111; : > empty
    printf far > far; chown 4294967294:3000000 far
    touch -h -d @1000000000.123456789 absolute; touch -d @8589934592 far; touch -d @-1 mode-0; chmod 555 .
    touch -d @1000000007.5 d/sub; touch -d @1000000008 d; touch -d @1000000009.25 ."#,
        ".",
    ),
    // deletions, replacements of each kind, folders that are only named by what is in them
    (
        r#"mkdir -p d/sub opaque replaced; : > d/.wh.old; : > opaque/.wh..wh..opq; printf 2 > opaque/new; : > .wh.gone; : > .wh.none
    mkdir file; printf 2 > file/below; printf 2 > absolute; mkfifo third; ln -s d pipe; mknod -m 644 dangling c 1 5
    rmdir replaced; printf 2 > replaced; mkdir link-to-folder; printf 2 > link-to-folder/new
    chmod 700 d; chown 9:9 d; printf 2 > d/sub/deep; touch -d @1100000000.5 d/sub/deep d/sub d"#,
        ".",
    ),
    // a folder deleted and made again, what a lower layer has deleted, a layer that has nothing new
    (
        r#"mkdir -p d opaque/below; : > .wh.d; printf 3 > d/made; printf 3 > opaque/below/new; printf 3 > gone; : > .wh.null; : > etc.note"#,
        "--no-recursion ./.wh.d ./d ./d/made ./opaque/below/new ./gone ./.wh.null ./etc.note",
    ),
    (r#": > opaque-is-nothing"#, "."),
];

/// An image in an OCI layout.
struct Layout {
    folder: PathBuf,
    /// Of its manifest.
    digest: String,
}

fn shell(folder: &Path, script: &str) -> Result<()> {
    let output = Command::new("sh").args(["-ec", script]).current_dir(folder).env("TZ", "UTC").output()?;
    ensure!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn layer(folder: &Path, script: &str, entries: &str) -> Result<Vec<u8>> {
    let tree = folder.join("tree");
    fs::create_dir_all(&tree)?;
    shell(&tree, script)?;
    let capable = tree.join("usr/bin/capable");
    if capable.exists() {
        // CAP_NET_RAW, permitted and effective, version 2
        let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        for (key, value) in [("security.capability", &capability[..]), ("user.note", b"a note\0")] {
            rustix::fs::setxattr(&capable, key, value, rustix::fs::XattrFlags::empty())?;
        }
        rustix::fs::setxattr(tree.join("etc/dir"), "user.note", b"of a folder", rustix::fs::XattrFlags::empty())?;
    }
    let tar = "tar --format=pax --pax-option=delete=atime,delete=ctime --sort=name --sparse --xattrs --xattrs-include='*' --numeric-owner";
    shell(&tree, &format!("{tar} -cf ../layer.tar {entries}"))?;
    fs::remove_dir_all(&tree)?;
    Ok(fs::read(folder.join("layer.tar"))?)
}

impl Layout {
    fn make(folder: &Path, name: &str) -> Result<Self> {
        let layout = folder.join("layout");
        let blobs = layout.join("blobs/sha256");
        fs::create_dir_all(&blobs)?;
        let put = |kind: &str, bytes: &[u8]| -> Result<Value> {
            let digest = digest("sha256", bytes)?;
            fs::write(blobs.join(&digest[7..]), bytes)?;
            Ok(json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": bytes.len() }))
        };
        let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
        for (number, (script, entries)) in LAYERS.iter().enumerate() {
            let bytes = layer(folder, script, entries)?;
            diff_ids.push(digest("sha256", &bytes)?);
            if number == 1 {
                layers.push(put("layer.v1.tar", &bytes)?);
            } else {
                fs::write(folder.join("layer.tar"), &bytes)?;
                shell(folder, "gzip -nf layer.tar")?;
                layers.push(put("layer.v1.tar+gzip", &fs::read(folder.join("layer.tar.gz"))?)?);
            }
        }
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config =
            json!({ "architecture": architecture, "os": "linux", "config": {}, "rootfs": { "type": "layers", "diff_ids": diff_ids } });
        let config = put("config.v1+json", config.to_string().as_bytes())?;
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers });
        let mut manifest = put("manifest.v1+json", manifest.to_string().as_bytes())?;
        let digest = manifest["digest"].as_str().context("a digest")?.to_owned();
        manifest["annotations"] = json!({ "io.containerd.image.name": name, "org.opencontainers.image.ref.name": "latest" });
        fs::write(layout.join("index.json"), json!({ "schemaVersion": 2, "manifests": [manifest] }).to_string())?;
        fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(Self { folder: layout, digest })
    }

    /// An archive of it.
    fn archive(&self, file: &Path) -> Result<()> {
        shell(&self.folder, &format!("tar -cf '{}' oci-layout index.json blobs", file.display()))
    }
}

/// Everything below a folder: type, mode, owner, size, time, target, device, attributes, a digest of the data, and links as their first name.
fn tree(root: &Path) -> Result<BTreeMap<String, String>> {
    let (mut all, mut first, mut todo) = (BTreeMap::new(), BTreeMap::new(), vec![root.to_owned()]);
    while let Some(path) = todo.pop() {
        let about = fs::symlink_metadata(&path)?;
        let name = path.strip_prefix(root)?.as_os_str().as_bytes().escape_ascii().to_string();
        let mut text = format!("{:o} {}:{} at {}.{:09}", about.mode(), about.uid(), about.gid(), about.mtime(), about.mtime_nsec());
        if about.is_dir() {
            let mut below = fs::read_dir(&path)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
            below.sort();
            todo.extend(below.into_iter().rev());
        } else if about.is_symlink() {
            text += &format!(" -> {}", fs::read_link(&path)?.display());
        } else if about.is_file() {
            let mut data = Vec::new();
            fs::File::open(&path)?.read_to_end(&mut data)?;
            text += &format!(" {} bytes {}", about.len(), digest("sha256", &data)?);
        } else {
            text += &format!(" device {}", about.rdev());
        }
        if !about.is_dir() && about.nlink() > 1 {
            text += &format!(" linked to {}", first.entry((about.dev(), about.ino())).or_insert_with(|| name.clone()));
        }
        let mut keys = vec![0; 4096];
        let length = rustix::fs::llistxattr(&path, &mut keys)?;
        for key in keys[..length].split(|byte| *byte == 0).filter(|key| !key.is_empty()) {
            let mut value = vec![0; 4096];
            let length = rustix::fs::lgetxattr(&path, key, &mut value)?;
            text += &format!(" {}={}", key.escape_ascii(), value[..length].escape_ascii());
        }
        all.insert(name, text);
    }
    Ok(all)
}

/// Names that differ, with what they are in each.
fn differences(one: &BTreeMap<String, String>, other: &BTreeMap<String, String>) -> Vec<(String, String)> {
    let names: BTreeSet<_> = one.keys().chain(other.keys()).collect();
    let different = names.into_iter().filter(|name| one.get(*name) != other.get(*name));
    different.map(|name| (name.clone(), format!("{:?} and {:?}", one.get(name), other.get(name)))).collect()
}

/// A containerd beside the daemon under test, until it is dropped.
struct Stock {
    folder: PathBuf,
    process: Child,
}

impl Stock {
    async fn start(cx: &Context) -> Result<Self> {
        let folder = cx.folder().join("stock");
        fs::create_dir(&folder)?;
        // the file that it would have in the place of the daemon under test
        let theirs = fs::read_to_string(cx.daemon().folder().join("config.toml"))?;
        let config = folder.join("config.toml");
        fs::write(&config, theirs.replace(&cx.daemon().folder().display().to_string(), &folder.display().to_string()))?;
        let log = fs::File::create(folder.join("log"))?;
        let process = Command::new(Suite::Forky.program("containerd"))
            .arg("--config")
            .arg(config)
            .env("PATH", cx.daemon().path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        isolation::keep(process.id());
        let stock = Self { folder, process };
        let answers = async || Client::connect(&stock.address(), "default").await?.version().await.map_err(anyhow::Error::from);
        eventually("containerd answers", SOON, answers)
            .await
            .with_context(|| fs::read_to_string(stock.folder.join("log")).unwrap_or_default())?;
        Ok(stock)
    }

    fn address(&self) -> PathBuf {
        self.folder.join("c.sock")
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        let _already_dead = self.process.kill();
        let _already_reaped = self.process.wait();
        isolation::forget(self.process.id());
    }
}

fn ctr(address: &Path, arguments: &[&str]) -> Result<()> {
    let output =
        Command::new(Suite::Forky.program("ctr")).arg("--address").arg(address).args(["--namespace", "judges"]).args(arguments).output()?;
    ensure!(output.status.success(), "ctr {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// What a daemon makes of an archive, mounted, and the blocks of its sparse file.
fn unpacked(address: &Path, archive: &Path, name: &str, point: &Path) -> Result<(BTreeMap<String, String>, u64)> {
    let (archive, path) = (archive.display().to_string(), point.display().to_string());
    fs::create_dir(point)?;
    ctr(address, &["images", "import", "--local", &archive])?;
    ctr(address, &["images", "mount", name, &path])?;
    let seen = tree(point);
    let blocks = fs::metadata(point.join("sparse")).map(|about| about.blocks());
    ctr(address, &["images", "unmount", "--rm", &path])?;
    Ok((seen?, blocks?))
}

pub(crate) async fn umoci_and_containerd_unpack_the_same_tree_of_legal_layers(cx: Context) -> Result<()> {
    image_tools::fetch()?;
    let (name, archive) = ("example.com/judged:latest", cx.folder().join("image.tar"));
    let layout = Layout::make(cx.folder(), name)?;
    layout.archive(&archive)?;
    let (ours, blocks) = unpacked(&cx.daemon().address(), &archive, name, &cx.folder().join("ours"))?;
    ensure!(blocks * 512 < 1 << 20, "of four million bytes six are not zero: {blocks} blocks");
    let stock = Stock::start(&cx).await?;
    let (theirs, _) = unpacked(&stock.address(), &archive, name, &cx.folder().join("theirs"))?;
    drop(stock);
    let bundle = cx.folder().join("bundle");
    let image = format!("{}:latest", layout.folder.display());
    let output = Command::new(image_tools::program("umoci")).args(["unpack", "--image", &image]).arg(&bundle).output()?;
    ensure!(output.status.success(), "{output:?}");
    let umocis = tree(&bundle.join("rootfs"))?;
    for (judge, seen, expected) in [("containerd", &theirs, CONTAINERDS), ("umoci", &umocis, UMOCIS)] {
        let different = differences(&ours, seen);
        let names: Vec<_> = different.iter().map(|(name, _)| name.as_str()).collect();
        ensure!(names == expected, "ours, and those of {judge}: {different:#?}");
    }
    ensure!(ours.len() > 85 && !ours.contains_key("d/kept"), "{ours:#?}");
    ctr(&cx.daemon().address(), &["images", "rm", "--sync", name])
}

/// Names that containerd 2.1 unpacks otherwise: the root has the time at which it was unpacked, times before 1970 are the beginning of 1970, and a folder
/// that a layer deletes and makes again shows what it had. Folders without an entry of their own have the time at which they were made, everywhere.
const CONTAINERDS: &[&str] = &["", "d/kept", "d/sub", "d/sub/deep", "mode-0", "opaque", "opaque/below"];
const UMOCIS: &[&str] = &["opaque", "opaque/below"];

/// Files of a folder by their names.
fn files(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    fs::read_dir(folder)?
        .map(|entry| {
            let path = entry?.path();
            Ok((path.file_name().context("a name")?.to_string_lossy().into_owned(), fs::read(&path)?))
        })
        .collect()
}

pub(crate) async fn what_skopeo_copies_to_a_registry_and_back_comes_back_byte_by_byte(cx: Context) -> Result<()> {
    let registry = image_tools::Registry::start(&cx.folder().join("registry")).await?;
    let (name, address) = ("example.com/copied:latest", cx.daemon().address());
    let path = |name: &str| cx.folder().join(name).display().to_string();
    let skopeo = |from: &str, to: &str| -> Result<()> {
        let mut command = Command::new(image_tools::program("skopeo"));
        command.args([
            "--insecure-policy",
            "--tmpdir",
            &path(""),
            "copy",
            "--preserve-digests",
            "--src-tls-verify=false",
            "--dest-tls-verify=false",
            from,
            to,
        ]);
        let output = command.env("HOME", cx.folder()).env("TMPDIR", cx.folder()).output()?;
        ensure!(output.status.success(), "skopeo copy {from} {to}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    let layout = Layout::make(cx.folder(), name)?;
    layout.archive(&cx.folder().join("image.tar"))?;
    ctr(&address, &["images", "import", "--local", "--no-unpack", &path("image.tar")])?;
    ctr(&address, &["images", "export", "--local", &path("exported.tar"), name])?;
    let there = format!("docker://{}", registry.image("copied:1"));
    skopeo(&format!("oci-archive:{}", path("exported.tar")), &there)?;
    skopeo(&there, &format!("oci:{}:latest", path("copied")))?;
    let blobs = files(&layout.folder.join("blobs/sha256"))?;
    ensure!(files(&cx.folder().join("copied/blobs/sha256"))? == blobs, "skopeo has read something else");
    ctr(&address, &["images", "rm", "--sync", name])?;
    let client = Client::connect(&address, "judges").await?;
    for name in blobs.keys() {
        ensure!(upload::info(&client, &format!("sha256:{name}")).await.is_err(), "{name} is there");
    }
    skopeo(&there, &format!("oci-archive:{}:latest", path("back.tar")))?;
    ctr(&address, &["images", "import", "--local", "--no-unpack", "--base-name", "example.com/back", &path("back.tar")])?;
    let request = GetImageRequest { name: "example.com/back:latest".to_owned() };
    let image = client.api().images().get(client.request(request)).await?.into_inner().image.unwrap_or_default();
    ensure!(image.target.as_ref().is_some_and(|target| target.digest == layout.digest), "{image:?}");
    for (name, bytes) in &blobs {
        ensure!(&upload::read(&client, &format!("sha256:{name}"), 0, 0).await? == bytes, "{name}");
    }
    ctr(&address, &["images", "rm", "--sync", "example.com/back:latest"])
}
