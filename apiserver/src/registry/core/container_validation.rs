//! Validation of containers: names, images, ports, environment, mounts, probes, hooks, resources, security.

use super::pod_validation::seccomp;
use super::volume_validation::relative_path;
use crate::registry::field::{Errors, Field};
use apimachinery::names::{is_dns1123_label, is_qualified_name};
use apimachinery::quantity::Quantity;
use apimachinery::status::FieldError;
use serde_json::Value;
use std::collections::HashSet;

pub const PULL_POLICIES: [&str; 3] = ["Always", "IfNotPresent", "Never"];
const INT32_MAX: i64 = i32::MAX as i64;

/// Init and ordinary containers of a pod's spec, which share one space of names.
pub fn containers(spec: &Field<'_, '_>, volumes: &HashSet<&str>, errors: &mut Errors) {
    let ordinary = spec.at("containers");
    if ordinary.is_empty() {
        errors.required(&ordinary, "");
    }
    let mut names = HashSet::new();
    let mut host_ports = HashSet::new();
    for container in ordinary.items() {
        common(&container, volumes, errors);
        ports(&container.at("ports"), &mut host_ports, errors);
        handlers(&container, true, errors);
        let name = container.at("name");
        if !name.is_blank() && !names.insert(name.str()) {
            errors.duplicate(&name);
        }
        let policy = container.at("restartPolicy");
        errors.one_of(&policy, &["Always", "Never", "OnFailure"]);
    }
    for container in spec.at("initContainers").items() {
        let sidecar = container.at("restartPolicy").str() == "Always";
        common(&container, volumes, errors);
        ports(&container.at("ports"), &mut HashSet::new(), errors);
        handlers(&container, sidecar, errors);
        let name = container.at("name");
        if !name.is_blank() && !names.insert(name.str()) {
            errors.duplicate(&name);
        }
        errors.one_of(&container.at("restartPolicy"), &["Always", "Never", "OnFailure"]);
        if !sidecar {
            for forbidden in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
                let field = container.at(forbidden);
                if field.is_set() {
                    errors.forbidden(&field, "may not be set for init containers without restartPolicy=Always");
                }
            }
        }
    }
}

/// As `validateEphemeralContainers`.
pub fn ephemeral_containers(spec: &Field<'_, '_>, volumes: &HashSet<&str>, errors: &mut Errors) {
    let containers = spec.at("containers");
    let init = spec.at("initContainers");
    let mut names: HashSet<&str> = containers
        .items()
        .chain(init.items())
        .map(|c| c.value.get("name").and_then(Value::as_str).unwrap_or(""))
        .collect();
    for container in spec.at("ephemeralContainers").items() {
        common(&container, volumes, errors);
        let name = container.at("name");
        if !name.is_blank() && !names.insert(name.str()) {
            errors.duplicate(&name);
        }
        let target = container.at("targetContainerName");
        if !target.is_blank() && !containers.items().chain(init.items()).any(|c| c.value["name"] == target.str()) {
            errors.not_found(&target);
        }
        for field in ["ports", "livenessProbe", "readinessProbe", "startupProbe", "lifecycle", "resizePolicy"] {
            let field = container.at(field);
            if field.is_set() {
                errors.forbidden(&field, "field not allowed in ephemeral containers");
            }
        }
        if container.at("resources").at("limits").is_set() || container.at("resources").at("requests").is_set() {
            errors.forbidden(&container.at("resources"), "cannot be set for an Ephemeral Container");
        }
    }
}

fn common(container: &Field<'_, '_>, volumes: &HashSet<&str>, errors: &mut Errors) {
    let (name, image) = (container.at("name"), container.at("image"));
    if errors.need(&name) {
        errors.all(&name, is_dns1123_label(name.str()));
    }
    if image.is_blank() {
        errors.required(&image, "");
    } else if image.str().trim() != image.str() {
        errors.invalid(&image, "must not have leading or trailing whitespace");
    }
    errors.need_one_of(&container.at("terminationMessagePolicy"), &["File", "FallbackToLogsOnError"]);
    errors.one_of(&container.at("imagePullPolicy"), &PULL_POLICIES);
    env(&container.at("env"), errors);
    for source in container.at("envFrom").items() {
        env_from(&source, errors);
    }
    mounts(container, volumes, errors);
    resources(&container.at("resources"), errors);
    security(&container.at("securityContext"), errors);
}

// === ports and environment ===

fn ports<'v>(ports: &Field<'_, 'v>, host_ports: &mut HashSet<(&'v str, &'v str, i64)>, errors: &mut Errors) {
    let mut names = HashSet::new();
    for port in ports.items() {
        let (name, number, host, protocol) =
            (port.at("name"), port.at("containerPort"), port.at("hostPort"), port.at("protocol"));
        if !name.is_blank() {
            let messages = port_name(name.str());
            if messages.is_empty() && !names.insert(name.str()) {
                errors.duplicate(&name);
            }
            errors.all(&name, messages);
        }
        if number.int().unwrap_or(0) == 0 {
            errors.required(&number, "");
        } else {
            errors.port(&number);
        }
        if let Some(wanted) = host.int().filter(|n| *n != 0) {
            errors.port(&host);
            if !host_ports.insert((port.at("hostIP").str(), protocol.str(), wanted)) {
                errors.0.push(FieldError::duplicate(
                    host.path(),
                    format!("{}/{}/{wanted}", protocol.str(), port.at("hostIP").str()),
                ));
            }
        }
        errors.need_one_of(&protocol, &["SCTP", "TCP", "UDP"]);
    }
}

/// As `IsValidPortName`.
pub fn port_name(name: &str) -> Vec<String> {
    let mut messages = Vec::new();
    if name.len() > 15 {
        messages.push("must be no more than 15 characters".to_owned());
    }
    if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
        messages.push("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".to_owned());
    }
    if !name.bytes().any(|b| b.is_ascii_lowercase()) {
        messages.push("must contain at least one letter (a-z)".to_owned());
    }
    if name.contains("--") {
        messages.push("must not contain consecutive hyphens".to_owned());
    }
    if name.starts_with('-') || name.ends_with('-') {
        messages.push("must not begin or end with a hyphen".to_owned());
    }
    messages
}

/// A port by number or by name. As `ValidatePortNumOrName`.
pub fn port_or_name(port: &Field<'_, '_>, errors: &mut Errors) {
    match port.value {
        Value::Number(_) => errors.port(port),
        Value::String(name) => errors.all(port, port_name(name)),
        _ => errors.required(port, ""),
    }
}

/// As `IsRelaxedEnvVarName`.
fn env_name(name: &str) -> Vec<String> {
    if name.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'=') {
        return Vec::new();
    }
    vec!["a valid environment variable name must consist only of printable ASCII characters other than '='".to_owned()]
}

fn env(env: &Field<'_, '_>, errors: &mut Errors) {
    for variable in env.items() {
        let (name, source) = (variable.at("name"), variable.at("valueFrom"));
        if errors.need(&name) {
            errors.all(&name, env_name(name.str()));
        }
        if !source.is_set() {
            continue;
        }
        let sources = source.len();
        if sources == 0 {
            errors.invalid(
                &source,
                "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`",
            );
        } else if sources > 1 {
            errors.invalid(&source, "may not have more than one field specified at a time");
        }
        if !variable.at("value").is_blank() {
            errors.invalid(&source, "may not be specified when `value` is not empty");
        }
        for kind in ["configMapKeyRef", "secretKeyRef"] {
            let reference = source.at(kind);
            if reference.is_set() {
                errors.need(&reference.at("name"));
                if errors.need(&reference.at("key")) {
                    errors.all(&reference.at("key"), config_key(reference.at("key").str()));
                }
            }
        }
        let field = source.at("fieldRef");
        if field.is_set() {
            field_ref(&field, &ENV_FIELDS, errors);
        }
        let resource = source.at("resourceFieldRef");
        if resource.is_set() {
            errors.need(&resource.at("resource"));
        }
    }
}

const ENV_FIELDS: [&str; 9] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

/// As `validateObjectFieldSelector`.
pub fn field_ref(field: &Field<'_, '_>, supported: &[&str], errors: &mut Errors) {
    errors.need(&field.at("apiVersion"));
    let path = field.at("fieldPath");
    if !errors.need(&path) {
        return;
    }
    let text = path.str();
    if let Some((map, subscript)) =
        text.strip_suffix(']').and_then(|t| t.split_once("['").or_else(|| t.split_once('[')))
    {
        let key = subscript.trim_end_matches('\'');
        match map {
            "metadata.annotations" | "metadata.labels" => errors.all(&path, is_qualified_name(&key.to_lowercase())),
            _ => errors.invalid(&path, "does not support subscript"),
        }
    } else if !supported.contains(&text) {
        errors.not_supported(&path, supported);
    }
}

fn env_from(source: &Field<'_, '_>, errors: &mut Errors) {
    let prefix = source.at("prefix");
    if !prefix.is_blank() {
        errors.all(&prefix, env_name(prefix.str()));
    }
    let refs = ["configMapRef", "secretRef"];
    for kind in refs {
        let reference = source.at(kind);
        if reference.is_set() {
            errors.need(&reference.at("name"));
        }
    }
    match refs.iter().filter(|kind| source.at(kind).is_set()).count() {
        0 => errors.invalid(source, "must specify one of: `configMapRef` or `secretRef`"),
        1 => {}
        _ => errors.invalid(source, "may not have more than one field specified at a time"),
    }
}

/// As `IsConfigMapKey`.
pub fn config_key(key: &str) -> Vec<String> {
    let mut messages = Vec::new();
    if key.len() > 253 {
        messages.push("must be no more than 253 characters".to_owned());
    }
    if key.is_empty() || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        messages.push("a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')".to_owned());
    }
    if key == "." {
        messages.push("must not be '.'".to_owned());
    } else if key == ".." {
        messages.push("must not be '..'".to_owned());
    } else if key.starts_with("..") {
        messages.push("must not start with '..'".to_owned());
    }
    messages
}

// === mounts ===

fn mounts(container: &Field<'_, '_>, volumes: &HashSet<&str>, errors: &mut Errors) {
    let mut paths = HashSet::new();
    for mount in container.at("volumeMounts").items() {
        let (name, path, sub) = (mount.at("name"), mount.at("mountPath"), mount.at("subPath"));
        if errors.need(&name) && !volumes.contains(name.str()) {
            errors.not_found(&name);
        }
        if errors.need(&path) && !paths.insert(path.str()) {
            errors.invalid(&path, "must be unique");
        }
        relative_path(&sub, errors);
        let expression = mount.at("subPathExpr");
        if !expression.is_blank() {
            if !sub.is_blank() {
                errors.invalid(&expression, "subPathExpr and subPath are mutually exclusive");
            }
            relative_path(&expression, errors);
        }
        let propagation = mount.at("mountPropagation");
        errors.one_of(&propagation, &["Bidirectional", "HostToContainer", "None"]);
        if propagation.str() == "Bidirectional" && !container.at("securityContext").at("privileged").bool() {
            errors
                .forbidden(&propagation, "Bidirectional mount propagation is available only to privileged containers");
        }
    }
    let mut devices = HashSet::new();
    for device in container.at("volumeDevices").items() {
        let (name, path) = (device.at("name"), device.at("devicePath"));
        if errors.need(&name) && !volumes.contains(name.str()) {
            errors.not_found(&name);
        }
        if errors.need(&path) && (!devices.insert(path.str()) || paths.contains(path.str())) {
            errors.invalid(&path, "must be unique");
        }
    }
}

// === probes and hooks ===

fn handlers(container: &Field<'_, '_>, probes: bool, errors: &mut Errors) {
    if !probes {
        return;
    }
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let probe = container.at(name);
        if !probe.is_set() {
            continue;
        }
        handler(&probe, &["exec", "httpGet", "tcpSocket", "grpc"], errors);
        for field in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"]
        {
            errors.not_negative(&probe.at(field));
        }
        if name != "readinessProbe" && probe.at("successThreshold").int().is_some_and(|n| n != 1) {
            errors.invalid(&probe.at("successThreshold"), "must be 1");
        }
        let grace = probe.at("terminationGracePeriodSeconds");
        if grace.is_set() {
            if name == "readinessProbe" {
                errors.invalid(&grace, "must not be set for readinessProbes");
            } else {
                errors.positive(&grace);
            }
        }
    }
    for hook in ["postStart", "preStop"] {
        let lifecycle = container.at("lifecycle");
        let hook = lifecycle.at(hook);
        if hook.is_set() {
            handler(&hook, &["exec", "httpGet", "tcpSocket", "sleep"], errors);
        }
    }
}

fn handler(handler: &Field<'_, '_>, kinds: &[&str], errors: &mut Errors) {
    let set: Vec<&str> = kinds.iter().copied().filter(|kind| handler.at(kind).is_set()).collect();
    for extra in set.iter().skip(1) {
        errors.forbidden(&handler.at(extra), "may not specify more than 1 handler type");
    }
    match set.first().copied() {
        None => errors.required(handler, "must specify a handler type"),
        Some("exec") => {
            let exec = handler.at("exec");
            let command = exec.at("command");
            if command.is_empty() {
                errors.required(&command, "");
            }
        }
        Some("httpGet") => {
            let get = handler.at("httpGet");
            errors.need(&get.at("path"));
            port_or_name(&get.at("port"), errors);
            errors.one_of(&get.at("scheme"), &["HTTP", "HTTPS"]);
            for header in get.at("httpHeaders").items() {
                errors.need(&header.at("name"));
            }
        }
        Some("tcpSocket") => port_or_name(&handler.at("tcpSocket").at("port"), errors),
        Some("grpc") => errors.port(&handler.at("grpc").at("port")),
        Some(_) => errors.not_negative(&handler.at("sleep").at("seconds")),
    }
}

// === resources ===

/// As `ValidateResourceRequirements`.
pub fn resources(resources: &Field<'_, '_>, errors: &mut Errors) {
    let (limits, requests) = (resources.at("limits"), resources.at("requests"));
    for (name, limit) in limits.entries() {
        amount(name, &limit, errors);
    }
    let mut huge = false;
    let mut basic = false;
    for (name, request) in requests.entries() {
        amount(name, &request, errors);
        let Some(limit) = limits.value.get(name).and_then(Value::as_str) else {
            if !overcommittable(name) {
                errors.0.push(FieldError::required(
                    limits.path(),
                    format!("Limit must be set for non overcommitable resources: {name}"),
                ));
            }
            continue;
        };
        let (Ok(wanted), Ok(most)) = (Quantity::parse(request.str()), Quantity::parse(limit)) else { continue };
        if !overcommittable(name) && wanted != most {
            errors.0.push(FieldError::invalid(
                requests.path(),
                request.str(),
                format!("must be equal to {name} limit of {limit}"),
            ));
        } else if wanted > most {
            errors.0.push(FieldError::invalid(
                requests.path(),
                request.str(),
                format!("must be less than or equal to {name} limit of {limit}"),
            ));
        }
    }
    for (name, _) in limits.entries().chain(requests.entries()) {
        huge |= name.starts_with("hugepages-");
        basic |= matches!(name, "cpu" | "memory");
    }
    if huge && !basic {
        errors.forbidden(resources, "HugePages require cpu or memory");
    }
    let claims = resources.at("claims");
    let mut seen = HashSet::new();
    for claim in claims.items() {
        let name = claim.at("name");
        if errors.need(&name) && !seen.insert((name.str(), claim.at("request").str())) {
            errors.duplicate(&claim);
        }
    }
}

/// A resource's name and its amount in a container.
pub fn amount(name: &str, field: &Field<'_, '_>, errors: &mut Errors) {
    if let Some(message) = resource_name_error(name) {
        errors.0.push(FieldError::invalid(field.path(), name, message));
    }
    let Ok(quantity) = Quantity::parse(field.str()) else { return };
    if quantity < Quantity::ZERO {
        errors.invalid(field, "must be greater than or equal to 0");
    } else if is_integer_resource(name) && quantity.milli_value() % 1000 != 0 {
        errors.invalid(field, "must be an integer");
    }
}

fn resource_name_error(name: &str) -> Option<String> {
    if let Some(message) = is_qualified_name(name).into_iter().next() {
        return Some(message);
    }
    if name.contains('/') || matches!(name, "cpu" | "memory" | "ephemeral-storage") || name.starts_with("hugepages-") {
        return None;
    }
    Some("must be a standard resource for containers".to_owned())
}

/// Extended resources are counted, not measured.
fn is_integer_resource(name: &str) -> bool {
    name.contains('/')
}

fn overcommittable(name: &str) -> bool {
    matches!(name, "cpu" | "memory" | "ephemeral-storage")
}

fn security(context: &Field<'_, '_>, errors: &mut Errors) {
    if !context.is_set() {
        return;
    }
    for id in ["runAsUser", "runAsGroup"] {
        errors.in_range(&context.at(id), 0, INT32_MAX);
    }
    errors.one_of(&context.at("procMount"), &["Default", "Unmasked"]);
    seccomp(&context.at("seccompProfile"), errors);
    let escalation = context.at("allowPrivilegeEscalation");
    if escalation.value == &Value::Bool(false) {
        if context.at("privileged").bool() {
            errors.invalid(&escalation, "cannot set `allowPrivilegeEscalation` to false and `privileged` to true");
        }
        let capabilities = context.at("capabilities");
        if capabilities.at("add").items().any(|c| c.str() == "CAP_SYS_ADMIN") {
            errors.invalid(
                &escalation,
                "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN",
            );
        }
    }
}
