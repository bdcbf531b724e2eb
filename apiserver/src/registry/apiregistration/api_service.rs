//! APIServices: where a group's version is served.

use crate::registry::checks::{Is, check};
use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{list, set, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::facts::Column;
use apimachinery::names::{is_dns1035_label, is_dns1123_subdomain};
use apimachinery::status::FieldError;
use serde_json::{Value, json};

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
    // What is served here is there.
    initial_status: Some(|object| match object.pointer("/spec/service") {
        Some(service) if !service.is_null() => Value::Null,
        _ => json!({"conditions": [{"type": "Available", "status": "True", "reason": "Local",
            "message": "Local APIServices are always available",
            "lastTransitionTime": apimachinery::time::rfc3339(jiff::Timestamp::now())}]}),
    }),
    validate,
    validate_status: |new, _, errors| {
        check(new, &[("status.conditions[].status", Is::OneOf(&["True", "False", "Unknown"]))], errors);
    },
    columns: Some(&COLUMNS),
    row: Some(row),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let (meta, spec) = (root.at("metadata"), root.at("spec"));
    let (group, version, name) = (spec.at("group"), spec.at("version"), meta.at("name"));
    if name.str() != format!("{}.{}", version.str(), group.str()) {
        errors.invalid(&name, "must be `spec.version+\".\"+spec.group`");
    }
    check(&spec, &[("group", Is::Named(is_dns1123_subdomain))], errors);
    errors.all(&version, is_dns1035_label(version.str()));
    for (name, max) in [("groupPriorityMinimum", 20_000), ("versionPriority", 1000)] {
        let (field, value) = (spec.at(name), spec.at(name).int().unwrap_or(0));
        if !(1..=max).contains(&value) {
            let why = format!("must be positive and less than {max}");
            errors.0.push(FieldError::invalid(field.path(), value, why));
        }
    }
    let (service, bundle, insecure) = (spec.at("service"), spec.at("caBundle"), spec.at("insecureSkipTLSVerify"));
    if !service.is_set() {
        if !bundle.is_blank() {
            let shown = format!("{} bytes", bundle.str().len() / 4 * 3);
            errors.0.push(FieldError::invalid(bundle.path(), shown, "local APIServices may not have a caBundle"));
        }
        if insecure.bool() {
            errors.invalid(&insecure, "local APIServices may not have insecureSkipTLSVerify");
        }
        return;
    }
    check(&service, &[("namespace", Is::Required("")), ("name", Is::Required(""))], errors);
    let port = service.at("port");
    if port.int().is_some_and(|port| !(1..=65535).contains(&port)) {
        errors.invalid(&port, "port is not valid: must be between 1 and 65535, inclusive");
    }
    if insecure.bool() && !bundle.is_blank() {
        errors.invalid(&insecure, "may not be true if caBundle is present");
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
