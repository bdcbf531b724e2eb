//! What of a pod's status may be written. As `ValidatePodStatusUpdate`.

use super::pod_annotations;
use crate::registry::field::{Errors, Field};
use apimachinery::names::{is_dns1123_label, is_dns1123_subdomain, is_qualified_name};
use apimachinery::status::FieldError;
use serde_json::Value;
use std::net::IpAddr;

const INT32_MAX: i64 = i32::MAX as i64;
/// Where containers report, and where they are specified.
const STATUSES: [(&str, &str); 3] = [
    ("containerStatuses", "containers"),
    ("initContainerStatuses", "initContainers"),
    ("ephemeralContainerStatuses", "ephemeralContainers"),
];

pub fn validate(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (meta, old_meta) = (new.at("metadata"), old.at("metadata"));
    let (now, was, spec) = (new.at("status"), old.at("status"), old.at("spec"));
    pod_annotations::validate_update(&meta.at("annotations"), &old_meta.at("annotations"), errors);
    for condition in now.at("conditions").items() {
        let kind = condition.at("type");
        if !matches!(kind.str(), "PodScheduled" | "Ready" | "Initialized") {
            errors.all(&condition.at("Type").with(kind.value), is_qualified_name(kind.str()));
        }
    }
    let (nominated, before) = (now.at("nominatedNodeName"), was.at("nominatedNodeName"));
    if !nominated.is_blank() && nominated.str() != before.str() {
        errors.all(&nominated, is_dns1123_subdomain(nominated.str()));
        if !spec.at("nodeName").is_blank() {
            errors.forbidden(&nominated, "may not be set on pods that are already bound to a node");
        }
    }
    if now.at("observedGeneration").int().is_some_and(|generation| generation < 0) {
        errors.invalid(&now.at("observedGeneration"), "must be a non-negative integer");
    }
    let (class, before) = (now.at("qosClass"), was.at("qosClass"));
    if class.str() != before.str() {
        errors.invalid(&class, "field is immutable");
    }
    for (statuses, containers) in STATUSES.into_iter().filter(|_| !may_begin_anew(spec.value)) {
        transitions(&now.at(statuses), &was.at(statuses), &spec, containers, errors);
    }
    claim_statuses(&now, &spec, errors);
    extended_claim(&now.at("extendedResourceClaimStatus"), &spec, errors);
    pod_ips(&now.at("podIPs"), errors);
    host_ips(&now, errors);
    for (field, containers) in STATUSES {
        let statuses = now.at(field);
        for status in statuses.items() {
            user(&status, spec.at("os").at("name").str() == "windows", errors);
            let health = status.at("allocatedResourcesStatus");
            if containers == "ephemeralContainers" && !health.is_empty() {
                errors.forbidden(&health, "must not be specified in container status");
            } else if !health.is_empty() {
                resource_health(&status, &spec.at(containers), errors);
            }
        }
    }
}

/// Whether a container's exit may restart all of them, whatever their own policy.
fn may_begin_anew(spec: &Value) -> bool {
    let list = |of: &'static str| move |value: &Value| value.get(of).and_then(Value::as_array).cloned();
    let containers = ["initContainers", "containers"].into_iter().filter_map(|of| list(of)(spec)).flatten();
    let mut rules = containers.filter_map(|c| list("restartPolicyRules")(&c)).flatten();
    rules.any(|rule| rule.get("action").and_then(Value::as_str) == Some("RestartAllContainers"))
}

/// A container that has ended, and is not to be restarted, stays so.
fn transitions(new: &Field<'_, '_>, old: &Field<'_, '_>, spec: &Field<'_, '_>, containers: &str, errors: &mut Errors) {
    let terminated =
        |status: &Field<'_, '_>| status.value.pointer("/state/terminated").filter(|t| !t.is_null()).cloned();
    for (at, before) in old.items().enumerate() {
        let Some(end) = terminated(&before) else { continue };
        let name = before.at("name");
        let container = spec.value.get(containers).and_then(Value::as_array).into_iter().flatten();
        let own = container.into_iter().find(|c| c.get("name").and_then(Value::as_str) == Some(name.str()));
        if restarts(spec.at("restartPolicy").str(), own, containers, &end) {
            continue;
        }
        for _ in new.items().filter(|s| s.at("name").str() == name.str() && terminated(s).is_none()) {
            errors.0.push(FieldError::forbidden(
                format!("{}[{at}].state", new.path()),
                "may not be transitioned to non-terminated state",
            ));
        }
    }
}

/// May a container run again after this end? As `ContainerShouldRestart`.
fn restarts(pod_policy: &str, container: Option<&Value>, containers: &str, end: &Value) -> bool {
    let code = end.get("exitCode").and_then(Value::as_i64).unwrap_or(0);
    if containers == "ephemeralContainers" {
        return false;
    }
    let rules = container.and_then(|c| c.get("restartPolicyRules")?.as_array());
    for codes in rules.into_iter().flatten().filter_map(|rule| rule.get("exitCodes")) {
        let named = codes.get("values").and_then(Value::as_array).is_some_and(|v| v.contains(&Value::from(code)));
        if named == (codes.get("operator").and_then(Value::as_str) == Some("In")) {
            return true;
        }
    }
    match container.and_then(|c| c.get("restartPolicy")?.as_str()).unwrap_or(pod_policy) {
        "Always" => true,
        "OnFailure" => code != 0,
        _ => false,
    }
}

fn claim_statuses(now: &Field<'_, '_>, spec: &Field<'_, '_>, errors: &mut Errors) {
    let (statuses, claims) = (now.at("resourceClaimStatuses"), spec.at("resourceClaims"));
    for (at, status) in statuses.items().enumerate() {
        let (name, claim) = (status.at("name"), status.at("resourceClaimName"));
        if !claims.items().any(|c| c.at("name").str() == name.str()) {
            errors.invalid(&name, "must match the name of an entry in `spec.resourceClaims`");
        }
        if statuses.items().take(at).any(|s| s.at("name").str() == name.str()) {
            errors.duplicate(&name);
        }
        for message in if claim.is_set() { is_dns1123_subdomain(claim.str()) } else { Vec::new() } {
            errors.invalid_as(&name, claim.str(), message);
        }
    }
}

/// As `validatePodExtendedResourceClaimStatus`.
fn extended_claim(status: &Field<'_, '_>, spec: &Field<'_, '_>, errors: &mut Errors) {
    if !status.is_set() {
        return;
    }
    let (mappings, claim) = (status.at("requestMappings"), status.at("resourceClaimName"));
    if mappings.is_empty() {
        errors.required(&mappings, "at least one request mapping is required");
    }
    for (at, mapping) in mappings.items().enumerate() {
        let parts = ["containerName", "resourceName", "requestName"];
        let [container, resource, request] = parts.map(|part| mapping.at(part));
        let containers = ["initContainers", "containers"].into_iter();
        let mut containers = containers.filter_map(|of| spec.value.get(of)?.as_array()).flatten();
        match containers.find(|known| known.get("name") == Some(container.value)) {
            None => errors.invalid(
                &container,
                "must match the name of an entry in spec.initContainers.name or spec.containers.name",
            ),
            Some(known) if known.pointer("/resources/requests").and_then(|r| r.get(resource.str())).is_none() => {
                let why = "must match the extended resource name of an entry in spec.initContainers.resources.requests or spec.containers.resources.requests";
                errors.invalid(&resource, why);
            }
            Some(_) => {}
        }
        // Upstream names the place so.
        errors.all(&status.at("requestName").with(request.value), is_dns1123_label(request.str()));
        if mappings
            .items()
            .take(at)
            .any(|other| parts.iter().all(|part| other.at(part).str() == mapping.at(part).str()))
        {
            [container, resource, request].iter().for_each(|part| errors.duplicate(part));
        }
    }
    if errors.need(&claim) {
        errors.all(&claim, is_dns1123_subdomain(claim.str()));
    }
}

// === addresses ===

fn pod_ips(ips: &Field<'_, '_>, errors: &mut Errors) {
    one_a_family(ips, errors);
}

fn host_ips(now: &Field<'_, '_>, errors: &mut Errors) {
    let ips = now.at("hostIPs");
    if let Some(first) = ips.items().next()
        && first.at("ip").str() != now.at("hostIP").str()
    {
        errors.invalid(&first.at("ip"), "must be equal to `hostIP`");
    }
    one_a_family(&ips, errors);
}

fn one_a_family(ips: &Field<'_, '_>, errors: &mut Errors) {
    let mut parsed: Vec<IpAddr> = Vec::new();
    for ip in ips.items() {
        parsed.extend(errors.ip(&ip.with(ip.at("ip").value)));
    }
    if ips.len() > 1 {
        let dual = parsed.iter().any(IpAddr::is_ipv4) && parsed.iter().any(IpAddr::is_ipv6);
        if !dual || ips.len() > 2 {
            errors.invalid(ips, "may specify no more than one IP for each IP family");
        }
    }
}

// === what containers report ===

fn user(status: &Field<'_, '_>, windows: bool, errors: &mut Errors) {
    let user = status.at("user");
    let linux = status.at("linux").with(user.at("linux").value);
    if !linux.is_set() {
        return;
    }
    if windows {
        errors.forbidden(&linux, "cannot be set for a windows pod");
        return;
    }
    for id in ["uid", "gid"] {
        errors.in_range(&linux.at(id), 0, INT32_MAX);
    }
    for group in linux.at("supplementalGroups").items() {
        errors.in_range(&group, 0, INT32_MAX);
    }
}

/// As `validateContainerStatusAllocatedResourcesStatus`.
fn resource_health(status: &Field<'_, '_>, containers: &Field<'_, '_>, errors: &mut Errors) {
    let container = containers.items().find(|c| c.at("name").str() == status.at("name").str()).map(|c| c.value);
    let resources = container.and_then(|c| c.get("resources"));
    for entry in status.at("allocatedResourcesStatus").items() {
        let name = entry.at("name");
        let (found, why) = if name.str().starts_with("claim:") {
            let claims = resources.and_then(|r| r.get("claims")?.as_array()).into_iter().flatten();
            let called = |claim: &Value| {
                let part = |field: &str| claim.get(field).and_then(Value::as_str).unwrap_or("").to_owned();
                match part("request").as_str() {
                    "" => format!("claim:{}", part("name")),
                    request => format!("claim:{}/{request}", part("name")),
                }
            };
            let why = "must match one of the container's resource claims in a format 'claim:<claimName>/<request>' or 'claim:<claimName>' if request is empty";
            (claims.into_iter().any(|claim| called(claim) == name.str()), why)
        } else {
            let requested = resources.and_then(|r| r.get("requests")?.get(name.str())).is_some();
            (requested, "must match one of the container's resource requests")
        };
        if container.is_some() && !found {
            errors.invalid(&name, why);
        }
        let devices = entry.at("resources");
        for (at, device) in devices.items().enumerate() {
            let (health, id) = (device.at("health"), device.at("resourceID"));
            if !matches!(health.str(), "Healthy" | "Unhealthy" | "Unknown") {
                errors.not_supported(&health, &["Healthy", "Unhealthy", "Unknown"]);
            }
            if devices.items().take(at).any(|d| d.at("resourceID").str() == id.str()) {
                errors.duplicate(&id);
            }
        }
    }
}
