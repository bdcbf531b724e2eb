//! ConfigMaps, Secrets and Services that the pods of this node refer to.
//!
//! The node authorizer lets a kubelet read single ConfigMaps and Secrets by name, never lists of them. So each object in use
//! has a watch of its own (`fieldSelector=metadata.name=…`), begun when it is first asked for and ended when nobody asked for a
//! while; the number of watches and of remembered objects is bounded, the least recently used go first. An object that was
//! read once is still given when the API cannot be reached: running pods outlive their control plane.

mod watched;

use std::sync::Arc;
use std::time::Duration;

use component_base::informer::Informer;
use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service};
use kube::api::WatchParams;

use watched::Watched;

/// Why an object could not be read. That it does not exist is no error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// There is no API server: the kubelet is standalone.
    #[error("couldn't get {kind} {namespace}/{name}, no kubeClient defined")]
    Standalone { kind: &'static str, namespace: String, name: String },
    /// The API refused or did not answer in time, and nothing is remembered.
    #[error("failed to sync {kind} cache: {kind} {namespace}/{name}: {cause}")]
    Unreachable { kind: &'static str, namespace: String, name: String, cause: String },
    /// Services have not been listed yet.
    #[error("services have not yet been read at least once, cannot construct envs")]
    ServicesNotRead,
}

/// How long a caller waits for the first list of Services.
const SERVICES_PATIENCE: Duration = Duration::from_secs(10);

/// The source of API objects for env, volumes and pull secrets. Cheap to clone; clones share watches.
#[derive(Clone)]
pub struct Objects {
    inner: Option<Arc<Inner>>,
}

struct Inner {
    client: kube::Client,
    config_maps: Watched<ConfigMap>,
    secrets: Watched<Secret>,
    services: tokio::sync::OnceCell<Informer<Service>>,
}

// === impl Objects ===

impl Objects {
    /// Over `client`; without one, nothing can be read.
    pub fn new(client: Option<kube::Client>) -> Objects {
        let inner = client.map(|client| {
            Arc::new(Inner {
                config_maps: Watched::new(client.clone(), "configmap", |object: &ConfigMap| {
                    object.immutable == Some(true)
                }),
                secrets: Watched::new(client.clone(), "secret", |object: &Secret| object.immutable == Some(true)),
                services: tokio::sync::OnceCell::new(),
                client,
            })
        });
        Objects { inner }
    }

    /// The client to the API, if there is one.
    pub fn client(&self) -> Option<&kube::Client> {
        self.inner.as_ref().map(|inner| &inner.client)
    }

    /// The ConfigMap, or `None` if it does not exist.
    pub async fn config_map(&self, namespace: &str, name: &str) -> Result<Option<Arc<ConfigMap>>, ObjectError> {
        match &self.inner {
            Some(inner) => inner.config_maps.get(namespace, name).await,
            None => Err(standalone("configMap", namespace, name)),
        }
    }

    /// The Secret, or `None` if it does not exist.
    pub async fn secret(&self, namespace: &str, name: &str) -> Result<Option<Arc<Secret>>, ObjectError> {
        match &self.inner {
            Some(inner) => inner.secrets.get(namespace, name).await,
            None => Err(standalone("secret", namespace, name)),
        }
    }

    /// All Services of the cluster; none where there is no API server.
    pub async fn services(&self) -> Result<Vec<Arc<Service>>, ObjectError> {
        let Some(informer) = self.service_informer().await else { return Ok(Vec::new()) };
        if tokio::time::timeout(SERVICES_PATIENCE, informer.synced()).await.is_err() {
            return Err(ObjectError::ServicesNotRead);
        }
        Ok(informer.list())
    }

    /// The Services that are known by now. For static pods, which may be what the API server itself runs in: they wait for
    /// nobody.
    pub async fn services_known(&self) -> Vec<Arc<Service>> {
        self.service_informer().await.map(Informer::list).unwrap_or_default()
    }

    async fn service_informer(&self) -> Option<&Informer<Service>> {
        let inner = self.inner.as_ref()?;
        let services = kube::Api::<Service>::all(inner.client.clone());
        let start = async || Informer::start_slim(services, WatchParams::default(), slim);
        Some(inner.services.get_or_init(start).await)
    }
}

/// Of a Service only what becomes variables of containers is kept.
fn slim(service: &mut Service) {
    (service.metadata.annotations, service.metadata.labels, service.status) = (None, None, None);
}

impl From<Option<kube::Client>> for Objects {
    fn from(client: Option<kube::Client>) -> Objects {
        Objects::new(client)
    }
}

/// What a person reads of an error of the client: of a refusal, the server's message.
pub(crate) fn explain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        other => other.to_string(),
    }
}

fn standalone(kind: &'static str, namespace: &str, name: &str) -> ObjectError {
    ObjectError::Standalone { kind, namespace: namespace.to_owned(), name: name.to_owned() }
}
