//! APIServices: where a group's version is served.

use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{list, set, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::facts::Column;
use serde_json::Value;

const COLUMNS: [Column; 4] = [
    Column { name: "Name", kind: "string", format: "name", priority: 0 },
    Column { name: "Service", kind: "string", format: "", priority: 0 },
    Column { name: "Available", kind: "string", format: "", priority: 0 },
    Column { name: "Age", kind: "string", format: "", priority: 0 },
];

pub const RULES: Rules = Rules {
    name: metadata::path_segment,
    status_keeps_metadata: true,
    unconditional_update: false,
    default: |object| {
        if let Some(service) = object.pointer_mut("/spec/service")
            && service.get("port").is_none()
        {
            set(service, "port", 443);
        }
    },
    validate,
    columns: Some(&COLUMNS),
    row: Some(row),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let (meta, spec) = (root.at("metadata"), root.at("spec"));
    let (group, version, name) = (spec.at("group"), spec.at("version"), meta.at("name"));
    let expected = format!("{}.{}", version.str(), group.str());
    if name.str() != expected {
        errors.invalid(&name, "must be `spec.version+\".\"+spec.group`");
    }
    for priority in ["groupPriorityMinimum", "versionPriority"] {
        let field = spec.at(priority);
        let max = if priority == "versionPriority" { 1000 } else { 20_000 };
        if field.int().is_none_or(|n| n <= 0 || n > max) {
            errors.invalid(&field, format!("must be positive and less than {max}"));
        }
    }
    let service = spec.at("service");
    if !service.is_set() {
        if !spec.at("caBundle").is_blank() {
            errors.invalid(&spec.at("caBundle"), "local APIServices may not have a caBundle");
        }
        if spec.at("insecureSkipTLSVerify").bool() {
            errors.invalid(&spec.at("insecureSkipTLSVerify"), "local APIServices may not have insecureSkipTLSVerify");
        }
        return;
    }
    errors.need(&service.at("namespace"));
    errors.need(&service.at("name"));
    errors.port(&service.at("port"));
    if spec.at("insecureSkipTLSVerify").bool() && !spec.at("caBundle").is_blank() {
        errors.invalid(&spec.at("insecureSkipTLSVerify"), "may not be true if caBundle is present");
    }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let service = match object.pointer("/spec/service") {
        None => "Local".to_owned(),
        Some(service) => format!("{}/{}", text(service, "/namespace"), text(service, "/name")),
    };
    let available = list(object, "/status/conditions").iter().find(|c| c["type"] == "Available");
    let available = match available {
        None => "Unknown".to_owned(),
        Some(c) if c["status"] == "True" => "True".to_owned(),
        Some(c) => format!("{} ({})", text(c, "/status"), text(c, "/reason")),
    };
    vec![print::name(object), Value::from(service), Value::from(available), clock.age(object)]
}
