//! Plans the file system of the root, where the container's own mount namespace is to have it and the host is not.
use minicbor::{Decode, Encode};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::mounts::{self, MAX_PARAMETER_BYTES};
use super::options::{self, Options, RDONLY};
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

/// A file system that is mounted by mount(2): fsconfig(2) takes no value that is as long, and no value with a comma on kernels where the file
/// system still reads one text.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Classic {
    #[n(0)]
    pub kind: String,
    #[n(1)]
    pub source: String,
    #[n(2)]
    pub data: String,
    /// The folder that relative paths in `data` start from.
    #[n(3)]
    pub base: Option<String>,
}

/// Whether these mounts can be made in the container's mount namespace alone. If not, the caller makes them on the host, and names none.
///
/// Errors: why not. Hooks that run before the container has entered its root look for its files at the bundle; there must be a mount namespace
/// of its own; and the kernel alone must understand the mounts.
pub fn check_root_mounts(spec: &Spec, mounts: &[RootMount<'_>]) -> Result<(), Refused> {
    plan(spec, mounts).map(drop)
}

/// Plans the mounts, in order: each on the one before.
pub(super) fn plan(spec: &Spec, wanted: &[RootMount<'_>]) -> Result<Vec<Mount>, Refused> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    check(spec)?;
    let has_user_namespace = namespaces(spec).any(|kind| kind == LinuxNamespaceType::User);
    wanted.iter().enumerate().map(|(index, mount)| one(mount, has_user_namespace, &format!("root.mounts[{index}]"))).collect()
}

/// Refuses a configuration that needs the root on the host.
fn check(spec: &Spec) -> Result<(), Refused> {
    if let Some(hooks) = spec.hooks() {
        #[allow(deprecated, reason = "configurations still have them")]
        let early =
            [("prestart", hooks.prestart()), ("createRuntime", hooks.create_runtime()), ("createContainer", hooks.create_container())];
        if let Some((name, _)) = early.iter().find(|(_, hooks)| hooks.as_ref().is_some_and(|hooks| !hooks.is_empty())) {
            return Err(Refused::invalid(format!("hooks.{name}"), "needs a root that is mounted on the host"));
        }
    }
    if namespaces(spec).any(|kind| kind == LinuxNamespaceType::Mount) {
        return Ok(());
    }
    Err(Refused::invalid("linux.namespaces", "a root that is not mounted on the host needs a new mount namespace"))
}

/// Kinds of the new namespaces, and user namespaces to join.
fn namespaces(spec: &Spec) -> impl Iterator<Item = LinuxNamespaceType> {
    let all = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref()).into_iter().flatten();
    all.filter_map(|namespace| {
        let is_new = namespace.path().as_ref().is_none_or(|path| path.as_os_str().is_empty());
        (is_new || namespace.typ() == LinuxNamespaceType::User).then(|| namespace.typ())
    })
}

fn one(mount: &RootMount<'_>, has_user_namespace: bool, field: &str) -> Result<Mount, Refused> {
    let options = options::sort(mount.options.iter().map(String::as_str));
    // Words of the program that mounts, not of the kernel; and lists of words in one.
    let is_foreign =
        |word: &str| matches!(word, "loop" | "uidmap" | "gidmap") || word.starts_with("X-") || word.starts_with("x-") || word.contains(',');
    let foreign = options.parameters.iter().map(|(word, _)| word.as_str()).find(|word| is_foreign(word));
    if let Some(word) = foreign {
        return Err(Refused::unsupported(format!("{field}.options {word}")));
    }
    // The kernel locks attributes of the host's mounts in a user namespace; those of a mount that is made there could be changed by its root.
    let is_locked = options.attributes.set != 0 || options.attributes.clear & !RDONLY != 0 || !options.recursive.is_empty();
    if has_user_namespace && is_locked {
        return Err(Refused::unsupported(format!("{field}.options with attributes of a mount, in a user namespace")));
    }
    if !options.propagation.is_empty() {
        return Err(Refused::unsupported(format!("{field}.options with a propagation")));
    }
    // As `mkfs/ext4` and `format/overlay`: the source is made, or its words are. `fuse.NAME`: a program is to be started.
    let is_plain = !mount.kind.is_empty() && !mount.kind.contains(['/', '.', '\0']) && !mount.source.contains('\0');
    if !is_plain || options.remount || options.copy_up || options.idmap.is_some() || mount.options.iter().any(|word| word.contains('\0')) {
        return Err(Refused::unsupported(format!("{field} of type {}", mount.kind)));
    }
    if mount.kind == "bind" || options.bind.is_some() {
        mounts::check_bind_words(&options, field)?;
        let path = super::make::absolute_path(std::path::Path::new(mount.source), &format!("{field}.source"))?;
        let source = Source::Bind { path, recursive: options.bind.unwrap_or(false), procfs: false };
        // Those of the source stay, unless a word clears them.
        return Ok(made(source, options.attributes, &options));
    }
    let attributes = Attributes { set: options.attributes.set, clear: 0 };
    let source = file_system(mount, &options).ok_or_else(|| Refused::unsupported(format!("{field}.options of that length")))?;
    Ok(made(source, attributes, &options))
}

/// A new file system: by fsconfig(2), or by mount(2) where a value is not for that. `None` if it is for neither.
fn file_system(mount: &RootMount<'_>, options: &Options) -> Option<Source> {
    let (kind, source) = (mount.kind.to_owned(), mount.source.to_owned());
    let is_short = |value: &str| value.len() <= MAX_PARAMETER_BYTES && !value.contains([',', '\\', '"']);
    let mut others = options.parameters.iter().filter(|(_, value)| value.as_deref().is_some_and(|value| !is_short(value)));
    let Some((key, list)) = others.next() else { return Some(new(mount, options, options.parameters.clone())) };
    // They are flags of mount(2).
    if options.parameters.iter().any(|(word, value)| value.is_none() && mounts::is_flag(word)) {
        return None;
    }
    let whole = data(&options.parameters);
    if whole.len() < PAGE_BYTES {
        return Some(Source::Classic(Classic { kind, source, data: whole, base: None }));
    }
    // The list of an overlay's folders is what is long.
    let (Some(list), true, true) = (list, kind == "overlay", key == "lowerdir") else { return None };
    if let Some((base, list)) = relative_layers(list) {
        let replace = |(key, value): &(String, Option<String>)| match key.as_str() {
            "lowerdir" => (key.clone(), Some(list.clone())),
            _ => (key.clone(), value.clone()),
        };
        let short = data(&options.parameters.iter().map(replace).collect::<Vec<_>>());
        if short.len() < PAGE_BYTES {
            return Some(Source::Classic(Classic { kind, source, data: short, base: Some(base) }));
        }
    }
    others.next().is_none().then(|| new(mount, options, mounts::layers(options.parameters.clone())))
}

fn new(mount: &RootMount<'_>, options: &Options, words: Vec<(String, Option<String>)>) -> Source {
    let mut parameters = vec![("source".to_owned(), Some(mount.source.to_owned()))];
    if options.attributes.set & RDONLY != 0 {
        parameters.push(("ro".to_owned(), None));
    }
    parameters.extend(words);
    let kind = mount.kind.to_owned();
    Source::New { kind, parameters, strict: false, keep_mode: false, late_readonly: false, copy_up: false }
}

fn made(source: Source, attributes: Attributes, options: &Options) -> Mount {
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

/// Shortens an overlay's list of lower folders that is too long for mount(2): the folder that they are all in, and the list with names relative to
/// it. `None` where that does not apply.
#[must_use]
pub fn relative_layers(list: &str) -> Option<(String, String)> {
    let folders: Vec<&str> = list.split(':').collect();
    // `::` begins folders that hold data only, `\:` is a colon in a name.
    if folders.iter().any(|folder| !folder.starts_with('/') || folder.contains('\\')) {
        return None;
    }
    let (first, rest) = folders.split_first()?;
    let shared =
        rest.iter().fold(first.len(), |length, folder| first.bytes().zip(folder.bytes()).take(length).take_while(|(a, b)| a == b).count());
    // Back to a whole component: the snapshots 12 and 17 share a 1.
    let base = &first[..=first[..shared].rfind('/')?];
    let names: Vec<&str> = folders.iter().map(|folder| &folder[base.len()..]).collect();
    if base == "/" || names.iter().any(|name| name.is_empty()) {
        return None;
    }
    Some((base.to_owned(), names.join(":")))
}

/// Of the options that mount(2) takes, with their end.
const PAGE_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lower_folders_become_relative_to_the_one_they_share() {
        for (list, expected) in [
            ("/s/12/fs:/s/17/fs", Some(("/s/", "12/fs:17/fs"))),
            ("/s/1:/s/12", Some(("/s/", "1:12"))),
            ("/s/1/fs", Some(("/s/1/", "fs"))),
            ("/a/fs:/b/fs", None),
            ("/s:/s/1", None),
            ("/s/1:rel", None),
            ("/s/1::/s/2", None),
            ("/s/1\\:x:/s/2", None),
        ] {
            assert_eq!(relative_layers(list), expected.map(|(base, list)| (base.to_owned(), list.to_owned())), "{list}");
        }
    }
}
