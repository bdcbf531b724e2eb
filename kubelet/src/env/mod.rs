//! A container's environment, command and arguments. Pure: what a container refers to is listed by [`references`], fetched by
//! [`make`] into [`Found`], and put together by [`environment`]. An error here is a container's `CreateContainerConfigError`.

pub mod expansion;
pub mod field_ref;
mod file;
pub mod service_links;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use apimachinery::quantity::Quantity;
use arc_swap::ArcSwap;
use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVarSource, Pod, Secret, Service};

use crate::objects::{ObjectError, Objects};
use crate::volumes::{self, MountSource};
pub use field_ref::NodeFacts;

/// Why a container's environment cannot be made. The text is what Kubernetes puts in the container's waiting message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvError {
    #[error("configmap \"{0}\" not found")]
    NoConfigMap(String),
    #[error("secret \"{0}\" not found")]
    NoSecret(String),
    #[error("couldn't find key {key} in ConfigMap {namespace}/{name}")]
    NoConfigMapKey { key: String, namespace: String, name: String },
    #[error("couldn't find key {key} in Secret {namespace}/{name}")]
    NoSecretKey { key: String, namespace: String, name: String },
    #[error(transparent)]
    Source(#[from] ObjectError),
    #[error(transparent)]
    Field(#[from] field_ref::FieldError),
    #[error("failed to parse environment variable file: {0}")]
    File(String),
    #[error("environment variable key \"{key}\" not found in file \"{path}\"")]
    NoFileKey { key: String, path: String },
}

/// The ConfigMaps and Secrets, by name, that something refers to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct References {
    pub config_maps: BTreeSet<String>,
    pub secrets: BTreeSet<String>,
}

/// What was found of [`References`]: a name that is absent here does not exist.
#[derive(Debug, Clone, Default)]
pub struct Found {
    pub config_maps: BTreeMap<String, Arc<ConfigMap>>,
    pub secrets: BTreeMap<String, Arc<Secret>>,
    /// The variables in files of the pod's volumes, by volume and path.
    pub files: BTreeMap<(String, String), BTreeMap<String, String>>,
}

/// What is read of a file of variables.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// Where variables come from besides the pod: ConfigMaps, Secrets, Services, the node.
pub struct Sources {
    objects: Objects,
    allocatable: ArcSwap<BTreeMap<String, Quantity>>,
}

// === impl Sources ===

impl Sources {
    pub fn new(objects: impl Into<Objects>) -> Self {
        Self { objects: objects.into(), allocatable: ArcSwap::default() }
    }

    /// What the node offers to pods: the limit of containers that have none, in `resourceFieldRef`.
    pub fn set_allocatable(&self, allocatable: BTreeMap<String, Quantity>) {
        self.allocatable.store(Arc::new(allocatable));
    }
}

/// The variables of `container`, in order. `pod.status` carries podIP(s) and hostIP(s) as far as known; `volumes` are the pod's.
pub async fn make(
    pod: &Pod,
    container: &Container,
    sources: &Sources,
    volumes: &BTreeMap<String, MountSource>,
) -> Result<Vec<(String, String)>, EnvError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let wanted = references(container);
    let mut found = Found::default();
    for name in wanted.config_maps {
        match sources.objects.config_map(namespace, &name).await {
            Ok(Some(object)) => {
                found.config_maps.insert(name, object);
            }
            Ok(None) => {}
            // A static pod: its references must be optional.
            Err(ObjectError::Standalone { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for name in wanted.secrets {
        match sources.objects.secret(namespace, &name).await {
            Ok(Some(object)) => {
                found.secrets.insert(name, object);
            }
            Ok(None) | Err(ObjectError::Standalone { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for reference in container.env.iter().flatten().filter_map(|v| v.value_from.as_ref()?.file_key_ref.as_ref()) {
        let Some(volume) = volumes.get(&reference.volume_name) else {
            return Err(EnvError::File(format!("volume {:?} not found", reference.volume_name)));
        };
        let read = volumes::read_file(&volume.path, &reference.path, MAX_FILE_BYTES).await;
        if let Some(data) = read.map_err(|e| EnvError::File(format!("{}: {e}", reference.path)))? {
            let variables = file::parse(&String::from_utf8_lossy(&data)).map_err(EnvError::File)?;
            found.files.insert((reference.volume_name.clone(), reference.path.clone()), variables);
        }
    }
    let services = if crate::static_pods::is_static(pod) {
        sources.objects.services_known().await
    } else {
        sources.objects.services().await?
    };
    environment(pod, container, &found, &services, &NodeFacts::of(pod, (**sources.allocatable.load()).clone()))
}

/// What the environment of `container` refers to.
pub fn references(container: &Container) -> References {
    let mut references = References::default();
    for source in container.env_from.iter().flatten() {
        references.config_maps.extend(source.config_map_ref.iter().map(|reference| reference.name.clone()));
        references.secrets.extend(source.secret_ref.iter().map(|reference| reference.name.clone()));
    }
    for source in container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref()) {
        references.config_maps.extend(source.config_map_key_ref.iter().map(|reference| reference.name.clone()));
        references.secrets.extend(source.secret_key_ref.iter().map(|reference| reference.name.clone()));
    }
    references
}

/// The environment of `container`: `envFrom`, overridden by `env` in its order, then the Service variables that neither
/// names. As the kubelet's `makeEnvironment`. A later name replaces an earlier one, and values may refer to what came before
/// them and to Services.
pub fn environment<'s, S: AsRef<Service> + 's>(
    pod: &Pod,
    container: &Container,
    sources: &Found,
    services: impl IntoIterator<Item = &'s S>,
    facts: &NodeFacts,
) -> Result<Vec<(String, String)>, EnvError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let links = pod.spec.as_ref().and_then(|spec| spec.enable_service_links).unwrap_or(true);
    let service_variables = service_links::variables(&service_links::visible(services, namespace, links));

    let mut made = Environment::default();
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        if let Some(reference) = &source.config_map_ref {
            match sources.config_maps.get(&reference.name) {
                Some(found) => {
                    for (key, value) in found.data.iter().flatten() {
                        made.set_from_source(prefix, key, value.clone());
                    }
                }
                None if reference.optional == Some(true) => {}
                None => return Err(EnvError::NoConfigMap(reference.name.clone())),
            }
        } else if let Some(reference) = &source.secret_ref {
            match sources.secrets.get(&reference.name) {
                Some(found) => {
                    for (key, value) in found.data.iter().flatten() {
                        made.set_from_source(prefix, key, String::from_utf8_lossy(&value.0).into_owned());
                    }
                }
                None if reference.optional == Some(true) => {}
                None => return Err(EnvError::NoSecret(reference.name.clone())),
            }
        }
    }
    let of_services: BTreeMap<&str, &str> =
        service_variables.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    for variable in container.env.iter().flatten() {
        let value = match (&variable.value, &variable.value_from) {
            (Some(value), _) if !value.is_empty() => {
                Some(expansion::expand(value, |name| made.get(name).or_else(|| of_services.get(name).copied())))
            }
            (_, Some(source)) => value_from(pod, container, source, sources, facts)?,
            _ => Some(String::new()),
        };
        if let Some(value) = value {
            made.set(&variable.name, value);
        }
    }
    for (name, value) in &service_variables {
        if made.get(name).is_none() {
            made.set(name, value.clone());
        }
    }
    Ok(made.variables)
}

/// The value of one `valueFrom`; `None` where an optional source is absent.
fn value_from(
    pod: &Pod,
    container: &Container,
    source: &EnvVarSource,
    sources: &Found,
    facts: &NodeFacts,
) -> Result<Option<String>, EnvError> {
    let namespace = || pod.metadata.namespace.clone().unwrap_or_default();
    if let Some(field) = &source.field_ref {
        return Ok(Some(field_ref::pod_field(pod, &field.field_path, facts)?));
    }
    if let Some(selector) = &source.resource_field_ref {
        let selected = field_ref::selected_container(pod, selector, Some(container))?;
        return Ok(Some(field_ref::resource_field(selected, selector, facts)?));
    }
    if let Some(selector) = &source.config_map_key_ref {
        let optional = selector.optional == Some(true);
        return match sources.config_maps.get(&selector.name) {
            None if optional => Ok(None),
            None => Err(EnvError::NoConfigMap(selector.name.clone())),
            Some(found) => match found.data.as_ref().and_then(|data| data.get(&selector.key)) {
                Some(value) => Ok(Some(value.clone())),
                None if optional => Ok(None),
                None => Err(EnvError::NoConfigMapKey {
                    key: selector.key.clone(),
                    namespace: namespace(),
                    name: selector.name.clone(),
                }),
            },
        };
    }
    if let Some(selector) = &source.secret_key_ref {
        let optional = selector.optional == Some(true);
        return match sources.secrets.get(&selector.name) {
            None if optional => Ok(None),
            None => Err(EnvError::NoSecret(selector.name.clone())),
            Some(found) => match found.data.as_ref().and_then(|data| data.get(&selector.key)) {
                Some(value) => Ok(Some(String::from_utf8_lossy(&value.0).into_owned())),
                None if optional => Ok(None),
                None => Err(EnvError::NoSecretKey {
                    key: selector.key.clone(),
                    namespace: namespace(),
                    name: selector.name.clone(),
                }),
            },
        };
    }
    if let Some(selector) = &source.file_key_ref {
        let file = sources.files.get(&(selector.volume_name.clone(), selector.path.clone()));
        return match file.and_then(|variables| variables.get(&selector.key)) {
            Some(value) => Ok(Some(value.clone())),
            None if selector.optional == Some(true) => Ok(None),
            None => Err(EnvError::NoFileKey { key: selector.key.clone(), path: selector.path.clone() }),
        };
    }
    Ok(Some(String::new()))
}

/// The container's command and arguments with the variables of `environment` filled in.
pub fn command_line(container: &Container, environment: &[(String, String)]) -> (Vec<String>, Vec<String>) {
    let lookup =
        |name: &str| environment.iter().rev().find(|(variable, _)| variable == name).map(|(_, value)| value.as_str());
    let expand_all = |words: &Option<Vec<String>>| {
        words.iter().flatten().map(|word| expansion::expand(word, lookup)).collect::<Vec<_>>()
    };
    (expand_all(&container.command), expand_all(&container.args))
}

/// Variables in the order of their first definition.
#[derive(Default)]
struct Environment {
    variables: Vec<(String, String)>,
    index: BTreeMap<String, usize>,
}

// === impl Environment ===

impl Environment {
    fn get(&self, name: &str) -> Option<&str> {
        self.index.get(name).map(|&at| self.variables[at].1.as_str())
    }

    fn set(&mut self, name: &str, value: String) {
        match self.index.get(name) {
            Some(&at) => self.variables[at].1 = value,
            None => {
                self.index.insert(name.to_owned(), self.variables.len());
                self.variables.push((name.to_owned(), value));
            }
        }
    }

    /// A key of an `envFrom` source; one that cannot be a variable's name is skipped.
    fn set_from_source(&mut self, prefix: &str, key: &str, value: String) {
        let name = format!("{prefix}{key}");
        if !name.is_empty() && name.bytes().all(|byte| (0x20..0x7f).contains(&byte) && byte != b'=') {
            self.set(&name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sources() -> Found {
        let config_map =
            serde_json::from_value(json!({"metadata": {"name": "cm"}, "data": {"k": "v", "z": "$(HOME)"}}));
        let secret = serde_json::from_value(json!({"metadata": {"name": "s"}, "data": {"pw": "aHVudGVyMg=="}}));
        Found {
            config_maps: BTreeMap::from([("cm".into(), Arc::new(config_map.expect("a ConfigMap")))]),
            secrets: BTreeMap::from([("s".into(), Arc::new(secret.expect("a Secret")))]),
            files: BTreeMap::from([(("v".into(), "f".into()), BTreeMap::from([("K".into(), "from a file".into())]))]),
        }
    }

    fn run(container: serde_json::Value) -> Result<Vec<(String, String)>, EnvError> {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "ns"},
            "spec": {"containers": [container]}}))
        .expect("a pod");
        let service: Arc<Service> = Arc::new(
            serde_json::from_value(json!({"metadata": {"namespace": "default", "name": "kubernetes"},
                "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "https", "port": 443}]}}))
            .expect("a service"),
        );
        let container = &pod.spec.as_ref().expect("spec").containers[0];
        environment(&pod, container, &sources(), &[service], &NodeFacts::default())
    }

    fn own(container: serde_json::Value) -> Vec<(String, String)> {
        let mut variables = run(container).expect("an environment");
        variables.retain(|(name, _)| !name.starts_with("KUBERNETES_"));
        variables
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn literals_refer_to_what_came_before_and_to_services() {
        let got = own(json!({"name": "c", "env": [
            {"name": "A", "value": "1"},
            {"name": "B", "value": "$(A)-$(C)-$$(A)"},
            {"name": "C", "value": "later"},
            {"name": "URL", "value": "https://$(KUBERNETES_SERVICE_HOST):$(KUBERNETES_SERVICE_PORT)"},
            {"name": "NONE"}]}));
        let want = [("A", "1"), ("B", "1-$(C)-$(A)"), ("C", "later"), ("URL", "https://10.96.0.1:443"), ("NONE", "")];
        assert_eq!(got, pairs(&want));
    }

    #[test]
    fn env_overrides_env_from_and_values_from_sources_are_not_expanded() {
        let got = own(json!({"name": "c",
            "envFrom": [{"prefix": "CM_", "configMapRef": {"name": "cm"}}, {"secretRef": {"name": "s"}},
                {"configMapRef": {"name": "none", "optional": true}}],
            "env": [{"name": "CM_k", "value": "mine"},
                {"name": "FROM", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "z"}}},
                {"name": "PW", "valueFrom": {"secretKeyRef": {"name": "s", "key": "pw"}}},
                {"name": "GONE", "valueFrom": {"secretKeyRef": {"name": "s", "key": "x", "optional": true}}},
                {"name": "FILE", "valueFrom": {"fileKeyRef": {"volumeName": "v", "path": "f", "key": "K"}}},
                {"name": "NOFILE", "valueFrom": {"fileKeyRef": {"volumeName": "v", "path": "g", "key": "K", "optional": true}}},
                {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]}));
        let want = [
            ("CM_k", "mine"),
            ("CM_z", "$(HOME)"),
            ("pw", "hunter2"),
            ("FROM", "$(HOME)"),
            ("PW", "hunter2"),
            ("FILE", "from a file"),
            ("NAME", "p"),
        ];
        assert_eq!(got, pairs(&want));
    }

    #[test]
    fn what_is_missing_is_named_as_kubernetes_names_it() {
        let cases = [
            (json!({"configMapKeyRef": {"name": "cm", "key": "nope"}}), "couldn't find key nope in ConfigMap ns/cm"),
            (json!({"secretKeyRef": {"name": "s", "key": "nope"}}), "couldn't find key nope in Secret ns/s"),
            (json!({"configMapKeyRef": {"name": "none", "key": "k"}}), "configmap \"none\" not found"),
            (json!({"secretKeyRef": {"name": "none", "key": "k"}}), "secret \"none\" not found"),
            (
                json!({"fileKeyRef": {"volumeName": "v", "path": "f", "key": "X"}}),
                "environment variable key \"X\" not found in file \"f\"",
            ),
        ];
        for (source, want) in cases {
            let error = run(json!({"name": "c", "env": [{"name": "X", "valueFrom": source}]})).expect_err("an error");
            assert_eq!(error.to_string(), want);
        }
    }

    #[test]
    fn references_are_listed_once() {
        let container: Container = serde_json::from_value(json!({"name": "c",
            "envFrom": [{"configMapRef": {"name": "a"}}, {"secretRef": {"name": "s"}}],
            "env": [{"name": "X", "valueFrom": {"configMapKeyRef": {"name": "a", "key": "k"}}},
                {"name": "Y", "valueFrom": {"secretKeyRef": {"name": "t", "key": "k"}}}]}))
        .expect("a container");
        let found = references(&container);
        assert_eq!(found.config_maps.into_iter().collect::<Vec<_>>(), ["a"]);
        assert_eq!(found.secrets.into_iter().collect::<Vec<_>>(), ["s", "t"]);
    }

    #[test]
    fn command_and_arguments_are_expanded() {
        let container: Container =
            serde_json::from_value(json!({"name": "c", "command": ["sh", "$(A)"], "args": ["$$(A)", "$(B)"]}))
                .expect("c");
        let (command, args) = command_line(&container, &pairs(&[("A", "1")]));
        assert_eq!((command, args), (vec!["sh".into(), "1".into()], vec!["$(A)".to_owned(), "$(B)".to_owned()]));
    }
}
