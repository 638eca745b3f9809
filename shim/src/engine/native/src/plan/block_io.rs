//! Plans limits of block devices: weights and rates.
use oci_spec::runtime::{LinuxBlockIo, LinuxThrottleDevice, LinuxWeightDevice};

use super::Write;
use super::limits_v1::Limit;
use crate::Refused;

const FIELD: &str = "linux.resources.blockIO";

/// The files of cgroup v1. The scheduler that is in use decides about the name of the weights: `blkio.weight` was CFQ's, which Linux 5.0 removed.
pub(super) fn v1(wanted: &LinuxBlockIo) -> Result<Vec<Limit>, Refused> {
    let mut limits = Vec::new();
    let mut add = |file: &str, value: String, reset: Option<String>, optional, unless: Option<&str>| {
        limits.push(("blkio", Write { file: file.to_owned(), value, optional, unless: unless.map(str::to_owned), reset }));
    };
    if let Some(weight) = weight(wanted.weight(), "weight")? {
        add("blkio.weight", weight.to_string(), None, true, None);
        add("blkio.bfq.weight", weight.to_string(), None, false, Some("blkio.weight"));
    }
    if let Some(weight) = weight(wanted.leaf_weight(), "leafWeight")? {
        add("blkio.leaf_weight", weight.to_string(), None, false, None);
    }
    for device in wanted.weight_device().iter().flatten() {
        let key = key(device.major(), device.minor(), "weightDevice")?;
        if let Some(weight) = weight(device.weight(), "weightDevice[].weight")? {
            let value = format!("{key} {weight}");
            add("blkio.weight_device", value.clone(), Some(format!("{key} 0")), true, None);
            add("blkio.bfq.weight_device", value, Some(format!("{key} default")), false, Some("blkio.weight_device"));
        }
        if let Some(weight) = weight(device.leaf_weight(), "weightDevice[].leafWeight")? {
            add("blkio.leaf_weight_device", format!("{key} {weight}"), Some(format!("{key} 0")), false, None);
        }
    }
    for (name, _, devices) in throttles(wanted) {
        for device in devices {
            let key = key(device.major(), device.minor(), "throttle devices")?;
            // 0 is no limit.
            add(&format!("blkio.throttle.{name}_device"), format!("{key} {}", device.rate()), Some(format!("{key} 0")), false, None);
        }
    }
    Ok(limits)
}

/// The files of cgroup v2. Weights are the scheduler's BFQ where it is loaded, else the kernel's cost model has its own scale.
pub(super) fn v2(wanted: &LinuxBlockIo) -> Result<Vec<Limit>, Refused> {
    let mut limits = Vec::new();
    let mut add = |file: &str, value: String, reset: Option<String>, optional, unless: Option<&str>| {
        limits.push(("io", Write { file: file.to_owned(), value, optional, unless: unless.map(str::to_owned), reset }));
    };
    let leaves = wanted.weight_device().iter().flatten().map(LinuxWeightDevice::leaf_weight).chain([wanted.leaf_weight()]);
    if leaves.flatten().any(|weight| weight != 0) {
        return Err(Refused::unsupported(format!("{FIELD}.leafWeight on cgroup v2")));
    }
    if let Some(weight) = weight(wanted.weight(), "weight")? {
        add("io.bfq.weight", weight.to_string(), None, true, None);
        add("io.weight", converted(weight).to_string(), None, false, Some("io.bfq.weight"));
    }
    for device in wanted.weight_device().iter().flatten() {
        let key = key(device.major(), device.minor(), "weightDevice")?;
        if let Some(weight) = weight(device.weight(), "weightDevice[].weight")? {
            // As runc does: without BFQ there is no weight for a device.
            add("io.bfq.weight", format!("{key} {weight}"), Some(format!("{key} default")), true, None);
        }
    }
    for (_, name, devices) in throttles(wanted) {
        for device in devices {
            let key = key(device.major(), device.minor(), "throttle devices")?;
            let rate = if device.rate() == 0 { "max".to_owned() } else { device.rate().to_string() };
            add("io.max", format!("{key} {name}={rate}"), Some(format!("{key} {name}=max")), false, None);
        }
    }
    Ok(limits)
}

/// The four kinds of rates: as files of v1 name them, and as `io.max` does.
fn throttles(wanted: &LinuxBlockIo) -> [(&'static str, &'static str, &[LinuxThrottleDevice]); 4] {
    [
        ("read_bps", "rbps", wanted.throttle_read_bps_device().as_deref().unwrap_or_default()),
        ("write_bps", "wbps", wanted.throttle_write_bps_device().as_deref().unwrap_or_default()),
        ("read_iops", "riops", wanted.throttle_read_iops_device().as_deref().unwrap_or_default()),
        ("write_iops", "wiops", wanted.throttle_write_iops_device().as_deref().unwrap_or_default()),
    ]
}

/// 0 asks for nothing: dockerd always sends one.
fn weight(weight: Option<u16>, field: &str) -> Result<Option<u16>, Refused> {
    match weight {
        None | Some(0) => Ok(None),
        Some(weight @ 1..=1000) => Ok(Some(weight)),
        Some(weight) => Err(Refused::invalid(format!("{FIELD}.{field}"), format!("{weight} is not between 1 and 1000"))),
    }
}

/// 10 to 1000 become 1 to 10000.
fn converted(weight: u16) -> u64 {
    1 + u64::from(weight).saturating_sub(10) * 9999 / 990
}

/// How files name a device.
fn key(major: i64, minor: i64, field: &str) -> Result<String, Refused> {
    if u32::try_from(major).is_ok() && u32::try_from(minor).is_ok() {
        return Ok(format!("{major}:{minor}"));
    }
    Err(Refused::invalid(format!("{FIELD}.{field}"), format!("{major}:{minor} is not the number of a device")))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn files(plan: fn(&LinuxBlockIo) -> Result<Vec<Limit>, Refused>, wanted: Value) -> Vec<String> {
        let wanted: LinuxBlockIo = serde_json::from_value(wanted).expect("limits");
        plan(&wanted).expect("accepted").into_iter().map(|(_, write)| format!("{} {}", write.file, write.value)).collect()
    }

    #[test]
    fn weights_go_to_the_scheduler_that_is_loaded() {
        let wanted = json!({ "weight": 1000, "leafWeight": 0, "weightDevice": [{ "major": 8, "minor": 0, "weight": 10 }] });
        let expected = ["blkio.weight 1000", "blkio.bfq.weight 1000", "blkio.weight_device 8:0 10", "blkio.bfq.weight_device 8:0 10"];
        assert_eq!(files(v1, wanted.clone()), expected);
        assert_eq!(files(v2, wanted), ["io.bfq.weight 1000", "io.weight 10000", "io.bfq.weight 8:0 10"]);
        for (weight, expected) in [(1, 1), (10, 1), (100, 910), (500, 4950), (1000, 10_000)] {
            assert_eq!(converted(weight), expected);
        }
    }

    #[test]
    fn rates_go_to_a_file_each_or_to_one() {
        let rate = |rate: u64| json!([{ "major": 8, "minor": 1, "rate": rate }]);
        let wanted = json!({
            "throttleReadBpsDevice": rate(1), "throttleWriteBpsDevice": rate(2), "throttleReadIOPSDevice": rate(3), "throttleWriteIOPSDevice": rate(0),
        });
        let of_v1 = ["read_bps_device 8:1 1", "write_bps_device 8:1 2", "read_iops_device 8:1 3", "write_iops_device 8:1 0"];
        assert_eq!(files(v1, wanted.clone()), of_v1.map(|file| format!("blkio.throttle.{file}")));
        assert_eq!(files(v2, wanted), ["io.max 8:1 rbps=1", "io.max 8:1 wbps=2", "io.max 8:1 riops=3", "io.max 8:1 wiops=max"]);
    }

    #[test]
    fn what_cannot_be_a_limit_is_refused() {
        for wanted in [json!({ "weight": 1001 }), json!({ "weightDevice": [{ "major": -1, "minor": 0, "weight": 10 }] })] {
            let wanted: LinuxBlockIo = serde_json::from_value(wanted).expect("limits");
            assert!(v1(&wanted).is_err() && v2(&wanted).is_err());
        }
        let leaf: LinuxBlockIo = serde_json::from_value(json!({ "leafWeight": 10 })).expect("limits");
        assert!(v1(&leaf).is_ok());
        assert!(v2(&leaf).expect_err("refused").to_string().contains("linux.resources.blockIO.leafWeight on cgroup v2"));
    }
}
