//! What each component is started with: one pure function a component gives its command line, as kubeadm writes it for
//! the Go counterpart. systemd units, the background mode and the integration tests all take it from here.

use std::path::Path;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use super::layout::{ClusterFlags, Layout};

/// A process of the cluster that this project starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Component {
    Containerd,
    Etcd,
    Apiserver,
    ControllerManager,
    Scheduler,
    Kubelet,
    KubeProxy,
    PodNetwork,
}

impl Component {
    /// What runs on a control-plane node, in the order of starting.
    pub(crate) const CONTROL_PLANE: [Component; 7] = [
        Component::Etcd,
        Component::Apiserver,
        Component::ControllerManager,
        Component::Scheduler,
        Component::Kubelet,
        Component::KubeProxy,
        Component::PodNetwork,
    ];
    /// What runs on any other node.
    pub(crate) const WORKER: [Component; 3] = [Component::Kubelet, Component::KubeProxy, Component::PodNetwork];

    /// Its name in units, pid files and logs.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Component::Containerd => "containerd",
            Component::Etcd => "etcd",
            Component::Apiserver => "apiserver",
            Component::ControllerManager => "controller-manager",
            Component::Scheduler => "scheduler",
            Component::Kubelet => "kubelet",
            Component::KubeProxy => "kube-proxy",
            Component::PodNetwork => "pod-network",
        }
    }
}

/// What a node's own programs are set to.
#[derive(Debug, Clone, Args)]
pub(crate) struct NodeFlags {
    /// Where the container runtime listens
    #[arg(long, value_name = "URL", default_value = "unix:///run/containerd/containerd.sock")]
    pub(crate) container_runtime_endpoint: String,
    /// Who makes cgroups (default: systemd where it is process 1, else cgroupfs)
    #[arg(long, value_enum)]
    pub(crate) cgroup_driver: Option<CgroupDriver>,
    /// The cgroup below which pods are kept
    #[arg(long, value_name = "CGROUP")]
    pub(crate) cgroup_root: Option<String>,
    /// The resolver configuration that pods inherit (default: systemd-resolved's where it runs, else /etc/resolv.conf)
    #[arg(long, value_name = "FILE")]
    pub(crate) resolv_conf: Option<String>,
    /// The address that the node registers with (default: the advertised address)
    #[arg(long, value_name = "IP")]
    pub(crate) node_ip: Option<std::net::IpAddr>,
}

/// Who makes cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CgroupDriver {
    Systemd,
    Cgroupfs,
}

impl NodeFlags {
    /// The driver given, or the one that fits this machine.
    pub(crate) fn cgroup_driver(&self) -> CgroupDriver {
        let systemd =
            || if Path::new("/run/systemd/system").is_dir() { CgroupDriver::Systemd } else { CgroupDriver::Cgroupfs };
        self.cgroup_driver.unwrap_or_else(systemd)
    }

    /// The resolver configuration given, or the one of this machine that names real servers. As kubeadm.
    pub(crate) fn resolv_conf(&self) -> String {
        const RESOLVED: &str = "/run/systemd/resolve/resolv.conf";
        let default = || if Path::new(RESOLVED).exists() { RESOLVED } else { "/etc/resolv.conf" };
        self.resolv_conf.clone().unwrap_or_else(|| default().to_owned())
    }
}

/// The arguments of `component`.
pub(crate) fn arguments(
    component: Component,
    layout: &Layout,
    cluster: &ClusterFlags,
    node: &NodeFlags,
) -> Result<Vec<String>> {
    match component {
        Component::Containerd => Ok(vec![flag("config", layout.containerd_config().display())]),
        Component::Etcd => etcd(layout, cluster),
        Component::Apiserver => apiserver(layout, cluster),
        Component::ControllerManager => Ok(controller_manager(layout, cluster)),
        Component::Scheduler => Ok(scheduler(layout)),
        Component::Kubelet => kubelet(layout, cluster, node),
        Component::KubeProxy => Ok(kube_proxy(layout, cluster)),
        Component::PodNetwork => pod_network(layout, cluster),
    }
}

fn etcd(layout: &Layout, cluster: &ClusterFlags) -> Result<Vec<String>> {
    let name = cluster.node_name()?;
    let address = std::net::SocketAddr::new(cluster.advertise_address()?, 0).to_string();
    let host = address.trim_end_matches(":0");
    let (client, peer) = (format!("https://{host}:2379"), format!("https://{host}:2380"));
    let pki = |file: &str| layout.pki_file(file).display().to_string();
    Ok(vec![
        flag("advertise-client-urls", &client),
        flag("cert-file", pki("etcd/server.crt")),
        flag("client-cert-auth", true),
        flag("data-dir", layout.etcd().display()),
        flag("experimental-initial-corrupt-check", true),
        flag("experimental-watch-progress-notify-interval", "5s"),
        flag("initial-advertise-peer-urls", &peer),
        flag("initial-cluster", format!("{name}={peer}")),
        flag("key-file", pki("etcd/server.key")),
        flag("listen-client-urls", format!("https://127.0.0.1:2379,{client}")),
        flag("listen-metrics-urls", "http://127.0.0.1:2381"),
        flag("listen-peer-urls", &peer),
        flag("name", &name),
        flag("peer-cert-file", pki("etcd/peer.crt")),
        flag("peer-client-cert-auth", true),
        flag("peer-key-file", pki("etcd/peer.key")),
        flag("peer-trusted-ca-file", pki("etcd/ca.crt")),
        flag("snapshot-count", 10000),
        flag("trusted-ca-file", pki("etcd/ca.crt")),
    ])
}

fn apiserver(layout: &Layout, cluster: &ClusterFlags) -> Result<Vec<String>> {
    let pki = |file: &str| layout.pki_file(file).display().to_string();
    Ok(vec![
        flag("advertise-address", cluster.advertise_address()?),
        flag("allow-privileged", true),
        flag("authorization-mode", "Node,RBAC"),
        flag("client-ca-file", pki("ca.crt")),
        flag("enable-admission-plugins", "NodeRestriction"),
        flag("enable-bootstrap-token-auth", true),
        flag("etcd-cafile", pki("etcd/ca.crt")),
        flag("etcd-certfile", pki("apiserver-etcd-client.crt")),
        flag("etcd-keyfile", pki("apiserver-etcd-client.key")),
        flag("etcd-servers", "https://127.0.0.1:2379"),
        flag("kubelet-client-certificate", pki("apiserver-kubelet-client.crt")),
        flag("kubelet-client-key", pki("apiserver-kubelet-client.key")),
        flag("kubelet-preferred-address-types", "InternalIP,ExternalIP,Hostname"),
        flag("proxy-client-cert-file", pki("front-proxy-client.crt")),
        flag("proxy-client-key-file", pki("front-proxy-client.key")),
        flag("requestheader-allowed-names", "front-proxy-client"),
        flag("requestheader-client-ca-file", pki("front-proxy-ca.crt")),
        flag("requestheader-extra-headers-prefix", "X-Remote-Extra-"),
        flag("requestheader-group-headers", "X-Remote-Group"),
        flag("requestheader-username-headers", "X-Remote-User"),
        flag("secure-port", cluster.apiserver_bind_port),
        flag("service-account-issuer", format!("https://kubernetes.default.svc.{}", cluster.service_dns_domain)),
        flag("service-account-key-file", pki("sa.pub")),
        flag("service-account-signing-key-file", pki("sa.key")),
        flag("service-cluster-ip-range", cluster.service_cidr),
        flag("tls-cert-file", pki("apiserver.crt")),
        flag("tls-private-key-file", pki("apiserver.key")),
    ])
}

fn controller_manager(layout: &Layout, cluster: &ClusterFlags) -> Vec<String> {
    let pki = |file: &str| layout.pki_file(file).display().to_string();
    let kubeconfig = layout.kubeconfig("controller-manager").display().to_string();
    vec![
        flag("allocate-node-cidrs", true),
        flag("authentication-kubeconfig", &kubeconfig),
        flag("authorization-kubeconfig", &kubeconfig),
        flag("bind-address", "127.0.0.1"),
        flag("client-ca-file", pki("ca.crt")),
        flag("cluster-cidr", cluster.pod_network_cidr),
        flag("cluster-name", "kubernetes"),
        flag("cluster-signing-cert-file", pki("ca.crt")),
        flag("cluster-signing-key-file", pki("ca.key")),
        flag("controllers", "*,bootstrapsigner,tokencleaner"),
        flag("kubeconfig", &kubeconfig),
        flag("leader-elect", true),
        flag("requestheader-client-ca-file", pki("front-proxy-ca.crt")),
        flag("root-ca-file", pki("ca.crt")),
        flag("service-account-private-key-file", pki("sa.key")),
        flag("service-cluster-ip-range", cluster.service_cidr),
        flag("use-service-account-credentials", true),
    ]
}

fn scheduler(layout: &Layout) -> Vec<String> {
    let kubeconfig = layout.kubeconfig("scheduler").display().to_string();
    vec![
        flag("authentication-kubeconfig", &kubeconfig),
        flag("authorization-kubeconfig", &kubeconfig),
        flag("bind-address", "127.0.0.1"),
        flag("kubeconfig", &kubeconfig),
        flag("leader-elect", true),
    ]
}

fn kubelet(layout: &Layout, cluster: &ClusterFlags, node: &NodeFlags) -> Result<Vec<String>> {
    let address = match node.node_ip {
        Some(address) => address,
        None => cluster.advertise_address()?,
    };
    let mut arguments = vec![
        flag("bootstrap-kubeconfig", layout.kubeconfig("bootstrap-kubelet").display()),
        flag("kubeconfig", layout.kubeconfig("kubelet").display()),
        flag("config", layout.kubelet().join("config.yaml").display()),
        flag("node-ip", address),
    ];
    let drop_ins = layout.kubernetes().join("kubelet.conf.d");
    if drop_ins.is_dir() {
        arguments.push(flag("config-dir", drop_ins.display()));
    }
    if cluster.node_name.is_some() {
        arguments.push(flag("hostname-override", cluster.node_name()?));
    }
    if layout.root != Path::new("/") {
        arguments.push(flag("root-dir", layout.kubelet().display()));
        arguments.push(flag("cert-dir", layout.kubelet().join("pki").display()));
    }
    Ok(arguments)
}

fn kube_proxy(layout: &Layout, cluster: &ClusterFlags) -> Vec<String> {
    let mut arguments = vec![flag("config", layout.kube_proxy().join("config.conf").display())];
    // kubeadm always names the node; so does the kubelet when it is named otherwise than the host.
    if let Ok(name) = cluster.node_name() {
        arguments.push(flag("hostname-override", name));
    }
    arguments
}

fn pod_network(layout: &Layout, cluster: &ClusterFlags) -> Result<Vec<String>> {
    Ok(vec![
        flag("kubeconfig", layout.kubeconfig("pod-network").display()),
        flag("hostname-override", cluster.node_name()?),
        flag("cluster-cidr", cluster.pod_network_cidr),
    ])
}

fn flag(name: &str, value: impl std::fmt::Display) -> String {
    format!("--{name}={value}")
}

/// The environment file that a unit and the background mode read: `ARGS="…"`. Both split it at blanks, so no argument
/// may hold one, nor what a shell or systemd would interpret.
pub(crate) fn environment_file(component: Component, arguments: &[String]) -> Result<String> {
    if let Some(bad) =
        arguments.iter().find(|argument| argument.contains(|c: char| c.is_whitespace() || "\"'$`\\%".contains(c)))
    {
        bail!("{}: the argument {bad:?} has a blank or a special character", component.name());
    }
    Ok(format!(
        "# The command line of {0}; written by `ctl bootstrap config`.\nARGS=\"{1}\"\n",
        component.name(),
        arguments.join(" ")
    ))
}

#[cfg(test)]
mod tests {
    use super::super::layout::tests::flags;
    use super::*;

    fn node() -> NodeFlags {
        NodeFlags {
            container_runtime_endpoint: "unix:///run/containerd/containerd.sock".into(),
            cgroup_driver: None,
            cgroup_root: None,
            resolv_conf: Some("/etc/resolv.conf".into()),
            node_ip: None,
        }
    }

    #[test]
    fn the_command_lines_are_kubeadms() -> Result<()> {
        let layout = Layout::below(Path::new("/"));
        let mut text = String::new();
        for component in Component::CONTROL_PLANE {
            let arguments = arguments(component, &layout, &flags(), &node())?;
            text += &format!("{}\n  {}\n", component.name(), arguments.join("\n  "));
        }
        insta::assert_snapshot!(text);
        Ok(())
    }

    #[test]
    fn a_root_directory_prefixes_every_path() -> Result<()> {
        let layout = Layout::below(Path::new("/tmp/x"));
        for component in Component::CONTROL_PLANE {
            for argument in arguments(component, &layout, &flags(), &node())? {
                let path = argument.split_once('=').map_or("", |(_, value)| value);
                let own = !path.starts_with('/') || path.starts_with("/tmp/x/") || path == "/etc/resolv.conf";
                assert!(own, "{}: {argument}", component.name());
            }
        }
        Ok(())
    }

    #[test]
    fn an_argument_that_would_be_split_is_refused() {
        assert!(environment_file(Component::Etcd, &["--name=a b".into()]).is_err());
        assert!(environment_file(Component::Etcd, &["--name=$(x)".into()]).is_err());
        let text = environment_file(Component::Etcd, &["--name=a".into(), "--b=*,c".into()]).expect("fits");
        assert!(text.ends_with("ARGS=\"--name=a --b=*,c\"\n"), "{text}");
    }
}
