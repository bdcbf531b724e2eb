//! ServiceCIDRs that users make: each gets a finalizer and a Ready condition, and goes only when no address in use is left
//! without a range. As `servicecidrs.Controller`.
use super::node_ipam::cidr::Cidr;
use crate::runtime::{Context, Next, Reconcile, SyncError, WorkQueue, gone_is_fine, run};
use component_base::{
    events::{Recorder, Type, reference},
    informer::Informer,
};
use k8s_openapi::api::networking::v1::{IPAddress, ServiceCIDR};
use k8s_openapi::jiff::Timestamp;
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};

const NAME: &str = "service-cidr-controller";
const FINALIZER: &str = "networking.k8s.io/service-cidr-finalizer";
const MANAGED_BY: &str = "ipaddress.kubernetes.io/managed-by";
const ALLOCATOR: &str = "ipallocator.k8s.io";
const BLOCKED: &str =
    "There are still IPAddresses referencing the ServiceCIDR, please remove them or create a new ServiceCIDR";
/// Allocators may give from a range for a moment after it was deleted: it stays for that long.
const GRACE: Duration = Duration::from_secs(10);

struct Controller {
    client: Client,
    recorder: Recorder,
    ranges: Informer<ServiceCIDR>,
    addresses: Informer<IPAddress>,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("service-cidrs-controller").await else { return };
    let ranges = context.informers.get::<ServiceCIDR>();
    let addresses = context.informers.get::<IPAddress>();
    let queue = Arc::new(WorkQueue::new("ipaddresses"));
    let (to, all) = (queue.clone(), ranges.clone());
    // Ranges are few, and one may free another: each change looks at all.
    ranges.on_change(move |_| all.list().iter().for_each(|range| to.add(range.name_any())));
    let (to, all) = (queue.clone(), ranges.clone());
    addresses.on_change(move |change| {
        // One that comes may hold a range, one that goes may free it.
        if change.new.is_none() || change.old.is_none() {
            let waits = |range: &&Arc<ServiceCIDR>| range.metadata.deletion_timestamp.is_some();
            all.list().iter().filter(waits).for_each(|range| to.add(range.name_any()));
        }
    });
    ranges.synced().await;
    addresses.synced().await;
    run(
        NAME,
        queue,
        Arc::new(Controller { recorder: context.recorder(&client, NAME), client, ranges, addresses }),
        5,
        context.shutdown.clone(),
    )
    .await;
}

/// What a range needs next.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    AddFinalizer,
    /// To say that it is ready, or why it does not go.
    Report(bool),
    Wait(Duration),
    RemoveFinalizer,
}

fn plan(range: &ServiceCIDR, all: &[Arc<ServiceCIDR>], addresses: &[Arc<IPAddress>], now: Timestamp) -> Step {
    let held = range.finalizers().iter().any(|finalizer| finalizer == FINALIZER);
    let ready = range.status.iter().flat_map(|s| s.conditions.iter().flatten()).find(|c| c.type_ == "Ready");
    let says = |status: &str, reason: &str| ready.is_some_and(|c| c.status == status && c.reason == reason);
    let Some(deleted) = &range.metadata.deletion_timestamp else {
        return match (held, says("True", "")) {
            (false, _) => Step::AddFinalizer,
            (true, false) => Step::Report(true),
            (true, true) => Step::Nothing,
        };
    };
    if !held {
        return Step::Nothing;
    }
    if !may_go(range, all, addresses) {
        return if says("False", "Terminating") { Step::Nothing } else { Step::Report(false) };
    }
    let gone_for = Duration::try_from(now.duration_since(deleted.0)).unwrap_or_default();
    match GRACE.checked_sub(gone_for) {
        Some(left) if !left.is_zero() => Step::Wait(left),
        _ => Step::RemoveFinalizer,
    }
}

fn cidrs(range: &ServiceCIDR) -> Vec<Cidr> {
    let texts = range.spec.iter().flat_map(|spec| spec.cidrs.iter().flatten());
    texts.filter_map(|text| Cidr::parse(text).ok()).collect()
}

/// Whether every address in use would still lie in some range. As `canDeleteCIDR`.
fn may_go(range: &ServiceCIDR, all: &[Arc<ServiceCIDR>], addresses: &[Arc<IPAddress>]) -> bool {
    let others: Vec<Cidr> =
        all.iter().filter(|other| other.metadata.name != range.metadata.name).flat_map(|other| cidrs(other)).collect();
    let covered = |part: &Cidr| others.iter().any(|other| other.contains(part));
    let own = cidrs(range);
    let mut used =
        addresses.iter().filter(|ip| ip.labels().get(MANAGED_BY).is_some_and(|by| by == ALLOCATOR)).filter_map(|ip| {
            let name = ip.name_any();
            Cidr::parse(&format!("{name}/{}", if name.contains(':') { 128 } else { 32 })).ok()
        });
    own.iter().all(covered) || !used.any(|ip| own.iter().any(|part| part.contains(&ip)) && !covered(&ip))
}

fn condition(ready: bool, now: Timestamp) -> Value {
    let (status, reason, message) =
        if ready { ("True", "", "Kubernetes Service CIDR is ready") } else { ("False", "Terminating", BLOCKED) };
    json!({"type": "Ready", "status": status, "reason": reason, "message": message,
        "lastTransitionTime": apimachinery::time::rfc3339(now)})
}

impl Reconcile for Controller {
    type Key = String;

    async fn reconcile(&self, name: &String) -> Result<Next, SyncError> {
        let Some(range) = self.ranges.get("", name) else { return Ok(Next::Settled) };
        let now = Timestamp::now();
        let api = Api::<ServiceCIDR>::all(self.client.clone());
        let finalizers = match plan(&range, &self.ranges.list(), &self.addresses.list(), now) {
            Step::Nothing => return Ok(Next::Settled),
            Step::Wait(left) => return Ok(Next::After(left)),
            Step::Report(ready) => {
                let object = json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
                    "metadata": {"name": name}, "status": {"conditions": [condition(ready, now)]}});
                let parameters = PatchParams::apply(NAME).force();
                let written = gone_is_fine(api.patch_status(name, &parameters, &Patch::Apply(object)).await);
                if ready && written.is_err() {
                    let words = "The ServiceCIDR Status can not be set to Ready=True";
                    let about = reference(range.as_ref());
                    self.recorder.event(&about, Type::Warning, "KubernetesServiceCIDRError", "", words);
                }
                written?;
                return Ok(Next::Settled);
            }
            Step::AddFinalizer => json!({"finalizers": [FINALIZER]}),
            Step::RemoveFinalizer => json!({"$deleteFromPrimitiveList/finalizers": [FINALIZER]}),
        };
        let patch = Patch::Strategic(json!({"metadata": finalizers}));
        gone_is_fine(api.patch(name, &PatchParams::default(), &patch).await)?;
        Ok(Next::Settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(name: &str, cidrs: &[&str], deleted: bool, ready: &str) -> Arc<ServiceCIDR> {
        let conditions =
            if ready.is_empty() { json!([]) } else { json!([condition(ready == "True", Timestamp::UNIX_EPOCH)]) };
        let deletion = deleted.then_some("1970-01-01T00:00:00Z");
        let value = json!({"metadata": {"name": name, "finalizers": [FINALIZER], "deletionTimestamp": deletion},
            "spec": {"cidrs": cidrs}, "status": {"conditions": conditions}});
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn addresses(names: &[&str]) -> Vec<Arc<IPAddress>> {
        let address = |name: &&str| json!({"metadata": {"name": name, "labels": {MANAGED_BY: ALLOCATOR}}});
        names.iter().map(|name| Arc::new(serde_json::from_value(address(name)).unwrap())).collect()
    }

    #[test]
    fn a_range_is_held_told_ready_and_goes_when_no_address_is_left_alone() {
        let at = |seconds: i64| Timestamp::from_second(seconds).unwrap();
        let bare = ServiceCIDR::default();
        assert_eq!(plan(&bare, &[], &[], at(0)), Step::AddFinalizer);
        assert_eq!(plan(&range("r", &["10.1.0.0/24"], false, ""), &[], &[], at(0)), Step::Report(true));
        assert_eq!(plan(&range("r", &["10.1.0.0/24"], false, "True"), &[], &[], at(0)), Step::Nothing);

        let going = range("r", &["10.1.0.0/24", "fd00::/112"], true, "True");
        let wider = range("w", &["10.0.0.0/8"], false, "True");
        let inner = range("i", &["10.1.0.0/28"], false, "True");
        let told = range("r", &["10.1.0.0/24"], true, "False");
        for (range, others, used, seconds, step) in [
            (&going, vec![], &[][..], 60, Step::RemoveFinalizer),
            (&going, vec![], &["10.2.0.1"], 4, Step::Wait(Duration::from_secs(6))),
            (&going, vec![], &["10.1.0.20"], 60, Step::Report(false)),
            (&going, vec![&inner], &["10.1.0.20"], 60, Step::Report(false)),
            (&going, vec![&inner], &["10.1.0.3"], 60, Step::RemoveFinalizer),
            (&going, vec![&wider], &["10.1.0.20"], 60, Step::RemoveFinalizer),
            (&going, vec![&wider], &["fd00::7"], 60, Step::Report(false)),
            (&told, vec![], &["10.1.0.20"], 60, Step::Nothing),
        ] {
            let all: Vec<_> = others.into_iter().chain([range]).cloned().collect();
            assert_eq!(plan(range, &all, &addresses(used), at(seconds)), step, "{used:?} {seconds}");
        }
    }
}
