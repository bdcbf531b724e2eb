//! Preemption carried out: the victims are marked and deleted, and less important pods give up the node.

use std::sync::Arc;

use component_base::events::Type;
use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, Preconditions};
use serde_json::json;
use tracing::{info, warn};

use super::{Driver, reference};
use crate::cache::{PendingPod, PodFacts};

impl Driver {
    /// Makes a node free of `victims` for the pod; whether all of them are going. As `prepareCandidateAsync`.
    pub(super) async fn preempt(&self, pod: &PendingPod, node: &str, victims: &[Arc<str>]) -> bool {
        let Some(victims) = self.shared.extenders.victims(pod, node, victims).await else { return false };
        let (victims, lower) = {
            let mut core = self.shared.core.lock();
            let found: Vec<PodFacts> = victims.iter().filter_map(|uid| core.snapshot.facts_of(uid).cloned()).collect();
            // Pods that were promised the node must look again.
            let lower = core.snapshot.nominated_below(node, pod.facts.priority);
            for other in &lower {
                core.snapshot.withdraw_nomination(&other.uid);
                core.queue.try_again(&other.uid, std::time::Instant::now());
            }
            (found, lower)
        };
        let cleared = lower.iter().map(|other| self.patch_status(other, json!({"nominatedNodeName": null})));
        join_all(cleared).await;
        info!(pod = %pod.facts.key, %node, victims = victims.len(), "making room");
        join_all(victims.iter().map(|victim| self.evict(pod, node, victim))).await.into_iter().all(|gone| gone)
    }

    async fn evict(&self, pod: &PendingPod, node: &str, victim: &PodFacts) -> bool {
        if victim.terminating {
            return true;
        }
        let message = format!("{}: preempting to accommodate a higher priority pod", pod.scheduler_name());
        let condition = json!({"conditions": [{"type": "DisruptionTarget", "status": "True",
            "reason": "PreemptionByScheduler", "message": message, "lastTransitionTime": apimachinery::time::now()}]});
        if !self.patch_status(victim, condition).await {
            return true;
        }
        let pods: Api<Pod> = Api::namespaced(self.shared.handle.client.clone(), &victim.key.namespace);
        let uid = Some(victim.uid.to_string());
        let params =
            DeleteParams { preconditions: Some(Preconditions { uid, resource_version: None }), ..Default::default() };
        match pods.delete(&victim.key.name, &params).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => return true,
            Err(error) => {
                warn!(pod = %victim.key, %error, "cannot delete the victim");
                return false;
            }
        }
        if let Some(recorder) = self.shared.recorders.get(pod.scheduler_name()) {
            let message = format!("Preempted by pod {} on node {node}", pod.facts.uid);
            recorder.event(&reference(victim), Type::Normal, "Preempted", "Preempting", message);
        }
        true
    }
}
