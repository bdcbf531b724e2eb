//! Validation of a pod's spec, in a pod or in a template. As `ValidatePodSpec` and what it calls.

use super::container_validation::{containers, ephemeral_containers, resources};
use super::volume_validation::volumes;
use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use apimachinery::names::{is_dns1123_label, is_dns1123_subdomain, is_label_value, is_qualified_name};
use std::collections::HashSet;

pub const RESTART_POLICIES: [&str; 3] = ["Always", "OnFailure", "Never"];
const DNS_POLICIES: [&str; 4] = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
const INT32_MAX: i64 = i32::MAX as i64;

pub fn spec(spec: &Field<'_, '_>, errors: &mut Errors) {
    let known_volumes = volumes(&spec.at("volumes"), errors);
    containers(spec, &known_volumes, errors);
    ephemeral_containers(spec, &known_volumes, errors);
    errors.need_one_of(&spec.at("restartPolicy"), &RESTART_POLICIES);
    dns(spec, errors);
    metadata::labels(&spec.at("nodeSelector"), errors);
    security_context(spec, errors);
    for secret in spec.at("imagePullSecrets").items() {
        errors.need(&secret.at("name"));
    }
    affinity(&spec.at("affinity"), errors);
    let account = spec.at("serviceAccountName");
    if !account.is_blank() {
        errors.all(&account, is_dns1123_subdomain(account.str()));
    }
    let node = spec.at("nodeName");
    if !node.is_blank() {
        errors.all(&node, is_dns1123_subdomain(node.str()));
    }
    errors.in_range(&spec.at("activeDeadlineSeconds"), 1, INT32_MAX);
    let grace = spec.at("terminationGracePeriodSeconds");
    if !grace.is_set() {
        errors.required(&grace, "");
    }
    for (name, check) in [("hostname", is_dns1123_label as fn(&str) -> Vec<String>), ("subdomain", is_dns1123_label)] {
        let field = spec.at(name);
        if !field.is_blank() {
            errors.all(&field, check(field.str()));
        }
    }
    tolerations(&spec.at("tolerations"), errors);
    for alias in spec.at("hostAliases").items() {
        let ip = alias.at("ip");
        if ip.str().parse::<std::net::IpAddr>().is_err() {
            errors.invalid(&ip, "must be a valid IP address");
        }
        for name in alias.at("hostnames").items() {
            errors.all(&name, is_dns1123_subdomain(name.str()));
        }
    }
    let class = spec.at("priorityClassName");
    if !class.is_blank() {
        errors.all(&class, is_dns1123_subdomain(class.str()));
    }
    let runtime = spec.at("runtimeClassName");
    if runtime.is_set() {
        errors.all(&runtime, is_dns1123_subdomain(runtime.str()));
    }
    errors.one_of(&spec.at("preemptionPolicy"), &["Never", "PreemptLowerPriority"]);
    errors.one_of(&spec.at("os").at("name"), &["linux", "windows"]);
    for gate in spec.at("readinessGates").items() {
        let kind = gate.at("conditionType");
        errors.all(&kind, is_qualified_name(kind.str()));
    }
    let mut gates = HashSet::new();
    for gate in spec.at("schedulingGates").items() {
        let name = gate.at("name");
        errors.all(&name, is_qualified_name(name.str()));
        if !gates.insert(name.str()) {
            errors.duplicate(&gate);
        }
    }
    topology_spread(&spec.at("topologySpreadConstraints"), errors);
    let pod_resources = spec.at("resources");
    if pod_resources.is_set() {
        resources(&pod_resources, errors);
    }
    for (name, amount) in spec.at("overhead").entries() {
        super::container_validation::amount(name, &amount, errors);
    }
}

fn dns(spec: &Field<'_, '_>, errors: &mut Errors) {
    let policy = spec.at("dnsPolicy");
    errors.need_one_of(&policy, &DNS_POLICIES);
    let config = spec.at("dnsConfig");
    let servers = config.at("nameservers");
    if policy.str() == "None" && servers.is_empty() {
        errors.required(&servers, "must provide at least one DNS nameserver when `dnsPolicy` is None");
    }
    if servers.len() > 3 {
        errors.invalid(&servers, "must not have more than 3 nameservers");
    }
    for server in servers.items() {
        if server.str().parse::<std::net::IpAddr>().is_err() {
            errors.invalid(&server, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)");
        }
    }
    let searches = config.at("searches");
    if searches.len() > 32 {
        errors.invalid(&searches, "must not have more than 32 search paths");
    }
    for option in config.at("options").items() {
        errors.need(&option.at("name"));
    }
}

fn security_context(spec: &Field<'_, '_>, errors: &mut Errors) {
    let context = spec.at("securityContext");
    for id in ["runAsUser", "runAsGroup", "fsGroup"] {
        errors.in_range(&context.at(id), 0, INT32_MAX);
    }
    for group in context.at("supplementalGroups").items() {
        errors.in_range(&group, 0, INT32_MAX);
    }
    errors.one_of(&context.at("fsGroupChangePolicy"), &["Always", "OnRootMismatch"]);
    errors.one_of(&context.at("supplementalGroupsPolicy"), &["Merge", "Strict"]);
    seccomp(&context.at("seccompProfile"), errors);
    let mut names = HashSet::new();
    for sysctl in context.at("sysctls").items() {
        let name = sysctl.at("name");
        if !errors.need(&name) {
            continue;
        }
        if !is_sysctl(name.str()) {
            errors.invalid(
                &name,
                "must have at most 253 characters and match regex ^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$",
            );
        } else if !names.insert(name.str()) {
            errors.duplicate(&name);
        }
    }
    if spec.at("hostPID").bool() && spec.at("shareProcessNamespace").bool() {
        errors.invalid(&spec.at("shareProcessNamespace"), "ShareProcessNamespace and HostPID cannot both be enabled");
    }
}

/// As `IsValidSysctlName`.
fn is_sysctl(name: &str) -> bool {
    let part = |p: &str| {
        let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = p.as_bytes();
        matches!((bytes.first(), bytes.last()), (Some(a), Some(z)) if ok(*a) && ok(*z))
            && bytes.iter().all(|b| ok(*b) || *b == b'-' || *b == b'_')
    };
    name.len() <= 253 && name.split(['.', '/']).all(part)
}

/// As `validateSeccompProfileField`.
pub fn seccomp(profile: &Field<'_, '_>, errors: &mut Errors) {
    if !profile.is_set() {
        return;
    }
    let (kind, local) = (profile.at("type"), profile.at("localhostProfile"));
    if !errors.need(&kind) {
        return;
    }
    errors.one_of(&kind, &["Localhost", "RuntimeDefault", "Unconfined"]);
    if kind.str() == "Localhost" && local.is_blank() {
        errors.required(&local, "must be set when seccomp type is Localhost");
    } else if kind.str() != "Localhost" && local.is_set() {
        errors.invalid(&local, "can only be set when seccomp type is Localhost");
    }
}

/// As `ValidateTolerations`.
pub fn tolerations(tolerations: &Field<'_, '_>, errors: &mut Errors) {
    for toleration in tolerations.items() {
        let (key, operator, value) = (toleration.at("key"), toleration.at("operator"), toleration.at("value"));
        let effect = toleration.at("effect");
        if !key.is_blank() {
            errors.all(&key, is_qualified_name(key.str()));
        }
        if key.is_blank() && operator.str() != "Exists" {
            errors.invalid(
                &operator,
                "operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
            );
        }
        if toleration.at("tolerationSeconds").is_set() && effect.str() != "NoExecute" {
            errors.invalid(&effect, "effect must be 'NoExecute' when `tolerationSeconds` is set");
        }
        match operator.str() {
            "" | "Equal" => errors.all(&value, is_label_value(value.str())),
            "Exists" if !value.is_blank() => {
                errors.invalid(&operator, "value must be empty when `operator` is 'Exists'");
            }
            "Exists" => {}
            "Lt" | "Gt" => {
                if value.str().parse::<i64>().is_err() {
                    errors.invalid(&value, "value must be a valid integer when `operator` is 'Lt' or 'Gt'");
                }
            }
            _ => errors.not_supported(&operator, &["Equal", "Exists"]),
        }
        if !effect.is_blank() {
            errors.one_of(&effect, &["NoSchedule", "PreferNoSchedule", "NoExecute"]);
        }
    }
}

/// As `validateAffinity`.
fn affinity(affinity: &Field<'_, '_>, errors: &mut Errors) {
    let node = affinity.at("nodeAffinity");
    let required = node.at("requiredDuringSchedulingIgnoredDuringExecution");
    if required.is_set() {
        let terms = required.at("nodeSelectorTerms");
        if terms.is_empty() {
            errors.required(&terms, "must have at least one node selector term");
        }
        for term in terms.items() {
            node_selector_term(&term, errors);
        }
    }
    for preferred in node.at("preferredDuringSchedulingIgnoredDuringExecution").items() {
        weight(&preferred, errors);
        node_selector_term(&preferred.at("preference"), errors);
    }
    for kind in ["podAffinity", "podAntiAffinity"] {
        let pods = affinity.at(kind);
        for term in pods.at("requiredDuringSchedulingIgnoredDuringExecution").items() {
            pod_affinity_term(&term, errors);
        }
        for preferred in pods.at("preferredDuringSchedulingIgnoredDuringExecution").items() {
            weight(&preferred, errors);
            pod_affinity_term(&preferred.at("podAffinityTerm"), errors);
        }
    }
}

fn weight(preferred: &Field<'_, '_>, errors: &mut Errors) {
    let weight = preferred.at("weight");
    if !weight.int().is_some_and(|w| (1..=100).contains(&w)) {
        errors.invalid(&weight, "must be in the range 1-100");
    }
}

/// As `ValidateNodeSelectorTerm`.
pub fn node_selector_term(term: &Field<'_, '_>, errors: &mut Errors) {
    for requirement in term.at("matchExpressions").items() {
        let (key, operator, values) = (requirement.at("key"), requirement.at("operator"), requirement.at("values"));
        errors.all(&key, is_qualified_name(key.str()));
        match operator.str() {
            "In" | "NotIn" if values.is_empty() => {
                errors.required(&values, "must be specified when `operator` is 'In' or 'NotIn'");
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                errors.forbidden(&values, "may not be specified when `operator` is 'Exists' or 'DoesNotExist'");
            }
            "Gt" | "Lt" if values.len() != 1 => {
                errors.required(&values, "must be specified single value when `operator` is 'Lt' or 'Gt'");
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
            _ => errors.invalid(&operator, "not a valid selector operator"),
        }
    }
    for requirement in term.at("matchFields").items() {
        let (key, operator, values) = (requirement.at("key"), requirement.at("operator"), requirement.at("values"));
        if !matches!(operator.str(), "In" | "NotIn") {
            errors.invalid(&operator, "not a valid selector operator");
        } else if values.len() != 1 {
            errors
                .required(&values, "must be only one value when `operator` is 'In' or 'NotIn' for node field selector");
        }
        if key.str() != "metadata.name" {
            errors.invalid(&key, "not a valid field selector key");
        }
    }
}

fn pod_affinity_term(term: &Field<'_, '_>, errors: &mut Errors) {
    metadata::label_selector(&term.at("labelSelector"), errors);
    metadata::label_selector(&term.at("namespaceSelector"), errors);
    for namespace in term.at("namespaces").items() {
        errors.all(&namespace, is_dns1123_label(namespace.str()));
    }
    let key = term.at("topologyKey");
    if key.is_blank() {
        errors.required(&key, "can not be empty");
    } else {
        errors.all(&key, is_qualified_name(key.str()));
    }
}

/// As `validateTopologySpreadConstraints`.
fn topology_spread(constraints: &Field<'_, '_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for constraint in constraints.items() {
        let (skew, key, when) =
            (constraint.at("maxSkew"), constraint.at("topologyKey"), constraint.at("whenUnsatisfiable"));
        if skew.int().is_none_or(|n| n <= 0) {
            errors.invalid(&skew, "must be greater than zero");
        }
        if key.is_blank() {
            errors.required(&key, "can not be empty");
        }
        errors.one_of(&when, &["DoNotSchedule", "ScheduleAnyway"]);
        if !seen.insert((key.str(), when.str())) {
            errors.0.push(apimachinery::status::FieldError::duplicate(
                format!("{}.{{topologyKey, whenUnsatisfiable}}", constraint.path()),
                format!("{{{}, {}}}", key.str(), when.str()),
            ));
        }
        let domains = constraint.at("minDomains");
        if domains.is_set() {
            if domains.int().is_none_or(|n| n <= 0) {
                errors.invalid(&domains, "must be greater than zero");
            }
            if when.str() != "DoNotSchedule" {
                errors.invalid(
                    &domains,
                    format!("can only use minDomains if whenUnsatisfiable=DoNotSchedule, not {}", when.str()),
                );
            }
        }
        for policy in ["nodeAffinityPolicy", "nodeTaintsPolicy"] {
            errors.one_of(&constraint.at(policy), &["Honor", "Ignore"]);
        }
        metadata::label_selector(&constraint.at("labelSelector"), errors);
    }
}
