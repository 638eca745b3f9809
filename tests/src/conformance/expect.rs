//! The known deviations of a shim: cases that it fails, each with a reason.
//!
//! ```toml
//! [[deviation]]
//! case = "stdio.a_late_reader_gets_everything"
//! reason = "Create blocks until the fifo has a reader"
//! engine = "runc"      # optional: with this OCI runtime only
//! sometimes = true     # optional: not every time
//! ```

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::Deserialize;

use super::Case;

/// A file of them.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expectations {
    #[serde(default)]
    deviation: Vec<Deviation>,
}

/// One case that a shim is known to fail.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deviation {
    /// The case.
    pub case: String,
    /// What the shim does instead.
    pub reason: String,
    /// The OCI runtime with which it does so, by the name of its program; any if absent.
    pub engine: Option<String>,
    /// Whether it only sometimes does so.
    #[serde(default)]
    pub sometimes: bool,
}

impl Expectations {
    /// Reads a file, and checks that it names only existing `cases`.
    ///
    /// Errors: the mistake, and its line.
    pub fn read(path: &Path, cases: &[Case]) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let expectations: Self = toml::from_str(&text).map_err(|error| {
            let line = 1 + text[..error.span().map_or(0, |span| span.start)].matches('\n').count();
            anyhow!("{}: line {line}: {}", path.display(), error.message())
        })?;
        for deviation in &expectations.deviation {
            ensure!(cases.iter().any(|case| case.name == deviation.case), "{}: there is no case {}", path.display(), deviation.case);
            ensure!(!deviation.reason.is_empty(), "{}: {} has no reason", path.display(), deviation.case);
        }
        Ok(expectations)
    }

    /// The known deviation in a case with this OCI runtime.
    pub fn of(&self, case: &str, engine: &str) -> Option<&Deviation> {
        let applies = |deviation: &&Deviation| deviation.case == case && deviation.engine.as_ref().is_none_or(|name| name == engine);
        self.deviation.iter().find(applies)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.deviation.len()
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.deviation.is_empty()
    }
}
