//! Certificates for pods: a key is made, a signer asked with a PodCertificateRequest, its answer kept, and in time asked for
//! anew. As `pkg/kubelet/podcertificate`; what is to be done next is decided by [`State::next`], which is pure.
//!
//! Nothing is kept over a restart: the next look asks anew, and what pods have stays until there is an answer.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use component_base::events::Type;
use component_base::informer::Informer;
use component_base::pem;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1beta1::{PodCertificateRequest, PodCertificateRequestSpec};
use k8s_openapi::api::core::v1::{Node, Pod, PodCertificateProjection, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Api;
use kube::api::{PostParams, WatchParams};
use parking_lot::Mutex;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, RsaKeySize};
use tokio::sync::Notify;

use crate::events::Events;
use crate::objects::explain;

/// A request that is not seen by then has been deleted.
const ASSUME_DELETED: SignedDuration = SignedDuration::from_mins(10);
/// A certificate that has not been renewed so long after its time is overdue.
const OVERDUE: SignedDuration = SignedDuration::from_mins(10);
/// Spread of renewals, so that pods do not all ask at once.
const MAX_JITTER: Duration = Duration::from_secs(300);
/// How long a pod that starts waits for its signer before it is told of as waiting.
const PATIENCE: Duration = Duration::from_secs(10);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// More pods than a node has, with several certificates each.
const MAX_STATES: usize = 4096;
const NOT_ISSUED: &str = "credential bundle is not issued yet";

/// A key and the chain of certificates that was issued for it, as PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Credentials {
    pub key: String,
    pub chain: String,
}

/// A projection: the pod (UID), its volume, and the place of the source in it.
type Key = (String, String, usize);

/// How far a projection is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum State {
    /// Nobody has been asked.
    #[default]
    Initial,
    /// A request is under way; with what the pod has meanwhile.
    Asked {
        request: Asked,
        held: Option<Held>,
    },
    Held(Held),
    /// The signer has said no; that is final.
    Refused {
        verdict: Verdict,
        reason: String,
        message: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Asked {
    name: String,
    key: String,
    abandon_at: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    credentials: Credentials,
    begin_refresh_at: Timestamp,
    not_after: Timestamp,
    told_overdue: bool,
    told_expired: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Denied,
    Failed,
}

/// An event to tell: reason and message.
type Told = (String, String);

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    state: State,
    /// A new request is to be made.
    ask: bool,
    told: Vec<Told>,
}

// === impl State ===

impl State {
    /// The state by now, given the request that is under way as far as it is seen. As `handleProjection`.
    fn next(self, now: Timestamp, jitter: SignedDuration, seen: Option<&PodCertificateRequest>) -> Step {
        match self {
            Self::Initial => Step { state: Self::Initial, ask: true, told: Vec::new() },
            Self::Asked { request, held } => match seen {
                Some(seen) => Self::answered(request, held, now, jitter, seen),
                None if now > request.abandon_at => {
                    let state = held.map_or(Self::Initial, Self::Held);
                    Step { state, ask: true, told: Vec::new() }
                }
                None => Self::waiting(request, held, now),
            },
            Self::Held(mut held) => {
                let due = now >= held.begin_refresh_at;
                let told = if due { held.overdue(now) } else { Vec::new() };
                Step { state: Self::Held(held), ask: due, told }
            }
            refused @ Self::Refused { .. } => Step { state: refused, ask: false, told: Vec::new() },
        }
    }

    fn answered(
        request: Asked,
        held: Option<Held>,
        now: Timestamp,
        jitter: SignedDuration,
        seen: &PodCertificateRequest,
    ) -> Step {
        let status = seen.status.clone().unwrap_or_default();
        for condition in status.conditions.iter().flatten() {
            let (verdict, was) = match condition.type_.as_str() {
                "Issued" => {
                    let (Some(begin), Some(end)) = (&status.begin_refresh_at, &status.not_after) else { continue };
                    let chain = clean(status.certificate_chain.as_deref().unwrap_or_default());
                    let held = Held {
                        credentials: Credentials { key: request.key, chain },
                        begin_refresh_at: begin.0.checked_add(jitter).unwrap_or(begin.0),
                        not_after: end.0,
                        told_overdue: false,
                        told_expired: false,
                    };
                    return Step { state: Self::Held(held), ask: false, told: Vec::new() };
                }
                "Denied" => (Verdict::Denied, "was denied"),
                "Failed" => (Verdict::Failed, "failed"),
                _ => continue,
            };
            let (reason, message) = (condition.reason.clone(), condition.message.clone());
            let namespace = seen.metadata.namespace.as_deref().unwrap_or_default();
            let name = &request.name;
            let text =
                format!("PodCertificateRequest {namespace}/{name} {was}, reason={reason:?}, message={message:?}");
            let told = vec![(condition.type_.clone(), text)];
            return Step { state: Self::Refused { verdict, reason, message }, ask: false, told };
        }
        Self::waiting(request, held, now)
    }

    fn waiting(request: Asked, mut held: Option<Held>, now: Timestamp) -> Step {
        let told = held.as_mut().map(|held| held.overdue(now)).unwrap_or_default();
        Step { state: Self::Asked { request, held }, ask: false, told }
    }

    /// A request has been made.
    fn asked(self, request: Asked) -> Self {
        let held = match self {
            Self::Held(held) => Some(held),
            Self::Asked { held, .. } => held,
            Self::Initial | Self::Refused { .. } => None,
        };
        Self::Asked { request, held }
    }

    /// What the pod gets. As `getCredBundle`.
    fn credentials(&self) -> Result<Credentials, String> {
        match self {
            Self::Held(held) | Self::Asked { held: Some(held), .. } => Ok(held.credentials.clone()),
            Self::Initial | Self::Asked { held: None, .. } => Err(NOT_ISSUED.to_owned()),
            Self::Refused { verdict, reason, message } => {
                let verdict = match verdict {
                    Verdict::Denied => "denied",
                    Verdict::Failed => "failed",
                };
                Err(format!("PodCertificateRequest was permanently {verdict}: reason={reason:?} message={message:?}"))
            }
        }
    }

    /// The request that is under way.
    fn request(&self) -> Option<&str> {
        match self {
            Self::Asked { request, .. } => Some(&request.name),
            _ => None,
        }
    }
}

// === impl Held ===

impl Held {
    /// What is to be told of a certificate that should have been renewed, each once.
    fn overdue(&mut self, now: Timestamp) -> Vec<Told> {
        let mut told = Vec::new();
        let overdue = now.duration_since(self.begin_refresh_at) > OVERDUE;
        if overdue && !std::mem::replace(&mut self.told_overdue, true) {
            told.push(("CertificateOverdueForRefresh".to_owned(), "PodCertificate refresh overdue".to_owned()));
        }
        if now > self.not_after && !std::mem::replace(&mut self.told_expired, true) {
            told.push(("CertificateExpired".to_owned(), "PodCertificate expired".to_owned()));
        }
        told
    }
}

/// Only the certificates. As `cleanCertificateChain`.
fn clean(chain: &str) -> String {
    pem::blocks(chain).iter().map(|block| pem::encode(pem::CERTIFICATE, &block.bytes)).collect()
}

/// The certificates of this node's pods.
pub(crate) struct PodCertificates {
    client: kube::Client,
    node: Informer<Node>,
    node_name: String,
    events: Arc<Events>,
    requests: OnceLock<Informer<PodCertificateRequest>>,
    /// Some request of this node's has changed.
    changed: Arc<Notify>,
    states: Mutex<HashMap<Key, State>>,
}

// === impl PodCertificates ===

impl PodCertificates {
    pub(crate) fn new(client: kube::Client, node: Informer<Node>, node_name: &str, events: Arc<Events>) -> Self {
        Self {
            client,
            node,
            node_name: node_name.to_owned(),
            events,
            requests: OnceLock::new(),
            changed: Arc::default(),
            states: Mutex::default(),
        }
    }

    /// What a projection gives its pod now. Who has nothing yet waits a while for the signer.
    pub(super) async fn credentials(
        &self,
        pod: &Pod,
        volume: &str,
        place: usize,
        source: &PodCertificateProjection,
    ) -> Result<Credentials, String> {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let key = (uid, volume.to_owned(), place);
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            // Before it is looked, so that no change is missed.
            let changed = self.changed.notified();
            let state = self.advance(pod, &key, source).await?;
            let credentials = state.credentials();
            let waits = credentials.is_err() && state.request().is_some();
            if !waits || tokio::time::timeout_at(deadline, changed).await.is_err() {
                return credentials;
            }
        }
    }

    /// Forgets a pod that is gone.
    pub(super) fn forget_pod(&self, uid: &str) {
        self.states.lock().retain(|(pod, _, _), _| pod != uid);
    }

    /// Goes as far as it can be gone by now. One task at a time looks after a pod.
    async fn advance(&self, pod: &Pod, key: &Key, source: &PodCertificateProjection) -> Result<State, String> {
        let state = self.states.lock().get(key).cloned().unwrap_or_default();
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let seen = state.request().and_then(|name| self.requests().get(namespace, name));
        let jitter = SignedDuration::try_from(MAX_JITTER.mul_f64(rand::random::<f64>())).unwrap_or_default();
        let step = state.next(Timestamp::now(), jitter, seen.as_deref());
        for (reason, message) in step.told {
            self.events.pod(pod, None, Type::Warning, &reason, message);
        }
        self.keep(key, &step.state);
        if !step.ask {
            return Ok(step.state);
        }
        let held = step.state.credentials().is_ok();
        match self.ask(pod, source).await {
            Ok(request) => {
                let state = step.state.asked(request);
                self.keep(key, &state);
                Ok(state)
            }
            Err(error) if held => {
                let pod = pod.metadata.name.as_deref();
                tracing::warn!(pod, error, "while creating refresh PodCertificateRequest");
                Ok(step.state)
            }
            Err(error) => Err(format!("while creating initial PodCertificateRequest: {error}")),
        }
    }

    fn keep(&self, key: &Key, state: &State) {
        let mut states = self.states.lock();
        if states.len() < MAX_STATES || states.contains_key(key) {
            states.insert(key.clone(), state.clone());
        }
    }

    /// The requests of this node's, watched from the first one on.
    fn requests(&self) -> &Informer<PodCertificateRequest> {
        self.requests.get_or_init(|| {
            let ours = WatchParams::default().fields(&format!("spec.nodeName={}", self.node_name));
            let informer = Informer::start(Api::<PodCertificateRequest>::all(self.client.clone()), ours);
            let changed = self.changed.clone();
            informer.on_change(move |_| changed.notify_waiters());
            informer
        })
    }

    /// Makes a key and asks the signer for its certificate. As `createPodCertificateRequest`.
    async fn ask(&self, pod: &Pod, source: &PodCertificateProjection) -> Result<Asked, String> {
        self.requests();
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let (name, uid) = (pod.metadata.name.clone().unwrap_or_default(), pod.metadata.uid.clone().unwrap_or_default());
        let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone()).unwrap_or_default();
        let accounts = Api::<ServiceAccount>::namespaced(self.client.clone(), &namespace);
        let found = in_time(accounts.get(&account)).await;
        let account_uid =
            found.map_err(|error| format!("while fetching service account: {error}"))?.metadata.uid.unwrap_or_default();
        let node = self.node.get("", &self.node_name);
        let node_uid = node.and_then(|node| node.metadata.uid.clone()).ok_or_else(|| {
            format!("while getting node object from local cache: node {:?} not found", self.node_name)
        })?;
        let key_type = source.key_type.clone();
        let made = tokio::task::spawn_blocking(move || key_and_stub(&key_type)).await;
        let (key, stub) = made.map_err(|_| "the kubelet is shutting down".to_owned())??;
        let request = PodCertificateRequest {
            metadata: ObjectMeta {
                namespace: Some(namespace.clone()),
                generate_name: Some("req-".to_owned()),
                owner_references: Some(vec![OwnerReference {
                    api_version: "v1".to_owned(),
                    kind: "Pod".to_owned(),
                    name: name.clone(),
                    uid: uid.clone(),
                    ..OwnerReference::default()
                }]),
                ..ObjectMeta::default()
            },
            spec: PodCertificateRequestSpec {
                signer_name: source.signer_name.clone(),
                pod_name: name,
                pod_uid: uid,
                service_account_name: account,
                service_account_uid: account_uid,
                node_name: self.node_name.clone(),
                node_uid,
                max_expiration_seconds: source.max_expiration_seconds,
                stub_pkc_s10_request: ByteString(stub),
                unverified_user_annotations: source.user_annotations.clone(),
                ..PodCertificateRequestSpec::default()
            },
            status: None,
        };
        let requests = Api::<PodCertificateRequest>::namespaced(self.client.clone(), &namespace);
        let made = in_time(requests.create(&PostParams::default(), &request)).await;
        let made = made.map_err(|error| format!("while creating on API: {error}"))?;
        let abandon_at = Timestamp::now().checked_add(ASSUME_DELETED).unwrap_or(Timestamp::MAX);
        Ok(Asked { name: made.metadata.name.unwrap_or_default(), key, abandon_at })
    }
}

async fn in_time<T>(asked: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match tokio::time::timeout(REQUEST_TIMEOUT, asked).await {
        Ok(answer) => answer.map_err(|error| explain(&error)),
        Err(_) => Err("the API server did not answer in time".to_owned()),
    }
}

/// A new key, and a request that names nobody: its signature shows that who asks has the key.
fn key_and_stub(key_type: &str) -> Result<(String, Vec<u8>), String> {
    let rsa = |size| KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, size);
    let key = match key_type {
        "RSA3072" => rsa(RsaKeySize::_3072),
        "RSA4096" => rsa(RsaKeySize::_4096),
        "ECDSAP256" => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256),
        "ECDSAP384" => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384),
        "ECDSAP521" => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512),
        "ED25519" => KeyPair::generate_for(&rcgen::PKCS_ED25519),
        other => return Err(format!("while generating keypair: unknown key type {other:?}")),
    };
    let key = key.map_err(|error| format!("while generating keypair: {error}"))?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let stub = params.serialize_request(&key).map_err(|error| format!("while creating stub CSR: {error}"))?;
    Ok((pem::encode("PRIVATE KEY", &key.serialize_der()), stub.der().to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).expect("a time")
    }

    fn asked(name: &str) -> Asked {
        Asked { name: name.to_owned(), key: format!("key of {name}"), abandon_at: at(600) }
    }

    fn held(begin_refresh: i64, not_after: i64) -> Held {
        Held {
            credentials: Credentials { key: "old key".to_owned(), chain: "old chain".to_owned() },
            begin_refresh_at: at(begin_refresh),
            not_after: at(not_after),
            told_overdue: false,
            told_expired: false,
        }
    }

    fn answer(kind: &str) -> PodCertificateRequest {
        let chain = format!("who it is\n{}", pem::encode("CERTIFICATE", b"leaf"));
        let conditions: Vec<serde_json::Value> = match kind {
            "" => Vec::new(),
            kind => vec![json!({"type": kind, "status": "True", "reason": "Why", "message": "so",
                "lastTransitionTime": "2026-01-01T00:00:00Z"})],
        };
        serde_json::from_value(json!({"metadata": {"name": "req-1", "namespace": "ns"},
            "spec": {"signerName": "", "podName": "", "podUID": "", "serviceAccountName": "", "serviceAccountUID": "",
                "nodeName": "", "nodeUID": "", "stubPKCS10Request": ""},
            "status": {"conditions": conditions, "certificateChain": chain, "notAfter": at(7200).to_string(),
                "beginRefreshAt": at(3600).to_string()}}))
        .expect("a request")
    }

    fn next(state: State, now: i64, seen: Option<&PodCertificateRequest>) -> Step {
        state.next(at(now), SignedDuration::from_secs(5), seen)
    }

    #[test]
    fn a_certificate_is_asked_for_waited_for_and_held() {
        let first = next(State::Initial, 0, None);
        assert!(first.ask);
        let waiting = first.state.asked(asked("req-1"));
        assert_eq!(waiting.credentials(), Err(NOT_ISSUED.to_owned()));
        for seen in [None, Some(&answer(""))] {
            let step = next(waiting.clone(), 1, seen);
            assert_eq!((step.ask, &step.state), (false, &waiting));
        }
        let step = next(waiting, 2, Some(&answer("Issued")));
        let State::Held(held) = &step.state else { panic!("{step:?}") };
        assert_eq!((held.begin_refresh_at, held.not_after), (at(3605), at(7200)));
        let credentials = step.state.credentials().expect("issued");
        assert_eq!(
            (credentials.key.as_str(), credentials.chain),
            ("key of req-1", pem::encode("CERTIFICATE", b"leaf"))
        );
    }

    #[test]
    fn a_request_that_was_deleted_is_made_anew() {
        let waiting = State::Initial.asked(asked("req-1"));
        assert!(!next(waiting.clone(), 600, None).ask);
        let step = next(waiting, 601, None);
        assert_eq!((step.ask, step.state), (true, State::Initial));
        let refreshing = State::Held(held(0, 7200)).asked(asked("req-2"));
        let step = next(refreshing, 601, None);
        assert!(step.ask && step.state.credentials().is_ok());
    }

    #[test]
    fn a_refusal_is_final_and_told_once() {
        for (kind, verdict, told) in [
            ("Denied", "denied", "PodCertificateRequest ns/req-1 was denied, reason=\"Why\", message=\"so\""),
            ("Failed", "failed", "PodCertificateRequest ns/req-1 failed, reason=\"Why\", message=\"so\""),
        ] {
            let step = next(State::Initial.asked(asked("req-1")), 1, Some(&answer(kind)));
            assert_eq!(step.told, [(kind.to_owned(), told.to_owned())]);
            let why = format!("PodCertificateRequest was permanently {verdict}: reason=\"Why\" message=\"so\"");
            assert_eq!(step.state.credentials(), Err(why));
            let again = next(step.state.clone(), 100_000, None);
            assert_eq!((again.ask, again.told.len(), again.state), (false, 0, step.state));
        }
    }

    #[test]
    fn a_certificate_is_renewed_in_time_and_serves_meanwhile() {
        let state = State::Held(held(3600, 7200));
        assert!(!next(state.clone(), 3599, None).ask);
        let step = next(state, 3600, None);
        assert!(step.ask && step.told.is_empty());
        let mut request = asked("req-2");
        request.abandon_at = at(100_000);
        let refreshing = step.state.asked(request);
        assert_eq!(refreshing.credentials().expect("still held").key, "old key");
        let step = next(refreshing.clone(), 3601, Some(&answer("Issued")));
        assert_eq!(step.state.credentials().expect("renewed").key, "key of req-2");
        // Nobody answers: it is told that it should have been renewed, then that it is over, once each.
        let reasons = |step: &Step| step.told.iter().map(|(reason, _)| reason.clone()).collect::<Vec<_>>();
        let step = next(refreshing, 4201, Some(&answer("")));
        assert_eq!(reasons(&step), ["CertificateOverdueForRefresh"]);
        let step = next(step.state, 7201, Some(&answer("")));
        assert_eq!(reasons(&step), ["CertificateExpired"]);
        let step = next(step.state, 7202, Some(&answer("")));
        assert!(step.told.is_empty() && step.state.credentials().is_ok());
    }

    #[test]
    fn keys_of_all_kinds_are_made() {
        for kind in ["RSA3072", "ECDSAP256", "ECDSAP384", "ECDSAP521", "ED25519"] {
            let (key, stub) = key_and_stub(kind).expect(kind);
            assert!(key.starts_with("-----BEGIN PRIVATE KEY-----\n") && !stub.is_empty());
            assert!(KeyPair::from_pem(&key).is_ok(), "{kind}");
        }
        assert!(key_and_stub("RSA1024").is_err());
    }
}
