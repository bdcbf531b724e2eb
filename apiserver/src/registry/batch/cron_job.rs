//! CronJobs.

use super::job::job_spec;
use crate::registry::checks::{Is, check};
use crate::registry::core::pod_defaults;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, default, flag, list, set, text};
use crate::registry::print::{self, Clock, NONE};
use crate::registry::rules::Rules;
use crate::registry::workload;
use serde_json::Value;

/// Eleven characters are left for the suffix of a job's name.
const NAME_MAX: usize = 52;

pub const RULES: Rules = Rules {
    generation: true,
    default: defaults,
    validate_create: |root, errors| {
        validate(root, None, errors);
        let meta = root.at("metadata");
        let name = meta.at("name");
        if name.str().len() > NAME_MAX {
            errors.invalid(&name, format!("must be no more than {NAME_MAX} characters"));
        }
    },
    validate_update: |new, old, errors| validate(new, Some(old), errors),
    warnings: |new, old| {
        let mut warnings = workload::name_warnings(new, old);
        let place = "/spec/jobTemplate/spec/template";
        warnings.extend(workload::template_warnings(new, old, place, "spec.jobTemplate.spec.template"));
        if text(new, "/spec/schedule").contains("TZ") {
            let why = "is not officially supported, see https://kubernetes.io/docs/concepts/workloads/controllers/cron-jobs/ for more details";
            warnings.push(format!("CRON_TZ or TZ used in spec.spec.schedule {why}"));
        }
        warnings
    },
    row: Some(row),
    ..Rules::DEFAULT
};

fn defaults(object: &mut Value) {
    let spec = child(object, "spec");
    default(spec, "concurrencyPolicy", "Allow");
    if spec.get("suspend").is_none_or(Value::is_null) {
        set(spec, "suspend", false);
    }
    for (field, value) in [("successfulJobsHistoryLimit", 3), ("failedJobsHistoryLimit", 1)] {
        if spec.get(field).is_none_or(Value::is_null) {
            set(spec, field, value);
        }
    }
    pod_defaults::template(child(child(child(spec, "jobTemplate"), "spec"), "template"));
}

fn validate(root: &Field<'_, '_>, old: Option<&Field<'_, '_>>, errors: &mut Errors) {
    let spec = root.at("spec");
    let (schedule, zone) = (spec.at("schedule"), spec.at("timeZone"));
    if schedule.is_blank() {
        errors.required(&schedule, "");
    } else if let Err(why) = check_schedule(schedule.str()) {
        errors.invalid(&schedule, why);
    }
    if schedule.str().contains("TZ") {
        // Who wrote the zone into the schedule when one could may go on.
        let had = old.is_some_and(|old| text(old.value, "/spec/schedule").contains("TZ"));
        if !had {
            errors.invalid(&schedule, "cannot use TZ or CRON_TZ in schedule, use timeZone field instead");
        } else if zone.is_set() {
            errors.invalid(&schedule, "cannot use both timeZone field and TZ or CRON_TZ in schedule");
        }
    }
    let same = old.is_some_and(|old| old.value.pointer("/spec/timeZone") == Some(zone.value));
    if zone.is_set() && !same {
        time_zone(&zone, errors);
    }
    check(
        &spec,
        &[
            ("startingDeadlineSeconds", Is::NotNegative),
            ("concurrencyPolicy", Is::RequiredOneOf(&["Allow", "Forbid", "Replace"])),
            ("jobTemplate.spec", Is::By(job_spec)),
            ("successfulJobsHistoryLimit", Is::NotNegative),
            ("failedJobsHistoryLimit", Is::NotNegative),
        ],
        errors,
    );
    let template = spec.at("jobTemplate");
    let job = template.at("spec");
    if job.at("selector").is_set() {
        errors.invalid(&job.at("selector"), "`selector` will be auto-generated");
    }
    if job.at("manualSelector").bool() {
        errors.not_supported(&job.at("manualSelector"), &["nil", "false"]);
    }
}

/// As `validateTimeZone`.
fn time_zone(zone: &Field<'_, '_>, errors: &mut Errors) {
    let name = zone.str();
    let part = |part: &str| {
        (1..=14).contains(&part.len())
            && part != "."
            && part != ".."
            && !part.starts_with('-')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_+".contains(&b))
    };
    if name.is_empty() {
        errors.invalid(zone, "timeZone must be nil or non-empty string");
    } else if !name.split('/').all(part) {
        errors.invalid(zone, format!("unknown time zone {name}"));
    } else if name.eq_ignore_ascii_case("local") {
        errors.invalid(zone, "timeZone must be an explicit time zone as defined in https://www.iana.org/time-zones");
    } else if !jiff::tz::db().is_definitively_empty() && jiff::tz::TimeZone::get(name).is_err() {
        errors.invalid(zone, format!("unknown time zone {name}"));
    }
}

const MONTHS: [&str; 12] = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const DAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

/// Five fields of numbers, names, ranges and steps, or a word like `@hourly`. As cron's standard parser.
pub fn check_schedule(schedule: &str) -> Result<(), String> {
    let schedule = schedule.trim();
    if let Some(word) = schedule.strip_prefix('@') {
        let known = ["yearly", "annually", "monthly", "weekly", "daily", "midnight", "hourly"].contains(&word);
        let every = word.strip_prefix("every ").is_some_and(|d| apimachinery::time::parse_duration(d).is_ok());
        return if known || every { Ok(()) } else { Err(format!("unrecognized descriptor: {schedule}")) };
    }
    let schedule = match schedule.split_once(' ') {
        Some((zone, rest)) if zone.starts_with("TZ=") || zone.starts_with("CRON_TZ=") => rest.trim(),
        _ => schedule,
    };
    let fields: Vec<&str> = schedule.split_whitespace().collect();
    if fields.len() != 5 {
        return Err(format!("expected exactly 5 fields, found {}: [{}]", fields.len(), fields.join(" ")));
    }
    let bounds: [(u32, u32, &[&str]); 5] = [(0, 59, &[]), (0, 23, &[]), (1, 31, &[]), (1, 12, &MONTHS), (0, 6, &DAYS)];
    for (field, (low, high, names)) in fields.iter().zip(bounds) {
        for part in field.split(',') {
            check_part(part, low, high, names)?;
        }
    }
    Ok(())
}

fn check_part(part: &str, low: u32, high: u32, names: &[&str]) -> Result<(), String> {
    let number = |text: &str| -> Result<u32, String> {
        if let Some(at) = names.iter().position(|name| name.eq_ignore_ascii_case(text)) {
            return Ok(low + u32::try_from(at).unwrap_or(0));
        }
        text.parse()
            .map_err(|_| format!("failed to parse int from {text}: strconv.Atoi: parsing {text:?}: invalid syntax"))
    };
    let (range, step) = part.split_once('/').map_or((part, None), |(range, step)| (range, Some(step)));
    let (start, end) = match range {
        "*" | "?" => (low, high),
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
    if let Some(step) = step
        && number(step)? == 0
    {
        return Err(format!("step of range should be a positive number: {part}"));
    }
    Ok(())
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let last = text(object, "/status/lastScheduleTime");
    let [containers, images] = print::containers(object.pointer("/spec/jobTemplate/spec/template/spec"));
    vec![
        print::name(object),
        Value::from(text(object, "/spec/schedule")),
        print::or_none(text(object, "/spec/timeZone")),
        Value::from(if flag(object, "/spec/suspend") { "True" } else { "False" }),
        Value::from(list(object, "/status/active").len()),
        Value::from(if last.is_empty() { NONE.to_owned() } else { clock.since(last) }),
        clock.age(object),
        containers,
        images,
        print::selector(object.pointer("/spec/jobTemplate/spec/selector")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_are_five_fields_or_a_word() {
        for good in
            ["* * * * *", "*/5 0-3,7 1 JAN-mar sun", "@hourly", "@every 1h30m", "0 0 31 12 6", "CRON_TZ=UTC * * * * *"]
        {
            assert_eq!(check_schedule(good), Ok(()), "{good}");
        }
        for bad in ["", "* * * *", "60 * * * *", "* * 0 * *", "*/0 * * * *", "x * * * *", "5-1 * * * *", "@sometimes"] {
            assert!(check_schedule(bad).is_err(), "{bad}");
        }
    }
}
