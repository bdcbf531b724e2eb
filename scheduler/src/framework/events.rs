//! Changes in the cluster, as sets: what happened, and what a refused pod waits for.

use std::ops::{BitOr, BitOrAssign};

/// A set of changes. As Kubernetes' `ClusterEvent`s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventSet(u16);

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
    /// The waiting pod itself changed.
    pub const SELF_UPDATE: EventSet = EventSet(1 << 8);
    /// Something that no event announces: wait for the periodic flush only.
    pub const ALL: EventSet = EventSet(u16::MAX);

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
