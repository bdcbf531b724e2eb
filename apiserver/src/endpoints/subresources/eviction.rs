//! `pods/eviction`: deletes a pod if its disruption budget allows that now.

use super::{OnObject, success};
use crate::endpoints::{Answer, Call, Endpoint, delete, metadata};
use crate::registry::core::pod::condition;
use crate::registry::object::{child, int, list, map, set, text};
use crate::registry::workload;
use apimachinery::status::StatusError;
use futures::future::BoxFuture;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Preconditions};
use serde_json::{Value, json};

/// A budget that has noted so many pods and not seen them go is behind. As `MaxDisruptedPodSize`.
const DISRUPTED_PODS_MAX: usize = 2000;
/// Attempts to delete a pod that changes meanwhile.
const ATTEMPTS: usize = 20;
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

    fn also_speaks(&self) -> &'static [&'static str] {
        &["policy/v1beta1"]
    }
}

/// What the pod must still be when it is deleted.
enum Guard {
    None,
    /// As it was judged: not running. If it changed, it is judged anew.
    Pending,
    /// As it was judged, by this budget: unready. If it changed, the client is to come again.
    Unready(String),
}

async fn evict(call: &Call<'_>) -> Result<(), StatusError> {
    let name = call.info.name.as_str();
    if metadata::text(&call.body, "name") != name {
        return Err(StatusError::bad_request("name in URL does not match name in Eviction object"));
    }
    let options: DeleteOptions = match call.body.get("deleteOptions") {
        Some(options) => {
            serde_json::from_value(options.clone()).map_err(|e| StatusError::bad_request(e.to_string()))?
        }
        None => DeleteOptions::default(),
    };
    let mut pods = OnObject::new(call, "", "v1", "pods", name)?;
    pods.dry_run |= options.dry_run.as_ref().is_some_and(|all| !all.is_empty());
    let versioned = options.preconditions.as_ref().is_some_and(|p| p.resource_version.is_some());
    let mut attempts = 0;
    loop {
        let pod = call.context.store.get(&pods.resource, &call.info.namespace, name).await?;
        let pod = pods.resource.value(&pod);
        let guard = admit(call, &pods, &pod).await?;
        let outcome = remove(&pods, &pod, options.clone(), &guard).await;
        attempts += 1;
        return match outcome {
            Err(error) if error.code() == 409 && !versioned => match guard {
                Guard::Pending if attempts < ATTEMPTS => continue,
                Guard::Unready(budget) => Err(behind(&budget)),
                _ => Err(error),
            },
            outcome => outcome,
        };
    }
}

/// Takes the disruption from the pod's budget, if it is one.
async fn admit(call: &Call<'_>, pods: &OnObject<'_>, pod: &Value) -> Result<Guard, StatusError> {
    if !needs_budget(pod) {
        let pending = text(pod, "/status/phase") == "Pending" && !metadata::is_being_deleted(pod);
        return Ok(if pending { Guard::Pending } else { Guard::None });
    }
    let budgets = OnObject::new(call, "policy", "v1", "poddisruptionbudgets", "")?;
    match matching_budgets(call, &budgets, pod)?.as_slice() {
        [] => Ok(Guard::None),
        [budget] if !disrupts(budget, pod) => Ok(Guard::Unready(metadata::text(budget, "name").to_owned())),
        [budget] => {
            take(call, &budgets, budget, pod, pods.dry_run).await?;
            Ok(Guard::None)
        }
        _ => Err(StatusError::new(
            500,
            "",
            "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
        )),
    }
}

/// Says on the pod why it goes, and deletes it. As `addConditionAndDeletePod`.
async fn remove(
    pods: &OnObject<'_>,
    pod: &Value,
    mut options: DeleteOptions,
    guard: &Guard,
) -> Result<(), StatusError> {
    let asked = options.preconditions.as_ref().and_then(|p| p.resource_version.clone());
    let version = match guard {
        Guard::None => asked,
        _ => Some(asked.unwrap_or_else(|| metadata::text(pod, "resourceVersion").to_owned())),
    };
    let mut current = version;
    let ended = matches!(text(pod, "/status/phase"), "Succeeded" | "Failed") || metadata::is_being_deleted(pod);
    if !pods.dry_run && !ended {
        let marked = mark(pods, current.as_deref()).await?;
        current = current.map(|_| marked);
    }
    if current.is_some() {
        options.preconditions.get_or_insert_with(Preconditions::default).resource_version = current;
    }
    delete::delete(&pods.request(), &options).await.map(|_| ())
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

/// The budget does not know yet how things stand. As `createTooManyRequestsError`.
fn behind(budget: &str) -> StatusError {
    let cause = format!("The disruption budget {budget} is still being processed by the server.");
    StatusError::too_many_requests(VIOLATES, 10).with_cause("DisruptionBudget", &cause, None)
}

/// As `checkAndDecrement`.
fn decrement(budget: &mut Value, pod: &str) -> Result<(), StatusError> {
    let name = metadata::text(budget, "name").to_owned();
    let status = |field: &str| int(budget, &format!("/status/{field}")).unwrap_or(0);
    if status("observedGeneration") < metadata::number(budget, "generation").unwrap_or(0) {
        return Err(behind(&name));
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

/// Notes the disruption on the pod, if it is of this version. Gives the version that it has by that.
async fn mark(pods: &OnObject<'_>, version: Option<&str>) -> Result<String, StatusError> {
    let now = apimachinery::time::rfc3339(jiff::Timestamp::now());
    let (store, info) = (&pods.context.store, &pods.info);
    let marked = store.guaranteed_update(&pods.resource, &info.namespace, &info.name, |pod| {
        if version.is_some_and(|version| version != metadata::text(pod, "resourceVersion")) {
            return Err(pods.request().stale());
        }
        let generation = pod.pointer("/metadata/generation").cloned();
        let status = child(pod, "status");
        let mut conditions = list(status, "/conditions").to_vec();
        conditions.retain(|c| c["type"] != "DisruptionTarget");
        conditions.push(json!({"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI",
            "message": "Eviction API: evicting", "lastTransitionTime": now, "observedGeneration": generation}));
        set(status, "conditions", conditions);
        Ok(true)
    });
    Ok(marked.await?.revision.to_string())
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
