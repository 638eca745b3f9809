//! Which mounts of an activation are made here, and what becomes of those that are written for containerd's mount manager:
//!
//! ```text
//! format/TYPE    {{ mount 0 }}, {{ source 0 }}, {{ target 0 }} and {{ overlay 0 2 }} in source, target and options stand for earlier mounts
//! mkdir/TYPE     options X-containerd.mkdir.path=PATH[:MODE[:UID:GID]]: folders that are made before
//! ```

use containerd_client::types::Mount;

use super::messages::ActiveMount;
use crate::error::{Error, Result};

/// A folder to make before a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Folder {
    pub(super) path: String,
    pub(super) mode: u32,
    pub(super) owner: Option<(u32, u32)>,
}

/// How many of the mounts are made here, the first ones.
///
/// Errors: [`Error::Unimplemented`] if none need be, as containerd says it; or one asks for what is not done.
pub(super) fn count(mounts: &[Mount], all: bool) -> Result<usize> {
    if mounts.is_empty() || mounts.len() > MOST_MOUNTS {
        return Err(Error::Invalid(format!("{} mounts; there must be some, and {MOST_MOUNTS} at most", mounts.len())));
    }
    if all {
        return Ok(mounts.len());
    }
    // what is before one with a transformation must be mounted, since that may name it
    let first = mounts.iter().rposition(|mount| mount.r#type.contains('/'));
    first.ok_or_else(|| Error::Unimplemented("none of the mounts needs to be activated".to_owned()))
}

/// A mount as the kernel knows it, and the folders that it needs.
pub(super) fn transformed(mount: &Mount, active: &[ActiveMount]) -> Result<(Mount, Vec<Folder>)> {
    let (mut mount, mut folders) = (mount.clone(), Vec::new());
    let (mut rounds, mut room) = (0, FORMATTED_BYTES);
    while let Some((transformation, kind)) = mount.r#type.split_once('/') {
        rounds += 1;
        if rounds > MOST_TRANSFORMATIONS {
            return Err(Error::Invalid(format!("a mount with more than {MOST_TRANSFORMATIONS} transformations")));
        }
        let kind = kind.to_owned();
        match transformation {
            "format" => {
                mount.source = formatted(&mount.source, active, &mut room)?;
                mount.target = formatted(&mount.target, active, &mut room)?;
                for option in &mut mount.options {
                    *option = formatted(option, active, &mut room)?;
                }
            }
            "mkdir" => {
                let (made, rest): (Vec<_>, Vec<_>) = mount.options.into_iter().partition(|option| option.starts_with(MKDIR));
                folders.extend(made.iter().map(|option| folder(option)).collect::<Result<Vec<_>>>()?);
                mount.options = rest;
            }
            other => return Err(Error::Unimplemented(format!("mounts of type {:?}", shown(other)))),
        }
        mount.r#type = kind;
    }
    Ok((mount, folders))
}

fn folder(option: &str) -> Result<Folder> {
    let invalid = || Error::Invalid(format!("option {:?}: should be {MKDIR}path=PATH[:MODE[:UID:GID]]", shown(option)));
    let value = option.strip_prefix(MKDIR).and_then(|option| option.strip_prefix("path=")).ok_or_else(invalid)?;
    let parts: Vec<&str> = value.split(':').collect();
    let mode = |text: &str| u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777).ok_or_else(invalid);
    let number = |text: &str| text.parse::<u32>().map_err(|_| invalid());
    let (path, mode, owner) = match parts[..] {
        [path] => (path, 0o700, None),
        [path, bits] => (path, mode(bits)?, None),
        [path, bits, user, group] => (path, mode(bits)?, Some((number(user)?, number(group)?))),
        _ => return Err(invalid()),
    };
    if path.starts_with('/') { Ok(Folder { path: path.to_owned(), mode, owner }) } else { Err(invalid()) }
}

/// Puts in what stands for earlier mounts, `room` bytes at most.
fn formatted(text: &str, active: &[ActiveMount], room: &mut usize) -> Result<String> {
    let (mut done, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once("{{") {
        let invalid = || Error::Invalid(format!("{:?}: cannot be formatted", shown(text)));
        let (expression, after) = after.split_once("}}").ok_or_else(invalid)?;
        let words: Vec<&str> = expression.split_whitespace().collect();
        let index = |word: &str| word.parse::<usize>().ok().filter(|index| *index < active.len()).ok_or_else(invalid);
        let of = |index: usize, part: fn(&Mount) -> &String| active[index].mount.as_ref().map(part).cloned().unwrap_or_default();
        done.push_str(before);
        let put = match words[..] {
            ["mount", number] => active[index(number)?].mount_point.clone(),
            ["source", number] => of(index(number)?, |mount| &mount.source),
            ["target", number] => of(index(number)?, |mount| &mount.target),
            ["overlay", from, to] => {
                let (from, to) = (index(from)?, index(to)?);
                let points = active[from.min(to)..=from.max(to)].iter().map(|mount| mount.mount_point.clone());
                let points: Vec<_> = if from > to { points.rev().collect() } else { points.collect() };
                points.join(":")
            }
            _ => return Err(invalid()),
        };
        let left = room.checked_sub(put.len());
        *room = left.ok_or_else(|| Error::Invalid(format!("more than {FORMATTED_BYTES} bytes are put into a mount")))?;
        done.push_str(&put);
        rest = after;
    }
    Ok(done + rest)
}

fn shown(text: &str) -> String {
    text.chars().take(100).collect()
}

const MKDIR: &str = "X-containerd.mkdir.";
/// As in containerd.
const MOST_MOUNTS: usize = 255;
/// Clients have two.
const MOST_TRANSFORMATIONS: usize = 8;
/// What one mount may get of others: the paths of all of them, and no multiple of what a client sends.
const FORMATTED_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        Mount { r#type: kind.to_owned(), source: source.to_owned(), target: String::new(), options }
    }

    fn active(point: &str) -> ActiveMount {
        ActiveMount { mount: Some(mount("ext4", "/dev/x", &[])), mount_point: point.to_owned(), ..ActiveMount::default() }
    }

    #[test]
    fn mounts_before_one_that_names_them_are_made() {
        let plain = mount("overlay", "overlay", &[]);
        assert_eq!(count(&[plain.clone(), plain.clone()], true).expect("all"), 2);
        assert_eq!(count(&[plain.clone(), mount("format/overlay", "overlay", &[])], false).expect("one"), 1);
        assert_eq!(count(std::slice::from_ref(&plain), false).expect_err("none").code(), tonic::Code::Unimplemented);
        count(&[], true).expect_err("nothing");
        count(&vec![plain; 256], true).expect_err("too many");
    }

    #[test]
    fn what_stands_for_earlier_mounts_is_put_in() {
        let before = [active("/m/0"), active("/m/1"), active("/m/2")];
        let (made, folders) = transformed(
            &mount(
                "format/mkdir/overlay",
                "{{ source 1 }}",
                &["lowerdir={{ overlay 1 0 }}", "upperdir={{mount 2}}/u", "X-containerd.mkdir.path={{ mount 2 }}/u:755", "ro"],
            ),
            &before,
        )
        .expect("all of it is right");
        assert_eq!(made, mount("overlay", "/dev/x", &["lowerdir=/m/1:/m/0", "upperdir=/m/2/u", "ro"]));
        assert_eq!(folders, [Folder { path: "/m/2/u".to_owned(), mode: 0o755, owner: None }]);
        for bad in ["{{ mount 3 }}", "{{ mount", "{{ mount -1 }}", "{{ other 0 }}", "{{ overlay 0 }}", "{{}}"] {
            transformed(&mount("format/bind", bad, &[]), &before).expect_err(bad);
        }
        for bad in ["path=a", "mode=/a", "path=/a:888", "path=/a:1777", "path=/a:700:1", "path=/a:700:x:1"] {
            transformed(&mount("mkdir/bind", "/", &[&format!("X-containerd.mkdir.{bad}")]), &before).expect_err(bad);
        }
        let long = [active(&"m".repeat(1000))];
        transformed(&mount("format/bind", &"{{ mount 0 }}".repeat(1000), &[]), &long).expect("there is room");
        transformed(&mount("format/bind", &"{{ mount 0 }}".repeat(1100), &[]), &long).expect_err("too much");
        let source = "{{ mount 0 }}".repeat(600);
        transformed(&mount("format/bind", &source, &[&source]), &long).expect_err("too much of both");
        transformed(&mount(&"format/".repeat(9), "/", &[]), &before).expect_err("too many transformations");
        let unknown = transformed(&mount("mkfs/ext4", "/", &[]), &before).expect_err("not done");
        assert_eq!(unknown.code(), tonic::Code::Unimplemented);
    }
}
