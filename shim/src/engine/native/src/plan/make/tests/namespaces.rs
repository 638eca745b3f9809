//! Plans of namespaces: what needs one, and how the root is entered.
use super::*;

#[test]
fn the_roots_propagation_is_set_when_it_is_the_root() {
    let host = libc::MS_SLAVE | libc::MS_REC;
    for (word, of_host, of_root) in [
        ("", host, None),
        ("private", libc::MS_PRIVATE, None),
        ("shared", host, Some(libc::MS_SHARED)),
        ("rshared", host, Some(libc::MS_SHARED | libc::MS_REC)),
        ("unbindable", host, Some(libc::MS_UNBINDABLE)),
    ] {
        assert_eq!(propagation(Some(word)).expect("known"), (of_host, of_root));
    }
    assert!(propagation(Some("x")).is_err());
}

#[test]
fn without_a_mount_namespace_nothing_can_be_mounted() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    config["linux"]["namespaces"].as_array_mut().expect("an array").retain(|namespace| namespace["type"] != "mount");
    for (pointer, nothing, error) in [
        ("/linux/maskedPaths", json!([]), "linux.maskedPaths: needs a mount namespace"),
        ("/linux/readonlyPaths", json!(null), "linux.readonlyPaths: needs a mount namespace"),
        ("/mounts", json!([]), "the native engine does not implement mounts without a mount namespace"),
        ("/root/readonly", json!(false), "the native engine does not implement root.readonly without a mount namespace"),
        ("/linux/rootfsPropagation", json!(""), "the native engine does not implement linux.rootfsPropagation without a mount namespace"),
    ] {
        assert_eq!(planned(&config).expect_err("refused").to_string(), error);
        *config.pointer_mut(pointer).expect("present") = nothing;
    }
    let plan = planned(&config).expect("accepted");
    assert_eq!((plan.entry, plan.own_dev), (Entry::Chroot, false));
    assert_eq!(plan.container().chroot.as_deref(), Some("/bundle/r"));
}

#[test]
fn a_private_root_needs_pivot_root() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    let spec = |config: &Value| spec::parse(config.to_string().as_bytes()).expect("parsed");
    let request = Request { no_pivot_root: true, ..request() };
    let error = create(&spec(&config), &request, &host()).expect_err("refused").to_string();
    assert!(error.starts_with("linux.rootfsPropagation: rprivate is not safe"), "{error}");
    config["linux"]["rootfsPropagation"] = json!("rslave");
    assert_eq!(create(&spec(&config), &request, &host()).expect("accepted").entry, Entry::Move);
}

#[test]
fn ids_and_clocks_need_their_namespaces() {
    let user = json!({ "type": "user" });
    let joined = json!({ "type": "user", "path": "/proc/1/ns/user" });
    let map = |inside: u32, size: u32| json!([{ "containerID": inside, "hostID": 1000, "size": size }]);
    let none = Value::Null;
    for (namespace, uids, gids, refused) in [
        (&none, map(0, 9), map(0, 9), "linux.uidMappings: needs a user namespace"),
        (&user, none.clone(), none.clone(), "linux.uidMappings: missing for a new user namespace"),
        (&user, map(0, 9), none.clone(), "linux.gidMappings: missing beside uidMappings"),
        (&joined, none.clone(), map(0, 9), "linux.uidMappings: missing beside gidMappings"),
        (&user, map(1, 9), map(0, 9), "linux.uidMappings: id 0 is not mapped"),
        (&user, map(0, 9), map(1, 9), "linux.gidMappings: id 0 is not mapped"),
        (&user, map(0, 0), map(0, 9), "linux.uidMappings[0]: size 0"),
        (&user, map(0, u32::MAX), map(0, 9), "linux.uidMappings[0]: size"),
        (&user, map(0, 1), map(0, 9), "process.user.uid: 1 is not mapped"),
        (&joined, map(0, 9), map(0, 2), "process.user.gid: 2 is not mapped"),
        (&user, map(0, 9), map(0, 3), "process.user.additionalGids: 3 is not mapped"),
        (&joined, none.clone(), none.clone(), ""),
        (&joined, map(0, 9), map(0, 9), ""),
        (&user, map(0, 9), map(0, 9), ""),
    ] {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        config["linux"]["uidMappings"] = uids;
        config["linux"]["gidMappings"] = gids;
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("an array");
        namespaces.retain(|namespace| namespace["type"] != "user");
        if !namespace.is_null() {
            namespaces.push(namespace.clone());
        }
        match planned(&config) {
            Ok(plan) => {
                assert_eq!(refused, "");
                assert_eq!(plan.container().namespaces & Kind::User.flag(), Kind::User.flag());
            }
            Err(error) => assert!(!refused.is_empty() && error.to_string().contains(refused), "{error}"),
        }
    }
    for (time, offsets, refused) in [
        (json!({ "type": "time", "path": "/proc/1/ns/time" }), json!({ "monotonic": { "secs": 1 } }), "needs a new time namespace"),
        (json!({ "type": "cgroup" }), json!({ "monotonic": { "secs": 1 } }), "needs a new time namespace"),
        (json!({ "type": "time" }), json!({ "realtime": { "secs": 1 } }), "linux.timeOffsets.realtime: is not a clock"),
    ] {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        config["linux"]["timeOffsets"] = offsets;
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("an array");
        namespaces.retain(|namespace| namespace["type"] != "time");
        namespaces.push(time);
        let error = planned(&config).expect_err("refused").to_string();
        assert!(error.contains(refused), "{error}");
    }
}
