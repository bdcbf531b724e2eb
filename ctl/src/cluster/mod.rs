//! The way to a cluster: which one (`kubeconfig`), what it serves (`discovery`), and requests whose failures read as
//! kubectl's (`error`).
//!
//! Objects are JSON values from end to end: the command line knows no kind that the server does not tell it of.

mod discovery;
mod error;
mod kubeconfig;

use std::time::Duration;

use anyhow::Result;
use futures::{AsyncBufRead, AsyncBufReadExt, Stream, StreamExt, TryStreamExt};
use http::{HeaderValue, Method, Request, header};
use http_body_util::BodyExt;
use kube::client::Body;
use serde_json::Value;
use tokio::sync::OnceCell;

pub(crate) use discovery::{Discovery, Resource};
pub(crate) use error::RequestError;
pub(crate) use kubeconfig::{Source, kubeconfig_paths};

use crate::flags::GlobalFlags;

pub(crate) const JSON: &str = "application/json";
/// What `get` asks for: the server's table, or the objects where it has none.
pub(crate) const TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";

/// How a patch is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PatchKind {
    Json,
    Merge,
    Strategic,
    Apply,
}

impl PatchKind {
    fn content_type(self) -> &'static str {
        match self {
            PatchKind::Json => "application/json-patch+json",
            PatchKind::Merge => "application/merge-patch+json",
            PatchKind::Strategic => "application/strategic-merge-patch+json",
            PatchKind::Apply => "application/apply-patch+yaml",
        }
    }
}

/// A cluster and the namespace in which the command works.
pub(crate) struct Cluster {
    config: kube::Config,
    client: kube::Client,
    pub(crate) namespace: String,
    /// Whether the namespace was given on the command line.
    pub(crate) namespace_given: bool,
    discovery: OnceCell<Discovery>,
}

impl Cluster {
    /// The cluster that the flags and the kubeconfig name. Nothing is sent yet.
    pub(crate) async fn connect(flags: &GlobalFlags) -> Result<Cluster> {
        let config = Source::read(flags)?.client_config(flags).await?;
        let client = component_base::client::connect(config.clone(), &user_agent())?;
        let given = flags.namespace.clone().filter(|namespace| !namespace.is_empty());
        Ok(Cluster {
            namespace_given: given.is_some(),
            namespace: given.unwrap_or_else(|| config.default_namespace.clone()),
            config,
            client,
            discovery: OnceCell::new(),
        })
    }

    /// The server's address.
    pub(crate) fn server(&self) -> String {
        self.config.cluster_url.to_string().trim_end_matches('/').to_owned()
    }

    /// A client whose connections can be upgraded, for exec, attach and port-forward.
    pub(crate) fn upgradable(&self) -> Result<kube::Client> {
        Ok(component_base::client::connect_h1(self.config.clone(), &user_agent())?)
    }

    /// What the server serves; asked for once.
    pub(crate) async fn discovery(&self) -> Result<&Discovery> {
        self.discovery.get_or_try_init(|| Discovery::fetch(self)).await
    }

    /// The resource that a word of the command line means.
    pub(crate) async fn resource(&self, word: &str) -> Result<Resource> {
        self.discovery().await?.resolve(word)
    }

    /// The resource of a kind in a manifest.
    pub(crate) async fn resource_of_kind(&self, api_version: &str, kind: &str) -> Result<Resource> {
        self.discovery().await?.resolve_kind(api_version, kind)
    }

    pub(crate) async fn get(&self, path: &str) -> Result<Value> {
        self.get_as(path, JSON).await
    }

    pub(crate) async fn get_as(&self, path: &str, accept: &'static str) -> Result<Value> {
        self.call(request(Method::GET, path, accept, None, Vec::new())).await
    }

    /// `None` if there is no such object.
    pub(crate) async fn get_opt(&self, path: &str) -> Result<Option<Value>> {
        match self.get(path).await {
            Ok(value) => Ok(Some(value)),
            Err(error) if RequestError::code_of(&error) == Some(404) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.call(request(Method::POST, path, JSON, Some(JSON), serde_json::to_vec(body)?)).await
    }

    pub(crate) async fn put(&self, path: &str, body: &Value) -> Result<Value> {
        self.call(request(Method::PUT, path, JSON, Some(JSON), serde_json::to_vec(body)?)).await
    }

    pub(crate) async fn patch(&self, path: &str, kind: PatchKind, body: &Value) -> Result<Value> {
        self.call(request(Method::PATCH, path, JSON, Some(kind.content_type()), serde_json::to_vec(body)?)).await
    }

    pub(crate) async fn delete(&self, path: &str, options: &Value) -> Result<Value> {
        self.call(request(Method::DELETE, path, JSON, Some(JSON), serde_json::to_vec(options)?)).await
    }

    /// A body as text.
    pub(crate) async fn get_text(&self, path: &str) -> Result<String> {
        let bytes = self.send(request(Method::GET, path, "*/*", None, Vec::new())?).await?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A body that is read as it comes.
    pub(crate) async fn stream(&self, path: &str, accept: &'static str) -> Result<impl AsyncBufRead + Unpin + use<>> {
        let request = request(Method::GET, path, accept, None, Vec::new())?;
        let response = self.client.send(request).await.map_err(|error| RequestError::of(self, error))?;
        let (parts, body) = response.into_parts();
        if !parts.status.is_success() {
            let bytes = body.collect().await?.to_bytes();
            return Err(RequestError::from_response(parts.status, &bytes).into());
        }
        Ok(body.into_data_stream().map_err(std::io::Error::other).boxed().into_async_read())
    }

    /// The events of a watch. An ERROR event ends it.
    pub(crate) async fn watch(
        &self,
        path: &str,
        accept: &'static str,
    ) -> Result<impl Stream<Item = Result<(String, Value)>> + Unpin + use<>> {
        let lines = self.stream(path, accept).await?.lines();
        Ok(lines
            .map(|line| -> Result<(String, Value)> {
                let mut event: Value = serde_json::from_str(&line?)?;
                let kind = event["type"].as_str().unwrap_or_default().to_owned();
                let object = event["object"].take();
                if kind == "ERROR" {
                    return Err(RequestError::from_status(&object).into());
                }
                Ok((kind, object))
            })
            .boxed())
    }

    async fn call(&self, request: Result<Request<Body>>) -> Result<Value> {
        let bytes = self.send(request?).await?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    async fn send(&self, request: Request<Body>) -> Result<bytes::Bytes> {
        let response = self.client.send(request).await.map_err(|error| RequestError::of(self, error))?;
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await?.to_bytes();
        if !parts.status.is_success() {
            return Err(RequestError::from_response(parts.status, &bytes).into());
        }
        for warning in parts.headers.get_all(header::WARNING) {
            if let Some(text) = warning.to_str().ok().and_then(|warning| warning.split('"').nth(1)) {
                eprintln!("Warning: {text}");
            }
        }
        Ok(bytes)
    }
}

fn user_agent() -> String {
    format!("ctl/{}", env!("CARGO_PKG_VERSION"))
}

fn request(
    method: Method,
    path: &str,
    accept: &'static str,
    content_type: Option<&'static str>,
    body: Vec<u8>,
) -> Result<Request<Body>> {
    let mut builder = Request::builder().method(method).uri(path).header(header::ACCEPT, accept);
    if let Some(content_type) = content_type {
        builder = builder.header(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    }
    Ok(builder.body(Body::from(body))?)
}

/// Adds query parameters to a path.
pub(crate) fn with_query(path: &str, parameters: &[(&str, &str)]) -> String {
    let mut path = path.to_owned();
    for (name, value) in parameters.iter().filter(|(_, value)| !value.is_empty()) {
        path.push(if path.contains('?') { '&' } else { '?' });
        path.push_str(name);
        path.push('=');
        path.extend(percent_encode(value));
    }
    path
}

/// As `url.QueryEscape`, with `%20` for a blank.
fn percent_encode(value: &str) -> impl Iterator<Item = char> + '_ {
    value.bytes().flat_map(|byte| {
        let plain = byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
        let encoded = if plain { (byte as char).to_string() } else { format!("%{byte:02X}") };
        encoded.chars().collect::<Vec<_>>()
    })
}

/// The value of `--request-timeout` and the like; nothing or `0` waits for ever.
pub(crate) fn timeout(text: Option<&str>) -> Result<Option<Duration>> {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(Some(Duration::from_secs(seconds)).filter(|duration| !duration.is_zero()));
    }
    let duration = apimachinery::time::parse_duration(text)?;
    Ok(Some(duration).filter(|duration| !duration.is_zero()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_parameters_are_escaped() {
        let path = with_query("/api/v1/pods", &[("labelSelector", "a in (b,c)"), ("empty", ""), ("x", "1")]);
        assert_eq!(path, "/api/v1/pods?labelSelector=a%20in%20%28b%2Cc%29&x=1");
    }
}
