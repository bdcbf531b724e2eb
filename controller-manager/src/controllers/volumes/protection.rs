//! What is in use does not go: claims while pods have them, volumes while claims do, attribute classes while volumes do.
//! A finalizer holds each; it is there from the first, and is taken off when the object is to go and nobody uses it.
use super::{claims_of, phase_of_volume};
use crate::{
    controllers::service_backends::node_name,
    runtime::{Context, Next, Reconcile, SyncError, Watched, WorkQueue, api_in, gone_is_fine, run},
};
use apimachinery::{meta::NamespacedName, pod::is_terminal};
use component_base::informer::Informer;
use futures::future::BoxFuture;
use k8s_openapi::api::{
    core::v1::{PersistentVolume, PersistentVolumeClaim, Pod},
    storage::v1::VolumeAttributesClass,
};
use kube::{
    Api, Client,
    api::{ListParams, PostParams},
};
use serde::Serialize;
use std::sync::Arc;

/// How one kind is protected.
struct Protector<K> {
    finalizer: &'static str,
    objects: Informer<K>,
    /// Whether the caches know of a user.
    in_use: Box<dyn Fn(&K) -> bool + Send + Sync>,
    /// Whether the server knows of one: the caches may be behind.
    live: Box<dyn Fn(Arc<K>) -> BoxFuture<'static, Result<bool, kube::Error>> + Send + Sync>,
    api: Box<dyn Fn(&str) -> Api<K> + Send + Sync>,
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    Hold,
    /// If nobody uses it.
    Release,
}

fn step(deleting: bool, held: bool) -> Step {
    match (deleting, held) {
        (false, false) => Step::Hold,
        (true, true) => Step::Release,
        _ => Step::Nothing,
    }
}

impl<K: Watched + Serialize> Reconcile for Protector<K> {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(object) = self.objects.get(&key.namespace, &key.name) else { return Ok(Next::Settled) };
        let meta = object.meta();
        let held = meta.finalizers.iter().flatten().any(|f| f == self.finalizer);
        let mut updated = object.as_ref().clone();
        let finalizers = updated.meta_mut().finalizers.get_or_insert_default();
        match step(meta.deletion_timestamp.is_some(), held) {
            Step::Nothing => return Ok(Next::Settled),
            Step::Hold => finalizers.push(self.finalizer.to_owned()),
            Step::Release if (self.in_use)(&object) || (self.live)(object.clone()).await? => return Ok(Next::Settled),
            Step::Release => finalizers.retain(|f| f != self.finalizer),
        }
        gone_is_fine((self.api)(&key.namespace).replace(&key.name, &PostParams::default(), &updated).await)?;
        Ok(Next::Settled)
    }
}

fn queue<K: Watched>(name: &str, objects: &Informer<K>) -> Arc<WorkQueue<NamespacedName>> {
    let queue = Arc::new(WorkQueue::new(name));
    let to = queue.clone();
    objects.on_change(move |change| change.new.into_iter().for_each(|o| to.add(NamespacedName::of(o.as_ref()))));
    queue
}

/// Whether a pod has a claim: one that is not scheduled does not yet, and will not get one that goes.
fn uses(pod: &Pod, claim: &PersistentVolumeClaim) -> bool {
    let name = claim.metadata.name.as_deref().unwrap_or_default();
    let mine = || claim.metadata.owner_references.iter().flatten().any(|o| Some(&o.uid) == pod.metadata.uid.as_ref());
    node_name(pod).is_some() && claims_of(pod).any(|(used, own)| used == name && (!own || !is_terminal(pod) && mine()))
}

/// Protects claims; runs until shutdown.
pub async fn start_claims(context: Arc<Context>) {
    const NAME: &str = "pvcprotection";
    let Some(client) = context.client_for("pvc-protection-controller").await else { return };
    let claims = context.informers.get::<PersistentVolumeClaim>();
    let pods = context.informers.get::<Pod>();
    let queue = queue(NAME, &claims);
    let to = queue.clone();
    pods.on_change(move |change| {
        // A user went, or ended.
        let ended = change.new.is_none_or(|p| is_terminal(p));
        if let Some(pod) = change.latest().filter(|_| ended) {
            let namespace = pod.metadata.namespace.clone().unwrap_or_default();
            claims_of(pod).for_each(|(claim, _)| to.add(NamespacedName::new(namespace.clone(), claim)));
        }
    });
    claims.synced().await;
    pods.synced().await;
    let (live, api) = (client.clone(), client);
    let protector = Protector {
        finalizer: "kubernetes.io/pvc-protection",
        objects: claims,
        in_use: Box::new(move |claim: &PersistentVolumeClaim| {
            pods.list_in(claim.metadata.namespace.as_deref().unwrap_or_default()).iter().any(|p| uses(p, claim))
        }),
        live: Box::new(move |claim| {
            let pods: Api<Pod> = api_in(&live, claim.metadata.namespace.as_deref().unwrap_or_default());
            Box::pin(async move { Ok(pods.list(&ListParams::default()).await?.iter().any(|p| uses(p, &claim))) })
        }),
        api: Box::new(move |namespace| api_in(&api, namespace)),
    };
    run(NAME, queue, Arc::new(protector), 2, context.shutdown.clone()).await;
}

fn cluster<K>(client: Client) -> Box<dyn Fn(&str) -> Api<K> + Send + Sync>
where
    K: Watched + kube::Resource<Scope = k8s_openapi::ClusterResourceScope>,
{
    Box::new(move |_| Api::all(client.clone()))
}

/// Protects volumes; runs until shutdown.
pub async fn start_volumes(context: Arc<Context>) {
    const NAME: &str = "pvprotection";
    let Some(client) = context.client_for("pv-protection-controller").await else { return };
    let volumes = context.informers.get::<PersistentVolume>();
    let queue = queue(NAME, &volumes);
    volumes.synced().await;
    let protector = Protector {
        finalizer: "kubernetes.io/pv-protection",
        objects: volumes,
        in_use: Box::new(|volume: &PersistentVolume| phase_of_volume(volume) == "Bound"),
        live: Box::new(|_| Box::pin(async { Ok(false) })),
        api: cluster(client),
    };
    run(NAME, queue, Arc::new(protector), 1, context.shutdown.clone()).await;
}

/// The classes that a claim has, had or is to get.
fn classes_of_claim(claim: &PersistentVolumeClaim) -> impl Iterator<Item = &str> {
    let status = claim.status.as_ref();
    let wanted = claim.spec.as_ref().and_then(|s| s.volume_attributes_class_name.as_deref());
    let current = status.and_then(|s| s.current_volume_attributes_class_name.as_deref());
    let target = status.and_then(|s| s.modify_volume_status.as_ref()?.target_volume_attributes_class_name.as_deref());
    [wanted, current, target].into_iter().flatten()
}

fn class_of_volume(volume: &PersistentVolume) -> Option<&str> {
    volume.spec.as_ref()?.volume_attributes_class_name.as_deref()
}

/// Protects volume attributes classes; runs until shutdown.
pub async fn start_attribute_classes(context: Arc<Context>) {
    const NAME: &str = "vacprotection";
    let Some(client) = context.client_for("volumeattributesclass-protection-controller").await else { return };
    let classes = context.informers.get::<VolumeAttributesClass>();
    let claims = context.informers.get::<PersistentVolumeClaim>();
    let volumes = context.informers.get::<PersistentVolume>();
    let queue = queue(NAME, &classes);
    let to = queue.clone();
    claims.on_change(move |change| {
        let before = change.old.into_iter().flat_map(|c| classes_of_claim(c));
        before.for_each(|class| to.add(NamespacedName::new("", class)));
    });
    let to = queue.clone();
    volumes.on_change(move |change| {
        change.old.and_then(|v| class_of_volume(v)).into_iter().for_each(|c| to.add(NamespacedName::new("", c)));
    });
    classes.synced().await;
    claims.synced().await;
    volumes.synced().await;
    let live = client.clone();
    let protector = Protector {
        finalizer: "kubernetes.io/vac-protection",
        objects: classes,
        in_use: Box::new(move |class: &VolumeAttributesClass| {
            let name = class.metadata.name.as_deref();
            volumes.list().iter().any(|v| class_of_volume(v) == name)
                || claims.list().iter().any(|c| classes_of_claim(c).any(|class| Some(class) == name))
        }),
        live: Box::new(move |class| {
            let live = live.clone();
            Box::pin(async move {
                let (all, name) = (ListParams::default(), class.metadata.name.as_deref());
                let claims = Api::<PersistentVolumeClaim>::all(live.clone()).list(&all).await?;
                let volumes = Api::<PersistentVolume>::all(live).list(&all).await?;
                Ok(volumes.iter().any(|v| class_of_volume(v) == name)
                    || claims.iter().any(|c| classes_of_claim(c).any(|class| Some(class) == name)))
            })
        }),
        api: cluster(client),
    };
    run(NAME, queue, Arc::new(protector), 1, context.shutdown.clone()).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn a_finalizer_comes_with_the_object_and_goes_before_it() {
        for (deleting, held, expected) in [
            (false, false, Step::Hold),
            (false, true, Step::Nothing),
            (true, true, Step::Release),
            (true, false, Step::Nothing),
        ] {
            assert_eq!(step(deleting, held), expected);
        }
    }

    #[test]
    fn a_claim_is_used_by_the_pods_that_were_scheduled_with_it() {
        let claim = |name: &str| -> PersistentVolumeClaim {
            let owner = json!([{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "p"}]);
            serde_json::from_value(json!({"metadata": {"name": name, "ownerReferences": owner}})).unwrap()
        };
        let named = json!({"name": "v", "persistentVolumeClaim": {"claimName": "c"}});
        let own = json!({"name": "v", "ephemeral": {"volumeClaimTemplate": {"spec": {}}}});
        let pod = |node: &str, uid: &str, phase: &str, volume: &Value| -> Pod {
            serde_json::from_value(json!({"metadata": {"name": "p", "uid": uid}, "status": {"phase": phase},
                "spec": {"nodeName": node, "containers": [], "volumes": [volume]}}))
            .unwrap()
        };
        for (pod, claim, expected) in [
            (pod("n", "p", "Running", &named), claim("c"), true),
            (pod("n", "p", "Succeeded", &named), claim("c"), true),
            (pod("", "p", "Pending", &named), claim("c"), false),
            (pod("n", "p", "Running", &named), claim("d"), false),
            (pod("n", "p", "Running", &own), claim("p-v"), true),
            (pod("n", "p", "Failed", &own), claim("p-v"), false),
            (pod("n", "x", "Running", &own), claim("p-v"), false),
        ] {
            assert_eq!(uses(&pod, &claim), expected, "{pod:?} {claim:?}");
        }
    }
}
