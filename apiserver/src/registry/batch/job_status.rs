//! What a job's status may say, and how it may go on: the invariants that the job controllers of everybody rely on.
//! As `ValidateJobStatusUpdate` with the options of the job strategy.

use super::job::indexes;
use crate::registry::checks::invalid_without_value;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{list, text};
use crate::registry::workload;
use serde_json::Value;
use std::collections::HashSet;

/// Does a condition hold?
pub fn is(job: &Value, kind: &str) -> bool {
    list(job, "/status/conditions").iter().any(|c| c["type"] == kind && c["status"] == "True")
}

fn is_finished(job: &Value) -> bool {
    is(job, "Complete") || is(job, "Failed")
}

pub fn validate(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    workload::counts(new, &["active", "succeeded", "failed", "ready", "terminating"], errors);
    let (spec, status) = (new.at("spec"), new.at("status"));
    uncounted(&status.at("uncountedTerminatedPods"), errors);
    conditions(new, old, errors);
    times(new, old, errors);
    let changed = |field: &str| new.value.pointer(field) != old.value.pointer(field);
    let newly_finished = is_finished(new.value) && !is_finished(old.value);
    for (field, why) in [
        ("active", "active>0 is invalid for finished job"),
        ("terminating", "terminating>0 is invalid for finished job"),
    ] {
        let count = status.at(field);
        if (newly_finished || changed(&format!("/status/{field}")))
            && is_finished(new.value)
            && count.int().unwrap_or(0) > 0
        {
            errors.invalid(&count, why);
        }
    }
    let uncounted = status.at("uncountedTerminatedPods");
    if is_finished(new.value) && uncounted.at("succeeded").len() + uncounted.at("failed").len() > 0 {
        errors.invalid(&uncounted, "uncountedTerminatedPods needs to be empty for finished job");
    }
    let (ready, active) = (status.at("ready"), status.at("active").int().unwrap_or(0));
    let pods_changed = changed("/status/ready") || changed("/status/active");
    if pods_changed && ready.int().is_some_and(|ready| ready > active) {
        errors.invalid(&ready, "cannot set more ready pods than active");
    }
    for field in ["failed", "succeeded"] {
        let before = old.value.pointer(&format!("/status/{field}")).and_then(Value::as_i64).unwrap_or(0);
        let count = status.at(field);
        if count.int().unwrap_or(0) < before {
            errors.0.push(apimachinery::status::FieldError::invalid(
                count.path(),
                count.int().unwrap_or(0),
                format!("cannot decrease the {field} counter"),
            ));
        }
    }
    index_lists(&spec, &status, errors);
}

fn uncounted(pods: &Field<'_, '_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for fate in ["succeeded", "failed"] {
        for uid in pods.at(fate).items() {
            if uid.is_blank() {
                errors.invalid(&uid, "must not be empty");
            } else if !seen.insert(uid.str().to_owned()) {
                errors.duplicate(&uid);
            }
        }
    }
}

/// Which conditions exclude each other, need each other, and stay.
fn conditions(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let status = new.at("status");
    let field = status.at("conditions");
    let has = |kind: &str| is(new.value, kind);
    let had = |kind: &str| is(old.value, kind);
    let success_policy = new.value.pointer("/spec/successPolicy").is_some();
    let rules = [
        (has("Complete") && has("Failed"), "cannot set Complete=True and Failed=true conditions"),
        (has("Complete") && has("FailureTarget"), "cannot set Complete=True and FailureTarget=true conditions"),
        (
            has("Failed") && !had("Failed") && !has("FailureTarget"),
            "cannot set Failed=True condition without the FailureTarget=true condition",
        ),
        (
            has("Complete") && !had("Complete") && !has("SuccessCriteriaMet"),
            "cannot set Complete=True condition without the SuccessCriteriaMet=true condition",
        ),
        (has("SuccessCriteriaMet") && has("Failed"), "cannot set SuccessCriteriaMet=True and Failed=true conditions"),
        (
            has("SuccessCriteriaMet") && has("FailureTarget"),
            "cannot set SuccessCriteriaMet=True and FailureTarget=true conditions",
        ),
        (
            success_policy && has("Complete") && !has("SuccessCriteriaMet"),
            "cannot set Complete=True for Job with SuccessPolicy unless SuccessCriteriaMet=True",
        ),
        (had("Failed") && !has("Failed"), "cannot disable the terminal Failed=True condition"),
        (had("Complete") && !has("Complete"), "cannot disable the terminal Complete=True condition"),
        (had("FailureTarget") && !has("FailureTarget"), "cannot disable the terminal FailureTarget=True condition"),
        (
            had("SuccessCriteriaMet") && !has("SuccessCriteriaMet"),
            "cannot disable the SuccessCriteriaMet=True condition",
        ),
        (
            had("Complete") && !had("SuccessCriteriaMet") && has("SuccessCriteriaMet"),
            "cannot set SuccessCriteriaMet=True for Job already has Complete=true conditions",
        ),
    ];
    for (broken, why) in rules {
        if broken {
            invalid_without_value(&field, why, errors);
        }
    }
}

fn times(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let status = new.at("status");
    let (start, completion) = (status.at("startTime"), status.at("completionTime"));
    let before = |field: &str| text(old.value, &format!("/status/{field}"));
    let (is_complete, was_complete) = (is(new.value, "Complete"), is(old.value, "Complete"));
    if !completion.is_blank() && !is_complete {
        errors.invalid(&completion, "cannot set completionTime when there is no Complete=True condition");
    }
    if completion.is_blank() && is_complete && (!was_complete || !before("completionTime").is_empty()) {
        errors.required(&completion, "completionTime is required for Complete jobs");
    }
    let parsed = |field: &Field<'_, '_>| field.str().parse::<jiff::Timestamp>().ok();
    if let (Some(start), Some(end)) = (parsed(&start), parsed(&completion))
        && end < start
    {
        errors.invalid(&completion, "completionTime cannot be set before startTime");
    }
    if start.is_blank() && is_finished(new.value) {
        errors.required(&start, "startTime is required for finished job");
    }
    if !completion.is_blank() && !before("completionTime").is_empty() && completion.str() != before("completionTime") {
        errors.invalid(&completion, "completionTime cannot be mutated");
    }
    let suspended = new.value.pointer("/spec/suspend") == Some(&Value::Bool(true));
    if !before("startTime").is_empty() && start.str() != before("startTime") && !suspended {
        errors.required(&start, "startTime cannot be removed for unsuspended job");
    }
}

/// `completedIndexes` and `failedIndexes`: in order, below completions, without an index in both.
fn index_lists(spec: &Field<'_, '_>, status: &Field<'_, '_>, errors: &mut Errors) {
    let (completed, failed) = (status.at("completedIndexes"), status.at("failedIndexes"));
    let per_index = spec.at("backoffLimitPerIndex").is_set();
    if spec.at("completionMode").str() != "Indexed" && !completed.is_blank() {
        errors.invalid(&completed, "cannot set non-empty completedIndexes when non-indexed completion mode");
    }
    if !per_index && failed.is_set() {
        errors.invalid(&failed, "cannot set non-null failedIndexes when backoffLimitPerIndex is null");
    }
    let Some(completions) = spec.at("completions").int() else { return };
    let mut parsed = Vec::new();
    for (field, name) in [(&completed, "completedIndexes"), (&failed, "failedIndexes")] {
        match indexes(field.str(), completions) {
            Ok(found) => parsed.push(found),
            Err(why) if name == "completedIndexes" || per_index => {
                errors.invalid(field, format!("error parsing {name}: {why}"));
            }
            Err(_) => {}
        }
    }
    if let [completed, failures] = parsed.as_slice()
        && let Some(at) = completed
            .iter()
            .flat_map(|(a, b)| failures.iter().map(move |(c, d)| (*a.max(c), *b.min(d))))
            .filter(|(from, to)| from <= to)
            .map(|(from, _)| from)
            .min()
    {
        errors.invalid(&failed, format!("failedIndexes and completedIndexes overlap at index: {at}"));
    }
}
