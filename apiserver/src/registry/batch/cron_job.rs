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
    } else if let Err(why) = apimachinery::cron::Schedule::parse(schedule.str()) {
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
