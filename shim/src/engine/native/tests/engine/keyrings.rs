//! Session keyrings.
use serde_json::{Value, json};

use crate::stage::Stage;

crate::cases![a_container_has_a_session_keyring_of_its_own_unless_it_is_told_not_to, a_user_who_may_have_no_more_keys_is_told_so];

/// The keyrings of sessions that a process has.
const SESSION: &str = "grep -o '_ses[^:]*' /proc/keys; true";

fn shows_keys(config: &mut Value) {
    config["linux"]["maskedPaths"] = json!([]);
}

fn a_container_has_a_session_keyring_of_its_own_unless_it_is_told_not_to() {
    let stage = Stage::new();
    for is_kept in [false, true] {
        stage.no_new_keyring.set(is_kept);
        let mut config = stage.config(&["sh", "-c", &format!("{SESSION}; exec sleep 1000")]);
        shows_keys(&mut config);
        let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
        stage.start("c");
        let expected = if is_kept { "" } else { "_ses.c\n" };
        // The same one, not one of the same name.
        let number = "cut -d' ' -f1 /proc/keys | sort; true";
        assert_eq!(
            stage.exec_shell("c", &format!("{SESSION}; {number}"), |_| {}),
            stage.exec_shell("c", &format!("{SESSION}; {number}"), |_| {})
        );
        assert_eq!(stage.exec_shell("c", SESSION, |_| {}).contains("_ses.c\n"), !is_kept);
        init.kill();
        assert_eq!(init.end().1.contains("_ses.c\n"), !is_kept, "{expected}");
        stage.delete("c").expect("deleted");
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
