use super::*;

fn any(type_url: &str, value: Vec<u8>) -> Any {
    Any { type_url: type_url.to_owned(), value, ..Default::default() }
}

/// `runtimeoptions.v1.Options` with a path (field 2) and a body (field 3), each shorter than 128 bytes.
fn generic(path: &str, body: &str) -> Any {
    let mut bytes = Vec::new();
    for (tag, text) in [(0x12, path), (0x1a, body)] {
        bytes.extend([tag, u8::try_from(text.len()).expect("a short text")]);
        bytes.extend(text.as_bytes());
    }
    any("runtimeoptions.v1.Options", bytes)
}

fn refusal(any: &Any) -> String {
    RuntimeOptions::blocking_read(Some(any)).expect_err("options to refuse").to_string()
}

#[test]
fn no_options_are_the_defaults() {
    for none in [None, Some(Any::default()), Some(any("runtimeoptions.v1.Options", vec![])), Some(any(RUNC_OPTIONS, vec![]))] {
        assert_eq!(RuntimeOptions::blocking_read(none.as_ref()).expect("defaults"), RuntimeOptions::default());
    }
}

#[test]
fn options_of_runc_are_understood_with_and_without_a_host_in_the_type() {
    let mut message = oci::Options {
        no_pivot_root: true,
        no_new_keyring: true,
        shim_cgroup: "/shim".into(),
        io_uid: 1000,
        io_gid: 1001,
        binary_name: "crun".into(),
        root: "/r".into(),
        systemd_cgroup: true,
        criu_image_path: "/i".into(),
        criu_work_path: "/w".into(),
        ..Default::default()
    };
    message.special_fields.mut_unknown_fields().add_length_delimited(8, b"/opt/criu".to_vec());
    let expected = RuntimeOptions {
        binary_name: Some("crun".into()),
        root: Some("/r".into()),
        systemd_cgroup: true,
        no_pivot_root: true,
        no_new_keyring: true,
        shim_cgroup: Some("/shim".into()),
        io_uid: 1000,
        io_gid: 1001,
        criu_path: Some("/opt/criu".into()),
        criu_image_path: Some("/i".into()),
        criu_work_path: Some("/w".into()),
        ..RuntimeOptions::default()
    };
    let bytes = message.write_to_bytes().expect("encodable");
    for url in [RUNC_OPTIONS, "type.googleapis.com/containerd.runc.v1.Options"] {
        assert_eq!(RuntimeOptions::blocking_read(Some(&any(url, bytes.clone()))).expect("options"), expected);
    }
}

#[test]
fn the_table_that_cri_sends_is_understood() {
    let options = RuntimeOptions::from_toml(
        b"BinaryName = \"/usr/bin/crun\"\nCriuImagePath = \"\"\nCriuPath = \"\"\nCriuWorkPath = \"\"\nIoGid = 0\nIoUid = 7\nNoNewKeyring = false\n\
          NoPivotRoot = false\nRoot = \"\"\nShimCgroup = \"\"\nSystemdCgroup = true\nTypeUrl = \"x\"\nSpillBytes = 1048576\n\
          Loggers = [\"/usr/bin/logger\"]\nFuture = 1\n",
        "a test",
    )
    .expect("options");
    let expected = RuntimeOptions {
        binary_name: Some("/usr/bin/crun".into()),
        io_uid: 7,
        systemd_cgroup: true,
        spill_bytes: 1 << 20,
        loggers: vec!["/usr/bin/logger".into()],
        unknown_keys: vec!["Future".into()],
        ..RuntimeOptions::default()
    };
    assert_eq!(options, expected);
}

#[test]
fn a_path_is_read_when_there_is_no_body() {
    let folder = scratch::Folder::new("options");
    let path = folder.join("options.toml");
    std::fs::write(&path, "binary_name = 'runc'\n").expect("a file");
    let text = path.display().to_string();
    let read = |body| RuntimeOptions::blocking_read(Some(&generic(&text, body))).expect("options").binary_name;
    assert_eq!(read(""), Some("runc".into()));
    assert_eq!(read("BinaryName = 'crun'"), Some("crun".into()));
    std::fs::remove_file(&path).expect("removal");
    assert_eq!(refusal(&generic(&text, "")), format!("read options from {text}"));
    assert_eq!(refusal(&generic("rel.toml", "")), "option ConfigPath: path \"rel.toml\" is not absolute");
}

#[test]
fn what_is_not_understood_is_refused_with_a_sentence() {
    for (any, expected) in [
        (
            any("containerd.linux.runc.RuncOptions", vec![]),
            "options of unknown type \"containerd.linux.runc.RuncOptions\": expected containerd.runc.v1.Options or runtimeoptions.v1.Options",
        ),
        (any("", vec![8, 1]), "options of unknown type \"\": expected containerd.runc.v1.Options or runtimeoptions.v1.Options"),
        (
            any("evil.example/containerd.runc.v1.Options", vec![]),
            "options of unknown type \"evil.example/containerd.runc.v1.Options\": expected containerd.runc.v1.Options or runtimeoptions.v1.Options",
        ),
        (any(RUNC_OPTIONS, vec![0xff]), "decode options of type containerd.runc.v1.Options"),
        (any("runtimeoptions.v1.Options", vec![0x1a, 99]), "decode options of type runtimeoptions.v1.Options"),
        (
            generic("", "A = 1\n= 1"),
            "options in the body of runtimeoptions.v1.Options, line 2: unquoted keys cannot be empty, expected letters, numbers, `-`, `_`",
        ),
        (generic("", "IoUid = -1"), "option IoUid in the body of runtimeoptions.v1.Options: expected a user id, found -1"),
        (
            generic("", "SystemdCgroup = \"yes\""),
            "option SystemdCgroup in the body of runtimeoptions.v1.Options: expected true or false, found string",
        ),
        (generic("", "Root = \"run\""), "option Root: path \"run\" is not absolute"),
        (generic("", "BinaryName = \"a\\u0000b\""), "option BinaryName contains a NUL byte"),
        (generic("", "Loggers = [\"cat\"]"), "option Loggers: path \"cat\" is not absolute"),
    ] {
        assert_eq!(refusal(&any), expected);
    }
}

#[test]
fn checkpoint_options_are_understood() {
    let message = oci::CheckpointOptions {
        exit: true,
        open_tcp: true,
        empty_namespaces: vec!["network".into()],
        image_path: "/i".into(),
        ..Default::default()
    };
    let bytes = message.write_to_bytes().expect("encodable");
    let expected = CheckpointOptions {
        exit: true,
        criu: CriuOptions { open_tcp: true, empty_namespaces: vec!["network".into()], ..CriuOptions::default() },
        image_path: Some("/i".into()),
        ..CheckpointOptions::default()
    };
    assert_eq!(CheckpointOptions::read(Some(&any(CHECKPOINT_OPTIONS, bytes))).expect("options"), expected);
    assert_eq!(CheckpointOptions::read(None).expect("defaults"), CheckpointOptions::default());
    assert!(CheckpointOptions::read(Some(&any(RUNC_OPTIONS, vec![]))).is_err());
}

/// `number = text` as a field.
fn text_field(number: u8, text: &str) -> Vec<u8> {
    [&[number << 3 | 2, u8::try_from(text.len()).expect("a short text")], text.as_bytes()].concat()
}

#[test]
fn the_options_that_go_clients_up_to_1_7_send_to_other_runtimes_are_understood() {
    // no_pivot_root to file_locks, each true; no_new_keyring; io_uid 300, io_gid 1; a field of the future
    let numbers = [8, 1, 16, 1, 24, 1, 32, 1, 40, 1, 64, 1, 80, 0xac, 2, 88, 1, 0xf8, 1, 7];
    let texts = [(6, "network"), (7, "soft"), (9, "/shim"), (12, "/w"), (13, "/i")].map(|(number, text)| text_field(number, text));
    let bytes = [numbers.to_vec(), texts.concat()].concat();
    let criu = CriuOptions {
        open_tcp: true,
        external_unix_sockets: true,
        terminal: true,
        file_locks: true,
        empty_namespaces: vec!["network".into()],
        cgroups_mode: Some("soft".into()),
    };
    let expected = RuntimeOptions {
        no_pivot_root: true,
        no_new_keyring: true,
        shim_cgroup: Some("/shim".into()),
        io_uid: 300,
        io_gid: 1,
        criu_image_path: Some("/i".into()),
        criu_work_path: Some("/w".into()),
        restore: criu.clone(),
        ..RuntimeOptions::default()
    };
    for url in ["containerd.linux.runc.CreateOptions", "type.googleapis.com/containerd.linux.runc.CreateOptions"] {
        assert_eq!(RuntimeOptions::blocking_read(Some(&any(url, bytes.clone()))).expect("options"), expected);
    }
    assert_eq!(
        refusal(&any("containerd.linux.runc.CreateOptions", vec![0xff])),
        "decode options of type containerd.linux.runc.CreateOptions"
    );
    assert_eq!(
        refusal(&any("containerd.linux.runc.CreateOptions", text_field(13, "i"))),
        "option CriuImagePath: path \"i\" is not absolute"
    );

    // exit to file_locks
    let numbers = [8, 1, 16, 1, 24, 1, 32, 1, 40, 1];
    let texts = [(6, "network"), (7, "soft"), (8, "/w"), (9, "/i")].map(|(number, text)| text_field(number, text));
    let any = any("containerd.linux.runc.CheckpointOptions", [numbers.to_vec(), texts.concat()].concat());
    let expected = CheckpointOptions { exit: true, criu, image_path: Some("/i".into()), work_path: Some("/w".into()) };
    assert_eq!(CheckpointOptions::read(Some(&any)).expect("options"), expected);
}

#[test]
fn process_details_name_the_exec() {
    let any = process_details("e1");
    assert_eq!(any.type_url, "containerd.runc.v1.ProcessDetails");
    assert_eq!(oci::ProcessDetails::parse_from_bytes(&any.value).expect("decodable").exec_id, "e1");
}
