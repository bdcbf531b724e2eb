//! Events, as the core group has them, and how they read in events.k8s.io.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{int, remove, set, text};
use crate::registry::print::{self, Clock, UNKNOWN};
use crate::registry::rules::Rules;
use apimachinery::status::FieldError;
use serde_json::Value;

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

pub const RULES: Rules = Rules {
    create_on_update: true,
    validate,
    selectable_names: &SELECTABLE,
    selectable,
    row: Some(row),
    ..Rules::DEFAULT
};

/// As `legacyValidateEvent`.
fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let involved = root.at("involvedObject").at("namespace").str();
    let meta = root.at("metadata");
    let namespace = meta.at("namespace").str();
    let about_namespaced = !involved.is_empty() && involved != namespace;
    let about_cluster = involved.is_empty() && namespace != "default" && namespace != "kube-system";
    if about_namespaced || about_cluster {
        let object = root.at("involvedObject");
        errors.invalid(&object.at("namespace"), "does not match event.namespace");
    }
    if root.at("eventTime").is_set() {
        // Only new clients write it, and they write the rest as well.
        for required in ["reportingComponent", "reportingInstance", "action", "reason"] {
            let field = root.at(required);
            if field.is_blank() {
                let path =
                    if required == "reportingComponent" { "reportingController".to_owned() } else { field.path() };
                errors.0.push(FieldError::required(path, ""));
            }
        }
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
    SELECTABLE.into_iter().zip(values.map(ToOwned::to_owned)).collect()
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
