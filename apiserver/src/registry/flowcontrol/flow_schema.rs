//! FlowSchemas.

use super::conditions;
use crate::registry::checks::{Is, check};
use crate::registry::field::{Errors, Field};
use crate::registry::metadata::{label, subdomain};
use crate::registry::object::{child, int, list, semantically_equal, set, text};
use crate::registry::print::{self, Clock, NONE};
use crate::registry::rules::Rules;
use serde_json::{Value, json};

const PRECEDENCE_MAX: i64 = 10_000;
const VERBS: [&str; 9] = ["create", "delete", "deletecollection", "get", "list", "patch", "proxy", "update", "watch"];

pub const RULES: Rules = Rules {
    generation: true,
    status_keeps_metadata: true,
    unconditional_update: false,
    default: |object| {
        let spec = child(object, "spec");
        if int(spec, "/matchingPrecedence").unwrap_or(0) == 0 {
            set(spec, "matchingPrecedence", 1000);
        }
    },
    validate,
    validate_status: |new, _, errors| conditions(new, errors),
    row: Some(row),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let (meta, spec) = (root.at("metadata"), root.at("spec"));
    let (name, precedence) = (meta.at("name"), spec.at("matchingPrecedence"));
    match precedence.int() {
        Some(..=0) => errors.invalid(&precedence, "must be a positive value"),
        Some(1) if name.str() != "exempt" => {
            errors.invalid(&precedence, "only the schema named 'exempt' may have matchingPrecedence 1");
        }
        Some(n) if n > PRECEDENCE_MAX => {
            errors.invalid(&precedence, format!("must not be greater than {PRECEDENCE_MAX}"));
        }
        _ => {}
    }
    check(
        &spec,
        &[
            ("distinguisherMethod?.type", Is::OneOf(&["ByNamespace", "ByUser"])),
            ("priorityLevelConfiguration.name", Is::Required("must reference a priority level")),
            ("priorityLevelConfiguration.name", Is::Named(subdomain)),
            ("rules[]", Is::By(rule)),
        ],
        errors,
    );
    if mandatory(name.str()).is_some_and(|fixed| !semantically_equal(&fixed, spec.value)) {
        errors.invalid(&spec, format!("spec of '{}' must equal the fixed value", name.str()));
    }
}

/// The schemas that everything rests on: nobody changes them.
fn mandatory(name: &str) -> Option<Value> {
    let any = json!(["*"]);
    let all = |subjects: Value| {
        json!([{"subjects": subjects,
            "resourceRules": [{"verbs": any, "apiGroups": any, "resources": any, "namespaces": any, "clusterScope": true}],
            "nonResourceRules": [{"verbs": any, "nonResourceURLs": any}]}])
    };
    let group = |name: &str| json!({"kind": "Group", "group": {"name": name}});
    match name {
        "exempt" => Some(json!({"priorityLevelConfiguration": {"name": "exempt"}, "matchingPrecedence": 1,
            "rules": all(json!([group("system:masters")]))})),
        "catch-all" => Some(json!({"priorityLevelConfiguration": {"name": "catch-all"}, "matchingPrecedence": 10000,
            "distinguisherMethod": {"type": "ByUser"},
            "rules": all(json!([group("system:unauthenticated"), group("system:authenticated")]))})),
        _ => None,
    }
}

fn rule(rule: &Field<'_, '_>, errors: &mut Errors) {
    check(
        rule,
        &[("subjects", Is::Required("subjects must contain at least one value")), ("subjects[]", Is::By(subject))],
        errors,
    );
    let (resources, others) = (rule.at("resourceRules"), rule.at("nonResourceRules"));
    if resources.is_empty() && others.is_empty() {
        errors.required(rule, "at least one of resourceRules and nonResourceRules has to be non-empty");
    }
    resources.items().for_each(|rule| resource_rule(&rule, errors));
    for rule in others.items() {
        verbs(&rule, errors);
        let urls = rule.at("nonResourceURLs");
        if !wildcard(&urls, "nonResourceURLs must contain at least one value", "non-resource URLs", errors) {
            urls.items().for_each(|url| non_resource_url(&url, errors));
        }
    }
}

/// As `ValidateFlowSchemaSubject`: the field that its kind names, and no other.
fn subject(subject: &Field<'_, '_>, errors: &mut Errors) {
    const KINDS: [(&str, &str); 3] = [("ServiceAccount", "serviceAccount"), ("User", "user"), ("Group", "group")];
    let kind = subject.at("kind");
    let Some((_, own)) = KINDS.iter().find(|(name, _)| *name == kind.str()) else {
        errors.not_supported(&kind, &["Group", "ServiceAccount", "User"]);
        return;
    };
    let who = subject.at(own);
    if who.is_set() {
        let name = who.at("name");
        if errors.need(&name) && kind.str() == "ServiceAccount" && name.str() != "*" {
            errors.all(&name, subdomain(name.str()));
        }
        if kind.str() == "ServiceAccount" {
            let namespace = who.at("namespace");
            Is::Required("must specify namespace for service account").check(&namespace, errors);
            Is::Named(label).check(&namespace, errors);
        }
    } else {
        errors.required(&who, &format!("{own} is required when subject kind is '{}'", kind.str()));
    }
    for (name, other) in KINDS.iter().filter(|(name, _)| *name != kind.str()) {
        if subject.at(other).is_set() {
            errors.forbidden(&subject.at(other), format!("{other} is forbidden when subject kind is not '{name}'"));
        }
    }
}

fn resource_rule(rule: &Field<'_, '_>, errors: &mut Errors) {
    verbs(rule, errors);
    let needed = "resource rules must supply at least one";
    wildcard(&rule.at("apiGroups"), &format!("{needed} api group"), "api groups", errors);
    wildcard(&rule.at("resources"), &format!("{needed} resource"), "resources", errors);
    let namespaces = rule.at("namespaces");
    if namespaces.is_empty() && rule.at("clusterScope").bool() {
        return;
    }
    let needed = "resource rules that are not cluster scoped must supply at least one namespace";
    if !wildcard(&namespaces, needed, "namespaces", errors) {
        for namespace in namespaces.items() {
            for message in label(namespace.str()) {
                let what = "each member of this list must be '*' or a DNS-1123 label; ";
                errors.invalid(&namespace, format!("{what}{message}"));
            }
        }
    }
}

fn verbs(rule: &Field<'_, '_>, errors: &mut Errors) {
    let verbs = rule.at("verbs");
    let every = wildcard(&verbs, "verbs must contain at least one value", "verbs", errors);
    if !every && verbs.items().any(|verb| !VERBS.contains(&verb.str())) {
        errors.not_supported(&verbs, &VERBS);
    }
}

/// A list that is not empty, and whose `*` stands alone. True if there is one.
fn wildcard(list: &Field<'_, '_>, needed: &str, what: &str, errors: &mut Errors) -> bool {
    let every = list.items().any(|item| item.str() == "*");
    if list.is_empty() {
        errors.required(list, needed);
    } else if every && list.len() > 1 {
        errors.invalid(list, format!("if '*' is present, must not specify other {what}"));
    }
    every
}

/// As `ValidateNonResourceURLPath`.
fn non_resource_url(url: &Field<'_, '_>, errors: &mut Errors) {
    let path = url.str();
    let stars = path.matches('*').count();
    let why = match path {
        "" => "must not be empty",
        "/" => return,
        _ if !path.starts_with('/') => "must start with slash",
        _ if path.contains(' ') => "must not contain white-space",
        _ if path.contains("//") => "must not contain double slash",
        _ if stars > 1 || (stars == 1 && !path.ends_with("/*")) => "wildcard can only do suffix matching",
        _ => return,
    };
    errors.invalid(url, why);
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let dangling = list(object, "/status/conditions").iter().find(|c| c["type"] == "Dangling");
    let method = text(object, "/spec/distinguisherMethod/type");
    vec![
        print::name(object),
        print::or(text(object, "/spec/priorityLevelConfiguration/name"), NONE),
        Value::from(int(object, "/spec/matchingPrecedence").unwrap_or(0)),
        print::or(method, NONE),
        clock.age(object),
        Value::from(dangling.map_or("?", |c| text(c, "/status"))),
    ]
}
