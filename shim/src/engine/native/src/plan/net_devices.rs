//! Plans network devices of the host that become the container's.
use std::collections::HashMap;

use oci_spec::runtime::LinuxNetDevice;

use crate::Refused;

/// Names on the host and in the container, sorted.
pub(super) fn plan(wanted: Option<&HashMap<String, LinuxNetDevice>>, has_namespace: bool) -> Result<Vec<(String, String)>, Refused> {
    const FIELD: &str = "linux.netDevices";
    let mut planned: Vec<(String, String)> = Vec::new();
    for (host, device) in wanted.into_iter().flatten() {
        let container = device.name().as_deref().filter(|name| !name.is_empty()).unwrap_or(host);
        for name in [host.as_str(), container] {
            if !is_name(name) {
                return Err(Refused::invalid(format!("{FIELD}.{host}"), format!("{name:?} is not the name of a network device")));
            }
        }
        if planned.iter().any(|(_, other)| other == container) {
            return Err(Refused::invalid(format!("{FIELD}.{host}.name"), format!("two devices are called {container}")));
        }
        planned.push((host.clone(), container.to_owned()));
    }
    if !planned.is_empty() && !has_namespace {
        return Err(Refused::invalid(FIELD, "needs a network namespace"));
    }
    planned.sort();
    Ok(planned)
}

/// As the kernel's `dev_valid_name`, and without `%`, which asks the kernel for a number.
fn is_name(name: &str) -> bool {
    let is_bad = |character: char| character.is_whitespace() || character.is_control() || "/:%".contains(character);
    !name.is_empty() && name.len() < libc::IFNAMSIZ && name != "." && name != ".." && !name.contains(is_bad)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn devices_keep_their_names_or_get_others() {
        let plan = |wanted: Value, has| {
            let wanted: HashMap<String, LinuxNetDevice> = serde_json::from_value(wanted).expect("devices");
            super::plan(Some(&wanted), has)
        };
        let names = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            pairs.iter().map(|(host, container)| ((*host).to_owned(), (*container).to_owned())).collect()
        };
        let planned = plan(json!({ "eth2": { "name": "net0" }, "eth1": {}, "eth3": { "name": "" } }), true).expect("accepted");
        assert_eq!(planned, names(&[("eth1", "eth1"), ("eth2", "net0"), ("eth3", "eth3")]));
        assert_eq!(plan(json!({}), false).expect("accepted"), []);
        for (wanted, has, words) in [
            (json!({ "eth1": {} }), false, "linux.netDevices: needs a network namespace"),
            (json!({ "eth1": { "name": "x" }, "eth2": { "name": "x" } }), true, "two devices are called x"),
            (json!({ "eth1": { "name": "eth%d" } }), true, "linux.netDevices.eth1: \"eth%d\" is not"),
            (json!({ "../x": {} }), true, "is not the name"),
            (json!({ "sixteen-letters-": {} }), true, "is not the name"),
            (json!({ "..": {} }), true, "is not the name"),
        ] {
            let error = plan(wanted, has).expect_err("refused").to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
