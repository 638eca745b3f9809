//! Durations as Go writes them: numbers with units, like `1h30m` or `1.5s`.

/// A duration in nanoseconds.
pub(crate) fn nanos(text: &str) -> Option<i128> {
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" || rest.is_empty() {
        return (rest == "0").then_some(0);
    }
    let mut sum: i128 = 0;
    while !rest.is_empty() {
        let number = rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.len() > DIGITS || fraction.contains('.') || whole.is_empty() && fraction.is_empty() {
            return None;
        }
        rest = &rest[number.len()..];
        let unit = rest.split(|c: char| c.is_ascii_digit() || c == '.').next()?;
        rest = &rest[unit.len()..];
        let scale: i128 = UNITS.iter().find(|(name, _)| *name == unit)?.1;
        let digits = |text: &str| if text.is_empty() { Some(0) } else { text.parse::<i128>().ok() };
        sum += digits(whole)? * scale;
        // more digits than an hour has nanoseconds say nothing
        let fraction = &fraction[..fraction.len().min(DIGITS)];
        sum += digits(fraction)? * scale / 10_i128.pow(u32::try_from(fraction.len()).ok()?);
        if sum > i128::from(i64::MAX) {
            return None;
        }
    }
    Some(sign * sum)
}

const UNITS: [(&str, i128); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("\u{b5}s", 1_000),
    ("\u{3bc}s", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];
/// The most of a number that are read.
const DIGITS: usize = 19;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_go() {
        for (text, expected) in [
            ("0", Some(0)),
            ("1h30m", Some(5_400_000_000_000)),
            ("1.5s", Some(1_500_000_000)),
            (".5ms", Some(500_000)),
            ("-3us", Some(-3_000)),
            ("+2\u{b5}s", Some(2_000)),
            ("720h", Some(2_592_000_000_000_000)),
            ("", None),
            ("-", None),
            ("1", None),
            ("s", None),
            (".s", None),
            ("1d", None),
            ("1.2.3s", None),
            ("1h ", None),
            ("99999999999999999999h", None),
            ("9999999999h", None),
        ] {
            assert_eq!(nanos(text), expected, "{text:?}");
        }
    }
}
