//! What a policy rule grants: matching a request against a rule, and comparing sets of rules with one another
//! (as `rbac/v1/evaluation_helpers.go` and `validation.Covers` do). Pure; the index over bindings stands on it, and so do
//! the escalation check and the reconciliation of the default roles.
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use k8s_openapi::api::rbac::v1::PolicyRule;

use crate::authorization::Attributes;

const ALL: &str = "*";

fn has(items: &[String], wanted: &str) -> bool {
    items.iter().any(|item| item == ALL || item == wanted)
}

fn has_optional(items: Option<&Vec<String>>, wanted: &str) -> bool {
    items.is_some_and(|items| has(items, wanted))
}

/// Whether `rule` grants what `attributes` asks. As `RuleAllows`.
pub fn allows(rule: &PolicyRule, attributes: &Attributes) -> bool {
    if !has(&rule.verbs, &attributes.verb) {
        return false;
    }
    if !attributes.is_resource {
        return rule.non_resource_urls.iter().flatten().any(|url| url_matches(url, &attributes.path));
    }
    has_optional(rule.api_groups.as_ref(), &attributes.group)
        && rule
            .resources
            .iter()
            .flatten()
            .any(|resource| resource_matches(resource, &attributes.resource, &attributes.subresource))
        && name_matches(rule, &attributes.name)
}

fn name_matches(rule: &PolicyRule, name: &str) -> bool {
    match rule.resource_names.as_deref() {
        None | Some([]) => true,
        Some(names) => names.iter().any(|n| n == name),
    }
}

/// `pods`, `pods/log`, `*` (everything) or `*/scale` (that subresource of everything).
fn resource_matches(rule: &str, resource: &str, subresource: &str) -> bool {
    if rule == ALL {
        return true;
    }
    match rule.split_once('/') {
        None => subresource.is_empty() && rule == resource,
        Some((r, s)) => !subresource.is_empty() && s == subresource && (r == ALL || r == resource),
    }
}

/// `*`, an exact path, or a prefix ending in `*`.
fn url_matches(rule: &str, path: &str) -> bool {
    match rule.strip_suffix(ALL) {
        Some(prefix) => path.starts_with(prefix),
        None => rule == path,
    }
}

/// The parts of `servant` that no rule of `owner` grants, each broken down to one verb on one thing. As `Covers`.
pub fn uncovered(owner: &[PolicyRule], servant: &[PolicyRule]) -> Vec<PolicyRule> {
    servant.iter().flat_map(breakdown).filter(|part| !owner.iter().any(|rule| covers(rule, part))).collect()
}

/// One rule per group, resource, name and verb. As `BreakdownRule`.
fn breakdown(rule: &PolicyRule) -> Vec<PolicyRule> {
    let mut parts = Vec::new();
    for group in rule.api_groups.iter().flatten() {
        for resource in rule.resources.iter().flatten() {
            for verb in &rule.verbs {
                let part = |names: Option<Vec<String>>| PolicyRule {
                    api_groups: Some(vec![group.clone()]),
                    resources: Some(vec![resource.clone()]),
                    verbs: vec![verb.clone()],
                    resource_names: names,
                    non_resource_urls: None,
                };
                match rule.resource_names.as_deref() {
                    None | Some([]) => parts.push(part(None)),
                    Some(names) => parts.extend(names.iter().map(|name| part(Some(vec![name.clone()])))),
                }
            }
        }
    }
    for url in rule.non_resource_urls.iter().flatten() {
        for verb in &rule.verbs {
            parts.push(PolicyRule {
                non_resource_urls: Some(vec![url.clone()]),
                verbs: vec![verb.clone()],
                ..PolicyRule::default()
            });
        }
    }
    parts
}

/// Whether `owner` grants everything in `part`, which is a rule broken down to single items.
fn covers(owner: &PolicyRule, part: &PolicyRule) -> bool {
    let all =
        |part: Option<&Vec<String>>, granted: &dyn Fn(&str) -> bool| part.into_iter().flatten().all(|p| granted(p));
    part.verbs.iter().all(|verb| has(&owner.verbs, verb))
        && all(part.api_groups.as_ref(), &|group| has_optional(owner.api_groups.as_ref(), group))
        && all(part.resources.as_ref(), &|resource| {
            owner.resources.iter().flatten().any(|granted| {
                granted == ALL
                    || granted == resource
                    || granted
                        .strip_prefix("*/")
                        .is_some_and(|sub| resource.split_once('/').is_some_and(|(_, wanted)| wanted == sub))
            })
        })
        && all(part.non_resource_urls.as_ref(), &|url| {
            owner.non_resource_urls.iter().flatten().any(|granted| url_matches(granted, url))
        })
        && match owner.resource_names.as_deref() {
            None | Some([]) => true,
            Some(names) => {
                part.resource_names.as_ref().is_some_and(|wanted| !wanted.is_empty())
                    && all(part.resource_names.as_ref(), &|name| names.iter().any(|n| n == name))
            }
        }
}

/// Joins broken-down rules on the same thing into one with several verbs. As `CompactRules`.
pub fn compact(rules: Vec<PolicyRule>) -> Vec<PolicyRule> {
    let mut compacted: Vec<PolicyRule> = Vec::new();
    let mut simple: BTreeMap<(String, String, Option<String>), usize> = BTreeMap::new();
    for rule in rules {
        let single = |items: &Option<Vec<String>>| match items.as_deref() {
            Some([one]) => Some(one.clone()),
            _ => None,
        };
        let names = rule.resource_names.as_deref().unwrap_or_default();
        let urls = rule.non_resource_urls.as_deref().unwrap_or_default();
        if let (Some(group), Some(resource), true, true) =
            (single(&rule.api_groups), single(&rule.resources), names.len() <= 1, urls.is_empty())
        {
            let at = *simple.entry((group, resource, names.first().cloned())).or_insert(compacted.len());
            if let Some(existing) = compacted.get_mut(at) {
                existing.verbs.extend(rule.verbs);
                continue;
            }
        }
        compacted.push(rule);
    }
    compacted
}

/// `{APIGroups:[""], Resources:["pods"], Verbs:["get"]}`, sorted and one a line, as the escalation error lists them.
pub fn describe(rules: &[PolicyRule]) -> String {
    let lines: BTreeSet<String> = rules
        .iter()
        .map(|rule| {
            let parts = [
                ("APIGroups", rule.api_groups.as_deref().unwrap_or_default()),
                ("Resources", rule.resources.as_deref().unwrap_or_default()),
                ("NonResourceURLs", rule.non_resource_urls.as_deref().unwrap_or_default()),
                ("ResourceNames", rule.resource_names.as_deref().unwrap_or_default()),
                ("Verbs", rule.verbs.as_slice()),
            ];
            let parts: Vec<String> = parts
                .iter()
                .filter(|(_, items)| !items.is_empty())
                .map(|(name, items)| format!("{name}:{}", quoted_list(items)))
                .collect();
            format!("{{{}}}", parts.join(", "))
        })
        .collect();
    lines.into_iter().collect::<Vec<_>>().join("\n")
}

/// A list as Go's `%q` prints it: `["a" "b"]`.
pub fn quoted_list(items: &[String]) -> String {
    let mut out = String::from("[");
    for (i, item) in items.iter().enumerate() {
        let _ = write!(out, "{}{item:?}", if i == 0 { "" } else { " " });
    }
    out.push(']');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(|w| if w == "core" { String::new() } else { w.to_owned() }).collect()
    }

    fn rule(verbs: &str, groups: &str, resources: &str, names: &str) -> PolicyRule {
        PolicyRule {
            verbs: words(verbs),
            api_groups: Some(words(groups)),
            resources: Some(words(resources)),
            resource_names: (!names.is_empty()).then(|| words(names)),
            non_resource_urls: None,
        }
    }

    fn urls(verbs: &str, paths: &str) -> PolicyRule {
        PolicyRule { verbs: words(verbs), non_resource_urls: Some(words(paths)), ..PolicyRule::default() }
    }

    #[test]
    fn a_rule_allows_what_its_lists_name() {
        let resource = |verb: &str, group: &str, resource: &str, subresource: &str, name: &str| Attributes {
            verb: verb.into(),
            group: group.into(),
            resource: resource.into(),
            is_resource: true,
            subresource: subresource.into(),
            name: name.into(),
            ..Attributes::default()
        };
        let path =
            |verb: &str, path: &str| Attributes { verb: verb.into(), path: path.into(), ..Attributes::default() };
        let cases = [
            (rule("get", "core", "pods", ""), resource("get", "", "pods", "", "x"), true),
            (rule("get", "core", "pods", ""), resource("list", "", "pods", "", ""), false),
            (rule("get", "core", "pods", ""), resource("get", "apps", "pods", "", ""), false),
            (rule("get", "core", "pods", ""), resource("get", "", "pods", "log", ""), false),
            (rule("get", "core", "pods/log", ""), resource("get", "", "pods", "log", ""), true),
            (rule("get", "core", "pods/log", ""), resource("get", "", "pods", "", ""), false),
            (rule("*", "*", "*", ""), resource("delete", "apps", "deployments", "scale", ""), true),
            (rule("update", "*", "*/scale", ""), resource("update", "apps", "deployments", "scale", ""), true),
            (rule("update", "*", "*/scale", ""), resource("update", "apps", "deployments", "", ""), false),
            (rule("get", "core", "pods", "a b"), resource("get", "", "pods", "", "b"), true),
            (rule("get", "core", "pods", "a b"), resource("get", "", "pods", "", "c"), false),
            (rule("list", "core", "pods", "a"), resource("list", "", "pods", "", ""), false),
            (rule("*", "*", "*", ""), path("get", "/healthz"), false),
            (urls("get", "/healthz /livez/*"), path("get", "/healthz"), true),
            (urls("get", "/healthz /livez/*"), path("get", "/livez/ping"), true),
            (urls("get", "/healthz /livez/*"), path("get", "/livez"), false),
            (urls("get", "*"), path("get", "/anything"), true),
            (urls("get", "*"), path("post", "/anything"), false),
        ];
        for (rule, attributes, expected) in cases {
            assert_eq!(allows(&rule, &attributes), expected, "{rule:?} {attributes:?}");
        }
    }

    #[test]
    fn uncovered_lists_each_missing_verb_on_each_missing_thing() {
        let owner =
            [rule("get list", "core", "pods */scale", ""), rule("get", "core", "secrets", "a"), urls("get", "/x/*")];
        let missing = |servant: PolicyRule| describe(&compact(uncovered(&owner, &[servant])));
        assert_eq!(missing(rule("get list", "core", "pods deployments/scale", "")), "");
        assert_eq!(
            missing(rule("get delete patch", "core", "pods", "")),
            r#"{APIGroups:[""], Resources:["pods"], Verbs:["delete" "patch"]}"#
        );
        assert_eq!(missing(rule("get", "core", "secrets", "a")), "");
        assert_eq!(
            missing(rule("get", "core", "secrets", "")),
            r#"{APIGroups:[""], Resources:["secrets"], Verbs:["get"]}"#
        );
        assert_eq!(
            missing(rule("get", "core", "secrets", "a b")),
            r#"{APIGroups:[""], Resources:["secrets"], ResourceNames:["b"], Verbs:["get"]}"#
        );
        assert_eq!(missing(urls("get", "/x/y /x/*")), "");
        assert_eq!(missing(urls("get post", "/x/y")), r#"{NonResourceURLs:["/x/y"], Verbs:["post"]}"#);
        assert_eq!(missing(urls("get", "*")), r#"{NonResourceURLs:["*"], Verbs:["get"]}"#);
        assert_eq!(missing(rule("*", "*", "*", "")), r#"{APIGroups:["*"], Resources:["*"], Verbs:["*"]}"#);
    }
}
