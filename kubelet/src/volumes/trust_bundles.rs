//! ClusterTrustBundles for pods: all of them are watched once a pod wants one; what is given are trust anchors, each once, in an
//! order that says nothing and stays the same while this kubelet runs. As `pkg/kubelet/clustertrustbundle`.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::OnceLock;
use std::time::Duration;

use apimachinery::labels::Selector;
use component_base::informer::Informer;
use component_base::pem;
use k8s_openapi::api::certificates::v1beta1::ClusterTrustBundle;
use k8s_openapi::api::core::v1::ClusterTrustBundleProjection;
use kube::Api;
use kube::api::WatchParams;

/// How long the first asker waits for the list.
const PATIENCE: Duration = Duration::from_secs(10);

/// The bundles of the cluster.
pub(super) struct TrustBundles {
    client: kube::Client,
    informer: OnceLock<Informer<ClusterTrustBundle>>,
    order: RandomState,
}

// === impl TrustBundles ===

impl TrustBundles {
    pub(super) fn new(client: kube::Client) -> Self {
        Self { client, informer: OnceLock::new(), order: RandomState::new() }
    }

    /// What a projection selects, as PEM.
    pub(super) async fn anchors(&self, source: &ClusterTrustBundleProjection) -> Result<String, String> {
        let start = || Informer::start(Api::all(self.client.clone()), WatchParams::default());
        let informer = self.informer.get_or_init(start);
        if tokio::time::timeout(PATIENCE, informer.synced()).await.is_err() {
            return Err("ClusterTrustBundle informer has not yet synced".to_owned());
        }
        let bundles = informer.list();
        let selected = select(source, bundles.iter().map(AsRef::as_ref))?;
        Ok(normalized(&selected, |anchor| self.order.hash_one(anchor)))
    }
}

/// The texts of the bundles that a projection names or selects. As `GetTrustAnchorsByName` and `GetTrustAnchorsBySigner`.
fn select<'b>(
    source: &ClusterTrustBundleProjection,
    bundles: impl Iterator<Item = &'b ClusterTrustBundle>,
) -> Result<Vec<&'b str>, String> {
    let optional = source.optional == Some(true);
    let mut bundles = bundles;
    if let Some(name) = &source.name {
        return match bundles.find(|bundle| bundle.metadata.name.as_ref() == Some(name)) {
            Some(bundle) => Ok(vec![&bundle.spec.trust_bundle]),
            None if optional => Ok(Vec::new()),
            None => Err(format!(
                "while getting ClusterTrustBundle: clustertrustbundle.certificates.k8s.io {name:?} not found"
            )),
        };
    }
    let Some(signer) = &source.signer_name else {
        return Err("ClusterTrustBundle projection requires either name or signerName to be set".to_owned());
    };
    // No selector selects nothing, an empty one everything.
    let selector = Selector::from_label_selector_opt(source.label_selector.as_ref())
        .map_err(|error| format!("while parsing label selector: {error}"))?;
    let of_signer = bundles.filter(|bundle| {
        bundle.spec.signer_name.as_ref() == Some(signer) && selector.matches_opt(bundle.metadata.labels.as_ref())
    });
    let selected: Vec<&str> = of_signer.map(|bundle| bundle.spec.trust_bundle.as_str()).collect();
    if selected.is_empty() && !optional {
        return Err("combination of signerName and labelSelector matched zero ClusterTrustBundles".to_owned());
    }
    Ok(selected)
}

/// Each anchor once, without what stands around it, in the order of `place`. As `normalizeTrustAnchors`.
fn normalized(bundles: &[&str], place: impl Fn(&[u8]) -> u64) -> String {
    let anchors: BTreeSet<Vec<u8>> =
        bundles.iter().flat_map(|bundle| pem::blocks(bundle)).map(|block| block.bytes).collect();
    let placed: BTreeMap<(u64, Vec<u8>), ()> =
        anchors.into_iter().map(|anchor| ((place(&anchor), anchor), ())).collect();
    placed.keys().map(|(_, anchor)| pem::encode(pem::CERTIFICATE, anchor)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn bundles() -> Vec<ClusterTrustBundle> {
        let bundle = |name: &str, signer: Option<&str>, label: &str, anchors: &[&str]| {
            let text: String = anchors
                .iter()
                .map(|anchor| format!("about {anchor}\n{}", pem::encode("CERTIFICATE", anchor.as_bytes())))
                .collect();
            serde_json::from_value(json!({"metadata": {"name": name, "labels": {"l": label}},
                "spec": {"signerName": signer, "trustBundle": text}}))
            .expect("a bundle")
        };
        vec![
            bundle("plain", None, "a", &["1"]),
            bundle("e.com:s:v1", Some("e.com/s"), "a", &["1", "2"]),
            bundle("e.com:s:v2", Some("e.com/s"), "b", &["2", "3"]),
            bundle("e.com:t:v1", Some("e.com/t"), "a", &["4"]),
        ]
    }

    fn anchors(source: serde_json::Value) -> Result<Vec<String>, String> {
        let source: ClusterTrustBundleProjection = serde_json::from_value(source).expect("a projection");
        let bundles = bundles();
        let text = normalized(&select(&source, bundles.iter())?, |anchor| u64::MAX - u64::from(anchor[0]));
        assert!(!text.contains("about"));
        Ok(pem::blocks(&text).into_iter().map(|block| String::from_utf8(block.bytes).expect("text")).collect())
    }

    #[test]
    fn bundles_are_taken_by_name_or_by_signer_and_labels() {
        for (source, want) in [
            (json!({"name": "plain", "path": "p"}), &["1"][..]),
            (json!({"name": "none", "optional": true, "path": "p"}), &[]),
            (json!({"signerName": "e.com/s", "labelSelector": {}, "path": "p"}), &["3", "2", "1"]),
            (json!({"signerName": "e.com/s", "labelSelector": {"matchLabels": {"l": "a"}}, "path": "p"}), &["2", "1"]),
            (json!({"signerName": "e.com/s", "optional": true, "path": "p"}), &[]),
        ] {
            assert_eq!(anchors(source.clone()), Ok(want.iter().map(ToString::to_string).collect()), "{source}");
        }
        for (source, why) in [
            (
                json!({"name": "none", "path": "p"}),
                "while getting ClusterTrustBundle: clustertrustbundle.certificates.k8s.io \"none\" not found",
            ),
            (
                json!({"signerName": "e.com/s", "path": "p"}),
                "combination of signerName and labelSelector matched zero ClusterTrustBundles",
            ),
            (json!({"path": "p"}), "ClusterTrustBundle projection requires either name or signerName to be set"),
        ] {
            assert_eq!(anchors(source), Err(why.to_owned()));
        }
    }
}
