//! The environment of a container: `env`, `envFrom`, Service variables, `$(VAR)` expansion.

use k8s_openapi::api::core::v1::{Container, Pod};

/// Why an environment cannot be made (waiting reason CreateContainerConfigError).
#[derive(Debug, thiserror::Error)]
pub enum EnvError {
    #[error("{0}")]
    Source(String),
}

/// Where variables come from besides the pod: configMaps, secrets, Services.
pub struct Sources {
    _client: Option<kube::Client>,
}

impl Sources {
    pub fn new(client: Option<kube::Client>) -> Self {
        Self { _client: client }
    }
}

/// The variables of `container`, in order. `pod.status` carries podIP(s) and hostIP(s) as far as known.
pub async fn make(_pod: &Pod, _container: &Container, _sources: &Sources) -> Result<Vec<(String, String)>, EnvError> {
    Ok(Vec::new())
}
