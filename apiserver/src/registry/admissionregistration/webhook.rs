//! Mutating- and ValidatingWebhookConfigurations.

use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{child, default, items_mut, list, set};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::names::is_dns1123_subdomain;
use serde_json::{Value, json};
use std::collections::HashSet;

pub const VALIDATING: Rules = Rules {
    generation: true,
    unconditional_update: false,
    default: |object| items_mut(object, "webhooks").for_each(webhook_defaults),
    validate,
    row: Some(|object, clock: &Clock| {
        vec![print::name(object), Value::from(list(object, "/webhooks").len()), clock.age(object)]
    }),
    ..Rules::DEFAULT
};

pub const MUTATING: Rules = Rules {
    default: |object| {
        for webhook in items_mut(object, "webhooks") {
            webhook_defaults(webhook);
            default(webhook, "reinvocationPolicy", "Never");
        }
    },
    ..VALIDATING
};

fn webhook_defaults(webhook: &mut Value) {
    default(webhook, "failurePolicy", "Fail");
    default(webhook, "matchPolicy", "Equivalent");
    for (field, value) in
        [("namespaceSelector", json!({})), ("objectSelector", json!({})), ("timeoutSeconds", json!(10))]
    {
        if webhook.get(field).is_none() {
            set(webhook, field, value);
        }
    }
    for rule in items_mut(webhook, "rules") {
        default(rule, "scope", "*");
    }
    let config = child(webhook, "clientConfig");
    if let Some(service) = config.get_mut("service")
        && service.get("port").is_none()
    {
        set(service, "port", 443);
    }
}

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let mut names = HashSet::new();
    for webhook in root.at("webhooks").items() {
        let name = webhook.at("name");
        if errors.need(&name) {
            errors.all(&name, is_dns1123_subdomain(name.str()));
            if name.str().split('.').count() < 3 {
                errors.invalid(&name, "should be a domain with at least three segments separated by dots");
            }
            if !names.insert(webhook.value["name"].as_str()) {
                errors.duplicate(&name);
            }
        }
        errors.one_of(&webhook.at("failurePolicy"), &["Fail", "Ignore"]);
        errors.one_of(&webhook.at("matchPolicy"), &["Equivalent", "Exact"]);
        errors.need_one_of(&webhook.at("sideEffects"), &["None", "NoneOnDryRun"]);
        errors.one_of(&webhook.at("reinvocationPolicy"), &["IfNeeded", "Never"]);
        let seconds = webhook.at("timeoutSeconds");
        if seconds.int().is_some_and(|s| !(1..=30).contains(&s)) {
            errors.invalid(&seconds, "the timeout value must be between 1 and 30 seconds");
        }
        let versions = webhook.at("admissionReviewVersions");
        if versions.is_empty() {
            errors.required(&versions, "must specify one of v1, v1beta1");
        } else if !versions.items().any(|v| matches!(v.str(), "v1" | "v1beta1")) {
            errors.invalid(&versions, "must include at least one of v1, v1beta1");
        }
        metadata::label_selector(&webhook.at("namespaceSelector"), errors);
        metadata::label_selector(&webhook.at("objectSelector"), errors);
        for rule in webhook.at("rules").items() {
            self::rule(&rule, errors);
        }
        client(&webhook.at("clientConfig"), errors);
    }
}

/// As `validateRuleWithOperations`.
pub fn rule(rule: &Field<'_, '_>, errors: &mut Errors) {
    for required in ["apiGroups", "apiVersions", "resources", "operations"] {
        let list = rule.at(required);
        if list.is_empty() {
            errors.required(&list, "");
        }
        if list.len() > 1 && list.items().any(|item| item.str() == "*") && required != "resources" {
            errors.invalid(&list, "if '*' is present, must not specify other values");
        }
    }
    for operation in rule.at("operations").items() {
        errors.one_of(&operation, &["*", "CONNECT", "CREATE", "DELETE", "UPDATE"]);
    }
    errors.one_of(&rule.at("scope"), &["*", "Cluster", "Namespaced"]);
}

fn client(config: &Field<'_, '_>, errors: &mut Errors) {
    let (url, service) = (config.at("url"), config.at("service"));
    if url.is_set() == service.is_set() {
        errors.required(config, "exactly one of url or service is required");
        return;
    }
    if url.is_set() && !url.str().starts_with("https://") {
        errors.invalid(&url, "'https' is the only allowed URL scheme; desired format: https://host[/path]");
    }
    if service.is_set() {
        for required in ["name", "namespace"] {
            let field = service.at(required);
            if field.is_blank() {
                errors.required(&field, &format!("service {required} is required"));
            }
        }
        errors.port(&service.at("port"));
    }
}
