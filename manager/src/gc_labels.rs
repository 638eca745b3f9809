//! Labels by which one object keeps another, as x-manager's collector obeys them and `xctl why` shows them: the two programs must agree.
//!
//! ```text
//! label of an object                          leads to
//! containerd.io/gc.ref.content[.x|/x]         content VALUE
//! containerd.io/gc.ref.image[.x|/x]           image VALUE
//! containerd.io/gc.ref.snapshot.NAME[/x]      snapshot VALUE of the snapshotter NAME
//! containerd.io/gc.bref.…                     the same the other way round: as long as VALUE is there, the object is kept
//! containerd.io/gc.bref.container[.x|/x]      as long as container VALUE is there
//! ```

/// What a label does; with the kind of the object that its value names, as leases name kinds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reference {
    /// The labelled object keeps the named one.
    To(String),
    /// The named object keeps the labelled one.
    Back(String),
}

impl Reference {
    /// That of a label's key, if it is one of these.
    pub(crate) fn of(key: &str) -> Option<Self> {
        if let Some(rest) = key.strip_prefix("containerd.io/gc.ref.") {
            return kind(rest).map(Self::To);
        }
        let rest = key.strip_prefix("containerd.io/gc.bref.")?;
        let kind = if is_named(rest, "container") { Some("containers".to_owned()) } else { kind(rest) };
        kind.map(Self::Back)
    }
}

fn kind(rest: &str) -> Option<String> {
    if let Some(rest) = rest.strip_prefix("snapshot.") {
        let snapshotter = rest.split('/').next().unwrap_or_default();
        return (!snapshotter.is_empty()).then(|| format!("snapshots/{snapshotter}"));
    }
    if is_named(rest, "content") {
        return Some("content".to_owned());
    }
    is_named(rest, "image").then(|| "images".to_owned())
}

fn is_named(rest: &str, name: &str) -> bool {
    rest.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '/']))
}
