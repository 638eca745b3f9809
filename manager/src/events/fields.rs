//! What filters can look at in an event: the texts of the messages that containerd's own events are.
//!
//! They are read from the encoded message by field number, so that no message is decoded whole for a filter.

use std::borrow::Cow;

use containerd_client::types::Envelope;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use crate::filter::{Fields, text};

impl Fields for Envelope {
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
        match path {
            ["namespace"] => text(&self.namespace),
            ["topic"] => text(&self.topic),
            ["event", path @ ..] => {
                let event = self.event.as_ref()?;
                let name = event.type_url.rsplit('/').next()?;
                of_event(name, &event.value, path)
            }
            _ => None,
        }
    }
}

fn of_event<'a>(name: &str, message: &'a [u8], path: &[&str]) -> Option<Cow<'a, str>> {
    // containerd's own for images are in the package of their service
    let name = ["containerd.events.", "containerd.services.images.v1."].iter().find_map(|package| name.strip_prefix(package))?;
    let (_, fields) = EVENTS.iter().find(|(names, _)| names.contains(&name))?;
    let (first, rest) = path.split_first()?;
    if *first == "labels" {
        let (_, numbers) = fields.iter().find(|(field, _)| *field == "labels")?;
        return entry(message, *numbers.first()?, &rest.join("."));
    }
    let (_, numbers) = fields.iter().find(|(field, _)| *field == path.join("."))?;
    let value = numbers.iter().try_fold(message, |message, number| values(message, *number).last())?;
    text(std::str::from_utf8(value).ok()?)
}

/// The value of a map's entry.
fn entry<'a>(message: &'a [u8], map: u32, key: &str) -> Option<Cow<'a, str>> {
    let found = values(message, map).filter(|entry| values(entry, 1).last().unwrap_or_default() == key.as_bytes()).last()?;
    std::str::from_utf8(values(found, 2).last().unwrap_or_default()).ok().map(Cow::Borrowed)
}

/// The length-delimited values of a field, as far as the message can be read.
fn values(mut message: &[u8], number: u32) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        while !message.is_empty() {
            let (tag, kind) = decode_key(&mut message).ok()?;
            if kind != WireType::LengthDelimited {
                skip_field(kind, tag, &mut message, DecodeContext::default()).ok()?;
                continue;
            }
            let length = usize::try_from(decode_varint(&mut message).ok()?).ok()?;
            let (value, rest) = message.split_at_checked(length)?;
            message = rest;
            if tag == number {
                return Some(value);
            }
        }
        None
    })
}

type Field = (&'static str, &'static [u32]);

/// The messages of package `containerd.events`: names, and the numbers that lead to each text.
const EVENTS: &[(&[&str], &[Field])] = &[
    (&["TaskExit"], &[("container_id", &[1]), ("id", &[2])]),
    (&["TaskDelete"], &[("container_id", &[1]), ("id", &[5])]),
    (&["TaskExecAdded", "TaskExecStarted"], &[("container_id", &[1]), ("exec_id", &[2])]),
    (&["TaskStart", "TaskOOM", "TaskPaused", "TaskResumed"], &[("container_id", &[1])]),
    (&["TaskCheckpointed"], &[("container_id", &[1]), ("checkpoint", &[2])]),
    (
        &["TaskCreate"],
        &[
            ("container_id", &[1]),
            ("bundle", &[2]),
            ("io.stdin", &[4, 1]),
            ("io.stdout", &[4, 2]),
            ("io.stderr", &[4, 3]),
            ("checkpoint", &[5]),
        ],
    ),
    (&["ContainerCreate"], &[("id", &[1]), ("image", &[2]), ("runtime.name", &[3, 1])]),
    (&["ContainerUpdate"], &[("id", &[1]), ("image", &[2]), ("labels", &[3]), ("snapshot_key", &[4])]),
    (&["ContainerDelete"], &[("id", &[1])]),
    (&["NamespaceCreate", "NamespaceUpdate", "ImageCreate", "ImageUpdate"], &[("name", &[1]), ("labels", &[2])]),
    (&["NamespaceDelete", "ImageDelete"], &[("name", &[1])]),
    (&["ContentCreate", "ContentDelete"], &[("digest", &[1])]),
    (&["SnapshotPrepare"], &[("key", &[1]), ("parent", &[2]), ("snapshotter", &[5])]),
    (&["SnapshotCommit"], &[("key", &[1]), ("name", &[2]), ("snapshotter", &[5])]),
    (&["SnapshotRemove"], &[("key", &[1]), ("snapshotter", &[5])]),
    (&["SandboxCreate", "SandboxStart", "SandboxExit"], &[("sandbox_id", &[1])]),
];

#[cfg(test)]
mod tests {
    use containerd_client::events::{ContainerCreate, NamespaceCreate, TaskCreate, TaskIo, container_create::Runtime};
    use containerd_client::services::v1::ImageCreate;
    use prost::{Message, Name};
    use prost_types::Any;

    use super::*;

    fn envelope<M: Message + Name>(message: &M) -> Envelope {
        let event = Any { type_url: M::full_name(), value: message.encode_to_vec() };
        Envelope { event: Some(event), ..Envelope::default() }
    }

    #[test]
    fn texts_are_found_wherever_they_are() {
        let create = TaskCreate {
            container_id: "c".into(),
            io: Some(TaskIo { stdout: "/out".into(), terminal: true, ..TaskIo::default() }),
            pid: 7,
            ..TaskCreate::default()
        };
        let create = envelope(&create);
        assert_eq!(create.field(&["event", "container_id"]).as_deref(), Some("c"));
        assert_eq!(create.field(&["event", "io", "stdout"]).as_deref(), Some("/out"));
        assert_eq!(create.field(&["event", "io", "stdin"]), None);
        assert_eq!(create.field(&["event", "pid"]), None);
        assert_eq!(create.field(&["event"]), None);
        let runtime = Some(Runtime { name: "r".into(), options: None });
        let create = envelope(&ContainerCreate { id: "c".into(), runtime, ..ContainerCreate::default() });
        assert_eq!(create.field(&["event", "runtime", "name"]).as_deref(), Some("r"));
        let create = envelope(&ImageCreate { name: "i".into(), labels: [("a".to_owned(), "x".to_owned())].into() });
        assert_eq!(create.field(&["event", "name"]).as_deref(), Some("i"));
        assert_eq!(create.field(&["event", "labels", "a"]).as_deref(), Some("x"));
        let labels = [("a.b".to_owned(), "x".to_owned()), ("empty".to_owned(), String::new())].into();
        let create = envelope(&NamespaceCreate { name: "n".into(), labels });
        assert_eq!(create.field(&["event", "labels", "a", "b"]).as_deref(), Some("x"));
        assert_eq!(create.field(&["event", "labels", "empty"]).as_deref(), Some(""));
        assert_eq!(create.field(&["event", "labels", "none"]), None);
    }

    #[test]
    fn a_broken_message_has_no_texts() {
        for value in [vec![0x0a], vec![0x0a, 0xff], vec![0xff; 30], vec![0x0a, 0x02, 0xff, 0xfe]] {
            let event = Any { type_url: "containerd.events.TaskExit".into(), value };
            assert_eq!(Envelope { event: Some(event), ..Envelope::default() }.field(&["event", "container_id"]), None);
        }
    }
}
