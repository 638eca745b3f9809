//! Other builds of our shim: copies of one built for tests, with a test identity appended.
//! See `shim/src/test_identity.rs`.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::context::Context;
use crate::eventually::eventually;
use crate::programs;

/// Copies `shim` to `path` with the test identity `words`: `build=2 newest=3`.
pub fn make(shim: &Path, path: &Path, words: &str) -> Result<PathBuf> {
    programs::copy_with(shim, path, format!("\nx-test-identity: {words}\n").as_bytes())?;
    Ok(path.to_owned())
}

/// The output of `upgrade`, and its exit status.
#[derive(Debug)]
pub struct Upgraded {
    /// The exit status.
    pub status: i32,
    /// Its output: `shims` and `summary`.
    pub report: Value,
}

impl Upgraded {
    /// The result of the only shim.
    pub fn only(&self) -> Result<&Value> {
        let shims = self.report["shims"].as_array().context("no shims")?;
        ensure!(shims.len() == 1, "exactly one shim expected: {:#}", self.report);
        Ok(&shims[0])
    }

    /// Checks that everything was upgraded.
    pub fn is_done(&self) -> Result<()> {
        let done = self.report["shims"].as_array().is_some_and(|shims| shims.iter().all(|shim| shim["result"] == "upgraded"));
        ensure!(self.status == 0 && done, "{self:#?}");
        Ok(())
    }
}

/// Runs `upgrade` for shims of the test's namespace.
pub async fn upgrade(cx: &Context, program: &Path, words: &[&str]) -> Result<Upgraded> {
    upgrade_of(program, cx.client().namespace(), words).await
}

/// The same in another namespace.
pub async fn upgrade_of(program: &Path, namespace: &str, words: &[&str]) -> Result<Upgraded> {
    let mut command = tokio::process::Command::new(program);
    command.args(["upgrade", "--json", "--namespace", namespace]).args(words).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await?;
    let status = output.status.code().context("upgrade was killed")?;
    let report = serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    Ok(Upgraded { status, report })
}

/// What `ps` reports about the shims of the test's namespace.
pub async fn ps(cx: &Context, program: &Path) -> Result<Vec<Value>> {
    ps_of(program, cx.client().namespace()).await
}

/// The same in another namespace.
pub async fn ps_of(program: &Path, namespace: &str) -> Result<Vec<Value>> {
    let mut command = tokio::process::Command::new(program);
    let output = command.args(["ps", "--json", "--namespace", namespace]).stdin(Stdio::null()).output().await?;
    ensure!(output.status.success(), "ps: {}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout)?;
    Ok(report["shims"].as_array().context("no shims")?.clone())
}

/// Waits until the worker of that container's shim hibernates.
pub async fn hibernates(cx: &Context, id: &str) -> Result<()> {
    let program = cx.shim().binary.as_ref().context("X_SHIM must name our own shim")?;
    eventually("the worker hibernates", Duration::from_secs(30), async || {
        let shims = ps(cx, program).await?;
        let shim = shims.iter().find(|shim| shim["group"] == *id).context("ps does not show it")?;
        ensure!(shim["worker_asleep"] == true && shim["worker"].is_null(), "{shim:#}");
        Ok(())
    })
    .await
}
