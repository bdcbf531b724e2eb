//! `ctl bootstrap wait`: waits until parts of the cluster answer, and when one does not, says which, why and where its
//! log is. What "answers" means for each is [`Target`].

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::net::{UdpSocket, UnixStream};

use super::cluster::Cluster;
use super::components::Component;
use super::layout::{ClusterFlags, Layout};
use super::process;

/// The time between two attempts.
const POLL: Duration = Duration::from_millis(250);
/// The time that one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(5);
/// How much of a log a failure shows.
const LOG_LINES: usize = 8;

/// What to wait for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// A component of this machine is healthy.
    Component(Component),
    /// The API server holds the default roles and namespaces, so that set-up can go on.
    Defaults,
    /// This node is Ready.
    Node,
    /// The kubelet has got its certificate.
    KubeletCertificate,
    /// The cluster's DNS resolves the API server's Service, asked at its Service address.
    DnsService,
}

impl std::str::FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        match text {
            "defaults" => Ok(Target::Defaults),
            "node" => Ok(Target::Node),
            "kubelet-certificate" => Ok(Target::KubeletCertificate),
            "dns-service" => Ok(Target::DnsService),
            _ => clap::ValueEnum::from_str(text, false).map(Target::Component).map_err(|_| {
                "a component's name, defaults, node, kubelet-certificate or dns-service is expected".to_owned()
            }),
        }
    }
}

impl Target {
    fn describe(&self) -> String {
        match self {
            Target::Component(component) => component.name().to_owned(),
            Target::Defaults => "the API server's set of default objects".to_owned(),
            Target::Node => "this node".to_owned(),
            Target::KubeletCertificate => "the kubelet's certificate".to_owned(),
            Target::DnsService => "cluster DNS".to_owned(),
        }
    }

    /// Whose log tells why it is not there.
    fn component(&self) -> Component {
        match self {
            Target::Component(component) => *component,
            Target::Defaults => Component::Apiserver,
            Target::Node | Target::KubeletCertificate => Component::Kubelet,
            Target::DnsService => Component::Kubelet,
        }
    }
}

/// Where the parts are.
pub(crate) struct Places<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) cluster: &'a ClusterFlags,
    pub(crate) container_runtime_endpoint: &'a str,
}

/// Waits for each target in turn, `timeout` each.
pub(crate) async fn wait(targets: &[Target], timeout: Duration, places: &Places<'_>) -> Result<()> {
    for target in targets {
        let started = Instant::now();
        loop {
            let error = match tokio::time::timeout(ATTEMPT, check(target, places)).await {
                Ok(Ok(())) => break,
                Ok(Err(error)) => error,
                Err(_) => anyhow::anyhow!("no answer within {}s", ATTEMPT.as_secs()),
            };
            if started.elapsed() >= timeout {
                bail!("{}", failure(target, timeout, &error));
            }
            tokio::time::sleep(POLL).await;
        }
    }
    Ok(())
}

/// What a person reads when the wait is over and in vain.
fn failure(target: &Target, timeout: Duration, error: &anyhow::Error) -> String {
    let component = target.component();
    let log = process::log(component);
    let mut text =
        format!("{} is not ready after {}s: {error:#}\n  log: {}", target.describe(), timeout.as_secs(), log.command());
    let tail = log.tail(LOG_LINES);
    if !tail.is_empty() {
        text += ", which ends with";
        for line in tail {
            text += &format!("\n    {line}");
        }
    }
    text
}

/// Whether a target is there now; the error says what is missing.
pub(crate) async fn check(target: &Target, places: &Places<'_>) -> Result<()> {
    let Places { layout, cluster, .. } = places;
    match target {
        Target::Component(component) => health(*component, places).await,
        Target::Defaults => {
            let admin = Cluster::from_file(&layout.kubeconfig("super-admin")).await?;
            for path in [
                "/apis/rbac.authorization.k8s.io/v1/clusterroles/cluster-admin",
                "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/system:public-info-viewer",
                "/api/v1/namespaces/kube-system",
                "/api/v1/namespaces/kube-public",
                "/api/v1/namespaces/default",
            ] {
                admin.get(path).await?.with_context(|| format!("{path} is not there yet"))?;
            }
            Ok(())
        }
        Target::Node => {
            let name = cluster.node_name()?;
            // A worker has no administrator's kubeconfig, but a node may read itself.
            let admin = layout.kubeconfig("admin");
            let kubeconfig = if admin.exists() { admin } else { layout.kubeconfig("kubelet") };
            let api = Cluster::from_file(&kubeconfig).await?;
            let node = api.get(&format!("/api/v1/nodes/{name}")).await?;
            let node = node.with_context(|| format!("node {name:?} has not registered"))?;
            if is_ready(&node) { Ok(()) } else { bail!("node {name:?} is not Ready: {}", not_ready_reason(&node)) }
        }
        Target::KubeletCertificate => {
            let path = layout.kubeconfig("kubelet");
            if path.exists() { Ok(()) } else { bail!("the kubelet has not written {}", path.display()) }
        }
        Target::DnsService => {
            let address = cluster.service_cidr.dns_service().context("the service range is too small for DNS")?;
            resolve(SocketAddr::new(address, 53), &format!("kubernetes.default.svc.{}", cluster.service_dns_domain))
                .await
        }
    }
}

/// The health of a component of this machine.
async fn health(component: Component, places: &Places<'_>) -> Result<()> {
    let at = |url: &str, path: &'static str| (url.to_owned(), path);
    let (server, path) = match component {
        Component::Containerd => {
            let path = places.container_runtime_endpoint.trim_start_matches("unix://");
            UnixStream::connect(path).await.with_context(|| format!("cannot connect to {path}"))?;
            return Ok(());
        }
        // It has no endpoint of its own: what it makes is the node's CNI configuration, which `node` waits for.
        Component::PodNetwork => return process::running(component),
        Component::Etcd => at("http://127.0.0.1:2381", "/health"),
        Component::Apiserver => (format!("https://{}", places.cluster.local_endpoint()?), "/readyz"),
        Component::ControllerManager => at("https://127.0.0.1:10257", "/healthz"),
        Component::Scheduler => at("https://127.0.0.1:10259", "/healthz"),
        Component::Kubelet => at("http://127.0.0.1:10248", "/healthz"),
        Component::KubeProxy => at("http://127.0.0.1:10256", "/healthz"),
    };
    let body = Cluster::unauthenticated(&server)?.get_text(path).await?;
    if component == Component::Etcd && !body.contains("\"health\":\"true\"") {
        bail!("{server}{path} says {}", body.trim());
    }
    Ok(())
}

/// Whether a Node has the condition Ready.
pub(crate) fn is_ready(node: &Value) -> bool {
    ready_condition(node).is_some_and(|condition| condition["status"] == "True")
}

fn ready_condition(node: &Value) -> Option<&Value> {
    node["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == "Ready")
}

fn not_ready_reason(node: &Value) -> String {
    match ready_condition(node) {
        None => "it has not reported its status".to_owned(),
        Some(condition) => condition["message"].as_str().unwrap_or("no message").to_owned(),
    }
}

/// Asks a DNS server for an address of `name`.
async fn resolve(server: SocketAddr, name: &str) -> Result<()> {
    let any: IpAddr = if server.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    let query = query(name);
    socket.send(&query).await.with_context(|| format!("cannot ask {server}"))?;
    let mut answer = [0u8; 1232];
    let received = tokio::time::timeout(Duration::from_secs(2), socket.recv(&mut answer));
    let length = received.await.map_err(|_| anyhow::anyhow!("{server} does not answer DNS queries"))?;
    let length = length.with_context(|| format!("cannot ask {server}"))?;
    check_answer(answer.get(..length).unwrap_or_default()).with_context(|| format!("{server} does not resolve {name}"))
}

const QUERY_ID: u16 = 0x7068;

/// A query for the A records of `name`, with recursion desired.
fn query(name: &str) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend(QUERY_ID.to_be_bytes());
    packet.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.').filter(|label| !label.is_empty()) {
        packet.push(label.len().min(63) as u8);
        packet.extend(label.bytes().take(63));
    }
    packet.extend([0, 0, 1, 0, 1]);
    packet
}

/// Whether a packet answers our query with at least one record.
fn check_answer(packet: &[u8]) -> Result<()> {
    let [id_high, id_low, _, flags, _, _, answers_high, answers_low, ..] = packet else {
        bail!("the answer is cut short")
    };
    if u16::from_be_bytes([*id_high, *id_low]) != QUERY_ID {
        bail!("the answer belongs to another query");
    }
    match flags & 0x0f {
        0 if u16::from_be_bytes([*answers_high, *answers_low]) > 0 => Ok(()),
        0 => bail!("the answer is empty"),
        3 => bail!("the name does not exist (NXDOMAIN)"),
        code => bail!("the server answers with response code {code}"),
    }
}

/// Gets a page, trying again until `timeout`.
pub(crate) async fn fetch(url: &str, timeout: Duration) -> Result<String> {
    let parsed = url::Url::parse(url).with_context(|| format!("{url:?} is not a URL"))?;
    let server = parsed.origin().ascii_serialization();
    let started = Instant::now();
    loop {
        let attempt = async { Cluster::unauthenticated(&server)?.get_text(parsed.path()).await };
        let error = match tokio::time::timeout(ATTEMPT, attempt).await {
            Ok(Ok(body)) => return Ok(body),
            Ok(Err(error)) => error,
            Err(_) => anyhow::anyhow!("no answer within {}s", ATTEMPT.as_secs()),
        };
        if started.elapsed() >= timeout {
            return Err(error.context(format!("{url} does not answer")));
        }
        tokio::time::sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn targets_have_names() {
        assert_eq!("etcd".parse(), Ok(Target::Component(Component::Etcd)));
        assert_eq!("controller-manager".parse(), Ok(Target::Component(Component::ControllerManager)));
        assert_eq!("dns-service".parse(), Ok(Target::DnsService));
        assert!("nonsense".parse::<Target>().is_err());
    }

    #[test]
    fn a_node_says_why_it_is_not_ready() {
        let node = |status: &str, message: &str| json!({"status": {"conditions": [{"type": "MemoryPressure", "status": "False"}, {"type": "Ready", "status": status, "message": message}]}});
        assert!(is_ready(&node("True", "")));
        assert!(!is_ready(&node("Unknown", "")));
        assert_eq!(not_ready_reason(&node("False", "cni plugin not initialized")), "cni plugin not initialized");
        assert_eq!(not_ready_reason(&json!({})), "it has not reported its status");
    }

    #[test]
    fn queries_and_answers_are_dns() {
        let query = query("a.bc");
        assert_eq!(query, [0x70, 0x68, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'a', 2, b'b', b'c', 0, 0, 1, 0, 1]);
        let answer = |code: u8, count: u8| [0x70, 0x68, 0x81, 0x80 | code, 0, 1, 0, count, 0, 0, 0, 0];
        assert!(check_answer(&answer(0, 1)).is_ok());
        for (packet, says) in [
            (answer(0, 0).to_vec(), "the answer is empty"),
            (answer(3, 0).to_vec(), "the name does not exist (NXDOMAIN)"),
            (answer(2, 0).to_vec(), "the server answers with response code 2"),
            (vec![0x70], "the answer is cut short"),
            (vec![0; 12], "the answer belongs to another query"),
        ] {
            assert_eq!(check_answer(&packet).unwrap_err().to_string(), says);
        }
    }
}
