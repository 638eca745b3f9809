//! Whatever is added to, changed in or taken from a configuration makes a difference to its plan, or is refused by its name.
use serde_json::{Value, json};

use super::tests::{changed, everywhere, full, full_process, host, planned_for};
use super::*;
use crate::spec;

/// Where something changes nothing, and why. Patterns as in the list of fields.
const WITHOUT_EFFECT: [(&str, &str); 8] = [
    ("linux.resources.memory.kernel", "the kernel has no such limit any more"),
    ("linux.resources.memory.kernelTCP", "the same"),
    ("linux.resources.memory.useHierarchy", "false is the only choice: it is refused if it is true"),
    ("linux.resources.memory.checkBeforeUpdate", "false is the only choice: it is refused if it is true"),
    ("process.user.username", "for Windows: refused unless it is empty"),
    ("process.commandLine", "for Windows: refused unless it is empty"),
    ("linux.intelRdt", "refused unless it is empty"),
    ("linux.personality.flags", "refused unless it is empty"),
];

/// Where the absence of a value means the very value that the configuration of these tests has.
const DEFAULTS: [(&str, &str); 7] = [
    ("mounts[].source", "without one, a new file system is called as its kind"),
    ("linux.uidMappings[].containerID", "0, which has to be mapped"),
    ("linux.gidMappings[].containerID", "the same"),
    ("process.scheduler.runtime", "0 for every policy but the deadline's"),
    ("process.scheduler.deadline", "the same"),
    ("process.scheduler.period", "the same"),
    ("mounts[].type", "a bind mount's type is ignored, as by runc"),
];

fn plan(config: &Value) -> Result<Create, Refused> {
    planned_for(config, &host())
}

/// The dotted form of a JSON pointer, and its pattern.
fn names(base: &Value, place: &str) -> (String, String) {
    let (mut path, mut pattern, mut at) = (String::new(), String::new(), base);
    for part in place.split('/').skip(1) {
        let key = part.replace("~1", "/").replace("~0", "~");
        if at.is_array() {
            path += &format!("[{key}]");
            pattern += "[]";
        } else {
            let dot = if path.is_empty() { "" } else { "." };
            path += &format!("{dot}{key}");
            pattern += &format!("{dot}{key}");
        }
        at = at.get(&key).or_else(|| at.get(key.parse::<usize>().unwrap_or(usize::MAX))).unwrap_or(&Value::Null);
    }
    (path, pattern)
}

/// The beginning of a path that a refusal has to name: the field, or what it is a part of.
fn stem(path: &str) -> &str {
    let end = path.match_indices(['.', '[']).map(|(at, _)| at).nth(1).unwrap_or(path.len());
    &path[..end]
}

/// Checks that a changed configuration is not taken for the same one. `allowed`: patterns where it may be.
fn check(config: &Value, base: &Create, place: &str, what: &str, allowed: &[(&str, &str)]) {
    let (path, pattern) = names(config, place);
    match plan(config) {
        Ok(plan) => assert!(plan != *base || allowed.iter().any(|(field, _)| *field == pattern), "{path}: {what} is ignored"),
        Err(error) => {
            let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            let text = format!("{error} {source}");
            // What is missing may be missed by another field.
            let is_named = text.contains(stem(&path)) || what == "the absence";
            assert!(is_named, "{path}: {what} is refused without its name: {text}");
        }
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn an_added_field_is_noticed_everywhere() {
    let base = plan(&full()).expect("accepted");
    let mut places = Vec::new();
    everywhere(&full(), "", &mut places);
    let mut checked = 0;
    for place in places {
        let mut config = full();
        match config.pointer_mut(&place).expect("found above") {
            Value::Object(map) => drop(map.insert("xNew".to_owned(), json!("net.ipv4.x"))),
            Value::Array(list) => list.push(json!({ "xNew": 1 })),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => continue,
        }
        check(&config, &base, &place, "an addition", &[]);
        checked += 1;
    }
    assert!(checked > 80, "{checked}");
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_changed_value_is_noticed_everywhere() {
    let base = plan(&full()).expect("accepted");
    let mut places = Vec::new();
    everywhere(&full(), "", &mut places);
    for place in &places {
        let (_, pattern) = names(&full(), place);
        let value = full().pointer(place).expect("found above").clone();
        // What is not looked at may not be of another type either.
        let others = [
            changed(&pattern, &value),
            json!({ "xNew": true }),
            json!([[7]]),
            json!(true),
            json!(99_999_999_999_u64),
            json!("xNew"),
            json!(-7),
        ];
        for other in others.into_iter().filter(|other| *other != value) {
            let mut config = full();
            *config.pointer_mut(place).expect("found above") = other.clone();
            if config.is_object() {
                check(&config, &base, place, &other.to_string(), &[("mounts[].type", "a bind mount's type is ignored, as by runc")]);
            }
        }
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_missing_value_is_noticed_everywhere() {
    let base = plan(&full()).expect("accepted");
    let mut places = Vec::new();
    everywhere(&full(), "", &mut places);
    for place in places.iter().skip(1) {
        let mut config = full();
        let (parent, key) = place.rsplit_once('/').expect("a place");
        match config.pointer_mut(parent).expect("an object or array") {
            Value::Object(map) => drop(map.remove(&key.replace("~1", "/").replace("~0", "~"))),
            Value::Array(list) => drop(list.remove(key.parse().expect("an index"))),
            _ => unreachable!("only these have places below them"),
        }
        check(&config, &base, place, "the absence", &DEFAULTS);
    }
}

/// Every field that is in no plan: refused, unless it asks for nothing or is in the list above.
#[test]
fn fields_without_a_plan_are_refused_unless_they_ask_for_nothing() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    let base = plan(&config).expect("accepted");
    let of_process = spec::PROCESS_FIELDS.iter().map(|(field, how)| (format!("process.{field}"), *how));
    let fields = spec::FIELDS.iter().map(|(field, how)| ((*field).to_owned(), *how)).chain(of_process);
    let mut checked = 0;
    for (field, how) in fields.filter(|(_, how)| *how != spec::Use::Planned) {
        let place = format!("/{}", field.replace("[]", "/0").replace('.', "/"));
        let (parent, key) = place.rsplit_once('/').expect("a place");
        for (value, is_nothing) in [
            (json!(null), true),
            (json!({}), true),
            (json!(""), true),
            (json!([1]), false),
            (json!({ "a": { "b": 1 } }), false),
            (json!(7), false),
        ] {
            let mut config = config.clone();
            config.pointer_mut(parent).expect("in the configuration")[key] = value.clone();
            match plan(&config) {
                Ok(plan) => assert!(plan == base && (is_nothing || how == spec::Use::Inert), "{field} {value}"),
                // A type that it cannot have is refused too.
                Err(error) => {
                    let name = field.replace("[]", "[0]");
                    assert!(error.to_string().contains(stem(&name)) && !value.is_null(), "{field} {value}: {error}");
                }
            }
        }
        assert!(WITHOUT_EFFECT.iter().any(|(known, _)| *known == field), "{field} is not in the list of this test");
        checked += 1;
    }
    assert_eq!(checked, WITHOUT_EFFECT.len());
}

#[test]
#[cfg(target_arch = "x86_64")]
fn an_added_process_has_no_ignored_fields_either() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    let container = planned_for(&config, &host()).expect("accepted").container();
    let planned = |process: &Value| exec(&spec::parse_process(process.to_string().as_bytes())?, &container, &host());
    let base = planned(&full_process()).expect("accepted");
    // As the list of differences has it: these are the container's, whatever the process asks for.
    let of_container = ["oomScoreAdj", "user.umask"];
    let mut places = Vec::new();
    everywhere(&full_process(), "", &mut places);
    for place in &places {
        let (path, pattern) = names(&full_process(), place);
        let value = full_process().pointer(place).expect("found above").clone();
        let mut variants = vec![changed(&format!("process.{pattern}"), &value), json!({ "xNew": 1 }), json!(99_999_999_999_u64)];
        if let Value::Object(map) = &value {
            let mut map = map.clone();
            map.insert("xNew".to_owned(), json!(1));
            variants.push(Value::Object(map));
        }
        for variant in variants.into_iter().filter(|variant| *variant != value) {
            let mut process = full_process();
            *process.pointer_mut(place).expect("found above") = variant.clone();
            match planned(&process) {
                Ok(plan) => assert!(plan != base || of_container.contains(&pattern.as_str()), "{path}: {variant} is ignored"),
                Err(error) => {
                    let (text, name) = (error.to_string(), format!("process.{path}"));
                    assert!(
                        text.contains(stem(&name)) || text.contains(stem(&path)),
                        "{path}: {variant} is refused without its name: {text}"
                    );
                }
            }
        }
    }
}
