//! Names that imported images get: from the archive's annotations, and from what the client says about them, by containerd's rules.

use std::collections::HashMap;

use containerd_client::services::v1::Image;

use super::document::Descriptor;
use super::tree::Selection;
use crate::snapshots::Snapshotter;

use super::platform::Platform;

/// What the image store is asked to keep, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Of the image; of an import: of its index. Empty for none.
    pub(crate) name: String,
    pub(crate) labels: HashMap<String, String>,
    pub(crate) selection: Selection,
    pub(crate) references: Vec<NameRule>,
    pub(crate) unpacks: Vec<UnpackFor>,
}

/// For which platform to unpack, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UnpackFor {
    pub(crate) platform: Platform,
    pub(crate) snapshotter: Where,
}

/// In which snapshotter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Where {
    Own(Snapshotter),
    /// Of another process, by its name.
    Proxy(String),
}

/// A name, or how names are made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct NameRule {
    pub(crate) name: String,
    /// Tags of the archive are added to it, and its digests with `add_digest`.
    pub(crate) is_prefix: bool,
    /// Whole names in the archive count, whatever they begin with.
    pub(crate) allow_overwrite: bool,
    pub(crate) add_digest: bool,
    /// Digests are added only where there is no tag.
    pub(crate) skip_named_digest: bool,
}

impl Wanted {
    /// Names of what was asked for as a whole: a pulled image, or the index of an import.
    pub(super) fn whole(&self, target: &Descriptor) -> Vec<Image> {
        let own = Some(self.name.clone()).filter(|name| !name.is_empty());
        let more = self.references.iter().filter(|rule| !rule.is_prefix);
        let more = more.map(|rule| if rule.add_digest { format!("{}@{}", rule.name, target.digest) } else { rule.name.clone() });
        own.into_iter().chain(more).map(|name| self.image(name, target)).collect()
    }

    /// Names of one image of an archive.
    pub(super) fn imported(&self, image: &Descriptor) -> Vec<Image> {
        let mut names = Vec::new();
        for rule in self.references.iter().filter(|rule| rule.is_prefix) {
            let digested = format!("{}@{}", rule.name, image.digest);
            match rule.name_of(&image.annotations) {
                None if rule.add_digest => names.push(digested),
                None => {}
                Some(name) => {
                    names.push(name);
                    if rule.add_digest && !rule.skip_named_digest {
                        names.push(digested);
                    }
                }
            }
        }
        names.into_iter().map(|name| self.image(name, image)).collect()
    }

    /// Names of an image of an archive in which none has a name, if the client has not said how all are to be called.
    pub(super) fn by_digest(&self, image: &Descriptor) -> Vec<Image> {
        let rules = self.references.iter().filter(|rule| rule.is_prefix && rule.allow_overwrite);
        rules.map(|rule| self.image(format!("{}@{}", rule.name, image.digest), image)).collect()
    }

    fn image(&self, name: String, target: &Descriptor) -> Image {
        let mut target = target.to_wire();
        // records have bounds that documents do not have, and clients receive all of them in one message
        let mut annotations: Vec<_> = target.annotations.drain().collect();
        annotations.sort();
        let mut room = ALL_ANNOTATIONS_BYTES;
        annotations.retain(|(key, value)| {
            let bytes = key.len() + value.len();
            let fits = bytes <= MOST_ANNOTATION_BYTES.min(room);
            room -= if fits { bytes } else { 0 };
            fits
        });
        target.annotations.extend(annotations);
        Image { name, labels: self.labels.clone(), target: Some(target), ..Image::default() }
    }
}

impl NameRule {
    /// The name that annotations give.
    fn name_of(&self, annotations: &HashMap<String, String>) -> Option<String> {
        let text = |key: &str| annotations.get(key).filter(|text| !text.is_empty());
        if let Some(name) = text(IMAGE_NAME) {
            // a whole name is taken as it is, or not at all
            return Some(name.clone()).filter(|name| self.translate(name).as_ref() == Some(name));
        }
        text(REF_NAME).and_then(|name| self.translate(name))
    }

    fn translate(&self, name: &str) -> Option<String> {
        if self.name.is_empty() {
            return None;
        }
        if !name.contains(['/', ':', '@']) {
            return Some(format!("{}:{name}", self.name));
        }
        let begins = name.strip_prefix(&self.name).is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', ':', '@']));
        (self.allow_overwrite || begins).then(|| name.to_owned())
    }
}

/// A name of `docker save`, completed as Docker does.
pub(super) fn normalized(name: &str) -> String {
    let (domain, rest) = match name.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" || first.chars().any(char::is_uppercase) => (first, rest),
        _ => ("docker.io", name),
    };
    let domain = if domain == "index.docker.io" { "docker.io" } else { domain };
    let library = if domain == "docker.io" && !rest.contains('/') { "library/" } else { "" };
    let last = rest.rsplit('/').next().unwrap_or_default();
    let tag = if last.contains([':', '@']) { "" } else { ":latest" };
    format!("{domain}/{library}{rest}{tag}")
}

/// The reverse: as Docker shows it.
pub(super) fn familiar(name: &str) -> String {
    let name = name.strip_prefix("docker.io/").unwrap_or(name);
    name.strip_prefix("library/").filter(|rest| !rest.contains('/')).unwrap_or(name).to_owned()
}

/// What a name has behind its path: a tag, or the whole name without one.
pub(super) fn tag(name: &str) -> String {
    let path = name.split('@').next().unwrap_or_default();
    match path.rsplit_once(':') {
        Some((_, tag)) if !tag.contains('/') => tag.to_owned(),
        _ => name.split_once('@').map_or(name, |(_, digest)| digest).to_owned(),
    }
}

/// A whole name, as containerd and docker write it.
pub(super) const IMAGE_NAME: &str = "io.containerd.image.name";
/// A tag, or a whole name.
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Of key and value, in a record.
const MOST_ANNOTATION_BYTES: usize = 1024;
/// Of all of them in one record.
const ALL_ANNOTATIONS_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::Digest;

    #[test]
    fn annotations_and_rules_make_names_as_in_containerd() {
        let digest = Digest::of_bytes(b"x");
        let rule = |name: &str, flags: &str| NameRule {
            name: name.to_owned(),
            is_prefix: true,
            allow_overwrite: flags.contains('o'),
            add_digest: flags.contains('d'),
            skip_named_digest: flags.contains('s'),
        };
        let by_digest = format!("p@{digest}");
        for (image_name, ref_name, rule, expected) in [
            ("", "1", rule("p", ""), &["p:1"][..]),
            ("", "other/x:1", rule("p", ""), &[]),
            ("", "other/x:1", rule("p", "o"), &["other/x:1"]),
            ("", "p/x:1", rule("p", ""), &["p/x:1"]),
            ("", "pp/x:1", rule("p", ""), &[]),
            ("docker.io/library/a:1", "1", rule("p", "o"), &["docker.io/library/a:1"]),
            ("docker.io/library/a:1", "1", rule("p", ""), &[]),
            // no whole name
            ("a", "1", rule("p", "o"), &[]),
            ("", "", rule("p", "o"), &[]),
            ("", "", rule("p", "od"), &[&by_digest]),
            ("", "1", rule("p", "d"), &["p:1", &by_digest]),
            ("", "1", rule("p", "ds"), &["p:1"]),
            ("", "1", rule("", "o"), &[]),
        ] {
            let mut image = Descriptor::new("m", digest.clone(), 1);
            for (key, value) in [(IMAGE_NAME, image_name), (REF_NAME, ref_name)] {
                image.annotations.insert(key.to_owned(), value.to_owned());
            }
            let wanted = Wanted { references: vec![rule.clone()], ..Wanted::default() };
            let names: Vec<_> = wanted.imported(&image).into_iter().map(|image| image.name).collect();
            assert_eq!(names, expected, "{image_name:?} {ref_name:?} {rule:?}");
        }
    }

    #[test]
    fn an_index_has_the_names_that_are_no_prefixes() {
        let target = Descriptor::new("m", Digest::of_bytes(b"x"), 1);
        let references = vec![
            NameRule { name: "i".to_owned(), ..NameRule::default() },
            NameRule { name: "p".to_owned(), is_prefix: true, ..NameRule::default() },
            NameRule { name: "d".to_owned(), add_digest: true, ..NameRule::default() },
        ];
        let wanted = Wanted { references, ..Wanted::default() };
        let names: Vec<_> = wanted.whole(&target).into_iter().map(|image| image.name).collect();
        assert_eq!(names, ["i".to_owned(), format!("d@{}", target.digest)]);
    }

    #[test]
    fn a_record_has_few_annotations_of_a_document_and_its_names_among_them() {
        let mut image = Descriptor::new("m", Digest::of_bytes(b"x"), 1);
        image.annotations = (0..1000).map(|number| (format!("x{number:03}"), "v".repeat(500))).collect();
        image.annotations.insert("long".to_owned(), "v".repeat(1024));
        image.annotations.insert(IMAGE_NAME.to_owned(), "h/a:1".to_owned());
        let wanted = Wanted { name: "n".to_owned(), ..Wanted::default() };
        let target = wanted.whole(&image).remove(0).target.expect("a target");
        assert!(target.annotations.contains_key(IMAGE_NAME) && target.annotations.contains_key("x000"));
        assert_eq!(target.annotations.len(), 9);
    }

    #[test]
    fn names_of_docker_are_completed_and_shortened() {
        for (short, whole) in [
            ("busybox:1", "docker.io/library/busybox:1"),
            ("user/app:1", "docker.io/user/app:1"),
            ("localhost/app:1", "localhost/app:1"),
            ("h.example:5000/app:1", "h.example:5000/app:1"),
        ] {
            assert_eq!((normalized(short).as_str(), familiar(whole).as_str()), (whole, short));
        }
        assert_eq!(normalized("busybox"), "docker.io/library/busybox:latest");
        assert_eq!((tag("h:5000/a:1").as_str(), tag("h:5000/a").as_str(), tag("a@sha256:0").as_str()), ("1", "h:5000/a", "sha256:0"));
    }
}
