//! Pods, and the pod templates of workloads.

use serde_json::Value;

use super::{Description, annotation_lines, controlled_by, date, labels_line, map_lines, or_none};
use crate::objects::{items, name, namespace, number, text};
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
    let column = pairs.iter().map(|(key, _)| key.len()).max().unwrap_or(0).max("Annotations".len()) + 3;
    pairs.push(("Labels", map_lines(pod.pointer("/metadata/labels"), column)));
    pairs.push(("Annotations", annotation_lines(pod, column)));
    let status = match text(pod, "/metadata/deletionTimestamp") {
        "" => text(pod, "/status/phase").to_owned(),
        deleted => format!("Terminating (since {})", date(deleted)),
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
        out.line("IPs:              <none>");
    } else {
        out.line("IPs:");
        for address in addresses {
            out.line(format!("  IP:  {}", text(address, "/ip")));
        }
    }
    if let Some(owner) = controlled_by(pod) {
        out.line(format!("Controlled By:  {owner}"));
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
        let width = conditions.iter().map(|c| text(c, "/type").len()).max().unwrap_or(4) + 2;
        out.line(format!("  {:<width$}Status", "Type"));
        for condition in conditions {
            out.line(format!("  {:<width$}{}", text(condition, "/type"), text(condition, "/status")));
        }
    }
    volumes(items(pod, "/spec/volumes"), 0, out);
    if !text(pod, "/status/qosClass").is_empty() {
        out.line(format!("{:<29}{}", "QoS Class:", text(pod, "/status/qosClass")));
    }
    scheduling(pod.pointer("/spec").unwrap_or(&Value::Null), out);
}

/// The pod template of a workload, or of a revision of one.
pub(crate) fn template(template: &Value) -> String {
    let mut out = Description::default();
    out.pairs(2, &[("Labels", map_lines(template.pointer("/metadata/labels"), 11))]);
    if template.pointer("/metadata/annotations").is_some() {
        out.pairs(2, &[("Annotations", annotation_lines(template, 16))]);
    }
    if !text(template, "/spec/serviceAccountName").is_empty() {
        out.line(format!("  Service Account:  {}", text(template, "/spec/serviceAccountName")));
    }
    containers("Init Containers", items(template, "/spec/initContainers"), &[], 2, &mut out);
    containers("Containers", items(template, "/spec/containers"), &[], 2, &mut out);
    volumes(items(template, "/spec/volumes"), 2, &mut out);
    out.text
}

fn containers(title: &str, specs: &[Value], statuses: &[Value], indent: usize, out: &mut Description) {
    if specs.is_empty() {
        return;
    }
    let pad = " ".repeat(indent);
    out.line(format!("{pad}{title}:"));
    for spec in specs {
        let container = text(spec, "/name");
        out.line(format!("{pad}  {container}:"));
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
        out.pairs(indent + 4, &pairs);
        for (title, path) in [("Command", "/command"), ("Args", "/args")] {
            let words = items(spec, path);
            if !words.is_empty() {
                out.line(format!("{pad}    {title}:"));
                for word in words {
                    out.line(format!("{pad}      {}", plain(word).replace('\n', "\\n")));
                }
            }
        }
        if let Some(status) = status {
            state("State", &status["state"], indent, out);
            if status["lastState"].as_object().is_some_and(|state| !state.is_empty()) {
                state("Last State", &status["lastState"], indent, out);
            }
            let ready = if status["ready"] == true { "True" } else { "False" };
            out.pairs(
                indent + 4,
                &[("Ready", ready.to_owned()), ("Restart Count", number(status, "/restartCount").to_string())],
            );
        }
        for (title, path) in [("Limits", "/resources/limits"), ("Requests", "/resources/requests")] {
            if let Some(amounts) = spec.pointer(path).and_then(Value::as_object).filter(|amounts| !amounts.is_empty()) {
                out.line(format!("{pad}    {title}:"));
                for (resource, amount) in amounts {
                    out.line(format!("{pad}      {:<9}{}", format!("{resource}:"), plain(amount)));
                }
            }
        }
        for (title, field) in
            [("Liveness", "livenessProbe"), ("Readiness", "readinessProbe"), ("Startup", "startupProbe")]
        {
            if let Some(probe) = spec.get(field) {
                out.line(format!("{pad}    {:<12}{}", format!("{title}:"), probe_text(probe)));
            }
        }
        environment(spec, &pad, out);
        let mounts = items(spec, "/volumeMounts");
        if mounts.is_empty() {
            out.line(format!("{pad}    Mounts:       <none>"));
        } else {
            out.line(format!("{pad}    Mounts:"));
            for mount in mounts {
                let mode = if mount["readOnly"] == true { "ro" } else { "rw" };
                let sub = match text(mount, "/subPath") {
                    "" => String::new(),
                    path => format!(",path={path:?}"),
                };
                out.line(format!(
                    "{pad}      {} from {} ({mode}{sub})",
                    text(mount, "/mountPath"),
                    text(mount, "/name")
                ));
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

fn state(title: &str, state: &Value, indent: usize, out: &mut Description) {
    let title = format!("{title}:");
    let pad = " ".repeat(indent + 4);
    let detail = |out: &mut Description, key: &str, value: String| {
        out.line(format!("{pad}  {:<14}{value}", format!("{key}:")));
    };
    if let Some(running) = state.get("running") {
        out.line(format!("{pad}{title:<16}Running"));
        detail(out, "Started", date(text(running, "/startedAt")));
    } else if let Some(waiting) = state.get("waiting") {
        out.line(format!("{pad}{title:<16}Waiting"));
        if !text(waiting, "/reason").is_empty() {
            detail(out, "Reason", text(waiting, "/reason").to_owned());
        }
    } else if let Some(ended) = state.get("terminated") {
        out.line(format!("{pad}{title:<16}Terminated"));
        for (key, path) in [("Reason", "/reason"), ("Message", "/message")] {
            if !text(ended, path).is_empty() {
                detail(out, key, text(ended, path).to_owned());
            }
        }
        detail(out, "Exit Code", number(ended, "/exitCode").to_string());
        detail(out, "Started", date(text(ended, "/startedAt")));
        detail(out, "Finished", date(text(ended, "/finishedAt")));
    } else {
        out.line(format!("{pad}{title:<16}Waiting"));
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

fn environment(spec: &Value, pad: &str, out: &mut Description) {
    let sources = items(spec, "/envFrom");
    if !sources.is_empty() {
        out.line(format!("{pad}    Environment Variables from:"));
        for source in sources {
            for (field, title) in [("configMapRef", "ConfigMap"), ("secretRef", "Secret")] {
                if let Some(reference) = source.get(field) {
                    let optional = reference["optional"] == true;
                    out.line(format!("{pad}      {}  {title}  Optional: {optional}", text(reference, "/name")));
                }
            }
        }
    }
    let variables = items(spec, "/env");
    if variables.is_empty() {
        out.line(format!("{pad}    Environment:  <none>"));
        return;
    }
    out.line(format!("{pad}    Environment:"));
    let width = variables.iter().map(|variable| text(variable, "/name").len()).max().unwrap_or(0) + 3;
    for variable in variables {
        let from = &variable["valueFrom"];
        let value = if let Some(field) = from.get("fieldRef") {
            let version = field["apiVersion"].as_str().unwrap_or("v1");
            format!(" ({version}:{})", text(field, "/fieldPath"))
        } else if let Some(resource) = from.get("resourceFieldRef") {
            format!(" ({})", text(resource, "/resource"))
        } else if let Some(key) = from.get("secretKeyRef") {
            format!("<set to the key '{}' in secret '{}'>", text(key, "/key"), text(key, "/name"))
        } else if let Some(key) = from.get("configMapKeyRef") {
            format!("<set to the key '{}' of config map '{}'>", text(key, "/key"), text(key, "/name"))
        } else {
            text(variable, "/value").to_owned()
        };
        out.line(format!("{pad}      {:<width$}{value}", format!("{}:", text(variable, "/name"))));
    }
}

fn volumes(volumes: &[Value], indent: usize, out: &mut Description) {
    let pad = " ".repeat(indent);
    if volumes.is_empty() {
        out.line(format!("{pad}Volumes:{}<none>", if indent == 0 { "                     " } else { "         " }));
        return;
    }
    out.line(format!("{pad}Volumes:"));
    for volume in volumes {
        out.line(format!("{pad}  {}:", text(volume, "/name")));
        let source = volume.as_object().into_iter().flatten().find(|(field, _)| *field != "name");
        let Some((kind, source)) = source else { continue };
        let mut pairs = vec![("Type", format!("{}{}", kind[..1].to_uppercase(), &kind[1..]))];
        for (title, path) in [
            ("Name", "/name"),
            ("SecretName", "/secretName"),
            ("ClaimName", "/claimName"),
            ("Path", "/path"),
            ("HostPathType", "/type"),
            ("Medium", "/medium"),
            ("SizeLimit", "/sizeLimit"),
            ("Driver", "/driver"),
        ] {
            if let Some(value) = source.pointer(path) {
                pairs.push((title, plain(value)));
            }
        }
        if kind == "projected" {
            for part in items(source, "/sources") {
                if let Some(token) = part.get("serviceAccountToken") {
                    pairs.push(("TokenExpirationSeconds", number(token, "/expirationSeconds").to_string()));
                }
                if let Some(map) = part.get("configMap") {
                    pairs.push(("ConfigMapName", text(map, "/name").to_owned()));
                }
                if let Some(secret) = part.get("secret") {
                    pairs.push(("SecretName", text(secret, "/name").to_owned()));
                }
                if part.get("downwardAPI").is_some() {
                    pairs.push(("DownwardAPI", "true".to_owned()));
                }
            }
        }
        out.pairs(indent + 4, &pairs);
    }
}

fn scheduling(spec: &Value, out: &mut Description) {
    out.line(format!("{:<29}{}", "Node-Selectors:", labels_line(spec.get("nodeSelector"))));
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
                words.push_str(&format!(" for {}", super::seconds(seconds)));
            }
            words
        })
        .collect();
    let text =
        if tolerations.is_empty() { "<none>".to_owned() } else { tolerations.join(&format!("\n{}", " ".repeat(29))) };
    out.line(format!("{:<29}{text}", "Tolerations:"));
}
