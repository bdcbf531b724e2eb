//! Times and durations as the API writes them.
use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{MicroTime, Time},
    jiff::Timestamp,
};
use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

/// Now, to the second: what `metav1.Time` carries on the wire.
pub fn now() -> Time {
    Time(Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default())
}

/// Now, to the microsecond.
pub fn now_micro() -> MicroTime {
    MicroTime(Timestamp::from_microsecond(Timestamp::now().as_microsecond()).unwrap_or_default())
}

/// Now, by a clock that never jumps: the wall clock's time when it was first asked for, and what has passed since. For
/// waits of this process; what is written down, or due at a time of day, goes by the wall clock.
pub fn steady() -> Timestamp {
    static START: LazyLock<(Timestamp, Instant)> = LazyLock::new(|| (Timestamp::now(), Instant::now()));
    START.0 + START.1.elapsed()
}

/// `2026-01-02T03:04:05Z`.
pub fn rfc3339(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `Fri, 02 Jan 2026 03:04:05 GMT`, for headers.
pub fn http_date(time: Timestamp) -> String {
    time.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
}

/// How long ago `time` was; zero if it is to come.
pub fn since(time: Timestamp) -> Duration {
    Duration::try_from(Timestamp::now().duration_since(time)).unwrap_or_default()
}

/// A text that is no duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("time: invalid duration {0:?}: write it like \"1h30m\", \"10s\" or \"100ms\"")]
pub struct DurationError(String);

/// Go's duration syntax without a sign: `1h30m`, `1.5s`, `100ms`, `0`.
pub fn parse_duration(text: &str) -> Result<Duration, DurationError> {
    let error = || DurationError(text.to_owned());
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    if text.is_empty() {
        return Err(error());
    }
    let (mut rest, mut total) = (text, 0f64);
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(error)?;
        let number: f64 = rest[..number_end].parse().map_err(|_| error())?;
        rest = &rest[number_end..];
        let unit_end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let seconds = match &rest[..unit_end] {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(error()),
        };
        total += number * seconds;
        rest = &rest[unit_end..];
    }
    Duration::try_from_secs_f64(total).map_err(|_| error())
}

/// Go's `Duration.String`: `1h30m0s`, `1.5s`, `100ms`, `0s`.
pub fn format_duration(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    let fraction = |value: f64, unit: &str| format!("{value}{unit}");
    match nanos {
        0 => "0s".to_owned(),
        1..1_000 => format!("{nanos}ns"),
        1_000..1_000_000 => fraction(nanos as f64 / 1e3, "µs"),
        1_000_000..1_000_000_000 => fraction(nanos as f64 / 1e6, "ms"),
        _ => {
            let seconds = duration.as_secs();
            let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
            let rest = (seconds % 60) as f64 + f64::from(duration.subsec_nanos()) / 1e9;
            match (hours, minutes) {
                (0, 0) => format!("{rest}s"),
                (0, _) => format!("{minutes}m{rest}s"),
                _ => format!("{hours}h{minutes}m{rest}s"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, millis, canonical) in [
            ("0", 0, "0s"),
            ("10s", 10_000, "10s"),
            ("1m30s", 90_000, "1m30s"),
            ("1h", 3_600_000, "1h0m0s"),
            ("1.5s", 1500, "1.5s"),
            ("100ms", 100, "100ms"),
            ("24h0m0s", 86_400_000, "24h0m0s"),
        ] {
            let duration = parse_duration(text).unwrap();
            assert_eq!(duration, Duration::from_millis(millis), "{text}");
            assert_eq!(format_duration(duration), canonical, "{text}");
        }
        for text in ["", "10", "s", "-1s", "1d", "1..2s"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
