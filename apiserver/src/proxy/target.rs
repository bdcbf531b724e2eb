//! Where a request goes on to: which container, which node's kubelet, which pod or endpoint. Pure: from objects and the
//! request to an address and a path, or to the refusal that Kubernetes words so.

use crate::registry::object::{list, text};
use crate::server::request_info::Query;
use apimachinery::status::{FieldError, StatusError};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde_json::Value;
use url::form_urlencoded;

const KUBELET_PORT: u16 = 10250;
/// What a path segment may not hold as it is.
const SEGMENT: &AsciiSet =
    &CONTROLS.add(b' ').add(b'"').add(b'#').add(b'<').add(b'>').add(b'?').add(b'`').add(b'/').add(b'%');

/// A host and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    pub host: String,
    pub port: u16,
}

/// A name in a proxied path: `name`, `name:port`, `https:name:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub https: bool,
    pub name: String,
    /// A number or a port's name; empty for the default.
    pub port: String,
}

// === impl Address ===

impl Address {
    /// As a URL has it: IPv6 in brackets.
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

// === impl Named ===

impl Named {
    /// As `SplitSchemeNamePort`.
    pub fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split(':').collect();
        let (scheme, name, port) = match parts.as_slice() {
            [name] => ("", *name, ""),
            [name, port] => ("", *name, *port),
            [scheme, name, port] => (*scheme, *name, *port),
            _ => return None,
        };
        (matches!(scheme, "" | "http" | "https") && !name.is_empty()).then(|| Self {
            https: scheme == "https",
            name: name.to_owned(),
            port: port.to_owned(),
        })
    }
}

/// The kubelet of a node, by the kinds of addresses that are preferred.
pub fn kubelet(node: &Value, preferred: &[String]) -> Result<Address, StatusError> {
    let addresses = list(node, "/status/addresses");
    let host = preferred
        .iter()
        .find_map(|kind| addresses.iter().find(|a| text(a, "/type") == kind).map(|a| text(a, "/address").to_owned()))
        .filter(|host| !host.is_empty())
        .ok_or_else(|| StatusError::internal("no preferred addresses found; known addresses: []"))?;
    let port = node.pointer("/status/daemonEndpoints/kubeletEndpoint/Port").and_then(Value::as_u64);
    let port = port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0).unwrap_or(KUBELET_PORT);
    Ok(Address { host, port })
}

/// The container that is meant. As `validateContainer`.
pub fn container(pod: &Value, asked: &str) -> Result<String, StatusError> {
    let pod_name = text(pod, "/metadata/name");
    let names = |member: &str| -> Vec<&str> {
        list(pod, &format!("/spec/{member}")).iter().map(|container| text(container, "/name")).collect()
    };
    let (main, init, ephemeral) = (names("containers"), names("initContainers"), names("ephemeralContainers"));
    if !asked.is_empty() {
        if main.iter().chain(&init).chain(&ephemeral).any(|name| *name == asked) {
            return Ok(asked.to_owned());
        }
        return Err(StatusError::bad_request(format!("container {asked} is not valid for pod {pod_name}")));
    }
    match main.as_slice() {
        [only] => Ok((*only).to_owned()),
        [] => Err(StatusError::bad_request(format!("a container name must be specified for pod {pod_name}"))),
        _ => {
            let mut message =
                format!("a container name must be specified for pod {pod_name}, choose one of: [{}]", main.join(" "));
            if !init.is_empty() {
                message.push_str(&format!(" or one of the init containers: [{}]", init.join(" ")));
            }
            if !ephemeral.is_empty() {
                message.push_str(&format!(" or one of the ephemeral containers: [{}]", ephemeral.join(" ")));
            }
            Err(StatusError::bad_request(message))
        }
    }
}

/// As `ValidatePodLogOptions`.
pub fn check_log_options(pod: &str, query: &Query) -> Result<(), StatusError> {
    let mut errors = Vec::new();
    let mut number = |name: &'static str, least: i64, why: &str| -> Result<(), StatusError> {
        let given = query.get(name);
        if given.is_empty() {
            return Ok(());
        }
        let value: i64 = given
            .parse()
            .map_err(|_| StatusError::bad_request(format!("unable to convert {given:?} for {name} to a number")))?;
        if value < least {
            errors.push(FieldError::invalid(name, value, why));
        }
        Ok(())
    };
    number("tailLines", 0, "must be greater than or equal to 0")?;
    number("limitBytes", 1, "must be greater than 0")?;
    number("sinceSeconds", 1, "must be greater than 0")?;
    if !query.get("sinceSeconds").is_empty() && !query.get("sinceTime").is_empty() {
        errors.push(FieldError::forbidden("", "at most one of `sinceTime` or `sinceSeconds` may be specified"));
    }
    let stream = query.get("stream");
    if !matches!(stream, "" | "All" | "Stdout" | "Stderr") {
        errors.push(FieldError::not_supported("stream", stream, &["All", "Stdout", "Stderr"]));
    }
    if matches!(stream, "Stdout" | "Stderr") && !query.get("tailLines").is_empty() {
        errors.push(FieldError::forbidden("", "`tailLines` and specific `stream` are mutually exclusive for now"));
    }
    if errors.is_empty() { Ok(()) } else { Err(StatusError::invalid("", "PodLogOptions", pod, &errors)) }
}

/// The kubelet's path for a pod's log.
pub fn log_path(namespace: &str, pod: &str, container: &str, query: &Query) -> String {
    let mut parameters = form_urlencoded::Serializer::new(String::new());
    for flag in ["follow", "previous", "timestamps"] {
        if query.flag(flag) {
            parameters.append_pair(flag, "true");
        }
    }
    for value in ["limitBytes", "sinceSeconds", "sinceTime", "stream", "tailLines"] {
        if !query.get(value).is_empty() {
            parameters.append_pair(value, query.get(value));
        }
    }
    join(&["containerLogs", namespace, pod, container], &parameters.finish())
}

/// The kubelet's path for exec and attach. As `streamParams`.
pub fn stream_path(what: &str, namespace: &str, pod: &str, container: &str, query: &Query) -> String {
    let mut parameters = form_urlencoded::Serializer::new(String::new());
    for (ours, theirs) in [("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty")] {
        if query.flag(ours) {
            parameters.append_pair(theirs, "1");
        }
    }
    if what == "exec" {
        for word in query.all("command") {
            parameters.append_pair("command", word);
        }
    }
    join(&[what, namespace, pod, container], &parameters.finish())
}

pub fn port_forward_path(namespace: &str, pod: &str, query: &Query) -> String {
    let mut parameters = form_urlencoded::Serializer::new(String::new());
    for ports in query.all("ports") {
        for port in ports.split(',') {
            parameters.append_pair("port", port);
        }
    }
    join(&["portForward", namespace, pod], &parameters.finish())
}

fn join(segments: &[&str], query: &str) -> String {
    let path: String = segments.iter().map(|segment| format!("/{}", utf8_percent_encode(segment, SEGMENT))).collect();
    if query.is_empty() { path } else { format!("{path}?{query}") }
}

/// The address of a pod's port. As `ResourceLocation` of pods.
pub fn pod(pod: &Value, named: &Named) -> Result<Address, StatusError> {
    let ip = match text(pod, "/status/podIP") {
        "" => list(pod, "/status/podIPs").first().map_or("", |ip| text(ip, "/ip")),
        ip => ip,
    };
    if ip.is_empty() {
        return Err(StatusError::bad_request("address not allowed"));
    }
    let default = || {
        let ports = list(pod, "/spec/containers").iter().flat_map(|container| list(container, "/ports"));
        ports.filter_map(|port| port["containerPort"].as_u64()).find(|port| *port > 0)
    };
    let port = match named.port.as_str() {
        "" => default().and_then(|port| u16::try_from(port).ok()).unwrap_or(if named.https { 443 } else { 80 }),
        port => port.parse().map_err(|_| StatusError::bad_request(format!("invalid port {port:?}")))?,
    };
    Ok(Address { host: ip.to_owned(), port })
}

/// A ready endpoint behind a service's port; `pick` chooses one of so many. As `ResourceLocation` of services.
pub fn endpoint(
    service: &Value,
    slices: &[Value],
    named: &Named,
    pick: impl Fn(usize) -> usize,
) -> Result<Address, StatusError> {
    let ports = list(service, "/spec/ports");
    let port = match named.port.as_str() {
        "" if ports.len() == 1 => ports.first(),
        wanted => ports.iter().find(|port| {
            text(port, "/name") == wanted || port["port"].as_u64().is_some_and(|number| number.to_string() == wanted)
        }),
    };
    let Some(port) = port else {
        let what = format!("no service port {:?} found for service {:?}", named.port, named.name);
        return Err(StatusError::service_unavailable(what));
    };
    let port_name = text(port, "/name");
    let mut found: Vec<Address> = Vec::new();
    for slice in slices {
        let Some(number) =
            list(slice, "/ports").iter().find(|p| text(p, "/name") == port_name).and_then(|p| p["port"].as_u64())
        else {
            continue;
        };
        let Ok(number) = u16::try_from(number) else { continue };
        let ready =
            list(slice, "/endpoints").iter().filter(|e| e.pointer("/conditions/ready") != Some(&Value::Bool(false)));
        found.extend(
            ready
                .filter_map(|e| list(e, "/addresses").first())
                .filter_map(Value::as_str)
                .map(|host| Address { host: host.to_owned(), port: number }),
        );
    }
    if found.is_empty() {
        return Err(StatusError::service_unavailable(format!("no endpoints available for service {:?}", named.name)));
    }
    let at = pick(found.len()) % found.len();
    Ok(found.swap_remove(at))
}

/// What follows `…/proxy` in a raw path; None if nothing does, not even a slash.
pub fn rest(raw_path: &str, namespaced: bool) -> Option<&str> {
    // /api/v1/namespaces/ns/pods/name/proxy or /api/v1/nodes/name/proxy
    let segments = if namespaced { 7 } else { 5 };
    let mut slashes = raw_path.match_indices('/').map(|(at, _)| at).skip(segments);
    slashes.next().map(|at| &raw_path[at..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_node_is_reached_at_the_address_of_the_most_preferred_kind() {
        let node = json!({"status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}, {"type": "Hostname", "address": "n1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10260}}}});
        let kinds = |kinds: &[&str]| kinds.iter().map(|k| (*k).to_owned()).collect::<Vec<_>>();
        let address = kubelet(&node, &kinds(&["ExternalIP", "InternalIP", "Hostname"])).unwrap();
        assert_eq!(address, Address { host: "10.0.0.1".into(), port: 10260 });
        assert_eq!(kubelet(&json!({}), &kinds(&["Hostname"])).unwrap_err().code(), 500);
        assert_eq!(Address { host: "fd00::1".into(), port: 1 }.authority(), "[fd00::1]:1");
    }

    #[test]
    fn a_container_is_chosen_or_asked_for() {
        let pod = |main: &[&str], init: &[&str]| {
            let named = |names: &[&str]| names.iter().map(|name| json!({"name": name})).collect::<Vec<_>>();
            json!({"metadata": {"name": "p"}, "spec": {"containers": named(main), "initContainers": named(init)}})
        };
        for (pod, asked, expected) in [
            (pod(&["a"], &[]), "", Ok("a")),
            (pod(&["a"], &["i"]), "i", Ok("i")),
            (pod(&["a"], &[]), "x", Err("container x is not valid for pod p")),
            (pod(&["a", "b"], &[]), "", Err("a container name must be specified for pod p, choose one of: [a b]")),
            (
                pod(&["a", "b"], &["i"]),
                "",
                Err(
                    "a container name must be specified for pod p, choose one of: [a b] or one of the init containers: [i]",
                ),
            ),
        ] {
            let chosen = container(&pod, asked);
            let chosen = chosen.as_deref().map_err(|error| (error.code(), error.message().to_owned()));
            assert_eq!(chosen, expected.map_err(|why| (400, why.to_owned())));
        }
    }

    #[test]
    fn paths_speak_the_kubelets_language() {
        let query =
            Query::parse("container=c&stdin=true&stdout=1&stderr=false&tty=true&command=sh&command=-c&command=a%26b");
        assert_eq!(
            stream_path("exec", "ns", "p", "c", &query),
            "/exec/ns/p/c?input=1&output=1&tty=1&command=sh&command=-c&command=a%26b"
        );
        assert_eq!(stream_path("attach", "ns", "p", "c", &query), "/attach/ns/p/c?input=1&output=1&tty=1");
        let query = Query::parse("follow=true&tailLines=5&sinceTime=2026-01-01T00:00:00Z");
        assert_eq!(
            log_path("ns", "p", "c", &query),
            "/containerLogs/ns/p/c?follow=true&sinceTime=2026-01-01T00%3A00%3A00Z&tailLines=5"
        );
        assert_eq!(port_forward_path("ns", "p", &Query::parse("ports=80,81")), "/portForward/ns/p?port=80&port=81");
    }

    #[test]
    fn log_options_are_checked() {
        let check =
            |query: &str| check_log_options("p", &Query::parse(query)).map_err(|e| (e.code(), e.message().to_owned()));
        assert_eq!(check("tailLines=0&limitBytes=1&sinceSeconds=1"), Ok(()));
        assert_eq!(
            check("tailLines=-1"),
            Err((
                422,
                r#"PodLogOptions "p" is invalid: tailLines: Invalid value: -1: must be greater than or equal to 0"#
                    .into()
            ))
        );
        assert!(check("sinceSeconds=1&sinceTime=2026-01-01T00:00:00Z").is_err());
        assert_eq!(check("limitBytes=x").unwrap_err().0, 400);
    }

    #[test]
    fn proxied_names_and_paths_are_taken_apart() {
        let named = |https, name: &str, port: &str| Some(Named { https, name: name.into(), port: port.into() });
        for (text, expected) in [
            ("web", named(false, "web", "")),
            ("web:80", named(false, "web", "80")),
            ("https:web:443", named(true, "web", "443")),
            ("https:web:", named(true, "web", "")),
            ("ftp:web:1", None),
            (":80", None),
        ] {
            assert_eq!(Named::parse(text), expected, "{text}");
        }
        assert_eq!(rest("/api/v1/namespaces/a/pods/p/proxy/x/y%20z/", true), Some("/x/y%20z/"));
        assert_eq!(rest("/api/v1/namespaces/a/pods/p/proxy/", true), Some("/"));
        assert_eq!(rest("/api/v1/namespaces/a/pods/p/proxy", true), None);
        assert_eq!(rest("/api/v1/nodes/n/proxy/metrics", false), Some("/metrics"));
    }

    #[test]
    fn a_service_is_reached_at_a_ready_endpoint() {
        let service = json!({"spec": {"ports": [{"name": "http", "port": 80}, {"name": "admin", "port": 81}]}});
        let slice = json!({"ports": [{"name": "http", "port": 8080}], "endpoints": [
            {"addresses": ["10.0.0.1"], "conditions": {"ready": false}}, {"addresses": ["10.0.0.2"], "conditions": {"ready": true}}]});
        let reach = |name: &str| endpoint(&service, std::slice::from_ref(&slice), &Named::parse(name).unwrap(), |_| 7);
        let expected = Address { host: "10.0.0.2".into(), port: 8080 };
        assert_eq!(reach("s:http"), Ok(expected.clone()));
        assert_eq!(reach("s:80"), Ok(expected));
        assert_eq!(reach("s:admin").unwrap_err().message(), r#"no endpoints available for service "s""#);
        assert_eq!(reach("s").unwrap_err().code(), 503);
        let running =
            json!({"status": {"podIP": "10.1.1.1"}, "spec": {"containers": [{"ports": [{"containerPort": 8080}]}]}});
        assert_eq!(pod(&running, &Named::parse("p").unwrap()).unwrap().authority(), "10.1.1.1:8080");
        assert_eq!(pod(&json!({}), &Named::parse("p").unwrap()).unwrap_err().code(), 400);
    }
}
