//! Values in GVariant's text form, in which annotations name properties of systemd's units.
//!
//! Owns the types that D-Bus has, but for dictionaries and descriptors, which no property of a scope or slice takes.
//!
//! **Invariant:** what is read has one type throughout: an array's elements are of the same one. Length and depth are bounded.
use std::fmt::Write as _;
use std::iter::Peekable;
use std::str::Chars;

/// A value of D-Bus.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Bool(bool),
    Byte(u8),
    I16(i16),
    U16(u16),
    I32(i32),
    U32(u32),
    I64(i64),
    U64(u64),
    Double(f64),
    Text(String),
    Path(String),
    Signature(String),
    /// The signature of an element, and the elements.
    Array(String, Vec<Value>),
    Tuple(Vec<Value>),
    Variant(Box<Value>),
}

impl Value {
    /// `as`, `t`, `a(ss)`.
    #[must_use]
    pub fn signature(&self) -> String {
        match self {
            Self::Bool(_) => "b".to_owned(),
            Self::Byte(_) => "y".to_owned(),
            Self::I16(_) => "n".to_owned(),
            Self::U16(_) => "q".to_owned(),
            Self::I32(_) => "i".to_owned(),
            Self::U32(_) => "u".to_owned(),
            Self::I64(_) => "x".to_owned(),
            Self::U64(_) => "t".to_owned(),
            Self::Double(_) => "d".to_owned(),
            Self::Text(_) => "s".to_owned(),
            Self::Path(_) => "o".to_owned(),
            Self::Signature(_) => "g".to_owned(),
            Self::Array(element, _) => format!("a{element}"),
            Self::Tuple(parts) => format!("({})", parts.iter().map(Self::signature).collect::<String>()),
            Self::Variant(_) => "v".to_owned(),
        }
    }

    pub(crate) fn texts(texts: &[&str]) -> Self {
        Self::Array("s".to_owned(), texts.iter().map(|text| Self::Text((*text).to_owned())).collect())
    }

    pub(crate) fn bytes(bytes: &[u8]) -> Self {
        Self::Array("y".to_owned(), bytes.iter().map(|byte| Self::Byte(*byte)).collect())
    }

    /// Reads a value. Errors: why it is none.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.len() > MAX_BYTES {
            return Err(format!("has {} bytes, more than {MAX_BYTES}", text.len()));
        }
        let mut reader = Reader { rest: text.chars().peekable(), depth: 0 };
        let term = reader.term()?;
        match reader.after_space() {
            None => resolve(term, None).and_then(Self::with_short_signature),
            Some(rest) => Err(format!("{rest:?} after the value")),
        }
    }
}

impl Value {
    /// Refuses what no message can have: the length of a signature is one byte there.
    fn with_short_signature(self) -> Result<Self, String> {
        let length = match &self {
            Self::Signature(text) => text.len(),
            other => other.signature().len(),
        };
        if length > MAX_SIGNATURE_BYTES {
            return Err(format!("has a signature of {length} letters, {MAX_SIGNATURE_BYTES} are the most"));
        }
        match self {
            Self::Array(element, values) => {
                let values = values.into_iter().map(Self::with_short_signature).collect::<Result<_, _>>()?;
                Ok(Self::Array(element, values))
            }
            Self::Tuple(values) => values.into_iter().map(Self::with_short_signature).collect::<Result<_, _>>().map(Self::Tuple),
            Self::Variant(value) => value.with_short_signature().map(|value| Self::Variant(Box::new(value))),
            other => Ok(other),
        }
    }
}

/// A type, as far as the text shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Type {
    Basic(char),
    Array(Box<Type>),
    Tuple(Vec<Type>),
    Variant,
}

impl Type {
    fn parse(letters: &mut Peekable<Chars<'_>>, depth: usize) -> Result<Self, String> {
        let letter = letters.next().filter(|_| depth < MAX_DEPTH).ok_or("a type is not complete, or too deep")?;
        match letter {
            'b' | 'y' | 'n' | 'q' | 'i' | 'u' | 'x' | 't' | 'd' | 's' | 'o' | 'g' => Ok(Self::Basic(letter)),
            'v' => Ok(Self::Variant),
            'a' => Ok(Self::Array(Box::new(Self::parse(letters, depth + 1)?))),
            '(' => {
                let mut parts = Vec::new();
                while letters.next_if_eq(&')').is_none() {
                    parts.push(Self::parse(letters, depth + 1)?);
                }
                Ok(Self::Tuple(parts))
            }
            other => Err(format!("{other:?} is not a type that is taken")),
        }
    }

    fn of_value(value: &Value) -> Result<Self, String> {
        Self::parse(&mut value.signature().chars().peekable(), 0)
    }

    fn signature(&self) -> String {
        match self {
            Self::Basic(letter) => letter.to_string(),
            Self::Array(element) => format!("a{}", element.signature()),
            Self::Tuple(parts) => format!("({})", parts.iter().map(Self::signature).collect::<String>()),
            Self::Variant => "v".to_owned(),
        }
    }
}

/// What is written, before its type is known.
#[derive(Debug)]
enum Term {
    Bool(bool),
    Number(String),
    Text(String),
    Bytes(Vec<u8>),
    Array(Vec<Term>),
    Tuple(Vec<Term>),
    Variant(Box<Term>),
    Typed(Type, Box<Term>),
}

struct Reader<'a> {
    rest: Peekable<Chars<'a>>,
    depth: usize,
}

impl Reader<'_> {
    fn after_space(&mut self) -> Option<char> {
        while self.rest.next_if(char::is_ascii_whitespace).is_some() {}
        self.rest.peek().copied()
    }

    fn term(&mut self) -> Result<Term, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("is deeper than {MAX_DEPTH}"));
        }
        let term = self.any_term();
        self.depth -= 1;
        term
    }

    fn any_term(&mut self) -> Result<Term, String> {
        match self.after_space().ok_or("ends where a value is missing")? {
            '\'' | '"' => self.text().map(Term::Text),
            '[' => self.list(']').map(|(terms, _)| Term::Array(terms)),
            '(' => match self.list(')')? {
                (terms, true) => Ok(Term::Tuple(terms)),
                (terms, false) if terms.len() != 1 => Ok(Term::Tuple(terms)),
                (_, false) => Err("a tuple of one needs a comma".to_owned()),
            },
            '<' => {
                self.rest.next();
                let term = self.term()?;
                self.expect('>')?;
                Ok(Term::Variant(Box::new(term)))
            }
            '@' => {
                self.rest.next();
                let kind = Type::parse(&mut self.rest, 0)?;
                Ok(Term::Typed(kind, Box::new(self.term()?)))
            }
            '{' => Err("dictionaries are not taken".to_owned()),
            _ => self.word(),
        }
    }

    /// The elements of a list, and whether a comma stands before its end.
    fn list(&mut self, end: char) -> Result<(Vec<Term>, bool), String> {
        self.rest.next();
        let mut terms = Vec::new();
        let mut has_comma = false;
        while self.after_space() != Some(end) {
            if !terms.is_empty() && !has_comma {
                return Err(format!("a comma or {end:?} is missing"));
            }
            terms.push(self.term()?);
            has_comma = self.after_space() == Some(',');
            if has_comma {
                self.rest.next();
            }
        }
        self.rest.next();
        // `[1,]` is no list, `(1,)` is a tuple.
        if has_comma && end == ']' { Err("a value is missing after a comma".to_owned()) } else { Ok((terms, has_comma)) }
    }

    fn expect(&mut self, wanted: char) -> Result<(), String> {
        match self.after_space() {
            Some(found) if found == wanted => {
                self.rest.next();
                Ok(())
            }
            _ => Err(format!("{wanted:?} is missing")),
        }
    }

    /// A number, a keyword, or a string of bytes.
    fn word(&mut self) -> Result<Term, String> {
        let is_part = |letter: &char| letter.is_ascii_alphanumeric() || matches!(letter, '+' | '-' | '.' | '_');
        let mut word = String::new();
        while let Some(letter) = self.rest.next_if(is_part) {
            word.push(letter);
        }
        if word == "b" && matches!(self.rest.peek(), Some('\'' | '"')) {
            let mut bytes = self.text()?.into_bytes();
            bytes.push(0);
            return Ok(Term::Bytes(bytes));
        }
        let kind = match word.as_str() {
            "true" => return Ok(Term::Bool(true)),
            "false" => return Ok(Term::Bool(false)),
            "inf" | "+inf" | "-inf" | "nan" => return Ok(Term::Number(word)),
            "boolean" => 'b',
            "byte" => 'y',
            "int16" => 'n',
            "uint16" => 'q',
            "int32" => 'i',
            "uint32" => 'u',
            "int64" => 'x',
            "uint64" => 't',
            "double" => 'd',
            "string" => 's',
            "objectpath" => 'o',
            "signature" => 'g',
            "" => return Err(format!("{:?} begins no value", self.rest.peek().copied().unwrap_or(' '))),
            _ if word.starts_with(|letter: char| letter.is_ascii_digit() || matches!(letter, '+' | '-' | '.')) => {
                return Ok(Term::Number(word));
            }
            _ => return Err(format!("{word:?} is no value")),
        };
        Ok(Term::Typed(Type::Basic(kind), Box::new(self.term()?)))
    }

    fn text(&mut self) -> Result<String, String> {
        let quote = self.rest.next().ok_or("ends where a string is missing")?;
        let mut text = String::new();
        loop {
            match self.rest.next().ok_or("a string has no end")? {
                end if end == quote => return Ok(text),
                '\\' => match self.rest.next().ok_or("a string has no end")? {
                    'a' => text.push('\u{7}'),
                    'b' => text.push('\u{8}'),
                    'f' => text.push('\u{c}'),
                    'n' => text.push('\n'),
                    'r' => text.push('\r'),
                    't' => text.push('\t'),
                    'v' => text.push('\u{b}'),
                    '\n' => {}
                    'u' => text.push(self.code_point(4)?),
                    'U' => text.push(self.code_point(8)?),
                    other => text.push(other),
                },
                '\0' => return Err("a string holds a zero".to_owned()),
                other => text.push(other),
            }
        }
    }

    fn code_point(&mut self, digits: usize) -> Result<char, String> {
        let mut number = 0;
        for _digit in 0..digits {
            let digit = self.rest.next().and_then(|digit| digit.to_digit(16)).ok_or("an escape has too few digits")?;
            number = number << 4 | digit;
        }
        char::from_u32(number).filter(|letter| *letter != '\0').ok_or_else(|| format!("{number:#x} is no character"))
    }
}

/// Gives a term its type: that which is expected, or the one that its form has.
fn resolve(term: Term, expected: Option<&Type>) -> Result<Value, String> {
    let unfit = |what: &str| Err(format!("{what} is not of type {}", expected.map_or_else(String::new, Type::signature)));
    match term {
        Term::Typed(kind, term) => match expected {
            Some(expected) if *expected != kind => Err(format!("types {} and {} in one place", expected.signature(), kind.signature())),
            _ => resolve(*term, Some(&kind)),
        },
        Term::Bool(value) => match expected {
            None | Some(Type::Basic('b')) => Ok(Value::Bool(value)),
            Some(_) => unfit("a boolean"),
        },
        Term::Text(text) => match expected {
            None | Some(Type::Basic('s')) => Ok(Value::Text(text)),
            Some(Type::Basic('o')) if is_object_path(&text) => Ok(Value::Path(text)),
            Some(Type::Basic('g')) => signature(text),
            Some(_) => unfit(&format!("{text:?}")),
        },
        Term::Bytes(bytes) => match expected {
            None => Ok(Value::bytes(&bytes)),
            Some(Type::Array(element)) if **element == Type::Basic('y') => Ok(Value::bytes(&bytes)),
            Some(_) => unfit("a string of bytes"),
        },
        Term::Number(number) => {
            let is_double = !number.contains(['x', 'X']) && number.contains(['.', 'e', 'E', 'n']);
            match expected {
                None if is_double => resolve_number(&number, 'd'),
                None => resolve_number(&number, 'i'),
                Some(Type::Basic(kind)) => resolve_number(&number, *kind),
                Some(_) => unfit(&number),
            }
        }
        Term::Array(terms) => {
            let mut element = match expected {
                None => None,
                Some(Type::Array(element)) => Some((**element).clone()),
                Some(_) => return unfit("an array"),
            };
            let mut values = Vec::new();
            for term in terms {
                let value = resolve(term, element.as_ref())?;
                if element.is_none() {
                    element = Some(Type::of_value(&value)?);
                }
                values.push(value);
            }
            let element = element.ok_or("an empty array needs its type, as in @as []")?;
            Ok(Value::Array(element.signature(), values))
        }
        Term::Tuple(terms) => match expected {
            None => terms.into_iter().map(|term| resolve(term, None)).collect::<Result<_, _>>().map(Value::Tuple),
            Some(Type::Tuple(kinds)) if kinds.len() == terms.len() => {
                terms.into_iter().zip(kinds).map(|(term, kind)| resolve(term, Some(kind))).collect::<Result<_, _>>().map(Value::Tuple)
            }
            Some(_) => unfit("a tuple"),
        },
        Term::Variant(term) => match expected {
            None | Some(Type::Variant) => resolve(*term, None).map(|value| Value::Variant(Box::new(value))),
            Some(_) => unfit("a variant"),
        },
    }
}

fn resolve_number(text: &str, kind: char) -> Result<Value, String> {
    let out_of_range = || format!("{text} is not a number of type {kind}");
    if kind == 'd' {
        // One that is not equal to itself would make two plans of one configuration differ.
        return text.parse().ok().filter(|number: &f64| !number.is_nan()).map(Value::Double).ok_or_else(out_of_range);
    }
    let (is_negative, digits) = match text.strip_prefix(['+', '-']) {
        Some(digits) => (text.starts_with('-'), digits),
        None => (false, text),
    };
    let magnitude = if let Some(digits) = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        i128::from_str_radix(digits, 16)
    } else if digits.len() > 1 && digits.starts_with('0') {
        i128::from_str_radix(digits, 8)
    } else {
        digits.parse()
    };
    let is_plain = digits.bytes().next().is_some_and(|digit| digit.is_ascii_digit());
    let magnitude = magnitude.ok().filter(|_| is_plain).ok_or_else(out_of_range)?;
    let number = if is_negative { -magnitude } else { magnitude };
    let value = match kind {
        'y' => u8::try_from(number).map(Value::Byte),
        'n' => i16::try_from(number).map(Value::I16),
        'q' => u16::try_from(number).map(Value::U16),
        'i' => i32::try_from(number).map(Value::I32),
        'u' => u32::try_from(number).map(Value::U32),
        'x' => i64::try_from(number).map(Value::I64),
        't' => u64::try_from(number).map(Value::U64),
        _ => return Err(out_of_range()),
    };
    value.map_err(|_| out_of_range())
}

fn is_object_path(text: &str) -> bool {
    let is_part = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    text == "/" || text.strip_prefix('/').is_some_and(|rest| rest.split('/').all(is_part))
}

fn signature(text: String) -> Result<Value, String> {
    let mut letters = text.chars().peekable();
    while letters.peek().is_some() {
        Type::parse(&mut letters, 0)?;
    }
    Ok(Value::Signature(text))
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |f: &mut std::fmt::Formatter<'_>, values: &[Self]| {
            values.iter().enumerate().try_for_each(|(index, value)| write!(f, "{}{value}", if index == 0 { "" } else { ", " }))
        };
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::Byte(value) => write!(f, "{value}"),
            Self::I16(value) => write!(f, "{value}"),
            Self::U16(value) => write!(f, "{value}"),
            Self::I32(value) => write!(f, "{value}"),
            Self::U32(value) => write!(f, "{value}"),
            Self::I64(value) => write!(f, "{value}"),
            Self::U64(value) => write!(f, "{value}"),
            Self::Double(value) => write!(f, "{value}"),
            Self::Text(text) | Self::Path(text) | Self::Signature(text) => write!(f, "{text:?}"),
            Self::Array(_, values) => f.write_char('[').and_then(|()| list(f, values)).and_then(|()| f.write_char(']')),
            Self::Tuple(values) => f.write_char('(').and_then(|()| list(f, values)).and_then(|()| f.write_char(')')),
            Self::Variant(value) => write!(f, "<{value}>"),
        }
    }
}

const MAX_BYTES: usize = 4096;
/// D-Bus's own.
const MAX_SIGNATURE_BYTES: usize = 255;
const MAX_DEPTH: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_the_types_that_their_text_has() {
        let text = |text: &str| Value::Text(text.to_owned());
        for (written, expected) in [
            ("true", Value::Bool(true)),
            ("boolean false", Value::Bool(false)),
            ("7", Value::I32(7)),
            ("-7", Value::I32(-7)),
            ("0x1F", Value::I32(31)),
            ("010", Value::I32(8)),
            ("uint64 18446744073709551615", Value::U64(u64::MAX)),
            ("@t 5", Value::U64(5)),
            ("int64 -5", Value::I64(-5)),
            ("uint32 5", Value::U32(5)),
            ("int16 5", Value::I16(5)),
            ("uint16 5", Value::U16(5)),
            ("byte 0xff", Value::Byte(255)),
            ("1.5", Value::Double(1.5)),
            ("double 2", Value::Double(2.0)),
            ("'a\\'b\\n\\u00e4'", text("a'b\nä")),
            ("\"it's\"", text("it's")),
            ("string 'x'", text("x")),
            ("objectpath '/a/b_1'", Value::Path("/a/b_1".to_owned())),
            ("signature 'a(ss)'", Value::Signature("a(ss)".to_owned())),
            ("['a', 'b']", Value::texts(&["a", "b"])),
            ("@as []", Value::texts(&[])),
            ("[uint64 1, 2]", Value::Array("t".to_owned(), vec![Value::U64(1), Value::U64(2)])),
            ("b'ab'", Value::bytes(b"ab\0")),
            ("(1, 'x')", Value::Tuple(vec![Value::I32(1), text("x")])),
            ("(true,)", Value::Tuple(vec![Value::Bool(true)])),
            ("@(st) ('x', 1)", Value::Tuple(vec![text("x"), Value::U64(1)])),
            ("<uint32 1>", Value::Variant(Box::new(Value::U32(1)))),
            (" [ ( 'a' , uint32 1 ) , ( 'b', 2 ) ] ", {
                let pair = |name: &str, number| Value::Tuple(vec![text(name), Value::U32(number)]);
                Value::Array("(su)".to_owned(), vec![pair("a", 1), pair("b", 2)])
            }),
        ] {
            let value = Value::parse(written).unwrap_or_else(|why| panic!("{written}: {why}"));
            assert_eq!(value, expected, "{written}");
            Type::of_value(&value).expect("every value has a type");
        }
    }

    #[test]
    fn what_is_no_value_is_refused_with_the_reason() {
        let deep = "[".repeat(9);
        let long = format!("'{}'", "a".repeat(MAX_BYTES));
        let [wide, signature] = [format!("[<({})>]", "1,".repeat(254)), format!("signature '{}'", "i".repeat(256))];
        for (written, reason) in [
            ("", "ends where a value is missing"),
            ("1 2", "after the value"),
            ("hello", "\"hello\" is no value"),
            ("2147483648", "is not a number of type i"),
            ("uint64 -1", "is not a number of type t"),
            ("byte 256", "is not a number of type y"),
            ("1x", "is not a number"),
            ("--1", "is not a number"),
            ("'open", "has no end"),
            ("nan", "is not a number of type d"),
            ("[]", "needs its type"),
            ("[1, 'a']", "is not of type i"),
            ("[1,]", "a value is missing after a comma"),
            ("[1 2]", "a comma"),
            ("(1)", "needs a comma"),
            ("{'a': 1}", "dictionaries are not taken"),
            ("@a{sv} {}", "is not a type"),
            ("@t 'x'", "is not of type t"),
            ("uint64 int32 1", "in one place"),
            ("objectpath 'a'", "is not of type o"),
            ("<1", "'>' is missing"),
            ("'\\u12'", "too few digits"),
            (deep.as_str(), "deeper than 8"),
            (long.as_str(), "more than 4096"),
            (wide.as_str(), "has a signature of 256 letters, 255 are the most"),
            (signature.as_str(), "has a signature of 256 letters"),
        ] {
            let why = Value::parse(written).expect_err(written);
            assert!(why.contains(reason), "{written}: {why}");
        }
    }
}
