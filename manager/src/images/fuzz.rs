//! Images made of any documents. `image` in `fuzz/`.

use std::collections::HashSet;
use std::future::Future as _;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use hyper::body::Bytes;

use super::document::{Configuration, Descriptor, Document, MOST_CHILDREN};
use super::plan::Plan;
use super::platform::{Platform, Platforms};
use super::tree::{Documents, Selection, Tree};
use crate::content::Digest;
use crate::error::Result;

/// Documents, one after the other with NUL between them. The last digit of a digest says which one it leads to: so they can lead to each other,
/// in circles too.
struct Parts<'a>(Vec<&'a [u8]>);

impl Documents for Parts<'_> {
    async fn read(&self, descriptor: &Descriptor) -> Result<Option<Bytes>> {
        let last = descriptor.digest.as_str().chars().last().and_then(|digit| digit.to_digit(16)).unwrap_or_default();
        Ok(self.0.get(last as usize).map(|bytes| Bytes::copy_from_slice(bytes)))
    }
}

/// Documents, followed from the first: each digest once, within the bounds.
pub fn image(bytes: &[u8]) {
    let parts = Parts(bytes.split(|byte| *byte == 0).take(16).collect());
    let root = Digest::of(&format!("sha256:{}", "0".repeat(64))).expect("a digest");
    for part in &parts.0 {
        let _ = Configuration::parse(part);
        if let Ok((document, media_type)) = Document::parse(part, "") {
            assert!(document.children().len() <= 1 + MOST_CHILDREN);
            assert_eq!(document.labels().len(), document.children().len(), "two labels of one name");
            // what it was found to be, it is
            assert_eq!(Document::parse(part, &media_type).ok(), Some((document, media_type)));
        }
        for config in &parts.0 {
            let _ = Plan::of_documents(&root, part, config);
        }
    }
    let amd64 = Platforms::of([Platform::new("linux", "amd64", "")]);
    for platforms in [Platforms::default(), amd64] {
        for (all_metadata, skips_missing, manifest_limit) in [(false, false, 0), (true, true, 1)] {
            let selection = Selection { platforms: platforms.clone(), all_metadata, manifest_limit, skips_missing };
            let mut met = HashSet::new();
            let descriptor = Descriptor::new("", root.clone(), 0);
            let found = |part: &Descriptor, _parents: &[String]| assert!(met.insert(part.digest.clone()), "{} twice", part.digest);
            let mut following = pin!(Tree::follow(&parts, &descriptor, &selection, found));
            // nothing of it waits
            let Poll::Ready(followed) = following.as_mut().poll(&mut Context::from_waker(Waker::noop())) else { panic!("it waits") };
            let Ok(tree) = followed else { continue };
            let digests: HashSet<&Digest> = tree.nodes.iter().map(|node| &node.descriptor.digest).collect();
            assert_eq!(digests.len(), tree.nodes.len(), "a digest twice");
            for manifest in &tree.manifests {
                assert!(digests.contains(&manifest.descriptor.digest));
                assert!(manifest.config.iter().chain(&manifest.layers).all(|leaf| digests.contains(&leaf.digest)), "a part is not known");
            }
        }
    }
}
