//! Fields of a pod and of its containers' resources, as the downward API hands them to env and to files.

use std::collections::BTreeMap;

use apimachinery::quantity::Quantity;
use k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;

/// Why a `fieldRef` or `resourceFieldRef` has no value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FieldError {
    #[error("unsupported fieldPath: {0}")]
    UnsupportedPath(String),
    #[error("container {0} not found")]
    NoContainer(String),
    #[error("unsupported container resource : {0}")]
    UnsupportedResource(String),
    #[error("invalid divisor {0:?}")]
    InvalidDivisor(String),
}

/// What the node knows of a pod beyond its object: its addresses (the API may not have them yet) and what the node offers.
#[derive(Debug, Clone, Default)]
pub struct NodeFacts {
    /// The pod's addresses, first the primary one. Empty until the sandbox has its network.
    pub pod_ips: Vec<String>,
    /// The node's addresses.
    pub host_ips: Vec<String>,
    /// The node's name.
    pub node_name: String,
    /// The node's allocatable resources: the limit of a container that has none.
    pub allocatable: BTreeMap<String, Quantity>,
}

// === impl NodeFacts ===

impl NodeFacts {
    /// As `pod.status` and `pod.spec` say.
    pub fn of(pod: &Pod, allocatable: BTreeMap<String, Quantity>) -> NodeFacts {
        let status = pod.status.as_ref();
        let pod_ips: Vec<String> = status
            .and_then(|status| status.pod_ips.as_ref())
            .map(|ips| ips.iter().map(|ip| ip.ip.clone()).collect())
            .filter(|ips: &Vec<String>| !ips.is_empty())
            .unwrap_or_else(|| status.and_then(|status| status.pod_ip.clone()).into_iter().collect());
        let host_ips: Vec<String> = status
            .and_then(|status| status.host_ips.as_ref())
            .map(|ips| ips.iter().map(|ip| ip.ip.clone()).collect())
            .filter(|ips: &Vec<String>| !ips.is_empty())
            .unwrap_or_else(|| status.and_then(|status| status.host_ip.clone()).into_iter().collect());
        let node_name = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
        NodeFacts { pod_ips, host_ips, node_name, allocatable }
    }
}

/// The value of `path` for `pod`; for the fields that a `fieldRef` in env and files may name.
pub fn pod_field(pod: &Pod, path: &str, facts: &NodeFacts) -> Result<String, FieldError> {
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref();
    let host_network = spec.and_then(|spec| spec.host_network).unwrap_or(false);
    let pod_ips = if host_network && facts.pod_ips.is_empty() { &facts.host_ips } else { &facts.pod_ips };
    if let Some((map, key)) = subscript(path) {
        let map = match map {
            "metadata.labels" => meta.labels.as_ref(),
            "metadata.annotations" => meta.annotations.as_ref(),
            _ => return Err(FieldError::UnsupportedPath(path.to_owned())),
        };
        return Ok(map.and_then(|map| map.get(key)).cloned().unwrap_or_default());
    }
    let value = match path {
        "metadata.name" => meta.name.clone(),
        "metadata.namespace" => meta.namespace.clone(),
        "metadata.uid" => meta.uid.clone(),
        "metadata.labels" => meta.labels.as_ref().map(format_map),
        "metadata.annotations" => meta.annotations.as_ref().map(format_map),
        "spec.nodeName" => spec.and_then(|spec| spec.node_name.clone()).or_else(|| Some(facts.node_name.clone())),
        "spec.serviceAccountName" => spec.and_then(|spec| spec.service_account_name.clone()),
        "status.hostIP" => facts.host_ips.first().cloned(),
        "status.hostIPs" => Some(facts.host_ips.join(",")),
        "status.podIP" => pod_ips.first().cloned(),
        "status.podIPs" => Some(pod_ips.join(",")),
        _ => return Err(FieldError::UnsupportedPath(path.to_owned())),
    };
    Ok(value.unwrap_or_default())
}

/// `metadata.labels['key']` as (`metadata.labels`, `key`).
fn subscript(path: &str) -> Option<(&str, &str)> {
    let (map, rest) = path.strip_suffix("']")?.split_once("['")?;
    Some((map, rest))
}

/// A map as the downward API writes it: `key="escaped value"`, a line each, sorted. As `fieldpath.FormatMap`.
fn format_map(map: &BTreeMap<String, String>) -> String {
    map.iter().map(|(key, value)| format!("{key}={}", quote(value))).collect::<Vec<_>>().join("\n")
}

/// A string as Go's `%q` writes it.
fn quote(value: &str) -> String {
    let mut quoted = String::with_capacity(value.len() + 2);
    quoted.push('"');
    for c in value.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\u{7}' => quoted.push_str("\\a"),
            '\u{8}' => quoted.push_str("\\b"),
            '\u{c}' => quoted.push_str("\\f"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\u{b}' => quoted.push_str("\\v"),
            c if c.is_ascii_control() => quoted.push_str(&format!("\\x{:02x}", u32::from(c))),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// The container of `pod` that `selector` names, or `own` where it names none.
pub fn selected_container<'p>(
    pod: &'p Pod,
    selector: &ResourceFieldSelector,
    own: Option<&'p Container>,
) -> Result<&'p Container, FieldError> {
    match selector.container_name.as_deref().filter(|name| !name.is_empty()) {
        None => own.ok_or_else(|| FieldError::NoContainer(String::new())),
        Some(name) => pod
            .spec
            .iter()
            .flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()))
            .find(|container| container.name == name)
            .ok_or_else(|| FieldError::NoContainer(name.to_owned())),
    }
}

/// The value of a `resourceFieldRef`: the amount in units of the divisor, rounded up. A missing limit is the node's
/// allocatable amount; a missing request is 0. As `resource.ExtractContainerResourceValue` after `MergeContainerResourceLimits`.
pub fn resource_field(
    container: &Container,
    selector: &ResourceFieldSelector,
    facts: &NodeFacts,
) -> Result<String, FieldError> {
    let unsupported = || FieldError::UnsupportedResource(selector.resource.clone());
    let (side, resource) = selector.resource.split_once('.').ok_or_else(unsupported)?;
    let known = matches!(resource, "cpu" | "memory" | "ephemeral-storage") || resource.starts_with("hugepages-");
    if !known {
        return Err(unsupported());
    }
    let resources = container.resources.as_ref();
    let declared =
        |map: Option<&BTreeMap<String, ApiQuantity>>| map.and_then(|map| map.get(resource)).map(Quantity::from);
    let amount = match side {
        "limits" => declared(resources.and_then(|resources| resources.limits.as_ref()))
            .filter(|limit| limit.milli_value() != 0)
            .or_else(|| facts.allocatable.get(resource).cloned()),
        "requests" => declared(resources.and_then(|resources| resources.requests.as_ref())),
        _ => return Err(unsupported()),
    };
    let divisor = match selector.divisor.as_ref().filter(|divisor| !divisor.0.is_empty() && divisor.0 != "0") {
        None => None,
        Some(text) => Some(Quantity::parse(&text.0).map_err(|_| FieldError::InvalidDivisor(text.0.clone()))?),
    };
    let (amount, divisor) = if resource == "cpu" {
        (amount.map_or(0, |amount| amount.milli_value()), divisor.map_or(1000, |divisor| divisor.milli_value()))
    } else {
        (amount.map_or(0, |amount| amount.value()), divisor.map_or(1, |divisor| divisor.value()))
    };
    if divisor <= 0 {
        return Err(FieldError::InvalidDivisor(selector.divisor.as_ref().map(|d| d.0.clone()).unwrap_or_default()));
    }
    // Ceiling without overflow: amounts are never negative here.
    Ok((amount / divisor + i64::from(amount % divisor > 0)).to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u1",
                "labels": {"b": "2", "a": "say \"hi\"\n"}, "annotations": {"example.com/x": "y"}},
            "spec": {"nodeName": "n1", "serviceAccountName": "sa", "containers": [
                {"name": "c", "resources": {"limits": {"cpu": "1500m", "memory": "64Mi"}, "requests": {"cpu": "250m"}}},
                {"name": "free"}]},
        }))
        .expect("a pod")
    }

    fn facts() -> NodeFacts {
        NodeFacts {
            pod_ips: vec!["10.0.0.5".into(), "fd00::5".into()],
            host_ips: vec!["192.0.2.1".into()],
            node_name: "n1".into(),
            allocatable: BTreeMap::from([
                ("cpu".to_owned(), Quantity::parse("2").expect("quantity")),
                ("memory".to_owned(), Quantity::parse("1Gi").expect("quantity")),
            ]),
        }
    }

    #[test]
    fn fields_of_the_pod() {
        let cases = [
            ("metadata.name", "p"),
            ("metadata.namespace", "ns"),
            ("metadata.uid", "u1"),
            ("metadata.labels", "a=\"say \\\"hi\\\"\\n\"\nb=\"2\""),
            ("metadata.labels['b']", "2"),
            ("metadata.labels['none']", ""),
            ("metadata.annotations['example.com/x']", "y"),
            ("spec.nodeName", "n1"),
            ("spec.serviceAccountName", "sa"),
            ("status.hostIP", "192.0.2.1"),
            ("status.podIP", "10.0.0.5"),
            ("status.podIPs", "10.0.0.5,fd00::5"),
        ];
        for (path, want) in cases {
            assert_eq!(pod_field(&pod(), path, &facts()).as_deref(), Ok(want), "{path}");
        }
        assert!(pod_field(&pod(), "spec.containers", &facts()).is_err());
    }

    #[test]
    fn resources_are_divided_and_rounded_up() {
        let cases = [
            ("c", "limits.cpu", None, "2"),
            ("c", "limits.cpu", Some("1m"), "1500"),
            ("c", "requests.cpu", Some("1m"), "250"),
            ("c", "requests.cpu", None, "1"),
            ("c", "limits.memory", Some("1Mi"), "64"),
            ("c", "limits.memory", None, "67108864"),
            ("c", "limits.memory", Some("0"), "67108864"),
            ("c", "requests.memory", None, "0"),
            ("free", "limits.cpu", None, "2"),
            ("free", "limits.memory", Some("1Mi"), "1024"),
            ("free", "requests.cpu", Some("1m"), "0"),
        ];
        let pod = pod();
        for (name, resource, divisor, want) in cases {
            let selector = ResourceFieldSelector {
                container_name: Some(name.into()),
                resource: resource.into(),
                divisor: divisor.map(|divisor: &str| ApiQuantity(divisor.into())),
            };
            let container = selected_container(&pod, &selector, None).expect("the container");
            assert_eq!(
                resource_field(container, &selector, &facts()).as_deref(),
                Ok(want),
                "{name} {resource} {divisor:?}"
            );
        }
        let bad = ResourceFieldSelector { resource: "limits.gpu".into(), ..Default::default() };
        assert!(resource_field(&pod.spec.as_ref().expect("spec").containers[0], &bad, &facts()).is_err());
    }
}
