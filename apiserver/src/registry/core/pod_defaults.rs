//! Defaults of pods and of the templates that make them. As `SetDefaults_PodSpec` and what it calls.

use crate::features::enabled;
use crate::registry::object::{at_mut, child, default, is_blank, items_mut, remove, set, text};
use component_base::feature_gates::Feature;
use serde_json::{Value, json};

/// Fields that hold containers in a pod's spec.
pub const CONTAINER_FIELDS: [&str; 3] = ["initContainers", "containers", "ephemeralContainers"];

/// Of a pod itself; templates keep these open.
pub fn pod(pod: &mut Value) {
    let spec = child(pod, "spec");
    template_spec(spec);
    set_if_absent(spec, "enableServiceLinks", json!(true));
    let host_network = spec.get("hostNetwork").and_then(Value::as_bool).unwrap_or(false);
    for field in ["initContainers", "containers"] {
        for container in items_mut(spec, field) {
            requests_from_limits(child(container, "resources"));
            if host_network {
                for port in items_mut(container, "ports") {
                    if let Some(number) = port.get("containerPort").cloned()
                        && port.get("hostPort").and_then(Value::as_i64).unwrap_or(0) == 0
                    {
                        set(port, "hostPort", number);
                    }
                }
            }
        }
    }
    pod_level_requests(spec);
    // Who knows of one address only: the list follows.
    let ip = text(pod, "/status/podIP").to_owned();
    if !ip.is_empty() && text(pod, "/status/podIPs/0/ip") != ip {
        set(child(pod, "status"), "podIPs", json!([{"ip": ip}]));
    }
}

/// Of a pod template: `{metadata, spec}`.
pub fn template(template: &mut Value) {
    template_spec(child(template, "spec"));
}

/// Of a pod's spec, wherever it stands.
pub fn template_spec(spec: &mut Value) {
    drop_disabled(spec);
    default(spec, "dnsPolicy", "ClusterFirst");
    default(spec, "restartPolicy", "Always");
    default(spec, "schedulerName", "default-scheduler");
    set_if_absent(spec, "securityContext", json!({}));
    set_if_absent(spec, "terminationGracePeriodSeconds", json!(30));
    // The deprecated alias follows the name.
    let account = |spec: &Value, field: &str| spec.get(field).and_then(Value::as_str).unwrap_or("").to_owned();
    let name = account(spec, "serviceAccountName");
    let name = if name.is_empty() { account(spec, "serviceAccount") } else { name };
    if !name.is_empty() {
        set(spec, "serviceAccountName", name.as_str());
        set(spec, "serviceAccount", name);
    }
    for field in CONTAINER_FIELDS {
        items_mut(spec, field).for_each(container);
    }
    items_mut(spec, "volumes").for_each(volume);
}

fn set_if_absent(object: &mut Value, field: &str, value: Value) {
    if object.get(field).is_none_or(Value::is_null) {
        set(object, field, value);
    }
}

/// What a pod as a whole limits and does not request: its containers' requests together, or the limit. As
/// `defaultPodRequests` and `defaultHugePagePodLimits`.
fn pod_level_requests(spec: &mut Value) {
    if spec.get("resources").and_then(|r| r.get("limits")?.as_object()).is_none_or(serde_json::Map::is_empty) {
        return;
    }
    let together = super::resources::container_requests(spec);
    let Some(resources) = spec.get_mut("resources") else { return };
    let requests = child(resources, "requests");
    for (name, amount) in together {
        if matches!(name.as_str(), "cpu" | "memory") {
            set_if_absent(requests, &name, json!(amount.to_string()));
        }
    }
    requests_from_limits(resources);
}

/// Fields of features that are off: what nobody would heed is not kept. As `DropDisabledPodFields`.
fn drop_disabled(spec: &mut Value) {
    remove(spec, "schedulingGroup");
    for volume in items_mut(spec, "volumes") {
        if let Some(projected) = volume.get_mut("projected") {
            for source in items_mut(projected, "sources") {
                if !enabled(Feature::ClusterTrustBundleProjection) {
                    remove(source, "clusterTrustBundle");
                }
                if !enabled(Feature::PodCertificateRequest) {
                    remove(source, "podCertificate");
                }
            }
        }
    }
}

/// What is limited and not requested is requested as limited.
fn requests_from_limits(resources: &mut Value) {
    let Some(limits) = resources.get("limits").and_then(Value::as_object).cloned() else { return };
    let requests = child(resources, "requests");
    for (name, limit) in limits {
        set_if_absent(requests, &name, limit);
    }
}

fn container(container: &mut Value) {
    let image = container.get("image").and_then(Value::as_str).unwrap_or("");
    let policy = pull_policy(image);
    default(container, "imagePullPolicy", policy);
    default(container, "terminationMessagePath", "/dev/termination-log");
    default(container, "terminationMessagePolicy", "File");
    set_if_absent(container, "resources", json!({}));
    for port in items_mut(container, "ports") {
        default(port, "protocol", "TCP");
    }
    for variable in items_mut(container, "env") {
        let Some(from) = variable.get_mut("valueFrom") else { continue };
        if let Some(reference) = from.get_mut("fieldRef") {
            default(reference, "apiVersion", "v1");
        }
        if let Some(key) = from.get_mut("fileKeyRef") {
            set_if_absent(key, "optional", json!(false));
        }
        if let Some(reference) = from.get_mut("resourceFieldRef") {
            default(reference, "divisor", "0");
        }
    }
    for probe_field in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = container.get_mut(probe_field) {
            self::probe(probe);
        }
    }
    for hook in ["/lifecycle/postStart/httpGet", "/lifecycle/preStop/httpGet"] {
        if let Some(get) = at_mut(container, hook) {
            http_get(get);
        }
    }
}

/// `latest` may have moved; another tag is taken to stay.
pub fn pull_policy(image: &str) -> &'static str {
    let (name, digest) = image.split_once('@').map_or((image, ""), |(name, digest)| (name, digest));
    let last = name.rsplit('/').next().unwrap_or(name);
    let tag = last.split_once(':').map_or("", |(_, tag)| tag);
    if tag == "latest" || (tag.is_empty() && digest.is_empty()) { "Always" } else { "IfNotPresent" }
}

fn probe(probe: &mut Value) {
    for (field, value) in
        [("timeoutSeconds", 1), ("periodSeconds", 10), ("successThreshold", 1), ("failureThreshold", 3)]
    {
        if probe.get(field).and_then(Value::as_i64).unwrap_or(0) == 0 {
            set(probe, field, value);
        }
    }
    if let Some(get) = probe.get_mut("httpGet") {
        http_get(get);
    }
    if let Some(grpc) = probe.get_mut("grpc") {
        set_if_absent(grpc, "service", json!(""));
    }
}

fn http_get(get: &mut Value) {
    default(get, "path", "/");
    default(get, "scheme", "HTTP");
}

fn volume(volume: &mut Value) {
    let sources = volume.as_object().map_or(0, |map| map.keys().filter(|key| *key != "name").count());
    if sources == 0 {
        set(volume, "emptyDir", json!({}));
    }
    for source in ["secret", "configMap", "downwardAPI", "projected"] {
        if let Some(source) = volume.get_mut(source) {
            set_if_absent(source, "defaultMode", json!(0o644));
        }
    }
    if let Some(api) = volume.get_mut("downwardAPI") {
        downward_items(api);
    }
    if let Some(image) = volume.get_mut("image") {
        let policy = pull_policy(image.get("reference").and_then(Value::as_str).unwrap_or(""));
        default(image, "pullPolicy", policy);
    }
    super::persistent_volume::source_defaults(volume);
    if let Some(projected) = volume.get_mut("projected") {
        for source in items_mut(projected, "sources") {
            if let Some(token) = source.get_mut("serviceAccountToken") {
                set_if_absent(token, "expirationSeconds", json!(3600));
            }
            if let Some(api) = source.get_mut("downwardAPI") {
                downward_items(api);
            }
        }
    }
    if let Some(spec) = at_mut(volume, "/ephemeral/volumeClaimTemplate/spec") {
        default(spec, "volumeMode", "Filesystem");
    }
}

fn downward_items(api: &mut Value) {
    for item in items_mut(api, "items") {
        if let Some(reference) = item.get_mut("fieldRef") {
            default(reference, "apiVersion", "v1");
        }
        if let Some(reference) = item.get_mut("resourceFieldRef")
            && is_blank(reference.get("divisor"))
        {
            set(reference, "divisor", "0");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pull_policy_follows_the_tag() {
        for (image, policy) in [
            ("nginx", "Always"),
            ("nginx:latest", "Always"),
            ("nginx:1.25", "IfNotPresent"),
            ("host:5000/nginx", "Always"),
            ("host:5000/nginx:1", "IfNotPresent"),
            ("nginx@sha256:0123", "IfNotPresent"),
        ] {
            assert_eq!(pull_policy(image), policy, "{image}");
        }
    }

    #[test]
    fn a_pod_gets_its_defaults() {
        let mut object = json!({"spec": {"hostNetwork": true, "serviceAccountName": "sa", "volumes": [{"name": "v"}],
            "containers": [{"name": "a", "image": "x:1", "ports": [{"containerPort": 80}],
                "resources": {"limits": {"cpu": "1"}}, "livenessProbe": {"httpGet": {"port": 80}}}]}});
        pod(&mut object);
        let spec = &object["spec"];
        assert_eq!(spec["restartPolicy"], "Always");
        assert_eq!(spec["serviceAccount"], "sa");
        assert_eq!(spec["enableServiceLinks"], true);
        assert_eq!(spec["volumes"][0]["emptyDir"], json!({}));
        let container = &spec["containers"][0];
        assert_eq!(container["resources"]["requests"], json!({"cpu": "1"}));
        assert_eq!(container["ports"][0], json!({"containerPort": 80, "hostPort": 80, "protocol": "TCP"}));
        assert_eq!(container["livenessProbe"]["httpGet"], json!({"port": 80, "path": "/", "scheme": "HTTP"}));
        let once = object.clone();
        pod(&mut object);
        assert_eq!(object, once, "defaulting is idempotent");
    }
}
