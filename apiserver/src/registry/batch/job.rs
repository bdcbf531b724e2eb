//! Jobs: selectors made from their uid, a template that stays, and the words of their status.

use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{child, copy_field, default, flag, int, items_mut, list, semantically_equal, set, text};
use crate::registry::print::{self, Clock, human_duration};
use crate::registry::rules::Rules;
use crate::registry::workload;
use serde_json::{Value, json};

pub const RULES: Rules = Rules {
    generation: true,
    default: defaults,
    prepare_create,
    validate,
    validate_update,
    validate_status: |new, _, errors| workload::counts(new, &["active", "succeeded", "failed", "ready"], errors),
    selectable_names: &["status.successful"],
    selectable: |object| vec![("status.successful", int(object, "/status/succeeded").unwrap_or(0).to_string())],
    row: Some(row),
    ..Rules::DEFAULT
};

/// Labels that tie a job's pods to it.
pub const CONTROLLER_UID: &str = "batch.kubernetes.io/controller-uid";
pub const JOB_NAME: &str = "batch.kubernetes.io/job-name";

/// As `SetDefaults_Job`.
fn defaults(object: &mut Value) {
    workload::default_template(object);
    workload::labels_from_template(object);
    let spec = child(object, "spec");
    let absent = |spec: &Value, field: &str| spec.get(field).is_none_or(Value::is_null);
    if absent(spec, "completions") && absent(spec, "parallelism") {
        set(spec, "completions", 1);
    }
    let backoff_limit = if absent(spec, "backoffLimitPerIndex") { 6 } else { i32::MAX };
    let replacement = if absent(spec, "podFailurePolicy") { "TerminatingOrFailed" } else { "Failed" };
    for (field, value) in [
        ("parallelism", json!(1)),
        ("backoffLimit", json!(backoff_limit)),
        ("suspend", json!(false)),
        ("manualSelector", json!(false)),
        ("completionMode", json!("NonIndexed")),
        ("podReplacementPolicy", json!(replacement)),
    ] {
        if absent(spec, field) {
            set(spec, field, value);
        }
    }
    for rule in spec.pointer_mut("/podFailurePolicy/rules").and_then(Value::as_array_mut).into_iter().flatten() {
        for pattern in items_mut(rule, "onPodConditions") {
            default(pattern, "status", "True");
        }
    }
}

/// As `generateSelector`: a job owns the pods that carry its uid.
fn prepare_create(object: &mut Value) {
    if flag(object, "/spec/manualSelector") {
        return;
    }
    let (uid, name) = (text(object, "/metadata/uid").to_owned(), text(object, "/metadata/name").to_owned());
    let spec = child(object, "spec");
    let labels = child(child(child(spec, "template"), "metadata"), "labels");
    for key in [JOB_NAME, "job-name"] {
        set(labels, key, name.as_str());
    }
    for key in [CONTROLLER_UID, "controller-uid"] {
        set(labels, key, uid.as_str());
    }
    set(child(child(spec, "selector"), "matchLabels"), CONTROLLER_UID, uid);
}

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    job_spec(&spec, errors);
    let selector = spec.at("selector");
    if !selector.is_set() {
        errors.required(&selector, "");
        return;
    }
    metadata::label_selector(&selector, errors);
    workload::selects_template(&selector, &spec.at("template"), errors);
}

/// As `ValidateJobSpec`, for jobs and for the templates of CronJobs.
pub fn job_spec(spec: &Field<'_, '_>, errors: &mut Errors) {
    for count in [
        "parallelism",
        "completions",
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
        "activeDeadlineSeconds",
    ] {
        errors.not_negative(&spec.at(count));
    }
    let (mode, completions) = (spec.at("completionMode"), spec.at("completions"));
    errors.one_of(&mode, &["NonIndexed", "Indexed"]);
    if mode.str() == "Indexed" && !completions.is_set() {
        errors.required(&completions, "when completion mode is Indexed");
    }
    if mode.str() != "Indexed" {
        for indexed in ["backoffLimitPerIndex", "maxFailedIndexes"] {
            let field = spec.at(indexed);
            if field.is_set() {
                errors.invalid(&field, "requires indexed completion mode");
            }
        }
    }
    let replacement = spec.at("podReplacementPolicy");
    errors.one_of(&replacement, &["Failed", "TerminatingOrFailed"]);
    let policy = spec.at("podFailurePolicy");
    if policy.is_set() {
        for rule in policy.at("rules").items() {
            errors.need_one_of(&rule.at("action"), &["Count", "FailIndex", "FailJob", "Ignore"]);
        }
        if replacement.is_set() && replacement.str() != "Failed" {
            errors.not_supported(&replacement, &["Failed"]);
        }
    }
    let template = spec.at("template");
    workload::template(&template, errors);
    let pod = template.at("spec");
    let restart = pod.at("restartPolicy");
    match restart.str() {
        "OnFailure" if policy.is_set() => {
            errors.invalid(&restart, "only \"Never\" is supported when podFailurePolicy is specified");
        }
        "OnFailure" | "Never" => {}
        _ => errors.required(&restart, "valid values: \"OnFailure\", \"Never\""),
    }
}

/// As `ValidateJobUpdate`.
fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (now, was) = (new.at("spec"), old.at("spec"));
    for fixed in
        ["selector", "completionMode", "podFailurePolicy", "backoffLimitPerIndex", "managedBy", "successPolicy"]
    {
        errors.immutable(&now.at(fixed), &was.at(fixed));
    }
    let (completions, before) = (now.at("completions"), was.at("completions"));
    let elastic = now.at("completionMode").str() == "Indexed"
        && completions.int() == now.at("parallelism").int()
        && before.int() == was.at("parallelism").int();
    if !elastic {
        errors.immutable(&completions, &before);
    }
    // A job that has not begun may still be told where to run.
    let template = now.at("template");
    let mut expected = was.at("template").value.clone();
    if flag(old.value, "/spec/suspend") && old.value.pointer("/status/startTime").is_none() {
        let spec = template.at("spec");
        for open in ["affinity", "nodeSelector", "tolerations", "schedulingGates"] {
            copy_field(child(&mut expected, "spec"), spec.value, open);
        }
        let meta = template.at("metadata");
        for open in ["labels", "annotations"] {
            copy_field(child(&mut expected, "metadata"), meta.value, open);
        }
    }
    if !semantically_equal(&expected, template.value) {
        errors.invalid(&template, "field is immutable");
    }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let succeeded = int(object, "/status/succeeded").unwrap_or(0);
    let completions = match (int(object, "/spec/completions"), int(object, "/spec/parallelism").unwrap_or(0)) {
        (Some(wanted), _) => format!("{succeeded}/{wanted}"),
        (None, parallelism) if parallelism > 1 => format!("{succeeded}/1 of {parallelism}"),
        (None, _) => format!("{succeeded}/1"),
    };
    let [containers, images, selector] = workload::wide_cells(object);
    vec![
        print::name(object),
        Value::from(status(object)),
        Value::from(completions),
        Value::from(duration(object, clock)),
        clock.age(object),
        containers,
        images,
        selector,
    ]
}

fn status(object: &Value) -> &'static str {
    let has =
        |kind: &str| list(object, "/status/conditions").iter().any(|c| c["type"] == kind && c["status"] == "True");
    if has("Complete") {
        "Complete"
    } else if has("Failed") {
        "Failed"
    } else if object.pointer("/metadata/deletionTimestamp").is_some() {
        "Terminating"
    } else if has("Suspended") {
        "Suspended"
    } else if has("FailureTarget") {
        "FailureTarget"
    } else if has("SuccessCriteriaMet") {
        "SuccessCriteriaMet"
    } else {
        "Running"
    }
}

fn duration(object: &Value, clock: &Clock) -> String {
    let (start, end) = (text(object, "/status/startTime"), text(object, "/status/completionTime"));
    match (start.parse::<jiff::Timestamp>(), end.parse::<jiff::Timestamp>()) {
        (Ok(start), Ok(end)) => human_duration(end.as_second() - start.as_second()),
        (Ok(_), Err(_)) => clock.since(start),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_selects_the_pods_with_its_uid() {
        let mut job = json!({"metadata": {"name": "j", "uid": "u"}, "spec": {"template": {"spec":
            {"restartPolicy": "Never", "containers": [{"name": "a", "image": "x"}]}}}});
        defaults(&mut job);
        prepare_create(&mut job);
        assert_eq!(job["spec"]["selector"], json!({"matchLabels": {CONTROLLER_UID: "u"}}));
        assert_eq!(job["spec"]["template"]["metadata"]["labels"]["job-name"], "j");
        assert_eq!((&job["spec"]["completions"], &job["spec"]["backoffLimit"]), (&json!(1), &json!(6)));
        let mut errors = Errors::default();
        validate(&Field::root(&job), &mut errors);
        assert!(errors.0.is_empty(), "{:?}", errors.0);
    }

    #[test]
    fn a_job_s_pods_end() {
        let mut job = json!({"metadata": {"name": "j"}, "spec": {"selector": {},
            "template": {"spec": {"containers": [{"name": "a", "image": "x"}]}}}});
        defaults(&mut job);
        let mut errors = Errors::default();
        validate(&Field::root(&job), &mut errors);
        let texts: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
        let restart = "spec.template.spec.restartPolicy: Required value: valid values: \"OnFailure\", \"Never\"";
        assert_eq!(texts, [restart]);
    }
}
