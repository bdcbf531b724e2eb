//! Mirror pods: what the API shows of a static pod. They follow the manifests; nobody else may change them.

use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Api;
use kube::api::{DeleteParams, ObjectMeta, PostParams, Preconditions};
use tokio::sync::OnceCell;

use super::{CONFIG_HASH, CONFIG_MIRROR};

/// Keeps the mirror of a static pod in the API in step.
pub struct Mirrors {
    client: kube::Client,
    node_name: String,
    node_uid: OnceCell<String>,
}

// === impl Mirrors ===

impl Mirrors {
    pub fn new(client: kube::Client, node_name: &str) -> Self {
        Self { client, node_name: node_name.to_owned(), node_uid: OnceCell::new() }
    }

    /// Creates the mirror of `static_pod`, replacing one of another hash. `existing` is the API's pod of that name, if any.
    pub async fn ensure(&self, static_pod: &Pod, existing: Option<&Pod>) -> Result<(), kube::Error> {
        if let Some(existing) = existing {
            if is_mirror_of(existing, static_pod) {
                return Ok(());
            }
            self.delete(existing).await?;
        }
        let uid = self
            .node_uid
            .get_or_try_init(async || {
                let node = Api::<Node>::all(self.client.clone()).get(&self.node_name).await?;
                Ok::<_, kube::Error>(node.metadata.uid.unwrap_or_default())
            })
            .await?;
        let mirror = mirror_of(static_pod, &self.node_name, uid);
        let namespace = mirror.metadata.namespace.as_deref().unwrap_or("default");
        match Api::<Pod>::namespaced(self.client.clone(), namespace).create(&PostParams::default(), &mirror).await {
            // Made meanwhile, or the informer is behind: the next look decides.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            other => other.map(drop),
        }
    }

    /// Deletes (grace 0) a mirror whose static pod is gone.
    pub async fn delete(&self, mirror: &Pod) -> Result<(), kube::Error> {
        let name = mirror.metadata.name.as_deref().unwrap_or_default();
        let namespace = mirror.metadata.namespace.as_deref().unwrap_or("default");
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: mirror.metadata.uid.clone(), resource_version: None }),
            ..Default::default()
        };
        match Api::<Pod>::namespaced(self.client.clone(), namespace).delete(name, &params).await {
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            other => other.map(drop),
        }
    }
}

/// Whether the API's pod is the mirror of just this manifest and will stay.
fn is_mirror_of(existing: &Pod, static_pod: &Pod) -> bool {
    let annotation =
        |pod: &Pod, key: &str| pod.metadata.annotations.as_ref().and_then(|annotations| annotations.get(key)).cloned();
    let hash = annotation(static_pod, CONFIG_HASH);
    existing.metadata.deletion_timestamp.is_none() && hash.is_some() && annotation(existing, CONFIG_MIRROR) == hash
}

/// The static pod as the API shall show it: owned by the node.
fn mirror_of(static_pod: &Pod, node_name: &str, node_uid: &str) -> Pod {
    let mut annotations = static_pod.metadata.annotations.clone().unwrap_or_default();
    if let Some(hash) = annotations.get(CONFIG_HASH).cloned() {
        annotations.insert(CONFIG_MIRROR.into(), hash);
    }
    Pod {
        metadata: ObjectMeta {
            name: static_pod.metadata.name.clone(),
            namespace: static_pod.metadata.namespace.clone(),
            labels: static_pod.metadata.labels.clone(),
            annotations: Some(annotations),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".into(),
                kind: "Node".into(),
                name: node_name.to_owned(),
                uid: node_uid.to_owned(),
                controller: Some(true),
                block_owner_deletion: None,
            }]),
            ..Default::default()
        },
        spec: static_pod.spec.clone(),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::static_pods::manifest;

    #[test]
    fn a_mirror_is_known_by_its_hash() {
        let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c, image: i}]}\n";
        let pod = manifest::pod(text, "/a", "n1").expect("a pod");
        let other = manifest::pod(&text.replace("image: i", "image: j"), "/a", "n1").expect("a pod");
        let mut mirror = mirror_of(&pod, "n1", "node-uid");
        assert!(is_mirror_of(&mirror, &pod) && !is_mirror_of(&mirror, &other));
        assert!(mirror.metadata.uid.is_none());
        let owner = &mirror.metadata.owner_references.as_ref().expect("an owner")[0];
        assert_eq!((owner.kind.as_str(), owner.uid.as_str(), owner.controller), ("Node", "node-uid", Some(true)));
        mirror.metadata.deletion_timestamp = Some(apimachinery::time::now());
        assert!(!is_mirror_of(&mirror, &pod));
    }
}
