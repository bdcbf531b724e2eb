//! What the cluster knows of the drivers of this node: the CSINode object, the node's annotation and topology labels.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::{CSINode, CSINodeDriver, CSINodeSpec, VolumeNodeResources};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Api;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use proto::csi::NodeGetInfoResponse;
use serde_json::json;

const ANNOTATION: &str = "csi.volume.kubernetes.io/nodeid";
/// A write that met another's is tried again so often.
const ATTEMPTS: u32 = 5;

pub(super) async fn add(
    client: &kube::Client,
    node: &str,
    driver: &str,
    info: NodeGetInfoResponse,
) -> Result<(), kube::Error> {
    let topology = info.accessible_topology.map(|t| t.segments).unwrap_or_default();
    annotate(client, node, driver, Some((&info.node_id, &topology))).await?;
    let count = i32::try_from(info.max_volumes_per_node).ok().filter(|count| *count > 0);
    let own = CSINodeDriver {
        name: driver.to_owned(),
        node_id: info.node_id.clone(),
        topology_keys: Some(topology.keys().cloned().collect::<Vec<_>>()).filter(|keys| !keys.is_empty()),
        allocatable: count.map(|count| VolumeNodeResources { count: Some(count) }),
    };
    update(client, node, |drivers| {
        drivers.retain(|d| d.name != driver);
        drivers.push(own.clone());
    })
    .await
}

pub(super) async fn remove(client: &kube::Client, node: &str, driver: &str) -> Result<(), kube::Error> {
    update(client, node, |drivers| drivers.retain(|d| d.name != driver)).await?;
    annotate(client, node, driver, None).await
}

/// Writes the CSINode, which is made when it is first needed; it goes with the Node.
async fn update(
    client: &kube::Client,
    node: &str,
    change: impl Fn(&mut Vec<CSINodeDriver>),
) -> Result<(), kube::Error> {
    let api = Api::<CSINode>::all(client.clone());
    let mut attempt = 0;
    loop {
        let (existing, fresh) = match api.get_opt(node).await? {
            Some(found) => (found, false),
            None => (new(client, node).await?, true),
        };
        let mut wanted = existing.clone();
        change(&mut wanted.spec.drivers);
        let written = if fresh {
            api.create(&PostParams::default(), &wanted).await
        } else if wanted.spec.drivers != existing.spec.drivers {
            api.replace(node, &PostParams::default(), &wanted).await
        } else {
            return Ok(());
        };
        attempt += 1;
        match written {
            Err(kube::Error::Api(error)) if error.code == 409 && attempt < ATTEMPTS => {}
            other => return other.map(drop),
        }
    }
}

async fn new(client: &kube::Client, node: &str) -> Result<CSINode, kube::Error> {
    let owner = Api::<Node>::all(client.clone()).get(node).await?;
    let owner = OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node.to_owned(),
        uid: owner.metadata.uid.unwrap_or_default(),
        ..Default::default()
    };
    Ok(CSINode {
        metadata: ObjectMeta { name: Some(node.to_owned()), owner_references: Some(vec![owner]), ..Default::default() },
        spec: CSINodeSpec { drivers: Vec::new() },
    })
}

/// The driver's own name of the node, and where it says the node is.
async fn annotate(
    client: &kube::Client,
    node: &str,
    driver: &str,
    info: Option<(&str, &BTreeMap<String, String>)>,
) -> Result<(), kube::Error> {
    let api = Api::<Node>::all(client.clone());
    let existing = api.get(node).await?;
    let text = existing.metadata.annotations.as_ref().and_then(|a| a.get(ANNOTATION)).cloned();
    let mut ids: BTreeMap<String, String> = text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    let labels = match info {
        Some((id, topology)) => {
            ids.insert(driver.to_owned(), id.to_owned());
            topology.clone()
        }
        None => {
            ids.remove(driver);
            BTreeMap::new()
        }
    };
    let value = (!ids.is_empty()).then(|| json!(ids).to_string());
    let patch = json!({"metadata": {"annotations": {ANNOTATION: value}, "labels": labels}});
    api.patch(node, &PatchParams::default(), &Patch::Merge(&patch)).await.map(drop)
}
