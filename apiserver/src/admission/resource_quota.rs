//! ResourceQuota: what an object will use is claimed from the quotas of its namespace before it is written.
//!
//! A claim is a compare-and-swap of the quota's status, so it holds among any number of API servers. Requests that come
//! while a namespace's quotas are being written wait for the next round, which claims for all of them at once: under load a
//! round costs one write a quota, however many requests it answers. Where there is no quota, nothing is done.
use super::{AdmissionRequest, Operation, Plugin};
use crate::authorization::lister::{DEVICE_CLASSES, Lister, PODS, RESOURCE_CLAIMS, RESOURCE_QUOTAS};
use crate::registry::Resource;
use crate::storage::{Put, Store, StoredObject};
use apimachinery::pod::Resources;
use apimachinery::quota::{self, Limited, Measured, Quota, Uncovered};
use apimachinery::status::StatusError;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// How long a request waits for its answer. As Kubernetes.
const WAIT: Duration = Duration::from_secs(10);
/// Attempts to write one quota, which others write too.
const ATTEMPTS: usize = 30;
/// How often a claim is judged that others overtook.
const PASSES: usize = 4;

/// What claims are written in.
pub trait Ledger: Send + Sync + 'static {
    /// Writes a quota if it is still the one at `expected`.
    fn write<'a>(&'a self, quota: &'a Value, expected: i64) -> BoxFuture<'a, Result<Put, StatusError>>;
}

/// See the module.
pub struct ResourceQuota {
    rounds: Arc<Rounds>,
    limited: Vec<Limited>,
}

/// As `apiserver.config.k8s.io/v1 ResourceQuotaConfiguration`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Configuration {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    /// What may be used only where a quota limits it.
    limited_resources: Vec<Limited>,
}

/// The namespaces whose quotas are being written, with those who wait for the next round.
struct Rounds {
    lister: Arc<dyn Lister>,
    ledger: Arc<dyn Ledger>,
    waiting: Mutex<HashMap<String, Vec<Claim>>>,
}

/// One request's claim.
struct Claim {
    kind: (String, String),
    new: Measured,
    old: Option<Measured>,
    /// What happened already (a status) is charged whether or not there is room.
    unlimited: bool,
    dry_run: bool,
    verdict: Option<Result<(), Refusal>>,
    /// Why it was refused by a quota to which others came first.
    overtaken: Option<String>,
    claimed: Claimed,
    answer: oneshot::Sender<Result<Claimed, Refusal>>,
}

/// What was claimed, by the quota's name.
type Claimed = Vec<(String, Resources)>;

/// Why a claim was refused.
#[derive(Clone, Debug)]
enum Refusal {
    /// By a quota: forbidden.
    Quota(String),
    Failed(StatusError),
}

/// The server's own store, and the quotas' place in it.
pub struct StoredQuotas {
    pub store: Arc<Store>,
    pub resource: Arc<Resource>,
}

// === impl ResourceQuota ===

impl ResourceQuota {
    pub fn new(lister: Arc<dyn Lister>, ledger: Arc<dyn Ledger>, configuration: Configuration) -> Self {
        let limited = configuration.limited_resources;
        Self { rounds: Arc::new(Rounds { lister, ledger, waiting: Mutex::default() }), limited }
    }

    /// What an object uses. Devices have names that their classes give them, and a pod may be charged for them already.
    fn measure(&self, request: &AdmissionRequest<'_>, object: &Value) -> Measured {
        let (attributes, lister, now) = (request.attributes, &self.rounds.lister, jiff::Timestamp::now());
        let (group, resource) = (attributes.group.as_str(), attributes.resource.as_str());
        let mut measured = quota::measure(group, resource, object, now);
        if (group, resource) == ("resource.k8s.io", "resourceclaims") {
            let namespace = attributes.namespace.as_str();
            let pod = |name: &str| lister.get(PODS, namespace, name).map(|pod| pod.value());
            let others = || lister.list(RESOURCE_CLAIMS, Some(namespace)).iter().map(|claim| claim.value()).collect();
            let pod = quota::charged_pod(object, pod, others).map(|pod| quota::measure("", "pods", &pod, now));
            let called = |class: &str| {
                let class = lister.get(DEVICE_CLASSES, "", class)?.value();
                class.pointer("/spec/extendedResourceName")?.as_str().map(ToOwned::to_owned)
            };
            quota::name_devices(&mut measured, called, pod.as_ref());
        }
        measured
    }

    /// Refuses what needs a quota where there is none. The cache is asked first; what it refuses, the newest state must.
    async fn check_limited(&self, request: &AdmissionRequest<'_>) -> Result<(), StatusError> {
        if self.limited.is_empty() || request.attributes.subresource == "status" {
            return Ok(());
        }
        let (group, resource) = (request.attributes.group.as_str(), request.attributes.resource.as_str());
        let new = self.measure(request, request.new_object());
        let adds = request.old_object.is_none_or(|old| new.exceeds(&self.measure(request, old)));
        let find = || {
            let stored = self.rounds.lister.list(RESOURCE_QUOTAS, Some(&request.attributes.namespace));
            let quotas: Vec<Quota> = stored.iter().map(|object| Quota::of(&object.value())).collect();
            new.uncovered((group, resource), adds, &self.limited, &quotas)
        };
        if find().is_none() {
            return Ok(());
        }
        self.rounds.lister.refresh().await?;
        match find() {
            None => Ok(()),
            Some(Uncovered::Resources(names)) => {
                Err(request.forbidden(format!("insufficient quota to consume: {}", names.join(","))))
            }
            Some(Uncovered::Scopes(scopes)) => {
                Err(StatusError::new(500, "", format!("insufficient quota to match these scopes: {scopes}")))
            }
        }
    }

    async fn claim(&self, request: &mut AdmissionRequest<'_>) -> Result<(), StatusError> {
        let attributes = request.attributes;
        let namespace = attributes.namespace.as_str();
        let (group, resource) = (attributes.group.as_str(), attributes.resource.as_str());
        self.check_limited(request).await?;
        let quotas = self.rounds.lister.list(RESOURCE_QUOTAS, Some(namespace));
        let counts = |quota: Quota| quota.hard.keys().any(|name| quota::counts(group, resource, name));
        if !quotas.iter().any(|quota| counts(Quota::of(&quota.value()))) {
            return Ok(());
        }
        let (answer, answered) = oneshot::channel();
        let claim = Claim {
            kind: (group.to_owned(), resource.to_owned()),
            new: self.measure(request, request.new_object()),
            old: request.old_object.map(|old| self.measure(request, old)),
            unlimited: attributes.subresource == "status",
            dry_run: request.dry_run,
            verdict: None,
            overtaken: None,
            claimed: Vec::new(),
            answer,
        };
        self.rounds.clone().join(namespace, claim);
        let late = || StatusError::internal("resource quota evaluation timed out");
        match tokio::time::timeout(WAIT, answered).await {
            Ok(Ok(Ok(claimed))) => {
                if !claimed.is_empty() {
                    let (rounds, namespace) = (self.rounds.clone(), namespace.to_owned());
                    request
                        .undo
                        .push(Box::new(|| Box::pin(async move { rounds.give_back(&namespace, claimed).await })));
                }
                Ok(())
            }
            Ok(Ok(Err(Refusal::Quota(why)))) => Err(request.forbidden(why)),
            Ok(Ok(Err(Refusal::Failed(error)))) => Err(error),
            Ok(Err(_)) | Err(_) => Err(late()),
        }
    }
}

impl Plugin for ResourceQuota {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        let a = request.attributes;
        if a.namespace.is_empty() || a.resource == "namespaces" || !request.writes() {
            return false;
        }
        match (a.group.as_str(), a.resource.as_str(), a.subresource.as_str()) {
            ("" | "events.k8s.io", "events", _) => false,
            ("", "pods", "resize") => request.updates(),
            ("", "persistentvolumeclaims", "status") => request.updates(),
            ("", "services" | "persistentvolumeclaims", "") => true,
            ("resource.k8s.io", "resourceclaims", "") => true,
            (_, _, "") => {
                request.operation == Operation::Create && request.resource.is_none_or(|r| r.facts.is_stored())
            }
            _ => false,
        }
    }

    fn validate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        Box::pin(self.claim(request))
    }
}

// === impl Rounds ===

impl Rounds {
    /// Takes part in the next round of a namespace; starts one if none is under way. The rounds have a task of their own:
    /// a client that leaves must not leave a claim half made.
    fn join(self: Arc<Self>, namespace: &str, claim: Claim) {
        let mut waiting = self.waiting.lock();
        if let Some(others) = waiting.get_mut(namespace) {
            others.push(claim);
            return;
        }
        waiting.insert(namespace.to_owned(), vec![claim]);
        drop(waiting);
        tokio::spawn(Leading { rounds: self, namespace: namespace.to_owned() }.run());
    }

    /// One round: judge all by what is known, write what that changes, answer. Those who find, when it comes to writing, that
    /// others came first give back what they claimed elsewhere and are judged again: what the others claimed may have been in
    /// vain, too.
    async fn round(&self, namespace: &str, mut claims: Vec<Claim>) {
        for pass in 1..=PASSES {
            let outcome = self.settle(namespace, &mut claims).await;
            for claim in claims.iter_mut().filter(|claim| claim.verdict.is_none()) {
                let lost = claim.overtaken.take();
                claim.verdict = match (&outcome, &lost) {
                    (Err(error), _) => Some(Err(Refusal::Failed(error.clone()))),
                    (Ok(()), None) => Some(Ok(())),
                    (Ok(()), Some(why)) if pass == PASSES => Some(Err(Refusal::Quota(why.clone()))),
                    (Ok(()), Some(_)) => None,
                };
                if matches!(claim.verdict, Some(Ok(()))) {
                    continue;
                }
                self.give_back(namespace, std::mem::take(&mut claim.claimed)).await;
            }
            if claims.iter().all(|claim| claim.verdict.is_some()) {
                break;
            }
        }
        for claim in claims {
            let claimed = claim.claimed;
            if let Err(Ok(claimed)) = claim.answer.send(claim.verdict.unwrap_or(Ok(())).map(|()| claimed)) {
                // Who does not listen any more has left.
                self.give_back(namespace, claimed).await;
            }
        }
    }

    /// Claims for those who have no verdict yet; refuses those for whom there is no room.
    async fn settle(&self, namespace: &str, claims: &mut [Claim]) -> Result<(), StatusError> {
        let mut open: Vec<&mut Claim> = claims.iter_mut().filter(|claim| claim.verdict.is_none()).collect();
        let mut stored = self.lister.list(RESOURCE_QUOTAS, Some(namespace));
        let mut changed = judge(&stored, &mut open);
        if open.iter().any(|claim| claim.verdict.is_some()) {
            // The cache may lag behind what the client knows: refuse only what the newest state refuses.
            self.lister.refresh().await?;
            open.iter_mut().for_each(|claim| claim.verdict = None);
            stored = self.lister.list(RESOURCE_QUOTAS, Some(namespace));
            changed = judge(&stored, &mut open);
        }
        open.retain(|claim| claim.verdict.is_none() && !claim.dry_run);
        for (current, _) in stored.into_iter().zip(changed).filter(|(_, changed)| *changed) {
            self.write(current, &mut open).await?;
        }
        Ok(())
    }

    /// Charges one quota with all claims that stand, until nobody comes between.
    async fn write(&self, mut current: Arc<StoredObject>, claims: &mut [&mut Claim]) -> Result<(), StatusError> {
        for _ in 0..ATTEMPTS {
            let mut object = current.value();
            let mut quota = Quota::of(&object);
            let mut added: Vec<Option<Resources>> = Vec::with_capacity(claims.len());
            for claim in claims.iter_mut() {
                added.push(match claim.charge(&quota) {
                    _ if claim.overtaken.is_some() => None,
                    Ok(more) if more.is_empty() => None,
                    Ok(more) => {
                        quota.add(&more);
                        Some(more)
                    }
                    Err(why) => {
                        claim.overtaken = Some(why);
                        None
                    }
                });
            }
            if added.iter().all(Option::is_none) {
                return Ok(());
            }
            set_used(&mut object, &quota);
            match self.ledger.write(&object, current.revision).await? {
                Put::Written(_) => {
                    for (claim, added) in claims.iter_mut().zip(added) {
                        claim.claimed.extend(added.map(|added| (quota.name.clone(), added)));
                    }
                    return Ok(());
                }
                Put::Conflict(Some(newer)) => current = newer,
                // The quota is gone, and its limits with it.
                Put::Conflict(None) => return Ok(()),
            }
        }
        Err(StatusError::stale("", "resourcequotas", &current.identity.name))
    }

    async fn give_back(&self, namespace: &str, claimed: Claimed) {
        for (quota, added) in claimed {
            if let Err(error) = self.release(namespace, &quota, &added).await {
                // The controller counts anew before long.
                tracing::warn!(namespace, quota, %error, "what was claimed in vain could not be given back");
            }
        }
    }

    async fn release(&self, namespace: &str, name: &str, added: &Resources) -> Result<(), StatusError> {
        let Some(mut current) = self.lister.get(RESOURCE_QUOTAS, namespace, name) else { return Ok(()) };
        for _ in 0..ATTEMPTS {
            let mut object = current.value();
            let mut quota = Quota::of(&object);
            quota.release(added);
            set_used(&mut object, &quota);
            match self.ledger.write(&object, current.revision).await? {
                Put::Conflict(Some(newer)) => current = newer,
                Put::Written(_) | Put::Conflict(None) => return Ok(()),
            }
        }
        Err(StatusError::stale("", "resourcequotas", name))
    }
}

/// Judges all claims in their order by the quotas as they stand; says which quotas would change.
fn judge(stored: &[Arc<StoredObject>], claims: &mut [&mut Claim]) -> Vec<bool> {
    let mut quotas: Vec<Quota> = stored.iter().map(|object| Quota::of(&object.value())).collect();
    let mut changed = vec![false; quotas.len()];
    for claim in claims {
        let charges: Result<Vec<Resources>, String> = quotas.iter().map(|quota| claim.charge(quota)).collect();
        match charges {
            Ok(_) if claim.dry_run => {}
            Ok(charges) => {
                for ((quota, changed), added) in quotas.iter_mut().zip(&mut changed).zip(charges) {
                    *changed |= !added.is_empty();
                    quota.add(&added);
                }
            }
            Err(why) => claim.verdict = Some(Err(Refusal::Quota(why))),
        }
    }
    changed
}

fn set_used(object: &mut Value, quota: &Quota) {
    object["status"]["used"] = quota::to_value(&quota.used);
}

// === impl Claim ===

impl Claim {
    fn charge(&self, quota: &Quota) -> Result<Resources, String> {
        quota.charge((&self.kind.0, &self.kind.1), &self.new, self.old.as_ref(), self.unlimited)
    }
}

/// Whoever leads a namespace's rounds. However it ends, the next claim finds the way clear.
struct Leading {
    rounds: Arc<Rounds>,
    namespace: String,
}

impl Leading {
    async fn run(self) {
        loop {
            let claims = {
                let mut waiting = self.rounds.waiting.lock();
                match waiting.get_mut(&self.namespace).map(std::mem::take) {
                    Some(claims) if !claims.is_empty() => claims,
                    _ => {
                        waiting.remove(&self.namespace);
                        return;
                    }
                }
            };
            self.rounds.round(&self.namespace, claims).await;
        }
    }
}

impl Drop for Leading {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.rounds.waiting.lock().remove(&self.namespace);
        }
    }
}

impl Ledger for StoredQuotas {
    fn write<'a>(&'a self, quota: &'a Value, expected: i64) -> BoxFuture<'a, Result<Put, StatusError>> {
        Box::pin(self.store.put(&self.resource, quota, expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::{attributes, create};
    use crate::authorization::lister::fake::Objects;
    use serde_json::json;

    /// Writes that meet another's every third time.
    struct Contended {
        objects: Arc<Objects>,
        writes: Mutex<usize>,
    }

    impl Ledger for Contended {
        fn write<'a>(&'a self, quota: &'a Value, expected: i64) -> BoxFuture<'a, Result<Put, StatusError>> {
            Box::pin(async move {
                let name = quota["metadata"]["name"].as_str().unwrap();
                let mut writes = self.writes.lock();
                *writes += 1;
                let current = self.objects.get(RESOURCE_QUOTAS, "a", name).unwrap();
                if writes.is_multiple_of(3) {
                    // Another server claims one, too.
                    let mut other = current.value();
                    let mut theirs = Quota::of(&other);
                    theirs
                        .add(&Resources::from([("pods".to_owned(), apimachinery::quantity::Quantity::from_value(1))]));
                    set_used(&mut other, &theirs);
                    self.objects.put(RESOURCE_QUOTAS, other);
                }
                let current = self.objects.get(RESOURCE_QUOTAS, "a", name).unwrap();
                if current.revision != expected {
                    return Ok(Put::Conflict(Some(current)));
                }
                self.objects.put(RESOURCE_QUOTAS, quota.clone());
                Ok(Put::Written(self.objects.get(RESOURCE_QUOTAS, "a", name).unwrap()))
            })
        }
    }

    fn quota(name: &str, resource: &str, hard: u32) -> Value {
        json!({"metadata": {"name": name, "namespace": "a"}, "spec": {},
            "status": {"hard": {resource: hard.to_string()}, "used": {resource: "0"}}})
    }

    fn plugin(quotas: &[Value]) -> (Arc<ResourceQuota>, Arc<Objects>) {
        let objects = Objects::of(quotas.iter().map(|quota| (RESOURCE_QUOTAS, quota.clone())));
        let ledger = Contended { objects: objects.clone(), writes: Mutex::default() };
        let configuration = serde_json::from_value(json!({"limitedResources": [
            {"resource": "pods", "matchScopes": [{"scopeName": "PriorityClass", "operator": "In", "values": ["top"]}]},
            {"apiGroup": "apps", "resource": "deployments", "matchContains": ["count/"]}]}));
        (Arc::new(ResourceQuota::new(objects.clone(), Arc::new(ledger), configuration.unwrap())), objects)
    }

    fn used(objects: &Objects, name: &str) -> Value {
        objects.get(RESOURCE_QUOTAS, "a", name).unwrap().value()["status"]["used"].clone()
    }

    #[tokio::test]
    async fn no_more_is_claimed_than_there_is_whoever_else_claims() {
        let (plugin, objects) = plugin(&[quota("q", "pods", 20)]);
        let requests = (0..50).map(|_| {
            let plugin = plugin.clone();
            tokio::spawn(async move {
                let mut pod = json!({"metadata": {"name": "p"}, "spec": {"containers": []}});
                create(&*plugin, "/pods", "a", &mut pod).await.map_err(|error| error.message().to_owned())
            })
        });
        let answers = futures::future::join_all(requests).await;
        let granted = answers.iter().filter(|answer| answer.as_ref().unwrap().is_ok()).count();
        assert_eq!(used(&objects, "q"), json!({"pods": "20"}));
        assert!(granted <= 20 && granted > 10, "{granted} and what others took are 20");
        let why = answers.into_iter().find_map(|answer| answer.unwrap().err()).unwrap();
        assert!(why.starts_with("pods \"p\" is forbidden: exceeded quota: q, requested: pods=1, used: pods="), "{why}");
    }

    #[tokio::test]
    async fn what_one_quota_refuses_no_other_keeps() {
        let (plugin, objects) = plugin(&[quota("a", "count/secrets", 5), quota("b", "secrets", 0)]);
        let mut secret = json!({"metadata": {"name": "s"}});
        assert_eq!(create(&*plugin, "/secrets", "a", &mut secret).await.unwrap_err().code(), 403);
        assert_eq!(used(&objects, "a"), json!({"count/secrets": "0"}));
        assert!(create(&*plugin, "/configmaps", "a", &mut secret).await.is_ok());
        assert!(create(&*plugin, "/secrets", "elsewhere", &mut secret).await.is_ok());
        assert!(plugin.rounds.waiting.lock().is_empty());
    }

    #[tokio::test]
    async fn what_is_limited_by_default_is_refused_without_a_quota() {
        let (plugin, _) = plugin(&[quota("q", "count/deployments.apps", 5)]);
        let mut deployment = json!({"metadata": {"name": "d"}});
        assert!(create(&*plugin, "apps/deployments", "a", &mut deployment).await.is_ok());
        let error = create(&*plugin, "apps/deployments", "b", &mut deployment).await.unwrap_err();
        let why = "deployments.apps \"d\" is forbidden: insufficient quota to consume: count/deployments.apps";
        assert_eq!((error.code(), error.message()), (403, why));
        let mut pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [], "priorityClassName": "top"}});
        let error = create(&*plugin, "/pods", "a", &mut pod).await.unwrap_err();
        let why = "insufficient quota to match these scopes: [{PriorityClass In [top]}]";
        assert_eq!((error.code(), error.message()), (500, why));
    }

    #[tokio::test]
    async fn devices_count_by_the_names_that_they_have_as_resources_and_once_for_a_pod() {
        let (plugin, objects) = plugin(&[quota("q", "requests.example.com/gpu", 3)]);
        objects.put(
            DEVICE_CLASSES,
            json!({"metadata": {"name": "gpu"}, "spec": {"extendedResourceName": "example.com/gpu"}}),
        );
        let container = json!({"name": "c", "resources": {"requests": {"example.com/gpu": "2"}}});
        let mut pod =
            json!({"metadata": {"name": "p", "namespace": "a", "uid": "u"}, "spec": {"containers": [container]}});
        create(&*plugin, "/pods", "a", &mut pod).await.unwrap();
        objects.put(PODS, pod);
        let claim = |name: &str, meta: Value| {
            let request = json!({"name": "r", "exactly": {"deviceClassName": "gpu", "count": 2}});
            let mut claim = json!({"metadata": meta, "spec": {"devices": {"requests": [request]}}});
            claim["metadata"]["name"] = name.into();
            claim
        };
        let owner = json!([{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u", "controller": true}]);
        let made = json!({"annotations": {"resource.kubernetes.io/extended-resource-claim": "true"}, "ownerReferences": owner});
        let mut own = claim("a-of-p", made.clone());
        create(&*plugin, "resource.k8s.io/resourceclaims", "a", &mut own).await.unwrap();
        assert_eq!(
            used(&objects, "q"),
            json!({"requests.example.com/gpu": "2"}),
            "the pod is charged, the claim is not"
        );
        own["metadata"]["namespace"] = "a".into();
        objects.put(RESOURCE_CLAIMS, own);
        for mut other in [claim("b-of-p", made), claim("c", json!({}))] {
            let error = create(&*plugin, "resource.k8s.io/resourceclaims", "a", &mut other).await.unwrap_err();
            let why = "exceeded quota: q, requested: requests.example.com/gpu=2, used: requests.example.com/gpu=2, limited: requests.example.com/gpu=3";
            assert!(error.message().ends_with(why), "{}", error.message());
        }
    }

    #[tokio::test]
    async fn a_dry_run_claims_nothing_and_is_refused_all_the_same() {
        let (plugin, objects) = plugin(&[quota("q", "secrets", 1)]);
        let of = attributes("/secrets", "a", "ann", &[]);
        for (dry_run, allowed, taken) in [(true, true, "0"), (false, true, "1"), (true, false, "1")] {
            let mut secret = json!({"metadata": {"name": "s"}});
            let mut request = crate::admission::testing::request(&of, Operation::Create, Some(&mut secret), None);
            request.dry_run = dry_run;
            assert_eq!(plugin.validate(&mut request).await.is_ok(), allowed);
            assert_eq!(used(&objects, "q"), json!({"secrets": taken}));
        }
    }
}
