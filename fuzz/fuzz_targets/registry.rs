#![no_main]

//! What registries and their operators write: hosts.toml and `WWW-Authenticate`. Whatever the bytes are, reading them ends, within its bounds.

#[allow(dead_code, unreachable_pub)]
#[path = "../../manager/src/images/registry/challenge.rs"]
mod challenge;
#[allow(dead_code, unreachable_pub)]
#[path = "../../manager/src/duration.rs"]
mod duration;
#[allow(dead_code, unreachable_pub)]
#[path = "../../manager/src/images/registry/hosts_file.rs"]
mod hosts_file;

use std::path::Path;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match hosts_file::parse(Path::new("/etc"), text) {
        Ok(file) => assert!(file.hosts.iter().all(|host| host.line <= 1 + text.matches('\n').count())),
        Err(error) => assert!(error.line >= 1 && error.line <= 1 + text.matches('\n').count() && !error.why.is_empty()),
    }
    let challenges = challenge::parse(text.split('\n'));
    assert!(challenges.len() <= 8);
});
