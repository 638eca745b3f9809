//! Images of criu's that are not what the configuration describes. Skipped where there is no criu that works.
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::bundle;
use crate::checkpoints::{COUNT, counting, restored, saved, settings};
use crate::stage::Stage;

crate::cases![
    an_image_leaves_no_process_in_a_namespace_of_the_host,
    a_container_with_a_zombie_is_restored,
    a_hook_of_a_restore_has_three_descriptors,
];

/// The number of the namespace in criu's message of a process's objects, and its name.
const NAMESPACES: [(u64, &str); 4] = [(6, "net"), (7, "ipc"), (8, "uts"), (9, "mnt")];

fn an_image_leaves_no_process_in_a_namespace_of_the_host() {
    let stage = Stage::new();
    let Some(settings) = settings(&stage) else { return };
    let config = stage.config(&["sh", "-c", COUNT]);
    let init = counting(&stage, &config);
    saved(&stage, &settings, true, false);
    init.end();
    stage.delete("c").expect("deleted");
    let image = stage.folder.join("image");
    let inventory = fs::read(image.join("inventory.img")).expect("a file");
    let ids: Vec<(PathBuf, Vec<u8>)> = fs::read_dir(&image)
        .expect("a folder")
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("ids-"))
        .map(|entry| (entry.path(), fs::read(entry.path()).expect("a file")))
        .collect();
    assert_eq!(ids.len(), 2, "{ids:?}");
    for (field, name) in NAMESPACES {
        for (path, whole) in &ids {
            // In place of its own, what criu's own process had.
            let hosts = &inventory[at(&inventory, 8, &[3, field])];
            let mut changed = whole.clone();
            changed.splice(at(whole, 12, &[field]), hosts.iter().copied());
            let length = u32::try_from(changed.len() - 12).expect("a short message");
            changed[8..12].copy_from_slice(&length.to_le_bytes());
            assert_ne!(changed, *whole, "{name}");
            fs::write(path, changed).expect("written");
        }
        let error = stage.restore("c", &config, &settings).err();
        let error = error.unwrap_or_else(|| panic!("{name}: it runs"));
        assert!(error.contains(&format!("a process in the {name} namespace of the host")), "{error}");
        assert_eq!(stage.cgroups(), Vec::<PathBuf>::new());
        assert!(!Path::new("/run/i").exists() && !Path::new("/run/x-engine-count").exists(), "it has written to the host");
    }
    for (path, whole) in &ids {
        fs::write(path, whole).expect("written");
    }
    let _init = restored(&stage, &config, &settings);
}

/// Where the value of a field is in a message of protocol buffers that begins at `start`: below the fields before it.
fn at(bytes: &[u8], start: usize, path: &[u64]) -> Range<usize> {
    let varint = |at: &mut usize| {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = bytes[*at];
            *at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    };
    let (mut at, (wanted, below)) = (start, path.split_first().expect("a path"));
    while at < bytes.len() {
        let tag = varint(&mut at);
        let begin = at;
        let value = varint(&mut at);
        let content = at;
        if tag & 7 == 2 {
            at += usize::try_from(value).expect("a length");
        }
        match (tag >> 3 == *wanted, below.is_empty()) {
            (true, true) => return begin..at,
            (true, false) => return self::at(&bytes[..at], content, below),
            (false, _) => {}
        }
    }
    panic!("no field {wanted}");
}

fn a_container_with_a_zombie_is_restored() {
    let stage = Stage::new();
    let Some(settings) = settings(&stage) else { return };
    // The child of the second exits and is never waited for.
    let mut config = stage.config(&["sh", "-c", "sh -c '/bin/true & exec sleep 1000' & exec sleep 1000"]);
    config["process"]["capabilities"] = json!({ "bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"] });
    config["linux"]["seccomp"] = bundle::filter();
    config["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({ "type": "cgroup" }));
    let init = stage.create_piped("c", &config).expect("created");
    stage.start("c");
    // From outside: criu 4.2 looks for a zombie under a wrong pid where a process of an exec was born between its forks.
    let has_zombie = || stage.on_host("cat /proc/[0-9]*/stat 2>/dev/null || true").contains("(true) Z ");
    scratch::eventually("a zombie", has_zombie);
    scratch::eventually("two processes that run", || stage.count("c") == 2);
    saved(&stage, &settings, true, false);
    init.end();
    stage.delete("c").expect("deleted");
    let _init = restored(&stage, &config, &settings);
    assert!(has_zombie());
}

fn a_hook_of_a_restore_has_three_descriptors() {
    let stage = Stage::new();
    let Some(settings) = settings(&stage) else { return };
    let found = stage.folder.join("found");
    let config = stage.config(&["sh", "-c", COUNT]);
    let init = counting(&stage, &config);
    saved(&stage, &settings, true, false);
    init.end();
    stage.delete("c").expect("deleted");
    let mut hooked = config.clone();
    let script = format!("ls /proc/self/fd > {}", found.display());
    let hook = json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }]);
    for kind in ["createRuntime", "poststart"] {
        hooked["hooks"] = json!({ kind: hook });
        let init = restored(&stage, &hooked, &settings);
        // The last is the folder that is being read.
        assert_eq!(fs::read_to_string(&found).expect("a listing"), "0\n1\n2\n3\n", "{kind}");
        init.kill();
        init.end();
        stage.delete("c").expect("deleted");
    }
}
