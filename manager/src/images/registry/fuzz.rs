//! What registries and their operators write. `registry` and `hosts` in `fuzz/`.

use std::path::PathBuf;
use std::sync::OnceLock;

use super::error::RegistryError;
use super::reference::Reference;
use super::url::Url;
use super::{challenge, document, hosts, net, text};

/// Challenges, references, locations, times, types of documents and answers of name servers.
pub fn registry(bytes: &[u8]) {
    net::fuzz(bytes);
    let _ = document::media_type(None, bytes);
    let Ok(written) = std::str::from_utf8(bytes) else { return };
    assert!(challenge::parse(written.split('\n')).len() <= 8);
    let base = Url::parse("https://r.example:5000/v2/a/blobs/uploads/1?state=2").expect("a URL");
    for line in written.lines().take(100) {
        let _ = text::retry_after(line, std::time::SystemTime::UNIX_EPOCH);
        let _ = document::media_type(Some(line), b"{}");
        if let Ok(reference) = Reference::parse(line) {
            assert_eq!(Reference::parse(&reference.to_string()).ok().as_ref(), Some(&reference), "{line:?}");
            // a path that leads nowhere else
            assert!(!reference.repository.split('/').any(|part| matches!(part, "" | "." | "..")), "{line:?}");
        }
        for url in [Url::parse(line), base.join(line)].into_iter().flatten() {
            // the host that is shown and checked is the one that is connected to
            let shown = format!("{}://{}{}", url.origin.scheme.name(), url.origin.authority(), url.target());
            assert_eq!(Url::parse(&shown).as_ref(), Ok(&url), "{line:?}");
        }
    }
}

/// A hosts.toml: hosts in their order, or the line that is wrong.
pub fn hosts(bytes: &[u8]) {
    static FOLDER: OnceLock<scratch::Folder> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = scratch::Folder::new("hosts");
        std::fs::create_dir(folder.join("r.example")).expect("a folder");
        folder
    });
    std::fs::write(folder.join("r.example/hosts.toml"), bytes).expect("written");
    let lines = 1 + bytes.iter().filter(|byte| **byte == b'\n').count();
    match hosts::blocking_load(&[PathBuf::from(&**folder)], "r.example", None) {
        Ok(found) => {
            assert!(!found.is_empty());
            assert!(found.iter().all(|host| !host.origin.host.is_empty() && (host.prefix.is_empty() || host.prefix.starts_with('/'))));
        }
        Err(RegistryError::Config { line, why, .. }) => {
            assert!(!why.is_empty() && line.is_none_or(|line| (1..=lines).contains(&line)), "line {line:?} of {lines}: {why}");
        }
        Err(error) => panic!("{error}"),
    }
}
