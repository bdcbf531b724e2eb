//! Changes in the cluster, as sets: what happened, and what a refused pod waits for.

use std::ops::{BitOr, BitOrAssign};

use crate::cache::{NodeId, PodFacts};

/// A set of changes. As Kubernetes' `ClusterEvent`s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventSet(u32);

impl EventSet {
    pub const NONE: EventSet = EventSet(0);
    pub const NODE_ADD: EventSet = EventSet(1);
    pub const NODE_ALLOCATABLE: EventSet = EventSet(1 << 1);
    pub const NODE_LABEL: EventSet = EventSet(1 << 2);
    pub const NODE_TAINT: EventSet = EventSet(1 << 3);
    pub const NODE_DELETE: EventSet = EventSet(1 << 4);
    /// A pod got a node.
    pub const POD_PLACED: EventSet = EventSet(1 << 5);
    /// A pod that had a node is gone, ended, or asks for less.
    pub const POD_REMOVED: EventSet = EventSet(1 << 6);
    /// Labels of a placed pod changed.
    pub const POD_LABEL: EventSet = EventSet(1 << 7);
    /// The waiting pod has other labels, more tolerations, asks for less, or was told of the claims made for it.
    pub const OWN_LABELS: EventSet = EventSet(1 << 8);
    pub const OWN_TOLERATIONS: EventSet = EventSet(1 << 18);
    pub const OWN_REQUESTS: EventSet = EventSet(1 << 19);
    pub const OWN_CLAIMS: EventSet = EventSet(1 << 20);
    /// A placed pod began to be deleted.
    pub const POD_TERMINATING: EventSet = EventSet(1 << 9);
    pub const CLAIM: EventSet = EventSet(1 << 10);
    pub const VOLUME: EventSet = EventSet(1 << 11);
    pub const STORAGE_CLASS: EventSet = EventSet(1 << 12);
    /// A CSINode, CSIDriver or CSIStorageCapacity.
    pub const CSI: EventSet = EventSet(1 << 13);
    pub const RESOURCE_CLAIM: EventSet = EventSet(1 << 14);
    pub const RESOURCE_SLICE: EventSet = EventSet(1 << 15);
    pub const DEVICE_CLASS: EventSet = EventSet(1 << 16);
    /// A node declares other features.
    pub const NODE_FEATURES: EventSet = EventSet(1 << 17);
    /// Something that no event announces: wait for the periodic flush only.
    pub const ALL: EventSet = EventSet(u32::MAX);

    pub const fn and(self, other: EventSet) -> EventSet {
        EventSet(self.0 | other.0)
    }

    pub const fn intersects(self, other: EventSet) -> bool {
        self.0 & other.0 != 0
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// What happened, and where.
#[derive(Clone, Copy, Debug, Default)]
pub struct Event<'a> {
    pub kinds: EventSet,
    /// The node that changed, or the pod's.
    pub node: Option<NodeId>,
    pub pod: Option<&'a PodFacts>,
}

impl From<EventSet> for Event<'_> {
    fn from(kinds: EventSet) -> Self {
        Event { kinds, ..Event::default() }
    }
}

impl BitOr for EventSet {
    type Output = EventSet;

    fn bitor(self, other: EventSet) -> EventSet {
        self.and(other)
    }
}

impl BitOrAssign for EventSet {
    fn bitor_assign(&mut self, other: EventSet) {
        *self = self.and(other);
    }
}
