//! The command line of the kubelet. What flags share with fields of `KubeletConfiguration` is a table (`config::flags`).

use std::path::PathBuf;

use clap::Parser;

use crate::config::flags::ConfigFlags;

/// Flags as kubeadm, systemd units and people write them for Kubernetes' kubelet.
#[derive(Debug, Clone, Default, Parser)]
#[command(name = "kubelet", about = "The Kubernetes node agent")]
pub struct Flags {
    /// File with a KubeletConfiguration (kubelet.config.k8s.io/v1beta1).
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Directory of drop-in KubeletConfiguration files (*.conf), merged over --config in the order of their names.
    #[arg(long)]
    pub config_dir: Option<PathBuf>,
    /// kubeconfig of the node's identity. Without it the kubelet is standalone: static pods only.
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// kubeconfig used once to ask for a client certificate when --kubeconfig does not exist yet.
    #[arg(long)]
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// Where certificates live that the kubelet asks for or makes.
    #[arg(long, default_value = "/var/lib/kubelet/pki")]
    pub cert_dir: PathBuf,
    /// Directory of the kubelet's files (volumes, pod directories).
    #[arg(long, default_value = "/var/lib/kubelet")]
    pub root_dir: PathBuf,
    /// Name of the node instead of the host name.
    #[arg(long)]
    pub hostname_override: Option<String>,
    /// Addresses of the node (one, or one of each family).
    #[arg(long, value_delimiter = ',')]
    pub node_ip: Vec<String>,
    /// Labels (key=value) to register the node with.
    #[arg(long, value_delimiter = ',')]
    pub node_labels: Vec<String>,
    /// Name of the cloud provider; "external" leaves addresses and the provider ID to its controller.
    #[arg(long, default_value = "")]
    pub cloud_provider: String,
    /// File with a CredentialProviderConfig: programs that know how to log in to registries.
    #[arg(long)]
    pub image_credential_provider_config: Option<PathBuf>,
    /// Where those programs are.
    #[arg(long)]
    pub image_credential_provider_bin_dir: Option<PathBuf>,
    #[command(flatten)]
    pub fields: ConfigFlags,
    /// Run so many kubelets that run nothing, named after this one with a number: nodes for tests of scale.
    #[arg(long, value_name = "NODES")]
    pub hollow: Option<usize>,
    /// Log verbosity.
    #[arg(short = 'v', long = "v", default_value_t = 0)]
    pub verbosity: u8,
}
