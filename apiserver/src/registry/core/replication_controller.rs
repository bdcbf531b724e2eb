//! ReplicationControllers.

use crate::registry::apps::replica_set;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, int, map, set, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use crate::registry::workload;
use serde_json::{Value, json};

pub const RULES: Rules = Rules {
    generation: true,
    default: defaults,
    validate,
    validate_status: replica_set::replica_status,
    warnings: |new, old| {
        let mut warnings: Vec<String> = if old.is_none() {
            crate::registry::checks::host_name_warning(text(new, "/metadata/name")).into_iter().collect()
        } else {
            Vec::new()
        };
        warnings.extend(workload::template_warnings(new, old, "/spec/template", "template"));
        warnings
    },
    selectable_names: &["status.replicas"],
    selectable: |object| vec![("status.replicas", int(object, "/status/replicas").unwrap_or(0).to_string())],
    row: Some(row),
    ..Rules::DEFAULT
};

fn defaults(object: &mut Value) {
    workload::default_template(object);
    workload::default_replicas(child(object, "spec"));
    workload::labels_from_template(object);
    let labels = object.pointer("/spec/template/metadata/labels").cloned();
    if let Some(labels) = labels
        && map(object, "/spec/selector").is_none_or(serde_json::Map::is_empty)
    {
        set(child(object, "spec"), "selector", labels);
    }
}

/// As `ValidateReplicationControllerSpec`.
fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    errors.not_negative(&spec.at("minReadySeconds"));
    let (selector, template) = (spec.at("selector"), spec.at("template"));
    if selector.is_empty() {
        errors.required(&selector, "");
    }
    errors.not_negative(&spec.at("replicas"));
    let labels = template.value.pointer("/metadata/labels");
    if template.is_set() && !selector.is_empty() && !workload::matches(&json!({"matchLabels": selector.value}), labels)
    {
        let meta = template.at("metadata");
        let shown = labels.cloned().unwrap_or_default();
        errors.invalid_as(&meta.at("labels"), shown, "`selector` does not match template `labels`");
    }
    workload::always_template(&template, "ReplicationController", errors);
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let mut cells = replica_set::row(object, clock);
    if let Some(last) = cells.last_mut() {
        *last = Value::from(print::labels(map(object, "/spec/selector")));
    }
    cells
}
