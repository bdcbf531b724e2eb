//! Validation of containers: names, images, ports, mounts, probes, hooks, restarts. As `validateContainers` and what it calls.

use super::container_env::{env, env_from};
use super::pod_security;
use super::resources;
use super::volume_sources::{no_backsteps, relative_path};
use super::volume_validation::Volumes;
use crate::registry::field::{Errors, Field};
use apimachinery::names::is_dns1123_label;
use serde_json::Value;
use std::fmt::Write as _;

pub const PULL_POLICIES: [&str; 3] = ["Always", "IfNotPresent", "Never"];
pub const PROTOCOLS: [&str; 3] = ["SCTP", "TCP", "UDP"];
const RULES_MAX: usize = 20;
const EXIT_CODES_MAX: usize = 255;
const NOT_EPHEMERAL: &str = "cannot be set for an Ephemeral Container";

/// What containers need to know of the pod that they are in.
pub struct PodContext<'v> {
    pub volumes: Volumes<'v>,
    pub claims: Vec<&'v str>,
    pub grace_seconds: Option<i64>,
    pub restart_policy: &'v str,
    /// They are the host's users.
    pub host_users: bool,
    /// Of a pod itself, not of a template.
    pub is_pod: bool,
}

/// All containers of a pod's spec, which share one space of names.
pub fn containers(spec: &Field<'_, '_>, pod: &PodContext<'_>, errors: &mut Errors) {
    ordinary(&spec.at("containers"), pod, errors);
    init(spec, pod, errors);
    ephemeral(spec, pod, errors);
}

fn ordinary(containers: &Field<'_, '_>, pod: &PodContext<'_>, errors: &mut Errors) {
    if containers.is_empty() {
        errors.required(containers, "");
        return;
    }
    for (at, container) in containers.items().enumerate() {
        common(&container, pod, errors);
        let name = container.at("name");
        if containers.items().take(at).any(|other| name_of(other.value) == name.str()) {
            errors.duplicate(&name);
        }
        handlers(&container, pod, errors);
        restarts(&container, errors);
    }
    let mut taken = Vec::new();
    for container in containers.items() {
        host_ports(&container, &mut taken, errors);
    }
}

fn init(spec: &Field<'_, '_>, pod: &PodContext<'_>, errors: &mut Errors) {
    let (ordinary, containers) = (spec.at("containers"), spec.at("initContainers"));
    for (at, container) in containers.items().enumerate() {
        common(&container, pod, errors);
        let sidecar = container.at("restartPolicy").str() == "Always";
        restarts(&container, errors);
        let name = container.at("name");
        if is_named(&ordinary, name.str())
            || (!name.is_blank() && containers.items().take(at).any(|o| name_of(o.value) == name.str()))
        {
            errors.duplicate(&name);
        }
        // They run one after the other.
        host_ports(&container, &mut Vec::new(), errors);
        if sidecar {
            handlers(&container, pod, errors);
            continue;
        }
        for forbidden in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
            let field = container.at(forbidden);
            if field.is_set() {
                errors.forbidden(&field, "may not be set for init containers without restartPolicy=Always");
            }
        }
        let resize = container.at("resizePolicy");
        if !resize.is_empty() {
            errors.invalid(&resize, "must not be set for init containers");
        }
    }
}

/// As `validateEphemeralContainers`.
fn ephemeral(spec: &Field<'_, '_>, pod: &PodContext<'_>, errors: &mut Errors) {
    let (ordinary, init, containers) =
        (spec.at("containers"), spec.at("initContainers"), spec.at("ephemeralContainers"));
    for (at, container) in containers.items().enumerate() {
        common(&container, pod, errors);
        untrimmed_image(&container, errors);
        let (name, target) = (container.at("name"), container.at("targetContainerName"));
        let known = |name: &str| is_named(&ordinary, name) || is_named(&init, name);
        if known(name.str()) || containers.items().take(at).any(|other| name_of(other.value) == name.str()) {
            errors.duplicate(&name);
        }
        if !target.is_blank() && !known(target.str()) {
            errors.not_found(&target);
        }
        let fields = [
            "ports",
            "resources",
            "resizePolicy",
            "restartPolicy",
            "restartPolicyRules",
            "livenessProbe",
            "readinessProbe",
            "startupProbe",
            "lifecycle",
        ];
        for field in
            fields.iter().map(|name| container.at(name)).filter(|f| f.is_set() && f.value != &serde_json::json!({}))
        {
            errors.forbidden(&field, NOT_EPHEMERAL);
        }
        for mount in container.at("volumeMounts").items() {
            for field in ["subPath", "subPathExpr"] {
                if !mount.at(field).is_blank() {
                    errors.forbidden(&mount.at(field), NOT_EPHEMERAL);
                }
            }
        }
    }
}

fn name_of(container: &Value) -> &str {
    container.get("name").and_then(Value::as_str).unwrap_or("")
}

fn is_named(containers: &Field<'_, '_>, name: &str) -> bool {
    containers.items().any(|container| name_of(container.value) == name)
}

/// As `validateContainerCommon`.
fn common(container: &Field<'_, '_>, pod: &PodContext<'_>, errors: &mut Errors) {
    errors.need_named(&container.at("name"), is_dns1123_label);
    errors.need(&container.at("image"));
    errors.need_one_of(&container.at("terminationMessagePolicy"), &["File", "FallbackToLogsOnError"]);
    ports(&container.at("ports"), errors);
    env(&container.at("env"), &pod.volumes, errors);
    env_from(&container.at("envFrom"), errors);
    mounts(container, &pod.volumes, errors);
    devices(container, &pod.volumes, errors);
    errors.need_one_of(&container.at("imagePullPolicy"), &PULL_POLICIES);
    resources::of_container(&container.at("resources"), &pod.claims, errors);
    resize_policies(&container.at("resizePolicy"), pod.restart_policy, errors);
    pod_security::container(&container.at("securityContext"), pod.host_users, errors);
    if pod.is_pod {
        untrimmed_image(container, errors);
    }
}

/// As `validateContainerOnlyForPod`.
pub fn untrimmed_image(container: &Field<'_, '_>, errors: &mut Errors) {
    let image = container.at("image");
    if image.str().trim().len() != image.str().len() {
        errors.invalid(&image, "must not have leading or trailing whitespace");
    }
}

// === restarts and resizing ===

/// As `validateContainerRestartPolicy`.
fn restarts(container: &Field<'_, '_>, errors: &mut Errors) {
    let (policy, rules) = (container.at("restartPolicy"), container.at("restartPolicyRules"));
    if policy.is_set() {
        errors.one_of(&policy, &["Always", "Never", "OnFailure"]);
    } else if !rules.is_empty() {
        errors.required(&policy, "must specify restartPolicy when restart rules are used");
    }
    if rules.len() > RULES_MAX {
        errors.too_many(&rules, RULES_MAX);
    }
    for rule in rules.items() {
        let (action, codes) = (rule.at("action"), rule.at("exitCodes"));
        if !matches!(action.str(), "Restart" | "RestartAllContainers") {
            errors.not_supported(&action, &["Restart", "RestartAllContainers"]);
        }
        if !codes.is_set() {
            errors.required(&codes, "must be specified");
            continue;
        }
        let (operator, values) = (codes.at("operator"), codes.at("values"));
        if !matches!(operator.str(), "In" | "NotIn") {
            errors.not_supported(&operator, &["In", "NotIn"]);
        }
        if values.len() > EXIT_CODES_MAX {
            errors.too_many(&values, EXIT_CODES_MAX);
        }
    }
}

/// As `validateResizePolicy`.
fn resize_policies(policies: &Field<'_, '_>, restart_policy: &str, errors: &mut Errors) {
    for (at, policy) in policies.items().enumerate() {
        let (name, restart) = (policy.at("resourceName"), policy.at("restartPolicy"));
        if policies.items().take(at).any(|p| p.at("resourceName").str() == name.str()) {
            errors.0.push(apimachinery::status::FieldError::duplicate(policy.path(), name.str()));
        }
        for (field, supported) in [(&name, ["cpu", "memory"]), (&restart, ["NotRequired", "RestartContainer"])] {
            errors.need_one_of(&policies.with(field.value), &supported);
        }
        if restart_policy == "Never" && restart.str() != "NotRequired" {
            let why = "must be 'NotRequired' when `restartPolicy` is 'Never'";
            errors.invalid_as(policies, restart.str(), why);
        }
    }
}

// === ports ===

fn ports(ports: &Field<'_, '_>, errors: &mut Errors) {
    for (at, port) in ports.items().enumerate() {
        let (name, number, host) = (port.at("name"), port.at("containerPort"), port.at("hostPort"));
        if !name.is_blank() {
            let messages = port_name(name.str());
            if messages.is_empty() && ports.items().take(at).any(|p| p.at("name").str() == name.str()) {
                errors.duplicate(&name);
            }
            errors.all(&name, messages);
        }
        if number.int().unwrap_or(0) == 0 {
            errors.required(&number, "");
        } else {
            errors.port(&number);
        }
        if host.int().unwrap_or(0) != 0 {
            errors.port(&host);
        }
        errors.need_one_of(&port.at("protocol"), &PROTOCOLS);
    }
}

/// As `AccumulateUniqueHostPorts`.
fn host_ports(container: &Field<'_, '_>, taken: &mut Vec<String>, errors: &mut Errors) {
    for port in container.at("ports").items() {
        let (host, protocol) = (port.at("hostPort"), port.at("protocol"));
        let Some(number) = host.int().filter(|n| *n != 0) else { continue };
        let key = format!("{}/{}/{number}", protocol.str(), port.at("hostIP").str());
        if taken.contains(&key) {
            errors.0.push(apimachinery::status::FieldError::duplicate(host.path(), key));
        } else {
            taken.push(key);
        }
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
        Value::String(name) => errors.all(port, port_name(name)),
        Value::Number(_) => errors.port(port),
        _ => errors.invalid_as(port, 0, "must be between 1 and 65535, inclusive"),
    }
}

// === mounts ===

/// As `ValidateVolumeMounts`.
fn mounts(container: &Field<'_, '_>, volumes: &Volumes<'_>, errors: &mut Errors) {
    let (mounts, devices) = (container.at("volumeMounts"), container.at("volumeDevices"));
    for (at, mount) in mounts.items().enumerate() {
        let (name, path) = (mount.at("name"), mount.at("mountPath"));
        let (sub, expression) = (mount.at("subPath"), mount.at("subPathExpr"));
        errors.need(&name);
        let kind = volumes.kind(name.str());
        if kind.is_none() {
            errors.not_found(&name);
        }
        errors.need(&path);
        if mounts.items().take(at).any(|m| m.at("mountPath").str() == path.str()) {
            errors.invalid(&path, "must be unique");
        }
        if devices.items().any(|d| d.at("name").str() == name.str()) {
            errors.invalid(&name, "must not already exist in volumeDevices");
        }
        if devices.items().any(|d| d.at("devicePath").str() == path.str()) {
            errors.invalid(&path, "must not already exist as a path in volumeDevices");
        }
        // Kubernetes leaves out which mount it is in what follows.
        let shown = |field: &str| mount.value.get(field).unwrap_or(&Value::Null);
        relative_path(&mounts.at("subPath").with(shown("subPath")), errors);
        if !expression.is_blank() {
            if !sub.is_blank() {
                errors.invalid(&expression, "subPathExpr and subPath are mutually exclusive");
            }
            relative_path(&mounts.at("subPathExpr").with(shown("subPathExpr")), errors);
        }
        let propagation = mounts.at("mountPropagation").with(shown("mountPropagation"));
        errors.one_of(&propagation, &["Bidirectional", "HostToContainer", "None"]);
        if propagation.str() == "Bidirectional" && !container.at("securityContext").at("privileged").bool() {
            errors
                .forbidden(&propagation, "Bidirectional mount propagation is available only to privileged containers");
        }
        let recursive = mounts.at("recursiveReadOnly").with(shown("recursiveReadOnly"));
        errors.one_of(&recursive, &["Disabled", "Enabled", "IfPossible"]);
        if matches!(recursive.str(), "Enabled" | "IfPossible") {
            if !mount.at("readOnly").bool() {
                errors.forbidden(&recursive, "may only be specified when readOnly is true");
            }
            if !matches!(propagation.str(), "" | "None") {
                errors.forbidden(&recursive, "may only be specified when mountPropagation is None or not specified");
            }
        }
    }
}

/// As `ValidateVolumeDevices`.
fn devices(container: &Field<'_, '_>, volumes: &Volumes<'_>, errors: &mut Errors) {
    let (mounts, devices) = (container.at("volumeMounts"), container.at("volumeDevices"));
    for (at, device) in devices.items().enumerate() {
        let (name, path) = (device.at("name"), device.at("devicePath"));
        errors.need(&name);
        let before = || devices.items().take(at);
        if !name.is_blank() && before().any(|d| d.at("name").str() == name.str()) {
            errors.invalid(&name, "must be unique");
        }
        match volumes.kind(name.str()) {
            None => errors.not_found(&name),
            Some("persistentVolumeClaim" | "ephemeral") => {}
            Some(_) => errors
                .invalid(&name, "can only use volume source type of PersistentVolumeClaim or Ephemeral for block mode"),
        }
        errors.need(&path);
        if before().any(|d| d.at("devicePath").str() == path.str()) {
            errors.invalid(&path, "must be unique");
        }
        let mut steps = Errors::default();
        no_backsteps(&path, &mut steps);
        if !steps.0.is_empty() {
            errors.invalid(&path, "can not contain backsteps ('..')");
        }
        if mounts.items().any(|m| m.at("name").str() == name.str()) {
            errors.invalid(&name, "must not already exist in volumeMounts");
        }
        if mounts.items().any(|m| m.at("mountPath").str() == path.str()) {
            errors.invalid(&path, "must not already exist as a path in volumeMounts");
        }
    }
}

// === probes and hooks ===

/// Hooks and probes of a container that may have them.
fn handlers(container: &Field<'_, '_>, pod: &PodContext<'_>, errors: &mut Errors) {
    let lifecycle = container.at("lifecycle");
    for hook in ["postStart", "preStop"] {
        let hook = lifecycle.at(hook);
        if hook.is_set() {
            handler(&hook, &["exec", "httpGet", "tcpSocket", "sleep"], pod.grace_seconds, errors);
        }
    }
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let probe = container.at(name);
        if !probe.is_set() {
            continue;
        }
        handler(&probe, &["exec", "httpGet", "tcpSocket", "grpc"], None, errors);
        for field in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"]
        {
            errors.not_negative(&probe.at(field));
        }
        let (grace, success) = (probe.at("terminationGracePeriodSeconds"), probe.at("successThreshold"));
        errors.positive(&grace);
        if name == "readinessProbe" {
            if grace.is_set() {
                errors.invalid(&grace, "must not be set for readinessProbes");
            }
        } else if success.int() != Some(1) {
            errors.invalid(&success, "must be 1");
        }
    }
}

/// As `validateHandler`.
fn handler(handler: &Field<'_, '_>, kinds: &[&str], grace_seconds: Option<i64>, errors: &mut Errors) {
    let mut found = false;
    for kind in kinds.iter().filter(|kind| handler.at(kind).is_set()) {
        if found {
            errors.forbidden(&handler.at(kind), "may not specify more than 1 handler type");
            continue;
        }
        found = true;
        let action = handler.at(kind);
        match *kind {
            "exec" => {
                let command = action.at("command");
                if command.is_empty() {
                    errors.required(&command, "");
                }
            }
            "httpGet" => {
                errors.need(&action.at("path"));
                port_or_name(&action.at("port"), errors);
                if !matches!(action.at("scheme").str(), "HTTP" | "HTTPS") {
                    errors.not_supported(&action.at("scheme"), &["HTTP", "HTTPS"]);
                }
                for header in action.at("httpHeaders").items() {
                    let name = header.at("name");
                    if !is_header_name(name.str()) {
                        errors.invalid_as(&action.at("httpHeaders"), name.str(), HEADER_MESSAGE);
                    }
                }
            }
            "tcpSocket" => port_or_name(&action.at("port"), errors),
            "grpc" => {
                let port = action.at("port");
                if !(1..=65535).contains(&port.int().unwrap_or(0)) {
                    errors.invalid_as(&port, port.int().unwrap_or(0), "must be between 1 and 65535, inclusive");
                }
            }
            _ => {
                let seconds = action.at("seconds").int().unwrap_or(0);
                if let Some(grace) = grace_seconds.filter(|grace| seconds < 0 || seconds > *grace) {
                    let mut why = "must be non-negative and less than terminationGracePeriodSeconds".to_owned();
                    _ = write!(why, " ({grace})");
                    errors.invalid_as(&action, seconds, why);
                }
            }
        }
    }
    if !found {
        errors.required(handler, "must specify a handler type");
    }
}

const HEADER_MESSAGE: &str = "a valid HTTP header must consist of alphanumeric characters or '-' (e.g. 'X-Header-Name', regex used for validation is '[-A-Za-z0-9]+')";

/// As `IsHTTPHeaderName`.
fn is_header_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}
