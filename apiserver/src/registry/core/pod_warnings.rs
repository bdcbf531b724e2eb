//! What is allowed in a pod, or in a template, and surely not meant. As `GetWarningsForPod`.

use super::pod_annotations::{APPARMOR, SECCOMP_CONTAINER, SECCOMP_POD, apparmor_field};
use super::pod_security::each_container;
use crate::registry::field::Field;
use apimachinery::names::is_dns1123_label;
use apimachinery::quantity::Quantity;
use serde_json::Value;

/// Node labels of before, and what to use.
const OLD_LABELS: [(&str, &str); 6] = [
    ("beta.kubernetes.io/arch", "deprecated since v1.14; use \"kubernetes.io/arch\" instead"),
    ("beta.kubernetes.io/os", "deprecated since v1.14; use \"kubernetes.io/os\" instead"),
    (
        "failure-domain.beta.kubernetes.io/region",
        "deprecated since v1.17; use \"topology.kubernetes.io/region\" instead",
    ),
    ("failure-domain.beta.kubernetes.io/zone", "deprecated since v1.17; use \"topology.kubernetes.io/zone\" instead"),
    ("beta.kubernetes.io/instance-type", "deprecated since v1.17; use \"node.kubernetes.io/instance-type\" instead"),
    ("kubernetes.io/cluster-service", "deprecated since v1.9"),
];
const OLD_ANNOTATIONS: [(&str, &str); 3] = [
    (
        "scheduler.alpha.kubernetes.io/critical-pod",
        "non-functional in v1.16+; use the \"priorityClassName\" field instead",
    ),
    ("security.alpha.kubernetes.io/sysctls", "non-functional in v1.11+; use the \"sysctls\" field instead"),
    ("security.alpha.kubernetes.io/unsafe-sysctls", "non-functional in v1.11+; use the \"sysctls\" field instead"),
];
const OLD_VOLUMES: [(&str, &str); 9] = [
    ("photonPersistentDisk", "deprecated in v1.11, non-functional in v1.16+"),
    ("gitRepo", "deprecated in v1.11, and disabled by default in v1.33+"),
    ("scaleIO", "deprecated in v1.16, non-functional in v1.22+"),
    ("flocker", "deprecated in v1.22, non-functional in v1.25+"),
    ("storageos", "deprecated in v1.22, non-functional in v1.25+"),
    ("quobyte", "deprecated in v1.22, non-functional in v1.25+"),
    ("glusterfs", "deprecated in v1.25, non-functional in v1.26+"),
    ("cephfs", "deprecated in v1.28, non-functional in v1.31+"),
    ("rbd", "deprecated in v1.28, non-functional in v1.31+"),
];
const SELECTS_NOTHING: &str = "a null labelSelector results in matching no pod";

/// Of a pod that is being made; nobody looks at those of updates.
pub fn of_new_pod(pod: &Value) -> Vec<String> {
    let root = Field::root(pod);
    let meta = root.at("metadata");
    let mut warnings = Vec::new();
    let messages = is_dns1123_label(meta.at("name").str());
    if !messages.is_empty() {
        let list = messages.join(" ");
        warnings.push(format!(
            "metadata.name: this is used in the Pod's hostname, which can result in surprising behavior; a DNS label is recommended: [{list}]"
        ));
    }
    collect(&root, false, &mut warnings);
    warnings
}

/// Of a template at this place.
pub fn of_template(template: &Field<'_, '_>) -> Vec<String> {
    let mut warnings = Vec::new();
    collect(template, true, &mut warnings);
    warnings
}

fn warn(warnings: &mut Vec<String>, field: &Field<'_, '_>, what: &str) {
    warnings.push(format!("{}: {what}", field.path()));
}

fn collect(root: &Field<'_, '_>, is_template: bool, warnings: &mut Vec<String>) {
    let (meta, spec) = (root.at("metadata"), root.at("spec"));
    placement(&spec, warnings);
    let annotations = meta.at("annotations");
    for (key, what) in OLD_ANNOTATIONS {
        if annotations.value.get(key).is_some() {
            warn(warnings, &annotations.key(key), what);
        }
    }
    for volume in spec.at("volumes").items() {
        old_volumes(&volume, warnings);
        let claim = volume.at("ephemeral");
        let template = claim.at("volumeClaimTemplate");
        fractional(&template.at("spec").at("resources").at("requests"), &["storage"], warnings);
    }
    token_paths(&spec, warnings);
    repeated(&spec.at("hostAliases"), "ip", warnings);
    repeated(&spec.at("imagePullSecrets"), "name", warnings);
    for secret in spec.at("imagePullSecrets").items() {
        let name = secret.at("name");
        if name.is_blank() {
            warn(warnings, &name, "invalid empty name \"\"");
        }
    }
    fractional(&spec.at("overhead"), &["memory", "ephemeral-storage"], warnings);
    let seccomp_message = "non-functional in v1.27+; use the \"seccompProfile\" field instead";
    let context = spec.at("securityContext");
    if !annotations.is_empty() && annotations.value.get(SECCOMP_POD).is_some() && !context.at("seccompProfile").is_set()
    {
        warn(warnings, &annotations.key(SECCOMP_POD), seccomp_message);
    }
    each_container(&spec, |container| {
        if !annotations.is_empty() {
            let (name, own) = (container.at("name").str(), container.at("securityContext"));
            let key = format!("{SECCOMP_CONTAINER}{name}");
            if annotations.value.get(&key).is_some() && !own.at("seccompProfile").is_set() {
                warn(warnings, &annotations.key(&key), seccomp_message);
            }
            let key = format!("{APPARMOR}{name}");
            let (of_pod, of_container) = (context.at("appArmorProfile"), own.at("appArmorProfile"));
            // A pod's annotation becomes a field, unless the pod says the same.
            let same =
                annotations.value.get(&key).and_then(|a| apparmor_field(a.as_str()?)).as_ref() == Some(of_pod.value);
            let told = if is_template { of_pod.is_set() } else { same };
            if annotations.value.get(&key).is_some() && !told && !of_container.is_set() {
                let what = "deprecated since v1.30; use the \"appArmorProfile\" field instead";
                warn(warnings, &annotations.key(&key), what);
            }
        }
        let resources = container.at("resources");
        for kind in ["limits", "requests"] {
            fractional(&resources.at(kind), &["memory", "ephemeral-storage"], warnings);
        }
        environment(&container.at("env"), warnings);
    });
    ports(&spec, warnings);
    if spec.at("terminationGracePeriodSeconds").int().is_some_and(|seconds| seconds < 0) {
        let what = "must be >= 0; negative values are invalid and will be treated as 1";
        warn(warnings, &spec.at("terminationGracePeriodSeconds"), what);
    }
    let affinity = spec.at("affinity");
    for kind in ["podAffinity", "podAntiAffinity"] {
        let pods = affinity.at(kind);
        for term in pods.at("requiredDuringSchedulingIgnoredDuringExecution").items() {
            selects_nothing(&term, warnings);
        }
        for preferred in pods.at("preferredDuringSchedulingIgnoredDuringExecution").items() {
            selects_nothing(&preferred.at("podAffinityTerm"), warnings);
        }
    }
}

/// Kinds of volumes that do nothing any more, or soon will not.
pub fn old_volumes(volume: &Field<'_, '_>, warnings: &mut Vec<String>) {
    for (kind, what) in OLD_VOLUMES {
        if volume.value.get(kind).is_some() {
            let shown = if kind == "storageos" { "storageOS" } else { kind };
            warn(warnings, &volume.at(shown), what);
        }
    }
}

fn selects_nothing(term: &Field<'_, '_>, warnings: &mut Vec<String>) {
    let selector = term.at("labelSelector");
    if !selector.is_set() {
        warn(warnings, &selector, SELECTS_NOTHING);
    }
}

/// What to say of a label of nodes that is not used any more.
pub fn old_label(key: &str) -> Option<&'static str> {
    OLD_LABELS.iter().find(|(old, _)| *old == key).map(|(_, what)| *what)
}

/// As `GetWarningsForNodeSelectorTerm`, and what else names labels of nodes.
fn placement(spec: &Field<'_, '_>, warnings: &mut Vec<String>) {
    for (key, value) in spec.at("nodeSelector").entries() {
        if let Some(what) = old_label(key) {
            warn(warnings, &value, what);
        }
    }
    let affinity = spec.at("affinity");
    let node = affinity.at("nodeAffinity");
    let required = node.at("requiredDuringSchedulingIgnoredDuringExecution");
    for term in required.at("nodeSelectorTerms").items() {
        node_term(&term, warnings);
    }
    for preferred in node.at("preferredDuringSchedulingIgnoredDuringExecution").items() {
        node_term(&preferred.at("preference"), warnings);
    }
    for constraint in spec.at("topologySpreadConstraints").items() {
        let key = constraint.at("topologyKey");
        if let Some(what) = old_label(key.str()) {
            warn(warnings, &key, &format!("{} is {what}", key.str()));
        }
        selects_nothing(&constraint, warnings);
    }
}

/// Labels of before in a term that selects nodes.
pub fn node_term(term: &Field<'_, '_>, warnings: &mut Vec<String>) {
    for expression in term.at("matchExpressions").items() {
        let key = expression.at("key");
        if let Some(what) = old_label(key.str()) {
            warn(warnings, &key, &format!("{} is {what}", key.str()));
        }
    }
}

/// Bytes come whole.
pub fn fractional(amounts: &Field<'_, '_>, names: &[&str], warnings: &mut Vec<String>) {
    for name in names {
        let amount = amounts.key(name);
        if Quantity::parse(amount.str()).is_ok_and(|q| q.milli_value() % 1000 != 0) {
            warn(
                warnings,
                &amount,
                &format!("fractional byte value {:?} is invalid, must be an integer", amount.str()),
            );
        }
    }
}

fn repeated(list: &Field<'_, '_>, name: &str, warnings: &mut Vec<String>) {
    for (at, item) in list.items().enumerate() {
        let value = item.at(name);
        if list.items().take(at).any(|other| other.at(name).str() == value.str()) {
            warn(warnings, &value, &format!("duplicate {name} {:?}", value.str()));
        }
    }
}

/// What else is projected to where a token is going to be.
fn token_paths(spec: &Field<'_, '_>, warnings: &mut Vec<String>) {
    let mut tokens: Vec<String> = Vec::new();
    let volumes = spec.at("volumes");
    let sources = |visit: &mut dyn FnMut(&Field<'_, '_>, &Field<'_, '_>)| {
        for volume in volumes.items() {
            let projected = volume.at("projected");
            projected.at("sources").items().for_each(|source| visit(&projected, &source));
        }
    };
    sources(&mut |_, source| {
        let token = source.at("serviceAccountToken");
        if token.is_set() {
            tokens.push(token.at("path").str().to_owned());
        }
    });
    if tokens.is_empty() {
        return;
    }
    sources(&mut |projected, source| {
        for (kind, shown) in [("configMap", "configMap"), ("secret", "secrets"), ("downwardAPI", "downwardAPI")] {
            for (at, item) in source.at(kind).at("items").items().enumerate() {
                let path = item.at("path").str();
                if tokens.iter().any(|token| token == path) {
                    let place = projected.at("sources").path();
                    warnings
                        .push(format!("{place}.{shown}[{at}]: has duplicated path with ServiceAccountToken {path:?}"));
                }
            }
        }
    });
}

/// A variable that is defined again without building on what it was.
fn environment(env: &Field<'_, '_>, warnings: &mut Vec<String>) {
    let mut known: Vec<&str> = Vec::with_capacity(env.len());
    for variable in env.items() {
        let name = variable.at("name").str();
        let is_new = !known.contains(&name);
        known.push(name);
        if is_new {
            continue;
        }
        let value = variable.at("value").str();
        let reference = format!("$({name})");
        if variable.at("valueFrom").is_set() || value == reference || !value.contains(&reference) {
            let what = format!("hides previous definition of {name:?}, which may be dropped when using apply");
            warn(warnings, &variable, &what);
        }
    }
}

/// Ports that get in each other's way.
fn ports(spec: &Field<'_, '_>, warnings: &mut Vec<String>) {
    struct Port {
        place: String,
        number: i64,
        protocol: String,
        host_ip: String,
        host_port: i64,
    }
    let mut known: Vec<Port> = Vec::new();
    each_container(spec, |container| {
        for port in container.at("ports").items() {
            let (number, host_port) = (port.at("containerPort").int(), port.at("hostPort").int().unwrap_or(0));
            let own = Port {
                place: port.path(),
                number: number.unwrap_or(0),
                protocol: port.at("protocol").str().to_owned(),
                host_ip: port.at("hostIP").str().to_owned(),
                host_port,
            };
            if !own.host_ip.is_empty() && host_port == 0 {
                warnings.push(format!("{}: hostIP set without hostPort: {}", own.place, port.value));
            }
            for other in known.iter().filter(|o| o.number == own.number && o.protocol == own.protocol) {
                let ambiguous = other.host_port == host_port && other.host_ip.is_empty() != own.host_ip.is_empty();
                let what = if other.host_ip == own.host_ip && other.host_port == host_port {
                    "duplicate"
                } else if host_port == 0 || other.host_port == 0 {
                    "overlapping"
                } else if ambiguous {
                    "dangerously ambiguous"
                } else {
                    continue;
                };
                warnings.push(format!("{}: {what} port definition with {}", own.place, other.place));
            }
            known.push(own);
        }
    });
}
