//! A file of an archive on its way into the content store: an archive cannot be read again, so its files go on arriving when another process takes over.
//!
//! ```text
//! written here ──another process has taken over──▶ written there, from the same offset on
//! ```

use std::collections::HashMap;
use std::sync::Arc;

use hyper::body::Bytes;
use tonic::Code;

use super::Transfers;
use crate::content::{Digest, Opening, Writer};
use crate::error::{Error, Result};
use crate::successor::Writing;

/// The writer of a file.
#[derive(Debug)]
pub(super) struct Ingesting {
    transfers: Arc<Transfers>,
    opening: Opening,
    /// How much is written, and its digest.
    offset: u64,
    digest: Digest,
    state: State,
}

#[derive(Debug)]
enum State {
    Here(Writer),
    There(Writing),
    /// Another writer has made content of the same bytes meanwhile.
    Exists,
}

/// Which process has made content of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    Here,
    There,
}

impl Transfers {
    /// The writer of a file; none if the namespace has it.
    pub(super) async fn ingest(self: &Arc<Self>, opening: &Opening) -> Result<Option<Ingesting>> {
        let state = match self.open(opening).await {
            Err(Error::AlreadyExists(_)) => return Ok(None),
            Err(Error::Retired) if self.gate.is_succeeded() => match self.open_there(opening).await? {
                State::Exists => return Ok(None),
                state => state,
            },
            writer => State::Here(writer?),
        };
        let (offset, digest) = match &state {
            State::Here(writer) => {
                let progress = writer.progress()?;
                (progress.offset, progress.digest)
            }
            State::There(writing) => (writing.offset(), writing.digest()?),
            State::Exists => return Ok(None),
        };
        Ok(Some(Ingesting { transfers: Arc::clone(self), opening: opening.clone(), offset, digest, state }))
    }

    async fn open_there(&self, opening: &Opening) -> Result<State> {
        for _ in 0..PATIENCE {
            match self.successor.write(opening).await {
                // another writer has the reference
                Err(error) if error.code() == Code::Unavailable => {}
                Err(error) if error.code() == Code::AlreadyExists => return Ok(State::Exists),
                opened => return opened.map(State::There),
            }
        }
        self.successor.write(opening).await.map(State::There)
    }
}

impl Ingesting {
    /// How much is written.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Of what is written.
    pub(super) fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Drops everything that is written.
    pub(super) async fn truncate(&mut self) -> Result<()> {
        if let State::Here(writer) = &mut self.state {
            match writer.truncate().await {
                Err(Error::Retired) if self.transfers.gate.is_succeeded() => self.state = self.transfers.open_there(&self.opening).await?,
                done => done?,
            }
        }
        // there, what is written at 0 replaces everything
        self.offset = 0;
        Ok(())
    }

    /// Appends bytes.
    pub(super) async fn write(&mut self, bytes: Bytes) -> Result<()> {
        if let State::Here(writer) = &mut self.state {
            match writer.write(bytes.clone()).await {
                Err(Error::Retired) if self.transfers.gate.is_succeeded() => self.move_there().await?,
                done => {
                    done?;
                    let progress = writer.progress()?;
                    (self.offset, self.digest) = (progress.offset, progress.digest);
                    return Ok(());
                }
            }
        }
        let begin = self.offset;
        self.offset += bytes.len() as u64;
        if let State::There(writing) = &mut self.state {
            writing.write(begin, bytes).await?;
            self.digest = writing.digest()?;
        }
        Ok(())
    }

    /// Makes content of it.
    pub(super) async fn commit(mut self, size: u64, digest: &Digest) -> Result<Ended> {
        if let State::Here(writer) = &mut self.state {
            match writer.commit(size, Some(digest), HashMap::new()).await {
                Err(Error::Retired) if self.transfers.gate.is_succeeded() => self.move_there().await?,
                done => return done.map(|_digest| Ended::Here),
            }
        }
        if let State::There(writing) = self.state {
            match writing.commit(size, Some(digest)).await {
                Err(error) if error.code() == Code::AlreadyExists => {}
                Err(error) if error.code() == Code::FailedPrecondition => return Err(Error::Precondition(error.to_string())),
                done => drop(done?),
            }
        }
        Ok(Ended::There)
    }

    /// Goes on there with what is written here.
    async fn move_there(&mut self) -> Result<()> {
        // it is given up here first
        self.state = State::Exists;
        self.state = self.transfers.open_there(&self.opening).await?;
        match &self.state {
            State::There(writing) if writing.offset() != self.offset => Err(Error::DataLoss(format!(
                "{} was written up to {} bytes, and {} are there now that another process has taken over",
                self.opening.reference,
                self.offset,
                writing.offset()
            ))),
            _ => Ok(()),
        }
    }
}

/// Attempts, each of which waits for a second.
const PATIENCE: usize = 30;
