//! Message versions: which keeper works with which worker.
//!
//! A build speaks a range of versions. Two builds work together if their ranges meet, in the newest version that both speak.
//! `docs/upgrade.md` says when the numbers change.

use minicbor::{Decode, Encode};

/// A range of versions, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Versions {
    #[n(0)]
    pub(crate) oldest: u16,
    #[n(1)]
    pub(crate) newest: u16,
}

impl Versions {
    /// The first version in which a keeper performs plans of the native engine: those of plan version 1. Plans of another version need another one.
    pub(crate) const PERFORMS: u16 = 2;

    /// The first version in which a keeper performs plans with criu: checkpoints and restores.
    pub(crate) const CHECKPOINTS: u16 = 3;

    /// The first version in which a keeper makes placeholders, and performs a plan in a cgroup that holds one.
    pub(crate) const HOLDS_UNITS: u16 = 3;

    /// The first version in which a keeper enters the namespaces of a pod.
    pub(crate) const HOLDS_PODS: u16 = 3;

    /// The versions that this build speaks, as keeper and as worker.
    pub(crate) const OURS: Self = Self { oldest: 1, newest: 3 };

    /// The version in which two builds work together, if there is one.
    pub(crate) fn agree(self, other: Self) -> Option<u16> {
        let newest = self.newest.min(other.newest);
        (newest >= self.oldest.max(other.oldest)).then_some(newest)
    }
}

const _: () = assert!(x_engine::plan::VERSION == 1, "a plan that older keepers cannot perform needs a message version of its own");

impl std::fmt::Display for Versions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.oldest == self.newest { write!(f, "{}", self.newest) } else { write!(f, "{} to {}", self.oldest, self.newest) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builds_agree_on_the_newest_version_that_both_speak() {
        let of = |oldest, newest| Versions { oldest, newest };
        for (a, b, agreed) in [
            (of(1, 1), of(1, 1), Some(1)),
            (of(1, 3), of(2, 5), Some(3)),
            (of(1, 5), of(2, 3), Some(3)),
            (of(1, 2), of(3, 4), None),
            (of(4, 4), of(1, 3), None),
        ] {
            assert_eq!((a.agree(b), b.agree(a)), (agreed, agreed), "{a} and {b}");
        }
    }
}
