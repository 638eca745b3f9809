//! Plans the file system of the root, where the container's own mount namespace is to have it and the host is not.
use minicbor::{Decode, Encode};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::mounts;
use super::options::{self, RDONLY};
use super::{Attributes, Mount, Source};
use crate::Refused;

/// A mount of the root file system, in containerd's words.
#[derive(Debug, Clone, Copy)]
pub struct RootMount<'a> {
    /// `overlay`, `bind`, or any other type that the kernel has.
    pub kind: &'a str,
    pub source: &'a str,
    pub options: &'a [String],
}

/// A file system that is mounted by mount(2): fsconfig(2) takes no value that is as long.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Classic {
    #[n(0)]
    pub kind: String,
    #[n(1)]
    pub source: String,
    #[n(2)]
    pub data: String,
}

/// Whether these mounts can be made in the container's mount namespace alone. If not, the caller makes them on the host, and names none.
///
/// Hooks that run before the container has entered its root look for its files at the bundle; and there must be a mount namespace of its
/// own.
#[must_use]
pub fn can_mount_root(spec: &Spec, mounts: &[RootMount<'_>]) -> bool {
    check(spec).is_ok() && plan(mounts).is_ok()
}

/// Refuses a configuration that needs the root on the host.
pub(super) fn check(spec: &Spec) -> Result<(), Refused> {
    if let Some(hooks) = spec.hooks() {
        #[allow(deprecated, reason = "configurations still have them")]
        let early =
            [("prestart", hooks.prestart()), ("createRuntime", hooks.create_runtime()), ("createContainer", hooks.create_container())];
        if let Some((name, _)) = early.iter().find(|(_, hooks)| hooks.as_ref().is_some_and(|hooks| !hooks.is_empty())) {
            return Err(Refused::invalid(format!("hooks.{name}"), "needs a root that is mounted on the host"));
        }
    }
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let is_new = |path: Option<&std::path::PathBuf>| path.is_none_or(|path| path.as_os_str().is_empty());
    let mut own = namespaces.into_iter().flatten().filter(|namespace| namespace.typ() == LinuxNamespaceType::Mount);
    match own.next() {
        Some(namespace) if is_new(namespace.path().as_ref()) => Ok(()),
        Some(_) | None => Err(Refused::invalid("linux.namespaces", "a root that is not mounted on the host needs a new mount namespace")),
    }
}

/// Plans the mounts, in order: each on the one before.
pub(super) fn plan(wanted: &[RootMount<'_>]) -> Result<Vec<Mount>, Refused> {
    wanted.iter().enumerate().map(|(index, mount)| one(mount, &format!("root.mounts[{index}]"))).collect()
}

fn one(mount: &RootMount<'_>, field: &str) -> Result<Mount, Refused> {
    let options = options::sort(mount.options.iter().map(String::as_str));
    // Words of the program that mounts, not of the kernel.
    let is_foreign = |word: &str| matches!(word, "loop" | "uidmap" | "gidmap") || word.starts_with("X-") || word.starts_with("x-");
    let foreign = options.parameters.iter().map(|(word, _)| word.as_str()).find(|word| is_foreign(word));
    if let Some(word) = foreign {
        return Err(Refused::unsupported(format!("{field}.options {word}")));
    }
    // As `mkfs/ext4` and `format/overlay`: the source is made, or its words are.
    let is_plain = !mount.kind.is_empty() && !mount.kind.contains(['/', '\0']) && !mount.source.contains('\0');
    if !is_plain || options.remount || options.copy_up || options.idmap.is_some() || mount.options.iter().any(|word| word.contains('\0')) {
        return Err(Refused::unsupported(format!("{field} of type {}", mount.kind)));
    }
    let bound = mounts::bind_attributes(options.attributes);
    if mount.kind == "bind" || options.bind.is_some() {
        mounts::check_bind_words(&options, field)?;
        let path = super::make::absolute_path(std::path::Path::new(mount.source), &format!("{field}.source"))?;
        let source = Source::Bind { path, recursive: options.bind.unwrap_or(false), procfs: false };
        return Ok(made(source, bound.attributes, &options));
    }
    let attributes = Attributes { set: options.attributes.set, clear: 0 };
    let is_long = options.parameters.iter().any(|(_, value)| value.as_ref().is_some_and(|value| value.len() > mounts::MAX_PARAMETER_BYTES));
    let data = data(&options.parameters);
    if is_long && data.len() < PAGE_BYTES {
        let source = Source::Classic(Classic { kind: mount.kind.to_owned(), source: mount.source.to_owned(), data });
        return Ok(made(source, attributes, &options));
    }
    let mut parameters = vec![("source".to_owned(), Some(mount.source.to_owned()))];
    if options.attributes.set & RDONLY != 0 {
        parameters.push(("ro".to_owned(), None));
    }
    let words = options.parameters.clone();
    parameters.extend(if mount.kind == "overlay" { mounts::layers(words) } else { words });
    let kind = mount.kind.to_owned();
    let source = Source::New { kind, parameters, strict: false, keep_mode: false, late_readonly: false, copy_up: false };
    Ok(made(source, attributes, &options))
}

fn made(source: Source, attributes: Attributes, options: &options::Options) -> Mount {
    Mount { target: "/".to_owned(), source, attributes, recursive: options.recursive, propagation: Vec::new(), lenient: 0, ids: None }
}

/// Options as mount(2) takes them.
fn data(parameters: &[(String, Option<String>)]) -> String {
    let words: Vec<String> = parameters
        .iter()
        .map(|(key, value)| match value {
            Some(value) => format!("{key}={value}"),
            None => key.clone(),
        })
        .collect();
    words.join(",")
}

/// Of the options that mount(2) takes, with their end.
const PAGE_BYTES: usize = 4096;
