//! Image verifiers: programs that are asked before a pull by Transfer, as `ctr` 2.1 asks for it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::operator::output_text;
use shim_tests::proc;
use shim_tests::programs::script;
use shim_tests::registry::Registry;
use shim_tests::suite::Suite;
use shim_tests::transfers::{OCI_MANIFEST, Parts, names, nothing_is_left, own, remove, this_machine};

/// A daemon with verifiers in a folder that is not there yet, and an image.
struct Bench {
    cx: Context,
    registry: Registry,
    name: String,
    /// Of its manifest, and of its layer.
    digests: [String; 2],
    folder: PathBuf,
}

impl Bench {
    async fn start(cx: &Context, settings: &str) -> Result<Self> {
        let cx = cx.with_own_daemon().await?;
        let folder = cx.folder().join("verifiers");
        cx.daemon().stop()?;
        cx.daemon().configure(&format!("[image_verifier]\nbin_dir = \"{}\"\n{settings}", folder.display()))?;
        cx.revive_daemon().await?;
        let registry = Registry::start(None).await?;
        let mut parts = Parts::default();
        let manifest = parts.image(&this_machine().architecture, &[&own(&cx, "layer")]);
        parts.publish(&registry, "app:1", &manifest)?;
        let layer = parts.blobs.iter().find(|(_, (media_type, _))| media_type.contains(".layer.")).context("a layer")?.0.clone();
        let digests = [manifest["digest"].as_str().context("a digest")?.to_owned(), layer];
        let name = registry.image("app:1");
        Ok(Self { cx, registry, name, digests, folder })
    }

    /// Whether it is pulled, and what `ctr` printed. Nothing is left of it.
    async fn pulls(&self, more: &[&str]) -> Result<(bool, String)> {
        let client = self.cx.client();
        let mut command = tokio::process::Command::new(Suite::Forky.program("ctr"));
        command.arg("--address").arg(self.cx.daemon().address()).args(["--namespace", client.namespace()]);
        let output = command.args(["images", "pull", "--plain-http"]).args(more).arg(&self.name).output().await?;
        let is_pulled = output.status.success();
        ensure!(names(client).await?.len() == usize::from(is_pulled), "{}", output_text(&output));
        if is_pulled {
            remove(client, &self.name).await?;
        }
        nothing_is_left(client).await?;
        Ok((is_pulled, output_text(&output)))
    }

    async fn is_pulled(&self) -> Result<()> {
        let (is_pulled, printed) = self.pulls(&[]).await?;
        ensure!(is_pulled, "{printed}\n{}", self.cx.daemon().log());
        Ok(())
    }

    /// It is not, for a reason with these in it, and none of its layer was asked for.
    async fn is_refused(&self, sentences: &[&str]) -> Result<()> {
        let before = self.registry.fetches(&self.digests[1]);
        let (is_pulled, printed) = self.pulls(&[]).await?;
        ensure!(!is_pulled && sentences.iter().all(|sentence| printed.contains(sentence)), "{sentences:?}: {printed}");
        ensure!(printed.len() < 10_000, "{} bytes", printed.len());
        ensure!(self.registry.fetches(&self.digests[1]) == before, "{:?}", self.registry.requests());
        Ok(())
    }

    fn verifier(&self, name: &str, lines: &str) -> Result<()> {
        script(&self.folder, name, &format!("#!/bin/sh\n{lines}\n")).map(drop)
    }
}

fn lines(path: &Path) -> Result<Vec<String>> {
    Ok(fs::read_to_string(path)?.lines().map(str::to_owned).collect())
}

pub(crate) async fn a_pull_by_transfer_needs_the_consent_of_each_verifier(cx: Context) -> Result<()> {
    let bench = Bench::start(&cx, "max_verifiers = 2\nper_verifier_timeout = \"60s\"\n").await?;
    bench.is_pulled().await.context("without the folder")?;
    fs::create_dir(&bench.folder)?;
    bench.is_pulled().await.context("with nothing in it")?;
    let seen = bench.cx.folder().join("seen");
    fs::create_dir(&seen)?;
    let at = seen.display();
    let notes = format!(
        "printf '%s\\n' \"$@\" > {at}/arguments; cat > {at}/stdin; readlink /proc/$$/fd/* > {at}/descriptors; env > {at}/environment"
    );
    bench.verifier("b", &format!("{notes}; yes | head -c 200000 >&2; yes | head -c 200000"))?;
    bench.is_pulled().await.context("with one that agrees, and prints much")?;
    let digest = &bench.digests[0];
    let expected = ["-name", &bench.name, "-digest", digest, "-stdin-media-type", "application/vnd.oci.descriptor.v1+json"];
    ensure!(lines(&seen.join("arguments"))? == expected, "{:?}", lines(&seen.join("arguments"))?);
    let descriptor: Value = serde_json::from_str(&fs::read_to_string(seen.join("stdin"))?)?;
    let size = descriptor["size"].as_u64().filter(|size| *size > 0).context("a size")?;
    ensure!(descriptor == json!({ "mediaType": OCI_MANIFEST, "digest": digest, "size": size }), "{descriptor}");
    // a test's own descriptors may come as far, those of the daemon do not
    let daemons = ["socket:", "anon_inode:", "/root/", "/state/"];
    let descriptors = lines(&seen.join("descriptors"))?;
    ensure!(!descriptors.iter().any(|file| daemons.iter().any(|of| file.contains(of))), "{descriptors:?}");
    ensure!(!lines(&seen.join("environment"))?.iter().any(|line| line.starts_with("NOTIFY_SOCKET=") || line.starts_with("LISTEN_")));
    bench.verifier("a", "echo not signed by us; echo a lot more >&2; exit 7")?;
    bench.is_refused(&["image verifier a", "(exit code 7)", "not signed by us", &bench.name, digest]).await?;
    // who pulls by himself is not asked, as in containerd
    let (is_pulled, printed) = bench.pulls(&["--local"]).await?;
    ensure!(is_pulled, "{printed}");
    bench.verifier("a", "yes | head -c 200000; exit 1")?;
    bench.is_refused(&["image verifier a", "y\ny"]).await?;
    bench.verifier("a", "kill -9 $$")?;
    bench.is_refused(&["an image verifier gives no answer", "SIGKILL"]).await?;
    fs::remove_file(bench.folder.join("a"))?;
    fs::create_dir(bench.folder.join("a"))?;
    bench.is_refused(&["an image verifier gives no answer", "verifiers/a"]).await?;
    fs::remove_dir(bench.folder.join("a"))?;
    bench.verifier("a", "true")?;
    // one more than are asked
    bench.verifier("c", "exit 1")?;
    bench.is_pulled().await?;
    let log = bench.cx.daemon().log();
    ensure!(log.contains("not all image verifiers are asked"), "{log}");
    Ok(())
}

pub(crate) async fn a_verifier_that_hangs_is_killed_and_refuses_a_pull(cx: Context) -> Result<()> {
    let bench = Bench::start(&cx, "per_verifier_timeout = \"500ms\"\n").await?;
    fs::create_dir(&bench.folder)?;
    let pid = bench.cx.folder().join("pid");
    let at = pid.display();
    bench.verifier("slow", &format!("sleep 1000 & echo $! > {at}.new; mv {at}.new {at}; wait"))?;
    // it may be too late before it begins
    let number: i32 = eventually("its child has begun", 6 * SOON, async || {
        bench.is_refused(&["an image verifier gives no answer", "slow", "did not end within 500ms"]).await?;
        Ok(fs::read_to_string(&pid)?.trim().parse()?)
    })
    .await?;
    eventually_true("its child is killed", SOON, || !proc::is_alive(number)).await
}
