//! Session keyrings.
use serde_json::json;

use crate::stage::Stage;

crate::cases![a_container_has_a_session_keyring_of_its_own_unless_it_is_told_not_to, a_user_who_may_have_no_more_keys_is_told_so];

fn a_container_has_a_session_keyring_of_its_own_unless_it_is_told_not_to() {
    let stage = Stage::new();
    // Root sees those of other tests too, and the kernel removes a key some time after its last user.
    for (id, is_kept) in [("of-keyrings", false), ("of-no-keyrings", true)] {
        let show = format!("grep '_ses.{id}:' /proc/keys | cut -d' ' -f1; true");
        stage.no_new_keyring.set(is_kept);
        let mut config = stage.config(&["sleep", "1000"]);
        config["linux"]["maskedPaths"] = json!([]);
        let init = stage.create(id, &config).unwrap_or_else(|error| panic!("create: {error}"));
        stage.start(id);
        // Added processes join it, and make none.
        let keyrings = [stage.exec_shell(id, &show, |_| {}), stage.exec_shell(id, &show, |_| {})];
        assert_eq!(keyrings[0], keyrings[1]);
        assert_eq!(keyrings[0].lines().count(), usize::from(!is_kept), "{keyrings:?}");
        init.kill();
        init.end();
        stage.delete(id).expect("deleted");
    }
}

/// A user of the host who is root of the container. Not that of other tests.
const USER: u32 = 300_000;

fn a_user_who_may_have_no_more_keys_is_told_so() {
    let stage = Stage::new();
    if let Err(why) = stage.use_up_keys(USER) {
        return eprintln!("skipped: {why}");
    }
    let mut config = stage.config(&["echo", "runs"]);
    config["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "user" }));
    for field in ["uidMappings", "gidMappings"] {
        config["linux"][field] = json!([{ "containerID": 0, "hostID": USER, "size": 65_536 }]);
    }
    let error = stage.create("c", &config).err().expect("refused");
    assert!(error.contains("keyring") && error.contains("kernel.keys.maxkeys") && error.ends_with(": disk quota exceeded"), "{error}");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
    stage.no_new_keyring.set(true);
    assert_eq!(stage.run(&config), (0, "runs\n".to_owned()));
}
