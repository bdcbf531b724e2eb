//! Jobs: selectors made from their uid, a template that stays, and the words of their status.

use super::job_status;
use crate::registry::checks::{Is, check, domain_prefixed_path, fixed, invalid_without_value};
use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{
    child, copy_field, default, flag, int, items_mut, list, remove, semantically_equal, set, text,
};
use crate::registry::print::{self, Clock, human_duration};
use crate::registry::rules::Rules;
use crate::registry::workload;
use apimachinery::names::is_qualified_name;
use serde_json::{Value, json};
use std::collections::HashSet;

const MANAGED_BY_MAX: usize = 63;
/// Rules of a policy, and patterns of a rule.
const RULES_MAX: usize = 20;
const EXIT_CODES_MAX: usize = 255;
const SUCCEEDED_INDEXES_MAX_BYTES: usize = 64 * 1024;
/// Indexes that run at once, that may fail, and that count as many.
const INDEXED_MAX: i64 = 100_000;
const MANY_COMPLETIONS_MAX: i64 = 10_000;

pub const RULES: Rules = Rules {
    generation: true,
    default: defaults,
    prepare_create,
    validate,
    validate_create,
    validate_update,
    validate_status: job_status::validate,
    warnings: workload::name_warnings,
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

/// The labels of a job's pods, by the names of today and of old.
fn own_labels<'a>(name: &'a str, uid: &'a str) -> [(&'static str, &'a str); 4] {
    [("controller-uid", uid), ("job-name", name), (CONTROLLER_UID, uid), (JOB_NAME, name)]
}

/// As `generateSelector`: a job owns the pods that carry its uid. Labels that the author gave himself stay, and are
/// refused later on.
fn prepare_create(object: &mut Value) {
    if flag(object, "/spec/manualSelector") {
        return;
    }
    let (uid, name) = (text(object, "/metadata/uid").to_owned(), text(object, "/metadata/name").to_owned());
    let spec = child(object, "spec");
    let labels = child(child(child(spec, "template"), "metadata"), "labels");
    for (key, value) in own_labels(&name, &uid) {
        default(labels, key, value);
    }
    default(child(child(spec, "selector"), "matchLabels"), CONTROLLER_UID, uid);
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

/// The selector and the labels are this job's own, unless the author says that he knows better. And the pods of the last
/// index must have a name that a host may have.
fn validate_create(root: &Field<'_, '_>, errors: &mut Errors) {
    let (meta, spec) = (root.at("metadata"), root.at("spec"));
    let (name, uid) = (meta.at("name"), meta.at("uid"));
    if !spec.at("manualSelector").bool() && spec.at("selector").is_set() {
        let own = own_labels(name.str(), uid.str());
        let (template, selector) = (spec.at("template"), spec.at("selector"));
        let template_meta = template.at("metadata");
        let labels = template_meta.at("labels");
        for (key, value) in own {
            let label = labels.key(key);
            if !label.is_set() {
                errors.required(&label, &format!("must be '{value}'"));
            } else if label.str() != value {
                errors.invalid(&label, format!("must be '{value}'"));
            }
        }
        let own = Value::from_iter(own.map(|(key, value)| (key, Value::from(value))));
        if !workload::matches(selector.value, Some(&own)) {
            errors.invalid(&selector, "`selector` not auto-generated");
        }
    }
    if let Some(completions) = spec.at("completions").int().filter(|n| *n > 0)
        && spec.at("completionMode").str() == "Indexed"
    {
        let last = format!("{}-{}", name.str(), completions - 1);
        if !apimachinery::names::is_dns1123_label(&last).is_empty() {
            errors.invalid(&name, format!("will not able to create pod with invalid DNS label: {last}"));
        }
    }
}

/// As `validateJobSpec`, for jobs and for the templates of CronJobs.
pub fn job_spec(spec: &Field<'_, '_>, errors: &mut Errors) {
    check(
        spec,
        &[
            ("parallelism", Is::NotNegative),
            ("completions", Is::NotNegative),
            ("activeDeadlineSeconds", Is::NotNegative),
            ("backoffLimit", Is::NotNegative),
            ("ttlSecondsAfterFinished", Is::NotNegative),
            ("backoffLimitPerIndex", Is::NotNegative),
            ("maxFailedIndexes", Is::NotNegative),
            ("completionMode", Is::OneOf(&["NonIndexed", "Indexed"])),
        ],
        errors,
    );
    if spec.at("maxFailedIndexes").is_set() && !spec.at("backoffLimitPerIndex").is_set() {
        errors.required(&spec.at("backoffLimitPerIndex"), "when maxFailedIndexes is specified");
    }
    let manager = spec.at("managedBy");
    if manager.is_set() {
        domain_prefixed_path(&manager, errors);
        Is::Bytes(MANAGED_BY_MAX).check(&manager, errors);
    }
    if spec.at("completionMode").str() == "Indexed" {
        indexed(spec, errors)
    } else {
        not_indexed(spec, errors)
    }
    failure_policy(spec, errors);
    let policy = spec.at("successPolicy");
    if policy.is_set() && spec.at("completionMode").str() == "Indexed" {
        success_policy(&policy, spec.at("completions").int().unwrap_or(0), errors);
    }
    let (replacement, failure) = (spec.at("podReplacementPolicy"), spec.at("podFailurePolicy").is_set());
    errors.one_of(&replacement, if failure { &["Failed"] } else { &["Failed", "TerminatingOrFailed"] });
    let template = spec.at("template");
    workload::template(&template, errors);
    let pod = template.at("spec");
    let restart = pod.at("restartPolicy");
    match restart.str() {
        "Always" | "" => errors.required(&restart, "valid values: \"OnFailure\", \"Never\""),
        "OnFailure" if failure => {
            errors.invalid(&restart, "only \"Never\" is supported when podFailurePolicy is specified");
        }
        "OnFailure" | "Never" => {}
        _ => errors.not_supported(&restart, &["OnFailure", "Never"]),
    }
}

/// Limits that keep the lists of indexes in a status short.
fn indexed(spec: &Field<'_, '_>, errors: &mut Errors) {
    let (completions, parallelism, most) =
        (spec.at("completions"), spec.at("parallelism"), spec.at("maxFailedIndexes"));
    if !completions.is_set() {
        errors.required(&completions, "when completion mode is Indexed");
    }
    let above = |field: &Field<'_, '_>, limit: i64| field.int().is_some_and(|n| n > limit);
    if above(&parallelism, INDEXED_MAX) {
        let why = format!("must be less than or equal to {INDEXED_MAX} when completion mode is Indexed");
        errors.invalid(&parallelism, why);
    }
    if completions.int().is_some_and(|all| above(&most, all)) {
        errors.invalid(&most, "must be less than or equal to completions");
    }
    if above(&most, INDEXED_MAX) {
        errors.invalid(&most, format!("must be less than or equal to {INDEXED_MAX}"));
    }
    if above(&completions, INDEXED_MAX) && spec.at("backoffLimitPerIndex").is_set() {
        if !most.is_set() {
            errors.required(&most, &format!("must be specified when completions is above {INDEXED_MAX}"));
        }
        for field in [&parallelism, &most] {
            if above(field, MANY_COMPLETIONS_MAX) {
                errors.invalid(
                    field,
                    format!(
                        "must be less than or equal to {MANY_COMPLETIONS_MAX} when completions are above {INDEXED_MAX} and used with backoff limit per index"
                    ),
                );
            }
        }
    }
}

fn not_indexed(spec: &Field<'_, '_>, errors: &mut Errors) {
    for name in ["backoffLimitPerIndex", "maxFailedIndexes", "successPolicy"] {
        let field = spec.at(name);
        if field.is_set() {
            errors.invalid(&field, "requires indexed completion mode");
        }
    }
}

fn failure_policy(spec: &Field<'_, '_>, errors: &mut Errors) {
    let policy = spec.at("podFailurePolicy");
    let rules = policy.at("rules");
    Is::AtMost(RULES_MAX).check(&rules, errors);
    let containers: HashSet<&str> = ["/template/spec/containers", "/template/spec/initContainers"]
        .iter()
        .flat_map(|at| list(spec.value, at).iter().map(|c| text(c, "/name")))
        .collect();
    for rule in rules.items() {
        let action = rule.at("action");
        match action.str() {
            "" => errors.required(&action, r#"valid values: ["Count" "FailIndex" "FailJob" "Ignore"]"#),
            "FailIndex" if !spec.at("backoffLimitPerIndex").is_set() => {
                errors.invalid(&action, "requires the backoffLimitPerIndex to be set");
            }
            _ => errors.one_of(&action, &["Count", "FailIndex", "FailJob", "Ignore"]),
        }
        let (codes, conditions) = (rule.at("onExitCodes"), rule.at("onPodConditions"));
        if codes.is_set() {
            exit_codes(&codes, &containers, errors);
        }
        Is::AtMost(RULES_MAX).check(&conditions, errors);
        for pattern in conditions.items() {
            let (kind, status) = (pattern.at("type"), pattern.at("status"));
            errors.all(&kind, is_qualified_name(kind.str()));
            if status.is_blank() {
                errors.required(&status, r#"valid values: ["False" "True" "Unknown"]"#);
            } else {
                errors.one_of(&status, &["False", "True", "Unknown"]);
            }
        }
        match (codes.is_set(), conditions.is_empty()) {
            (true, false) => {
                invalid_without_value(&rule, "specifying both OnExitCodes and OnPodConditions is not supported", errors)
            }
            (false, true) => {
                invalid_without_value(&rule, "specifying one of OnExitCodes and OnPodConditions is required", errors);
            }
            _ => {}
        }
    }
}

fn exit_codes(codes: &Field<'_, '_>, containers: &HashSet<&str>, errors: &mut Errors) {
    let (operator, name, values) = (codes.at("operator"), codes.at("containerName"), codes.at("values"));
    if operator.is_blank() {
        errors.required(&operator, r#"valid values: ["In" "NotIn"]"#);
    } else {
        errors.one_of(&operator, &["In", "NotIn"]);
    }
    if name.is_set() && !containers.contains(name.str()) {
        errors.invalid(&name, "must be one of the container or initContainer names in the pod template");
    }
    if values.is_empty() {
        errors.invalid(&values, "at least one value is required");
    }
    Is::AtMost(EXIT_CODES_MAX).check(&values, errors);
    let mut seen = HashSet::new();
    for value in values.items() {
        if operator.str() == "In" && value.int() == Some(0) {
            errors.invalid(&value, "must not be 0 for the In operator");
        }
        if !seen.insert(value.int()) {
            errors.duplicate(&value);
        }
    }
    if !list(values.value, "").is_sorted_by_key(Value::as_i64) {
        errors.invalid(&values, "must be ordered");
    }
}

fn success_policy(policy: &Field<'_, '_>, completions: i64, errors: &mut Errors) {
    let rules = policy.at("rules");
    if rules.is_empty() {
        errors.required(&rules, "at least one rules must be specified when the successPolicy is specified");
    }
    Is::AtMost(RULES_MAX).check(&rules, errors);
    for rule in rules.items() {
        let (which, count) = (rule.at("succeededIndexes"), rule.at("succeededCount"));
        if !which.is_set() && !count.is_set() {
            errors.required(&rule, "at least one of succeededCount or succeededIndexes must be specified");
        }
        Is::Bytes(SUCCEEDED_INDEXES_MAX_BYTES).check(&which, errors);
        let total = match indexes(which.str(), completions) {
            Ok(found) => found.iter().map(|(from, to)| to - from + 1).sum(),
            Err(why) => {
                errors.invalid(&which, format!("error parsing succeededIndexes: {why}"));
                0
            }
        };
        errors.not_negative(&count);
        let Some(wanted) = count.int() else { continue };
        if wanted > completions {
            let why = format!("must be less than or equal to {completions} (the number of specified completions)");
            errors.invalid(&count, why);
        }
        if which.is_set() && wanted > total {
            let why = "the number of indexes in the specified succeededIndexes field";
            errors.invalid(&count, format!("must be less than or equal to {total} ({why})"));
        }
    }
}

/// `1,3-5,7` as pairs of first and last, all below `completions`. As `validateIndexesFormat`.
pub fn indexes(text: &str, completions: i64) -> Result<Vec<(i64, i64)>, String> {
    let number = |text: &str| -> Result<i64, String> {
        let number = text.parse().map_err(|_| format!("cannot convert string to integer for index: {text:?}"))?;
        if number >= completions { Err(format!("too large index: {text:?}")) } else { Ok(number) }
    };
    let not_growing = |a: i64, b: i64| Err(format!("non-increasing order, previous: {a}, current: {b}"));
    let mut found: Vec<(i64, i64)> = Vec::new();
    for interval in text.split(',').filter(|_| !text.is_empty()) {
        let parts: Vec<&str> = interval.split('-').collect();
        let (from, to) = match parts.as_slice() {
            [one] => (number(one)?, number(one)?),
            [from, to] => match (number(from)?, number(to)?) {
                (from, to) if from >= to => return not_growing(from, to),
                both => both,
            },
            _ => {
                return Err(format!(
                    "the fragment {interval:?} violates the requirement that an index interval can have at most two parts separated by '-'"
                ));
            }
        };
        if let Some((_, last)) = found.last().filter(|(_, last)| *last >= from) {
            return not_growing(*last, from);
        }
        found.push((from, to));
    }
    Ok(found)
}

/// As `ValidateJobUpdate`.
fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (now, was) = (new.at("spec"), old.at("spec"));
    let (completions, before) = (now.at("completions"), was.at("completions"));
    if now.at("completionMode").str() != "Indexed" {
        errors.immutable(&completions, &before);
    } else if completions.is_set()
        && completions.int() != before.int()
        && completions.int() != now.at("parallelism").int()
    {
        errors.invalid(&completions, "can only be modified in tandem with spec.parallelism");
    }
    errors.immutable(&now.at("selector"), &was.at("selector"));
    let template = now.at("template");
    if !semantically_equal(&template_as_it_may_be(template.value, old.value), template.value) {
        errors.invalid(&template, "field is immutable");
    }
    fixed(
        new,
        old,
        &[
            "spec.completionMode",
            "spec.podFailurePolicy",
            "spec.backoffLimitPerIndex",
            "spec.managedBy",
            "spec.successPolicy",
        ],
        errors,
    );
}

/// The old template with what may change on a job that does not run: where its pods may go, and what they ask for.
fn template_as_it_may_be(new: &Value, old: &Value) -> Value {
    let mut expected = old.pointer("/spec/template").cloned().unwrap_or_default();
    let suspended = flag(old, "/spec/suspend");
    let idle = suspended && job_status::is(old, "Suspended") && int(old, "/status/active").unwrap_or(0) == 0;
    if !(idle || suspended && old.pointer("/status/startTime").is_none()) {
        return expected;
    }
    let (new_spec, nothing) = (new.get("spec").cloned().unwrap_or_default(), json!({}));
    let spec = child(&mut expected, "spec");
    for open in ["nodeSelector", "tolerations", "schedulingGates"] {
        copy_field(spec, &new_spec, open);
    }
    let node_affinity = new_spec.pointer("/affinity/nodeAffinity");
    if node_affinity.is_some() || spec.pointer("/affinity/nodeAffinity").is_some() {
        copy_field(child(spec, "affinity"), new_spec.get("affinity").unwrap_or(&nothing), "nodeAffinity");
    }
    if new_spec.get("affinity").is_none() && spec.get("affinity") == Some(&nothing) {
        remove(spec, "affinity");
    }
    for kind in ["containers", "initContainers"] {
        for (at, container) in items_mut(spec, kind).enumerate() {
            if let Some(new) = list(&new_spec, &format!("/{kind}")).get(at) {
                copy_field(container, new, "resources");
            }
        }
    }
    let new_meta = new.get("metadata").unwrap_or(&nothing);
    for open in ["labels", "annotations"] {
        copy_field(child(&mut expected, "metadata"), new_meta, open);
    }
    expected
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
    let is = |kind: &&&str| job_status::is(object, kind);
    if let Some(done) = ["Complete", "Failed"].iter().find(|kind| is(kind)) {
        return done;
    }
    if object.pointer("/metadata/deletionTimestamp").is_some() {
        return "Terminating";
    }
    ["Suspended", "FailureTarget", "SuccessCriteriaMet"].iter().find(|kind| is(kind)).unwrap_or(&"Running")
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
