//! Credentials for a registry, asked of the daemon's client over a stream.

use async_trait::async_trait;
use containerd_client::to_any;
use containerd_client::types::transfer::{AuthRequest, AuthResponse, AuthType};
use tokio::sync::Mutex;

use super::stream::{Stream, decode};
use crate::error::{Error, Result};
use crate::images::registry::{Challenge, Credentials, Secret};

/// The client that has the credentials, asked over its stream.
///
/// **Invariant:** after a question that was not answered in time there is no other. The late answer would be taken for that to the next
/// question, and a credential go to another host.
pub(super) struct Asking(Mutex<Asked>);

struct Asked {
    stream: Option<Stream>,
    /// A question was sent, and not answered yet.
    is_open: bool,
}

impl Asking {
    pub(super) fn new(stream: Stream) -> Self {
        Self(Mutex::new(Asked { stream: Some(stream), is_open: false }))
    }

    /// Takes the stream away, with the number of answers that are still to come in it to questions that were asked here.
    pub(super) async fn leave(&self) -> Option<(Stream, usize)> {
        // whatever asks was given up
        let mut asked = self.0.lock().await;
        let is_open = asked.is_open;
        asked.stream.take().map(|stream| (stream, usize::from(is_open)))
    }
}

#[async_trait]
impl Credentials for Asking {
    async fn of(&self, challenge: &Challenge<'_>) -> Result<Option<Secret>> {
        let request = AuthRequest {
            host: challenge.host.to_owned(),
            reference: challenge.reference.to_owned(),
            wwwauthenticate: challenge.headers.to_vec(),
        };
        // one question at a time
        let mut asked = self.0.lock().await;
        let Asked { stream: Some(stream), is_open: is_open @ false } = &mut *asked else {
            return Err(Error::Precondition("a question for credentials was not answered".to_owned()));
        };
        stream.send(to_any(&request)).await?;
        *is_open = true;
        let answer = stream.receive().await?;
        *is_open = false;
        drop(asked);
        let gone = || Error::Precondition("the client has closed the stream of its credentials".to_owned());
        let answer: AuthResponse =
            decode(&answer.ok_or_else(gone)?).ok_or_else(|| Error::Invalid("credentials cannot be read".to_owned()))?;
        Ok(match answer.auth_type() {
            AuthType::None => None,
            _ if answer.secret.is_empty() => None,
            AuthType::Credentials => Some(Secret::Password { user: answer.username, password: answer.secret }),
            AuthType::Refresh => Some(Secret::RefreshToken(answer.secret)),
            AuthType::Header => Some(Secret::Header(answer.secret)),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::api::stream::stream;

    #[tokio::test]
    async fn a_credential_that_comes_late_goes_to_no_other_host() {
        let answer = AuthResponse { auth_type: AuthType::Credentials.into(), secret: "s".to_owned(), ..AuthResponse::default() };
        let of = |host| Challenge { host, reference: "r", headers: &[] };
        let (in_time, client, _questions) = stream();
        let asking = Asking::new(in_time);
        for host in ["one", "two"] {
            client.send(Ok(to_any(&answer))).await.expect("it receives");
            assert!(asking.of(&of(host)).await.expect("an answer").is_some());
        }
        let given_up = tokio::time::timeout(Duration::from_millis(20), asking.of(&of("one"))).await;
        assert!(given_up.is_err(), "there is no answer yet");
        // its end of the stream may be gone
        let _ = client.send(Ok(to_any(&answer))).await;
        assert_eq!(asking.of(&of("two")).await.expect_err("it was one's").code(), tonic::Code::FailedPrecondition);
    }
}
