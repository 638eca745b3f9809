//! Files and headers from outside, changed at random. `make fuzz` does the same by coverage.

use std::path::Path;

use super::super::{challenge, hosts_file};

fn read(text: &str) {
    let lines = 1 + text.matches('\n').count();
    match hosts_file::parse(Path::new("/etc"), text) {
        Ok(file) => assert!(file.hosts.iter().all(|host| host.line <= lines)),
        Err(error) => assert!((1..=lines).contains(&error.line) && !error.why.is_empty(), "line {} of {lines}: {text}", error.line),
    }
    assert!(challenge::parse(text.split('\n')).len() <= 8);
}

#[test]
fn whatever_is_in_hosts_toml_and_in_challenges_reading_them_ends() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/registry");
    for entry in std::fs::read_dir(corpus).expect("a folder") {
        let bytes = std::fs::read(entry.expect("an entry").path()).expect("a file");
        read(&String::from_utf8_lossy(&bytes));
        // the same changes in every run
        let mut state = 7u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(state >> 33).expect("31 bits") % below
        };
        for _ in 0..2_000 {
            let mut changed = bytes.clone();
            for _ in 0..=random(4) {
                let at = random(changed.len());
                match random(4) {
                    0 => changed[at] = b"\"\\[]={},:. \n\t#'"[random(15)],
                    1 => changed.truncate(at.max(1)),
                    2 => drop(changed.remove(at)),
                    _ => changed.extend_from_slice(&bytes[random(bytes.len())..]),
                }
                if changed.is_empty() {
                    changed.push(b'x');
                }
            }
            read(&String::from_utf8_lossy(&changed));
        }
    }
}
