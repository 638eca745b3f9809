//! `docker buildx`: BuildKit within dockerd, which keeps its layers and its cache in the daemon below, and starts runc itself.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use super::{Bench, IMAGE};

/// Three stages: what is copied, what is run on it, also with a folder that is kept between builds, and the result.
const STEPS: &str = "AS base
COPY note /note
RUN cat /note /note > /twice && rm /bin/wget
FROM base AS other
RUN --mount=type=cache,target=/kept echo 1 > /kept/1 && wc -c < /twice > /count && ls /bin/wget 2> /dev/null || echo gone >> /count
";

pub(super) async fn buildx(bench: &Bench) -> Result<()> {
    bench.docker.add_buildx()?;
    let before = bench.numbers().await?;
    let folder = bench.folder.join("buildx");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("note"), "note")?;
    fs::write(
        folder.join("Dockerfile"),
        format!("FROM {IMAGE} {STEPS}FROM {IMAGE}\nCOPY --from=other /count /count\nCMD [\"cat\", \"/count\"]\n"),
    )?;
    let context = folder.display().to_string();
    let build = |options: &[&str]| -> Result<String> {
        let arguments = [&["buildx", "build", "--progress", "plain", "--network", "none"], options, &[&context]].concat();
        let output = bench.docker.output(&arguments)?;
        let progress = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{arguments:?}: {progress}");
        Ok(progress)
    };
    let expected = "8\ngone";
    build(&["--tag", "built"])?;
    ensure!(bench.output_of("built", &[])? == expected);
    let again = build(&["--load", "--tag", "loaded"])?;
    ensure!(again.matches("CACHED").count() == 4, "{again}");
    ensure!(bench.output_of("loaded", &[])? == expected);
    let (archive, tree) = (bench.folder.join("buildx.tar"), bench.folder.join("buildx-tree"));
    build(&["--output", &format!("type=oci,dest={}", archive.display())])?;
    let listed = Command::new("tar").arg("-tf").arg(&archive).output()?;
    let listed = String::from_utf8_lossy(&listed.stdout);
    ensure!(["index.json", "oci-layout"].iter().all(|name| listed.lines().any(|line| line == *name)), "{listed}");
    build(&["--output", &format!("type=local,dest={}", tree.display())])?;
    ensure!(fs::read_to_string(tree.join("count"))? == format!("{expected}\n") && Path::new(&tree).join("bin/busybox").exists());
    let name = bench.registry.image("a/buildx:1");
    build(&["--tag", &name, "--push"])?;
    bench.remove(&["built", "loaded", &name])?;
    bench.docker.run(&["pull", &name])?;
    ensure!(bench.output_of(&name, &[])? == expected);
    bench.remove(&[&name])?;
    bench.docker.run(&["buildx", "prune", "--all", "--force"])?;
    bench.is_again(before).await
}
