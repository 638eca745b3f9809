//! The sockets that are listened on.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _, chown};
use std::os::unix::net::UnixStream;
use std::path::Path;

use tokio::net::UnixListener;

use crate::error::{Error, IoContext as _, Result};

/// Listens at `path`, for root and the group; removes what a dead daemon has left there.
///
/// Errors: [`Error::Precondition`] when somebody serves there, or when what is there is no socket.
pub(crate) fn listen(path: &Path, gid: u32) -> Result<UnixListener> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o711).create(folder).on("make folder", folder)?;
    match fs::symlink_metadata(path) {
        Ok(about) if !about.file_type().is_socket() => {
            return Err(Error::Precondition(format!("{} is there and no socket", path.display())));
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(Error::Precondition(format!("somebody serves at {} already", path.display())));
        }
        Ok(_) => fs::remove_file(path).on("remove old socket", path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).on("look at", path),
    }
    // nobody may connect before its mode and group are right: it appears under its name when they are
    let mut hidden = path.to_owned().into_os_string();
    hidden.push(".new");
    let hidden = Path::new(&hidden);
    let _litter_of_a_killed_start = fs::remove_file(hidden);
    let listener = UnixListener::bind(hidden).on("listen at", path)?;
    fs::set_permissions(hidden, fs::Permissions::from_mode(0o660)).on("set mode of", path)?;
    chown(hidden, Some(0), Some(gid)).on("set group of", path)?;
    fs::rename(hidden, path).on("name socket", path)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_for_root_and_a_group_and_is_not_taken_from_anybody() {
        let folder = std::env::temp_dir().join(format!("x-manager-sockets-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a temporary folder");
        let path = folder.join("own/api.sock");
        if nix::unistd::geteuid().is_root() {
            let listener = listen(&path, 12345).expect("a free place");
            assert_eq!(fs::metadata(&path).expect("a socket").permissions().mode() & 0o777, 0o660);
            assert!(matches!(listen(&path, 0), Err(Error::Precondition(_))), "taken");
            drop(listener);
            drop(listen(&path, 0).expect("litter is removed"));
        }
        let file = folder.join("file");
        fs::write(&file, "precious").expect("a file");
        assert!(matches!(listen(&file, 0), Err(Error::Precondition(_))));
        assert_eq!(fs::read_to_string(&file).expect("a file"), "precious");
        fs::remove_dir_all(folder).expect("removal");
    }
}
