//! SchedulingGates: a pod with `spec.schedulingGates` stays out of the queue until the last gate is lifted.

use crate::cache::PendingPod;
use crate::framework::{EventSet, Plugin, Points};

pub struct SchedulingGates;

impl Plugin for SchedulingGates {
    fn name(&self) -> &'static str {
        "SchedulingGates"
    }

    fn points(&self) -> Points {
        Points::PRE_ENQUEUE
    }

    fn events(&self) -> EventSet {
        EventSet::NONE
    }

    fn pre_enqueue(&self, pod: &PendingPod) -> Result<(), String> {
        let gates = pod.spec().and_then(|spec| spec.scheduling_gates.as_deref()).unwrap_or_default();
        if gates.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = gates.iter().map(|gate| gate.name.as_str()).collect();
        Err(format!("waiting for scheduling gates: [{}]", names.join(" ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{pending, pod};

    #[test]
    fn gates_hold_a_pod_back() {
        assert_eq!(SchedulingGates.pre_enqueue(&pending(pod("p").build())), Ok(()));
        assert_eq!(
            SchedulingGates.pre_enqueue(&pending(pod("p").gate("a").gate("b").build())),
            Err("waiting for scheduling gates: [a b]".to_owned())
        );
    }
}
