use serde_json::{Value as Json, json};

use super::*;
use crate::plan::{self, Request};
use crate::{Host, spec};

fn planned(host: &Host, path: &str, change: impl FnOnce(&mut Json)) -> Result<plan::Create, Refused> {
    let mut config = json!({
        "ociVersion": "1.0.2", "root": { "path": "r" }, "process": { "cwd": "/", "args": ["a"], "user": {} },
        "linux": { "namespaces": [{ "type": "mount" }], "cgroupsPath": path },
    });
    change(&mut config);
    let request = Request { systemd_cgroup: true, ..Request::new("c1", std::path::Path::new("/b")) };
    plan::create(&spec::parse(config.to_string().as_bytes())?, &request, host)
}

fn unit(host: &Host, path: &str, change: impl FnOnce(&mut Json)) -> Unit {
    planned(host, path, change).expect("accepted").unit.expect("a unit")
}

fn with_resources(host: &Host, resources: Json) -> Result<plan::Create, Refused> {
    planned(host, "a.slice:p:c1", |config| config["linux"]["resources"] = resources)
}

fn limits(host: &Host, resources: Json) -> Vec<String> {
    words(&with_resources(host, resources).expect("accepted").unit.expect("a unit").limits)
}

fn words(properties: &[Property]) -> Vec<String> {
    properties
        .iter()
        .map(|one| {
            format!(
                "{} {} {}{}",
                one.name,
                one.value.signature(),
                one.value,
                if one.since > 0 { format!(" >{}", one.since) } else { String::new() }
            )
        })
        .collect()
}

fn annotated(key: &str, text: &str) -> Result<plan::Create, Refused> {
    planned(&Host::example_v2(), "a.slice:p:c1", |config| config["annotations"] = json!({ key: text }))
}

#[test]
fn a_slice_is_in_the_slices_that_its_name_begins_with() {
    for (path, name, folder) in [
        ("", "runc-c1.scope", "system.slice/runc-c1.scope"),
        (":p:c1", "p-c1.scope", "system.slice/p-c1.scope"),
        ("user.slice:p:c1", "p-c1.scope", "user.slice/p-c1.scope"),
        ("a-b-c.slice:cri:x_1", "cri-x_1.scope", "a.slice/a-b.slice/a-b-c.slice/cri-x_1.scope"),
        ("-.slice:p:c1", "p-c1.scope", "p-c1.scope"),
        ("a.slice::c1", "-c1.scope", "a.slice/-c1.scope"),
        ("a.slice:p:a-b.slice", "a-b.slice", "a.slice/a-b.slice"),
    ] {
        for host in [Host::example_v1(), Host::example_v2()] {
            let plan = planned(&host, path, |_| {}).expect("accepted");
            let unit = plan.unit.expect("a unit");
            assert_eq!((unit.name.as_str(), unit.control_group.as_str()), (name, format!("/{folder}").as_str()), "{path}");
            assert!(plan.cgroup.folders.iter().all(|one| one.path == folder), "{path}: {:?}", plan.cgroup);
        }
    }
}

#[test]
fn what_names_no_unit_is_refused() {
    let long = format!("a.slice:p:{}", "c".repeat(250));
    for path in [
        "/a/b",
        "a",
        "a.slice:p",
        "a.slice:p:c:d",
        "a:p:c",
        ".slice:p:c",
        "a/b.slice:p:c",
        "a--b.slice:p:c",
        "-a.slice:p:c",
        "a-.slice:p:c",
        "a.slice:p/q:c",
        "a.slice:p:../c",
        "a.slice:p:c d",
        "a.slice:p:-.slice",
        "a.slice:p:.slice",
        "a.slice:.:c",
        "a.slice:p:a--b.slice",
        "..slice:p:c",
        &long,
    ] {
        match planned(&Host::example_v2(), path, |_| {}) {
            Err(Refused::Invalid { field, .. }) => assert_eq!(field, "linux.cgroupsPath", "{path}"),
            other => panic!("{path}: {other:?}"),
        }
    }
}

#[test]
fn folders_are_where_systemd_has_its_own() {
    let mut host = Host::example_v1();
    for hierarchy in &mut host.hierarchies {
        (hierarchy.root, hierarchy.of_init) = ("/docker/x".to_owned(), "/docker/x/init.scope".to_owned());
    }
    let plan = planned(&host, "a.slice:p:c1", |_| {}).expect("accepted");
    assert!(plan.cgroup.folders.iter().all(|folder| folder.path == "a.slice/p-c1.scope"));
    assert_eq!(plan.unit.expect("a unit").control_group, "/docker/x/a.slice/p-c1.scope");
    // A first process that is not systemd's own scope: mounted from above it.
    for hierarchy in &mut host.hierarchies {
        (hierarchy.root, hierarchy.of_init) = ("/".to_owned(), "/docker/x".to_owned());
    }
    let plan = planned(&host, "a.slice:p:c1", |_| {}).expect("accepted");
    assert!(plan.cgroup.folders.iter().all(|folder| folder.path == "docker/x/a.slice/p-c1.scope"));
}

#[test]
fn a_scope_is_delegated_and_a_slice_is_wanted() {
    let scope = words(&unit(&Host::example_v2(), "a.slice:p:c1", |_| {}).properties);
    let expected = [
        "Description s \"container c1\"",
        "Slice s \"a.slice\"",
        "Delegate b true",
        "DefaultDependencies b false",
        "MemoryAccounting b true",
        "CPUAccounting b true",
        "IOAccounting b true",
        "TasksAccounting b true",
    ];
    assert_eq!(scope, expected);
    let slice = unit(&Host::example_v2(), "a.slice:p:a-b.slice", |_| {});
    assert!(slice.is_slice());
    let slice = words(&slice.properties);
    assert!(
        slice.contains(&"Wants as [\"a.slice\"]".to_owned())
            && !slice.iter().any(|word| word.starts_with("Slice") || word.starts_with("Delegate")),
        "{slice:?}"
    );
    assert!(words(&unit(&Host::example_v1(), "a.slice:p:c1", |_| {}).properties).contains(&"BlockIOAccounting b true".to_owned()));
}

#[test]
fn devices_are_systemds_to_write_on_v1_alone() {
    let devices = |host: &Host, rules: Json| {
        let plan = with_resources(host, json!({ "devices": rules })).expect("accepted");
        words(&plan.unit.expect("a unit").properties).into_iter().filter(|word| word.starts_with("Device")).collect::<Vec<_>>()
    };
    assert_eq!(devices(&Host::example_v2(), json!([{ "allow": false }])), Vec::<String>::new());
    assert_eq!(devices(&Host::example_v1(), json!([{ "allow": true }])), ["DevicePolicy s \"auto\"", "DeviceAllow a(ss) []"]);
    let some = devices(
        &Host::example_v1(),
        json!([
            { "allow": false },
            { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw" },
            { "allow": true, "type": "b", "major": 8, "access": "r" },
            { "allow": true, "type": "c", "minor": 3, "access": "r" },
        ]),
    );
    assert_eq!(some[0], "DevicePolicy s \"strict\"");
    for entry in [
        "(\"/dev/char/10:229\", \"rw\")",
        "(\"block-8\", \"r\")",
        "(\"char-*\", \"m\")",
        "(\"char-pts\", \"rwm\")",
        "(\"/dev/char/1:3\", \"rwm\")",
    ] {
        assert!(some[1].contains(entry), "{entry}: {}", some[1]);
    }
    // What has no words, and a list of what is forbidden: never more than was asked for.
    assert!(!some[1].contains(":3\", \"r\")"), "{}", some[1]);
    let forbidden =
        devices(&Host::example_v1(), json!([{ "allow": true }, { "allow": false, "type": "c", "major": 10, "minor": 1, "access": "rwm" }]));
    assert_eq!(forbidden[0], "DevicePolicy s \"strict\"");
    assert!(forbidden[1].contains("/dev/char/1:3") && !forbidden[1].contains("10:1\""), "{}", forbidden[1]);
}

#[test]
fn limits_are_properties_of_the_same_value() {
    let resources = json!({
        "memory": { "limit": 1_048_576, "reservation": 524_288, "swap": 2_097_152 },
        "cpu": { "shares": 2048, "quota": 50_000, "period": 100_000, "cpus": "0-3,9", "mems": "0" },
        "pids": { "limit": 7 },
        "blockIO": { "weight": 100 },
    });
    let of_v2 = [
        "CPUQuotaPeriodUSec t 100000 >242",
        "CPUQuotaPerSecUSec t 500000",
        "MemorySwapMax t 1048576",
        "MemoryMax t 1048576",
        "MemoryLow t 524288",
        "CPUWeight t 174",
        "AllowedCPUs ay [15, 2] >244",
        "AllowedMemoryNodes ay [1] >244",
        "TasksMax t 7",
        "IOWeight t 910",
    ];
    assert_eq!(limits(&Host::example_v2(), resources.clone()), of_v2);
    let mut of_v1 = limits(&Host::example_v1(), resources);
    of_v1.sort();
    let expected = [
        "AllowedCPUs ay [15, 2] >244",
        "AllowedMemoryNodes ay [1] >244",
        "BlockIOWeight t 100",
        "CPUQuotaPerSecUSec t 500000",
        "CPUQuotaPeriodUSec t 100000 >242",
        "CPUShares t 2048",
        "MemoryLimit t 1048576",
        "TasksMax t 7",
    ];
    assert_eq!(of_v1, expected);
    let max = u64::MAX;
    let endless = json!({ "memory": { "limit": -1 }, "cpu": { "quota": -1 }, "pids": { "limit": -1 } });
    for (host, memory) in [(Host::example_v1(), "MemoryLimit"), (Host::example_v2(), "MemoryMax")] {
        let found = limits(&host, endless.clone());
        for name in [memory, "CPUQuotaPerSecUSec", "TasksMax"] {
            assert!(found.contains(&format!("{name} t {max}")), "{name}: {found:?}");
        }
    }
    assert_eq!(limits(&Host::example_v2(), json!({})), Vec::<String>::new());
}

#[test]
fn files_that_a_configuration_names_are_properties_too() {
    let unified = json!({ "unified": {
        "memory.high": "4096", "memory.min": "1", "memory.max": "max", "cpu.weight": "50", "cpu.max": "20000 50000", "pids.max": "max", "hugetlb.2MB.max": "0", "memory.oom.group": "1",
    } });
    let mut found = limits(&Host::example_v2(), unified);
    found.sort();
    let max = u64::MAX;
    let expected = [
        "CPUQuotaPerSecUSec t 400000".to_owned(),
        "CPUQuotaPeriodUSec t 50000 >242".to_owned(),
        "CPUWeight t 50".to_owned(),
        "MemoryHigh t 4096".to_owned(),
        format!("MemoryMax t {max}"),
        "MemoryMin t 1".to_owned(),
        format!("TasksMax t {max}"),
    ];
    assert_eq!(found, expected);
    assert_eq!(limits(&Host::example_v2(), json!({ "cpu": { "idle": 1, "shares": 1024 } })), ["CPUWeight t 0 >252"]);
    for (file, value) in [("memory.high", "1G"), ("cpu.max", "a b"), ("cpuset.cpus", "0-99999"), ("cpuset.cpus", "3-1"), ("cpu.max", "1 0")]
    {
        let refused = with_resources(&Host::example_v2(), json!({ "unified": { file: value } })).expect_err(file).to_string();
        assert!(refused.contains(file), "{refused}");
    }
}

#[test]
fn a_quota_is_rounded_up_to_a_percent_in_property_and_file() {
    for (quota, period, each_second, rounded) in [
        (50_000, 100_000, 500_000, 50_000),
        (50_001, 100_000, 510_000, 51_000),
        (1000, 100_000, 10_000, 1000),
        (1001, 33_333, 40_000, 1333),
        (333, 1_000_000, 10_000, 10_000),
    ] {
        let cpu = json!({ "cpu": { "quota": quota, "period": period } });
        for (host, file, expected) in
            [(Host::example_v1(), "cpu.cfs_quota_us", rounded.to_string()), (Host::example_v2(), "cpu.max", format!("{rounded} {period}"))]
        {
            let mut plan = with_resources(&host, cpu.clone()).expect("accepted");
            let found = words(&plan.unit.as_ref().expect("a unit").limits);
            assert!(found.contains(&format!("CPUQuotaPerSecUSec t {each_second}")), "{quota} {period}: {found:?}");
            let mut writes = plan.cgroup.folders.iter().flat_map(|folder| &folder.limits);
            assert_eq!(writes.find(|write| write.file == file).expect("written").value, expected, "{quota} {period}");
            // Once more changes nothing.
            let before = plan.cgroup.clone();
            settle(&mut plan.cgroup, Bandwidth::default()).expect("accepted");
            assert_eq!(plan.cgroup, before);
        }
    }
    // Without the option nothing is rounded.
    let config = json!({
        "ociVersion": "1.0.2", "root": { "path": "r" }, "process": { "cwd": "/", "args": ["a"], "user": {} },
        "linux": { "namespaces": [{ "type": "mount" }], "resources": { "cpu": { "quota": 50_001, "period": 100_000 } } },
    });
    let spec = spec::parse(config.to_string().as_bytes()).expect("a configuration");
    let plan = plan::create(&spec, &Request::new("c1", std::path::Path::new("/b")), &Host::example_v2()).expect("accepted");
    assert!(plan.unit.is_none() && plan.cgroup.folders[0].limits.iter().any(|write| write.value == "50001 100000"));
}

#[test]
fn of_a_quota_and_its_period_the_half_that_is_not_changed_stays() {
    let now = Bandwidth { quota: Some(20_000), period: 50_000 };
    for (host, file) in [(Host::example_v1(), "cpu.cfs_quota_us"), (Host::example_v2(), "cpu.max")] {
        let container = with_resources(&host, json!({})).expect("accepted").container();
        let changed = |cpu: Json| {
            let resources = spec::parse_resources(json!({ "cpu": cpu }).to_string().as_bytes()).expect("resources");
            let mut changed = plan::update(&resources, &container).expect("accepted");
            let properties = words(&settle(&mut changed, now).expect("accepted"));
            let writes: Vec<_> = changed
                .folders
                .into_iter()
                .flat_map(|folder| folder.limits)
                .filter(|write| write.file == file)
                .map(|write| write.value)
                .collect();
            (properties, writes)
        };
        let (properties, writes) = changed(json!({ "quota": 10_000 }));
        assert_eq!(properties, ["CPUQuotaPerSecUSec t 200000"]);
        assert_eq!(writes, [if file == "cpu.max" { "10000 50000" } else { "10000" }]);
        let (properties, _) = changed(json!({ "period": 100_000 }));
        assert_eq!(properties, ["CPUQuotaPeriodUSec t 100000 >242", "CPUQuotaPerSecUSec t 200000"]);
    }
}

#[test]
fn annotations_are_properties() {
    let property = |key: &str, text: &str| {
        let plan = annotated(&format!("org.systemd.property.{key}"), text).expect("accepted");
        words(&plan.unit.expect("a unit").properties)
    };
    for (key, text, expected) in [
        ("CollectMode", "'inactive-or-failed'", "CollectMode s \"inactive-or-failed\""),
        ("TimeoutStopUSec", "uint64 123456789", "TimeoutStopUSec t 123456789"),
        ("TimeoutStopSec", "7", "TimeoutStopUSec t 7000000"),
        ("TimeoutStopSec", "1.5", "TimeoutStopUSec t 1500000"),
        ("After", "['a.service', 'b.service']", "After as [\"a.service\", \"b.service\"]"),
        ("SendSIGKILL", "false", "SendSIGKILL b false"),
        ("KillSignal", "int32 2", "KillSignal i 2"),
        // Not of a duration.
        ("ABSec", "1", "ABSec i 1"),
    ] {
        assert!(property(key, text).contains(&expected.to_owned()), "{key} {text}");
    }
    // The last word is the annotation's.
    let replaced = property("DefaultDependencies", "true");
    assert_eq!(replaced.iter().filter(|word| word.starts_with("DefaultDependencies")).collect::<Vec<_>>(), ["DefaultDependencies b true"]);
}

#[test]
fn annotations_that_are_no_properties_are_refused_by_name() {
    for (key, text) in [
        ("TimeoutStopUSec", "hello"),
        ("ab", "1"),
        ("A_b", "1"),
        ("A.b", "1"),
        ("PIDs", "[uint32 1]"),
        ("Slice", "'x.slice'"),
        ("Delegate", "false"),
        ("TimeoutStopSec", "'x'"),
        ("TimeoutStopSec", "-1"),
        ("TimeoutStopSec", "uint64 18446744073709551615"),
        ("TimeoutStopSec", "nan"),
        ("", "1"),
    ] {
        let key = format!("org.systemd.property.{key}");
        match annotated(&key, text) {
            Err(Refused::Invalid { field, .. }) => assert_eq!(field, format!("annotations.{key}")),
            other => panic!("{key} {text}: {other:?}"),
        }
    }
    let many = planned(&Host::example_v2(), "a.slice:p:c1", |config| {
        for index in 0..65_u8 {
            config["annotations"][format!("org.systemd.property.Aa{}{}", char::from(b'a' + index / 26), char::from(b'a' + index % 26))] =
                json!("1");
        }
    });
    assert!(many.expect_err("too many").to_string().contains("65 are more than 64"));
    assert!(annotated("other", "hello").is_ok());
}

/// There systemd's list is the only one.
#[test]
fn an_annotation_allows_no_device_on_v1() {
    for (key, text) in [("DevicePolicy", "'auto'"), ("DeviceAllow", "[('block-*', 'rwm')]")] {
        let key = format!("org.systemd.property.{key}");
        let plan = |host: &Host| planned(host, "a.slice:p:c1", |config| config["annotations"] = json!({ key.as_str(): text }));
        let refused = plan(&Host::example_v1()).expect_err("refused").to_string();
        assert!(refused.contains(&key) && refused.contains("the engine's to choose"), "{refused}");
        plan(&Host::example_v2()).expect("it forbids only");
    }
}

#[test]
fn a_description_can_be_replaced() {
    let unit = unit(&Host::example_v2(), "a.slice:p:c1", |_| {});
    assert_eq!(unit.description(), Some("container c1"));
    let other = unit.described("other");
    assert_eq!((other.description(), other.properties.len()), (Some("other"), unit.properties.len()));
}

#[test]
fn a_container_keeps_the_name_of_its_unit() {
    let plan = planned(&Host::example_v2(), "a.slice:p:c1", |_| {}).expect("accepted");
    let container = plan.container();
    assert_eq!(container.unit.as_deref(), Some("p-c1.scope"));
    let decoded: plan::Container = minicbor::decode(&minicbor::to_vec(&container).expect("encoded")).expect("decoded");
    assert_eq!(decoded, container);
    let performed: plan::Create = minicbor::decode(&minicbor::to_vec(&plan).expect("encoded")).expect("decoded");
    assert_eq!((performed.unit, performed.cgroup), (None, plan.cgroup));
}
