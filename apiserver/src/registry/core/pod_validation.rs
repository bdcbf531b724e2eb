//! Validation of a pod's spec, in a pod or in a template. As `ValidatePodSpec` and what it calls.

use super::container_validation::{PodContext, containers};
use super::pod_scheduling::{affinity, topology_spread};
use super::volume_validation::volumes;
use super::{pod_annotations, pod_security, resources};
use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use apimachinery::names::{is_dns1123_label, is_dns1123_subdomain, is_qualified_name};
use serde_json::Value;

pub use super::pod_scheduling::tolerations;

pub const RESTART_POLICIES: [&str; 3] = ["Always", "OnFailure", "Never"];
const DNS_POLICIES: [&str; 4] = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
const INT32_MAX: i64 = i32::MAX as i64;
const NAMESERVERS_MAX: usize = 3;
const SEARCHES_MAX: usize = 32;
const SEARCHES_MAX_BYTES: usize = 2048;
/// The longest name that a kernel takes for its host.
const HOSTNAME_MAX: usize = 64;

/// Annotations that say something of the spec.
pub fn annotations(root: &Field<'_, '_>, errors: &mut Errors) {
    pod_annotations::validate(&root.at("metadata").at("annotations"), &root.at("spec"), errors);
}

/// Everything of a pod but its metadata. As `validatePodMetadataAndSpec`.
pub fn pod(root: &Field<'_, '_>, errors: &mut Errors) {
    let (meta, spec) = (root.at("metadata"), root.at("spec"));
    of(&spec, meta.at("name").str(), true, errors);
    if spec.at("serviceAccountName").is_blank() {
        for volume in spec.at("volumes").items() {
            let projected = volume.at("projected");
            for source in projected.at("sources").items() {
                let token = source.at("serviceAccountToken");
                if token.is_set() {
                    errors.forbidden(&token, "must not be specified when serviceAccountName is not set");
                }
            }
        }
    }
}

/// The spec of a template.
pub fn spec(spec: &Field<'_, '_>, errors: &mut Errors) {
    of(spec, "", false, errors);
}

fn of(spec: &Field<'_, '_>, pod_name: &str, is_pod: bool, errors: &mut Errors) {
    let grace = spec.at("terminationGracePeriodSeconds");
    if !grace.is_set() {
        errors.required(&grace, "");
    }
    let claims = spec.value.get("resourceClaims").and_then(Value::as_array);
    let context = PodContext {
        volumes: volumes(&spec.at("volumes"), pod_name, is_pod, errors),
        claims: claims
            .into_iter()
            .flatten()
            .filter_map(|c| c.get("name")?.as_str())
            .filter(|n| !n.is_empty())
            .collect(),
        grace_seconds: grace.int(),
        restart_policy: spec.value.get("restartPolicy").and_then(Value::as_str).unwrap_or(""),
        host_users: spec.at("hostUsers").value != &Value::Bool(false),
        is_pod,
    };
    resource_claims(&spec.at("resourceClaims"), errors);
    containers(spec, &context, errors);
    resources::of_pod(spec, errors);
    host_ports(spec, is_pod, errors);
    errors.need_one_of(&spec.at("restartPolicy"), &RESTART_POLICIES);
    errors.need_one_of(&spec.at("dnsPolicy"), &DNS_POLICIES);
    metadata::labels(&spec.at("nodeSelector"), errors);
    pod_security::pod(spec, errors);
    affinity(&spec.at("affinity"), errors);
    dns(spec, errors);
    gates(spec, errors);
    topology_spread(&spec.at("topologySpreadConstraints"), errors);
    pod_security::host_process(spec, errors);
    pod_security::host_users(spec, errors);
    errors.named(&spec.at("serviceAccountName"), is_dns1123_subdomain);
    errors.named(&spec.at("nodeName"), is_dns1123_subdomain);
    errors.in_range(&spec.at("activeDeadlineSeconds"), 1, INT32_MAX);
    errors.named(&spec.at("hostname"), is_dns1123_label);
    errors.named(&spec.at("subdomain"), is_dns1123_label);
    hostname_override(spec, errors);
    tolerations(&spec.at("tolerations"), errors);
    for alias in spec.at("hostAliases").items() {
        errors.ip(&alias.at("ip"));
        for name in alias.at("hostnames").items() {
            errors.all(&name, is_dns1123_subdomain(name.str()));
        }
    }
    errors.named(&spec.at("priorityClassName"), is_dns1123_subdomain);
    let runtime = spec.at("runtimeClassName");
    if runtime.is_set() {
        errors.all(&runtime, is_dns1123_subdomain(runtime.str()));
    }
    let preemption = spec.at("preemptionPolicy");
    if preemption.is_set() {
        errors.need_one_of(&preemption, &["PreemptLowerPriority", "Never"]);
    }
    resources::overhead(&spec.at("overhead"), errors);
    pod_security::operating_system(spec, errors);
}

/// As `validatePodHostNetworkDeps`: there, a container's port is the host's.
fn host_ports(spec: &Field<'_, '_>, is_pod: bool, errors: &mut Errors) {
    if !spec.at("hostNetwork").bool() {
        return;
    }
    for container in spec.at("containers").items() {
        for port in container.at("ports").items() {
            let (host, own) = (port.at("hostPort"), port.at("containerPort"));
            let (host_port, own) = (host.int().unwrap_or(0), own.int().unwrap_or(0));
            if (is_pod || host_port != 0) && host_port != own {
                errors.invalid_as(&host, host_port, "must match `containerPort` when `hostNetwork` is true");
            }
        }
    }
}

/// As `validatePodDNSConfig`.
fn dns(spec: &Field<'_, '_>, errors: &mut Errors) {
    let config = spec.at("dnsConfig");
    let (servers, searches) = (config.at("nameservers"), config.at("searches"));
    if spec.at("dnsPolicy").str() == "None" {
        if !config.is_set() {
            errors.required(&config, "must provide `dnsConfig` when `dnsPolicy` is None");
            return;
        }
        if servers.is_empty() {
            errors.required(&servers, "must provide at least one DNS nameserver when `dnsPolicy` is None");
            return;
        }
    }
    if servers.len() > NAMESERVERS_MAX {
        errors.invalid(&servers, format!("must not have more than {NAMESERVERS_MAX} nameservers"));
    }
    for server in servers.items() {
        errors.ip(&server);
    }
    if searches.len() > SEARCHES_MAX {
        errors.invalid(&searches, format!("must not have more than {SEARCHES_MAX} search paths"));
    }
    let bytes = searches.items().map(|s| s.str().len() + 1).sum::<usize>();
    if bytes > SEARCHES_MAX_BYTES + 1 {
        let why =
            format!("must not have more than {SEARCHES_MAX_BYTES} characters (including spaces) in the search list");
        errors.invalid(&searches, why);
    }
    for search in searches.items().filter(|search| search.str() != ".") {
        let name = search.str().strip_suffix('.').unwrap_or(search.str());
        if !is_dns1123_subdomain(&name.replace('_', "a")).is_empty() {
            errors.invalid_as(&search, name, UNDERSCORED);
        }
    }
    for option in config.at("options").items() {
        if option.at("name").is_blank() {
            errors.required(&option, "must not be empty");
        }
    }
}

/// As `IsDNS1123SubdomainWithUnderscore` says it.
const UNDERSCORED: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '_', '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9_]([-a-z0-9_]*[a-z0-9_])?(\\.[a-z0-9_]([-a-z0-9_]*[a-z0-9_])?)*')";

fn gates(spec: &Field<'_, '_>, errors: &mut Errors) {
    for gate in spec.at("readinessGates").items() {
        let kind = gate.at("conditionType");
        errors.all(&kind, is_qualified_name(kind.str()));
    }
    let gates = spec.at("schedulingGates");
    for (at, gate) in gates.items().enumerate() {
        let name = gate.at("name");
        for message in is_qualified_name(name.str()) {
            errors.invalid_as(&gate, name.str(), message);
        }
        if gates.items().take(at).any(|g| g.at("name").str() == name.str()) {
            errors.0.push(apimachinery::status::FieldError::duplicate(gate.path(), name.str()));
        }
    }
}

fn hostname_override(spec: &Field<'_, '_>, errors: &mut Errors) {
    let name = spec.at("hostnameOverride");
    if !name.is_set() {
        return;
    }
    if name.str().len() > HOSTNAME_MAX {
        errors.too_long(&name, HOSTNAME_MAX);
    }
    errors.all(&name, is_dns1123_subdomain(name.str()));
    if spec.at("setHostnameAsFQDN").bool() {
        errors.forbidden(&name, "may not be specified when setHostnameAsFQDN is true");
    }
    if spec.at("hostNetwork").bool() {
        errors.forbidden(&name, "may not be specified when hostNetwork is true");
    }
}

/// As `validatePodResourceClaims`.
fn resource_claims(claims: &Field<'_, '_>, errors: &mut Errors) {
    for (at, claim) in claims.items().enumerate() {
        let name = claim.at("name");
        if name.is_blank() {
            errors.required(&name, "");
        } else if claims.items().take(at).any(|c| c.at("name").str() == name.str()) {
            errors.duplicate(&name);
        } else {
            errors.all(&name, is_dns1123_label(name.str()));
        }
        let (direct, template) = (claim.at("resourceClaimName"), claim.at("resourceClaimTemplateName"));
        match (direct.is_set(), template.is_set()) {
            (true, true) => errors
                .invalid(&claim, "at most one of `resourceClaimName` or `resourceClaimTemplateName` may be specified"),
            (false, false) => {
                errors.invalid(&claim, "must specify one of: `resourceClaimName`, `resourceClaimTemplateName`");
            }
            _ => {}
        }
        for reference in [direct, template] {
            if reference.is_set() {
                errors.all(&reference, is_dns1123_subdomain(reference.str()));
            }
        }
    }
}
