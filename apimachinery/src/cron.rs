//! When a CronJob is due: five fields of numbers, names, ranges and steps, or a word like `@hourly`. As the standard
//! parser and the schedules of robfig's cron, with which Kubernetes reads them.
use crate::time::parse_duration;
use jiff::{SignedDuration, Timestamp, ToSpan as _, Unit, ZonedRound, civil, tz::TimeZone};
use std::time::Duration;

/// A schedule that names no time for so many years never will.
const YEARS: i16 = 5;
const MONTHS: [&str; 12] = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const DAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
/// What words stand for.
const WORDS: [(&str, &str); 7] = [
    ("yearly", "0 0 1 1 *"),
    ("annually", "0 0 1 1 *"),
    ("monthly", "0 0 1 * *"),
    ("weekly", "0 0 * * 0"),
    ("daily", "0 0 * * *"),
    ("midnight", "0 0 * * *"),
    ("hourly", "0 * * * *"),
];

/// When something is due.
#[derive(Clone, Debug, PartialEq)]
pub enum Schedule {
    /// So long after the last time.
    Every(Duration),
    /// At times of the clock.
    Times(Times),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Times {
    minutes: Field,
    hours: Field,
    days: Field,
    months: Field,
    weekdays: Field,
    /// `TZ=` before the fields.
    zone: Option<TimeZone>,
}

/// The values that a field allows, a bit each, and whether it allows all by `*`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Field {
    bits: u64,
    any: bool,
}

impl Field {
    fn has(self, value: i8) -> bool {
        u32::try_from(value).is_ok_and(|v| self.bits >> v & 1 == 1)
    }
}

// === impl Schedule ===

impl Schedule {
    /// As `ParseStandard`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (zone, fields) = match text.trim().split_once(' ') {
            Some((zone, rest)) if zone.starts_with("TZ=") || zone.starts_with("CRON_TZ=") => {
                let name = zone.split_once('=').map_or("", |(_, name)| name);
                let zone = TimeZone::get(name).map_err(|e| format!("provided bad location {name}: {e}"))?;
                (Some(zone), rest.trim())
            }
            _ => (None, text.trim()),
        };
        if let Some(every) = fields.strip_prefix("@every ") {
            let every = parse_duration(every).map_err(|e| format!("failed to parse duration {fields}: {e}"))?;
            return Ok(Self::Every(Duration::from_secs(every.as_secs().max(1))));
        }
        if let Some(word) = fields.strip_prefix('@') {
            let known = WORDS.iter().find(|(known, _)| *known == word);
            let (_, fields) = known.ok_or_else(|| format!("unrecognized descriptor: {fields}"))?;
            return Times::parse(fields, zone).map(Self::Times);
        }
        Times::parse(fields, zone).map(Self::Times)
    }

    /// The first time after `after`; None if there is none in years.
    pub fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        match self {
            Self::Every(every) => {
                let whole = Timestamp::from_second(after.as_second()).ok()?;
                whole.checked_add(SignedDuration::try_from(*every).ok()?).ok()
            }
            Self::Times(times) => times.next(after, times.zone.as_ref().unwrap_or(zone)),
        }
    }
}

impl Times {
    fn parse(text: &str, zone: Option<TimeZone>) -> Result<Self, String> {
        let fields: Vec<&str> = text.split_whitespace().collect();
        let [minutes, hours, days, months, weekdays] = fields[..] else {
            return Err(format!("expected exactly 5 fields, found {}: [{}]", fields.len(), fields.join(" ")));
        };
        Ok(Self {
            minutes: field(minutes, 0, 59, &[])?,
            hours: field(hours, 0, 23, &[])?,
            days: field(days, 1, 31, &[])?,
            months: field(months, 1, 12, &MONTHS)?,
            weekdays: field(weekdays, 0, 6, &DAYS)?,
            zone,
        })
    }

    /// Whether it may be on a day: where both kinds of day are given, either will do.
    fn on(&self, date: civil::Date) -> bool {
        let (day, weekday) = (self.days.has(date.day()), self.weekdays.has(date.weekday().to_sunday_zero_offset()));
        if self.days.any || self.weekdays.any { day && weekday } else { day || weekday }
    }

    /// Steps over months, days, hours and minutes that do not fit, as time passes in the zone: an hour that its clocks
    /// leave out has no times, one that comes twice has them twice.
    fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let minute =
            |t: jiff::Zoned| t.round(ZonedRound::new().smallest(Unit::Minute).mode(jiff::RoundMode::Trunc)).ok();
        let mut at = minute(after.to_zoned(zone.clone()).checked_add(1.minute()).ok()?)?;
        let last_year = at.year().checked_add(YEARS)?;
        while at.year() <= last_year {
            let date = at.date();
            at = if !self.months.has(date.month()) {
                date.first_of_month().checked_add(1.month()).ok()?.to_zoned(zone.clone()).ok()?
            } else if !self.on(date) {
                date.tomorrow().ok()?.to_zoned(zone.clone()).ok()?
            } else if !self.hours.has(at.hour()) {
                let left = 60 - i64::from(at.minute());
                at.checked_add(left.minutes()).ok()?
            } else if !self.minutes.has(at.minute()) {
                at.checked_add(1.minute()).ok()?
            } else {
                return Some(at.timestamp());
            };
        }
        None
    }
}

fn field(text: &str, low: u32, high: u32, names: &[&str]) -> Result<Field, String> {
    let mut field = Field::default();
    for part in text.split(',') {
        let part = part_of(part, low, high, names)?;
        field.bits |= part.bits;
        field.any |= part.any;
    }
    Ok(field)
}

/// `*`, `3`, `3-7`, each with a step if need be. As `getRange`.
fn part_of(part: &str, low: u32, high: u32, names: &[&str]) -> Result<Field, String> {
    let number = |text: &str| -> Result<u32, String> {
        if let Some(at) = names.iter().position(|name| name.eq_ignore_ascii_case(text)) {
            return Ok(low + u32::try_from(at).unwrap_or(0));
        }
        text.parse()
            .map_err(|_| format!("failed to parse int from {text}: strconv.Atoi: parsing {text:?}: invalid syntax"))
    };
    let (range, step) = part.split_once('/').map_or((part, None), |(range, step)| (range, Some(step)));
    let all = matches!(range, "*" | "?");
    let (start, end) = match range {
        _ if all => (low, high),
        _ => match range.split_once('-') {
            Some((a, b)) => (number(a)?, number(b)?),
            None => {
                let at = number(range)?;
                (at, if step.is_some() { high } else { at })
            }
        },
    };
    if start < low {
        return Err(format!("beginning of range ({start}) below minimum ({low}): {part}"));
    }
    if end > high {
        return Err(format!("end of range ({end}) above maximum ({high}): {part}"));
    }
    if start > end {
        return Err(format!("beginning of range ({start}) beyond end of range ({end}): {part}"));
    }
    let step = step.map_or(Ok(1), number)?;
    if step == 0 {
        return Err(format!("step of range should be a positive number: {part}"));
    }
    let bits = (start..=end).step_by(step as usize).fold(0, |bits, at| bits | 1 << at);
    Ok(Field { bits, any: all && step == 1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_are_five_fields_or_a_word() {
        for good in
            ["* * * * *", "*/5 0-3,7 1 JAN-mar sun", "@hourly", "@every 1h30m", "0 0 31 12 6", "CRON_TZ=UTC * * * * *"]
        {
            assert!(Schedule::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "* * * *", "60 * * * *", "* * 0 * *", "*/0 * * * *", "x * * * *", "5-1 * * * *", "@sometimes"] {
            assert!(Schedule::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_come_as_the_clock_of_the_zone_says() {
        for (schedule, zone, after, expected) in [
            ("*/15 * * * *", "UTC", "2026-07-09T14:45:00Z", "2026-07-09T15:00:00Z"),
            ("*/15 * * * *", "UTC", "2026-07-09T14:59:59Z", "2026-07-09T15:00:00Z"),
            ("20-35/15 * * * *", "UTC", "2026-07-09T14:45:00Z", "2026-07-09T15:20:00Z"),
            ("0 0 29 2 *", "UTC", "2026-07-09T00:00:00Z", "2028-02-29T00:00:00Z"),
            ("0 0 1 */3 *", "UTC", "2026-07-09T00:00:00Z", "2026-10-01T00:00:00Z"),
            ("30 23 * * sun", "UTC", "2026-07-09T00:00:00Z", "2026-07-12T23:30:00Z"),
            // Either kind of day, or both where one is a star.
            ("0 0 13 * fri", "UTC", "2026-07-09T00:00:00Z", "2026-07-10T00:00:00Z"),
            ("0 0 */2 * sun", "UTC", "2026-07-09T00:00:00Z", "2026-07-11T00:00:00Z"),
            ("0 0 31 2 *", "UTC", "2026-07-09T00:00:00Z", ""),
            ("@daily", "UTC", "2026-07-09T00:00:00Z", "2026-07-10T00:00:00Z"),
            ("@every 90s", "UTC", "2026-07-09T00:00:00.5Z", "2026-07-09T00:01:30Z"),
            ("0 9 * * *", "Asia/Tokyo", "2026-07-09T00:00:00Z", "2026-07-10T00:00:00Z"),
            ("TZ=Asia/Tokyo 0 9 * * *", "UTC", "2026-07-08T23:00:00Z", "2026-07-09T00:00:00Z"),
            ("0 0 * * *", "Asia/Kathmandu", "2026-07-09T00:00:00Z", "2026-07-09T18:15:00Z"),
            // 02:30 is left out when clocks go forward, 01:30 comes twice when they go back.
            ("30 2 * * *", "America/New_York", "2026-03-08T06:00:00Z", "2026-03-09T06:30:00Z"),
            ("30 1 * * *", "America/New_York", "2026-11-01T04:00:00Z", "2026-11-01T05:30:00Z"),
            ("30 1 * * *", "America/New_York", "2026-11-01T05:30:00Z", "2026-11-01T06:30:00Z"),
        ] {
            let zone = TimeZone::get(zone).unwrap();
            let got = Schedule::parse(schedule).unwrap().next(after.parse().unwrap(), &zone);
            assert_eq!(got.map(|t| t.to_string()).unwrap_or_default(), expected, "{schedule} after {after}");
        }
    }
}
