//! Plans of cgroups and their limits.
use super::*;

#[test]
fn limits_go_to_the_folders_of_their_controllers() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    let plan = planned(&config).expect("accepted");
    let folder = |name: &str| plan.cgroup.folders.iter().find(|folder| folder.mount.ends_with(name)).expect("a folder");
    assert_eq!(folder("memory").absolute(), Path::new("/sys/fs/cgroup/memory/a/b"));
    assert_eq!(folder("unified").hierarchy, Hierarchy::Unified);
    assert_eq!(folder("cpuset").hierarchy, Hierarchy::Cpuset);
    assert_eq!(folder("cpuset").limits.len(), 2);
    assert_eq!(folder("memory").limits[0].value, "4096");
    assert_eq!(folder("systemd").limits, []);
    assert!(plan.container().cgroup.folders.iter().all(|folder| folder.limits.is_empty()));
}

#[test]
fn a_limit_without_its_controller_is_refused() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    let spec = spec::parse(config.to_string().as_bytes()).expect("parsed");
    let mut host = host();
    host.hierarchies.retain(|hierarchy| hierarchy.controllers != ["pids"]);
    let request = request();
    let error = create(&spec, &request, &host).expect_err("refused");
    assert!(error.to_string().contains("pids.max needs the cgroup controller pids"), "{error}");
}

#[test]
fn a_cgroup_that_can_be_divided_is_its_users() {
    let unified =
        MountedHierarchy { mount: "/sys/fs/cgroup".to_owned(), root: "/".to_owned(), own: "/d".to_owned(), ..MountedHierarchy::default() };
    let host = Host { hierarchies: vec![unified], ..host() };
    for (option, with_namespace, owner) in [("rw", true, Some(1001)), ("ro", true, None), ("rw", false, None)] {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        config["linux"]["resources"] = Value::Null;
        config["mounts"] = json!([{ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": [option] }]);
        if with_namespace {
            config["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "cgroup" }));
        }
        let spec = spec::parse(config.to_string().as_bytes()).expect("parsed");
        let request = request();
        let plan = create(&spec, &request, &host).expect("accepted");
        assert_eq!(plan.cgroup.folders[0].owner, owner);
    }
}

#[test]
fn cgroup_v2_has_one_folder_with_its_own_files() {
    let host = super::clients::host_v2();
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    config["linux"]["cgroupsPath"] = Value::Null;
    config["linux"]["resources"]["memory"] = json!({ "limit": 4096, "reservation": 2048, "swap": 8192 });
    config["linux"]["resources"]["cpu"] = json!({ "shares": 1024, "quota": 50_000, "cpus": "0" });
    config["linux"]["resources"]["network"] = Value::Null;
    config["linux"]["resources"]["blockIO"] = json!({ "weight": 10, "throttleReadBpsDevice": full_rate() });
    config["linux"]["resources"]["unified"] = json!({ "memory.high": "2", "cpu.uclamp.min": "1\n3" });
    let made = |config: &Value| {
        let spec = spec::parse(config.to_string().as_bytes()).expect("parsed");
        create(&spec, &request(), &host)
    };
    let plan = made(&config).expect("accepted");
    let [folder] = &plan.cgroup.folders[..] else { panic!("{:?}", plan.cgroup) };
    // Beside the daemon's: its own has processes.
    assert_eq!(folder.absolute(), Path::new("/sys/fs/cgroup/system.slice/id"));
    assert_eq!(folder.controllers, ["cpu", "cpuset", "hugetlb", "io", "memory", "pids", "rdma"]);
    assert!(folder.devices.is_some());
    let files: Vec<(&str, &str)> = folder.limits.iter().map(|write| (write.file.as_str(), write.value.as_str())).collect();
    let expected = [
        ("memory.swap.max", "4096"),
        ("memory.max", "4096"),
        ("memory.low", "2048"),
        ("cpu.weight", "100"),
        ("cpu.max", "50000 keep"),
        ("cpuset.cpus", "0"),
        ("pids.max", "7"),
        ("hugetlb.2MB.max", "7"),
        ("hugetlb.2MB.rsvd.max", "7"),
        ("io.bfq.weight", "10"),
        ("io.weight", "1"),
        ("io.max", "7:7 rbps=7"),
        ("rdma.max", "mlx hca_handle=7 hca_object=7"),
        ("cpu.uclamp.min", "1"),
        ("cpu.uclamp.min", "3"),
        ("memory.high", "2"),
    ];
    assert_eq!(files, expected);
    // As with runc.
    config["linux"]["resources"]["memory"]["swappiness"] = json!(1);
    config["linux"]["resources"]["memory"]["disableOOMKiller"] = json!(true);
    assert_eq!(made(&config).expect("accepted"), plan);
    for (place, value, field) in [
        ("cpu", json!({ "realtimeRuntime": 1 }), "linux.resources.cpu.realtimeRuntime"),
        ("network", json!({ "classID": 1 }), "linux.resources.network"),
        ("network", json!({ "priorities": [{ "name": "lo", "priority": 0 }] }), "linux.resources.network"),
        ("blockIO", json!({ "leafWeight": 10 }), "linux.resources.blockIO.leafWeight"),
    ] {
        let mut config = config.clone();
        config["linux"]["resources"][place] = value;
        let error = made(&config).expect_err("refused").to_string();
        assert!(error.contains(field) && error.contains("on cgroup v2"), "{error}");
    }
}

#[test]
fn names_of_files_cannot_lead_elsewhere() {
    for (field, value) in [
        ("hugepageLimits", json!([{ "pageSize": "../x", "limit": 1 }])),
        ("hugepageLimits", json!([{ "pageSize": "MB", "limit": 1 }])),
        ("unified", json!({ "memory.high": "1" })),
        ("rdma", json!({ "a hca_handle=max\n": { "hcaHandles": 1 } })),
        ("network", json!({ "priorities": [{ "name": "lo 1\n", "priority": 0 }] })),
    ] {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        config["linux"]["resources"][field] = value;
        assert!(planned(&config).expect_err("refused").to_string().contains(&format!("linux.resources.{field}")));
    }
}
