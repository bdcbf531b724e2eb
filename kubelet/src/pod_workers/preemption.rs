//! Which pods give way to a critical one that has no room. Pure. As the kubelet's `CriticalPodAdmissionHandler`: as few as will do,
//! those of the least quality of service first, then the smallest.

use std::sync::Arc;

use apimachinery::quantity::Quantity;
use k8s_openapi::api::core::v1::Pod;

use super::admission::{Lack, in_units};
use crate::eviction::is_critical;

/// Why a pod that gave way ended.
pub const REASON: &str = "Preempting";
pub const MESSAGE: &str = "Preempted in order to admit critical pod";
pub const CONDITION_MESSAGE: &str = "Pod was preempted by Kubelet to accommodate a critical pod.";

/// A resource and how much of it must still be freed.
type Needs = Vec<(String, i64)>;

/// The pods to end so that `pod` has what it lacks. `Err`: no set of pods would do.
pub fn victims(pod: &Pod, others: &[Arc<Pod>], lacking: &[Lack]) -> Result<Vec<Arc<Pod>>, String> {
    let needs: Needs = lacking.iter().map(|lack| (lack.resource.clone(), lack.amount())).collect();
    let of_class = |class: &str| -> Vec<Arc<Pod>> {
        let preemptable = others.iter().filter(|other| gives_way(pod, other));
        let qos = |other: &Pod| other.spec.as_ref().map_or("BestEffort", apimachinery::pod::qos_class);
        preemptable.filter(|other| qos(other) == class).cloned().collect()
    };
    let [best_effort, burstable, guaranteed] = ["BestEffort", "Burstable", "Guaranteed"].map(of_class);
    let hopeless = without(&needs, best_effort.iter().chain(&burstable).chain(&guaranteed));
    if !hopeless.is_empty() {
        return Err(nobody(&hopeless));
    }
    // Of each class, what is needed if all of the lesser ones are ended.
    let guaranteed = nearest(guaranteed, without(&needs, best_effort.iter().chain(&burstable)))?;
    let burstable = nearest(burstable, without(&needs, best_effort.iter().chain(&guaranteed)))?;
    let best_effort = nearest(best_effort, without(&needs, burstable.iter().chain(&guaranteed)))?;
    Ok(best_effort.into_iter().chain(burstable).chain(guaranteed).collect())
}

/// As `Preemptable`.
fn gives_way(pod: &Pod, other: &Pod) -> bool {
    let priority = |pod: &Pod| pod.spec.as_ref().and_then(|s| s.priority);
    let lesser = priority(pod).zip(priority(other)).is_some_and(|(own, theirs)| own > theirs);
    is_critical(pod) && !is_critical(other) || lesser
}

fn asked(pod: &Pod, resource: &str) -> i64 {
    if resource == "pods" {
        return 1;
    }
    let requests = pod.spec.as_ref().map(apimachinery::pod::requests).unwrap_or_default();
    requests.get(resource).map_or(0, |amount: &Quantity| in_units(resource, amount))
}

/// What is still needed when some pods have ended.
fn without<'p>(needs: &Needs, ended: impl Iterator<Item = &'p Arc<Pod>>) -> Needs {
    let ended: Vec<&Arc<Pod>> = ended.collect();
    let left = |(resource, amount): &(String, i64)| {
        let left = amount - ended.iter().map(|pod| asked(pod, resource)).sum::<i64>();
        (left > 0).then(|| (resource.clone(), left))
    };
    needs.iter().filter_map(left).collect()
}

/// The pods whose requests come nearest to the needs, one after the other, until nothing is needed any more.
fn nearest(mut pods: Vec<Arc<Pod>>, mut needs: Needs) -> Result<Vec<Arc<Pod>>, String> {
    let mut chosen = Vec::new();
    while !needs.is_empty() {
        let key = |pod: &Pod| (distance(&needs, pod), asked(pod, "memory"), asked(pod, "cpu"));
        let best = pods.iter().enumerate().min_by(|(_, a), (_, b)| {
            let (a, b) = (key(a), key(b));
            a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2)))
        });
        let Some((best, _)) = best else { return Err(nobody(&needs)) };
        let pod = pods.swap_remove(best);
        needs = without(&needs, std::iter::once(&pod));
        chosen.push(pod);
    }
    Ok(chosen)
}

/// How much of the needs a pod's end would leave: each counts by the share that is left of it.
#[allow(clippy::cast_precision_loss)]
fn distance(needs: &Needs, pod: &Pod) -> f64 {
    let left = |(resource, amount): &(String, i64)| {
        let left = (amount - asked(pod, resource)).max(0);
        (left as f64 / *amount as f64).powi(2)
    };
    needs.iter().map(left).sum()
}

fn nobody(needs: &Needs) -> String {
    let needs: String = needs.iter().map(|(resource, amount)| format!("(res: {resource}, q: {amount}), ")).collect();
    format!("no set of running pods found to reclaim resources: [{needs}]")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, priority: i32, requests: serde_json::Value, limits: serde_json::Value) -> Arc<Pod> {
        let resources = json!({"requests": requests, "limits": limits});
        let spec = json!({"priority": priority, "containers": [{"name": "c", "resources": resources}]});
        Arc::new(serde_json::from_value(json!({"metadata": {"name": name, "uid": name}, "spec": spec})).unwrap())
    }

    fn burstable(name: &str, cpu: &str, memory: &str) -> Arc<Pod> {
        pod(name, 0, json!({"cpu": cpu, "memory": memory}), json!({}))
    }

    fn lack(resource: &str, amount: i64) -> Lack {
        Lack { resource: resource.to_owned(), requested: amount, used: 0, capacity: 0 }
    }

    fn names(pods: &[Arc<Pod>]) -> Vec<&str> {
        pods.iter().map(|pod| pod.metadata.name.as_deref().unwrap()).collect()
    }

    #[test]
    fn as_few_and_as_small_pods_as_will_do_give_way() {
        let critical = pod("critical", 2_000_000_000, json!({}), json!({}));
        let exact = |name: &str, cpu: &str| {
            pod(name, 0, json!({"cpu": cpu, "memory": "1Mi"}), json!({"cpu": cpu, "memory": "1Mi"}))
        };
        let others = [
            burstable("small", "100m", "10Mi"),
            burstable("big", "500m", "100Mi"),
            burstable("bigger", "500m", "200Mi"),
            exact("guaranteed", "400m"),
            pod("idle", 0, json!({}), json!({})),
            pod("system", 2_000_000_001, json!({"cpu": "2"}), json!({})),
        ];
        let choose = |lacking: &[Lack]| victims(&critical, &others, lacking).map(|found| names(&found).join(" "));
        assert_eq!(choose(&[lack("cpu", 80)]).unwrap(), "small");
        assert_eq!(choose(&[lack("cpu", 300)]).unwrap(), "big");
        assert_eq!(choose(&[lack("cpu", 300), lack("memory", 150 << 20)]).unwrap(), "bigger");
        assert_eq!(choose(&[lack("pods", 1)]).unwrap(), "idle");
        // Guaranteed pods go only when all others would not do.
        assert_eq!(choose(&[lack("cpu", 1200)]).unwrap(), "big bigger guaranteed");
        assert_eq!(
            choose(&[lack("cpu", 2000)]).unwrap_err(),
            "no set of running pods found to reclaim resources: [(res: cpu, q: 500), ]"
        );
    }

    #[test]
    fn nobody_gives_way_to_their_like() {
        let (own, equal) = (burstable("own", "1", "1Mi"), burstable("equal", "1", "1Mi"));
        assert!(victims(&own, &[equal], &[lack("cpu", 1)]).is_err());
    }
}
