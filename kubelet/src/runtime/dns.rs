//! Names: a pod's resolver configuration, host name, and `/etc/hosts`. Pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use k8s_openapi::api::core::v1::{HostAlias, Pod};
use proto::cri as pb;

use super::pods::{host_network, uid_of};

/// Limits of resolvers that pods are held to.
const MAX_SERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
const MAX_SEARCH_CHARS: usize = 2048;
/// A host name's limit in the kernel, less the zero.
const MAX_HOSTNAME: usize = 63;
/// The option that makes names with fewer than five dots try the search list first.
const CLUSTER_OPTIONS: &str = "ndots:5";

/// What the node knows about names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeDns {
    pub cluster_dns: Vec<String>,
    pub cluster_domain: String,
    /// The host's resolv.conf, parsed.
    pub host: Resolver,
}

/// The three lists of a resolv.conf.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolver {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// Parses a resolv.conf; the last `search` line counts. As `parseResolvConf`.
pub fn parse_resolv_conf(text: &str) -> Resolver {
    let mut out = Resolver::default();
    for line in text.lines() {
        let line = line.trim();
        if line.starts_with('#') || line.starts_with(';') {
            continue;
        }
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => out.servers.extend(words.next().map(str::to_owned)),
            Some("search") => {
                out.searches =
                    words.map(|w| if w == "." { w.to_owned() } else { w.trim_end_matches('.').to_owned() }).collect();
            }
            Some("options") => out.options.extend(words.map(str::to_owned)),
            _ => {}
        }
    }
    out
}

/// The resolver configuration of a pod by its `dnsPolicy` and `dnsConfig`. As `GetPodDNS`.
pub fn pod_dns(pod: &Pod, node: &NodeDns) -> pb::DnsConfig {
    form(pod, node).0
}

/// What could not be had of a pod's resolver configuration, as events: the reason and what is told.
pub fn omissions(pod: &Pod, node: &NodeDns) -> Vec<(&'static str, String)> {
    let (applied, (servers, searches)) = form(pod, node);
    let mut found = Vec::new();
    let policy = pod.spec.as_ref().and_then(|s| s.dns_policy.as_deref()).unwrap_or("ClusterFirst");
    let wants_cluster = policy == "ClusterFirstWithHostNet" || policy == "ClusterFirst" && !host_network(pod);
    if wants_cluster && node.cluster_dns.is_empty() {
        let name = format!(
            "{}_{}({})",
            pod.metadata.name.as_deref().unwrap_or_default(),
            pod.metadata.namespace.as_deref().unwrap_or_default(),
            uid_of(pod)
        );
        found.push(("MissingClusterDNS", format!("pod: {name:?}. kubelet does not have ClusterDNS IP configured and cannot create Pod using \"ClusterFirst\" policy. Falling back to \"Default\" policy.")));
    }
    if searches > applied.searches.len() {
        let line = applied.searches.join(" ");
        found.push(("DNSConfigForming", format!("Search Line limits were exceeded, some search paths have been omitted, the applied search line is: {line}")));
    }
    if servers > applied.servers.len() {
        let line = applied.servers.join(" ");
        found.push(("DNSConfigForming", format!("Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: {line}")));
    }
    found
}

/// The configuration, and how many servers and search paths were asked for.
fn form(pod: &Pod, node: &NodeDns) -> (pb::DnsConfig, (usize, usize)) {
    let spec = pod.spec.clone().unwrap_or_default();
    let on_host = spec.host_network == Some(true);
    let cluster = |node: &NodeDns| -> Resolver {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let mut searches = Vec::new();
        if !node.cluster_domain.is_empty() {
            let domain = &node.cluster_domain;
            searches = vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()];
        }
        searches.extend(node.host.searches.iter().cloned());
        Resolver { servers: node.cluster_dns.clone(), searches, options: vec![CLUSTER_OPTIONS.to_owned()] }
    };
    let mut dns = match spec.dns_policy.as_deref().unwrap_or("ClusterFirst") {
        "None" => Resolver::default(),
        "ClusterFirstWithHostNet" if !node.cluster_dns.is_empty() => cluster(node),
        "ClusterFirst" if !on_host && !node.cluster_dns.is_empty() => cluster(node),
        _ => node.host.clone(),
    };
    if let Some(config) = spec.dns_config {
        dns.servers.extend(config.nameservers.unwrap_or_default());
        dns.searches.extend(config.searches.unwrap_or_default());
        merge_options(
            &mut dns.options,
            config.options.unwrap_or_default().into_iter().map(|o| (o.name.unwrap_or_default(), o.value)),
        );
    }
    dedup(&mut dns.servers);
    dedup(&mut dns.searches);
    let asked = (dns.servers.len(), dns.searches.len());
    dns.servers.truncate(MAX_SERVERS);
    limit_searches(&mut dns.searches);
    (pb::DnsConfig { servers: dns.servers, searches: dns.searches, options: dns.options }, asked)
}

fn dedup(list: &mut Vec<String>) {
    let mut seen = std::collections::BTreeSet::new();
    list.retain(|item| seen.insert(item.clone()));
}

fn limit_searches(searches: &mut Vec<String>) {
    searches.truncate(MAX_SEARCHES);
    let mut chars = 0;
    let fits = searches.iter().take_while(|s| {
        chars += s.len() + 1;
        chars <= MAX_SEARCH_CHARS + 1
    });
    let count = fits.count();
    searches.truncate(count);
}

/// Options of the pod replace those of the same name.
fn merge_options(options: &mut Vec<String>, over: impl Iterator<Item = (String, Option<String>)>) {
    for (name, value) in over {
        options.retain(|o| o.split(':').next() != Some(name.as_str()));
        options.push(match value {
            Some(value) if !value.is_empty() => format!("{name}:{value}"),
            _ => name,
        });
    }
}

/// The pod's host name and, if it is in a subdomain, its domain. As `GeneratePodHostNameAndDomain`.
pub fn hostname_and_domain(pod: &Pod, cluster_domain: &str) -> (String, String) {
    let spec = pod.spec.clone().unwrap_or_default();
    if let Some(name) = spec.hostname_override {
        return (name, String::new());
    }
    let mut hostname = pod.metadata.name.clone().unwrap_or_default();
    if hostname.len() > MAX_HOSTNAME {
        hostname.truncate(MAX_HOSTNAME);
        hostname = hostname.trim_end_matches(['-', '.']).to_owned();
    }
    if let Some(own) = spec.hostname.filter(|h| !h.is_empty()) {
        hostname = own;
    }
    let domain = match spec.subdomain.filter(|s| !s.is_empty()) {
        Some(subdomain) => {
            format!("{subdomain}.{}.svc.{cluster_domain}", pod.metadata.namespace.as_deref().unwrap_or("default"))
        }
        None => String::new(),
    };
    (hostname, domain)
}

/// Refuses a fully qualified name that the kernel cannot hold. As `GeneratePodHostNameAndDomain` with `setHostnameAsFQDN`.
pub fn check_fqdn(pod: &Pod, (hostname, domain): &(String, String)) -> Result<(), String> {
    const MAX_FQDN: usize = 64;
    let wanted = pod.spec.as_ref().and_then(|s| s.set_hostname_as_fqdn) == Some(true);
    let chars = hostname.len() + 1 + domain.len();
    if !wanted || domain.is_empty() || chars <= MAX_FQDN {
        return Ok(());
    }
    Err(format!(
        "Failed to construct FQDN from Pod hostname and cluster domain, FQDN {hostname}.{domain} is too long ({MAX_FQDN} characters is the max, {chars} characters requested)"
    ))
}

/// The `/etc/hosts` of a pod on the pod network. As `managedHostsFileContent`.
pub fn hosts_file(ips: &[String], hostname: &str, domain: &str, aliases: &[HostAlias]) -> String {
    let mut out = String::from(
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::\tip6-localnet\nfe00::\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    for ip in ips {
        let _ = if domain.is_empty() {
            writeln!(out, "{ip}\t{hostname}")
        } else {
            writeln!(out, "{ip}\t{hostname}.{domain}\t{hostname}")
        };
    }
    out.push_str(&alias_lines(aliases));
    out
}

/// The `/etc/hosts` of a pod in the host's network: the host's own, and the pod's aliases.
pub fn host_network_hosts_file(host: &str, aliases: &[HostAlias]) -> String {
    format!("# Kubernetes-managed hosts file (host network).\n{host}{}", alias_lines(aliases))
}

fn alias_lines(aliases: &[HostAlias]) -> String {
    if aliases.is_empty() {
        return String::new();
    }
    let mut out = String::from("\n# Entries added by HostAliases.\n");
    for alias in aliases {
        let _ = writeln!(out, "{}\t{}", alias.ip, alias.hostnames.clone().unwrap_or_default().join("\t"));
    }
    out
}

/// Sysctls of the pod, with slashes as dots.
pub fn sysctls(pod: &Pod) -> BTreeMap<String, String> {
    let context = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    context
        .and_then(|c| c.sysctls.as_ref())
        .into_iter()
        .flatten()
        .map(|s| (s.name.replace('/', "."), s.value.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "web-0", "namespace": "shop"}, "spec": spec})).unwrap()
    }

    fn node() -> NodeDns {
        NodeDns {
            cluster_dns: vec!["10.96.0.10".into()],
            cluster_domain: "cluster.local".into(),
            host: parse_resolv_conf("# x\nnameserver 1.1.1.1\nsearch example.com. corp\noptions timeout:2\n"),
        }
    }

    #[test]
    fn what_is_omitted_is_told() {
        let told = |spec: serde_json::Value, node: &NodeDns| -> Vec<(&'static str, String)> {
            let mut spec = spec;
            spec["containers"] = json!([]);
            omissions(&pod(spec), node)
        };
        assert_eq!(told(json!({}), &node()), []);
        let servers = json!({"dnsConfig": {"nameservers": ["1.0.0.1", "1.0.0.2", "1.0.0.3"]}});
        let line = "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: 10.96.0.10 1.0.0.1 1.0.0.2";
        assert_eq!(told(servers, &node()), [("DNSConfigForming", line.to_owned())]);
        let searches: Vec<String> = (0..40).map(|i| format!("d{i}.example")).collect();
        let found = told(json!({"dnsPolicy": "None", "dnsConfig": {"searches": searches}}), &node());
        assert!(found[0].1.starts_with("Search Line limits were exceeded") && found[0].1.ends_with(" d31.example"));
        let without = NodeDns { cluster_dns: Vec::new(), ..node() };
        assert_eq!(told(json!({"dnsPolicy": "Default"}), &without), []);
        assert_eq!(told(json!({"hostNetwork": true}), &without), []);
        assert_eq!(told(json!({}), &without)[0].0, "MissingClusterDNS");
    }

    #[test]
    fn policies_choose_the_resolver() {
        let cluster = ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local", "example.com", "corp"];
        for (spec, servers, searches, options) in [
            (json!({}), vec!["10.96.0.10"], cluster.to_vec(), vec!["ndots:5"]),
            (json!({"dnsPolicy": "Default"}), vec!["1.1.1.1"], vec!["example.com", "corp"], vec!["timeout:2"]),
            (json!({"hostNetwork": true}), vec!["1.1.1.1"], vec!["example.com", "corp"], vec!["timeout:2"]),
            (
                json!({"hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet"}),
                vec!["10.96.0.10"],
                cluster.to_vec(),
                vec!["ndots:5"],
            ),
            (
                json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["9.9.9.9"], "searches": ["a.b"], "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]}}),
                vec!["9.9.9.9"],
                vec!["a.b"],
                vec!["ndots:2", "edns0"],
            ),
        ] {
            let mut spec = spec;
            spec["containers"] = json!([]);
            let got = pod_dns(&pod(spec.clone()), &node());
            assert_eq!(
                (got.servers, got.searches, got.options),
                (
                    servers.iter().map(|s| s.to_string()).collect(),
                    searches.iter().map(|s| s.to_string()).collect(),
                    options.iter().map(|s| s.to_string()).collect()
                ),
                "{spec}"
            );
        }
    }

    #[test]
    fn host_names_come_from_the_pod_and_its_subdomain() {
        let named = pod(json!({"containers": [], "hostname": "db", "subdomain": "peers"}));
        assert_eq!(
            hostname_and_domain(&named, "cluster.local"),
            ("db".to_owned(), "peers.shop.svc.cluster.local".to_owned())
        );
        assert_eq!(
            hostname_and_domain(&pod(json!({"containers": []})), "cluster.local"),
            ("web-0".into(), String::new())
        );
    }

    #[test]
    fn hosts_files_name_the_pod_and_its_aliases() {
        let alias = HostAlias { ip: "1.2.3.4".into(), hostnames: Some(vec!["a".into(), "b".into()]) };
        let text = hosts_file(&["10.0.0.7".into()], "db", "peers.shop.svc.x", &[alias]);
        assert!(text.starts_with("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n"));
        assert!(text.contains("10.0.0.7\tdb.peers.shop.svc.x\tdb\n"));
        assert!(text.ends_with("1.2.3.4\ta\tb\n"));
    }
}
