//! Plans of processes: their profiles and labels.
use super::*;

#[test]
fn what_needs_an_inactive_security_module_is_refused() {
    let host = Host { has_apparmor: false, has_selinux: false, ..host() };
    for (place, words) in [
        ("/process/apparmorProfile", "process.apparmorProfile: unable to apply apparmor profile: AppArmor is not enabled"),
        ("/process/selinuxLabel", "process.selinuxLabel: selinux label is specified in config, but selinux is disabled"),
        ("/linux/mountLabel", "linux.mountLabel: selinux label is specified in config, but selinux is disabled"),
    ] {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        for other in ["/process/apparmorProfile", "/process/selinuxLabel", "/linux/mountLabel"] {
            // Empty is nothing.
            *config.pointer_mut(other).expect("a field") = if other == place { json!("a") } else { json!("") };
        }
        let error = planned_for(&config, &host).expect_err("refused").to_string();
        assert!(error.contains(words), "{error}");
        *config.pointer_mut(place).expect("a field") = json!("");
        let plan = planned_for(&config, &host).expect("accepted");
        assert_eq!((plan.process.apparmor_profile, plan.process.selinux_label, plan.mount_label), (None, None, None));
    }
}

/// A profile comes from the process alone; a label is the container's if the process has none.
#[test]
fn an_added_process_has_its_own_profile_and_perhaps_the_containers_label() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    let container = planned(&config).expect("accepted").container();
    let added = |change: Value| {
        let mut process = full_process();
        for (key, value) in change.as_object().expect("an object") {
            process[key] = value.clone();
        }
        exec(&spec::parse_process(process.to_string().as_bytes()).expect("parsed"), &container, &host()).expect("accepted").process
    };
    let none = added(json!({ "apparmorProfile": "", "selinuxLabel": "" }));
    assert_eq!((none.apparmor_profile, none.selinux_label), (None, container.selinux_label.clone()));
    let own = added(json!({ "apparmorProfile": "q", "selinuxLabel": "l" }));
    assert_eq!((own.apparmor_profile.as_deref(), own.selinux_label.as_deref()), (Some("q"), Some("l")));
}
