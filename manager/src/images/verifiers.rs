//! Image verifiers: programs that are asked whether an image may be pulled, as containerd's plugin io.containerd.image-verifier.v1.bindir asks them.
//!
//! ```text
//! PROGRAM -name REFERENCE -digest DIGEST -stdin-media-type application/vnd.oci.descriptor.v1+json
//!   stdin    the image's descriptor, as JSON
//!   exit     0: it may be pulled, as far as this program is concerned
//!   stdout   why, or why not
//!   stderr   is logged (debug)
//! ```
//! **Invariant:** a program that cannot be run, is killed or is late allows nothing. What they were asked about is what is pulled: the digest.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::Path;

use log::{debug, warn};
use serde_json::json;
use tokio::process::Command;

use super::document::Descriptor;
use crate::child::{self, Limits};
use crate::error::{Error, IoContext as _, Result};
use crate::pools::Pool;
use crate::settings::VerifierSettings;

/// Those of a folder.
#[derive(Debug)]
pub(super) struct Verifiers {
    settings: VerifierSettings,
    pool: Pool,
}

impl Verifiers {
    pub(super) fn new(settings: VerifierSettings, pool: Pool) -> Self {
        Self { settings, pool }
    }

    /// Asks them about an image, one after the other. Without the folder, or with nothing in it, every image may be pulled.
    ///
    /// Errors: [`Error::Precondition`] when one of them refuses it; [`Error::Unverified`] when one of them gives no answer.
    pub(super) async fn ask(&self, name: &str, image: &Descriptor) -> Result<()> {
        let unverified = |source| Error::Unverified { image: name.to_owned(), source: Box::new(source) };
        let folder = self.settings.folder.clone();
        if folder.as_os_str().is_empty() {
            return Ok(());
        }
        let programs = self.pool.run(move || blocking_names(&folder)).await.and_then(|names| names).map_err(unverified)?;
        let most = self.settings.most.unwrap_or(programs.len());
        if programs.len() > most {
            warn!(folder:% = self.settings.folder.display(), verifiers = programs.len(), asked = most; "not all image verifiers are asked");
        }
        for program in programs.iter().take(most) {
            self.ask_one(&self.settings.folder.join(program), name, image).await.map_err(|error| match error {
                refused @ Error::Precondition(_) => refused,
                error => unverified(error),
            })?;
        }
        Ok(())
    }

    async fn ask_one(&self, program: &Path, name: &str, image: &Descriptor) -> Result<()> {
        let mut command = Command::new(program);
        command.args(["-name", name, "-digest", image.digest.as_str(), "-stdin-media-type", DESCRIPTOR]);
        let descriptor = json!({ "mediaType": image.media_type, "digest": image.digest.as_str(), "size": image.size });
        let limits = Limits { time: self.settings.timeout, bytes: OUTPUT_BYTES };
        let output = child::run(program, command, format!("{descriptor}\n").into_bytes(), limits).await?;
        for line in String::from_utf8_lossy(&output.stderr).lines() {
            debug!(verifier:% = program.display(), line; "image verifier");
        }
        let reason = String::from_utf8_lossy(&output.stdout);
        let (reason, digest) = (reason.trim(), &image.digest);
        match output.status.code() {
            Some(0) => {
                debug!(verifier:% = program.display(), image = name, digest:%, reason; "image verifier allows a pull");
                Ok(())
            }
            Some(code) => {
                let verifier = program.file_name().unwrap_or_default().to_string_lossy();
                Err(Error::Precondition(format!(
                    "image verifier {verifier} refuses {name} with digest {digest} (exit code {code}): {reason}"
                )))
            }
            None => Err(Error::ProgramFailed { program: program.to_owned(), status: output.status, output: reason.to_owned() }),
        }
    }
}

/// What is in the folder, by name.
fn blocking_names(folder: &Path) -> Result<Vec<OsString>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.on("list", folder)?,
    };
    let mut names = entries.map(|entry| Ok(entry.on("list", folder)?.file_name())).collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

/// What they read.
const DESCRIPTOR: &str = "application/vnd.oci.descriptor.v1+json";
/// What is kept of what one of them prints, as containerd keeps it.
const OUTPUT_BYTES: u64 = 32 << 10;
