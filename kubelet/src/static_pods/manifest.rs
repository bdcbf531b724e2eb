//! A manifest's text as a pod of this node: named, identified, and with the defaults that the API server would have set.

use k8s_openapi::api::core::v1::{Container, Pod, Probe, Toleration, Volume};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{CONFIG_HASH, CONFIG_SEEN, CONFIG_SOURCE};
use crate::images::reference::{ImageReference, PullPolicy};

/// The pod that `text` (YAML or JSON, one document) describes. `source` (the file) and the node are part of its identity.
pub(super) fn pod(text: &str, source: &str, node_name: &str) -> Result<Pod, String> {
    let documents = apimachinery::yaml::documents(text).map_err(|error| error.to_string())?;
    let [document] = documents.as_slice() else {
        return Err(format!("{} documents where one is expected", documents.len()));
    };
    one(document, ("file", source), node_name)
}

/// The pods at a URL: one, or a list.
pub(super) fn pods(text: &str, url: &str, node_name: &str) -> Result<Vec<Pod>, String> {
    let documents = apimachinery::yaml::documents(text).map_err(|error| error.to_string())?;
    let [document] = documents.as_slice() else {
        return Err(format!("{} documents where one is expected", documents.len()));
    };
    if document.get("kind").and_then(Value::as_str) != Some("PodList") {
        return Ok(vec![one(document, ("http", url), node_name)?]);
    }
    let items = document.get("items").and_then(Value::as_array).into_iter().flatten().cloned();
    items
        .map(|mut item| {
            if let Some(item) = item.as_object_mut() {
                item.entry("apiVersion").or_insert_with(|| "v1".into());
                item.entry("kind").or_insert_with(|| "Pod".into());
            }
            one(&item, ("http", url), node_name)
        })
        .collect()
}

/// The pod of one document from a source: its kind, and where in it.
fn one(document: &Value, (kind, source): (&str, &str), node_name: &str) -> Result<Pod, String> {
    let stated = |name: &str| document.get(name).and_then(Value::as_str).unwrap_or_default();
    if (stated("apiVersion"), stated("kind")) != ("v1", "Pod") {
        return Err(format!("apiVersion {:?}, kind {:?}: not v1, Pod", stated("apiVersion"), stated("kind")));
    }
    let mut pod: Pod = serde_json::from_value(document.clone()).map_err(|error| error.to_string())?;
    check(&pod)?;
    let meta = &mut pod.metadata;
    let uid = match meta.uid.take().filter(|uid| !uid.is_empty()) {
        Some(uid) => uid,
        None => identity(document, source, node_name),
    };
    let annotations = meta.annotations.get_or_insert_default();
    annotations.insert(CONFIG_SOURCE.into(), kind.into());
    annotations.insert(CONFIG_HASH.into(), uid.clone());
    annotations.insert(CONFIG_SEEN.into(), jiff::Timestamp::now().to_string());
    meta.uid = Some(uid);
    meta.name = Some(format!("{}-{}", meta.name.take().unwrap_or_default(), node_name.to_lowercase()));
    if meta.namespace.as_deref().is_none_or(str::is_empty) {
        meta.namespace = Some("default".into());
    }
    meta.creation_timestamp = Some(apimachinery::time::now());
    set_defaults(&mut pod, node_name);
    Ok(pod)
}

/// Equal contents in the same file on the same node are the same pod.
fn identity(document: &Value, source: &str, node_name: &str) -> String {
    let mut hash = Sha256::new();
    for part in [node_name, source, &document.to_string()] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// What a static pod cannot be.
fn check(pod: &Pod) -> Result<(), String> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    if let Some(problem) = apimachinery::names::is_dns1123_subdomain(name).first() {
        return Err(format!("metadata.name: Invalid value: {name:?}: {problem}"));
    }
    let spec = pod.spec.as_ref().ok_or("spec: Required value")?;
    if spec.containers.is_empty() {
        return Err("spec.containers: Required value".into());
    }
    if spec.service_account_name.as_deref().is_some_and(|name| !name.is_empty()) {
        return Err("static pods may not reference serviceaccounts".into());
    }
    let mut names = std::collections::BTreeSet::new();
    for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
        if let Some(problem) = apimachinery::names::is_dns1123_label(&container.name).first() {
            return Err(format!("spec.containers.name: Invalid value: {:?}: {problem}", container.name));
        }
        if !names.insert(&container.name) {
            return Err(format!("spec.containers.name: Duplicate value: {:?}", container.name));
        }
        if container.image.as_deref().is_none_or(str::is_empty) {
            return Err(format!("spec.containers[{}].image: Required value", container.name));
        }
    }
    for volume in spec.volumes.iter().flatten() {
        let api_backed = volume.config_map.is_some()
            || volume.secret.is_some()
            || volume.persistent_volume_claim.is_some()
            || volume.projected.as_ref().and_then(|projected| projected.sources.as_ref()).is_some_and(|sources| {
                sources.iter().any(|source| {
                    source.config_map.is_some()
                        || source.secret.is_some()
                        || source.service_account_token.is_some()
                        || source.cluster_trust_bundle.is_some()
                        || source.pod_certificate.is_some()
                })
            });
        if api_backed {
            return Err(format!("static pods may not reference API objects: volume {:?}", volume.name));
        }
    }
    Ok(())
}

/// As `SetDefaults_PodSpec` and its kin, as far as the kubelet reads what they set.
fn set_defaults(pod: &mut Pod, node_name: &str) {
    let Some(spec) = pod.spec.as_mut() else { return };
    spec.node_name = Some(node_name.to_owned());
    spec.restart_policy.get_or_insert_with(|| "Always".into());
    spec.dns_policy.get_or_insert_with(|| "ClusterFirst".into());
    spec.scheduler_name.get_or_insert_with(|| "default-scheduler".into());
    spec.termination_grace_period_seconds.get_or_insert(30);
    spec.enable_service_links.get_or_insert(true);
    spec.security_context.get_or_insert_default();
    // A static pod stays, whatever the node is tainted with.
    let every_no_execute =
        Toleration { operator: Some("Exists".into()), effect: Some("NoExecute".into()), ..Default::default() };
    let tolerations = spec.tolerations.get_or_insert_default();
    if !tolerations.contains(&every_no_execute) {
        tolerations.push(every_no_execute);
    }
    let host_network = spec.host_network == Some(true);
    for container in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
        container_defaults(container, host_network);
    }
    for volume in spec.volumes.iter_mut().flatten() {
        volume_defaults(volume);
    }
}

fn container_defaults(container: &mut Container, host_network: bool) {
    container.termination_message_path.get_or_insert_with(|| "/dev/termination-log".into());
    container.termination_message_policy.get_or_insert_with(|| "File".into());
    if container.image_pull_policy.as_deref().is_none_or(str::is_empty) {
        let policy = container
            .image
            .as_deref()
            .and_then(|image| ImageReference::parse(image).ok())
            .map_or(PullPolicy::IfNotPresent, |reference| reference.default_pull_policy());
        container.image_pull_policy = Some(format!("{policy:?}"));
    }
    for port in container.ports.iter_mut().flatten() {
        port.protocol.get_or_insert_with(|| "TCP".into());
        if host_network {
            port.host_port.get_or_insert(port.container_port);
        }
    }
    let resources = container.resources.get_or_insert_default();
    // A limit without a request is also the request.
    if let Some(limits) = resources.limits.clone() {
        let requests = resources.requests.get_or_insert_default();
        for (name, amount) in limits {
            requests.entry(name).or_insert(amount);
        }
    }
    let probes = [&mut container.liveness_probe, &mut container.readiness_probe, &mut container.startup_probe];
    for probe in probes.into_iter().flatten() {
        probe_defaults(probe);
    }
}

fn probe_defaults(probe: &mut Probe) {
    probe.timeout_seconds.get_or_insert(1);
    probe.period_seconds.get_or_insert(10);
    probe.success_threshold.get_or_insert(1);
    probe.failure_threshold.get_or_insert(3);
    if let Some(http) = probe.http_get.as_mut() {
        http.path.get_or_insert_with(|| "/".into());
        http.scheme.get_or_insert_with(|| "HTTP".into());
    }
}

fn volume_defaults(volume: &mut Volume) {
    const DEFAULT_MODE: i32 = 0o644;
    if let Some(source) = volume.downward_api.as_mut() {
        source.default_mode.get_or_insert(DEFAULT_MODE);
    }
    if let Some(source) = volume.projected.as_mut() {
        source.default_mode.get_or_insert(DEFAULT_MODE);
    }
    if let Some(source) = volume.host_path.as_mut() {
        source.type_.get_or_insert_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = "apiVersion: v1
kind: Pod
metadata: {name: etcd, namespace: kube-system, labels: {tier: control-plane}}
spec:
  hostNetwork: true
  priorityClassName: system-node-critical
  containers:
  - name: etcd
    image: registry.k8s.io/etcd:3.6
    ports: [{containerPort: 2379}]
    resources: {limits: {memory: 1Gi}}
    livenessProbe: {httpGet: {port: 2381}}
  volumes: [{name: data, hostPath: {path: /var/lib/etcd}}]
";

    #[test]
    fn a_manifest_becomes_a_pod_of_the_node() {
        let pod = pod(MANIFEST, "/etc/kubernetes/manifests/etcd.yaml", "N1").expect("a pod");
        assert_eq!(pod.metadata.name.as_deref(), Some("etcd-n1"));
        assert_eq!(pod.metadata.namespace.as_deref(), Some("kube-system"));
        let annotations = pod.metadata.annotations.as_ref().expect("annotations");
        assert_eq!(annotations[CONFIG_SOURCE], "file");
        assert_eq!(Some(&annotations[CONFIG_HASH]), pod.metadata.uid.as_ref());
        let spec = pod.spec.expect("spec");
        assert_eq!(spec.node_name.as_deref(), Some("N1"));
        assert_eq!(spec.tolerations.expect("tolerations")[0].effect.as_deref(), Some("NoExecute"));
        let container = &spec.containers[0];
        assert_eq!(container.image_pull_policy.as_deref(), Some("IfNotPresent"));
        assert_eq!(container.ports.as_ref().expect("ports")[0].host_port, Some(2379));
        assert!(
            container.resources.as_ref().and_then(|r| r.requests.as_ref()).is_some_and(|r| r.contains_key("memory"))
        );
        assert_eq!(container.liveness_probe.as_ref().and_then(|probe| probe.failure_threshold), Some(3));
    }

    #[test]
    fn identity_is_content_file_and_node() {
        let uid = |text: &str, file: &str, node: &str| pod(text, file, node).expect("a pod").metadata.uid;
        let own = uid(MANIFEST, "/a", "n1");
        assert_eq!(uid(MANIFEST, "/a", "n1"), own);
        assert_ne!(uid(MANIFEST, "/b", "n1"), own);
        assert_ne!(uid(MANIFEST, "/a", "n2"), own);
        assert_ne!(uid(&MANIFEST.replace("3.6", "3.7"), "/a", "n1"), own);
    }

    #[test]
    fn what_is_no_static_pod_is_refused() {
        let cases = [
            ("kind: Service\napiVersion: v1", "not v1, Pod"),
            (
                "apiVersion: v1\nkind: Pod\nmetadata: {name: Bad_Name}\nspec: {containers: [{name: c, image: i}]}",
                "metadata.name: Invalid value",
            ),
            (
                "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: []}",
                "spec.containers: Required value",
            ),
            (
                "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c}]}",
                "image: Required value",
            ),
            (
                "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c, image: i}], volumes: [{name: v, secret: {secretName: s}}]}",
                "may not reference API objects: volume \"v\"",
            ),
            (
                "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c, image: i}], volumes: [{name: v, projected: {sources: [{clusterTrustBundle: {name: b, path: p}}]}}]}",
                "may not reference API objects: volume \"v\"",
            ),
            ("a: 1\n---\nb: 2", "2 documents"),
        ];
        for (text, want) in cases {
            let error = pod(text, "/a", "n1").expect_err(text);
            assert!(error.contains(want), "{text}: {error}");
        }
    }
}
