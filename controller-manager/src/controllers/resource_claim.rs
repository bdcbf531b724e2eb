//! Claims on devices: made from templates for the pods that ask for them, told whom they are reserved for, and given back
//! when nobody uses them any more. Which devices they get is the scheduler's matter.
use crate::{
    controllers::{claim::controller_reference, service_backends::node_name},
    runtime::{Context, Fresh, Next, Reconcile, SyncError, WorkQueue, api_in, cause, gone_is_fine, run},
};
use apimachinery::{
    meta::NamespacedName,
    pod::{controller_of, is_terminal},
};
use component_base::{
    events::{Recorder, Type, reference},
    informer::Informer,
};
use k8s_openapi::api::{
    core::v1::{Pod, PodResourceClaim},
    resource::v1::{ResourceClaim, ResourceClaimConsumerReference, ResourceClaimTemplate},
};
use kube::{
    Client,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::json;
use std::{collections::BTreeMap, fmt, sync::Arc};

const NAME: &str = "resource_claim";
const POD_CLAIM: &str = "resource.kubernetes.io/pod-claim-name";
/// Keeps a claim while devices are allocated to it.
const FINALIZER: &str = "resource.kubernetes.io/delete-protection";
/// As `ResourceClaimReservedForMaxSize`.
const MAX_RESERVED: usize = 256;
/// What leaves room for a hyphen and five letters by lot in a name of 63.
const NAME_BASE_MAX: usize = 57;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Pod(NamespacedName),
    Claim(NamespacedName),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(key) => write!(f, "pod {key}"),
            Self::Claim(key) => write!(f, "claim {key}"),
        }
    }
}

struct Controller {
    client: Client,
    recorder: Recorder,
    pods: Informer<Pod>,
    claims: Fresh<ResourceClaim>,
    templates: Informer<ResourceClaimTemplate>,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("resource-claim-controller").await else { return };
    let controller = Arc::new(Controller {
        recorder: context.recorder(&client, "resource_claim"),
        client,
        pods: context.informers.get(),
        claims: Fresh::new(context.informers.get()),
        templates: context.informers.get(),
    });
    let queue = Arc::new(WorkQueue::new(NAME));
    let to = queue.clone();
    controller.pods.on_change(move |change| {
        let Some(pod) = change.latest() else { return };
        if change.new.is_none_or(|p| is_done(p)) {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
            claims_of(pod).for_each(|c| to.add(Key::Claim(NamespacedName::new(namespace, c))));
            return;
        }
        let placed = change.old.and_then(|p| node_name(p)) != node_name(pod);
        if (placed || change.old.is_none()) && asked(pod).next().is_some() {
            to.add(Key::Pod(NamespacedName::of(pod.as_ref())));
        }
    });
    let to = queue.clone();
    controller.claims.informer().on_change(move |change| {
        let Some(claim) = change.latest() else { return };
        let key = NamespacedName::of(claim.as_ref());
        if change.new.is_none()
            && let Some(pod) = controller_of(&claim.metadata).filter(|o| o.kind == "Pod")
        {
            to.add(Key::Pod(NamespacedName::new(key.namespace.clone(), pod.name.clone())));
        }
        to.add(Key::Claim(key));
    });
    let (to, pods) = (queue.clone(), controller.pods.clone());
    controller.templates.on_change(move |change| {
        let Some(template) = change.new.filter(|_| change.old.is_none()) else { return };
        let namespace = template.metadata.namespace.as_deref().unwrap_or_default();
        let wants = |p: &&Arc<Pod>| asked(p).any(|c| c.resource_claim_template_name == template.metadata.name);
        pods.list_in(namespace).iter().filter(wants).for_each(|p| to.add(Key::Pod(NamespacedName::of(p.as_ref()))));
    });
    controller.pods.synced().await;
    controller.claims.informer().synced().await;
    controller.templates.synced().await;
    run(NAME, queue, controller, context.settings.concurrent_resource_claim_syncs, context.shutdown.clone()).await;
}

pub(super) fn asked(pod: &Pod) -> impl Iterator<Item = &PodResourceClaim> {
    pod.spec.iter().flat_map(|s| s.resource_claims.iter().flatten())
}

/// The claim's name: the pod's own word, or, for one from a template, what its status says.
pub(super) fn name_of(pod: &Pod, asked: &PodResourceClaim) -> Option<String> {
    if asked.resource_claim_name.is_some() {
        return asked.resource_claim_name.clone();
    }
    let statuses = pod.status.iter().flat_map(|s| s.resource_claim_statuses.iter().flatten());
    statuses.into_iter().find(|s| s.name == asked.name)?.resource_claim_name.clone()
}

/// All claims of a pod that are known by name: what it asks for, and what the scheduler made for its extended resources.
fn claims_of(pod: &Pod) -> impl Iterator<Item = String> {
    let extended = pod.status.as_ref().and_then(|s| s.extended_resource_claim_status.as_ref());
    asked(pod).filter_map(|asked| name_of(pod, asked)).chain(extended.map(|s| s.resource_claim_name.clone()))
}

/// It will not run (any more). As `isPodDone`.
fn is_done(pod: &Pod) -> bool {
    is_terminal(pod) || pod.metadata.deletion_timestamp.is_some() && node_name(pod).is_none()
}

fn is_owned_by(claim: &ResourceClaim, pod: &Pod) -> bool {
    controller_of(&claim.metadata).is_some_and(|o| Some(&o.uid) == pod.metadata.uid.as_ref())
}

/// What the name of a pod's claim begins with. Both names are cut where they are too long together, by their share.
fn generate_name(pod: &str, asked: &str) -> String {
    let whole = format!("{pod}-{asked}-");
    if whole.len() <= NAME_BASE_MAX {
        return whole;
    }
    let share = |name: &str| name.chars().take(name.len() * NAME_BASE_MAX / whole.len()).collect::<String>();
    format!("{}-{}", share(pod), share(asked))
}

/// A pod's claim, from its template.
fn from_template(pod: &Pod, asked: &PodResourceClaim, template: &ResourceClaimTemplate) -> ResourceClaim {
    let given = template.spec.metadata.clone().unwrap_or_default();
    let mut claim = ResourceClaim { spec: template.spec.spec.clone(), ..ResourceClaim::default() };
    let pod_name = pod.metadata.name.as_deref().unwrap_or_default();
    claim.metadata.generate_name = Some(generate_name(pod_name, &asked.name));
    claim.metadata.labels = given.labels;
    let mut annotations = given.annotations.unwrap_or_default();
    annotations.insert(POD_CLAIM.to_owned(), asked.name.clone());
    claim.metadata.annotations = Some(annotations);
    claim.metadata.owner_references = Some(vec![controller_reference(pod)]);
    claim
}

/// What becomes of a claim whose valid consumers are these.
#[derive(Debug, PartialEq)]
struct Upkeep {
    /// The status to write.
    status: Option<ResourceClaim>,
    /// Devices were given back: it may go.
    unhold: bool,
}

/// As the end of `syncClaim`.
fn upkeep(claim: &ResourceClaim, valid: &[ResourceClaimConsumerReference]) -> Upkeep {
    let held = claim.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER);
    let reserved = claim.status.as_ref().and_then(|s| s.reserved_for.as_deref()).unwrap_or_default();
    let fewer = valid.len() < reserved.len();
    let unhold = held && valid.is_empty() && (fewer || claim.metadata.deletion_timestamp.is_some());
    let mut updated = claim.clone();
    if let Some(status) = &mut updated.status {
        status.reserved_for = (!valid.is_empty()).then(|| valid.to_vec());
        if unhold {
            status.allocation = None;
            status.devices = None;
        }
    }
    Upkeep { status: ((fewer || unhold) && updated.status != claim.status).then_some(updated), unhold }
}

impl Controller {
    /// The name of the claim that a pod asks for; made from its template if need be. None if it needs none.
    async fn claim_for(&self, pod: &Pod, asked: &PodResourceClaim) -> Result<Option<String>, SyncError> {
        let Some(template) = asked.resource_claim_template_name.as_deref() else {
            return Ok(asked.resource_claim_name.clone());
        };
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let mut statuses = pod.status.iter().flat_map(|s| s.resource_claim_statuses.iter().flatten());
        if let Some(said) = statuses.find(|s| s.name == asked.name) {
            let Some(name) = &said.resource_claim_name else { return Ok(None) };
            if let Some(claim) = self.claim(namespace, name).await? {
                if !is_owned_by(&claim, pod) {
                    let pod = pod.metadata.name.as_deref().unwrap_or_default();
                    return Err(SyncError::Invalid(format!(
                        "ResourceClaim {namespace}/{name} was not created for pod {namespace}/{pod} (pod is not owner)"
                    )));
                }
                return Ok(Some(name.clone()));
            }
            // It was deleted while its pod is there: it is made anew.
        }
        let is_it = |c: &Arc<ResourceClaim>| {
            let annotations = c.metadata.annotations.as_ref();
            is_owned_by(c, pod) && annotations.and_then(|a| a.get(POD_CLAIM)) == Some(&asked.name)
        };
        if let Some(claim) = self.claims.list_in(namespace).into_iter().find(is_it) {
            return Ok(claim.metadata.name.clone());
        }
        let Some(found) = self.templates.get(namespace, template) else {
            return Err(SyncError::Invalid(format!(
                "resource claim template {template:?}: resourceclaimtemplate.resource.k8s.io {template:?} not found"
            )));
        };
        let made = from_template(pod, asked, &found);
        let made = api_in::<ResourceClaim>(&self.client, namespace).create(&PostParams::default(), &made).await;
        // The words have room for a name that nobody knows yet.
        let made = made.map_err(|error| SyncError::Invalid(format!("create ResourceClaim : {}", cause(&error))))?;
        Ok(self.claims.put(made).metadata.name.clone())
    }

    /// What the cache lacks is asked for.
    async fn claim(&self, namespace: &str, name: &str) -> Result<Option<Arc<ResourceClaim>>, SyncError> {
        if let Some(known) = self.claims.get(namespace, name) {
            return Ok(Some(known));
        }
        Ok(api_in::<ResourceClaim>(&self.client, namespace).get_opt(name).await?.map(Arc::new))
    }

    async fn sync_pod(&self, pod: &Pod) -> Result<(), SyncError> {
        if pod.metadata.deletion_timestamp.is_some() || is_terminal(pod) {
            return Ok(());
        }
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let pod_name = pod.metadata.name.as_deref().unwrap_or_default();
        let mut new: BTreeMap<&str, String> = BTreeMap::new();
        for asked in asked(pod) {
            match self.claim_for(pod, asked).await {
                Ok(Some(name)) if name_of(pod, asked).as_ref() != Some(&name) => _ = new.insert(&asked.name, name),
                Ok(_) => {}
                Err(error) => {
                    let why = if let SyncError::Api(error) = &error { cause(error) } else { error.to_string() };
                    let message = format!("PodResourceClaim {}: {why}", asked.name);
                    self.recorder.event(&reference(pod), Type::Warning, "FailedResourceClaimCreation", "", message);
                    return Err(error);
                }
            }
        }
        if !new.is_empty() {
            let entries: Vec<_> = new.iter().map(|(n, claim)| json!({"name": n, "resourceClaimName": claim})).collect();
            let patch = Patch::Strategic(
                json!({"metadata": {"uid": pod.metadata.uid}, "status": {"resourceClaimStatuses": entries}}),
            );
            gone_is_fine(
                api_in::<Pod>(&self.client, namespace).patch_status(pod_name, &PatchParams::default(), &patch).await,
            )?;
        }
        if node_name(pod).is_none() {
            return Ok(());
        }
        // It came past the scheduler, which would have reserved them.
        for asked in asked(pod) {
            let made = new.get(asked.name.as_str()).cloned();
            let Some(name) = made.or_else(|| name_of(pod, asked)) else { continue };
            if let Some(claim) = self.claims.get(namespace, &name) {
                self.reserve(pod, &claim).await?;
            }
        }
        Ok(())
    }

    async fn reserve(&self, pod: &Pod, claim: &ResourceClaim) -> Result<(), SyncError> {
        let Some(status) = claim.status.as_ref().filter(|s| s.allocation.is_some()) else { return Ok(()) };
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let reserved = status.reserved_for.as_deref().unwrap_or_default();
        if reserved.iter().any(|r| r.uid == uid) || reserved.len() >= MAX_RESERVED {
            return Ok(());
        }
        let mut updated = claim.clone();
        let consumer = ResourceClaimConsumerReference {
            api_group: None,
            resource: "pods".to_owned(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            uid,
        };
        updated.status.get_or_insert_default().reserved_for.get_or_insert_default().push(consumer);
        self.save_status(&updated).await?;
        Ok(())
    }

    async fn save_status(&self, claim: &ResourceClaim) -> Result<ResourceClaim, kube::Error> {
        let (namespace, name) = (claim.metadata.namespace.as_deref(), claim.metadata.name.as_deref());
        let api = api_in::<ResourceClaim>(&self.client, namespace.unwrap_or_default());
        let saved = api.replace_status(name.unwrap_or_default(), &PostParams::default(), claim).await?;
        Ok(self.claims.put(saved).as_ref().clone())
    }

    /// A consumer counts while its pod may run. What the cache lacks is asked for.
    async fn is_valid(&self, namespace: &str, consumer: &ResourceClaimConsumerReference) -> Result<bool, SyncError> {
        if consumer.resource != "pods" || consumer.api_group.as_deref().is_some_and(|g| !g.is_empty()) {
            return Ok(true);
        }
        let mut pod = self.pods.get(namespace, &consumer.name);
        if pod.as_ref().is_none_or(|p| p.metadata.uid.as_deref() != Some(&consumer.uid)) {
            pod = api_in::<Pod>(&self.client, namespace).get_opt(&consumer.name).await?.map(Arc::new);
        }
        Ok(pod.is_some_and(|p| p.metadata.uid.as_deref() == Some(&consumer.uid) && !is_done(&p)))
    }

    async fn sync_claim(&self, key: &NamespacedName, claim: &ResourceClaim) -> Result<(), SyncError> {
        let mut valid = Vec::new();
        for consumer in claim.status.iter().flat_map(|s| s.reserved_for.iter().flatten()) {
            if self.is_valid(&key.namespace, consumer).await? {
                valid.push(consumer.clone());
            }
        }
        let api = api_in::<ResourceClaim>(&self.client, &key.namespace);
        let upkeep = upkeep(claim, &valid);
        let mut claim = claim.clone();
        if let Some(updated) = &upkeep.status {
            claim = self.save_status(updated).await?;
        }
        if upkeep.unhold {
            claim.metadata.finalizers.get_or_insert_default().retain(|f| f != FINALIZER);
            if let Some(saved) = gone_is_fine(api.replace(&key.name, &PostParams::default(), &claim).await)? {
                self.claims.put(saved);
            }
        }
        // One that was made for a pod that will not run has no purpose. If the pod is gone it goes as its dependent.
        let Some(owner) = controller_of(&claim.metadata).filter(|o| o.kind == "Pod") else { return Ok(()) };
        let done = self
            .pods
            .get(&key.namespace, &owner.name)
            .is_some_and(|pod| pod.metadata.uid.as_deref() != Some(&owner.uid) || is_done(&pod));
        if valid.is_empty() && done && claim.metadata.deletion_timestamp.is_none() {
            gone_is_fine(api.delete(&key.name, &DeleteParams::default()).await)?;
        }
        Ok(())
    }
}

impl Reconcile for Controller {
    type Key = Key;

    async fn reconcile(&self, key: &Key) -> Result<Next, SyncError> {
        match key {
            Key::Pod(key) => {
                if let Some(pod) = self.pods.get(&key.namespace, &key.name) {
                    self.sync_pod(&pod).await?;
                }
            }
            Key::Claim(key) => {
                if let Some(claim) = self.claims.get(&key.namespace, &key.name) {
                    self.sync_claim(key, &claim).await?;
                }
            }
        }
        Ok(Next::Settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(deleting: bool, held: bool, reserved: usize) -> ResourceClaim {
        let consumers: Vec<_> =
            (0..reserved).map(|n| json!({"resource": "pods", "name": format!("p{n}"), "uid": n.to_string()})).collect();
        serde_json::from_value(
            json!({"metadata": {"name": "c", "finalizers": if held { vec![FINALIZER] } else { vec![] },
            "deletionTimestamp": deleting.then_some("2026-01-01T00:00:00Z")}, "spec": {},
            "status": {"allocation": {}, "reservedFor": consumers}}),
        )
        .unwrap()
    }

    #[test]
    fn devices_are_given_back_when_the_last_consumer_went() {
        for (why, claim, valid, writes, unhold) in [
            ("all are there", claim(false, true, 2), 2, false, false),
            ("one went", claim(false, true, 2), 1, true, false),
            ("all went", claim(false, true, 2), 0, true, true),
            ("never used", claim(false, true, 0), 0, false, false),
            ("never used, and it goes", claim(true, true, 0), 0, true, true),
            ("others hold it", claim(false, false, 1), 0, true, false),
        ] {
            let consumers = claim.status.as_ref().unwrap().reserved_for.clone().unwrap_or_default()[..valid].to_vec();
            let got = upkeep(&claim, &consumers);
            assert_eq!((got.status.is_some(), got.unhold), (writes, unhold), "{why}");
            if let Some(updated) = got.status {
                assert_eq!(updated.status.unwrap().allocation.is_none(), unhold, "{why}");
            }
        }
    }

    #[test]
    fn a_claim_from_a_template_says_whose_it_is() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u"},
            "spec": {"containers": [], "resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "t"},
                {"name": "net", "resourceClaimName": "shared"}]},
            "status": {"resourceClaimStatuses": [{"name": "gpu", "resourceClaimName": "p-gpu-x"}],
                "extendedResourceClaimStatus": {"resourceClaimName": "p-extended-resources-y", "requestMappings": []}}}))
        .unwrap();
        assert_eq!(claims_of(&pod).collect::<Vec<_>>(), ["p-gpu-x", "shared", "p-extended-resources-y"]);
        let names: Vec<_> = asked(&pod).map(|a| name_of(&pod, a)).collect();
        assert_eq!(names, [Some("p-gpu-x".to_owned()), Some("shared".to_owned())]);
        let template = serde_json::from_value(json!({"metadata": {}, "spec": {"metadata": {"labels": {"a": "b"}},
            "spec": {"devices": {}}}}))
        .unwrap();
        let made = from_template(&pod, asked(&pod).next().unwrap(), &template);
        assert_eq!(made.metadata.generate_name.as_deref(), Some("p-gpu-"));
        assert_eq!(made.metadata.annotations.as_ref().unwrap()[POD_CLAIM], "gpu");
        assert!(is_owned_by(&made, &pod) && made.spec.devices.is_some());
    }

    #[test]
    fn names_that_are_too_long_are_cut_by_their_share() {
        assert_eq!(generate_name("p", "gpu"), "p-gpu-");
        let (pod, asked) = ("p".repeat(60), "gpu".repeat(10));
        let name = generate_name(&pod, &asked);
        assert_eq!(name, format!("{}-{}", &pod[..37], &asked[..18]));
        assert!(name.len() <= NAME_BASE_MAX);
    }
}
