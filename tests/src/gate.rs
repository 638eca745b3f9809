//! An OCI runtime under a test's control: the controlling side of the `gated-runtime` program.
//!
//! The program is copied into a folder of the test and is configured by the files beside it, by verb
//! (create, start, exec, kill, delete …):
//!
//! | file | meaning |
//! | --- | --- |
//! | `real` | path of the real runtime |
//! | `hold.VERB` | block before the real runtime runs, until the file is gone |
//! | `after.VERB` | block after it has run |
//! | `fail.VERB` | print the content on stderr and fail |
//! | `flood.VERB` | print that many bytes on stderr first |
//! | `calls` | appended by the program: one line `VERB arguments` per call |
//! | `held.VERB` | written by the program while it blocks: its pid |

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::eventually::{SOON, eventually};
use crate::programs;

/// A copy of the gated runtime and its configuration.
#[derive(Debug)]
pub struct Gate {
    folder: PathBuf,
}

impl Gate {
    /// Puts a copy of `program` into `folder`, in front of the runtime `real`.
    pub fn new(folder: &Path, program: &Path, real: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        programs::copy(program, &folder.join("runtime"))?;
        fs::write(folder.join("real"), real.to_str().context("a path in UTF-8")?)?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// The path to give as BinaryName.
    pub fn binary(&self) -> PathBuf {
        self.folder.join("runtime")
    }

    /// Blocks the next calls of `verb` before they do anything. None may be blocked already.
    pub fn hold(&self, verb: &str) -> Result<()> {
        self.order("hold", verb)
    }

    /// Blocks the next calls of `verb` after the real runtime has done its work.
    pub fn hold_after(&self, verb: &str) -> Result<()> {
        self.order("after", verb)
    }

    fn order(&self, kind: &str, verb: &str) -> Result<()> {
        // of a call that was killed while it was blocked
        drop(fs::remove_file(self.mark(verb)));
        Ok(fs::write(self.folder.join(format!("{kind}.{verb}")), "")?)
    }

    fn mark(&self, verb: &str) -> PathBuf {
        self.folder.join(format!("held.{verb}"))
    }

    /// Releases them, and no longer blocks.
    pub fn release(&self, verb: &str) -> Result<()> {
        for kind in ["hold", "after"] {
            let file = self.folder.join(format!("{kind}.{verb}"));
            if file.exists() {
                fs::remove_file(file)?;
            }
        }
        Ok(())
    }

    /// Lets the calls that are blocked before the real runtime run it. They block after it if that was ordered.
    pub fn let_run(&self, verb: &str) -> Result<()> {
        Ok(fs::remove_file(self.folder.join(format!("hold.{verb}")))?)
    }

    /// Waits until a call of `verb` is blocked, and returns its pid.
    pub async fn held(&self, verb: &str) -> Result<i32> {
        eventually(format!("the runtime is held at {verb}"), SOON, async || {
            let mark = fs::read_to_string(self.mark(verb)).unwrap_or_default();
            mark.parse().ok().with_context(|| format!("calls so far: {:?}", self.calls()))
        })
        .await
    }

    /// Makes the next calls of `verb` fail with `message`, or succeed again.
    pub fn fail(&self, verb: &str, message: Option<&str>) -> Result<()> {
        let file = self.folder.join(format!("fail.{verb}"));
        match message {
            Some(message) => fs::write(file, message)?,
            None => fs::remove_file(file)?,
        }
        Ok(())
    }

    /// Makes the next calls of `verb` print that many bytes on stderr first.
    pub fn flood(&self, verb: &str, bytes: usize) -> Result<()> {
        Ok(fs::write(self.folder.join(format!("flood.{verb}")), bytes.to_string())?)
    }

    /// The calls so far, each as `VERB arguments`.
    pub fn calls(&self) -> Vec<String> {
        fs::read_to_string(self.folder.join("calls")).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    /// How often `verb` was called.
    pub fn count(&self, verb: &str) -> usize {
        self.calls().iter().filter(|call| call.split(' ').next() == Some(verb)).count()
    }
}
