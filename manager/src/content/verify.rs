//! Verification: every blob is read, and what is not what its digest says is taken away, so that the next pull brings it again.
//!
//! ```text
//! each file ─▶ hashed ─▶ as named: stays
//!                      └▶ otherwise: taken away; its rows stay ─▶ a client that writes that digest finds no file, and writes it
//! ```

use std::sync::Arc;

use log::warn;
use nix::errno::Errno;

use super::{Content, Digest};
use crate::error::{Error, Result};
use crate::layers::Cancel;
use crate::store::blobs;

/// What a verification has found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Verified {
    /// Blobs whose bytes are right.
    pub(crate) sound: usize,
    /// Blobs that were not, and were taken away.
    pub(crate) damaged: Vec<Digest>,
    /// Blobs that a namespace has, and of which there is no file.
    pub(crate) missing: Vec<Digest>,
}

impl Content {
    /// Reads all blobs, one after the other, until its caller does not wait any more.
    ///
    /// Errors: [`crate::error::Error::Retired`], or that a blob cannot be looked at now; what was found damaged is taken away.
    pub(crate) async fn verify(&self) -> Result<Verified> {
        // its end is the end of what a thread does for it
        let cancel = Cancel::default();
        let _ends_with_caller = cancel.guard();
        // another one would be as slow, and double what is read
        let _one_at_a_time = self.verifying.lock().await;
        let files = Arc::clone(&self.files);
        let mut verified = Verified::default();
        for digest in self.pool.run(move || files.all()).await?? {
            drop(self.gate.enter().await?);
            let (files, gate, of, stop) = (Arc::clone(&self.files), self.gate.clone(), digest.clone(), cancel.clone());
            // a blob that is being removed, or named anew, is another file
            match self.pool.run(move || files.verify(&of, &|| gate.is_retired() || stop.is_cancelled())).await? {
                Ok(Some(true)) => verified.sound += 1,
                Ok(None) => {}
                Ok(Some(false)) => {
                    if self.take_damaged(&digest).await? {
                        verified.damaged.push(digest);
                    }
                }
                Err(error) if is_of_file(&error) => {
                    warn!(digest:%, error = error.chain(); "cannot read a blob");
                    if self.take_damaged(&digest).await? {
                        verified.damaged.push(digest);
                    }
                }
                // it may be sound: there is no descriptor for it, for instance
                Err(error) => return Err(error),
            }
        }
        let known = self.store.read_beside(blobs::digests).await?;
        let files = Arc::clone(&self.files);
        let known = known.iter().filter_map(|digest| Digest::of(digest));
        let known: Vec<_> = known.filter(|digest| !verified.damaged.contains(digest)).collect();
        let missing = move || known.into_iter().filter(|digest| files.size(digest).is_none()).collect();
        verified.missing = self.pool.run(missing).await?;
        if let Some(remote) = &self.remote {
            for digest in std::mem::take(&mut verified.missing) {
                match self.verify_there(remote, &digest).await? {
                    Some(true) => verified.sound += 1,
                    Some(false) => verified.damaged.push(digest),
                    None => verified.missing.push(digest),
                }
            }
        }
        Ok(verified)
    }

    /// Takes a file away that was found damaged, unless it was written again meanwhile.
    async fn take_damaged(&self, digest: &Digest) -> Result<bool> {
        // no blob is named meanwhile
        let _nothing_is_named = self.publishing.write().await;
        let _pass = self.gate.enter().await?;
        let (files, gate, of) = (Arc::clone(&self.files), self.gate.clone(), digest.clone());
        let is_taken = self
            .pool
            .run(move || match files.verify(&of, &|| gate.is_retired()) {
                Ok(Some(true) | None) => Ok(false),
                Err(error) if !is_of_file(&error) => Err(error),
                Ok(Some(false)) | Err(_) => files.take_away(&of).map(|taken| taken.is_some()),
            })
            .await??;
        if is_taken {
            warn!(digest:%; "a blob was damaged, and is taken away: pull its image again");
            // the next collection that looks for all removes it
            self.has_left.store(true, std::sync::atomic::Ordering::Relaxed);
        }
        Ok(is_taken)
    }
}

/// Whether an error is one of the file itself: the disk does not give its bytes, or it is none. Others are of this process, and pass.
fn is_of_file(error: &Error) -> bool {
    let Error::Io { source, .. } = error else { return false };
    let of_file = [Errno::EIO, Errno::EUCLEAN, Errno::EBADMSG, Errno::ENODATA, Errno::ELOOP, Errno::EISDIR];
    source.raw_os_error().is_some_and(|number| of_file.contains(&Errno::from_raw(number)))
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::Path;

    use super::*;
    use crate::error::IoContext as _;

    #[test]
    fn only_errors_of_a_file_say_that_it_is_damaged() {
        for (number, expected) in [
            (Errno::EIO, true),
            (Errno::ELOOP, true),
            (Errno::EMFILE, false),
            (Errno::ENFILE, false),
            (Errno::ENOMEM, false),
            (Errno::EINTR, false),
        ] {
            let error = Err::<(), _>(io::Error::from(number)).on("open", Path::new("/b")).expect_err("an error");
            assert_eq!(is_of_file(&error), expected, "{number}");
        }
    }
}
