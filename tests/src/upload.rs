//! Writing content as clients do: one message, one answer.

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::{
    Info, InfoRequest, ReadContentRequest, Status as Ingest, StatusRequest, WriteAction, WriteContentRequest, WriteContentResponse,
};
use tokio::sync::mpsc;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::client::{Answer, Client};
use crate::eventually::{SOON, within};

/// A stream of writes to one reference.
#[derive(Debug)]
pub struct Upload {
    requests: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
}

/// The first message of a stream.
pub fn stat(reference: &str) -> WriteContentRequest {
    WriteContentRequest { r#ref: reference.to_owned(), ..WriteContentRequest::default() }
}

/// Bytes at an offset.
pub fn write(offset: i64, data: &[u8]) -> WriteContentRequest {
    WriteContentRequest { action: WriteAction::Write as i32, offset, data: data.to_vec(), ..WriteContentRequest::default() }
}

/// The end, at an offset, of content that is expected to be that long and to have that digest.
pub fn commit(offset: i64, total: i64, expected: &str) -> WriteContentRequest {
    let (action, expected) = (WriteAction::Commit as i32, expected.to_owned());
    WriteContentRequest { action, offset, total, expected, ..WriteContentRequest::default() }
}

/// What a tool of another project computes.
pub fn digest(algorithm: &str, data: &[u8]) -> Result<String> {
    let mut tool = Command::new(format!("{algorithm}sum")).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    tool.stdin.take().context("a pipe")?.write_all(data)?;
    let printed = String::from_utf8(tool.wait_with_output()?.stdout)?;
    Ok(format!("{algorithm}:{}", printed.split(' ').next().unwrap_or_default()))
}

impl Upload {
    /// Begins one with its first message, and returns the answer to it.
    pub async fn begin(client: &Client, first: WriteContentRequest) -> Answer<(Self, WriteContentResponse)> {
        let (requests, stream) = mpsc::channel(1);
        // there is room for it
        let _ = requests.send(first).await;
        let answers = client.api().content().write(client.request(ReceiverStream::new(stream))).await?.into_inner();
        let mut upload = Self { requests, answers };
        let answer = upload.answer().await?;
        Ok((upload, answer))
    }

    /// Sends a message and waits for its answer.
    pub async fn send(&mut self, request: WriteContentRequest) -> Answer<WriteContentResponse> {
        // if the stream has ended, its answer says why
        let _ = self.requests.send(request).await;
        self.answer().await
    }

    async fn answer(&mut self) -> Answer<WriteContentResponse> {
        let answer = within("an answer", SOON, self.answers.message()).await;
        let answer = answer.map_err(|error| Status::deadline_exceeded(error.to_string()))??;
        answer.ok_or_else(|| Status::aborted("the stream has ended"))
    }
}

/// Stores content with one stream, and returns its digest.
pub async fn store(client: &Client, reference: &str, data: &[u8], labels: &[(&str, &str)]) -> Result<String> {
    let (mut upload, _) = Upload::begin(client, stat(reference)).await?;
    let mut last = commit(0, 0, "");
    last.data = data.to_vec();
    last.labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Ok(upload.send(last).await?.digest)
}

/// All or a part of some content.
pub async fn read(client: &Client, digest: &str, offset: i64, size: i64) -> Answer<Vec<u8>> {
    let request = client.request(ReadContentRequest { digest: digest.to_owned(), offset, size });
    let mut blocks = client.api().content().read(request).await?.into_inner();
    let mut all = Vec::new();
    while let Some(block) = blocks.message().await? {
        if usize::try_from(block.offset) != Ok(all.len()) {
            return Err(Status::data_loss(format!("a block at {} after {} bytes", block.offset, all.len())));
        }
        all.extend(block.data);
    }
    Ok(all)
}

/// What is known of content.
pub async fn info(client: &Client, digest: &str) -> Answer<Info> {
    let answer = client.api().content().info(client.request(InfoRequest { digest: digest.to_owned() })).await?;
    Ok(answer.into_inner().info.unwrap_or_default())
}

/// What is known of an ingest.
pub async fn status(client: &Client, reference: &str) -> Answer<Ingest> {
    let answer = client.api().content().status(client.request(StatusRequest { r#ref: reference.to_owned() })).await?;
    Ok(answer.into_inner().status.unwrap_or_default())
}

/// Checks that a call was refused with that code and a message with that in it.
pub fn refused<T: std::fmt::Debug>(answer: Answer<T>, code: tonic::Code, message: &str) -> Result<()> {
    let status = answer.err().context("it was accepted")?;
    ensure!(status.code() == code && status.message().contains(message), "{status:?} instead of {code:?} with {message:?}");
    Ok(())
}
