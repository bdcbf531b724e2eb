//! Where a cluster's files are: kubeadm's paths below a root directory (`/` but for tests), and the flags that describe
//! the cluster to every phase.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::cidr::Cidr;

/// The API server's port unless another is given. As `KubeAPIServerPort`.
pub(crate) const API_PORT: u16 = 6443;

/// Where files are written, and which paths the files name.
#[derive(Debug, Clone, Args)]
pub(crate) struct Layout {
    /// Put /etc/kubernetes, /var/lib/kubelet and /var/lib/etcd below this directory
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) root: PathBuf,
    /// The directory of certificates and keys (default: ROOT/etc/kubernetes/pki)
    #[arg(long, value_name = "DIR")]
    pub(crate) cert_dir: Option<PathBuf>,
    /// The directory of kubeconfigs (default: ROOT/etc/kubernetes)
    #[arg(long, value_name = "DIR")]
    pub(crate) kubeconfig_dir: Option<PathBuf>,
}

impl Layout {
    /// A layout below `root`.
    #[cfg(test)]
    pub(crate) fn below(root: &std::path::Path) -> Layout {
        Layout { root: root.to_owned(), cert_dir: None, kubeconfig_dir: None }
    }

    /// `/etc/kubernetes`.
    pub(crate) fn kubernetes(&self) -> PathBuf {
        self.root.join("etc/kubernetes")
    }

    /// `/etc/kubernetes/pki`.
    pub(crate) fn pki(&self) -> PathBuf {
        self.cert_dir.clone().unwrap_or_else(|| self.kubernetes().join("pki"))
    }

    /// A file of `/etc/kubernetes/pki`.
    pub(crate) fn pki_file(&self, name: &str) -> PathBuf {
        self.pki().join(name)
    }

    /// `/etc/kubernetes/NAME.conf`.
    pub(crate) fn kubeconfig(&self, name: &str) -> PathBuf {
        self.kubeconfig_dir.clone().unwrap_or_else(|| self.kubernetes()).join(format!("{name}.conf"))
    }

    /// The environment file with a component's command line, read by its unit and by the background mode.
    pub(crate) fn flags_file(&self, component: &str) -> PathBuf {
        self.kubernetes().join("flags").join(format!("{component}.env"))
    }

    /// `/etc/kubernetes/manifests`, the kubelet's static pods.
    pub(crate) fn manifests(&self) -> PathBuf {
        self.kubernetes().join("manifests")
    }

    /// `/var/lib/kubelet`.
    pub(crate) fn kubelet(&self) -> PathBuf {
        self.root.join("var/lib/kubelet")
    }

    /// `/var/lib/kube-proxy`.
    pub(crate) fn kube_proxy(&self) -> PathBuf {
        self.root.join("var/lib/kube-proxy")
    }

    /// containerd's configuration.
    pub(crate) fn containerd_config(&self) -> PathBuf {
        self.root.join("etc/containerd/config.toml")
    }

    /// Where containerd's configuration of before is kept.
    pub(crate) fn containerd_config_before(&self) -> PathBuf {
        self.root.join("etc/containerd/config.toml.before-pilothouse")
    }

    /// `/var/lib/etcd`.
    pub(crate) fn etcd(&self) -> PathBuf {
        self.root.join("var/lib/etcd")
    }
}

/// What a phase must know about the cluster and this machine's place in it. The defaults are kubeadm's, and for the pod
/// network the customary 10.244.0.0/16.
#[derive(Debug, Clone, Args)]
pub(crate) struct ClusterFlags {
    /// The address on which the API server of this machine is reached (default: that of the default route)
    #[arg(long, value_name = "IP")]
    pub(crate) apiserver_advertise_address: Option<IpAddr>,
    /// The port of the API server
    #[arg(long, value_name = "PORT", default_value_t = API_PORT)]
    pub(crate) apiserver_bind_port: u16,
    /// A stable address or name (with optional port) for the control plane, put into kubeconfigs and certificates
    #[arg(long, value_name = "HOST[:PORT]")]
    pub(crate) control_plane_endpoint: Option<String>,
    /// More names and addresses for the API server's certificate
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub(crate) apiserver_cert_extra_sans: Vec<String>,
    /// The name of this node (default: the host name)
    #[arg(long, value_name = "NAME")]
    pub(crate) node_name: Option<String>,
    /// The range of Service addresses
    #[arg(long, value_name = "CIDR", default_value = "10.96.0.0/12")]
    pub(crate) service_cidr: Cidr,
    /// The range of pod addresses
    #[arg(long, value_name = "CIDR", default_value = "10.244.0.0/16")]
    pub(crate) pod_network_cidr: Cidr,
    /// The domain of Services
    #[arg(long, value_name = "DOMAIN", default_value = "cluster.local")]
    pub(crate) service_dns_domain: String,
}

impl ClusterFlags {
    /// The advertised address, from the flag or from the machine.
    pub(crate) fn advertise_address(&self) -> Result<IpAddr> {
        match self.apiserver_advertise_address {
            Some(address) if address.is_unspecified() => bail!("--apiserver-advertise-address must not be {address}"),
            Some(address) => Ok(address),
            None => default_route_address(),
        }
    }

    /// The node's name, from the flag or the host name, in lower case as kubeadm and the kubelet make it.
    pub(crate) fn node_name(&self) -> Result<String> {
        let name = match &self.node_name {
            Some(name) => name.clone(),
            None => nix::unistd::gethostname().context("cannot read the host name")?.to_string_lossy().into_owned(),
        };
        let name = name.trim().to_lowercase();
        if name.is_empty() {
            bail!("this machine has no host name: give --node-name");
        }
        Ok(name)
    }

    /// `host:port` of this machine's API server.
    pub(crate) fn local_endpoint(&self) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.advertise_address()?, self.apiserver_bind_port))
    }

    /// The URL that kubeconfigs of users and of other machines name.
    pub(crate) fn server_url(&self) -> Result<String> {
        match &self.control_plane_endpoint {
            None => Ok(format!("https://{}", self.local_endpoint()?)),
            Some(endpoint) if has_port(endpoint) => Ok(format!("https://{endpoint}")),
            Some(endpoint) => Ok(format!("https://{endpoint}:{}", self.apiserver_bind_port)),
        }
    }

    /// The host of `--control-plane-endpoint` without its port.
    pub(crate) fn control_plane_host(&self) -> Option<&str> {
        let endpoint = self.control_plane_endpoint.as_deref()?;
        let host =
            if has_port(endpoint) { endpoint.rsplit_once(':').map_or(endpoint, |(host, _)| host) } else { endpoint };
        Some(host.trim_start_matches('[').trim_end_matches(']'))
    }
}

/// Whether `host` ends in a port: `name:1`, `10.0.0.1:1`, `[::1]:1`, but not `::1`.
pub(crate) fn has_port(endpoint: &str) -> bool {
    match endpoint.rsplit_once(':') {
        Some((host, port)) => {
            port.parse::<u16>().is_ok() && (!host.contains(':') || (host.starts_with('[') && host.ends_with(']')))
        }
        None => false,
    }
}

/// The source address of the default route. Connecting a datagram socket sends nothing.
fn default_route_address() -> Result<IpAddr> {
    let probe = || -> std::io::Result<IpAddr> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
        Ok(socket.local_addr()?.ip())
    };
    match probe() {
        Ok(address) if !address.is_loopback() && !address.is_unspecified() => Ok(address),
        _ => bail!("this machine has no default route to take an address from: give --apiserver-advertise-address"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use super::*;

    /// Flags of a small cluster, for the tests of other modules.
    pub(crate) fn flags() -> ClusterFlags {
        ClusterFlags {
            apiserver_advertise_address: Some([10, 0, 0, 1].into()),
            apiserver_bind_port: 6443,
            control_plane_endpoint: None,
            apiserver_cert_extra_sans: vec![],
            node_name: Some("cp".into()),
            service_cidr: "10.96.0.0/12".parse().expect("a range"),
            pod_network_cidr: "10.244.0.0/16".parse().expect("a range"),
            service_dns_domain: "cluster.local".into(),
        }
    }

    #[test]
    fn the_server_url_prefers_the_control_plane_endpoint() -> Result<()> {
        for (endpoint, url, host) in [
            (None, "https://10.0.0.1:6443", None),
            (Some("api.example"), "https://api.example:6443", Some("api.example")),
            (Some("api.example:443"), "https://api.example:443", Some("api.example")),
            (Some("[fd00::1]:443"), "https://[fd00::1]:443", Some("fd00::1")),
        ] {
            let flags = ClusterFlags { control_plane_endpoint: endpoint.map(str::to_owned), ..flags() };
            assert_eq!(flags.server_url()?, url);
            assert_eq!(flags.control_plane_host(), host);
        }
        Ok(())
    }

    #[test]
    fn paths_are_kubeadms_below_the_root() {
        let layout = Layout::below(Path::new("/"));
        assert_eq!(layout.pki_file("etcd/ca.crt"), Path::new("/etc/kubernetes/pki/etcd/ca.crt"));
        assert_eq!(layout.kubeconfig("admin"), Path::new("/etc/kubernetes/admin.conf"));
        let layout = Layout { cert_dir: Some("/certs".into()), ..Layout::below(Path::new("/tmp/x")) };
        assert_eq!(layout.pki_file("ca.crt"), Path::new("/certs/ca.crt"));
        assert_eq!(layout.kubelet(), Path::new("/tmp/x/var/lib/kubelet"));
    }
}
