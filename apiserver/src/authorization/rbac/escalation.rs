//! Nobody may grant what they do not hold: writes of roles need the rules themselves or the verb `escalate`, writes of
//! bindings the rules of the role or the verb `bind`. As the policy-based storages of roles and bindings.
use k8s_openapi::api::rbac::v1::{PolicyRule, RoleRef};
use serde_json::Value;

use super::{Rbac, rules};
use crate::authorization::{Attributes, Authorizer, Decision};
use apimachinery::status::StatusError;

/// Checks a create or update of a role or binding (`new`, and `old` on updates). Everything else passes.
pub async fn check(
    authorizer: &Authorizer,
    rbac: &Rbac,
    attributes: &Attributes,
    new: &Value,
    old: Option<&Value>,
) -> Result<(), StatusError> {
    if attributes.group != "rbac.authorization.k8s.io" || attributes.user.in_group("system:masters") {
        return Ok(());
    }
    match attributes.resource.as_str() {
        "roles" | "clusterroles" => {
            let same = |field: &str| old.is_some_and(|old| old.get(field) == new.get(field));
            if same("rules") && same("aggregationRule") {
                return Ok(());
            }
            if may(authorizer, attributes, "escalate", &attributes.resource, &attributes.name).await {
                return Ok(());
            }
            let granted: Vec<PolicyRule> = parse(new.get("rules"));
            hold(rbac, attributes, &granted)?;
            // An aggregated role may come to hold anything.
            if new.get("aggregationRule").is_some_and(|rule| !rule.is_null()) && !same("aggregationRule") {
                hold(rbac, attributes, &everything())?;
            }
            Ok(())
        }
        "rolebindings" | "clusterrolebindings" => {
            let same = |field: &str| old.is_some_and(|old| old.get(field) == new.get(field));
            if same("subjects") && same("roleRef") {
                return Ok(());
            }
            let Some(role) = new.get("roleRef").and_then(|role| serde_json::from_value::<RoleRef>(role.clone()).ok())
            else {
                return Ok(()); // Validation says what is wrong with it.
            };
            let resource = if role.kind == "Role" { "roles" } else { "clusterroles" };
            if may(authorizer, attributes, "bind", resource, &role.name).await {
                return Ok(());
            }
            match rbac.role_rules(&role, &attributes.namespace) {
                Ok(granted) => hold(rbac, attributes, &granted),
                Err(missing) => Err(StatusError::new(404, "NotFound", missing)),
            }
        }
        _ => Ok(()),
    }
}

async fn may(authorizer: &Authorizer, attributes: &Attributes, verb: &str, resource: &str, name: &str) -> bool {
    let question = Attributes {
        verb: verb.to_owned(),
        resource: resource.to_owned(),
        subresource: String::new(),
        name: name.to_owned(),
        ..attributes.clone()
    };
    authorizer.authorize(&question).await == Decision::Allow
}

/// As `ConfirmNoEscalation`.
fn hold(rbac: &Rbac, attributes: &Attributes, granted: &[PolicyRule]) -> Result<(), StatusError> {
    let user = &attributes.user;
    let (held, errors) = rbac.rules_for(user, &attributes.namespace);
    let missing = rules::uncovered(&held, granted);
    if missing.is_empty() {
        return Ok(());
    }
    let mut why = format!(
        "user {:?} (groups={}) is attempting to grant RBAC permissions not currently held:\n{}",
        user.name,
        rules::quoted_list(&user.groups),
        rules::describe(&rules::compact(missing))
    );
    if !errors.is_empty() {
        why.push_str(&format!("; resolution errors: [{}]", errors.join(", ")));
    }
    Err(StatusError::forbidden(&attributes.group, &attributes.resource, &attributes.name, &why))
}

fn everything() -> Vec<PolicyRule> {
    let all = || vec!["*".to_owned()];
    vec![
        PolicyRule { api_groups: Some(all()), resources: Some(all()), verbs: all(), ..PolicyRule::default() },
        PolicyRule { non_resource_urls: Some(all()), verbs: all(), ..PolicyRule::default() },
    ]
}

fn parse(rules: Option<&Value>) -> Vec<PolicyRule> {
    rules.and_then(|rules| serde_json::from_value(rules.clone()).ok()).unwrap_or_default()
}
