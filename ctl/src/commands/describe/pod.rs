//! Pods, and the pod templates of workloads.

use serde_json::Value;

use super::{Description, annotation_lines, controlled_by, date, map_lines, or_none};
use crate::objects::{items, name, namespace, number, text};
use crate::output::age;
use crate::output::jsonpath::plain;

pub(super) fn describe(pod: &Value, out: &mut Description) {
    let started = text(pod, "/status/startTime");
    let mut pairs = vec![("Name", name(pod).to_owned()), ("Namespace", namespace(pod).to_owned())];
    if let Some(priority) = pod.pointer("/spec/priority") {
        pairs.push(("Priority", plain(priority)));
    }
    for (key, path) in [
        ("Priority Class Name", "/spec/priorityClassName"),
        ("Runtime Class Name", "/spec/runtimeClassName"),
        ("Service Account", "/spec/serviceAccountName"),
    ] {
        if !text(pod, path).is_empty() {
            pairs.push((key, text(pod, path).to_owned()));
        }
    }
    let node = match (text(pod, "/spec/nodeName"), text(pod, "/status/hostIP")) {
        ("", _) => "<none>".to_owned(),
        (node, address) => format!("{node}/{address}"),
    };
    pairs.push(("Node", node));
    if !started.is_empty() {
        pairs.push(("Start Time", date(started)));
    }
    pairs.push(("Labels", map_lines(pod.pointer("/metadata/labels"), 0)));
    pairs.push(("Annotations", annotation_lines(pod)));
    let status = match text(pod, "/metadata/deletionTimestamp") {
        "" => text(pod, "/status/phase").to_owned(),
        deleted => format!("Terminating (lasts {})", age(deleted)),
    };
    pairs.push(("Status", status));
    if pod.pointer("/metadata/deletionGracePeriodSeconds").is_some() {
        pairs.push(("Termination Grace Period", format!("{}s", number(pod, "/metadata/deletionGracePeriodSeconds"))));
    }
    for (key, path) in [("Reason", "/status/reason"), ("Message", "/status/message")] {
        if !text(pod, path).is_empty() {
            pairs.push((key, text(pod, path).to_owned()));
        }
    }
    pairs.push(("IP", text(pod, "/status/podIP").to_owned()));
    out.pairs(0, &pairs);
    let addresses = items(pod, "/status/podIPs");
    if addresses.is_empty() {
        out.line("IPs:\t<none>");
    } else {
        out.line("IPs:\t");
        for address in addresses {
            out.line(format!("  IP:\t{}", text(address, "/ip")));
        }
    }
    if let Some(owner) = controlled_by(pod) {
        out.line(format!("Controlled By:\t{owner}"));
    }
    containers(
        "Init Containers",
        items(pod, "/spec/initContainers"),
        items(pod, "/status/initContainerStatuses"),
        0,
        out,
    );
    containers("Containers", items(pod, "/spec/containers"), items(pod, "/status/containerStatuses"), 0, out);
    containers(
        "Ephemeral Containers",
        items(pod, "/spec/ephemeralContainers"),
        items(pod, "/status/ephemeralContainerStatuses"),
        0,
        out,
    );
    let conditions = items(pod, "/status/conditions");
    if !conditions.is_empty() {
        out.line("Conditions:");
        out.line("  Type\tStatus");
        for condition in conditions {
            out.line(format!("  {} \t{} ", text(condition, "/type"), text(condition, "/status")));
        }
    }
    volumes(items(pod, "/spec/volumes"), 0, out);
    if !text(pod, "/status/qosClass").is_empty() {
        out.line(format!("QoS Class:\t{}", text(pod, "/status/qosClass")));
    }
    scheduling(pod.pointer("/spec").unwrap_or(&Value::Null), 0, out);
}

/// The pod template of a workload, or of a revision of one, tabs and all.
pub(crate) fn template(template: &Value) -> String {
    let mut out = Description::default();
    out.pairs(2, &[("Labels", map_lines(template.pointer("/metadata/labels"), 0))]);
    if template.pointer("/metadata/annotations").is_some() {
        out.pairs(2, &[("Annotations", annotation_lines(template))]);
    }
    if !text(template, "/spec/serviceAccountName").is_empty() {
        out.line(format!("  Service Account:\t{}", text(template, "/spec/serviceAccountName")));
    }
    containers("Init Containers", items(template, "/spec/initContainers"), &[], 2, &mut out);
    containers("Containers", items(template, "/spec/containers"), &[], 2, &mut out);
    volumes(items(template, "/spec/volumes"), 2, &mut out);
    scheduling(template.pointer("/spec").unwrap_or(&Value::Null), 2, &mut out);
    out.text
}

fn containers(title: &str, specs: &[Value], statuses: &[Value], indent: usize, out: &mut Description) {
    if specs.is_empty() {
        return;
    }
    out.line(format!("{}{title}:", " ".repeat(indent)));
    for spec in specs {
        let container = text(spec, "/name");
        // In a template names stand one deeper; what is below them does not.
        out.line(format!("  {}{container}:", if indent > 0 { " " } else { "" }));
        let status = statuses.iter().find(|status| text(status, "/name") == container);
        let mut pairs: Vec<(&str, String)> = Vec::new();
        if let Some(status) = status {
            pairs.push(("Container ID", text(status, "/containerID").to_owned()));
        }
        pairs.push(("Image", text(spec, "/image").to_owned()));
        if let Some(status) = status {
            pairs.push(("Image ID", text(status, "/imageID").to_owned()));
        }
        let (ports, host_ports) = (ports(spec, "containerPort"), ports(spec, "hostPort"));
        pairs.push((if ports.contains(',') { "Ports" } else { "Port" }, or_none(ports)));
        pairs.push((if host_ports.contains(',') { "Host Ports" } else { "Host Port" }, or_none(host_ports)));
        out.pairs(4, &pairs);
        for (title, path) in [("Command", "/command"), ("Args", "/args")] {
            let words = items(spec, path);
            if !words.is_empty() {
                out.line(format!("    {title}:"));
                for word in words {
                    out.line(format!("      {}", plain(word).replace('\n', "\n      ")));
                }
            }
        }
        if let Some(status) = status {
            state("State", &status["state"], out);
            if status["lastState"].get("terminated").is_some() {
                state("Last State", &status["lastState"], out);
            }
            let ready = if status["ready"] == true { "True" } else { "False" };
            out.pairs(
                4,
                &[("Ready", ready.to_owned()), ("Restart Count", number(status, "/restartCount").to_string())],
            );
        }
        for (title, path) in [("Limits", "/resources/limits"), ("Requests", "/resources/requests")] {
            if let Some(amounts) = spec.pointer(path).and_then(Value::as_object).filter(|amounts| !amounts.is_empty()) {
                out.line(format!("    {title}:"));
                for (resource, amount) in amounts {
                    out.line(format!("      {resource}:\t{}", plain(amount)));
                }
            }
        }
        for (title, field) in
            [("Liveness", "livenessProbe"), ("Readiness", "readinessProbe"), ("Startup", "startupProbe")]
        {
            if let Some(probe) = spec.get(field) {
                out.line(format!("    {title}:\t{}", probe_text(probe)));
            }
        }
        environment(spec, out);
        let mounts = items(spec, "/volumeMounts");
        if mounts.is_empty() {
            out.line("    Mounts:\t<none>");
        } else {
            out.line("    Mounts:");
            for mount in mounts {
                let mode = if mount["readOnly"] == true { "ro" } else { "rw" };
                let sub = match text(mount, "/subPath") {
                    "" => String::new(),
                    path => format!(",path={path:?}"),
                };
                out.line(format!("      {} from {} ({mode}{sub})", text(mount, "/mountPath"), text(mount, "/name")));
            }
        }
    }
}

fn ports(spec: &Value, field: &str) -> String {
    let ports = items(spec, "/ports").iter();
    let shown = ports.map(|port| {
        let named = match (field, text(port, "/name")) {
            ("containerPort", name) if !name.is_empty() => format!(" ({name})"),
            _ => String::new(),
        };
        let protocol = port["protocol"].as_str().unwrap_or("TCP");
        format!("{}/{protocol}{named}", number(port, &format!("/{field}")))
    });
    shown.collect::<Vec<_>>().join(", ")
}

fn state(title: &str, state: &Value, out: &mut Description) {
    let detail = |out: &mut Description, key: &str, value: String| out.line(format!("      {key}:\t{value}"));
    if let Some(running) = state.get("running") {
        out.line(format!("    {title}:\tRunning"));
        detail(out, "Started", date(text(running, "/startedAt")));
    } else if let Some(ended) = state.get("terminated") {
        out.line(format!("    {title}:\tTerminated"));
        for (key, path) in [("Reason", "/reason"), ("Message", "/message")] {
            if !text(ended, path).is_empty() {
                detail(out, key, text(ended, path).to_owned());
            }
        }
        detail(out, "Exit Code", number(ended, "/exitCode").to_string());
        if number(ended, "/signal") > 0 {
            detail(out, "Signal", number(ended, "/signal").to_string());
        }
        detail(out, "Started", date(text(ended, "/startedAt")));
        detail(out, "Finished", date(text(ended, "/finishedAt")));
    } else {
        out.line(format!("    {title}:\tWaiting"));
        if !text(state, "/waiting/reason").is_empty() {
            detail(out, "Reason", text(state, "/waiting/reason").to_owned());
        }
    }
}

fn probe_text(probe: &Value) -> String {
    let times = format!(
        "delay={}s timeout={}s period={}s #success={} #failure={}",
        number(probe, "/initialDelaySeconds"),
        number(probe, "/timeoutSeconds"),
        number(probe, "/periodSeconds"),
        number(probe, "/successThreshold"),
        number(probe, "/failureThreshold")
    );
    let what = if let Some(exec) = probe.get("exec") {
        let words: Vec<String> = items(exec, "/command").iter().map(plain).collect();
        format!("exec [{}]", words.join(" "))
    } else if let Some(get) = probe.get("httpGet") {
        let scheme = get["scheme"].as_str().unwrap_or("HTTP").to_lowercase();
        format!("http-get {scheme}://{}:{}{}", text(get, "/host"), plain(&get["port"]), text(get, "/path"))
    } else if let Some(socket) = probe.get("tcpSocket") {
        format!("tcp-socket {}:{}", text(socket, "/host"), plain(&socket["port"]))
    } else if let Some(grpc) = probe.get("grpc") {
        format!("grpc <pod>:{} {}", plain(&grpc["port"]), text(grpc, "/service"))
    } else {
        "unknown".to_owned()
    };
    format!("{what} {times}")
}

fn environment(spec: &Value, out: &mut Description) {
    let sources = items(spec, "/envFrom");
    if !sources.is_empty() {
        out.line("    Environment Variables from:");
        for source in sources {
            for (field, title) in [("configMapRef", "ConfigMap"), ("secretRef", "Secret")] {
                if let Some(reference) = source.get(field) {
                    let prefix = match text(source, "/prefix") {
                        "" => String::new(),
                        prefix => format!(" with prefix '{prefix}'"),
                    };
                    let optional = reference["optional"] == true;
                    out.line(format!("      {}\t{title}{prefix}\tOptional: {optional}", text(reference, "/name")));
                }
            }
        }
    }
    let variables = items(spec, "/env");
    if variables.is_empty() {
        out.line("    Environment:\t<none>");
        return;
    }
    out.line("    Environment:");
    for variable in variables {
        let from = &variable["valueFrom"];
        let optional = |key: &Value| key["optional"] == true;
        let value = if let Some(field) = from.get("fieldRef") {
            let version = field["apiVersion"].as_str().unwrap_or("v1");
            format!(" ({version}:{})", text(field, "/fieldPath"))
        } else if let Some(resource) = from.get("resourceFieldRef") {
            format!(" ({})", text(resource, "/resource"))
        } else if let Some(key) = from.get("secretKeyRef") {
            let (name, secret) = (text(key, "/key"), text(key, "/name"));
            format!("<set to the key '{name}' in secret '{secret}'>\tOptional: {}", optional(key))
        } else if let Some(key) = from.get("configMapKeyRef") {
            let (name, map) = (text(key, "/key"), text(key, "/name"));
            format!("<set to the key '{name}' of config map '{map}'>\tOptional: {}", optional(key))
        } else {
            text(variable, "/value").replace('\n', "\n      \t")
        };
        out.line(format!("      {}:\t{value}", text(variable, "/name")));
    }
}

/// What kubectl says a source of a volume is, and which of its fields it shows, with what stands for nothing.
const VOLUME_SOURCES: &[(&str, &str, &[(&str, &str, &str)])] = &[
    ("hostPath", "HostPath (bare host directory volume)", &[("Path", "/path", ""), ("HostPathType", "/type", "")]),
    (
        "emptyDir",
        "EmptyDir (a temporary directory that shares a pod's lifetime)",
        &[("Medium", "/medium", ""), ("SizeLimit", "/sizeLimit", "<unset>")],
    ),
    (
        "secret",
        "Secret (a volume populated by a Secret)",
        &[("SecretName", "/secretName", ""), ("Optional", "/optional", "false")],
    ),
    (
        "configMap",
        "ConfigMap (a volume populated by a ConfigMap)",
        &[("Name", "/name", ""), ("Optional", "/optional", "false")],
    ),
    (
        "persistentVolumeClaim",
        "PersistentVolumeClaim (a reference to a PersistentVolumeClaim in the same namespace)",
        &[("ClaimName", "/claimName", ""), ("ReadOnly", "/readOnly", "false")],
    ),
    (
        "csi",
        "CSI (a Container Storage Interface (CSI) volume source)",
        &[("Driver", "/driver", ""), ("FSType", "/fsType", ""), ("ReadOnly", "/readOnly", "false")],
    ),
    (
        "nfs",
        "NFS (an NFS mount that lasts the lifetime of a pod)",
        &[("Server", "/server", ""), ("Path", "/path", ""), ("ReadOnly", "/readOnly", "false")],
    ),
    ("downwardAPI", "DownwardAPI (a volume populated by information about the pod)", &[]),
    ("projected", "Projected (a volume that contains injected data from multiple sources)", &[]),
];

fn volumes(volumes: &[Value], indent: usize, out: &mut Description) {
    let pad = " ".repeat(indent);
    if volumes.is_empty() {
        out.line(format!("{pad}Volumes:\t<none>"));
        return;
    }
    out.line(format!("{pad}Volumes:"));
    for volume in volumes {
        out.line(format!("  {}{}:", if indent > 0 { " " } else { "" }, text(volume, "/name")));
        let Some((kind, source)) = volume.as_object().into_iter().flatten().find(|(field, _)| *field != "name") else {
            out.line("    <unknown>");
            continue;
        };
        let known = VOLUME_SOURCES.iter().find(|(known, ..)| known == kind);
        out.line(format!("    Type:\t{}", known.map_or(kind.as_str(), |(_, words, _)| words)));
        for (title, path, unset) in known.map_or(&[][..], |(_, _, fields)| fields) {
            let value = source.pointer(path).map_or_else(|| (*unset).to_owned(), plain);
            out.line(format!("    {title}:\t{value}"));
        }
        if kind == "downwardAPI" {
            out.line("    Items:");
            for item in items(source, "/items") {
                out.line(format!("      {} -> {}", text(item, "/fieldRef/fieldPath"), text(item, "/path")));
            }
        }
        for part in items(source, "/sources") {
            let optional = |source: &Value| source.get("optional").map_or_else(|| "<nil>".to_owned(), plain);
            if let Some(secret) = part.get("secret") {
                out.line(format!("    SecretName:\t{}", text(secret, "/name")));
                out.line(format!("    SecretOptionalName:\t{}", optional(secret)));
            } else if part.get("downwardAPI").is_some() {
                out.line("    DownwardAPI:\ttrue");
            } else if let Some(map) = part.get("configMap") {
                out.line(format!("    ConfigMapName:\t{}", text(map, "/name")));
                out.line(format!("    ConfigMapOptional:\t{}", optional(map)));
            } else if let Some(token) = part.get("serviceAccountToken") {
                out.line(format!("    TokenExpirationSeconds:\t{}", number(token, "/expirationSeconds")));
            }
        }
    }
}

fn scheduling(spec: &Value, indent: usize, out: &mut Description) {
    let pad = " ".repeat(indent);
    out.line(format!("{pad}Node-Selectors:\t{}", map_lines(spec.get("nodeSelector"), indent)));
    let tolerations: Vec<String> = items(spec, "/tolerations")
        .iter()
        .map(|toleration| {
            let mut words = text(toleration, "/key").to_owned();
            if !text(toleration, "/value").is_empty() {
                words.push_str(&format!("={}", text(toleration, "/value")));
            }
            if !text(toleration, "/effect").is_empty() {
                words.push_str(&format!(":{}", text(toleration, "/effect")));
            }
            if text(toleration, "/operator") == "Exists" {
                words.push_str(if words.is_empty() { "op=Exists" } else { " op=Exists" });
            }
            if let Some(seconds) = toleration["tolerationSeconds"].as_i64() {
                words.push_str(&format!(" for {seconds}s"));
            }
            words
        })
        .collect();
    out.line(format!("{pad}Tolerations:\t{}", or_none(tolerations.join(&format!("\n{pad}\t")))));
}
