//! The clauses, read from `docs/protocol.md`, which this program carries with it.

use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

/// The document.
pub const DOCUMENT: &str = include_str!("../../../docs/protocol.md");

/// The requirement level of a clause, as in RFC 2119.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// A shim that breaks it does not work with containerd.
    Must,
    /// A shim that breaks it works, until something goes wrong.
    Should,
    /// A shim may do without.
    May,
}

impl Level {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Must, Self::Should, Self::May];
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Must => "MUST",
            Self::Should => "SHOULD",
            Self::May => "MAY",
        })
    }
}

impl FromStr for Level {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|level| level.to_string() == text).ok_or(())
    }
}

/// One row of the document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clause {
    /// A letter and a number.
    pub id: &'static str,
    /// Its level.
    pub level: Level,
    /// Its text.
    pub text: &'static str,
    /// Its source.
    pub source: &'static str,
}

/// All clauses, in the order of the document.
pub fn all() -> &'static [Clause] {
    static ALL: LazyLock<Vec<Clause>> = LazyLock::new(|| DOCUMENT.lines().filter_map(read).collect());
    &ALL
}

/// The clause of that id.
pub fn find(id: &str) -> Option<&'static Clause> {
    all().iter().find(|clause| clause.id == id)
}

/// Reads `| C1 | MUST | text | source |`.
fn read(line: &'static str) -> Option<Clause> {
    let mut cells = line.strip_prefix('|')?.strip_suffix('|')?.split(" | ").map(str::trim);
    let (id, level) = (cells.next()?, cells.next()?.parse().ok()?);
    Some(Clause { id, level, text: cells.next()?, source: cells.next()? })
}
