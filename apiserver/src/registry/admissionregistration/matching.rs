//! Which requests a webhook or a policy is asked about: rules of groups, versions, resources and operations, selectors, and
//! conditions.

use crate::registry::cel;
use crate::registry::checks::{Is, Table, check};
use crate::registry::field::{Errors, Field};
use crate::registry::metadata::path_segment;
use crate::registry::object::{default, items_mut, list, set, text};
use apimachinery::cel::Env;
use apimachinery::names::is_qualified_name;
use serde_json::{Value, json};
use std::collections::HashSet;

const CONDITIONS_MAX: usize = 64;

/// As `SetDefaults_MatchResources`.
pub fn match_defaults(resources: &mut Value) {
    default(resources, "matchPolicy", "Equivalent");
    for selector in ["namespaceSelector", "objectSelector"] {
        if resources.get(selector).is_none() {
            set(resources, selector, json!({}));
        }
    }
    for rules in ["resourceRules", "excludeResourceRules"] {
        for rule in items_mut(resources, rules) {
            default(rule, "scope", "*");
        }
    }
}

/// As `validateMatchResources`.
pub fn match_resources(resources: &Field<'_, '_>, errors: &mut Errors) {
    if !resources.is_set() {
        return;
    }
    const TABLE: Table = &[
        ("matchPolicy", Is::RequiredOneOf(&["Equivalent", "Exact"])),
        ("namespaceSelector", Is::LabelSelector),
        ("objectSelector", Is::LabelSelector),
        ("resourceRules[]", Is::By(named_rule)),
        ("excludeResourceRules[]", Is::By(named_rule)),
    ];
    check(resources, TABLE, errors);
}

fn named_rule(rule: &Field<'_, '_>, errors: &mut Errors) {
    check(rule, &[("resourceNames[]", Is::By(|name, errors| errors.all(name, path_segment(name.str()))))], errors);
    check(rule, &[("resourceNames", Is::Unique)], errors);
    self::rule(rule, errors);
}

/// As `validateRuleWithOperations`.
pub fn rule(rule: &Field<'_, '_>, errors: &mut Errors) {
    for (name, what) in [("operations", "operations"), ("apiGroups", "API groups"), ("apiVersions", "API versions")] {
        let list = rule.at(name);
        if list.is_empty() {
            errors.required(&list, "");
        } else if list.len() > 1 && list.items().any(|item| item.str() == "*") {
            errors.invalid(&list, format!("if '*' is present, must not specify other {what}"));
        }
    }
    check(
        rule,
        &[
            ("operations[]", Is::OneOf(&["*", "CONNECT", "CREATE", "DELETE", "UPDATE"])),
            ("apiVersions[]", Is::Required("")),
            ("resources", Is::By(resources)),
            ("scope", Is::OneOf(&["*", "Cluster", "Namespaced"])),
        ],
        errors,
    );
}

/// `pods`, `pods/status`, `*`, `*/*`, `pods/*`, `*/scale`: what is said already may not be said again.
fn resources(resources: &Field<'_, '_>, errors: &mut Errors) {
    if resources.is_empty() {
        errors.required(resources, "");
    }
    let (mut of_all_subresources, mut of_all_resources) = (HashSet::new(), HashSet::new());
    let mut plain = false;
    for resource in resources.items() {
        if !errors.need(&resource) {
            continue;
        }
        let Some((name, sub)) = resource.str().split_once('/') else {
            plain = resource.str() != "*";
            continue;
        };
        if of_all_subresources.contains(name) {
            let why = format!("if '{name}/*' is present, must not specify {}", resource.str());
            errors.invalid(&resource, why);
        }
        if of_all_resources.contains(sub) {
            let why = format!("if '*/{sub}' is present, must not specify {}", resource.str());
            errors.invalid(&resource, why);
        }
        if sub == "*" {
            of_all_subresources.insert(name.to_owned());
        }
        if name == "*" {
            of_all_resources.insert(sub.to_owned());
        }
    }
    let has = |name: &str| resources.items().any(|r| r.str() == name);
    if resources.len() > 1 && has("*/*") {
        errors.invalid(resources, "if '*/*' is present, must not specify other resources");
    }
    if has("*") && plain {
        errors.invalid(resources, "if '*' is present, must not specify other resources without subresources");
    }
}

/// As `validateMatchConditions`. What the old object holds is not looked at again.
pub fn match_conditions(conditions: &Field<'_, '_>, env: &Env, old: Option<&Value>, errors: &mut Errors) {
    if old.is_some_and(|old| old == conditions.value) {
        return;
    }
    let old = old.map_or(&[][..], |old| list(old, ""));
    if conditions.len() > CONDITIONS_MAX {
        errors.too_many(conditions, CONDITIONS_MAX);
    }
    for condition in conditions.items() {
        let (name, expression) = (condition.at("name"), condition.at("expression"));
        if expression.str().trim().is_empty() {
            errors.required(&expression, "");
        } else if !old.iter().any(|old| text(old, "/expression") == expression.str()) {
            cel::expression(&expression, env, &["bool"], errors);
        }
        Is::RequiredName(is_qualified_name).check(&name, errors);
    }
    Is::UniqueBy("name").check(conditions, errors);
}
