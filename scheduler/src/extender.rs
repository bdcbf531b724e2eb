//! Extenders: schedulers of other make that are asked over HTTP to filter, score, bind, or choose victims.
//!
//! They are asked between two looks at the picture: which nodes fit, then the decision among those that they approve of.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::Request;
use k8s_openapi::api::core::v1::{Node, Pod};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cache::PendingPod;
use crate::config::ExtenderConfig;
use crate::decide::Approval;

/// An extender's scores go from 0 to 10, a plugin's to 100.
const SCORE_SCALE: i64 = 10;

/// Why an extender is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ExtenderError {
    /// The configuration does not make a client.
    #[error("extender {url}: {cause}")]
    Client { url: String, cause: String },
    /// It did not answer, or not as it should.
    #[error("extender {url}: {cause}")]
    Call { url: String, cause: String },
}

/// An extender that can be asked.
pub struct Extender {
    config: ExtenderConfig,
    client: kube::Client,
}

/// The nodes that are asked about: names, and the objects for those who want them.
type Nodes = BTreeMap<String, Option<Arc<Node>>>;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct FilterResult {
    nodes: Option<k8s_openapi::List<Node>>,
    nodenames: Option<Vec<String>>,
    #[serde(rename = "failedNodes")]
    failed: BTreeMap<String, String>,
    #[serde(rename = "failedAndUnresolvableNodes")]
    hopeless: BTreeMap<String, String>,
    error: String,
}

#[derive(Debug, Deserialize)]
struct HostPriority {
    host: String,
    score: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PreemptionResult {
    #[serde(rename = "nodeNameToMetaVictims")]
    victims: BTreeMap<String, MetaVictims>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
struct MetaVictims {
    pods: Vec<MetaPod>,
    #[serde(rename = "numPDBViolations")]
    violations: i64,
}

#[derive(Debug, Deserialize, Serialize)]
struct MetaPod {
    uid: String,
}

impl Extender {
    pub fn new(config: ExtenderConfig) -> Result<Extender, ExtenderError> {
        let url = config.url_prefix.clone();
        let failed = |cause: String| ExtenderError::Client { url: url.clone(), cause };
        let mut client = kube::Config::new(url.parse().map_err(|error| failed(format!("{error}")))?);
        client.accept_invalid_certs = config.enable_https && config.tls_config.is_none();
        if let Some(tls) = &config.tls_config {
            client.accept_invalid_certs = tls.insecure;
            client.tls_server_name = Some(tls.server_name.clone()).filter(|name| !name.is_empty());
            let file = |path: &str| Some(path.to_owned()).filter(|path| !path.is_empty());
            client.auth_info.client_certificate = file(&tls.cert_file);
            client.auth_info.client_key = file(&tls.key_file);
            client.auth_info.client_certificate_data = file(&tls.cert_data);
            client.auth_info.client_key_data = file(&tls.key_data).map(Into::into);
            let pem = match (file(&tls.ca_file), file(&tls.ca_data)) {
                (Some(path), _) => Some(std::fs::read(&path).map_err(|error| failed(format!("{path}: {error}")))?),
                (None, Some(data)) => {
                    use base64::Engine as _;
                    let decoded = base64::engine::general_purpose::STANDARD.decode(data);
                    Some(decoded.map_err(|error| failed(format!("caData: {error}")))?)
                }
                (None, None) => None,
            };
            if let Some(pem) = pem {
                use rustls_pki_types::pem::PemObject as _;
                let certificates = rustls_pki_types::CertificateDer::pem_slice_iter(&pem);
                let certificates: Result<Vec<_>, _> = certificates.map(|one| one.map(|one| one.to_vec())).collect();
                client.root_cert = Some(certificates.map_err(|error| failed(format!("CA: {error:?}")))?);
            }
        }
        let client =
            component_base::client::connect_h1(client, "kube-scheduler").map_err(|error| failed(error.to_string()))?;
        Ok(Extender { config, client })
    }

    /// Whether the pod is any of its business. As `IsInterested`.
    fn is_interested(&self, pod: &PendingPod) -> bool {
        let managed = &self.config.managed_resources;
        managed.is_empty() || {
            let asked = |name: &str| pod.facts.requests.extended.iter().any(|(asked, _)| &**asked == name);
            managed.iter().any(|resource| asked(&resource.name))
        }
    }

    async fn call<T: serde::de::DeserializeOwned>(&self, verb: &str, body: &Value) -> Result<T, ExtenderError> {
        let failed = |cause: String| ExtenderError::Call { url: format!("{}/{verb}", self.config.url_prefix), cause };
        let request = Request::post(format!("/{verb}")).header("content-type", "application/json");
        let request = request.body(body.to_string().into_bytes()).map_err(|error| failed(error.to_string()))?;
        let answer = tokio::time::timeout(self.config.timeout(), self.client.request::<T>(request)).await;
        let timeout: Duration = self.config.timeout();
        answer.map_err(|_| failed(format!("no answer within {timeout:?}")))?.map_err(|error| failed(error.to_string()))
    }

    fn arguments(&self, pod: &Pod, nodes: &Nodes) -> Value {
        if self.config.node_cache_capable {
            return json!({"pod": pod, "nodenames": nodes.keys().collect::<Vec<_>>()});
        }
        let items: Vec<&Arc<Node>> = nodes.values().flatten().collect();
        json!({"pod": pod, "nodes": {"apiVersion": "v1", "kind": "NodeList", "metadata": {}, "items": items}})
    }

    /// Leaves the nodes that will do, and adds why others will not.
    async fn filter(
        &self,
        pod: &Pod,
        nodes: &mut Nodes,
        refused: &mut Vec<(usize, String)>,
    ) -> Result<(), ExtenderError> {
        let result: FilterResult = self.call(&self.config.filter_verb, &self.arguments(pod, nodes)).await?;
        if !result.error.is_empty() {
            let url = format!("{}/{}", self.config.url_prefix, self.config.filter_verb);
            return Err(ExtenderError::Call { url, cause: result.error });
        }
        let kept: Vec<String> = match (result.nodenames, result.nodes) {
            (Some(names), _) => names,
            (None, Some(list)) => list.items.into_iter().filter_map(|node| node.metadata.name).collect(),
            (None, None) => Vec::new(),
        };
        nodes.retain(|name, _| kept.contains(name));
        refused.extend(result.failed.into_values().chain(result.hopeless.into_values()).map(|words| (1, words)));
        Ok(())
    }
}

/// The extenders, in the order of the configuration.
#[derive(Default)]
pub struct Extenders(Vec<Extender>);

impl Extenders {
    pub fn new(configs: &[ExtenderConfig]) -> Result<Extenders, ExtenderError> {
        configs.iter().cloned().map(Extender::new).collect::<Result<_, _>>().map(Extenders)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn with<'a>(
        &'a self,
        pod: &'a PendingPod,
        verb: fn(&ExtenderConfig) -> &str,
    ) -> impl Iterator<Item = &'a Extender> {
        self.0.iter().filter(move |extender| !verb(&extender.config).is_empty() && extender.is_interested(pod))
    }

    /// Whether the decision on a pod needs one of them.
    pub fn judge(&self, pod: &PendingPod) -> bool {
        self.with(pod, |config| &config.filter_verb)
            .chain(self.with(pod, |config| &config.prioritize_verb))
            .next()
            .is_some()
    }

    /// What they say of the nodes that fit. One that fails ends the attempt unless it is ignorable.
    pub async fn approve(&self, pod: &PendingPod, mut nodes: Nodes) -> Result<Approval, ExtenderError> {
        let mut approval = Approval::default();
        for extender in self.with(pod, |config| &config.filter_verb) {
            if nodes.is_empty() {
                break;
            }
            match extender.filter(&pod.pod, &mut nodes, &mut approval.refused).await {
                Err(error) if extender.config.ignorable => tracing::warn!(%error, "ignored"),
                outcome => outcome?,
            }
        }
        for extender in self.with(pod, |config| &config.prioritize_verb) {
            let arguments = extender.arguments(&pod.pod, &nodes);
            // A score that cannot be had is no reason not to place the pod.
            match extender.call::<Vec<HostPriority>>(&extender.config.prioritize_verb, &arguments).await {
                Ok(scores) => {
                    for HostPriority { host, score } in scores {
                        *approval.scores.entry(host).or_default() += score * extender.config.weight * SCORE_SCALE;
                    }
                }
                Err(error) => tracing::warn!(%error, "no scores"),
            }
        }
        approval.nodes = nodes.into_keys().collect();
        Ok(approval)
    }

    /// Binds the pod by the first that binds; `None` if there is none.
    pub async fn bind(&self, pod: &PendingPod, node: &str) -> Option<Result<(), String>> {
        let extender = self.with(pod, |config| &config.bind_verb).next()?;
        let body = json!({"podName": pod.facts.key.name, "podNamespace": pod.facts.key.namespace,
            "podUID": *pod.facts.uid, "node": node});
        Some(match extender.call::<Value>(&extender.config.bind_verb, &body).await {
            Ok(answer) => match answer["error"].as_str() {
                None | Some("") => Ok(()),
                Some(error) => Err(error.to_owned()),
            },
            Err(error) => Err(error.to_string()),
        })
    }

    /// The victims on the node that are left when all have been asked; `None` if one of them is against it.
    pub async fn victims(&self, pod: &PendingPod, node: &str, victims: &[Arc<str>]) -> Option<Vec<Arc<str>>> {
        let mut victims = victims.to_vec();
        for extender in self.with(pod, |config| &config.preempt_verb) {
            let pods = victims.iter().map(|uid| MetaPod { uid: uid.to_string() }).collect();
            let meta = MetaVictims { pods, violations: 0 };
            let body = json!({"pod": *pod.pod, "nodeNameToMetaVictims": {node: meta}});
            match extender.call::<PreemptionResult>(&extender.config.preempt_verb, &body).await {
                Ok(result) => {
                    let left = result.victims.get(node)?;
                    victims.retain(|uid| left.pods.iter().any(|pod| pod.uid == **uid));
                }
                Err(error) if extender.config.ignorable => tracing::warn!(%error, "ignored"),
                Err(error) => {
                    tracing::warn!(%error, "no preemption");
                    return None;
                }
            }
        }
        Some(victims)
    }
}
