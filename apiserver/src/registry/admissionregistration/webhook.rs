//! Mutating- and ValidatingWebhookConfigurations.

use super::client::webhook_client;
use super::matching::{match_conditions, rule};
use crate::registry::checks::{Is, Table, check, fully_qualified_name};
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, default, items_mut, list, set, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::cel::{Env, Type};
use apimachinery::names::is_dns1035_label;
use serde_json::{Value, json};
use std::collections::HashSet;

pub const VALIDATING: Rules = Rules {
    generation: true,
    unconditional_update: false,
    default: |object| items_mut(object, "webhooks").for_each(webhook_defaults),
    validate_create: |root, errors| validate(root, None, errors),
    validate_update: |new, old, errors| validate(new, Some(old), errors),
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

/// As `validateValidatingWebhookConfiguration`, and of mutating ones. An update may leave wrong what was wrong before.
fn validate(root: &Field<'_, '_>, old: Option<&Field<'_, '_>>, errors: &mut Errors) {
    let webhooks = root.at("webhooks");
    let before = old.map_or(&[][..], |old| list(old.value, "/webhooks"));
    let env = Env::of_requests(&Type::Dyn);
    for (at, webhook) in webhooks.items().enumerate() {
        let conditions = before.get(at).and_then(|old| old.get("matchConditions"));
        self::webhook(&webhook, before, errors);
        match_conditions(&webhook.at("matchConditions"), &env, conditions, errors);
        review_versions(&webhook.at("admissionReviewVersions"), errors);
    }
    let unique = before.iter().map(|w| text(w, "/name")).collect::<HashSet<_>>().len() == before.len();
    if unique {
        Is::UniqueBy("name").check(&webhooks, errors);
    }
}

fn webhook(webhook: &Field<'_, '_>, before: &[Value], errors: &mut Errors) {
    const TABLE: Table = &[
        ("name", Is::By(fully_qualified_name)),
        ("rules[]", Is::By(rule)),
        ("failurePolicy", Is::OneOf(&["Fail", "Ignore"])),
        ("matchPolicy", Is::OneOf(&["Equivalent", "Exact"])),
        ("namespaceSelector", Is::LabelSelector),
        ("objectSelector", Is::LabelSelector),
        ("reinvocationPolicy", Is::OneOf(&["IfNeeded", "Never"])),
        ("clientConfig", Is::By(webhook_client)),
    ];
    check(webhook, TABLE, errors);
    let had_side_effects = before.iter().any(|w| !matches!(text(w, "/sideEffects"), "None" | "NoneOnDryRun"));
    let allowed: &[&str] =
        if had_side_effects { &["None", "NoneOnDryRun", "Some", "Unknown"] } else { &["None", "NoneOnDryRun"] };
    let (effects, seconds) = (webhook.at("sideEffects"), webhook.at("timeoutSeconds"));
    if !effects.is_set() {
        errors.required(&effects, &format!("must specify one of {}", allowed.join(", ")));
    }
    errors.one_of(&effects, allowed);
    if seconds.int().is_some_and(|s| !(1..=30).contains(&s)) {
        errors.invalid(&seconds, "the timeout value must be between 1 and 30 seconds");
    }
}

/// Which versions of a review a webhook understands: one that we speak, too. As `validateAdmissionReviewVersions`.
pub fn review_versions(versions: &Field<'_, '_>, errors: &mut Errors) {
    if versions.is_empty() {
        errors.required(versions, "must specify one of v1, v1beta1");
        return;
    }
    let mut seen = HashSet::new();
    for version in versions.items() {
        if seen.insert(version.str().to_owned()) {
            errors.all(&version, is_dns1035_label(version.str()));
        } else {
            errors.invalid(&version, "duplicate version");
        }
    }
    if !seen.contains("v1") && !seen.contains("v1beta1") {
        errors.invalid(versions, "must include at least one of v1, v1beta1");
    }
}
