//! DefaultTolerationSeconds: a pod stays five minutes on a node that is not ready or cannot be reached.
use apimachinery::status::StatusError;
use futures::future::BoxFuture;
use serde_json::{Value, json};

use super::{AdmissionRequest, Plugin, entry, list, list_in, text};

const TAINTS: [&str; 2] = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"];

#[derive(Clone, Copy, Debug, Default)]
pub struct DefaultTolerationSeconds {
    pub not_ready: i64,
    pub unreachable: i64,
}

impl Plugin for DefaultTolerationSeconds {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        request.writes() && request.is("", "pods", "")
    }

    fn mutate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        if let Some(pod) = request.object.as_deref_mut() {
            for (taint, seconds) in TAINTS.into_iter().zip([self.not_ready, self.unreachable]) {
                if !tolerates(pod, taint) {
                    list_in(entry(pod, "spec"), "tolerations").push(json!({
                        "key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds,
                    }));
                }
            }
        }
        Box::pin(std::future::ready(Ok(())))
    }
}

fn tolerates(pod: &Value, taint: &str) -> bool {
    list(pod, "/spec/tolerations").iter().any(|toleration| {
        let (key, effect) = (text(toleration, "/key"), text(toleration, "/effect"));
        (key.is_empty() || key == taint) && (effect.is_empty() || effect == "NoExecute")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::create;

    #[tokio::test]
    async fn tolerations_are_added_where_none_covers_the_taint() {
        let plugin = DefaultTolerationSeconds { not_ready: 300, unreachable: 300 };
        for (given, added) in [
            (json!([]), 2),
            (json!([{"key": TAINTS[0], "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}]), 1),
            (json!([{"key": TAINTS[0], "operator": "Exists", "effect": "NoSchedule"}]), 2),
            (json!([{"operator": "Exists"}]), 0),
        ] {
            let before = given.as_array().unwrap().len();
            let mut pod = json!({"spec": {"tolerations": given}});
            create(&plugin, "/pods", "a", &mut pod).await.unwrap();
            assert_eq!(pod["spec"]["tolerations"].as_array().unwrap().len(), before + added, "{pod}");
        }
    }
}
