//! VolumeZone: a volume that is labelled with zone or region is for nodes there.

use std::borrow::Cow;

use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::framework::{EventSet, Plugin, Points, PreFilter, State, Verdict, state_of};

pub struct VolumeZone;

/// The labels that count, each with its older name.
const TOPOLOGY: [(&str, &str); 2] = [
    ("topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone"),
    ("topology.kubernetes.io/region", "failure-domain.beta.kubernetes.io/region"),
];

/// What a volume asks of a node: one of the values for a label.
type Wishes = Vec<((&'static str, &'static str), Vec<String>)>;

impl Plugin for VolumeZone {
    fn name(&self) -> &'static str {
        "VolumeZone"
    }

    fn points(&self) -> Points {
        Points::PRE_FILTER.and(Points::FILTER)
    }

    fn events(&self) -> EventSet {
        EventSet::NODE_ADD
            .and(EventSet::NODE_LABEL)
            .and(EventSet::CLAIM)
            .and(EventSet::VOLUME)
            .and(EventSet::STORAGE_CLASS)
    }

    fn pre_filter(&self, pod: &PendingPod, snapshot: &Snapshot) -> PreFilter {
        let mut wishes = Wishes::new();
        for volume in pod.facts.claims.iter().filter_map(|claim| snapshot.volumes.volume_of(claim)) {
            let labels = volume.metadata.labels.iter().flatten();
            for (key, value) in labels {
                let topology = TOPOLOGY.into_iter().find(|(name, older)| key == name || key == older);
                if let Some(topology) = topology {
                    wishes.push((topology, value.split("__").map(ToOwned::to_owned).collect()));
                }
            }
        }
        if wishes.is_empty() { PreFilter::Skip } else { PreFilter::Proceed(Box::new(wishes)) }
    }

    /// Nodes without any zone or region are fine: nothing is known of them.
    fn filter(&self, state: &State, _pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Verdict {
        let wishes: &Wishes = state_of(state);
        let labels = &snapshot.nodes.labels[node.index()];
        let value = |(name, older): (&str, &str)| labels.get(name).or_else(|| labels.get(older));
        if TOPOLOGY.iter().all(|topology| value(*topology).is_none()) {
            return Verdict::Accept;
        }
        let there =
            wishes.iter().all(|(topology, values)| value(*topology).is_some_and(|value| values.contains(value)));
        Verdict::resolvable_never(there)
    }

    fn reason(&self, _state: &State, _number: u32) -> Cow<'static, str> {
        Cow::Borrowed("node(s) had no available volume zone")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{accepts, claim, cluster, node, pod, volume};

    #[test]
    fn a_volume_keeps_its_pod_in_its_zone() {
        let zone = "topology.kubernetes.io/zone";
        let mut snapshot = cluster([
            node("a").label(zone, "z1").build(),
            node("b").label("failure-domain.beta.kubernetes.io/zone", "z2").build(),
            node("c").build(),
        ]);
        volume(&mut snapshot, "v", json!({}));
        volume(&mut snapshot, "w", json!({}));
        for (name, label) in [("v", "z1"), ("w", "z1__z2")] {
            let volume = snapshot.volumes.volumes.get_mut(name).expect("volume");
            std::sync::Arc::make_mut(volume).metadata.labels = Some([(zone.to_owned(), label.to_owned())].into());
            claim(&mut snapshot, name, json!({"volumeName": name}));
        }
        assert_eq!(accepts(&VolumeZone, &pod("p").claim("v").build(), &snapshot), [true, false, true]);
        assert_eq!(accepts(&VolumeZone, &pod("p").claim("w").build(), &snapshot), [true, true, true]);
    }
}
