//! containerd's filter language.
//!
//! ```text
//! filter   := selector ("," selector)*           all must match
//! selector := path [("==" | "!=" | "~=") value]   a path alone: it is present
//! path     := field ("." field)*
//! field    := quoted | [A-Za-z0-9_-]+
//! value    := quoted | anything without "," and white space
//! quoted   := Go's "…"; after ~= also /…/ and |…|, where a backslash keeps the quote's end away
//! ```
//! White space may precede a field, an operator and a value, as in containerd.
//!
//! With several filters, one must match; no filter, or an empty one, matches everything. docs/filters.md names the fields of each kind of object.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::hash::BuildHasher;
use std::iter::Peekable;
use std::str::Chars;
use std::sync::Arc;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use regex_lite::{Regex, RegexBuilder};

use crate::error::{Error, Result};
use crate::store::Wanted;

/// An object that filters are evaluated on.
pub(crate) trait Fields {
    /// The value under a path; none where there is none.
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>>;
}

impl<T: Fields> Fields for Arc<T> {
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
        (**self).field(path)
    }
}

/// The value of a map under what is left of a path; its keys may have dots.
pub(crate) fn label<'a, S: BuildHasher>(labels: &'a HashMap<String, String, S>, path: &[&str]) -> Option<Cow<'a, str>> {
    labels.get(&path.join(".")).map(|value| Cow::Borrowed(value.as_str()))
}

/// A value that counts as absent when it is empty.
pub(crate) fn text(value: &str) -> Option<Cow<'_, str>> {
    (!value.is_empty()).then_some(Cow::Borrowed(value))
}

/// Filters, of which one must match.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter(Vec<Vec<Selector>>);

#[derive(Debug, Clone)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filter {
    /// Parses the filters of a request.
    ///
    /// Errors: [`Error::Invalid`] with the filter and the position.
    pub(crate) fn parse<T: AsRef<str>>(filters: &[T]) -> Result<Self> {
        if filters.len() > MAX_FILTERS {
            return Err(Error::Invalid(format!("{} filters; the maximum is {MAX_FILTERS}", filters.len())));
        }
        let mut budget = Budget { selectors: MAX_SELECTORS, patterns: MAX_PATTERNS };
        filters.iter().map(|filter| parse(filter.as_ref(), &mut budget)).collect::<Result<_>>().map(Self)
    }

    /// Whether it matches every object.
    pub(crate) fn is_for_everything(&self) -> bool {
        self.0.is_empty() || self.0.iter().any(Vec::is_empty)
    }

    /// Labels of which every object that matches has one; none when there are no such labels, or too many to look for.
    pub(crate) fn wanted_labels(&self) -> Option<Vec<Wanted>> {
        if self.is_for_everything() {
            return None;
        }
        let wanted: BTreeSet<_> =
            self.0.iter().map(|selectors| selectors.iter().find_map(Selector::wanted_label)).collect::<Option<_>>()?;
        (wanted.len() <= MAX_WANTED).then(|| wanted.into_iter().collect())
    }

    /// Whether it matches an object.
    pub(crate) fn accepts(&self, object: &impl Fields) -> bool {
        self.accepts_within(object, &mut Allowance { left: Duration::MAX }).unwrap_or(false)
    }

    /// The same, within an allowance; to be called on a thread that serves no client.
    ///
    /// Errors: the allowance is used up. One condition more may have been evaluated.
    pub(crate) fn accepts_within(&self, object: &impl Fields, allowance: &mut Allowance) -> Result<bool, Costly> {
        if self.is_for_everything() {
            return Ok(true);
        }
        let mut spent = Spent { allowance, since: processor_time() };
        'filters: for selectors in &self.0 {
            for selector in selectors {
                let accepts = selector.accepts(object);
                spent.settle()?;
                if !accepts {
                    continue 'filters;
                }
            }
            return Ok(true);
        }
        Ok(false)
    }
}

/// CPU time that a filter may still use. Unlike wall-clock time it does not pass while other processes run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Allowance {
    left: Duration,
}

impl Allowance {
    /// An allowance of that much.
    pub(crate) fn of(left: Duration) -> Self {
        Self { left }
    }

    /// Adds some, up to a limit.
    pub(crate) fn add(&mut self, more: Duration, limit: Duration) {
        self.left = (self.left + more).min(limit);
    }
}

/// An allowance is used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Costly;

struct Spent<'a> {
    allowance: &'a mut Allowance,
    since: Duration,
}

impl Spent<'_> {
    fn settle(&mut self) -> Result<(), Costly> {
        let now = processor_time();
        let left = self.allowance.left.checked_sub(now.saturating_sub(self.since));
        self.since = now;
        self.allowance.left = left.unwrap_or_default();
        left.map(drop).ok_or(Costly)
    }
}

/// CPU time of the calling thread so far.
fn processor_time() -> Duration {
    // every Linux has this clock
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

impl Selector {
    fn wanted_label(&self) -> Option<Wanted> {
        let [field, key @ ..] = &*self.path else { return None };
        let value = match &self.test {
            Test::Present => None,
            Test::Equal(value) => Some(value.clone()),
            Test::NotEqual(_) | Test::Matches(_) => return None,
        };
        (field == "labels").then(|| Wanted { key: key.join("."), value })
    }

    fn accepts(&self, object: &impl Fields) -> bool {
        let path: Vec<_> = self.path.iter().map(String::as_str).collect();
        let value = object.field(&path);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value.is_some_and(|value| value == *wanted),
            Test::NotEqual(unwanted) => value.as_deref().unwrap_or_default() != unwanted,
            Test::Matches(pattern) => {
                let value = value.as_deref().unwrap_or_default();
                pattern.is_match(&value[..value.floor_char_boundary(MAX_VALUE_BYTES)])
            }
        }
    }
}

/// What one request may still use.
struct Budget {
    selectors: usize,
    patterns: usize,
}

impl Budget {
    fn take(left: &mut usize, what: &str, most: usize) -> Result<(), String> {
        *left = left.checked_sub(1).ok_or_else(|| format!("more than {most} {what} in one request,"))?;
        Ok(())
    }
}

fn parse(filter: &str, budget: &mut Budget) -> Result<Vec<Selector>> {
    if filter.len() > MAX_FILTER_BYTES {
        return Err(Error::Invalid(format!("a filter of {} bytes; the maximum is {MAX_FILTER_BYTES}", filter.len())));
    }
    let mut parser = Parser { rest: filter.chars().peekable(), at: 0, budget };
    if filter.is_empty() {
        return Ok(Vec::new());
    }
    parser.selectors().map_err(|expected| Error::Invalid(format!("filter {filter:?}: {expected} at character {}", parser.at)))
}

struct Parser<'a> {
    budget: &'a mut Budget,
    rest: Peekable<Chars<'a>>,
    /// Characters read so far.
    at: usize,
}

impl Parser<'_> {
    fn next(&mut self) -> Option<char> {
        self.at += 1;
        self.rest.next()
    }

    fn take_while(&mut self, accept: impl Fn(char) -> bool) -> String {
        let mut text = String::new();
        while let Some(c) = self.rest.next_if(|c| accept(*c)) {
            self.at += 1;
            text.push(c);
        }
        text
    }

    fn skip_space(&mut self) {
        self.take_while(char::is_whitespace);
    }

    fn selectors(&mut self) -> Result<Vec<Selector>, String> {
        let mut selectors = vec![self.selector()?];
        loop {
            match self.next() {
                None => return Ok(selectors),
                Some(',') => selectors.push(self.selector()?),
                Some(c) => return Err(format!("expected a comma or the end, not {c:?},")),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, String> {
        Budget::take(&mut self.budget.selectors, "conditions", MAX_SELECTORS)?;
        let mut path = vec![self.path_part()?];
        while self.rest.next_if_eq(&'.').is_some() {
            self.at += 1;
            path.push(self.path_part()?);
        }
        // nothing but a comma or the end may follow a path that stands alone
        let is_alone = matches!(self.rest.peek(), None | Some(','));
        self.skip_space();
        let operator = self.take_while(|c| matches!(c, '=' | '!' | '~'));
        let test = match operator.as_str() {
            "" if is_alone => Test::Present,
            "==" => Test::Equal(self.value(false)?),
            "!=" => Test::NotEqual(self.value(false)?),
            "~=" => {
                Budget::take(&mut self.budget.patterns, "patterns", MAX_PATTERNS)?;
                let pattern = self.value(true)?;
                let regex = RegexBuilder::new(&pattern).size_limit(MAX_PATTERN_BYTES).build();
                Test::Matches(regex.map_err(|error| format!("pattern {pattern:?}: {error},"))?)
            }
            other => return Err(format!("expected ==, != or ~=, not {other:?},")),
        };
        Ok(Selector { path, test })
    }

    fn path_part(&mut self) -> Result<String, String> {
        self.skip_space();
        if self.rest.peek() == Some(&'"') {
            return self.quoted();
        }
        let part = self.take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
        if part.is_empty() { Err("expected the name of a field".to_owned()) } else { Ok(part) }
    }

    fn value(&mut self, is_pattern: bool) -> Result<String, String> {
        self.skip_space();
        match self.rest.peek() {
            Some('"') => self.quoted(),
            Some('/' | '|') if is_pattern => self.delimited(),
            _ => {
                let value = self.take_while(|c| c != ',' && !c.is_whitespace());
                if value.is_empty() { Err("expected a value".to_owned()) } else { Ok(value) }
            }
        }
    }

    /// A pattern between slashes or bars.
    fn delimited(&mut self) -> Result<String, String> {
        let end = self.next();
        let mut text = String::new();
        while let Some(c) = self.next() {
            match c {
                c if Some(c) == end => return Ok(text),
                '\\' if self.rest.peek().copied() == end => text.extend(self.next()),
                c => text.push(c),
            }
        }
        Err("expected the end of the pattern".to_owned())
    }

    /// A string as Go writes it.
    fn quoted(&mut self) -> Result<String, String> {
        self.next();
        let mut text = String::new();
        while let Some(c) = self.next() {
            match c {
                '"' => return Ok(text),
                '\\' => text.push(self.escaped()?),
                c => text.push(c),
            }
        }
        Err("expected the end of the quoted text".to_owned())
    }

    fn escaped(&mut self) -> Result<char, String> {
        let simple = match self.next() {
            Some('a') => '\x07',
            Some('b') => '\x08',
            Some('f') => '\x0c',
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some('v') => '\x0b',
            Some(c @ ('\\' | '"' | '\'')) => c,
            Some('x') => return self.number(2, 16, 0),
            Some('u') => return self.number(4, 16, 0),
            Some('U') => return self.number(8, 16, 0),
            Some(c @ '0'..='7') => return self.number(2, 8, c.to_digit(8).unwrap_or_default()),
            _ => return Err("expected an escape that Go knows".to_owned()),
        };
        Ok(simple)
    }

    fn number(&mut self, digits: usize, radix: u32, first: u32) -> Result<char, String> {
        let mut number = first;
        for _digit in 0..digits {
            let digit = self.next().and_then(|c| c.to_digit(radix)).ok_or("expected a digit of an escape")?;
            number = number.checked_mul(radix).and_then(|number| number.checked_add(digit)).ok_or("no such character")?;
        }
        char::from_u32(number).ok_or_else(|| "no such character".to_owned())
    }
}

/// The most filters of one request.
const MAX_FILTERS: usize = 256;
/// Labels to look for in the store. It looks for all of them before each page, while its other callers wait; with more, pages have every object.
const MAX_WANTED: usize = 8;
/// The most conditions of one request.
const MAX_SELECTORS: usize = 1024;
/// The longest filter.
const MAX_FILTER_BYTES: usize = 8192;
/// The most memory that a pattern may take.
const MAX_PATTERN_BYTES: usize = 32 << 10;
/// The most patterns of one request: the cost of one grows with its length times that of the value, while others wait.
const MAX_PATTERNS: usize = 16;
/// Patterns are matched against at most this much of a value; no label is longer.
const MAX_VALUE_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    struct Object(HashMap<String, String>);

    impl Fields for Object {
        fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
            match path {
                ["id"] => text("foo"),
                ["image"] => text(""),
                ["labels", key @ ..] => label(&self.0, key),
                _ => None,
            }
        }
    }

    fn holds(filters: &[&str]) -> bool {
        let labels = [("env", "prod"), ("a.b/c", "x,y"), ("empty", ""), ("n", "7\n"), ("a-b", "c")];
        let object = Object(labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
        Filter::parse(filters).unwrap_or_else(|error| panic!("{filters:?}: {error}")).accepts(&object)
    }

    #[test]
    fn filters_that_hold() {
        for filter in [
            "",
            "id",
            "id==foo",
            "id==\"foo\"",
            "id!=bar",
            "id~=^f",
            "id~=/^fo+$/",
            "id~=|^fo+$|",
            "labels.env==prod",
            "labels.env==prod,id==foo",
            "labels.\"a.b/c\"==\"x,y\"",
            "labels.empty",
            "labels.n==\"7\\n\"",
            "labels.n==\"\\x37\\u000a\"",
            "image!=x",
            "labels.none!=x",
            "labels.env~=/(dev|prod)/",
            "labels.\"a.b/c\"~=/x,/",
            // white space where containerd's scanner passes over it
            " id==foo, labels.env==prod",
            "id == foo,\tlabels. env ~= /pro/",
            "labels.a-b==c",
        ] {
            assert!(holds(&[filter]), "{filter}");
        }
    }

    #[test]
    fn filters_that_do_not_hold() {
        for filter in
            ["id==bar", "id!=foo", "image", "labels.none", "labels.env==prod,id==bar", "none==x", "image==x", "id~=^o", "labels.env==\"\""]
        {
            assert!(!holds(&[filter]), "{filter}");
        }
    }

    #[test]
    fn of_several_filters_one_must_hold() {
        assert!(holds(&[]));
        assert!(holds(&["id==bar", "id==foo"]));
        assert!(!holds(&["id==bar", "id==baz"]));
    }

    #[test]
    fn what_is_no_filter_is_refused_with_its_place() {
        for filter in [
            "==x",
            "id=x",
            "id==",
            "id==x,",
            "id==\"x",
            "id==x ",
            "id ",
            "id x",
            "id==x ,id",
            "labels.",
            "id~=/x",
            "id~=(",
            "id==\"\\q\"",
            "id===x",
            "id==\"\\ud800\"",
        ] {
            let error = Filter::parse(&[filter]).expect_err(filter);
            assert_eq!(error.code(), tonic::Code::InvalidArgument);
            assert!(error.to_string().contains("at character"), "{error}");
        }
        assert!(Filter::parse(&["a".repeat(10_000)]).is_err());
        assert!(Filter::parse(&vec!["id"; 300]).is_err());
    }

    #[test]
    fn what_one_request_may_make_others_wait_for_is_bounded() {
        let patterns = |count| vec!["labels.a~=/(x?){50}/".to_owned(); count];
        assert!(Filter::parse(&patterns(MAX_PATTERNS)).is_ok());
        let error = Filter::parse(&patterns(MAX_PATTERNS + 1)).expect_err("too many").to_string();
        assert!(error.contains("16 patterns"), "{error}");
        let error = Filter::parse(&["id,".repeat(2000) + "id"]).expect_err("too many").to_string();
        assert!(error.contains("1024 conditions"), "{error}");
        assert!(Filter::parse(&["id~=/(x?){100000}/"]).is_err(), "too large");
        let long = Object([("n".to_owned(), "é".repeat(MAX_VALUE_BYTES))].into());
        assert!(Filter::parse(&["labels.n~=/^é+$/"]).expect("a filter").accepts(&long));
    }

    #[test]
    fn nothing_makes_the_parser_panic() {
        let alphabet: Vec<char> = "a.\"\\/|=!~,x7u ü\n".chars().collect();
        let mut seed = 7_u64;
        for _attempt in 0..20_000 {
            let mut filter = String::new();
            for _letter in 0..(seed % 12) {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                filter.push(alphabet[usize::try_from(seed >> 40).expect("24 bits") % alphabet.len()]);
            }
            seed = seed.wrapping_add(1);
            let _any_verdict = Filter::parse(&[filter]);
        }
    }
}
