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
}
