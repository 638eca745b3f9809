//! What `WWW-Authenticate` headers ask for.

/// One way to authenticate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// With a user and a password.
    Basic,
    /// With a token.
    Bearer {
        /// The URL that tokens are requested at.
        realm: String,
        /// Whose name requests have.
        service: Option<String>,
        /// For what.
        scopes: Vec<String>,
        /// Why the token of the request was refused.
        error: Option<String>,
    },
}

/// All challenges of a response that are known, in its order. What is malformed is passed over.
pub(crate) fn parse<'a>(headers: impl IntoIterator<Item = &'a str>) -> Vec<Challenge> {
    let mut found = Vec::new();
    for header in headers.into_iter().take(HEADERS) {
        if header.len() <= HEADER_BYTES {
            one(header, &mut found);
        }
    }
    found
}

/// A header is a list of schemes, each with a list of parameters: `Bearer realm="…",scope="…", Basic realm="…"`.
fn one(header: &str, found: &mut Vec<Challenge>) {
    let mut rest = header;
    while found.len() < CHALLENGES {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let (scheme, after) = token(rest);
        if scheme.is_empty() {
            return;
        }
        let (parameters, after) = parameters(after);
        rest = after;
        if scheme.eq_ignore_ascii_case("basic") {
            found.push(Challenge::Basic);
        } else if scheme.eq_ignore_ascii_case("bearer") {
            let value = |name: &str| parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.clone());
            if let Some(realm) = value("realm") {
                let scopes =
                    value("scope").unwrap_or_default().split(' ').filter(|scope| !scope.is_empty()).map(ToOwned::to_owned).collect();
                let service = value("service").filter(|service| !service.is_empty());
                found.push(Challenge::Bearer { realm, service, scopes, error: value("error") });
            }
        }
    }
}

/// The parameters after a scheme, and what follows them.
fn parameters(mut rest: &str) -> (Vec<(&str, String)>, &str) {
    let mut found = Vec::new();
    loop {
        let start = rest.trim_start_matches([' ', '\t', ',']);
        let (name, after) = token(start);
        let after = after.trim_start_matches([' ', '\t']);
        // a word without a value is the next scheme, or the end
        let Some(after) = after.strip_prefix('=').filter(|_| !name.is_empty() && found.len() < PARAMETERS) else {
            return (found, start);
        };
        let after = after.trim_start_matches([' ', '\t']);
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => unquoted(quoted),
            None => {
                let end = after.find([',', ' ', '\t']).unwrap_or(after.len());
                (after[..end].to_owned(), &after[end..])
            }
        };
        found.push((name, value));
        rest = after;
    }
}

/// The value of a quoted string whose first quote is taken, and what follows the other.
fn unquoted(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &text[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            _ => value.push(character),
        }
    }
    (value, "")
}

fn token(text: &str) -> (&str, &str) {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    let end = text.bytes().position(|byte| !is_token(byte)).unwrap_or(text.len());
    text.split_at(end)
}

/// Headers of one response, challenges of all of them, and parameters of one challenge that are read.
const HEADERS: usize = 8;
const CHALLENGES: usize = 8;
const PARAMETERS: usize = 32;
const HEADER_BYTES: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scopes: &[&str], error: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(ToOwned::to_owned),
            scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(),
            error: error.map(ToOwned::to_owned),
        }
    }

    #[test]
    fn challenges_are_read_as_servers_write_them() {
        let hub = "Bearer realm=\"https://auth.example/token\",service=\"registry.example\",scope=\"repository:a/b:pull,push\",error=\"invalid_token\"";
        for (header, expected) in [
            (
                hub,
                vec![bearer("https://auth.example/token", Some("registry.example"), &["repository:a/b:pull,push"], Some("invalid_token"))],
            ),
            ("bearer realm=https://t.example/,service=x", vec![bearer("https://t.example/", Some("x"), &[], None)]),
            ("Bearer realm=\"x\" , scope=\"\"", vec![bearer("x", None, &[], None)]),
            ("Bearer realm = \"x\", Scope=\"a b\"", vec![bearer("x", None, &["a", "b"], None)]),
            ("Basic realm=\"a, Bearer realm=\\\"x\\\"\"", vec![Challenge::Basic]),
            ("Negotiate, Basic realm=\"x\", Bearer realm=\"y\"", vec![Challenge::Basic, bearer("y", None, &[], None)]),
            ("Bearer", vec![]),
            ("Bearer scope=\"x\"", vec![]),
            ("Basic", vec![Challenge::Basic]),
            ("Digest realm=\"x\", nonce=\"y\"", vec![]),
            ("Bearer realm=\"unfinished", vec![bearer("unfinished", None, &[], None)]),
            ("=,=,\"", vec![]),
            ("", vec![]),
        ] {
            assert_eq!(parse([header]), expected, "{header}");
        }
        assert_eq!(parse(["Basic", "Bearer realm=x"]).len(), 2);
    }

    #[test]
    fn what_a_challenge_may_hold_is_bounded() {
        assert_eq!(parse(["Basic, ".repeat(100).as_str()]).len(), CHALLENGES);
        assert!(parse([format!("Bearer realm=\"{}\"", "x".repeat(HEADER_BYTES)).as_str()]).is_empty());
        parse([format!("Bearer {}", "a=b,".repeat(4000)).as_str()]);
    }
}
