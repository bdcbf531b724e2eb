//! VolumeBinding: a pod goes where its volumes are, or can be.
//!
//! Bound claims must reach their volumes from the node. Claims that wait for their first consumer are matched with free
//! volumes there or, if there are none, provisioned for the node. What was found is held by Reserve, written by PreBind
//! (`claimRef` of the volume, the selected node of the claim), and PreBind waits until the volume controller has bound all.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use apimachinery::labels::Selector;
use apimachinery::node::NodeTerms;
use apimachinery::quantity::Quantity;
use apimachinery::volume::{
    BOUND_BY_CONTROLLER, Choice, SELECTED_NODE, annotation, best_match, claim_of, phase_of_claim, requested,
    volume_name,
};
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{BadArguments, arguments};
use crate::cache::volumes::{Assumption, Binding, is_bound};
use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::config::Faults;
use crate::framework::{EventSet, Handle, Plugin, Points, PreFilter, State, Verdict, state_of};

/// How often PreBind looks whether the claims are bound.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

pub struct VolumeBinding {
    bind_timeout: Duration,
}

/// `VolumeBindingArgs`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Arguments {
    bind_timeout_seconds: i64,
    shape: Option<Value>,
}

impl Default for Arguments {
    fn default() -> Self {
        Arguments { bind_timeout_seconds: 600, shape: None }
    }
}

impl VolumeBinding {
    /// With the arguments of a profile.
    pub fn new(value: Option<&Value>) -> Result<VolumeBinding, BadArguments> {
        let Arguments { bind_timeout_seconds: seconds, shape } = arguments(value)?;
        let mut faults = Faults::default();
        if seconds < 0 {
            let why = "invalid BindTimeoutSeconds, should not be a negative value";
            faults.invalid("bindTimeoutSeconds", seconds, why);
        }
        if let Some(shape) = shape {
            let why = "unexpected field `shape`, remove it or turn on the feature gate StorageCapacityScoring";
            faults.invalid("shape", shape, why);
        }
        faults.check()?;
        Ok(VolumeBinding { bind_timeout: Duration::from_secs(seconds.unsigned_abs()) })
    }
}

/// A pod's claims.
#[derive(Debug, Default)]
struct PodClaims {
    bound: Vec<Arc<str>>,
    /// They wait for their first consumer; the smallest first.
    delayed: Vec<(Arc<str>, Arc<PersistentVolumeClaim>)>,
}

const BIND_REASON: u64 = 1;
const NODE_REASON: u64 = 1 << 1;
const SPACE_REASON: u64 = 1 << 2;
const ABSENT_REASON: u64 = 1 << 3;

/// The pod's claims, or why it cannot be placed yet. As `PreFilter` and `GetPodVolumeClaims`.
fn claims_of(pod: &Pod, snapshot: &Snapshot) -> Result<PodClaims, String> {
    let mut claims = PodClaims::default();
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let own = pod.metadata.name.as_deref().unwrap_or_default();
    let mut unbound = false;
    for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
        let Some((name, ephemeral)) = claim_of(own, volume) else { continue };
        let key = format!("{namespace}/{name}");
        let Some((key, claim)) = snapshot.volumes.claims.get_key_value(key.as_str()) else {
            return Err(match ephemeral {
                true => format!("waiting for ephemeral volume controller to create the persistentvolumeclaim {name:?}"),
                false => format!("persistentvolumeclaim {name:?} not found"),
            });
        };
        if claim.metadata.deletion_timestamp.is_some() {
            return Err(format!("persistentvolumeclaim {name:?} is being deleted"));
        }
        if phase_of_claim(claim) == "Lost" {
            let volume = volume_name(claim).unwrap_or_default();
            return Err(format!("persistentvolumeclaim {name:?} bound to non-existent persistentvolume {volume:?}"));
        }
        let owned =
            claim.metadata.owner_references.iter().flatten().any(|owner| Some(&owner.uid) == pod.metadata.uid.as_ref());
        if ephemeral && !owned {
            return Err(format!("PVC {key} was not created for pod {namespace}/{own} (pod is not owner)"));
        }
        if is_bound(claim) {
            claims.bound.push(key.clone());
        } else if volume_name(claim).is_none() && snapshot.volumes.waits_for_consumer(claim) {
            claims.delayed.push((key.clone(), claim.clone()));
        } else {
            unbound = true;
        }
    }
    if unbound {
        return Err("pod has unbound immediate PersistentVolumeClaims".to_owned());
    }
    claims.delayed.sort_by(|(_, a), (_, b)| requested(a).partial_cmp(&requested(b)).unwrap_or(Ordering::Equal));
    Ok(claims)
}

fn reaches(snapshot: &Snapshot, node: NodeId, volume: &PersistentVolume) -> bool {
    let affinity = volume.spec.as_ref().and_then(|spec| spec.node_affinity.as_ref()?.required.as_ref());
    let (name, labels) = (&snapshot.nodes.name[node.index()], &snapshot.nodes.labels[node.index()]);
    affinity.is_none_or(|selector| NodeTerms::of(selector).matches(name, labels))
}

/// The volume for a claim on a node: the one that was made for it, else the smallest that will do.
fn matching_volume<'a>(
    snapshot: &'a Snapshot,
    node: NodeId,
    (key, claim): &(Arc<str>, Arc<PersistentVolumeClaim>),
    taken: &[Binding],
) -> Option<&'a str> {
    let volume = best_match(claim, snapshot.volumes.volumes.values(), Choice::Smallest, |volume| {
        let name = volume.metadata.name.as_deref().unwrap_or_default();
        taken.iter().all(|binding| &*binding.volume != name)
            && snapshot.volumes.held_for(name).is_none_or(|other| other == &**key)
            && reaches(snapshot, node, volume)
    });
    volume?.metadata.name.as_deref()
}

/// Whether a volume for the claim can be made for the node; a refusal's reason if not. As `checkVolumeProvisions`.
fn can_provision(snapshot: &Snapshot, node: NodeId, claim: &PersistentVolumeClaim) -> Result<(), u64> {
    let volumes = &snapshot.volumes;
    let class = volumes.class_of(claim).filter(|class| class.provisioner != "kubernetes.io/no-provisioner");
    let class = class.ok_or(BIND_REASON)?;
    if claim.spec.as_ref().is_some_and(|spec| spec.selector.is_some()) {
        return Err(BIND_REASON);
    }
    let labels = &snapshot.nodes.labels[node.index()];
    let allowed = class.allowed_topologies.as_deref().unwrap_or_default();
    let term_holds = |term: &k8s_openapi::api::core::v1::TopologySelectorTerm| {
        let mut wishes = term.match_label_expressions.iter().flatten();
        wishes.all(|wish| labels.get(&wish.key).is_some_and(|value| wish.values.contains(value)))
    };
    if !allowed.is_empty() && !allowed.iter().any(term_holds) {
        return Err(BIND_REASON);
    }
    let tells = volumes.drivers.get(&class.provisioner).and_then(|driver| driver.spec.storage_capacity);
    if tells != Some(true) {
        return Ok(());
    }
    let wanted = requested(claim);
    let enough = volumes.capacities.values().any(|offer| {
        let largest = offer.maximum_volume_size.as_ref().or(offer.capacity.as_ref());
        Some(&offer.storage_class_name) == class.metadata.name.as_ref()
            && largest.is_some_and(|largest| Quantity::from(largest) >= wanted)
            && offer.node_topology.as_ref().is_some_and(|topology| {
                Selector::from_label_selector(topology).is_ok_and(|selector| selector.matches(labels))
            })
    });
    if enough { Ok(()) } else { Err(SPACE_REASON) }
}

/// What is to be done about the pod's claims if it comes to the node. As `FindPodVolumes`.
fn plan(claims: &PodClaims, snapshot: &Snapshot, node: NodeId) -> Result<Assumption, u64> {
    let mut reasons = 0;
    for key in &claims.bound {
        match snapshot.volumes.volume_of(key) {
            None => return Err(ABSENT_REASON),
            Some(volume) if !reaches(snapshot, node, volume) => reasons |= NODE_REASON,
            Some(_) => {}
        }
    }
    let name = &snapshot.nodes.name[node.index()];
    let mut found = Assumption { node: name.clone(), ..Assumption::default() };
    for delayed in &claims.delayed {
        let (key, claim) = delayed;
        // Chosen for another pod of the claim, and not yet written.
        if let Some(volume) = snapshot.volumes.volume_of(key) {
            let name = volume.metadata.name.as_deref().unwrap_or_default();
            match reaches(snapshot, node, volume) {
                true => found.bindings.push(Binding { claim: key.clone(), volume: name.into() }),
                false => reasons |= NODE_REASON,
            }
            continue;
        }
        match snapshot.volumes.selected_node(key, claim) {
            // A volume is being made for it already: there or nowhere.
            Some(selected) if *selected != **name => reasons |= BIND_REASON,
            Some(_) => found.provisions.push(key.clone()),
            None => match matching_volume(snapshot, node, delayed, &found.bindings) {
                Some(volume) => found.bindings.push(Binding { claim: key.clone(), volume: volume.into() }),
                None => match can_provision(snapshot, node, claim) {
                    Ok(()) => found.provisions.push(key.clone()),
                    Err(reason) => reasons |= reason,
                },
            },
        }
    }
    if reasons == 0 { Ok(found) } else { Err(reasons) }
}

/// Whether PreBind can go on: all of the pod's claims are bound, to volumes that the node reaches. As `checkBindings`.
fn are_bound(assumption: &Assumption, snapshot: &Snapshot) -> Result<bool, String> {
    let Some(node) = snapshot.nodes.find(&assumption.node) else {
        return Err(format!("node {:?} is gone", assumption.node));
    };
    for key in assumption.bindings.iter().map(|binding| &binding.claim).chain(&assumption.provisions) {
        let Some(claim) = snapshot.volumes.claims.get(key) else { return Err(format!("claim {key} is gone")) };
        if !is_bound(claim) {
            let selected = annotation(&claim.metadata, SELECTED_NODE);
            if assumption.provisions.contains(key) && selected.is_some_and(|selected| selected.is_empty()) {
                return Err(format!("provisioning failed for claim {key}"));
            }
            return Ok(false);
        }
        let bound = snapshot.volumes.volume_of(key);
        if bound.is_some_and(|volume| !reaches(snapshot, node, volume)) {
            return Err(format!("claim {key} was bound to a volume that node {:?} does not reach", assumption.node));
        }
    }
    Ok(true)
}

/// Writes the bindings and the nodes for which volumes are to be made. As `bindAPIUpdate`.
async fn write(handle: &Handle, assumption: &Assumption) -> Result<(), String> {
    let claim = |key: &str| handle.look(|snapshot| snapshot.volumes.claims.get(key).cloned()).flatten();
    for Binding { claim: key, volume } in &assumption.bindings {
        let claim = claim(key).ok_or_else(|| format!("claim {key} is gone"))?;
        let known = handle.look(|snapshot| snapshot.volumes.volumes.get(volume).cloned()).flatten();
        let known = known.ok_or_else(|| format!("volume {volume} is gone"))?;
        // The revision keeps two claims from one volume.
        let patch = json!({
            "metadata": {"resourceVersion": known.metadata.resource_version,
                "annotations": {BOUND_BY_CONTROLLER: "yes"}},
            "spec": {"claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim",
                "namespace": claim.metadata.namespace, "name": claim.metadata.name, "uid": claim.metadata.uid,
                "resourceVersion": claim.metadata.resource_version}}
        });
        let volumes: Api<PersistentVolume> = Api::all(handle.client.clone());
        let answer = volumes.patch(volume, &PatchParams::default(), &Patch::Merge(patch)).await;
        answer.map_err(|error| format!("binding volume {volume} to claim {key}: {error}"))?;
    }
    for key in &assumption.provisions {
        let claim = claim(key).ok_or_else(|| format!("claim {key} is gone"))?;
        let patch = json!({"metadata": {"uid": claim.metadata.uid,
            "annotations": {SELECTED_NODE: &*assumption.node}}});
        let (namespace, name) = key.split_once('/').unwrap_or_default();
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(handle.client.clone(), namespace);
        let answer = claims.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await;
        answer.map_err(|error| format!("selecting the node of claim {key}: {error}"))?;
    }
    Ok(())
}

impl Plugin for VolumeBinding {
    fn name(&self) -> &'static str {
        "VolumeBinding"
    }

    fn points(&self) -> Points {
        Points::PRE_FILTER.and(Points::FILTER).and(Points::RESERVE).and(Points::PRE_BIND)
    }

    fn events(&self) -> EventSet {
        EventSet::STORAGE_CLASS
            .and(EventSet::CLAIM)
            .and(EventSet::VOLUME)
            .and(EventSet::NODE_ADD)
            .and(EventSet::NODE_LABEL)
            .and(EventSet::CSI)
    }

    fn pre_filter(&self, pod: &PendingPod, snapshot: &Snapshot) -> PreFilter {
        if pod.facts.claims.is_empty() {
            return PreFilter::Skip;
        }
        match claims_of(&pod.pod, snapshot) {
            Ok(claims) => PreFilter::Proceed(Box::new(claims)),
            Err(words) => PreFilter::Refuse(words),
        }
    }

    fn filter(&self, state: &State, _pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Verdict {
        match plan(state_of(state), snapshot, node) {
            Ok(_) => Verdict::Accept,
            Err(reasons) => Verdict::unresolvable(reasons),
        }
    }

    fn reason(&self, _state: &State, number: u32) -> Cow<'static, str> {
        Cow::Borrowed(match 1 << number {
            BIND_REASON => "node(s) didn't find available persistent volumes to bind",
            NODE_REASON => "node(s) didn't match PersistentVolume's node affinity",
            SPACE_REASON => "node(s) did not have enough free storage",
            _ => "node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)",
        })
    }

    fn reserve(&self, pod: &PendingPod, snapshot: &mut Snapshot, node: NodeId) -> Result<State, String> {
        let found = match pod.facts.claims.is_empty() {
            true => Assumption::default(),
            false => plan(&claims_of(&pod.pod, snapshot)?, snapshot, node)
                .map_err(|_| "the volumes are no longer available".to_owned())?,
        };
        if !found.bindings.is_empty() || !found.provisions.is_empty() {
            snapshot.volumes.assume(pod.facts.uid.clone(), found.clone());
        }
        Ok(Box::new(found))
    }

    fn unreserve(&self, pod: &PendingPod, snapshot: &mut Snapshot) {
        snapshot.volumes.forget(&pod.facts.uid);
    }

    fn must_pre_bind(&self, reserved: &State) -> bool {
        let assumption: &Assumption = state_of(reserved);
        !assumption.bindings.is_empty() || !assumption.provisions.is_empty()
    }

    fn pre_bind<'a>(
        &'a self,
        handle: &'a Handle,
        reserved: &'a State,
        pod: &'a PendingPod,
        _node: &'a str,
    ) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            let assumption: &Assumption = state_of(reserved);
            write(handle, assumption).await?;
            let deadline = Instant::now() + self.bind_timeout;
            loop {
                let bound = handle.look(|snapshot| are_bound(assumption, snapshot));
                if bound.unwrap_or(Ok(false))? {
                    handle.look(|snapshot| snapshot.volumes.forget(&pod.facts.uid));
                    return Ok(());
                }
                if Instant::now() >= deadline {
                    return Err("binding volumes: context deadline exceeded".to_owned());
                }
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{accepts, claim, class, cluster, explain, node, pending, pod, volume};

    use apimachinery::volume::BIND_COMPLETED as BOUND;

    fn plugin() -> VolumeBinding {
        VolumeBinding::new(None).expect("arguments")
    }

    fn snapshot() -> Snapshot {
        let mut snapshot = cluster(["a", "b"].map(|name| node(name).label("host", name).build()));
        class(
            &mut snapshot,
            "late",
            json!({"volumeBindingMode": "WaitForFirstConsumer", "provisioner": "kubernetes.io/no-provisioner"}),
        );
        class(&mut snapshot, "made", json!({"volumeBindingMode": "WaitForFirstConsumer", "provisioner": "csi"}));
        snapshot
    }

    fn on(host: &str) -> Value {
        json!({"required": {"nodeSelectorTerms": [{"matchExpressions": [{"key": "host", "operator": "In", "values": [host]}]}]}})
    }

    fn late(class: &str, size: &str) -> Value {
        json!({"storageClassName": class, "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}})
    }

    fn offered(host: &str, size: &str) -> Value {
        json!({"storageClassName": "late", "accessModes": ["ReadWriteOnce"], "capacity": {"storage": size}, "nodeAffinity": on(host)})
    }

    #[test]
    fn a_bound_claim_keeps_its_pod_with_its_volume() {
        let mut snapshot = snapshot();
        volume(&mut snapshot, "v", json!({"nodeAffinity": on("b")}));
        claim(&mut snapshot, "c", json!({"volumeName": "v"}));
        let p = pod("p").claim("c").build();
        // Named, but the binding is not complete.
        assert_eq!(accepts(&plugin(), &p, &snapshot), [false, false]);
        let bound = snapshot.volumes.claims.get_mut("default/c").expect("claim");
        Arc::make_mut(bound).metadata.annotations = Some([(BOUND.to_owned(), "yes".to_owned())].into());
        assert_eq!(accepts(&plugin(), &p, &snapshot), [false, true]);
        assert_eq!(explain(&plugin(), &p, &snapshot, "a"), ["node(s) didn't match PersistentVolume's node affinity"]);
        snapshot.volumes.volumes.clear();
        assert_eq!(
            explain(&plugin(), &p, &snapshot, "a"),
            ["node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)"]
        );
    }

    #[test]
    fn a_delayed_claim_takes_the_smallest_volume_that_will_do() {
        let mut snapshot = snapshot();
        for (name, host, size) in [("small", "a", "1Gi"), ("large", "a", "10Gi"), ("middle", "a", "5Gi")] {
            volume(&mut snapshot, name, offered(host, size));
        }
        claim(&mut snapshot, "c", late("late", "2Gi"));
        claim(&mut snapshot, "d", late("late", "6Gi"));
        let p = pod("p").claim("c").claim("d").build();
        assert_eq!(accepts(&plugin(), &p, &snapshot), [true, false]);
        assert_eq!(
            explain(&plugin(), &p, &snapshot, "b"),
            ["node(s) didn't find available persistent volumes to bind"]
        );
        let state = plugin().reserve(&pending(p), &mut snapshot, NodeId(0)).expect("reserved");
        let found: &Assumption = state_of(&state);
        let chosen: Vec<_> = found.bindings.iter().map(|binding| (&*binding.claim, &*binding.volume)).collect();
        assert_eq!(chosen, [("default/c", "middle"), ("default/d", "large")]);
        // What is held for one claim is not there for another.
        claim(&mut snapshot, "e", late("late", "2Gi"));
        let other = pod("q").claim("e").build();
        assert_eq!(accepts(&plugin(), &other, &snapshot), [false, false]);
        // Another pod of the claim goes with it.
        let same = pod("s").claim("d").build();
        let state = plugin().reserve(&pending(same), &mut snapshot, NodeId(0)).expect("reserved");
        assert_eq!(&*state_of::<Assumption>(&state).bindings[0].volume, "large");
        snapshot.volumes.forget("uid-s");
        snapshot.volumes.forget("uid-p");
        assert_eq!(accepts(&plugin(), &other, &snapshot), [true, false]);
    }

    #[test]
    fn a_volume_is_made_where_there_is_room() {
        let mut snapshot = snapshot();
        claim(&mut snapshot, "c", late("made", "5Gi"));
        let p = pod("p").claim("c").build();
        assert_eq!(accepts(&plugin(), &p, &snapshot), [true, true]);
        let driver = json!({"metadata": {"name": "csi"}, "spec": {"storageCapacity": true}});
        snapshot.volumes.drivers.insert("csi".into(), serde_json::from_value(driver).expect("a driver"));
        assert_eq!(explain(&plugin(), &p, &snapshot, "a"), ["node(s) did not have enough free storage"]);
        let offer = json!({"metadata": {"name": "o", "namespace": "x"}, "storageClassName": "made", "capacity": "6Gi",
            "nodeTopology": {"matchLabels": {"host": "b"}}});
        snapshot.volumes.capacities.insert("x/o".into(), serde_json::from_value(offer).expect("a capacity"));
        assert_eq!(accepts(&plugin(), &p, &snapshot), [false, true]);
        // Once a node is selected there is no other.
        let chosen = snapshot.volumes.claims.get_mut("default/c").expect("claim");
        let selected = ("volume.kubernetes.io/selected-node".to_owned(), "a".to_owned());
        Arc::make_mut(chosen).metadata.annotations = Some([selected].into());
        assert_eq!(accepts(&plugin(), &p, &snapshot), [true, false]);
    }

    #[test]
    fn what_is_not_ready_is_said() {
        let mut snapshot = snapshot();
        claim(&mut snapshot, "now", json!({}));
        for (name, words) in [
            ("now", "pod has unbound immediate PersistentVolumeClaims"),
            ("none", "persistentvolumeclaim \"none\" not found"),
        ] {
            let error = claims_of(&pod("p").claim(name).build(), &snapshot).expect_err(name);
            assert_eq!(error, words);
        }
    }
}
