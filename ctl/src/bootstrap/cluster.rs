//! A thin client for set-up: one identity, paths and JSON values. What the API server says about a refusal is the error.

use std::path::Path;

use anyhow::{Context, Result, bail};
use http::{Method, Request};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::Value;

use super::files;

/// A connection to an API server.
pub(crate) struct Cluster {
    client: kube::Client,
    server: String,
}

impl Cluster {
    /// As the identity in a kubeconfig file.
    pub(crate) async fn from_file(path: &Path) -> Result<Cluster> {
        Cluster::from_text(&files::read(path)?).await.with_context(|| format!("cannot use {}", path.display()))
    }

    /// As the identity in a kubeconfig.
    pub(crate) async fn from_text(text: &str) -> Result<Cluster> {
        let config = Kubeconfig::from_yaml(text).context("not a kubeconfig")?;
        let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
        Cluster::from_config(config)
    }

    /// As nobody, without checking who answers: for what is checked by other means.
    pub(crate) fn unauthenticated(server: &str) -> Result<Cluster> {
        let mut config = kube::Config::new(server.parse().with_context(|| format!("{server:?} is not a URL"))?);
        config.accept_invalid_certs = true;
        Cluster::from_config(config)
    }

    fn from_config(config: kube::Config) -> Result<Cluster> {
        let server = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        Ok(Cluster { client: component_base::client::connect(config, "ctl")?, server })
    }

    /// The server's URL.
    pub(crate) fn server(&self) -> &str {
        &self.server
    }

    /// The body of a GET that succeeds.
    pub(crate) async fn get_text(&self, path: &str) -> Result<String> {
        let request = Request::get(path).body(Vec::new())?;
        self.client.request_text(request).await.map_err(|error| plain(error, &Method::GET, &self.server, path))
    }

    /// The object at `path`, or `None` where there is none.
    pub(crate) async fn get(&self, path: &str) -> Result<Option<Value>> {
        let request = Request::get(path).body(Vec::new())?;
        match self.client.request(request).await {
            Ok(value) => Ok(Some(value)),
            Err(error) if is_reason(&error, "NotFound") => Ok(None),
            Err(error) => Err(plain(error, &Method::GET, &self.server, path)),
        }
    }

    /// Creates an object in the collection at `path`.
    pub(crate) async fn post(&self, path: &str, value: &Value) -> Result<Value> {
        let request = json_request(Method::POST, path, "application/json", value)?;
        self.client.request(request).await.map_err(|error| plain(error, &Method::POST, &self.server, path))
    }

    /// Merges `value` into the object at `path`.
    pub(crate) async fn merge(&self, path: &str, value: &Value) -> Result<Value> {
        let request = json_request(Method::PATCH, path, "application/merge-patch+json", value)?;
        self.client.request(request).await.map_err(|error| plain(error, &Method::PATCH, &self.server, path))
    }

    /// Deletes the object at `path`; false where there was none.
    pub(crate) async fn delete(&self, path: &str) -> Result<bool> {
        let request = Request::delete(path).body(Vec::new())?;
        match self.client.request_text(request).await {
            Ok(_) => Ok(true),
            Err(error) if is_reason(&error, "NotFound") => Ok(false),
            Err(error) => Err(plain(error, &Method::DELETE, &self.server, path)),
        }
    }

    /// Merges `object` into the one that is there, or creates it. Looking first, since a Service whose address is taken,
    /// be it by itself, is refused for that reason.
    pub(crate) async fn apply(&self, object: &Value) -> Result<()> {
        let collection = collection(object)?;
        let path = format!("{collection}/{}", object["metadata"]["name"].as_str().unwrap_or_default());
        match self.get(&path).await? {
            Some(_) => self.merge(&path, object).await.map(drop),
            None => self.post(&collection, object).await.map(drop),
        }
    }
}

/// The collection that an object belongs to, for the kinds that set-up writes.
fn collection(object: &Value) -> Result<String> {
    let version = object["apiVersion"].as_str().unwrap_or_default();
    let kind = object["kind"].as_str().unwrap_or_default();
    let resource = match kind {
        "ClusterRole" => "clusterroles",
        "ClusterRoleBinding" => "clusterrolebindings",
        "ConfigMap" => "configmaps",
        "Deployment" => "deployments",
        "Role" => "roles",
        "RoleBinding" => "rolebindings",
        "Secret" => "secrets",
        "Service" => "services",
        "ServiceAccount" => "serviceaccounts",
        "StorageClass" => "storageclasses",
        _ => bail!("set-up does not write objects of kind {kind:?}"),
    };
    let root = if version.contains('/') { "/apis" } else { "/api" };
    Ok(match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{root}/{version}/namespaces/{namespace}/{resource}"),
        None => format!("{root}/{version}/{resource}"),
    })
}

fn json_request(method: Method, path: &str, content_type: &str, value: &Value) -> Result<Request<Vec<u8>>> {
    let request = Request::builder().method(method).uri(path).header(http::header::CONTENT_TYPE, content_type);
    Ok(request.body(serde_json::to_vec(value)?)?)
}

fn is_reason(error: &kube::Error, reason: &str) -> bool {
    matches!(error, kube::Error::Api(status) if status.reason == reason)
}

/// One line that says what was asked of whom and what came of it.
fn plain(error: kube::Error, method: &Method, server: &str, path: &str) -> anyhow::Error {
    let cause = match &error {
        kube::Error::Api(status) => format!("{} ({} {})", status.message, status.code, status.reason),
        other => innermost(other),
    };
    anyhow::anyhow!("{method} {server}{path}: {cause}")
}

/// The root cause: "connection refused" says more than the layers above it.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn objects_know_their_collection() {
        for (object, path) in [
            (
                json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": "kube-system"}}),
                "/api/v1/namespaces/kube-system/secrets",
            ),
            (
                json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {}}),
                "/apis/rbac.authorization.k8s.io/v1/clusterroles",
            ),
        ] {
            assert_eq!(collection(&object).expect("known"), path);
        }
        assert!(collection(&json!({"apiVersion": "v1", "kind": "Pod"})).is_err());
    }
}
