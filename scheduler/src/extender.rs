//! Extenders: schedulers of other make that are asked over HTTP to filter, score, bind, or choose victims.
//!
//! They are asked between two looks at the picture: which nodes fit, then the decision among those that they approve of.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use http::Request;
use k8s_openapi::api::core::v1::Node;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::cache::PendingPod;
use crate::config::ExtenderConfig;
use crate::decide::Approval;
use crate::framework::Candidate;

/// An extender's scores go from 0 to 10, a plugin's to 100.
const SCORE_SCALE: i64 = 10;

/// Why an extender is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ExtenderError {
    /// The configuration does not make a client.
    #[error("extender {url}: {cause}")]
    Client { url: String, cause: String },
    /// The pod that it is to be asked about is not to be had.
    #[error(transparent)]
    Pod(kube::Error),
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

// Go's names on the wire: what is sent is spelled as Go would, what comes may be in any case that extenders use.

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct FilterResult {
    #[serde(alias = "Nodes")]
    nodes: Option<k8s_openapi::List<Node>>,
    #[serde(alias = "NodeNames", alias = "nodeNames")]
    nodenames: Option<Vec<String>>,
    #[serde(rename = "failedNodes", alias = "FailedNodes")]
    failed: Option<BTreeMap<String, String>>,
    #[serde(rename = "failedAndUnresolvableNodes", alias = "FailedAndUnresolvableNodes")]
    hopeless: Option<BTreeMap<String, String>>,
    #[serde(alias = "Error")]
    error: Option<String>,
}

#[derive(Debug, Deserialize)]
struct HostPriority {
    #[serde(alias = "Host")]
    host: String,
    #[serde(alias = "Score")]
    score: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct BindingResult {
    #[serde(alias = "Error")]
    error: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PreemptionResult {
    #[serde(rename = "NodeNameToMetaVictims", alias = "nodeNameToMetaVictims")]
    victims: Option<BTreeMap<String, Option<MetaVictims>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct MetaVictims {
    #[serde(rename = "Pods", alias = "pods")]
    pods: Option<Vec<MetaPod>>,
    #[serde(rename = "NumPDBViolations", alias = "numPDBViolations")]
    violations: usize,
}

#[derive(Debug, Deserialize)]
struct MetaPod {
    #[serde(rename = "UID", alias = "uid")]
    uid: Arc<str>,
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

    fn arguments(&self, pod: &Value, nodes: &Nodes) -> Value {
        if self.config.node_cache_capable {
            return json!({"Pod": pod, "NodeNames": nodes.keys().collect::<Vec<_>>()});
        }
        let items: Vec<&Arc<Node>> = nodes.values().flatten().collect();
        json!({"Pod": pod, "Nodes": {"apiVersion": "v1", "kind": "NodeList", "metadata": {}, "items": items}})
    }

    /// Leaves the nodes that will do, and adds why others will not.
    async fn filter(
        &self,
        pod: &Value,
        nodes: &mut Nodes,
        refused: &mut Vec<(usize, String)>,
    ) -> Result<(), ExtenderError> {
        let result: FilterResult = self.call(&self.config.filter_verb, &self.arguments(pod, nodes)).await?;
        if let Some(cause) = result.error.filter(|cause| !cause.is_empty()) {
            let url = format!("{}/{}", self.config.url_prefix, self.config.filter_verb);
            return Err(ExtenderError::Call { url, cause });
        }
        let kept: Vec<String> = match (result.nodenames, result.nodes) {
            (Some(names), _) => names,
            (None, Some(list)) => list.items.into_iter().filter_map(|node| node.metadata.name).collect(),
            (None, None) => Vec::new(),
        };
        nodes.retain(|name, _| kept.contains(name));
        let words = result.failed.into_iter().chain(result.hopeless).flat_map(BTreeMap::into_values);
        refused.extend(words.map(|words| (1, words)));
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
    pub async fn approve(&self, pod: &PendingPod, whole: &Value, mut nodes: Nodes) -> Result<Approval, ExtenderError> {
        let mut approval = Approval::default();
        for extender in self.with(pod, |config| &config.filter_verb) {
            if nodes.is_empty() {
                break;
            }
            match extender.filter(whole, &mut nodes, &mut approval.refused).await {
                Err(error) if extender.config.ignorable => tracing::warn!(%error, "ignored"),
                outcome => outcome?,
            }
        }
        for extender in self.with(pod, |config| &config.prioritize_verb) {
            let arguments = extender.arguments(whole, &nodes);
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
        let body = json!({"PodName": pod.facts.key.name, "PodNamespace": pod.facts.key.namespace,
            "PodUID": *pod.facts.uid, "Node": node});
        Some(match extender.call::<BindingResult>(&extender.config.bind_verb, &body).await {
            Ok(answer) => answer.error.filter(|cause| !cause.is_empty()).map_or(Ok(()), Err),
            Err(error) => Err(error.to_string()),
        })
    }

    /// Whether one of them is to be asked before pods make room for this one, and then whether it wants to see whole pods.
    pub fn preempt(&self, pod: &PendingPod) -> Option<bool> {
        let mut asked = self.with(pod, |config| &config.preempt_verb).peekable();
        asked.peek()?;
        Some(asked.any(|extender| !extender.config.node_cache_capable))
    }

    /// The nodes that are left when all have been asked, with the victims that they want; `pods` are the victims for those
    /// who want to see them. As `callExtenders`.
    pub async fn candidates(
        &self,
        pod: &PendingPod,
        whole_pod: &Value,
        mut candidates: Vec<Candidate>,
        pods: &HashMap<Arc<str>, Value>,
    ) -> Result<Vec<Candidate>, String> {
        for extender in self.with(pod, |config| &config.preempt_verb) {
            let whole = !extender.config.node_cache_capable;
            let victim = |uid: &Arc<str>| match whole {
                true => json!(pods.get(uid)),
                false => json!({"UID": **uid}),
            };
            let told = |one: &Candidate| {
                let pods: Vec<Value> = one.victims.iter().map(victim).filter(|pod| !pod.is_null()).collect();
                (one.node.to_string(), json!({"Pods": pods, "NumPDBViolations": one.violations}))
            };
            let victims: serde_json::Map<String, Value> = candidates.iter().map(told).collect();
            let field = if whole { "NodeNameToVictims" } else { "NodeNameToMetaVictims" };
            let body = json!({"Pod": whole_pod, field: victims});
            let ignorable = extender.config.ignorable;
            let result = match extender.call::<PreemptionResult>(&extender.config.preempt_verb, &body).await {
                Err(error) if ignorable => {
                    tracing::warn!(%error, "ignored");
                    continue;
                }
                result => result.map_err(|error| error.to_string())?,
            };
            candidates.clear();
            for (node, victims) in result.victims.into_iter().flatten() {
                let MetaVictims { pods, violations } = victims.unwrap_or_default();
                let victims: Vec<Arc<str>> = pods.into_iter().flatten().map(|pod| pod.uid).collect();
                if !victims.is_empty() {
                    candidates.push(Candidate { node: node.into(), victims, violations });
                } else if !ignorable {
                    return Err(format!("expected at least one victim pod on node {node:?}"));
                }
            }
            if candidates.is_empty() {
                break;
            }
        }
        Ok(candidates)
    }
}
