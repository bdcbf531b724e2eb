//! The priority levels and flow schemas that every cluster has, and whether the level of a schema is there. Pure.
//!
//! They say nothing about how requests are limited here (`server::limits`): clients look for them, and tools tell of schemas
//! that point nowhere.

use crate::registry::object::{list, text};
use serde_json::{Value, json};

const API: &str = "flowcontrol.apiserver.k8s.io/v1";

pub fn defaults() -> Vec<Value> {
    levels().into_iter().chain(schemas()).collect()
}

fn object(kind: &str, name: &str, spec: &Value) -> Value {
    let metadata = json!({"name": name, "annotations": {"apf.kubernetes.io/autoupdate-spec": "true"}});
    json!({"apiVersion": API, "kind": kind, "metadata": metadata, "spec": spec})
}

fn levels() -> Vec<Value> {
    // Name, shares, how many of a hundred it lends, queues and the hand of each flow.
    const QUEUED: [(&str, i64, i64, i64, i64); 6] = [
        ("system", 30, 33, 64, 6),
        ("node-high", 40, 25, 64, 6),
        ("leader-election", 10, 0, 16, 4),
        ("workload-high", 40, 50, 128, 6),
        ("workload-low", 100, 90, 128, 6),
        ("global-default", 20, 50, 128, 6),
    ];
    let exempt = json!({"type": "Exempt", "exempt": {"nominalConcurrencyShares": 0, "lendablePercent": 0}});
    let limited = |shares: i64, lent: i64, response: Value| {
        json!({"type": "Limited", "limited": {
            "nominalConcurrencyShares": shares, "lendablePercent": lent, "limitResponse": response}})
    };
    let mut levels = vec![("exempt", exempt), ("catch-all", limited(5, 0, json!({"type": "Reject"})))];
    levels.extend(QUEUED.map(|(name, shares, lent, queues, hand)| {
        let queuing = json!({"queues": queues, "handSize": hand, "queueLengthLimit": 50});
        (name, limited(shares, lent, json!({"type": "Queue", "queuing": queuing})))
    }));
    levels.iter().map(|(name, spec)| object("PriorityLevelConfiguration", name, spec)).collect()
}

fn schemas() -> Vec<Value> {
    let group = |name: &str| json!({"kind": "Group", "group": {"name": name}});
    let user = |name: &str| json!({"kind": "User", "user": {"name": name}});
    let account =
        |name: &str| json!({"kind": "ServiceAccount", "serviceAccount": {"namespace": "kube-system", "name": name}});
    let resources = |verbs: &[&str], group: &str, resources: &[&str], cluster: bool| {
        let mut rule = json!({"verbs": verbs, "apiGroups": [group], "resources": resources, "namespaces": ["*"]});
        if cluster {
            rule["clusterScope"] = true.into();
        }
        rule
    };
    let leases = resources(&["get", "create", "update"], "coordination.k8s.io", &["leases"], false);
    let all = |subjects: &[Value]| {
        json!([{"subjects": subjects, "resourceRules": [resources(&["*"], "*", &["*"], true)],
            "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}]}])
    };
    let some = |subjects: &[&Value], rules: &[&Value]| json!([{"subjects": subjects, "resourceRules": rules}]);
    let everyone = [group("system:unauthenticated"), group("system:authenticated")];
    let (nodes, accounts) = (group("system:nodes"), account("*"));
    let (manager, scheduler) = (user("system:kube-controller-manager"), user("system:kube-scheduler"));
    let probes = json!([{"subjects": everyone, "nonResourceRules": [
        {"verbs": ["get"], "nonResourceURLs": ["/healthz", "/readyz", "/livez"]}]}]);
    let endpoints = resources(&["get", "create", "update"], "", &["endpoints"], false);
    let old_locks = resources(&["get", "create", "update"], "", &["endpoints", "configmaps"], false);
    let (endpoint, mirror) = (account("endpoint-controller"), account("endpointslicemirroring-controller"));
    let mirrors = [&manager, &endpoint, &mirror];
    let node_rules = [
        &resources(&["*"], "", &["nodes", "nodes/status"], true),
        &resources(&["*"], "coordination.k8s.io", &["leases"], false),
    ];
    let leaders = [&manager, &scheduler, &accounts];
    [
        ("exempt", "exempt", 1, "", all(&[group("system:masters")])),
        ("probes", "exempt", 2, "", probes),
        ("system-leader-election", "leader-election", 100, "ByUser", some(&leaders, &[&leases])),
        ("endpoint-controller", "workload-high", 150, "ByUser", some(&mirrors, &[&endpoints])),
        ("workload-leader-election", "leader-election", 200, "ByUser", some(&[&accounts], &[&old_locks, &leases])),
        ("system-node-high", "node-high", 400, "ByUser", some(&[&nodes], &node_rules)),
        ("system-nodes", "system", 500, "ByUser", all(std::slice::from_ref(&nodes))),
        ("kube-controller-manager", "workload-high", 800, "ByNamespace", all(std::slice::from_ref(&manager))),
        ("kube-scheduler", "workload-high", 800, "ByNamespace", all(std::slice::from_ref(&scheduler))),
        ("kube-system-service-accounts", "workload-high", 900, "ByNamespace", all(std::slice::from_ref(&accounts))),
        ("service-accounts", "workload-low", 9000, "ByUser", all(&[group("system:serviceaccounts")])),
        ("global-default", "global-default", 9900, "ByUser", all(&everyone)),
        ("catch-all", "catch-all", 10_000, "ByUser", all(&everyone)),
    ]
    .map(|(name, level, precedence, by, rules)| {
        let mut spec =
            json!({"priorityLevelConfiguration": {"name": level}, "matchingPrecedence": precedence, "rules": rules});
        if !by.is_empty() {
            spec["distinguisherMethod"] = json!({"type": by});
        }
        object("FlowSchema", name, &spec)
    })
    .to_vec()
}

/// A schema that says whether its level is there; None if it says so already. As `syncFlowSchemaStatus`.
pub fn dangling(schema: &Value, exists: impl Fn(&str) -> bool, now: &str) -> Option<Value> {
    let level = text(schema, "/spec/priorityLevelConfiguration/name");
    let named = format!("This FlowSchema references the PriorityLevelConfiguration object named \"{level}\"");
    let (status, reason, message) = if exists(level) {
        ("False", "Found", format!("{named} and it exists"))
    } else {
        ("True", "NotFound", format!("{named} but there is no such object"))
    };
    let conditions = list(schema, "/status/conditions");
    let before = conditions.iter().find(|c| c["type"] == "Dangling");
    let said = |key: &str, value: &str| before.is_some_and(|condition| condition[key] == value);
    if said("status", status) && said("reason", reason) && said("message", &message) {
        return None;
    }
    let since = before.filter(|_| said("status", status)).map_or(now, |c| text(c, "/lastTransitionTime"));
    let condition = json!({
        "type": "Dangling", "status": status, "lastTransitionTime": since, "reason": reason, "message": message});
    let others = conditions.iter().filter(|c| c["type"] != "Dangling").cloned();
    let mut schema = schema.clone();
    let conditions: Vec<Value> = others.chain([condition]).collect();
    schema["status"] = json!({"conditions": conditions});
    Some(schema)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_schema_has_its_level_and_says_so_once() {
        let levels = levels();
        for schema in schemas() {
            let exists = |name: &str| levels.iter().any(|level| text(level, "/metadata/name") == name);
            let said = dangling(&schema, exists, "2024-01-01T00:00:00Z").unwrap();
            assert_eq!(said["status"]["conditions"][0]["status"], "False", "{schema}");
            assert_eq!(dangling(&said, exists, "later"), None);
            let gone = dangling(&said, |_| false, "later").unwrap();
            let condition = &gone["status"]["conditions"][0];
            assert_eq!((text(condition, "/status"), text(condition, "/lastTransitionTime")), ("True", "later"));
        }
    }
}
