//! Points in time, as messages and the log have them.

use std::time::SystemTime;

use prost_types::Timestamp;

/// Now.
pub(crate) fn now() -> Timestamp {
    Timestamp::from(SystemTime::now())
}

/// Nanoseconds since 1970, as the store keeps them; a time without a place on that scale is its end.
pub(crate) fn to_nanos(time: &Timestamp) -> i64 {
    time.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(time.nanos))
}

/// The time of so many nanoseconds since 1970.
pub(crate) fn from_nanos(nanos: i64) -> Timestamp {
    let nanos_of_second = i32::try_from(nanos.rem_euclid(1_000_000_000)).unwrap_or_default();
    Timestamp { seconds: nanos.div_euclid(1_000_000_000), nanos: nanos_of_second }
}

/// RFC 3339 with nanoseconds, UTC.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs();
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}Z", since.subsec_nanos())
}

/// Year, month and day of a day counted from 1970-01-01 (the proleptic Gregorian calendar, years that begin in March).
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        for (days, expected) in
            [(0, (1970, 1, 1)), (59, (1970, 3, 1)), (11_016, (2000, 2, 29)), (19_722, (2023, 12, 31)), (20_512, (2026, 2, 28))]
        {
            assert_eq!(date(days), expected);
        }
    }

    #[test]
    fn nanoseconds_lead_back_to_their_time() {
        for time in [Timestamp { seconds: 1_767_323_045, nanos: 6 }, Timestamp { seconds: -1, nanos: 999_999_999 }] {
            assert_eq!(from_nanos(to_nanos(&time)), time);
        }
        assert_eq!(to_nanos(&Timestamp { seconds: i64::MAX, nanos: 0 }), i64::MAX);
    }
}
