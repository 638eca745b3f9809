//! The fuzz target `engine`: whatever a configuration, a process or a change of resources says, nothing panics, and a plan survives its encoding.
use std::path::Path;

use crate::plan::{self, Bandwidth, Container, Create, Exec, Request};
use crate::{Host, spec};

/// Any bytes: a configuration, a process that is added, or a change of resources, on hosts with v1 and with v2.
pub fn config(bytes: &[u8]) {
    for host in [Host::example_v1(), Host::example_v2()] {
        for systemd_cgroup in [false, true] {
            let request = Request { systemd_cgroup, ..Request::new("c", Path::new("/b")) };
            if let Ok(spec) = spec::parse(bytes)
                && let Ok(mut planned) = plan::create(&spec, &request, &host)
            {
                assert_eq!(plan::create(&spec, &request, &host).ok().as_ref(), Some(&planned), "a plan is not the same each time");
                // It is not encoded.
                assert_eq!(planned.unit.take().is_some(), systemd_cgroup);
                assert_eq!(minicbor::decode::<Create>(&encoded(&planned)).ok(), Some(planned));
            }
        }
        let container = container(&host);
        if let Ok(process) = spec::parse_process(bytes)
            && let Ok(planned) = plan::exec(&process, &container, &host)
        {
            assert_eq!(minicbor::decode::<Exec>(&encoded(&planned)).ok(), Some(planned));
        }
        if let Ok(resources) = spec::parse_resources(bytes) {
            let _ = plan::update(&resources, &container).and_then(|mut changed| plan::settle(&mut changed, Bandwidth::default()));
        }
    }
}

fn encoded(plan: &impl minicbor::Encode<()>) -> Vec<u8> {
    minicbor::to_vec(plan).expect("writing to memory does not fail")
}

fn container(host: &Host) -> Container {
    let least = br#"{"ociVersion":"1.0.0","root":{"path":"r"},"process":{"cwd":"/","args":["a"],"user":{}},"linux":{"namespaces":[{"type":"mount"}]}}"#;
    let request = Request::new("c", Path::new("/b"));
    let spec = spec::parse(least).expect("a configuration");
    plan::create(&spec, &request, host).expect("a plan").container()
}

#[cfg(test)]
mod tests {
    use std::fs;

    /// The corpus of the target of `fuzz/`, whole and cut.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn no_bytes_of_the_corpus_make_a_planner_panic() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../../fuzz/corpus/engine");
        let mut count = 0;
        for entry in fs::read_dir(folder).expect("the corpus").flatten() {
            let bytes = fs::read(entry.path()).expect("a file");
            super::config(&bytes);
            let is_accepted = crate::spec::parse(&bytes).is_ok()
                || crate::spec::parse_process(&bytes).is_ok()
                || crate::spec::parse_resources(&bytes).is_ok();
            assert!(is_accepted, "{} is not a configuration any more", entry.path().display());
            (0..bytes.len()).step_by(97).for_each(|end| super::config(&bytes[..end]));
            count += 1;
        }
        assert!(count >= 7, "{count}");
    }
}
