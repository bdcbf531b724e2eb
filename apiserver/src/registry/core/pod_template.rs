//! PodTemplates.

use super::pod_defaults;
use crate::registry::object::{child, map};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use crate::registry::workload;
use serde_json::Value;

pub const RULES: Rules = Rules {
    generation: true,
    default: |object| pod_defaults::template(child(object, "template")),
    validate: |root, errors| workload::template(&root.at("template"), errors),
    warnings: |new, old| workload::template_warnings(new, old, "/template", "template"),
    row: Some(row),
    ..Rules::DEFAULT
};

fn row(object: &Value, _clock: &Clock) -> Vec<Value> {
    let [containers, images] = print::containers(object.pointer("/template/spec"));
    let labels = print::labels(map(object, "/template/metadata/labels"));
    vec![print::name(object), containers, images, Value::from(labels)]
}
