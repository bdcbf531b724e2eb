//! PrioritySort: the highest priority first, then the pod that has waited longest.

use crate::cache::PendingPod;
use crate::framework::{Plugin, Points, QueueKey};

pub struct PrioritySort;

impl Plugin for PrioritySort {
    fn name(&self) -> &'static str {
        "PrioritySort"
    }

    fn points(&self) -> Points {
        Points::QUEUE_SORT
    }

    fn queue_key(&self, pod: &PendingPod, queued_us: i64) -> QueueKey {
        (-i64::from(pod.facts.priority), queued_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{pending, pod};

    #[test]
    fn priority_goes_before_age() {
        let key = |priority, since| PrioritySort.queue_key(&pending(pod("p").priority(priority).build()), since);
        assert!(key(10, 5) < key(1, 1));
        assert!(key(1, 1) < key(1, 5));
        assert!(key(0, 9) < key(-1, 1));
    }
}
