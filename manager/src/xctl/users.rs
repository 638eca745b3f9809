//! Users by name or number, as a container's own `/etc/passwd` and `/etc/group` know them.

use std::path::Path;

use crate::error::{Error, Result};
use crate::open_in;

/// A user, with the groups of a process.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct User {
    /// User id.
    pub(crate) uid: u32,
    /// Primary group.
    pub(crate) gid: u32,
    /// The others.
    pub(crate) more_gids: Vec<u32>,
}

/// Whether `text` can be understood without the container's files.
pub(crate) fn is_numeric(text: &str) -> bool {
    text.split_once(':').is_some_and(|(user, group)| user.parse::<u32>().is_ok() && group.parse::<u32>().is_ok())
}

/// `USER`, `UID`, or either with `:GROUP` or `:GID` after it, in the root file system at `root`.
///
/// A user by name has the groups that list it, unless a group was given. A number that is not listed is root's group.
pub(crate) fn look_up(root: &Path, text: &str) -> Result<User> {
    if let Some((Ok(uid), Ok(gid))) = text.split_once(':').map(|(user, group)| (user.parse(), group.parse())) {
        return Ok(User { uid, gid, more_gids: Vec::new() });
    }
    let passwd = open_in::read_text(root, "/etc/passwd")?.unwrap_or_default();
    let groups = open_in::read_text(root, "/etc/group")?.unwrap_or_default();
    find(text, &passwd, &groups).map_err(|missing| {
        Error::refused(format!(
            "there is no {missing} in the container's root file system; give its number, or the number of one that there is"
        ))
    })
}

/// Errors: what there is not.
fn find(text: &str, passwd: &str, groups: &str) -> Result<User, String> {
    let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
    let number = user.parse::<u32>().ok();
    let fields = |line: &str| line.split(':').map(str::to_owned).collect::<Vec<_>>();
    let entry = passwd.lines().map(fields).find(|entry| {
        let uid = entry.get(2).and_then(|uid| uid.parse().ok());
        match number {
            Some(number) => uid == Some(number),
            None => entry[0] == user && uid.is_some(),
        }
    });
    let uid = match (number, &entry) {
        (Some(number), _) => number,
        (None, Some(entry)) => entry[2].parse().map_err(|_| format!("user {user:?}"))?,
        (None, None) => return Err(format!("user {user:?}")),
    };
    if let Some(group) = group {
        let gid = group
            .parse()
            .ok()
            .or_else(|| groups.lines().map(fields).find(|entry| entry[0] == group).and_then(|entry| entry.get(2)?.parse().ok()));
        return gid.map(|gid| User { uid, gid, more_gids: Vec::new() }).ok_or_else(|| format!("group {group:?}"));
    }
    let gid = entry.as_ref().and_then(|entry| entry.get(3)?.parse().ok()).unwrap_or(0);
    let name = entry.as_ref().map_or(user, |entry| entry[0].as_str());
    let lists = |entry: &Vec<String>| entry.get(3).is_some_and(|members| members.split(',').any(|member| member == name));
    let mut more_gids: Vec<u32> = groups.lines().map(fields).filter(lists).filter_map(|entry| entry.get(2)?.parse().ok()).collect();
    more_gids.retain(|other| *other != gid);
    more_gids.dedup();
    Ok(User { uid, gid, more_gids })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\nodd\nweb:x:33:34:web:/:/bin/sh\nbad:x:many:1::/:\n";
    const GROUPS: &str = "root:x:0:\nweb:x:34:web\nstaff:x:50:root,web\naudio:x:29:web\nodd\n";

    #[test]
    fn users_are_found_by_name_and_number() {
        let user = |uid, gid, more: &[u32]| Ok(User { uid, gid, more_gids: more.to_vec() });
        for (text, found) in [
            ("root", user(0, 0, &[50])),
            ("0", user(0, 0, &[50])),
            ("web", user(33, 34, &[50, 29])),
            ("33", user(33, 34, &[50, 29])),
            ("1000", user(1000, 0, &[])),
            ("web:staff", user(33, 50, &[])),
            ("web:7", user(33, 7, &[])),
            ("7:staff", user(7, 50, &[])),
            ("bad", Err("user \"bad\"".to_owned())),
            ("", Err("user \"\"".to_owned())),
            ("odd", Err("user \"odd\"".to_owned())),
            ("none", Err("user \"none\"".to_owned())),
            ("web:none", Err("group \"none\"".to_owned())),
            ("-1", Err("user \"-1\"".to_owned())),
        ] {
            assert_eq!(find(text, PASSWD, GROUPS), found, "{text}");
        }
        assert!(is_numeric("1:2") && !is_numeric("1") && !is_numeric("a:1") && !is_numeric("1:b"));
    }
}
