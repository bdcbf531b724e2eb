//! Roles and ClusterRoles. That nobody may grant what he has not is checked by the authorizer.

use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::rules::Rules;

pub const ROLE: Rules = Rules {
    name: metadata::path_segment,
    validate: |root, errors| rules(&root.at("rules"), true, errors),
    create_on_update: true,
    ..Rules::DEFAULT
};

pub const CLUSTER_ROLE: Rules = Rules {
    validate: |root, errors| {
        rules(&root.at("rules"), false, errors);
        let aggregation = root.at("aggregationRule");
        if aggregation.is_set() {
            let selectors = aggregation.at("clusterRoleSelectors");
            if selectors.is_empty() {
                errors.required(&selectors, "at least one clusterRoleSelector required if aggregationRule is non-nil");
            }
            for selector in selectors.items() {
                metadata::label_selector(&selector, errors);
            }
        }
    },
    ..ROLE
};

/// As `ValidatePolicyRule`.
fn rules(rules: &Field<'_, '_>, namespaced: bool, errors: &mut Errors) {
    for rule in rules.items() {
        let (verbs, groups) = (rule.at("verbs"), rule.at("apiGroups"));
        let (resources, urls) = (rule.at("resources"), rule.at("nonResourceURLs"));
        if verbs.is_empty() {
            errors.required(&verbs, "verbs must contain at least one value");
        }
        if !urls.is_empty() {
            if namespaced {
                errors.invalid(&urls, "namespaced rules cannot apply to non-resource URLs");
            }
            if !groups.is_empty() || !resources.is_empty() || !rule.at("resourceNames").is_empty() {
                errors.invalid(&urls, "rules cannot apply to both regular resources and non-resource URLs");
            }
            continue;
        }
        if groups.is_empty() {
            errors.required(&groups, "resource rules must supply at least one api group");
        }
        if resources.is_empty() {
            errors.required(&resources, "resource rules must supply at least one resource");
        }
    }
}
