//! ResourceQuotas: their usage, counted anew from what there is.
//!
//! Admission claims usage when objects come; this controller notices when they go, grow less or end, and counts all that a
//! quota counts. It writes only over the quota that it saw before it counted, so that no claim is lost which was made while
//! it counted. Nor one whose object was still on its way to the store: usage is lowered only when the last claim is a moment
//! old. (While there is room, nobody needs what is free; when there is none, nothing is claimed.)
mod watches;

use crate::runtime::{Context, Next, Reconcile, ServerResource, SyncError, WorkQueue, discover, is_code, run};
use apimachinery::meta::NamespacedName;
use apimachinery::pod::Resources;
use apimachinery::quantity::Quantity;
use apimachinery::quota::{self, Measured, Quota};
use component_base::informer::Informer;
use k8s_openapi::{
    api::{
        core::v1::{Pod, ResourceQuota},
        resource::v1::DeviceClass,
    },
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ListParams, PostParams},
    core::DynamicObject,
};
use parking_lot::Mutex;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};
use tracing::debug;
use watches::Watches;

const NAME: &str = "resource_quota_controller_resource_changes";
/// Changes of a namespace within this time are counted together.
const GATHER: Duration = Duration::from_millis(100);
/// How old the last claim must be for usage to be lowered: its object is stored by then.
const QUIET: Duration = Duration::from_secs(1);
/// Should one have taken longer, a count that lowered the usage is repeated.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Objects that one list may hold.
const PAGE: u32 = 500;
/// How long what the server said of its kinds holds for one that it does not have.
const DISCOVERY_AGE: Duration = Duration::from_secs(30);

/// Group and plural name.
type Kind = (String, String);

struct Controller {
    client: Client,
    quotas: Informer<ResourceQuota>,
    watches: Watches,
    kinds: Mutex<Option<(Instant, HashMap<Kind, ServerResource>)>>,
    claims: Arc<Claims>,
    sync_period: Duration,
}

/// When the usage of a quota was last seen to rise.
#[derive(Default)]
struct Claims(Mutex<HashMap<NamespacedName, Instant>>);

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("resourcequota-controller").await else { return };
    let quotas = context.informers.get::<ResourceQuota>();
    let queue = Arc::new(WorkQueue::new(NAME));
    let (to, claims) = (queue.clone(), Arc::new(Claims::default()));
    let noted = claims.clone();
    quotas.on_change(move |change| {
        let Some(quota) = change.latest() else { return };
        let key = NamespacedName::new(quota.namespace().unwrap_or_default(), quota.name_any());
        noted.note(&key, change.old.map(|q| &**q), change.new.map(|q| &**q));
        // The status is this controller's own, and admission's.
        if let Some(new) = change.new
            && (change.old.is_none_or(|old| old.spec != new.spec) || status_lacks(new))
        {
            to.add(key);
        }
    });
    quotas.synced().await;
    let watches = Watches::new(context.clone(), quotas.clone(), queue.clone());
    let sync_period = context.settings.resource_quota_sync_period;
    let controller = Arc::new(Controller { client, quotas, watches, kinds: Mutex::default(), claims, sync_period });
    run(NAME, queue, controller, context.settings.concurrent_resource_quota_syncs, context.shutdown.clone()).await;
}

/// Whether the status was not counted for all limits.
fn status_lacks(quota: &ResourceQuota) -> bool {
    let hard = quota.spec.as_ref().and_then(|s| s.hard.as_ref());
    let status = quota.status.as_ref();
    hard.is_some_and(|hard| status.and_then(|s| s.hard.as_ref()) != Some(hard))
        || status.is_some_and(|s| s.hard.is_some() && s.used.is_none())
}

/// The kinds that a quota counts.
fn kinds_of(quota: &ResourceQuota) -> BTreeSet<Kind> {
    let hard = quota.spec.iter().filter_map(|s| s.hard.as_ref()).flatten();
    hard.flat_map(|(name, _)| quota::counted(name)).collect()
}

/// The usage to write: what was counted, what was said before of kinds that could not be, and nothing that is not limited.
fn new_usage(quota: &Quota, hard: &Resources, counted: &BTreeMap<Kind, Resources>) -> Resources {
    let mut used = Resources::new();
    for name in hard.keys() {
        let usage: Vec<&Resources> = quota::counted(name).iter().filter_map(|kind| counted.get(kind)).collect();
        let sum =
            || usage.iter().filter_map(|usage| usage.get(name)).fold(Quantity::default(), |sum, more| sum + *more);
        let amount = if usage.is_empty() { quota.used.get(name).copied() } else { Some(sum()) };
        used.extend(amount.map(|amount| (name.clone(), amount)));
    }
    used
}

/// Whether some amount is more than the other's of its name.
fn exceeds(amounts: &Resources, others: &Resources) -> bool {
    amounts.iter().any(|(name, amount)| others.get(name).is_some_and(|other| other < amount))
}

// === impl Claims ===

impl Claims {
    /// Notes a change of a quota.
    fn note(&self, key: &NamespacedName, old: Option<&ResourceQuota>, new: Option<&ResourceQuota>) {
        let used = |quota: &ResourceQuota| -> Resources {
            let used = quota.status.iter().filter_map(|s| s.used.as_ref()).flatten();
            used.map(|(name, amount)| (name.clone(), amount.into())).collect()
        };
        match (old, new) {
            (_, None) => drop(self.0.lock().remove(key)),
            (Some(old), Some(new)) if exceeds(&used(new), &used(old)) => {
                self.0.lock().insert(key.clone(), Instant::now());
            }
            _ => {}
        }
    }

    /// How long until the last claim is old enough; None if it is.
    fn wait(&self, key: &NamespacedName) -> Option<Duration> {
        let since = self.0.lock().get(key)?.elapsed();
        QUIET.checked_sub(since).filter(|wait| !wait.is_zero())
    }
}

// === impl Controller ===

impl Controller {
    async fn resource(&self, kind: &Kind) -> Result<Option<ServerResource>, SyncError> {
        if let Some((at, kinds)) = &*self.kinds.lock() {
            match kinds.get(kind) {
                None if at.elapsed() > DISCOVERY_AGE => {}
                known => return Ok(known.cloned()),
            }
        }
        let found = discover(&self.client).await?;
        let kinds: HashMap<Kind, ServerResource> = found
            .resources
            .into_iter()
            .filter(|r| r.namespaced && r.can("list"))
            .map(|r| ((r.api.group.clone(), r.api.plural.clone()), r))
            .collect();
        let known = kinds.get(kind).cloned();
        *self.kinds.lock() = Some((Instant::now(), kinds));
        Ok(known)
    }

    /// What is used of a kind; None where it is not served.
    async fn usage_of(&self, namespace: &str, kind: &Kind, quota: &Quota) -> Result<Option<Resources>, SyncError> {
        // Kinds may come later; until then their limits say nothing.
        let Some(resource) = self.resource(kind).await? else { return Ok(None) };
        // Watched from before it is counted: no change is missed.
        self.watches.ensure(kind, &resource).await;
        self.count(namespace, kind, &resource, quota).await.map(Some)
    }

    /// What the objects of a kind use that a quota covers.
    async fn count(
        &self,
        namespace: &str,
        kind: &Kind,
        resource: &ServerResource,
        quota: &Quota,
    ) -> Result<Resources, SyncError> {
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &resource.api);
        let (group, plural) = (kind.0.as_str(), kind.1.as_str());
        let mut used = Resources::new();
        if !quota::is_measured(group, plural) {
            let nothing = Measured::default();
            let count = if quota.covers(&nothing) { count(&api).await? } else { 0 };
            let each = quota::measure(group, plural, &Value::Null, Timestamp::now()).usage;
            used.extend(each.into_keys().map(|name| (name, Quantity::from_value(count))));
            return Ok(used);
        }
        let mut page = ListParams::default().limit(PAGE);
        let now = Timestamp::now();
        loop {
            let list = api.list(&page).await?;
            let objects: Vec<Value> = list.items.into_iter().filter_map(|o| serde_json::to_value(o).ok()).collect();
            for object in &objects {
                let mut measured = quota::measure(group, plural, object, now);
                if plural == "resourceclaims" {
                    self.name_devices(namespace, object, &objects, &mut measured).await?;
                }
                if quota.covers(&measured) {
                    for (name, amount) in measured.usage {
                        *used.entry(name).or_default() += amount;
                    }
                }
            }
            match list.metadata.continue_.filter(|c| !c.is_empty()) {
                Some(token) => page = page.continue_token(&token),
                None => return Ok(used),
            }
        }
    }
}

impl Controller {
    /// Counts a claim's devices as what their classes call them, but for what its pod is charged with.
    async fn name_devices(
        &self,
        namespace: &str,
        claim: &Value,
        claims: &[Value],
        measured: &mut Measured,
    ) -> Result<(), SyncError> {
        let classes = Api::<DeviceClass>::all(self.client.clone()).list(&ListParams::default()).await?.items;
        let called = |class: &str| {
            let class = classes.iter().find(|known| known.metadata.name.as_deref() == Some(class))?;
            class.spec.extended_resource_name.clone()
        };
        let pod = match quota::pod_of(claim) {
            None => None,
            Some((name, _)) => {
                let named = ListParams::default().fields(&format!("metadata.name={name}"));
                let pods = Api::<Pod>::namespaced(self.client.clone(), namespace).list(&named).await?;
                pods.items.first().and_then(|pod| serde_json::to_value(pod).ok())
            }
        };
        let pod = quota::charged_pod(claim, |_| pod.clone(), || claims.to_vec());
        let pod = pod.map(|pod| quota::measure("", "pods", &pod, Timestamp::now()));
        quota::name_devices(measured, called, pod.as_ref());
        Ok(())
    }
}

/// How many there are: the server says how many are left behind the first, or pages are counted.
async fn count(api: &Api<DynamicObject>) -> Result<i64, SyncError> {
    let first = api.list_metadata(&ListParams::default().limit(1)).await?;
    let mut count = first.items.len() as i64;
    if let Some(left) = first.metadata.remaining_item_count {
        return Ok(count + left);
    }
    let mut next = first.metadata.continue_;
    while let Some(token) = next.filter(|c| !c.is_empty()) {
        let list = api.list_metadata(&ListParams::default().limit(PAGE).continue_token(&token)).await?;
        count += list.items.len() as i64;
        next = list.metadata.continue_;
    }
    Ok(count)
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(seen) = self.quotas.get(&key.namespace, &key.name) else { return Ok(Next::Settled) };
        let object = serde_json::to_value(&*seen).map_err(|e| SyncError::Invalid(e.to_string()))?;
        let quota = Quota::of(&object);
        let hard = quota::amounts(&object, "/spec/hard");
        let (mut counted, mut failed) = (BTreeMap::new(), None);
        for kind in kinds_of(&seen) {
            match self.usage_of(&key.namespace, &kind, &quota).await {
                Ok(usage) => counted.extend(usage.map(|usage| (kind, usage))),
                // What can be counted is told all the same.
                Err(error) => failed = Some(error),
            }
        }
        let done = |next: Next| failed.map_or(Ok(next), Err);
        let used = new_usage(&quota, &hard, &counted);
        if !status_lacks(&seen) && used == quota.used {
            return done(Next::After(self.sync_period));
        }
        let lowered = exceeds(&quota.used, &used);
        if lowered && let Some(wait) = self.claims.wait(key) {
            return Ok(Next::After(wait));
        }
        let mut updated = (*seen).clone();
        let wire = |amounts: &Resources| amounts.iter().map(|(name, q)| (name.clone(), q.to_api())).collect();
        let status = updated.status.get_or_insert_default();
        status.hard = seen.spec.as_ref().and_then(|s| s.hard.clone());
        status.used = Some(wire(&used));
        let api: Api<ResourceQuota> = Api::namespaced(self.client.clone(), &key.namespace);
        match api.replace_status(&key.name, &PostParams::default(), &updated).await {
            Ok(_) => debug!(quota = %key, ?used, "counted"),
            Err(error) if is_code(&error, 404) => return Ok(Next::Settled),
            Err(error) => return Err(error.into()),
        }
        done(Next::After(if lowered { LOOK_AGAIN } else { self.sync_period }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_could_not_be_counted_stays_as_it_was() {
        let object = json!({"spec": {"hard": {"pods": "5", "secrets": "3", "count/widgets.example.com": "1", "x": "1"}},
            "status": {"hard": {"pods": "5"}, "used": {"pods": "2", "services": "1", "count/widgets.example.com": "1"}}});
        let pods = Resources::from([
            ("pods".to_owned(), Quantity::from_value(4)),
            ("cpu".to_owned(), Quantity::from_value(1)),
        ]);
        let kind = |resource: &str| (String::new(), resource.to_owned());
        let counted = BTreeMap::from([(kind("pods"), pods), (kind("secrets"), Resources::new())]);
        let used = new_usage(&Quota::of(&object), &quota::amounts(&object, "/spec/hard"), &counted);
        assert_eq!(quota::to_value(&used), json!({"pods": "4", "secrets": "0", "count/widgets.example.com": "1"}));
        let quota: ResourceQuota = serde_json::from_value(object).unwrap();
        assert!(status_lacks(&quota));
        let kinds: Vec<String> =
            kinds_of(&quota).into_iter().map(|(group, resource)| format!("{resource}.{group}")).collect();
        assert_eq!(kinds, ["pods.", "secrets.", "widgets.example.com"]);
    }
    #[test]
    fn a_claim_that_was_just_made_is_waited_for() {
        let quota = |pods: &str| -> ResourceQuota {
            serde_json::from_value(json!({"status": {"used": {"pods": pods, "secrets": "9"}}})).unwrap()
        };
        let (claims, key) = (Claims::default(), NamespacedName::new("a", "q"));
        claims.note(&key, Some(&quota("2")), Some(&quota("1")));
        assert_eq!(claims.wait(&key), None);
        claims.note(&key, Some(&quota("1")), Some(&quota("2")));
        assert!(claims.wait(&key).is_some_and(|wait| wait <= QUIET));
        claims.note(&key, Some(&quota("2")), None);
        assert_eq!(claims.wait(&key), None);
    }
}
