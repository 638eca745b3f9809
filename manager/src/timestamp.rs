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

/// The time from nanoseconds since 1970.
pub(crate) fn from_nanos(nanos: i64) -> Timestamp {
    let nanos_of_second = i32::try_from(nanos.rem_euclid(1_000_000_000)).unwrap_or_default();
    Timestamp { seconds: nanos.div_euclid(1_000_000_000), nanos: nanos_of_second }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nanoseconds_lead_back_to_their_time() {
        for time in [Timestamp { seconds: 1_767_323_045, nanos: 6 }, Timestamp { seconds: -1, nanos: 999_999_999 }] {
            assert_eq!(from_nanos(to_nanos(&time)), time);
        }
        assert_eq!(to_nanos(&Timestamp { seconds: i64::MAX, nanos: 0 }), i64::MAX);
    }
}
