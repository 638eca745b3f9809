//! Whatever a client sends, it gets one clear error or none is needed, and a container of the same shim does not notice.

use std::fs;

use anyhow::{Result, ensure};
use shim_tests::stand::{Stand, Witness};
use shim_tests::ttrpc::{Code, refusal};

pub(crate) async fn a_bundle_that_cannot_be_run_is_refused_with_a_sentence(stand: Stand) -> Result<()> {
    let witness = Witness::start(&stand).await?;
    let task = &witness.container.task;
    let bundle = witness.sibling("bad", &["true"]);
    for (config, code, words) in [
        (None, Code::NotFound, "config.json"),
        (Some("{\"ociVersion\": "), Code::InvalidArgument, "config.json"),
    ] {
        bundle.write()?;
        let path = bundle.folder.join("config.json");
        match config {
            Some(config) => fs::write(&path, config)?,
            None => fs::remove_file(&path)?,
        }
        let (found, message) = refusal(task.create(&bundle.request()).await)?;
        ensure!(found == code && message.contains(words), "{config:?}: {found:?} {message}");
    }
    witness.dismiss().await
}
