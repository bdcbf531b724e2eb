//! `ctl bootstrap join`: what a machine needs on its disk to become a node of an existing cluster: the cluster's
//! certificate authority, a kubeconfig with which the kubelet asks for a certificate, its configuration from the cluster,
//! and tokens for kube-proxy and the pod network. The programs themselves are started by the caller.

use std::net::{IpAddr, UdpSocket};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};

use super::cluster::Cluster;
use super::components::{Component, NodeFlags};
use super::discovery::{self, Trusted};
use super::kubeconfig::{self, Credentials};
use super::layout::{ClusterFlags, Layout};
use super::token::Token;
use super::{config, files};

/// How long the tokens of kube-proxy and the pod network last; `certs renew` replaces them before.
const PROGRAM_TOKEN_SECONDS: u64 = 365 * 24 * 3600;
/// The programs that get a token each.
const PROGRAMS: [&str; 2] = ["kube-proxy", "pod-network"];

/// What `join` is told.
#[derive(Debug, Args)]
pub(crate) struct JoinArgs {
    /// The address of the control plane, HOST[:PORT]
    address: String,
    /// The bootstrap token
    #[arg(long, id = "bootstrap-token", value_name = "TOKEN", visible_alias = "discovery-token")]
    bootstrap_token: String,
    /// The pin of the cluster's certificate authority, sha256:HEX
    #[arg(long, value_name = "HASH", value_delimiter = ',', visible_alias = "discovery-token-ca-cert-hash")]
    ca_cert_hash: Vec<String>,
    /// The name of this node (default: the host name)
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    #[command(flatten)]
    layout: Layout,
    #[command(flatten)]
    node: NodeFlags,
}

/// Prepares this machine; returns the name that its node will have.
pub(crate) async fn join(args: JoinArgs) -> Result<String> {
    let JoinArgs { address, bootstrap_token, ca_cert_hash, node_name, layout, mut node } = args;
    let layout = super::absolute(layout)?;
    let token: Token = bootstrap_token.parse()?;
    discovery::check_pins(&ca_cert_hash)?;
    if layout.kubeconfig("kubelet").exists() {
        bail!(
            "{} exists: this machine belongs to a cluster already; reset it first",
            layout.kubeconfig("kubelet").display()
        );
    }

    let url = server_url(&address);
    let answering = Cluster::unauthenticated(&url)?;
    let info = answering.get(discovery::CLUSTER_INFO).await.context("cannot read the cluster's cluster-info")?;
    let info = info.with_context(|| format!("{url} has no cluster-info: is it the API server of a cluster?"))?;
    let trusted = discovery::check(&info, &token, &ca_cert_hash)?;
    println!("the cluster at {} is the one that the token and the pin name", trusted.server);

    let kubeconfig = kubeconfig::render(
        &trusted.server,
        &trusted.ca_certificate,
        "tls-bootstrap-token-user",
        &Credentials::Token(&token.to_string()),
    );
    let cluster = Cluster::from_text(&kubeconfig).await?;
    let mut flags = cluster_flags(&config_map(&cluster, "kubeadm-config").await?, node_name)?;
    let name = flags.node_name()?;
    check_name(&cluster, &name).await?;
    let own_address = match node.node_ip {
        Some(address) => address,
        None => address_towards(&trusted.server)?,
    };
    node.node_ip = Some(own_address);
    flags.apiserver_advertise_address = Some(own_address);

    let kubelet_config = config_map(&cluster, "kubelet-config").await?;
    write(&layout, &flags, &node, &trusted, &kubelet_config)?;
    for program in PROGRAMS {
        let token = program_token(&cluster, program).await?;
        write_program(&layout, &trusted, program, &token)?;
    }
    // Last: with it the kubelet's start has what it needs.
    files::write(&layout.kubeconfig("bootstrap-kubelet"), kubeconfig, files::PRIVATE)?;
    println!("wrote the configuration of node {name:?} ({own_address})");
    Ok(name)
}

/// Gets successors of the tokens of this node's programs, with the tokens themselves. Returns what was renewed.
pub(crate) async fn renew_program_tokens(layout: &Layout) -> Result<Vec<String>> {
    let mut renewed = Vec::new();
    for program in PROGRAMS {
        if !token_path(layout, program).exists() {
            continue;
        }
        let cluster = Cluster::from_file(&layout.kubeconfig(program)).await?;
        let token = program_token(&cluster, program).await?;
        files::write(&token_path(layout, program), token, files::PRIVATE)?;
        renewed.push(format!("{program}.token"));
    }
    Ok(renewed)
}

fn write(
    layout: &Layout,
    flags: &ClusterFlags,
    node: &NodeFlags,
    trusted: &Trusted,
    kubelet_config: &Value,
) -> Result<()> {
    files::write(&layout.pki_file("ca.crt"), &trusted.ca_certificate, files::PUBLIC)?;
    config::write_all(&Component::WORKER, layout, flags, node, &[])?;
    // The cluster's settings win over the defaults; paths and the runtime are this machine's.
    let text = kubelet_config["data"]["kubelet"].as_str().context("the ConfigMap kubelet-config is empty")?;
    let mut kubelet: Value = apimachinery::yaml::from_str(text).context("the ConfigMap kubelet-config is malformed")?;
    kubelet["authentication"]["x509"]["clientCAFile"] = json!(layout.pki_file("ca.crt"));
    kubelet["staticPodPath"] = json!(layout.manifests());
    config::set_machine(&mut kubelet, node);
    files::write(&layout.kubelet().join("config.yaml"), apimachinery::yaml::to_string(&kubelet)?, files::PUBLIC)
}

fn write_program(layout: &Layout, trusted: &Trusted, program: &str, token: &str) -> Result<()> {
    let path = token_path(layout, program);
    files::write(&path, token, files::PRIVATE)?;
    let user = format!("system:serviceaccount:kube-system:{program}");
    let text = kubeconfig::render(&trusted.server, &trusted.ca_certificate, &user, &Credentials::TokenFile(&path));
    files::write(&layout.kubeconfig(program), text, files::PRIVATE)
}

fn token_path(layout: &Layout, program: &str) -> std::path::PathBuf {
    layout.kubeconfig(program).with_extension("token")
}

async fn program_token(cluster: &Cluster, program: &str) -> Result<String> {
    let request = json!({
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"expirationSeconds": PROGRAM_TOKEN_SECONDS},
    });
    let path = format!("/api/v1/namespaces/kube-system/serviceaccounts/{program}/token");
    let answer = cluster.post(&path, &request).await.with_context(|| format!("cannot get a token for {program}"))?;
    answer["status"]["token"].as_str().map(str::to_owned).context("the API server answered without a token")
}

async fn config_map(cluster: &Cluster, name: &str) -> Result<Value> {
    let path = format!("/api/v1/namespaces/kube-system/configmaps/{name}");
    cluster.get(&path).await?.with_context(|| {
        format!("the cluster has no ConfigMap kube-system/{name}: was it set up with `bootstrap init`?")
    })
}

/// A node that is there and ready must not be taken over by another machine. As kubeadm's check.
async fn check_name(cluster: &Cluster, name: &str) -> Result<()> {
    let Some(node) = cluster.get(&format!("/api/v1/nodes/{name}")).await? else { return Ok(()) };
    if super::wait::is_ready(&node) {
        bail!(
            "a node named {name:?} is in the cluster and ready; delete it there, or give this machine another name with --node-name"
        );
    }
    Ok(())
}

/// The cluster's ranges and domain from its ClusterConfiguration.
fn cluster_flags(kubeadm_config: &Value, node_name: Option<String>) -> Result<ClusterFlags> {
    let text =
        kubeadm_config["data"]["ClusterConfiguration"].as_str().context("the ConfigMap kubeadm-config is empty")?;
    let configuration: Value =
        apimachinery::yaml::from_str(text).context("the ConfigMap kubeadm-config is malformed")?;
    let networking = &configuration["networking"];
    let range = |name: &str, default: &str| -> Result<super::cidr::Cidr> {
        Ok(networking[name].as_str().filter(|text| !text.is_empty()).unwrap_or(default).parse()?)
    };
    Ok(ClusterFlags {
        apiserver_advertise_address: None,
        apiserver_bind_port: super::layout::API_PORT,
        control_plane_endpoint: configuration["controlPlaneEndpoint"].as_str().map(str::to_owned),
        apiserver_cert_extra_sans: Vec::new(),
        node_name,
        service_cidr: range("serviceSubnet", "10.96.0.0/12")?,
        pod_network_cidr: range("podSubnet", "10.244.0.0/16")?,
        service_dns_domain: networking["dnsDomain"].as_str().unwrap_or("cluster.local").to_owned(),
    })
}

/// `HOST[:PORT]` as a URL.
fn server_url(address: &str) -> String {
    let address = address.trim_start_matches("https://").trim_end_matches('/');
    if super::layout::has_port(address) {
        return format!("https://{address}");
    }
    match address.parse::<IpAddr>() {
        Ok(IpAddr::V6(address)) => format!("https://[{address}]:{}", super::layout::API_PORT),
        _ => format!("https://{address}:{}", super::layout::API_PORT),
    }
}

/// This machine's address on the way to `server`. Connecting a datagram socket sends nothing.
fn address_towards(server: &str) -> Result<IpAddr> {
    use std::net::ToSocketAddrs;
    let target = server.trim_start_matches("https://");
    let probe = || -> std::io::Result<IpAddr> {
        let target = target.to_socket_addrs()?.next().ok_or_else(|| std::io::Error::other("no address"))?;
        let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(target)?;
        Ok(socket.local_addr()?.ip())
    };
    probe().with_context(|| format!("cannot tell which of this machine's addresses leads to {target}: give --node-ip"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_become_urls() {
        for (address, url) in [
            ("10.0.0.1", "https://10.0.0.1:6443"),
            ("10.0.0.1:7443", "https://10.0.0.1:7443"),
            ("cp.example", "https://cp.example:6443"),
            ("https://cp.example:443/", "https://cp.example:443"),
            ("fd00::1", "https://[fd00::1]:6443"),
            ("[fd00::1]:443", "https://[fd00::1]:443"),
        ] {
            assert_eq!(server_url(address), url);
        }
    }

    #[test]
    fn the_clusters_ranges_are_read() -> Result<()> {
        let config =
            json!({"data": {"ClusterConfiguration": "networking:\n  dnsDomain: k8s.test\n  podSubnet: 10.1.0.0/16\n"}});
        let flags = cluster_flags(&config, Some("N2".into()))?;
        assert_eq!(flags.pod_network_cidr.to_string(), "10.1.0.0/16");
        assert_eq!(flags.service_cidr.to_string(), "10.96.0.0/12");
        assert_eq!(flags.service_dns_domain, "k8s.test");
        assert_eq!(flags.node_name()?, "n2");
        assert!(cluster_flags(&json!({}), None).is_err());
        Ok(())
    }

    #[test]
    fn a_workers_kubelet_takes_the_clusters_settings_and_its_own_paths() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let layout = Layout::below(dir.path());
        let node = NodeFlags {
            container_runtime_endpoint: "unix:///run/n2/containerd.sock".into(),
            cgroup_driver: Some(super::super::components::CgroupDriver::Cgroupfs),
            cgroup_root: None,
            resolv_conf: Some("/etc/resolv.conf".into()),
            node_ip: Some([10, 0, 0, 2].into()),
        };
        let mut flags = super::super::layout::tests::flags();
        flags.node_name = Some("n2".into());
        let trusted = Trusted { server: "https://10.0.0.1:6443".into(), ca_certificate: "CA".into() };
        let from_cluster =
            json!({"data": {"kubelet": "kind: KubeletConfiguration\nmaxPods: 42\ncgroupDriver: systemd\n"}});
        write(&layout, &flags, &node, &trusted, &from_cluster)?;
        write_program(&layout, &trusted, "kube-proxy", "secret")?;
        let written: Value = apimachinery::yaml::from_str(&files::read(&layout.kubelet().join("config.yaml"))?)?;
        assert_eq!(written["maxPods"], 42);
        assert_eq!(written["cgroupDriver"], "cgroupfs");
        assert_eq!(written["authentication"]["x509"]["clientCAFile"], json!(layout.pki_file("ca.crt")));
        assert!(files::read(&layout.flags_file("kubelet"))?.contains("--node-ip=10.0.0.2"));
        assert!(files::read(&layout.kubeconfig("kube-proxy"))?.contains("tokenFile: "));
        Ok(())
    }
}
