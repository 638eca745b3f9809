//! Field masks: which parts of an object an update is about.

use std::collections::HashMap;

use prost_types::FieldMask;

/// The paths of a mask; none when everything is meant that can be changed.
pub(super) fn paths(mask: Option<FieldMask>) -> Option<Vec<String>> {
    mask.map(|mask| mask.paths).filter(|paths| !paths.is_empty())
}

/// Sets a label, or removes it when the new value is empty or absent.
pub(super) fn update_label(labels: &mut HashMap<String, String>, key: &str, new: &HashMap<String, String>) {
    match new.get(key).filter(|value| !value.is_empty()) {
        Some(value) => labels.insert(key.to_owned(), value.clone()),
        None => labels.remove(key),
    };
}

/// Takes what the paths name of labels from `new`; without paths all of them.
///
/// Errors: a path that is about something else.
pub(super) fn update_labels<'p>(
    labels: &mut HashMap<String, String>,
    new: &HashMap<String, String>,
    paths: Option<&'p [String]>,
) -> Result<(), &'p str> {
    let Some(paths) = paths else {
        *labels = without_empty(new.clone());
        return Ok(());
    };
    for path in paths {
        match path.split_once('.') {
            None if path == "labels" => *labels = without_empty(new.clone()),
            Some(("labels", key)) => update_label(labels, key, new),
            _ => return Err(path),
        }
    }
    Ok(())
}

/// Labels without those that are empty, which means absent.
pub(super) fn without_empty(mut labels: HashMap<String, String>) -> HashMap<String, String> {
    labels.retain(|_, value| !value.is_empty());
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_set_changed_and_removed() {
        let mut labels = HashMap::from([("a".to_owned(), "1".to_owned()), ("b".to_owned(), "2".to_owned())]);
        let new = HashMap::from([("a".to_owned(), "3".to_owned()), ("c".to_owned(), "4".to_owned()), ("b".to_owned(), String::new())]);
        for key in ["a", "b", "c", "d"] {
            update_label(&mut labels, key, &new);
        }
        assert_eq!(labels, HashMap::from([("a".to_owned(), "3".to_owned()), ("c".to_owned(), "4".to_owned())]));
        assert_eq!(without_empty(new).len(), 2);
    }

    #[test]
    fn labels_are_updated_as_the_paths_say() {
        let map =
            |text: &str| text.split(' ').filter_map(|pair| pair.split_once('=')).map(|(key, value)| (key.into(), value.into())).collect();
        for (paths, expected) in [
            (None, Ok("a.b=3 c=4")),
            (Some(&["labels"][..]), Ok("a.b=3 c=4")),
            (Some(&["labels.a.b"]), Ok("a.b=3 d=2")),
            (Some(&["labels.c", "labels.d"]), Ok("a.b=1 c=4")),
            (Some(&["labels.c", "labelsx"]), Err("labelsx")),
            (Some(&["label"]), Err("label")),
            (Some(&["x.labels"]), Err("x.labels")),
            (Some(&[""]), Err("")),
        ] {
            let paths = paths.map(|paths| paths.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>());
            let mut labels: HashMap<String, String> = map("a.b=1 d=2");
            let updated = update_labels(&mut labels, &map("a.b=3 c=4 e="), paths.as_deref());
            assert_eq!(updated, expected.map(|_labels| ()), "{paths:?}");
            if let Ok(expected) = expected {
                assert_eq!(labels, map(expected), "{paths:?}");
            }
        }
    }
}
