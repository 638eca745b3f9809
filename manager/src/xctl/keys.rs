//! The keys that detach a terminal, in a stream of typed bytes.
//!
//! **Invariant:** bytes are passed on in order and unchanged; those of a complete sequence are not. The beginning of a sequence is held back until
//! the next byte shows whether it is one.

/// Keys, as control characters or letters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Keys(Vec<u8>);

impl Keys {
    /// `ctrl-p,ctrl-q` and the like: letters, and `ctrl-` with a letter or one of `@[\]^_`. Empty: no keys detach.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let key = |word: &str| match (word.strip_prefix("ctrl-").map(str::as_bytes), word.as_bytes()) {
            (Some([byte]), _) if matches!(byte.to_ascii_uppercase(), b'@'..=b'_') => Ok(byte.to_ascii_uppercase() & 0x1f),
            (None, [byte]) if byte.is_ascii_graphic() => Ok(*byte),
            _ => Err(format!("{word:?} should be a letter, or ctrl- and a letter, with commas between keys")),
        };
        if text.is_empty() { Ok(Self(Vec::new())) } else { text.split(',').map(key).collect::<Result<_, _>>().map(Self) }
    }
}

/// Looks for keys in what is typed.
#[derive(Debug)]
pub(crate) struct Scanner {
    keys: Vec<u8>,
    matched: usize,
}

impl Scanner {
    /// For these keys.
    pub(crate) fn new(keys: Keys) -> Self {
        Self { keys: keys.0, matched: 0 }
    }

    /// What of `typed` is to be passed on, with earlier bytes that turned out not to detach; and whether the keys are complete.
    pub(crate) fn scan(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::with_capacity(typed.len());
        for byte in typed {
            if self.keys.get(self.matched) == Some(byte) {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    self.matched = 0;
                    return (passed, true);
                }
                continue;
            }
            // the held bytes and this one may begin with a shorter beginning of the keys
            let mut held = self.keys[..self.matched].to_vec();
            held.push(*byte);
            self.matched = 0;
            let longest = (0..=held.len()).rev().find(|length| self.keys.starts_with(&held[held.len() - length..])).unwrap_or(0);
            passed.extend_from_slice(&held[..held.len() - longest]);
            self.matched = longest;
        }
        (passed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scanner(keys: &str) -> Scanner {
        Scanner::new(Keys::parse(keys).expect("keys"))
    }

    #[test]
    fn the_keys_detach_however_they_arrive() {
        for pieces in [&[&b"ab\x10\x11cd"[..]][..], &[b"ab\x10", b"\x11"], &[b"ab", b"\x10", b"\x11"], &[b"ab\x10\x10", b"\x11"]] {
            let mut scanner = scanner("ctrl-p,ctrl-q");
            let (mut passed, mut detaches) = (Vec::new(), false);
            for piece in pieces {
                let (more, done) = scanner.scan(piece);
                passed.extend(more);
                detaches |= done;
            }
            assert!(detaches && passed.starts_with(b"ab"), "{pieces:?}: {passed:?}");
        }
    }

    #[test]
    fn a_beginning_that_goes_elsewhere_is_passed_on() {
        let mut scanner = scanner("ctrl-p,ctrl-q");
        assert_eq!(scanner.scan(b"\x10"), (vec![], false));
        assert_eq!(scanner.scan(b"x\x10\x10"), (b"\x10x\x10".to_vec(), false));
        assert_eq!(scanner.scan(b"\x11"), (vec![], true));
        let mut scanner = self::scanner("a,a,b");
        assert_eq!(scanner.scan(b"aaab"), (b"a".to_vec(), true));
    }

    #[test]
    fn without_keys_all_is_passed_on() {
        assert_eq!(scanner("").scan(b"\x10\x11"), (b"\x10\x11".to_vec(), false));
        for bad in ["ctrl-", "ctrl-pp", "pp", "ctrl-p,", "ctrl-é", "ctrl-1"] {
            assert!(Keys::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(Keys::parse("ctrl-@,x,ctrl-]"), Ok(Keys(vec![0, b'x', 0x1d])));
    }
}
