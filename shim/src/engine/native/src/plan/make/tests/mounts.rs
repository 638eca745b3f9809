//! Plans of mounts: their words, and what a root is.
use super::*;

#[test]
fn only_files_that_may_be_covered_are_in_procfs() {
    let covered = |target: &str| {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        config["mounts"] = json!([{ "destination": target, "type": "bind", "source": "/x" }]);
        planned(&config).is_ok()
    };
    let allowed = [
        "cpuinfo",
        "diskstats",
        "meminfo",
        "stat",
        "swaps",
        "uptime",
        "loadavg",
        "slabinfo",
        "sys/kernel/ns_last_pid",
        "sys/crypto/fips_enabled",
    ];
    for name in allowed {
        assert!(covered(&format!("/proc/{name}")), "{name}");
        assert!(covered(&format!("proc/./x/../{name}/")), "{name}");
        assert!(!covered(&format!("/proc/{name}/x")) && !covered(&format!("/proc/{name}x")), "{name}");
    }
    for name in ["net/dev", "self", "1", "sys", "sys/kernel", "sys/kernel/core_pattern", "kcore", "self/attr/exec", "sysrq-trigger"] {
        assert!(!covered(&format!("/proc/{name}")), "{name}");
    }
    // A procfs, if it is one.
    assert!(covered("/proc"));
}

#[test]
fn a_long_list_of_layers_is_given_layer_by_layer() {
    let long = "x".repeat(200);
    let parameters = |options: Value| {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        config["linux"]["mountLabel"] = Value::Null;
        config["mounts"] = json!([{ "destination": "/x", "type": "overlay", "source": "overlay", "options": options }]);
        match planned(&config).expect("accepted").mounts.remove(0).source {
            Source::New { parameters, .. } => parameters.into_iter().filter_map(|(key, value)| Some((key, value?))).collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        }
    };
    let owned =
        |pairs: &[(&str, &str)]| -> Vec<(String, String)> { pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect() };
    assert_eq!(parameters(json!(["lowerdir=/a:/b"])), owned(&[("source", "overlay"), ("lowerdir", "/a:/b")]));
    let list = format!("lowerdir=/a\\:b:/{long}::/c:/{long}");
    assert_eq!(
        parameters(json!([list, "upperdir=/u", "workdir=/w"])),
        owned(&[
            ("source", "overlay"),
            ("lowerdir+", "/a:b"),
            ("lowerdir+", &format!("/{long}")),
            ("datadir+", "/c"),
            ("lowerdir+", &format!("/{long}")),
            ("upperdir", "/u"),
            ("workdir", "/w"),
        ])
    );
}

#[test]
fn a_remount_changes_the_mount_or_its_file_system_too() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    config["mounts"] = json!([
        { "destination": "/a", "type": "none", "options": ["bind", "remount", "ro"] },
        { "destination": "/b", "type": "tmpfs", "options": ["remount", "nosuid", "size=1m"] },
    ]);
    let mounts = planned(&config).expect("accepted").mounts;
    assert_eq!(mounts[0].source, Source::Existing { parameters: None });
    assert_eq!((mounts[0].attributes.set, mounts[0].attributes.clear), (0x1, 0x20_000e));
    let parameters = vec![("rw".to_owned(), None), ("size".to_owned(), Some("1m".to_owned()))];
    assert_eq!(mounts[1].source, Source::Existing { parameters: Some(parameters) });
}

#[test]
fn a_root_is_mounted_in_the_container_unless_the_host_needs_it() {
    use crate::plan::{RootMount, check_root_mounts};
    let words = |words: &[&str]| -> Vec<String> { words.iter().map(|word| (*word).to_owned()).collect() };
    let overlay = words(&["lowerdir=/a:/b", "upperdir=/u", "workdir=/w", "index=off", "volatile"]);
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    let parsed = |config: &Value| spec::parse(config.to_string().as_bytes()).expect("parsed");
    let refusal =
        |config: &Value, mounts: &[RootMount<'_>]| check_root_mounts(&parsed(config), mounts).err().map(|error| error.to_string());
    let mounts = [RootMount { kind: "overlay", source: "overlay", options: &overlay }];
    // Hooks.
    for name in ["prestart", "createRuntime", "createContainer"] {
        let mut one = config.clone();
        one["hooks"] = json!({ name: [{ "path": "/h" }] });
        assert_eq!(refusal(&one, &mounts), Some(format!("hooks.{name}: needs a root that is mounted on the host")));
    }
    config["hooks"] =
        json!({ "prestart": [], "poststart": [{ "path": "/h" }], "startContainer": [{ "path": "/h" }], "poststop": [{ "path": "/h" }] });
    assert_eq!(refusal(&config, &mounts), None);
    let request = Request { root_mounts: &mounts, ..request() };
    let plan = create(&parsed(&config), &request, &host()).expect("accepted");
    assert_eq!(plan.root_mounts.len(), 1);
    let bytes = minicbor::to_vec(&plan).expect("encoded");
    assert_eq!(minicbor::decode::<Create>(&bytes).expect("decoded"), plan);
    // Without a mount namespace of its own the mounts would be elsewhere.
    let mut joined = config.clone();
    joined["linux"]["namespaces"][0]["path"] = json!("/proc/1/ns/mnt");
    assert!(refusal(&joined, &mounts).is_some());
    assert!(create(&parsed(&joined), &request, &host()).is_err());
    assert_eq!(refusal(&joined, &[]), None);
}

#[test]
fn only_mounts_that_the_kernel_alone_understands_are_made_in_the_container() {
    use crate::plan::{RootMount, check_root_mounts};
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    config["hooks"] = Value::Null;
    config["linux"]["namespaces"] = json!([{ "type": "mount" }]);
    let is_taken = |config: &Value, kind: &str, source: &str, options: &[&str]| {
        let options: Vec<String> = options.iter().map(|word| (*word).to_owned()).collect();
        let spec = spec::parse(config.to_string().as_bytes()).expect("parsed");
        check_root_mounts(&spec, &[RootMount { kind, source, options: &options }]).is_ok()
    };
    let long = format!("upperdir=/{}", "x".repeat(4096));
    for (kind, source, options) in [
        ("overlay", "overlay", &["lowerdir=/a", "uidmap=0:1:2"][..]),
        ("overlay", "overlay", &["lowerdir=/a", &long]),
        ("overlay", "overlay", &["lowerdir=/a,b", "sync"]),
        ("overlay", "overlay", &["lowerdir=/a", "rslave"]),
        ("overlay", "overlay", &["lowerdir=/a", "nodev,noexec"]),
        ("ext4", "/image", &["loop"]),
        ("ext4", "/image", &["X-containerd.mkfs.size=1"]),
        ("format/overlay", "overlay", &["lowerdir={{ mount 0 }}"]),
        ("fuse.program", "x", &[]),
        ("", "x", &[]),
        ("bind", "relative", &["rbind"]),
        ("bind", "/x", &["rbind", "size=1"]),
        ("none", "/x", &["remount", "bind"]),
    ] {
        assert!(!is_taken(&config, kind, source, options), "{kind} {options:?}");
    }
    // Attributes that its root could change.
    let mut mapped = config.clone();
    mapped["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({ "type": "user" }));
    for (options, is_taken_mapped) in [
        (&["rbind", "rw"][..], true),
        (&["rbind"], true),
        (&["rbind", "ro"], false),
        (&["rbind", "nosuid"], false),
        (&["rbind", "dev"], false),
    ] {
        assert!(is_taken(&config, "bind", "/x", options));
        assert_eq!(is_taken(&mapped, "bind", "/x", options), is_taken_mapped, "{options:?}");
    }
    mapped["linux"]["namespaces"][1]["path"] = json!("/proc/1/ns/user");
    assert!(!is_taken(&mapped, "bind", "/x", &["rbind", "ro"]));
}

#[test]
fn how_a_root_is_mounted_depends_on_the_values_of_its_options() {
    use crate::plan::{Classic, RootMount};
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    config["hooks"] = Value::Null;
    config["linux"]["namespaces"] = json!([{ "type": "mount" }]);
    let spec = spec::parse(config.to_string().as_bytes()).expect("parsed");
    let source = |options: &[&str]| {
        let options: Vec<String> = options.iter().map(|word| (*word).to_owned()).collect();
        crate::plan::root::plan(&spec, &[RootMount { kind: "overlay", source: "o", options: &options }]).expect("planned").remove(0).source
    };
    let classic = |data: &str, base: Option<&str>| {
        Source::Classic(Classic { kind: "overlay".into(), source: "o".into(), data: data.into(), base: base.map(str::to_owned) })
    };
    assert!(matches!(source(&["lowerdir=/a:/b", "ro"]), Source::New { parameters, .. } if parameters[2].0 == "lowerdir"));
    let long = format!("lowerdir=/a:/{}", "x".repeat(300));
    assert_eq!(source(&[&long, "ro", "volatile"]), classic(&format!("{long},volatile"), None));
    // mount(2) reads them as fstab has them.
    for word in ["context=\"a:b:c1,c2\"", "upperdir=/a\\,b", "upperdir=/a\\:b"] {
        assert_eq!(source(&["lowerdir=/a", word]), classic(&format!("lowerdir=/a,{word}"), None));
    }
    // Relative to a folder that they share, or else folder by folder.
    let layers = |base: &str, name: &str| (0..60).map(|number| format!("{base}{number}{name}")).collect::<Vec<_>>().join(":");
    let base = format!("/{}/", "y".repeat(80));
    let lower = format!("lowerdir={}", layers(&base, "/fs"));
    assert_eq!(source(&[&lower, "index=off"]), classic(&format!("lowerdir={},index=off", layers("", "/fs")), Some(&base)));
    let lower = format!("lowerdir={}", layers("/", &"z".repeat(80)));
    assert!(matches!(source(&[&lower]), Source::New { parameters, .. } if parameters[1].0 == "lowerdir+" && parameters.len() == 61));
}

#[test]
fn owners_of_a_bind_can_be_mapped() {
    let map = json!([{ "containerID": 1, "hostID": 2, "size": 3 }]);
    let range = || vec![crate::plan::IdRange { inside: 1, outside: 2, count: 3 }];
    let given = crate::plan::Mappings { uids: range(), gids: range() };
    let mapped = |recursive: bool, mappings: &crate::plan::Mappings| Some(crate::plan::MappedIds { recursive, mappings: mappings.clone() });
    let none = crate::plan::Mappings::default();
    for (options, map, expected) in [
        (json!(["bind"]), &Value::Null, None),
        (json!(["bind", "idmap"]), &Value::Null, mapped(false, &none)),
        (json!(["rbind", "ridmap"]), &Value::Null, mapped(true, &none)),
        (json!(["rbind"]), &map, mapped(false, &given)),
        (json!(["rbind", "idmap", "ridmap"]), &map, mapped(true, &given)),
    ] {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        config["mounts"] = json!([{ "destination": "/x", "source": "/x", "options": options, "uidMappings": map, "gidMappings": map }]);
        assert_eq!(planned(&config).expect("accepted").mounts[0].ids, expected);
        // Without a user namespace there are no other mappings.
        config["linux"]["namespaces"].as_array_mut().expect("an array").retain(|namespace| namespace["type"] != "user");
        config["linux"]["uidMappings"] = Value::Null;
        config["linux"]["gidMappings"] = Value::Null;
        match planned(&config) {
            Ok(plan) => assert_eq!(plan.mounts[0].ids, expected),
            Err(error) => assert!(map.is_null() && error.to_string().starts_with("mounts[0].uidMappings: missing"), "{error}"),
        }
    }
}

#[test]
fn binds_keep_their_sources_attributes_unless_some_are_given() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    config["mounts"] = json!([
        { "destination": "/plain", "source": "/x", "options": ["rbind", "rprivate"] },
        { "destination": "/ro", "source": "/x", "options": ["bind", "ro"] },
        { "destination": "/times", "source": "/x", "options": ["bind", "noatime"] },
        { "destination": "relative/../to", "type": "none", "source": "y", "options": ["bind", "rw"] },
    ]);
    let plan = planned(&config).expect("accepted");
    assert!(plan.mounts[0].attributes.is_empty());
    // As a remount does: what is not given is cleared, but for access times.
    assert_eq!((plan.mounts[1].attributes.set, plan.mounts[1].attributes.clear), (0x1, 0x20_000e));
    assert_eq!((plan.mounts[2].attributes.set, plan.mounts[2].attributes.clear), (0x10, 0x20_00ff & !0x10 & !0x80 | 0x70 | 0x80));
    assert_eq!(plan.mounts[3].target, "/to");
    assert_eq!(plan.mounts[3].source, Source::Bind { path: "/bundle/y".to_owned(), recursive: false, procfs: false });
}

/// What `mountLabel` is for, and what has labels of its own.
#[test]
fn new_file_systems_are_labelled() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    let new = |kind: &str| json!({ "destination": format!("/{kind}"), "type": kind, "source": kind });
    let kinds = ["proc", "sysfs", "mqueue", "tmpfs", "devpts"];
    config["mounts"] = json!(kinds.map(new));
    let bind = json!({ "destination": "/b", "type": "bind", "source": "/b", "options": ["bind"] });
    config["mounts"].as_array_mut().expect("an array").extend([bind, new("cgroup")]);
    let plan = planned(&config).expect("accepted");
    let label = config["linux"]["mountLabel"].as_str();
    let mut labelled = Vec::new();
    for mount in &plan.mounts {
        if let Source::New { parameters, .. } = &mount.source
            && parameters.iter().any(|(key, value)| key == "context" && value.as_deref() == label)
        {
            labelled.push(mount.target.as_str());
        }
    }
    assert_eq!(labelled, ["/tmpfs", "/devpts", "/cgroup"]);
    assert_eq!(plan.mount_label.as_deref(), label);
}
