//! Docker 20.10 and 26, which keep images with a graph driver of their own: the daemon below has their containers, and leases of what they pull.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::ListRequest;
use shim_tests::client::Client;
use shim_tests::context::Context;
use shim_tests::docker::{Docker, IMAGE, Version};
use shim_tests::eventually::{SOON, eventually};
use shim_tests::image_tools::Registry;
use shim_tests::proc;

use super::Answer;

struct Old {
    docker: Docker,
    registry: Registry,
    below: Client,
}

type Row = (&'static str, for<'a> fn(&'a Old) -> Answer<'a>);

const ROWS: &[Row] = &[
    ("run; build (classic), with its cache", |old| Box::pin(build(old))),
    ("push, pull by name and by digest; rmi ends the lease of the image below", |old| Box::pin(push_and_pull(old))),
    ("save, load", |old| Box::pin(save_and_load(old))),
    ("commit, diff, cp, export", |old| Box::pin(commit(old))),
    ("tag, rmi, image prune, system df", |old| Box::pin(tag(old))),
    ("a kill of dockerd, then of the daemon below: containers run on (live-restore)", |old| Box::pin(restart(old))),
    ("system prune --all", |old| Box::pin(prune(old))),
];

/// Appends the table of both versions, and returns what is wrong.
pub(super) async fn append(cx: &Context, table: &mut String, chosen: &str) -> Result<Vec<String>> {
    let (mut wrong, mut verdicts) = (Vec::new(), vec![Vec::new(); ROWS.len()]);
    let rows: Vec<_> = ROWS.iter().enumerate().filter(|(_, (name, _))| name.contains(chosen)).collect();
    if rows.is_empty() {
        return Ok(wrong);
    }
    for version in [Version::V20, Version::V26] {
        let docker = Docker::start_version(cx, version).await.with_context(|| format!("{version:?}"))?;
        let registry = Registry::start(&docker.context().folder().join("registry")).await?;
        let below = Client::connect(&docker.context().daemon().address(), "moby").await?;
        let old = Old { docker, registry, below };
        for (number, (name, check)) in &rows {
            let verdict = match check(&old).await {
                Ok(()) => "yes",
                Err(error) => {
                    wrong.push(format!("{name}, {version:?}: {error:#}"));
                    "NO"
                }
            };
            println!("{name}, {version:?}: {verdict}");
            verdicts[*number].push(verdict);
        }
        old.docker.leaves_nothing().await?;
    }
    table.push_str(HEAD);
    for ((name, _), verdicts) in ROWS.iter().zip(&verdicts) {
        table.push_str(&format!("| {name} | {} |\n", verdicts.join(" | ")));
    }
    Ok(wrong)
}

const HEAD: &str = "
Docker 20.10 and 26 keep images themselves, with a graph driver; `x-manager` has their containers, and a lease for each image that they pull:

| | Docker 20.10 | Docker 26 |
| --- | --- | --- |
";

impl Old {
    fn run(&self, arguments: &[&str]) -> Result<String> {
        self.docker.run(arguments)
    }

    fn output_of(&self, image: &str, command: &[&str]) -> Result<String> {
        self.run(&[&["run", "--rm", "--network", "none", image], command].concat())
    }

    fn id(&self, name: &str) -> Result<String> {
        self.run(&["image", "inspect", "--format", "{{.Id}}", name])
    }

    /// An image with a file that says `text` twice.
    fn build(&self, name: &str, text: &str) -> Result<String> {
        let folder = self.docker.context().folder().join("build");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("made"), text)?;
        fs::write(
            folder.join("Dockerfile"),
            format!("FROM {IMAGE}\nCOPY made /made\nRUN cat /made /made > /twice && rm /made\nCMD cat /twice\n"),
        )?;
        let mut build = self.docker.command(&["build", "--network", "none", "--tag", name, &folder.display().to_string()]);
        let output = build.env("DOCKER_BUILDKIT", "0").output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Leases below: one for each image that was pulled.
    async fn leases(&self) -> Result<usize> {
        Ok(self.below.api().leases().list(self.below.request(ListRequest::default())).await?.into_inner().leases.len())
    }
}

async fn build(old: &Old) -> Result<()> {
    ensure!(old.output_of(IMAGE, &["echo", "hello"])? == "hello");
    old.build("built", "text")?;
    ensure!(old.output_of("built", &[])? == "texttext");
    let again = old.build("built", "text")?;
    ensure!(again.matches("Using cache").count() == 3, "{again}");
    old.run(&["rmi", "built"]).map(drop)
}

async fn push_and_pull(old: &Old) -> Result<()> {
    let name = old.registry.image("a/pushed:1");
    old.build(&name, "pushed")?;
    let id = old.id(&name)?;
    let pushed = old.run(&["push", &name])?;
    let digest = pushed.split_whitespace().find(|word| word.starts_with("sha256:")).context("no digest")?;
    let by_digest = old.registry.image(&format!("a/pushed@{digest}"));
    old.run(&["rmi", &name])?;
    old.run(&["image", "prune", "--force"])?;
    for reference in [&name, &by_digest] {
        old.run(&["pull", reference])?;
        ensure!(old.id(reference)? == id && old.output_of(reference, &[])? == "pushedpushed", "{reference}");
        ensure!(old.leases().await? == 1, "an image has a lease below");
        old.run(&["rmi", reference])?;
        eventually("the lease has ended", SOON, async || {
            let leases = old.leases().await?;
            ensure!(leases == 0, "{leases} leases");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn save_and_load(old: &Old) -> Result<()> {
    old.build("saved", "saved")?;
    let (id, file) = (old.id("saved")?, old.docker.context().folder().join("saved.tar").display().to_string());
    old.run(&["save", "--output", &file, "saved"])?;
    old.run(&["rmi", "saved"])?;
    let loaded = old.run(&["load", "--input", &file])?;
    ensure!(loaded == "Loaded image: saved:latest" && old.id("saved")? == id, "{loaded}");
    ensure!(old.output_of("saved", &[])? == "savedsaved");
    old.run(&["rmi", "saved"]).map(drop)
}

async fn commit(old: &Old) -> Result<()> {
    old.run(&["run", "--network", "none", "--name", "it", IMAGE, "sh", "-c", "echo made > /made; rm /bin/wget"])?;
    let changes = old.run(&["diff", "it"])?;
    ensure!(["A /made", "D /bin/wget"].iter().all(|change| changes.lines().any(|line| line == *change)), "{changes}");
    old.run(&["commit", "--change", "CMD cat /made", "it", "committed"])?;
    ensure!(old.output_of("committed", &[])? == "made");
    let (file, exported) = (old.docker.context().folder().join("into"), old.docker.context().folder().join("exported.tar"));
    fs::write(&file, "copied")?;
    old.run(&["cp", &file.display().to_string(), "it:/into"])?;
    old.run(&["export", "--output", &exported.display().to_string(), "it"])?;
    let found = Command::new("tar").arg("-xOf").arg(&exported).arg("into").output()?;
    ensure!(found.stdout == b"copied", "{found:?}");
    old.run(&["rm", "it"])?;
    old.run(&["rmi", "committed"]).map(drop)
}

async fn tag(old: &Old) -> Result<()> {
    old.build("one", "tagged")?;
    old.run(&["tag", "one", "two:2"])?;
    ensure!(old.id("two:2")? == old.id("one")?);
    ensure!(old.run(&["rmi", "one"])? == "Untagged: one:latest");
    let usage = old.docker.get("/system/df")?;
    ensure!(usage["LayersSize"].as_i64().is_some_and(|size| size > 0), "{usage}");
    ensure!(old.run(&["rmi", "two:2"])?.contains("Deleted: sha256:"));
    // leaves images without a name, if the build made some
    old.run(&["image", "prune", "--force"])?;
    ensure!(old.run(&["image", "ls", "--quiet"])?.lines().count() == 1);
    Ok(())
}

async fn restart(old: &Old) -> Result<()> {
    old.run(&["run", "--detach", "--network", "none", "--name", "it", IMAGE, "sleep", "1000"])?;
    let pid = old.docker.inspect("it", ".State.Pid")?;
    old.docker.kill()?;
    old.docker.revive().await?;
    ensure!(old.docker.inspect("it", ".State.Pid")? == pid && old.run(&["exec", "it", "echo", "hello"])? == "hello");
    old.docker.context().crash_daemon().await?;
    ensure!(proc::is_alive(pid.parse()?));
    // dockerd connects again
    eventually("exec works again", Duration::from_secs(30), async || {
        ensure!(old.run(&["exec", "it", "echo", "hello"])? == "hello");
        Ok(())
    })
    .await?;
    ensure!(old.docker.inspect("it", ".State.Pid")? == pid);
    old.run(&["rm", "--force", "it"]).map(drop)
}

async fn prune(old: &Old) -> Result<()> {
    old.build("unused", "unused")?;
    let printed = old.run(&["system", "prune", "--all", "--force"])?;
    ensure!(printed.contains("Total reclaimed space"), "{printed}");
    ensure!(old.run(&["image", "ls", "--all", "--quiet"])?.is_empty());
    Ok(())
}
