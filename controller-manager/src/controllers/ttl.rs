//! How long kubelets may keep what they have read of Secrets and ConfigMaps: the longer, the more nodes there are. An
//! annotation of the node says it.
use crate::runtime::{Context, Next, Reconcile, SyncError, WorkQueue, gone_is_fine, run};
use component_base::informer::Informer;
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
};
use parking_lot::Mutex;
use serde_json::json;
use std::sync::Arc;

const NAME: &str = "ttlcontroller";
const ANNOTATION: &str = "node.alpha.kubernetes.io/ttl";
/// From so many nodes, to so many, seconds. Neighbours overlap, so that a cluster at a boundary does not flap.
const STEPS: [(usize, usize, u32); 6] =
    [(0, 100, 0), (90, 500, 15), (450, 1000, 30), (900, 2000, 60), (1800, 10_000, 300), (9000, usize::MAX, 600)];

struct Controller {
    client: Client,
    nodes: Informer<Node>,
    step: Mutex<usize>,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("ttl-controller").await else { return };
    let nodes = context.informers.get::<Node>();
    nodes.synced().await;
    let controller = Arc::new(Controller { client, nodes, step: Mutex::new(0) });
    let queue = Arc::new(WorkQueue::new(NAME));
    let (to, all, owner) = (queue.clone(), controller.nodes.clone(), controller.clone());
    controller.nodes.on_change(move |change| {
        let before = *owner.step.lock();
        let now = step(before, all.len());
        if now != before {
            *owner.step.lock() = now;
            all.list().iter().for_each(|n| to.add(n.name_any()));
        }
        change.new.into_iter().for_each(|n| to.add(n.name_any()));
    });
    run(NAME, queue, controller, 5, context.shutdown.clone()).await;
}

/// The step for so many nodes, starting from the one that held.
fn step(mut step: usize, nodes: usize) -> usize {
    while nodes > STEPS[step].1 {
        step += 1;
    }
    while nodes < STEPS[step].0 {
        step -= 1;
    }
    step
}

impl Reconcile for Controller {
    type Key = String;

    async fn reconcile(&self, name: &String) -> Result<Next, SyncError> {
        let Some(node) = self.nodes.get("", name) else { return Ok(Next::Settled) };
        let wanted = STEPS[*self.step.lock()].2.to_string();
        if node.metadata.annotations.as_ref().and_then(|a| a.get(ANNOTATION)) != Some(&wanted) {
            let patch =
                Patch::Merge(json!({"metadata": {"uid": node.metadata.uid, "annotations": {ANNOTATION: wanted}}}));
            let api: Api<Node> = Api::all(self.client.clone());
            gone_is_fine(api.patch_metadata(name, &PatchParams::default(), &patch).await)?;
        }
        Ok(Next::Settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_grows_with_the_cluster_and_does_not_flap() {
        let mut now = 0;
        let seconds: Vec<u32> = [1, 100, 101, 95, 89, 600, 20_000, 1, 500]
            .into_iter()
            .map(|nodes| {
                now = step(now, nodes);
                STEPS[now].2
            })
            .collect();
        assert_eq!(seconds, [0, 0, 15, 15, 0, 30, 600, 0, 15]);
    }
}
