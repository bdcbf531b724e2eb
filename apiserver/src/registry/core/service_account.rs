//! ServiceAccounts.

use crate::registry::object::{items_mut, list};
use crate::registry::rules::Rules;
use serde_json::{Value, json};

const MOUNTABLE: &str = "kubernetes.io/enforce-mountable-secrets";

pub const RULES: Rules = Rules {
    prepare_create: names_alone,
    prepare_update: |new, _| names_alone(new),
    warnings: |new, old| {
        let enforces =
            |account: &Value| account.pointer("/metadata/annotations").and_then(|a| a.get(MOUNTABLE)).is_some();
        if enforces(new) && !old.is_some_and(enforces) {
            let what = "deprecated in v1.32+; prefer separate namespaces to isolate access to mounted secrets";
            return vec![format!("metadata.annotations[{MOUNTABLE}]: {what}")];
        }
        Vec::new()
    },
    ..Rules::DEFAULT
};

/// Of the secrets it only matters how they are called. As `cleanSecretReferences`.
fn names_alone(account: &mut Value) {
    if list(account, "/secrets").is_empty() {
        return;
    }
    for secret in items_mut(account, "secrets") {
        *secret = secret.get("name").map_or_else(|| json!({}), |name| json!({"name": name}));
    }
}
