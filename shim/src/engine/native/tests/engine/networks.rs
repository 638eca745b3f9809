//! Network devices of the host in containers.
use std::process::Command;

use serde_json::json;

use crate::stage::Stage;

crate::cases![
    a_device_moves_with_its_addresses_and_is_up,
    a_missing_device_fails_the_creation,
    a_device_stays_where_the_network_is_the_hosts,
];

/// Two devices that are each other's ends, for the time of a test.
struct Pair(String, String);

impl Pair {
    /// `None` where this machine has no such devices or no `ip` to make them.
    fn new(name: &str) -> Option<Self> {
        let pair = Self(format!("{name}{}a", std::process::id() % 100_000), format!("{name}{}b", std::process::id() % 100_000));
        let is_made = ip(&["link", "add", &pair.0, "type", "veth", "peer", "name", &pair.1]);
        if !is_made {
            eprintln!("skipped: needs ip and devices of the type veth");
        }
        is_made.then_some(pair)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        ip(&["link", "del", &self.1]);
    }
}

fn ip(arguments: &[&str]) -> bool {
    Command::new("ip").args(arguments).output().is_ok_and(|output| output.status.success())
}

fn a_device_moves_with_its_addresses_and_is_up() {
    let Some(pair) = Pair::new("xn") else { return };
    for address in ["192.0.2.7/24", "2001:db8::7/64"] {
        assert!(ip(&["address", "add", address, "dev", &pair.0]));
    }
    let stage = Stage::new();
    let mut config = stage.config(&["sh", "-c", "ip address show net0; ip link | grep -c :"]);
    config["linux"]["netDevices"] = json!({ pair.0.as_str(): { "name": "net0" } });
    let (status, output) = stage.run(&config);
    assert_eq!(status, 0, "{output}");
    assert!(output.contains("inet 192.0.2.7/24") && output.contains("inet6 2001:db8::7/64"), "{output}");
    let flags = output.split(['<', '>']).nth(1).unwrap_or_default();
    assert!(flags.split(',').any(|flag| flag == "UP"), "{output}");
    assert!(!ip(&["link", "show", &pair.0]), "it is still the host's");
}

fn a_missing_device_fails_the_creation() {
    let Some(pair) = Pair::new("xm") else { return };
    let stage = Stage::new();
    let mut config = stage.config(&["true"]);
    config["linux"]["netDevices"] = json!({ "not-there": {} });
    let error = stage.create("c", &config).err().expect("refused");
    assert_eq!(error, "move network device not-there (linux.netDevices) into the container as not-there: no such device");
    // A name that is taken in the container: the host keeps the device.
    config["linux"]["netDevices"] = json!({ pair.0.as_str(): { "name": "lo" } });
    let error = stage.create("c", &config).err().expect("refused");
    assert!(error.contains(&pair.0) && error.ends_with("file exists"), "{error}");
    assert!(ip(&["link", "show", &pair.0]), "it is not the host's any more");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}

fn a_device_stays_where_the_network_is_the_hosts() {
    let Some(pair) = Pair::new("xh") else { return };
    let stage = Stage::new();
    let mut config = stage.config(&["true"]);
    config["linux"]["netDevices"] = json!({ pair.0.as_str(): { "name": "net0" } });
    for namespace in config["linux"]["namespaces"].as_array_mut().expect("an array") {
        if namespace["type"] == "network" {
            namespace["path"] = json!("/proc/self/ns/net");
        }
    }
    // A file system of the kernel's needs a network namespace of its own.
    config["mounts"].as_array_mut().expect("an array").retain(|mount| mount["type"] != "sysfs");
    let error = stage.create("c", &config).err().expect("refused");
    assert_eq!(error, "linux.netDevices: the network namespace is the runtime's");
    assert!(ip(&["link", "show", &pair.0]), "it was renamed");
}
