//! Events, as the core group has them, and how they read in events.k8s.io.

use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{int, remove, semantically_equal, set, text};
use crate::registry::print::{self, Clock, UNKNOWN};
use crate::registry::rules::Rules;
use apimachinery::names::{is_dns1123_subdomain, is_qualified_name};
use apimachinery::status::FieldError;
use serde_json::Value;

/// How fields are called that a selector may name: in the core group, and in events.k8s.io where it differs.
const SELECTABLE: [&str; 11] = [
    "involvedObject.kind",
    "involvedObject.namespace",
    "involvedObject.name",
    "involvedObject.uid",
    "involvedObject.apiVersion",
    "involvedObject.resourceVersion",
    "involvedObject.fieldPath",
    "reason",
    "reportingComponent",
    "source",
    "type",
];
const SELECTABLE_IN_GROUP: [&str; 11] = [
    "regarding.kind",
    "regarding.namespace",
    "regarding.name",
    "regarding.uid",
    "regarding.apiVersion",
    "regarding.resourceVersion",
    "regarding.fieldPath",
    "reason",
    "reportingController",
    "source",
    "type",
];
const TEXT_MAX: usize = 128;
const NOTE_MAX: usize = 1024;

pub const RULES: Rules = Rules {
    name: metadata::path_segment,
    create_on_update: true,
    validate,
    selectable_names: &SELECTABLE,
    selectable,
    row: Some(row),
    ..Rules::DEFAULT
};

/// Of events.k8s.io, which is strict with its clients.
pub const GROUP_RULES: Rules = Rules {
    name: metadata::subdomain,
    validate_create,
    validate_update,
    selectable_names: &SELECTABLE_IN_GROUP,
    ..RULES
};

/// As `legacyValidateEvent`.
fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let (involved, meta) = (root.at("involvedObject"), root.at("metadata"));
    let (about, namespace) = (involved.at("namespace"), meta.at("namespace"));
    let is_new = root.at("eventTime").is_set();
    let own = namespace.str();
    let mismatch = match (is_new, about.str()) {
        (false, "") => own != "default",
        (false, about) => about != own,
        (true, about) => about.is_empty() && own != "default" && own != "kube-system",
    };
    if mismatch {
        errors.invalid(&about, "does not match event.namespace");
    }
    if is_new {
        let controller = root.at("reportingController").with(root.at("reportingComponent").value);
        errors.need(&controller);
        errors.all(&controller, is_qualified_name(controller.str()));
        for name in ["reportingInstance", "action", "reason"] {
            errors.need(&root.at(name));
            bounded(&root.at(name), TEXT_MAX, errors);
        }
        bounded(&root.at("message"), NOTE_MAX, errors);
    }
    for message in is_dns1123_subdomain(own) {
        errors.0.push(FieldError::invalid("namespace", own, message));
    }
}

fn bounded(field: &Field<'_, '_>, max: usize, errors: &mut Errors) {
    if field.str().len() > max {
        errors.invalid_as(field, "", format!("can have at most {max} characters"));
    }
}

/// As `ValidateEventCreate` for events.k8s.io/v1.
fn validate_create(root: &Field<'_, '_>, errors: &mut Errors) {
    series(root, errors);
    if !root.at("eventTime").is_set() {
        errors.required(&root.at("eventTime"), "");
    }
    let kind = root.at("type");
    if !matches!(kind.str(), "Normal" | "Warning") {
        errors.invalid_as(&kind, "", format!("has invalid value: {}", kind.str()));
    }
    let source = root.at("source");
    let sourced = ["component", "host"].iter().any(|part| !source.at(part).is_blank());
    for (name, set) in [
        ("firstTimestamp", root.at("firstTimestamp").is_set()),
        ("lastTimestamp", root.at("lastTimestamp").is_set()),
        ("count", root.at("count").int().unwrap_or(0) != 0),
        ("source", sourced),
    ] {
        if set {
            errors.invalid_as(&root.at(name), "", "needs to be unset");
        }
    }
}

/// As `validateV1EventSeries`.
fn series(root: &Field<'_, '_>, errors: &mut Errors) {
    let series = root.at("series");
    if !series.is_set() {
        return;
    }
    if series.at("count").int().unwrap_or(0) < 2 {
        errors.invalid_as(&series.at("count"), "", "should be at least 2");
    }
    if series.at("lastObservedTime").is_blank() {
        errors.required(&series.at("lastObservedTime"), "");
    }
}

/// What happened, happened: only the series goes on. As `ValidateEventUpdate` for events.k8s.io/v1.
fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    if !semantically_equal(new.at("series").value, old.at("series").value) {
        series(new, errors);
    }
    for name in [
        "involvedObject",
        "reason",
        "message",
        "source",
        "firstTimestamp",
        "lastTimestamp",
        "count",
        "type",
        "eventTime",
        "action",
        "related",
        "reportingComponent",
        "reportingInstance",
    ] {
        let shown = if name == "reportingComponent" { "reportingController" } else { name };
        errors.immutable(&new.at(shown).with(new.at(name).value), &old.at(name));
    }
}

fn selectable(object: &Value) -> Vec<(&'static str, String)> {
    let component = text(object, "/source/component");
    let values = [
        text(object, "/involvedObject/kind"),
        text(object, "/involvedObject/namespace"),
        text(object, "/involvedObject/name"),
        text(object, "/involvedObject/uid"),
        text(object, "/involvedObject/apiVersion"),
        text(object, "/involvedObject/resourceVersion"),
        text(object, "/involvedObject/fieldPath"),
        text(object, "/reason"),
        text(object, "/reportingComponent"),
        if component.is_empty() { text(object, "/reportingComponent") } else { component },
        text(object, "/type"),
    ];
    // One stored form answers for both groups.
    let names = SELECTABLE.iter().zip(SELECTABLE_IN_GROUP).zip(values).filter(|(_, value)| !value.is_empty());
    names
        .flat_map(|((core, group), value)| {
            let other = (*core != group).then(|| (group, value.to_owned()));
            [Some((*core, value.to_owned())), other].into_iter().flatten()
        })
        .collect()
}

/// As `printEvent`.
fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let since = |pointer| clock.since(text(object, pointer));
    let mut first = since("/firstTimestamp");
    if first == UNKNOWN {
        first = since("/eventTime");
    }
    let mut last = since("/lastTimestamp");
    if last == UNKNOWN {
        last.clone_from(&first);
    }
    let mut count = int(object, "/count").unwrap_or(0).max(1);
    if let Some(series) = object.get("series") {
        last = clock.since(text(series, "/lastObservedTime"));
        count = int(series, "/count").unwrap_or(0);
    }
    let kind = text(object, "/involvedObject/kind").to_lowercase();
    let name = text(object, "/involvedObject/name");
    vec![
        Value::from(last),
        Value::from(text(object, "/type")),
        Value::from(text(object, "/reason")),
        Value::from(if name.is_empty() { kind } else { format!("{kind}/{name}") }),
        Value::from(text(object, "/involvedObject/fieldPath")),
        Value::from(source(object)),
        Value::from(text(object, "/message").trim()),
        Value::from(first),
        Value::from(count),
        print::name(object),
    ]
}

fn source(object: &Value) -> String {
    let or = |a: &'static str, b: &'static str| match text(object, a) {
        "" => text(object, b).to_owned(),
        found => found.to_owned(),
    };
    let (component, host) = (or("/source/component", "/reportingComponent"), or("/source/host", "/reportingInstance"));
    if host.is_empty() { component } else { format!("{component}, {host}") }
}

// === events.k8s.io/v1 ===

/// Core name and the name in events.k8s.io.
const RENAMED: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("source", "deprecatedSource"),
];

/// From the core group's form, in which events are stored.
pub fn to_events_group(object: &mut Value) {
    for (core, events) in RENAMED {
        if let Some(value) = remove(object, core) {
            set(object, events, value);
        }
    }
}

pub fn from_events_group(object: &mut Value) {
    for (core, events) in RENAMED {
        if let Some(value) = remove(object, events) {
            set(object, core, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn both_groups_tell_the_same_event() {
        let core = json!({"involvedObject": {"kind": "Pod"}, "message": "m", "count": 2, "reason": "r", "source": {"component": "c"}});
        let mut event = core.clone();
        to_events_group(&mut event);
        assert_eq!(
            (&event["regarding"]["kind"], &event["note"], &event["deprecatedCount"]),
            (&json!("Pod"), &json!("m"), &json!(2))
        );
        from_events_group(&mut event);
        assert_eq!(event, core);
    }

    fn found(check: impl FnOnce(&mut Errors)) -> Vec<String> {
        let mut errors = Errors::default();
        check(&mut errors);
        errors.0.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn old_events_may_be_loose_and_new_ones_not() {
        let old = json!({"metadata": {"namespace": "a"}, "involvedObject": {"namespace": "a"}});
        assert!(found(|errors| validate(&Field::root(&old), errors)).is_empty());
        let elsewhere = json!({"metadata": {"namespace": "a"}, "involvedObject": {"namespace": "b"}});
        assert_eq!(
            found(|errors| validate(&Field::root(&elsewhere), errors)),
            ["involvedObject.namespace: Invalid value: \"b\": does not match event.namespace"]
        );
        let new = json!({"metadata": {"namespace": "a"}, "involvedObject": {"namespace": "a"}, "eventTime": "2024-01-01T00:00:00Z",
            "reportingComponent": "a/b", "reportingInstance": "i", "action": "x".repeat(129)});
        assert_eq!(
            found(|errors| validate(&Field::root(&new), errors)),
            ["action: Invalid value: \"\": can have at most 128 characters", "reason: Required value",]
        );
        let strict = json!({"count": 2, "series": {"count": 1}, "source": {"host": "h"}});
        assert_eq!(
            found(|errors| validate_create(&Field::root(&strict), errors)),
            [
                "series.count: Invalid value: \"\": should be at least 2",
                "series.lastObservedTime: Required value",
                "eventTime: Required value",
                "type: Invalid value: \"\": has invalid value: ",
                "count: Invalid value: \"\": needs to be unset",
                "source: Invalid value: \"\": needs to be unset",
            ]
        );
        assert_eq!(
            found(|errors| validate_update(
                &Field::root(&json!({"reason": "b"})),
                &Field::root(&json!({"reason": "a"})),
                errors
            )),
            ["reason: Invalid value: \"b\": field is immutable"]
        );
    }

    #[test]
    fn both_groups_select_the_same_event() {
        let fields = selectable(&json!({"involvedObject": {"kind": "Pod"}, "reason": "r"}));
        assert_eq!(
            fields,
            [
                ("involvedObject.kind", "Pod".to_owned()),
                ("regarding.kind", "Pod".to_owned()),
                ("reason", "r".to_owned())
            ]
        );
    }

    #[test]
    fn an_event_s_row() {
        let clock = Clock("2024-01-01T00:10:00Z".parse().unwrap());
        let event = json!({"metadata": {"name": "e"}, "involvedObject": {"kind": "Pod", "name": "p"}, "type": "Normal", "reason": "Pulled",
            "message": " done\n", "lastTimestamp": "2024-01-01T00:09:00Z", "firstTimestamp": "2024-01-01T00:00:00Z", "count": 3,
            "source": {"component": "kubelet", "host": "n"}});
        let cells = row(&event, &clock);
        assert_eq!(
            Value::from(cells),
            json!(["60s", "Normal", "Pulled", "pod/p", "", "kubelet, n", "done", "10m", 3, "e"])
        );
    }
}
