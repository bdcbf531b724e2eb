//! VolumeRestrictions: what only one pod may use: claims with the access mode ReadWriteOncePod, in the whole cluster, and
//! disks of the in-tree kinds, on a node.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use crate::cache::{NodeId, PendingPod, PodFacts, Snapshot};
use crate::framework::{Event, EventSet, Plugin, Points, PreFilter, State, Verdict, state_of};

pub struct VolumeRestrictions;

const DISK_REASON: u64 = 1;
const CLAIM_REASON: u64 = 1 << 1;

/// The pod's claims that are for one pod only, and how many pods use each.
type Users = HashMap<Arc<str>, i64>;

impl Plugin for VolumeRestrictions {
    fn name(&self) -> &'static str {
        "VolumeRestrictions"
    }

    fn points(&self) -> Points {
        Points::PRE_FILTER.and(Points::FILTER)
    }

    fn events(&self) -> EventSet {
        EventSet::NODE_ADD.and(EventSet::POD_REMOVED).and(EventSet::CLAIM)
    }

    fn is_local(&self) -> bool {
        false
    }

    /// A removed pod helps if it used one of the pod's claims or disks.
    fn hint(&self, pod: &PendingPod, _snapshot: &Snapshot, event: &Event<'_>) -> bool {
        event.pod.is_none_or(|other| {
            other.claims.iter().any(|claim| pod.facts.claims.contains(claim))
                || other.disks.iter().any(|disk| pod.facts.disks.iter().any(|own| own.conflicts(disk)))
        })
    }

    fn pre_filter(&self, pod: &PendingPod, snapshot: &Snapshot) -> PreFilter {
        if pod.facts.claims.is_empty() && pod.facts.disks.is_empty() {
            return PreFilter::Skip;
        }
        let mut users = Users::new();
        for key in &pod.facts.claims {
            let Some(claim) = snapshot.volumes.claims.get(key) else { continue };
            let modes = claim.spec.as_ref().and_then(|spec| spec.access_modes.as_deref()).unwrap_or_default();
            if modes.iter().any(|mode| mode == "ReadWriteOncePod") {
                users.insert(key.clone(), i64::from(snapshot.users_of(key)));
            }
        }
        PreFilter::Proceed(Box::new(users))
    }

    fn account(
        &self,
        state: &mut State,
        _pod: &PendingPod,
        _snapshot: &Snapshot,
        other: &PodFacts,
        _node: NodeId,
        sign: i64,
    ) {
        let Some(users) = state.downcast_mut::<Users>() else { return };
        for claim in &other.claims {
            if let Some(users) = users.get_mut(claim) {
                *users += sign;
            }
        }
    }

    fn filter(&self, state: &State, pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Verdict {
        let held = &snapshot.nodes.disks[node.index()];
        if pod.facts.disks.iter().any(|disk| held.iter().any(|held| held.conflicts(disk))) {
            return Verdict::unschedulable(DISK_REASON);
        }
        let users: &Users = state_of(state);
        if users.values().any(|users| *users > 0) { Verdict::unschedulable(CLAIM_REASON) } else { Verdict::Accept }
    }

    fn reason(&self, _state: &State, number: u32) -> Cow<'static, str> {
        Cow::Borrowed(if 1 << number == DISK_REASON {
            "node(s) had no available disk"
        } else {
            "node has pod using PersistentVolumeClaim with the same name and ReadWriteOncePod access mode"
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{accepts, claim, cluster, node, placed, pod};

    #[test]
    fn a_claim_for_one_pod_is_used_by_one() {
        let mut snapshot = cluster([node("a").build(), node("b").build()]);
        claim(&mut snapshot, "one", json!({"accessModes": ["ReadWriteOncePod"], "volumeName": "v"}));
        claim(&mut snapshot, "many", json!({"accessModes": ["ReadWriteOnce"], "volumeName": "w"}));
        for name in ["one", "many"] {
            assert_eq!(accepts(&VolumeRestrictions, &pod("p").claim(name).build(), &snapshot), [true, true], "{name}");
            placed(&mut snapshot, pod(&format!("user-of-{name}")).claim(name).on("a").build());
        }
        assert_eq!(accepts(&VolumeRestrictions, &pod("p").claim("one").build(), &snapshot), [false, false]);
        assert_eq!(accepts(&VolumeRestrictions, &pod("p").claim("many").build(), &snapshot), [true, true]);
    }

    #[test]
    fn a_disk_is_shared_for_reading_only() {
        let disk = |name: &str, read_only: bool| {
            pod(name)
                .spec(json!({"volumes": [{"name": "d", "gcePersistentDisk": {"pdName": "x", "readOnly": read_only}}]}))
        };
        let mut snapshot = cluster([node("a").build(), node("b").build()]);
        placed(&mut snapshot, disk("reader", true).on("a").build());
        assert_eq!(accepts(&VolumeRestrictions, &disk("p", true).build(), &snapshot), [true, true]);
        assert_eq!(accepts(&VolumeRestrictions, &disk("p", false).build(), &snapshot), [false, true]);
    }
}
