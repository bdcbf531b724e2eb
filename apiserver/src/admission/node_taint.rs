//! TaintNodesByCondition: a new node takes no pods before it is known to be ready.
use apimachinery::status::StatusError;
use futures::future::BoxFuture;
use serde_json::json;

use super::{AdmissionRequest, Plugin, list_in, text};

const NOT_READY: &str = "node.kubernetes.io/not-ready";

pub struct TaintNodesByCondition;

impl Plugin for TaintNodesByCondition {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        request.creates() && request.is("", "nodes", "")
    }

    fn mutate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        if let Some(node) = request.object.as_deref_mut() {
            let taints = list_in(super::entry(node, "spec"), "taints");
            let has = taints.iter().any(|t| text(t, "/key") == NOT_READY && text(t, "/effect") == "NoSchedule");
            if !has {
                taints.push(json!({"key": NOT_READY, "effect": "NoSchedule"}));
            }
        }
        Box::pin(std::future::ready(Ok(())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::create;

    #[tokio::test]
    async fn a_new_node_is_tainted_once() {
        let mut node = json!({"metadata": {"name": "n"}});
        for _ in 0..2 {
            create(&TaintNodesByCondition, "/nodes", "", &mut node).await.unwrap();
            assert_eq!(node["spec"]["taints"], json!([{"key": NOT_READY, "effect": "NoSchedule"}]));
        }
    }
}
