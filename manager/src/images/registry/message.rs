//! What a refusal says.

use std::time::SystemTime;

use serde::Deserialize;

use super::error::Why;
use super::http::Response;
use super::text::retry_after;

/// The body of an error, as the specification has it.
#[derive(Deserialize)]
struct Errors {
    #[serde(default)]
    errors: Vec<One>,
}

#[derive(Deserialize)]
struct One {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// An answer as an error. Only messages in the form of the specification are shown: a body of another kind may come from a server that is no registry.
pub(super) async fn refusal(response: &mut Response) -> Why {
    let retry_after = response.header("retry-after").and_then(|value| retry_after(value, SystemTime::now()));
    // a body that breaks off takes nothing from the status
    let body = response.body.all(BODY_BYTES).await.ok().flatten().unwrap_or_default();
    Why::Status { status: response.status, message: message(&body), retry_after }
}

fn message(body: &[u8]) -> String {
    let Ok(found) = serde_json::from_slice::<Errors>(body) else { return String::new() };
    let one = |one: &One| match (one.code.is_empty(), one.message.is_empty()) {
        (false, false) => format!("{}: {}", one.code, one.message),
        (true, _) => one.message.clone(),
        (false, true) => one.code.clone(),
    };
    let all: Vec<String> = found.errors.iter().take(ERRORS).map(one).filter(|text| !text.is_empty()).collect();
    all.join(", ").chars().filter(|character| !character.is_control()).take(SHOWN).collect()
}

const BODY_BYTES: usize = 64 << 10;
const ERRORS: usize = 4;
/// Characters.
const SHOWN: usize = 300;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_the_specification_are_shown_and_other_bodies_are_not() {
        let both = br#"{"errors":[{"code":"DENIED","message":"no\u0007 access","detail":{"x":1}},{"message":"second"},{"code":"THIRD"}]}"#;
        assert_eq!(message(both), "DENIED: no access, second, THIRD");
        assert_eq!(message(b"<html>secret</html>"), "");
        assert_eq!(message(br#"{"token":"secret"}"#), "");
        assert!(message(format!(r#"{{"errors":[{{"message":"{}"}}]}}"#, "x".repeat(10_000)).as_bytes()).len() <= SHOWN);
    }
}
