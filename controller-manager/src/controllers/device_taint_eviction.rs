//! Evicts pods from devices with `NoExecute` taints that their claims do not tolerate, at once or when their time is up.
//! As [`super::taint_eviction`] does it from nodes.
use super::{
    resource_claim::{asked, name_of},
    service_backends::node_name,
    taint_eviction::{Evictor, Verdict, Waiting, judge},
};
use crate::runtime::{Context, Next, Reconcile, SyncError, WorkQueue, run};
use apimachinery::{
    meta::NamespacedName,
    node::{device_taint, device_toleration},
    pod::is_terminal,
};
use component_base::informer::Informer;
use k8s_openapi::{
    api::{
        core::v1::{Pod, Taint, Toleration},
        resource::v1::{DeviceRequestAllocationResult, ResourceClaim, ResourceSlice},
    },
    jiff::Timestamp,
};
use std::sync::Arc;

const NAME: &str = "device_taint_eviction";

struct Controller {
    evictor: Evictor,
    pods: Informer<Pod>,
    claims: Informer<ResourceClaim>,
    slices: Informer<ResourceSlice>,
    waiting: Waiting,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("device-taint-eviction-controller").await else { return };
    let controller = Arc::new(Controller {
        evictor: Evictor {
            recorder: context.recorder(&client, "device-taint-eviction-controller"),
            client,
            event: "DeviceTaintManagerEviction",
            reason: "DeletionByDeviceTaintManager",
            message: "Device Taint manager: deleting due to NoExecute taint",
            words: |_| ["Marking for deletion", "Cancelling deletion"].map(str::to_owned),
        },
        pods: context.informers.get(),
        claims: context.informers.get(),
        slices: context.informers.get(),
        waiting: Waiting::default(),
    });
    let queue = Arc::new(WorkQueue::new(NAME));
    let (to, seen) = (queue.clone(), controller.clone());
    controller.pods.on_change(move |change| {
        let Some(pod) = change.latest().filter(|p| asked(p).next().is_some()) else { return };
        let key = NamespacedName::of(pod.as_ref());
        if change.new.is_none() {
            seen.waiting.forget(&key);
        } else if change.old.and_then(|p| node_name(p)) != node_name(pod) {
            to.add(key);
        }
    });
    let to = queue.clone();
    controller.claims.on_change(move |change| {
        if change.old.map(|c| &c.status) != change.new.map(|c| &c.status) {
            change.latest().into_iter().flat_map(|c| users(c)).for_each(|key| to.add(key));
        }
    });
    let (to, claims) = (queue.clone(), controller.claims.clone());
    controller.slices.on_change(move |change| {
        if change.old.map(|s| &s.spec) != change.new.map(|s| &s.spec) {
            claims.list().iter().flat_map(|c| users(c)).for_each(|key| to.add(key));
        }
    });
    controller.pods.synced().await;
    controller.claims.synced().await;
    controller.slices.synced().await;
    let workers = context.settings.concurrent_device_taint_eviction_syncs;
    run(NAME, queue, controller, workers, context.shutdown.clone()).await;
}

/// The pods that a claim is reserved for.
fn users(claim: &ResourceClaim) -> Vec<NamespacedName> {
    let namespace = claim.metadata.namespace.as_deref().unwrap_or_default();
    let users = claim.status.iter().flat_map(|s| s.reserved_for.iter().flatten());
    users.filter(|u| u.resource == "pods").map(|u| NamespacedName::new(namespace, &u.name)).collect()
}

/// The taints that evict from an allocated device, as the newest slices of its pool have them.
fn taints(slices: &[Arc<ResourceSlice>], of: &DeviceRequestAllocationResult) -> Vec<Taint> {
    let pool = || slices.iter().map(|s| &s.spec).filter(|s| s.driver == of.driver && s.pool.name == of.pool);
    let newest = pool().map(|s| s.pool.generation).max();
    let devices = pool().filter(|s| Some(s.pool.generation) == newest).flat_map(|s| s.devices.iter().flatten());
    let evicting = devices.filter(|d| d.name == of.device).flat_map(|d| d.taints.iter().flatten());
    evicting.filter(|t| t.effect == "NoExecute").map(device_taint).collect()
}

/// Of a device's taint the shortest toleration counts, unless one is for ever.
fn shortest(tolerations: &[&Toleration]) -> Option<i64> {
    let seconds: Option<Vec<i64>> = tolerations.iter().map(|t| t.toleration_seconds).collect();
    seconds?.into_iter().min()
}

/// What is to become of the users of a claim: the worst that is said of one of its devices.
fn judge_claim(claim: &ResourceClaim, slices: &[Arc<ResourceSlice>], seen: Timestamp, now: Timestamp) -> Verdict {
    let allocated = claim.status.as_ref().and_then(|s| s.allocation.as_ref()?.devices.as_ref());
    let verdicts = allocated.into_iter().flat_map(|d| d.results.iter().flatten()).map(|result| {
        let tolerations: Vec<Toleration> = result.tolerations.iter().flatten().map(device_toleration).collect();
        judge(&tolerations, &taints(slices, result), shortest, seen, now)
    });
    verdicts.fold(Verdict::Stays, Verdict::worse)
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(pod) = self.pods.get(&key.namespace, &key.name) else { return Ok(Next::Settled) };
        if pod.metadata.deletion_timestamp.is_some() || is_terminal(&pod) || node_name(&pod).is_none() {
            return Ok(Next::Settled);
        }
        let slices = self.slices.list();
        let names = asked(&pod).filter_map(|asked| name_of(&pod, asked));
        let claims: Vec<_> = names
            .filter_map(|name| self.claims.get(&key.namespace, &name))
            .filter(|claim| {
                let users = claim.status.iter().flat_map(|s| s.reserved_for.iter().flatten());
                users.into_iter().any(|u| Some(&u.uid) == pod.metadata.uid.as_ref())
            })
            .collect();
        let verdict = |seen, now| {
            claims.iter().map(|claim| judge_claim(claim, &slices, seen, now)).fold(Verdict::Stays, Verdict::worse)
        };
        self.waiting.carry_out(&self.evictor, key, &pod, verdict).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::Duration;

    #[test]
    fn users_of_a_device_go_as_their_claim_tolerates() {
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let slice = |generation: i64, taints: serde_json::Value| -> Arc<ResourceSlice> {
            let spec = json!({"driver": "d", "nodeName": "n", "devices": [{"name": "a", "taints": taints}, {"name": "b"}],
                "pool": {"name": "p", "generation": generation, "resourceSliceCount": 1}});
            Arc::new(serde_json::from_value(json!({"metadata": {"name": "s"}, "spec": spec})).unwrap())
        };
        let broken = |effect: &str| json!([{"key": "broken", "effect": effect, "timeAdded": "2026-01-01T00:00:30Z"}]);
        let claim = |devices: &[&str], tolerations: serde_json::Value| -> ResourceClaim {
            let result = |device: &&str| json!({"request": "r", "driver": "d", "pool": "p", "device": device, "tolerations": tolerations});
            let results: Vec<_> = devices.iter().map(result).collect();
            let status = json!({"allocation": {"devices": {"results": results}}});
            serde_json::from_value(json!({"metadata": {"name": "c"}, "spec": {}, "status": status})).unwrap()
        };
        let bears =
            |seconds: Option<i64>| json!([{"key": "broken", "operator": "Exists", "tolerationSeconds": seconds}]);
        let both = |one, other| json!([bears(one)[0], bears(other)[0]]);
        let evicting = || vec![slice(1, broken("NoExecute"))];
        for (devices, tolerations, slices, expected) in [
            (&["a"][..], json!([]), evicting(), Verdict::Goes),
            (&["b"], json!([]), evicting(), Verdict::Stays),
            (&["b", "a"], json!([]), evicting(), Verdict::Goes),
            (&["a"], json!([]), vec![slice(1, broken("NoSchedule"))], Verdict::Stays),
            (&["a"], bears(None), evicting(), Verdict::Stays),
            (&["a", "b"], bears(Some(60)), evicting(), Verdict::GoesAt(now + Duration::from_secs(30))),
            (&["a"], bears(Some(20)), evicting(), Verdict::Goes),
            (&["a"], both(Some(60), Some(40)), evicting(), Verdict::GoesAt(now + Duration::from_secs(10))),
            (&["a"], both(Some(20), None), evicting(), Verdict::Stays),
            (&["a"], json!([]), vec![slice(1, broken("NoExecute")), slice(2, json!([]))], Verdict::Stays),
        ] {
            let claim = claim(devices, tolerations);
            assert_eq!(judge_claim(&claim, &slices, now, now), expected, "{claim:?}");
        }
    }
}
