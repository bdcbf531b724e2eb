//! NodeVolumeLimits: how many volumes of a CSI driver a node can have, as its CSINode says.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::PersistentVolume;

use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::framework::{EventSet, Plugin, Points, PreFilter, State, Verdict};

pub struct NodeVolumeLimits;

fn csi_volume(volume: &PersistentVolume) -> Option<(String, String)> {
    let csi = volume.spec.as_ref()?.csi.as_ref()?;
    Some((csi.driver.clone(), csi.volume_handle.clone()))
}

/// The driver of a claim's volume, and what makes the volume one and the same for two claims.
fn driver_and_volume(snapshot: &Snapshot, claim: &str) -> Option<(String, String)> {
    if let Some(volume) = snapshot.volumes.volume_of(claim) {
        return csi_volume(volume);
    }
    // Not there yet: it will be one of the class's.
    let object = snapshot.volumes.claims.get(claim)?;
    let class = snapshot.volumes.class_of(object)?;
    Some((class.provisioner.clone(), claim.to_owned()))
}

impl Plugin for NodeVolumeLimits {
    fn name(&self) -> &'static str {
        "NodeVolumeLimits"
    }

    fn points(&self) -> Points {
        Points::PRE_FILTER.and(Points::FILTER)
    }

    fn events(&self) -> EventSet {
        EventSet::CSI.and(EventSet::NODE_ADD).and(EventSet::POD_REMOVED).and(EventSet::CLAIM).and(EventSet::VOLUME)
    }

    fn pre_filter(&self, pod: &PendingPod, _snapshot: &Snapshot) -> PreFilter {
        if pod.facts.claims.is_empty() { PreFilter::Skip } else { PreFilter::Proceed(Box::new(())) }
    }

    fn filter(&self, _state: &State, pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Verdict {
        let Some(csi_node) = snapshot.volumes.csi_nodes.get(&*snapshot.nodes.name[node.index()]) else {
            return Verdict::Accept;
        };
        let limits: BTreeMap<&str, usize> = csi_node
            .spec
            .drivers
            .iter()
            .filter_map(|driver| Some((driver.name.as_str(), driver.allocatable.as_ref()?.count?.max(0) as usize)))
            .collect();
        if limits.is_empty() {
            return Verdict::Accept;
        }
        let used = snapshot.nodes.claims[node.index()].iter();
        let mut attached: BTreeSet<(String, String)> =
            used.filter_map(|(claim, _)| driver_and_volume(snapshot, claim)).collect();
        // What a pod has left behind, or another is about to use, takes a place too.
        attached.extend(snapshot.volumes.attached_to(&snapshot.nodes.name[node.index()]).filter_map(|v| csi_volume(v)));
        for claim in &pod.facts.claims {
            let Some(volume) = driver_and_volume(snapshot, claim) else { continue };
            let Some(limit) = limits.get(volume.0.as_str()) else { continue };
            let held = attached.iter().filter(|(driver, _)| *driver == volume.0).count();
            if !attached.contains(&volume) && held >= *limit {
                return Verdict::unschedulable(1);
            }
            attached.insert(volume);
        }
        Verdict::Accept
    }

    fn reason(&self, _state: &State, _number: u32) -> Cow<'static, str> {
        Cow::Borrowed("node(s) exceed max volume count")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{accepts, claim, cluster, node, placed, pod, volume};

    #[test]
    fn a_node_takes_no_more_volumes_than_its_driver_allows() {
        let mut snapshot = cluster([node("a").build(), node("b").build()]);
        for number in 0..4 {
            let (name, csi) =
                (format!("v{number}"), json!({"driver": "d", "volumeHandle": format!("h{}", number / 2)}));
            volume(&mut snapshot, &name, json!({"csi": csi}));
            claim(&mut snapshot, &format!("c{number}"), json!({"volumeName": name}));
        }
        let csi_node = json!({"metadata": {"name": "a"}, "spec": {"drivers": [
            {"name": "d", "nodeID": "a", "allocatable": {"count": 1}}]}});
        snapshot.volumes.csi_nodes.insert("a".into(), serde_json::from_value(csi_node).expect("a CSINode"));
        assert_eq!(accepts(&NodeVolumeLimits, &pod("p").claim("c0").build(), &snapshot), [true, true]);
        placed(&mut snapshot, pod("user").claim("c0").on("a").build());
        // c1 is the same volume as c0, c2 another, which takes the place of one on b without a pod there.
        assert_eq!(accepts(&NodeVolumeLimits, &pod("p").claim("c1").build(), &snapshot), [true, true]);
        assert_eq!(accepts(&NodeVolumeLimits, &pod("p").claim("c2").build(), &snapshot), [false, true]);
        let mut csi_node = (*snapshot.volumes.csi_nodes["a"]).clone();
        csi_node.metadata.name = Some("b".to_owned());
        snapshot.volumes.csi_nodes.insert("b".into(), csi_node.into());
        snapshot.volumes.attachments.insert("va".into(), ("b".into(), "v3".into()));
        assert_eq!(accepts(&NodeVolumeLimits, &pod("p").claim("c0").build(), &snapshot), [true, false]);
        assert_eq!(accepts(&NodeVolumeLimits, &pod("p").claim("c2").build(), &snapshot), [false, true]);
    }
}
