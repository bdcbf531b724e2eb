//! LimitRanger: what the LimitRanges of a namespace give to containers that ask for nothing, and refuse to those that ask
//! for too much.
use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::pod::{self, Resources as Amounts};
use apimachinery::quantity::Quantity;
use apimachinery::quota::amounts;
use apimachinery::status::StatusError;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{LimitRange, LimitRangeItem, PodSpec};
use serde_json::{Value, json};

use super::{AdmissionRequest, Plugin, at, entry, list, object_in, text};
use crate::authorization::lister::{LIMIT_RANGES, Lister, typed};

const ANNOTATION: &str = "kubernetes.io/limit-ranger";

type Given = BTreeMap<String, k8s_openapi::apimachinery::pkg::api::resource::Quantity>;

pub struct LimitRanger {
    lister: Arc<dyn Lister>,
}

// === impl LimitRanger ===

impl LimitRanger {
    pub fn new(lister: Arc<dyn Lister>) -> Self {
        Self { lister }
    }

    fn ranges(&self, namespace: &str) -> Vec<LimitRange> {
        self.lister.list(LIMIT_RANGES, Some(namespace)).iter().filter_map(|range| typed(range)).collect()
    }
}

impl Plugin for LimitRanger {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        let kind = (request.creates() && request.is("", "pods", ""))
            || (request.updates() && request.is("", "pods", "resize"))
            || (request.writes() && request.is("", "persistentvolumeclaims", ""));
        kind && at(request.old(), "/metadata/deletionTimestamp").is_none()
    }

    fn mutate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        if request.attributes.resource == "pods" {
            let ranges = self.ranges(request.namespace());
            if let Some(pod) = request.object.as_deref_mut() {
                for range in &ranges {
                    give_defaults(range, pod);
                }
            }
        }
        Box::pin(std::future::ready(Ok(())))
    }

    fn validate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        let check = || {
            for range in self.ranges(request.namespace()) {
                let refusals = refusals(&range, request.new_object(), request.attributes.resource == "pods");
                match refusals.as_slice() {
                    [] => {}
                    [one] => return Err(request.forbidden(one)),
                    many => return Err(request.forbidden(format!("[{}]", many.join(", ")))),
                }
            }
            Ok(())
        };
        Box::pin(std::future::ready(check()))
    }
}

fn items<'r>(range: &'r LimitRange, kind: &'r str) -> impl Iterator<Item = &'r LimitRangeItem> {
    range.spec.iter().flat_map(|spec| &spec.limits).filter(move |item| item.type_ == kind)
}

/// As `mergePodResourceRequirements`.
fn give_defaults(range: &LimitRange, pod: &mut Value) {
    let mut limits: Given = BTreeMap::new();
    let mut requests: Given = BTreeMap::new();
    for item in items(range, "Container") {
        limits.extend(item.default.clone().unwrap_or_default());
        requests.extend(item.default_request.clone().unwrap_or_default());
    }
    if limits.is_empty() && requests.is_empty() {
        return;
    }
    let mut notes = Vec::new();
    for (member, what) in [("containers", "container"), ("initContainers", "init container")] {
        let Some(containers) = pod.pointer_mut(&format!("/spec/{member}")).and_then(Value::as_array_mut) else {
            continue;
        };
        for container in containers {
            let name = text(container, "/name").to_owned();
            for (defaults, kind, word) in [(&requests, "requests", "request"), (&limits, "limits", "limit")] {
                let mut set = Vec::new();
                for (resource, amount) in defaults {
                    let pointer = format!("/resources/{kind}/{}", resource.replace('~', "~0").replace('/', "~1"));
                    if container.pointer(&pointer).is_none() {
                        let amounts = object_in(entry(container, "resources"), kind);
                        amounts.insert(resource.clone(), json!(amount.0));
                        set.push(resource.as_str());
                    }
                }
                if !set.is_empty() {
                    notes.push(format!("{} {word} for {what} {name}", set.join(", ")));
                }
            }
        }
    }
    if !notes.is_empty() {
        let annotations = object_in(entry(pod, "metadata"), "annotations");
        annotations.insert(ANNOTATION.to_owned(), json!(format!("LimitRanger plugin set: {}", notes.join("; "))));
    }
}

/// As `PodValidateLimitFunc` and `PersistentVolumeClaimValidateLimitFunc`.
fn refusals(range: &LimitRange, object: &Value, is_pod: bool) -> Vec<String> {
    let mut refusals = Vec::new();
    let mut check = |item: &LimitRangeItem, requests: &Amounts, limits: &Amounts| {
        for (resource, min) in item.min.iter().flatten() {
            refusals.extend(below(&item.type_, resource, &min.0, requests, limits));
        }
        for (resource, max) in item.max.iter().flatten() {
            refusals.extend(above(&item.type_, resource, &max.0, requests, limits));
        }
        // A claim has no limits.
        for (resource, ratio) in item.max_limit_request_ratio.iter().filter(|_| is_pod).flatten() {
            refusals.extend(beyond_ratio(&item.type_, resource, &ratio.0, requests, limits));
        }
    };
    if !is_pod {
        let requests = amounts(object, "/spec/resources/requests");
        for item in items(range, "PersistentVolumeClaim") {
            check(item, &requests, &Amounts::new());
        }
        return refusals;
    }
    let containers = || list(object, "/spec/containers").iter().chain(list(object, "/spec/initContainers"));
    for item in items(range, "Container") {
        for container in containers() {
            check(item, &amounts(container, "/resources/requests"), &amounts(container, "/resources/limits"));
        }
    }
    let (requests, limits) = of_pod(object);
    for item in items(range, "Pod") {
        check(item, &requests, &limits);
    }
    refusals
}

/// What a pod asks for as a whole, its overhead aside.
fn of_pod(pod: &Value) -> (Amounts, Amounts) {
    let spec: Option<PodSpec> = serde_json::from_value(pod["spec"].clone()).ok();
    let spec = spec.map(|spec| PodSpec { overhead: None, ..spec });
    spec.map(|spec| (pod::requests(&spec), pod::limits(&spec))).unwrap_or_default()
}

/// As `minConstraint`.
fn below(kind: &str, resource: &str, min: &str, requests: &Amounts, limits: &Amounts) -> Option<String> {
    let min = Quantity::parse(min).ok()?;
    let Some(request) = requests.get(resource) else {
        return Some(format!("minimum {resource} usage per {kind} is {min}.  No request is specified"));
    };
    if *request < min {
        return Some(format!("minimum {resource} usage per {kind} is {min}, but request is {request}"));
    }
    let limit = limits.get(resource).filter(|limit| **limit < min)?;
    Some(format!("minimum {resource} usage per {kind} is {min}, but limit is {limit}"))
}

/// As `maxConstraint`; for claims, which have no limits, `maxRequestConstraint`.
fn above(kind: &str, resource: &str, max: &str, requests: &Amounts, limits: &Amounts) -> Option<String> {
    let max = Quantity::parse(max).ok()?;
    if kind == "PersistentVolumeClaim" {
        let Some(request) = requests.get(resource) else {
            return Some(format!("maximum {resource} usage per {kind} is {max}.  No request is specified"));
        };
        return (*request > max)
            .then(|| format!("maximum {resource} usage per {kind} is {max}, but request is {request}"));
    }
    let Some(limit) = limits.get(resource) else {
        return Some(format!("maximum {resource} usage per {kind} is {max}.  No limit is specified"));
    };
    if *limit > max {
        return Some(format!("maximum {resource} usage per {kind} is {max}, but limit is {limit}"));
    }
    let request = requests.get(resource).filter(|request| **request > max)?;
    Some(format!("maximum {resource} usage per {kind} is {max}, but request is {request}"))
}

/// As `limitRequestRatioConstraint`.
fn beyond_ratio(kind: &str, resource: &str, ratio: &str, requests: &Amounts, limits: &Amounts) -> Option<String> {
    let ratio = Quantity::parse(ratio).ok()?;
    let most = ratio.milli_value() as f64 / 1000.0;
    let amount = |of: &Amounts| of.get(resource).map(Quantity::milli_value).filter(|milli| *milli != 0);
    let head = format!("{resource} max limit to request ratio per {kind} is {ratio}, but");
    let Some(request) = amount(requests) else {
        return Some(format!("{head} no request is specified or request is 0"));
    };
    let Some(limit) = amount(limits) else { return Some(format!("{head} no limit is specified or limit is 0")) };
    let given = limit as f64 / request as f64;
    (given > most).then(|| format!("{head} provided ratio is {given:.6}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::create;
    use crate::authorization::lister::fake::Objects;

    fn plugin(limits: Value) -> LimitRanger {
        let range = json!({"metadata": {"name": "r", "namespace": "a"}, "spec": {"limits": limits}});
        LimitRanger::new(Objects::of([(LIMIT_RANGES, range)]))
    }

    #[tokio::test]
    async fn containers_that_ask_for_nothing_get_the_defaults() {
        let plugin = plugin(
            json!([{"type": "Container", "default": {"cpu": "200m", "memory": "1Gi"}, "defaultRequest": {"cpu": "100m"}}]),
        );
        let mut pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [
            {"name": "c"}, {"name": "d", "resources": {"limits": {"cpu": "1", "memory": "2Gi"}}}]}});
        create(&plugin, "/pods", "a", &mut pod).await.unwrap();
        assert_eq!(
            pod["spec"]["containers"][0]["resources"],
            json!({"limits": {"cpu": "200m", "memory": "1Gi"}, "requests": {"cpu": "100m"}})
        );
        assert_eq!(
            pod["metadata"]["annotations"][ANNOTATION],
            "LimitRanger plugin set: cpu request for container c; cpu, memory limit for container c; cpu request for container d"
        );
    }

    #[tokio::test]
    async fn who_asks_for_too_much_or_too_little_is_told() {
        for (limits, resources, why) in [
            (
                json!([{"type": "Container", "max": {"cpu": "1"}}]),
                json!({"limits": {"cpu": "2"}}),
                Some("maximum cpu usage per Container is 1, but limit is 2"),
            ),
            (json!([{"type": "Container", "max": {"cpu": "1"}}]), json!({"limits": {"cpu": "1"}}), None),
            (
                json!([{"type": "Container", "max": {"cpu": "1"}}]),
                json!({}),
                Some("maximum cpu usage per Container is 1.  No limit is specified"),
            ),
            (
                json!([{"type": "Pod", "min": {"memory": "1Gi"}}]),
                json!({"requests": {"memory": "100Mi"}}),
                Some("minimum memory usage per Pod is 1Gi, but request is 100Mi"),
            ),
            (
                json!([{"type": "Container", "min": {"cpu": "1"}, "max": {"cpu": "2"}}]),
                json!({"requests": {"cpu": "500m"}, "limits": {"cpu": "3"}}),
                Some(
                    "[minimum cpu usage per Container is 1, but request is 500m, maximum cpu usage per Container is 2, but limit is 3]",
                ),
            ),
            (
                json!([{"type": "Container", "maxLimitRequestRatio": {"cpu": "2"}}]),
                json!({"requests": {"cpu": "100m"}, "limits": {"cpu": "500m"}}),
                Some("cpu max limit to request ratio per Container is 2, but provided ratio is 5.000000"),
            ),
        ] {
            let mut pod =
                json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "resources": resources}]}});
            let outcome = create(&plugin(limits), "/pods", "a", &mut pod).await;
            let expected = why.map(|why| format!("pods \"p\" is forbidden: {why}"));
            assert_eq!(outcome.err().map(|error| error.message().to_owned()), expected);
        }
        let mut claim = json!({"metadata": {"name": "c"}, "spec": {"resources": {"requests": {"storage": "2Gi"}}}});
        let plugin = plugin(json!([{"type": "PersistentVolumeClaim", "max": {"storage": "1Gi"}}]));
        let error = create(&plugin, "/persistentvolumeclaims", "a", &mut claim).await.unwrap_err();
        assert!(
            error.message().ends_with("maximum storage usage per PersistentVolumeClaim is 1Gi, but request is 2Gi")
        );
    }
}
