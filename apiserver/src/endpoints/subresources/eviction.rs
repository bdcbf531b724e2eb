//! `pods/eviction`: deletes a pod if its disruption budget allows that now.

use super::{OnObject, success};
use crate::endpoints::{Answer, Call, Endpoint, delete, metadata, update};
use crate::registry::core::pod::condition;
use crate::registry::object::{child, int, list, map, set, text};
use crate::registry::workload;
use apimachinery::status::StatusError;
use futures::future::BoxFuture;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Preconditions};
use serde_json::{Value, json};

/// A budget that has noted so many pods and not seen them go is behind. As `MaxDisruptedPodSize`.
const DISRUPTED_PODS_MAX: usize = 2000;
const VIOLATES: &str = "Cannot evict pod as it would violate the pod's disruption budget.";

pub(super) struct Eviction;

impl Endpoint for Eviction {
    fn call<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Answer, StatusError>> {
        Box::pin(async move {
            if call.info.verb != "create" {
                return Err(StatusError::method_not_allowed());
            }
            evict(&call).await?;
            Ok(Answer::created(success(201)))
        })
    }
}

async fn evict(call: &Call<'_>) -> Result<(), StatusError> {
    let name = call.info.name.as_str();
    let given = metadata::text(&call.body, "name");
    if !given.is_empty() && given != name {
        return Err(StatusError::bad_request("name in URL does not match name in Eviction object"));
    }
    let mut options: DeleteOptions = match call.body.get("deleteOptions") {
        Some(options) => {
            serde_json::from_value(options.clone()).map_err(|e| StatusError::bad_request(e.to_string()))?
        }
        None => DeleteOptions::default(),
    };
    let mut pods = OnObject::new(call, "", "v1", "pods", name)?;
    pods.dry_run |= options.dry_run.as_ref().is_some_and(|all| !all.is_empty());
    let request = pods.request();
    let current = update::newest(&request).await?.ok_or_else(|| request.not_found())?;
    let pod = pods.resource.value(&current);

    if needs_budget(&pod) {
        let budgets = OnObject::new(call, "policy", "v1", "poddisruptionbudgets", "")?;
        let matching = matching_budgets(call, &budgets, &pod)?;
        match matching.as_slice() {
            [] => {}
            [budget] => {
                if disrupts(budget, &pod) {
                    take(call, &budgets, budget, &pod, pods.dry_run).await?;
                } else {
                    // What is judged is this pod, as it is now: unready.
                    let version = metadata::text(&pod, "resourceVersion").to_owned();
                    let preconditions = options.preconditions.get_or_insert_with(Preconditions::default);
                    preconditions.resource_version.get_or_insert(version);
                }
            }
            _ => {
                return Err(StatusError::new(
                    500,
                    "InternalError",
                    "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
                ));
            }
        }
        if !pods.dry_run {
            mark(call, &pods, name).await?;
        }
    }
    delete::delete(&request, &options).await.map(|_| ())
}

/// As `canIgnorePDB`, the other way round: a pod that does not run, or goes already, disrupts nothing.
fn needs_budget(pod: &Value) -> bool {
    !matches!(text(pod, "/status/phase"), "Succeeded" | "Failed" | "Pending") && !metadata::is_being_deleted(pod)
}

fn matching_budgets(call: &Call<'_>, budgets: &OnObject<'_>, pod: &Value) -> Result<Vec<Value>, StatusError> {
    let labels = pod.pointer("/metadata/labels");
    let cache = call.context.store.cache(&budgets.resource)?;
    Ok(cache
        .list(&call.info.namespace)
        .iter()
        .map(|object| budgets.resource.value(object))
        .filter(|budget| budget.pointer("/spec/selector").is_some_and(|s| workload::matches(s, labels)))
        .collect())
}

/// Does the eviction count against the budget? An unready pod's may not.
fn disrupts(budget: &Value, pod: &Value) -> bool {
    if condition(pod, "Ready") == "True" {
        return true;
    }
    let healthy = int(budget, "/status/currentHealthy").unwrap_or(0);
    let desired = int(budget, "/status/desiredHealthy").unwrap_or(0);
    match text(budget, "/spec/unhealthyPodEvictionPolicy") {
        "AlwaysAllow" => false,
        _ => !(healthy >= desired && desired > 0),
    }
}

/// Takes one disruption from the budget.
async fn take(
    call: &Call<'_>,
    budgets: &OnObject<'_>,
    budget: &Value,
    pod: &Value,
    dry_run: bool,
) -> Result<(), StatusError> {
    let (name, pod_name) = (metadata::text(budget, "name").to_owned(), metadata::text(pod, "name"));
    if dry_run {
        return decrement(&mut budget.clone(), pod_name);
    }
    let store = &call.context.store;
    store
        .guaranteed_update(&budgets.resource, &call.info.namespace, &name, |budget| {
            decrement(budget, pod_name).map(|()| true)
        })
        .await
        .map(|_| ())
}

/// As `checkAndDecrement`.
fn decrement(budget: &mut Value, pod: &str) -> Result<(), StatusError> {
    let name = metadata::text(budget, "name").to_owned();
    let status = |field: &str| int(budget, &format!("/status/{field}")).unwrap_or(0);
    if status("observedGeneration") < metadata::number(budget, "generation").unwrap_or(0) {
        let cause = format!("The disruption budget {name} is still being processed by the server.");
        return Err(StatusError::too_many_requests(VIOLATES, 10).with_cause("DisruptionBudget", &cause, None));
    }
    let allowed = status("disruptionsAllowed");
    if allowed < 0 {
        return Err(StatusError::forbidden(
            "policy",
            "poddisruptionbudget",
            &name,
            "pdb disruptions allowed is negative",
        ));
    }
    if map(budget, "/status/disruptedPods").is_some_and(|pods| pods.len() > DISRUPTED_PODS_MAX) {
        let why = "DisruptedPods map too big - too many evictions not confirmed by PDB controller";
        return Err(StatusError::forbidden("policy", "poddisruptionbudget", &name, why));
    }
    if allowed == 0 {
        let (needed, healthy) = (status("desiredHealthy"), status("currentHealthy"));
        let cause = if healthy < needed || needed > 0 {
            format!("The disruption budget {name} needs {needed} healthy pods and has {healthy} currently")
        } else {
            format!("The disruption budget {name} does not allow evicting pods currently")
        };
        return Err(StatusError::too_many_requests(VIOLATES, 0).with_cause("DisruptionBudget", &cause, None));
    }
    let now = apimachinery::time::rfc3339(jiff::Timestamp::now());
    let status = child(budget, "status");
    set(status, "disruptionsAllowed", allowed - 1);
    if allowed == 1 {
        let mut conditions = list(status, "/conditions").to_vec();
        let generation = int(status, "/observedGeneration").unwrap_or(0);
        conditions.retain(|c| c["type"] != "DisruptionAllowed");
        conditions.push(json!({"type": "DisruptionAllowed", "status": "False", "reason": "InsufficientPods",
            "message": "", "lastTransitionTime": now, "observedGeneration": generation}));
        set(status, "conditions", conditions);
    }
    set(child(status, "disruptedPods"), pod, now);
    Ok(())
}

/// Says on the pod why it goes.
async fn mark(call: &Call<'_>, pods: &OnObject<'_>, name: &str) -> Result<(), StatusError> {
    let now = apimachinery::time::rfc3339(jiff::Timestamp::now());
    call.context
        .store
        .guaranteed_update(&pods.resource, &call.info.namespace, name, |pod| {
            let status = child(pod, "status");
            let mut conditions = list(status, "/conditions").to_vec();
            conditions.retain(|c| c["type"] != "DisruptionTarget");
            conditions.push(json!({"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI",
                "message": "Eviction API: evicting", "lastTransitionTime": now}));
            set(status, "conditions", conditions);
            Ok(true)
        })
        .await
        .map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_spent_and_then_refuses() {
        let mut budget = json!({"metadata": {"name": "b", "generation": 1}, "spec": {},
            "status": {"observedGeneration": 1, "disruptionsAllowed": 1, "desiredHealthy": 2, "currentHealthy": 3}});
        decrement(&mut budget, "p").unwrap();
        assert_eq!(budget["status"]["disruptionsAllowed"], 0);
        assert!(budget["status"]["disruptedPods"]["p"].is_string());
        let error = decrement(&mut budget, "q").unwrap_err();
        assert_eq!((error.code(), error.message()), (429, VIOLATES));
        budget["metadata"]["generation"] = json!(2);
        assert_eq!(decrement(&mut budget, "q").unwrap_err().code(), 429);
    }

    #[test]
    fn unready_pods_may_go_where_the_budget_has_enough() {
        let unready = json!({"status": {"phase": "Running"}});
        let ready = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
        let budget = |healthy: i64, policy: &str| {
            json!({"spec": {"unhealthyPodEvictionPolicy": policy},
            "status": {"currentHealthy": healthy, "desiredHealthy": 2}})
        };
        for (budget, pod, expected) in [
            (budget(2, ""), &ready, true),
            (budget(2, ""), &unready, false),
            (budget(1, ""), &unready, true),
            (budget(1, "AlwaysAllow"), &unready, false),
        ] {
            assert_eq!(disrupts(&budget, pod), expected, "{budget}");
        }
        assert!(!needs_budget(&json!({"status": {"phase": "Succeeded"}})));
        assert!(needs_budget(&ready));
    }
}
