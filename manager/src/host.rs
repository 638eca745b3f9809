//! Facts of this machine: groups and hosts by name, from its own files, as a static program cannot load what else would know them; identifiers
//! from the kernel.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use crate::error::{IoContext as _, Result as RequestResult};

/// The number of a group that is given by name or number.
pub(crate) fn group(text: &str) -> Result<u32, String> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let groups = read("/etc/group")?;
    let found = groups.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|parts| parts.first() == Some(&text));
    let number = found.and_then(|parts| parts.get(2)?.parse().ok());
    number.ok_or_else(|| format!("no group {text:?} in /etc/group"))
}

/// The address and port of `HOST:PORT`, with a host by address or name.
pub(crate) fn address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let (host, port) = text.rsplit_once(':').ok_or("expected 127.0.0.1:9120, localhost:9120 or unix:///run/a.sock")?;
    let port = port.parse().map_err(|_| format!("{port:?} is not a port"))?;
    let hosts = read("/etc/hosts")?;
    let lines = hosts.lines().map(|line| line.split('#').next().unwrap_or_default());
    let found =
        lines.map(|line| line.split_whitespace().collect::<Vec<_>>()).find(|fields| fields.iter().skip(1).any(|name| *name == host));
    let ip = found.and_then(|fields| fields.first()?.parse::<IpAddr>().ok());
    ip.map(|ip| SocketAddr::new(ip, port)).ok_or_else(|| format!("no host {host:?} in /etc/hosts"))
}

/// One of the identifiers that the kernel gives.
pub(crate) fn kernel_id(name: &str) -> RequestResult<String> {
    let path = Path::new("/proc/sys/kernel/random").join(name);
    Ok(std::fs::read_to_string(&path).on("read", &path)?.trim().to_owned())
}

fn read(path: &str) -> Result<String, String> {
    std::fs::read_to_string(Path::new(path)).map_err(|error| format!("cannot read {path}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_and_hosts_are_found_by_name_and_number() {
        assert_eq!((group("0"), group("4711"), group("root")), (Ok(0), Ok(4711), Ok(0)));
        assert!(group("no such group").is_err_and(|error| error.contains("/etc/group")));
        assert_eq!(address("[::1]:9120").map(|address| address.port()), Ok(9120));
        assert!(address("localhost:9120").is_ok_and(|address| address.ip().is_loopback()));
        for bad in ["localhost", "localhost:many", "no-such-host:1", "/a"] {
            assert!(address(bad).is_err(), "{bad}");
        }
    }
}
