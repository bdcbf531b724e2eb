//! Configuration files: KubeletConfiguration and KubeProxyConfiguration as kubeadm writes them, containerd's, and the
//! environment files with the command lines.

use std::path::Path;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};

use super::components::{self, CgroupDriver, Component, NodeFlags};
use super::files;
use super::layout::{ClusterFlags, Layout};

/// The image of pod sandboxes, which is built on the machine.
pub(crate) const PAUSE_IMAGE: &str = "pilothouse.dev/pause:0.1";
/// The image of cluster DNS.
pub(crate) const DNS_IMAGE: &str = "pilothouse.dev/dns:1.36.0";

/// The kubelet's configuration. `node` says what differs from machine to machine.
pub(crate) fn kubelet(layout: &Layout, cluster: &ClusterFlags, node: &NodeFlags) -> Result<Value> {
    let dns = cluster
        .service_cidr
        .dns_service()
        .with_context(|| format!("--service-cidr {} is too small for the DNS Service", cluster.service_cidr))?;
    let mut configuration = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"cacheTTL": "0s", "enabled": true},
            "x509": {"clientCAFile": layout.pki_file("ca.crt")},
        },
        "authorization": {
            "mode": "Webhook",
            "webhook": {"cacheAuthorizedTTL": "0s", "cacheUnauthorizedTTL": "0s"},
        },
        "clusterDNS": [dns],
        "clusterDomain": cluster.service_dns_domain,
        "cpuManagerReconcilePeriod": "0s",
        "evictionPressureTransitionPeriod": "0s",
        "fileCheckFrequency": "0s",
        "healthzBindAddress": "127.0.0.1",
        "healthzPort": 10248,
        "httpCheckFrequency": "0s",
        "imageMinimumGCAge": "0s",
        "logging": {"flushFrequency": 0, "verbosity": 0},
        "memorySwap": {},
        "nodeStatusReportFrequency": "0s",
        "nodeStatusUpdateFrequency": "0s",
        "rotateCertificates": true,
        "runtimeRequestTimeout": "0s",
        "shutdownGracePeriod": "0s",
        "shutdownGracePeriodCriticalPods": "0s",
        "staticPodPath": layout.manifests(),
        "streamingConnectionIdleTimeout": "0s",
        "syncFrequency": "0s",
        "volumeStatsAggPeriod": "0s",
        // A demo machine with swap, or with cgroups of version 1, is better served by a running cluster than by a refusal.
        "failSwapOn": false,
        "failCgroupV1": false,
    });
    set_machine(&mut configuration, node);
    Ok(configuration)
}

/// Puts into a kubelet's configuration, which may come from the cluster, what belongs to this machine alone.
pub(crate) fn set_machine(configuration: &mut Value, node: &NodeFlags) {
    configuration["cgroupDriver"] = json!(match node.cgroup_driver() {
        CgroupDriver::Systemd => "systemd",
        CgroupDriver::Cgroupfs => "cgroupfs",
    });
    configuration["containerRuntimeEndpoint"] = json!(node.container_runtime_endpoint);
    configuration["resolvConf"] = json!(node.resolv_conf());
    if let Some(root) = &node.cgroup_root {
        configuration["cgroupRoot"] = json!(root);
    }
}

/// kube-proxy's configuration.
pub(crate) fn kube_proxy(layout: &Layout, cluster: &ClusterFlags) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "bindAddress": "0.0.0.0",
        "bindAddressHardFail": false,
        "clientConnection": {
            "acceptContentTypes": "",
            "burst": 0,
            "contentType": "",
            "kubeconfig": layout.kubeconfig("kube-proxy"),
            "qps": 0,
        },
        "clusterCIDR": cluster.pod_network_cidr.to_string(),
        "configSyncPeriod": "0s",
        "conntrack": {"maxPerCore": null, "min": null, "tcpCloseWaitTimeout": null, "tcpEstablishedTimeout": null},
        "detectLocalMode": "",
        "enableProfiling": false,
        "healthzBindAddress": "",
        "hostnameOverride": "",
        "metricsBindAddress": "",
        "mode": "nftables",
        "nodePortAddresses": null,
        "oomScoreAdj": null,
        "portRange": "",
    })
}

/// Where a containerd of its own keeps its things; the defaults are the machine's.
#[derive(Debug, Clone, Args)]
pub(crate) struct ContainerdFlags {
    /// containerd's persistent directory
    #[arg(long, value_name = "DIR", default_value = "/var/lib/containerd")]
    pub(crate) containerd_root: String,
    /// containerd's runtime directory
    #[arg(long, value_name = "DIR", default_value = "/run/containerd")]
    pub(crate) containerd_state: String,
    /// The directory of CNI plugins
    #[arg(long, value_name = "DIR", default_value = "/usr/lib/cni")]
    pub(crate) cni_bin_dir: String,
    /// The directory of CNI configurations
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    pub(crate) cni_conf_dir: String,
    /// Tolerate that out-of-memory scores cannot be lowered (default: where CAP_SYS_RESOURCE is missing)
    #[arg(long)]
    pub(crate) restrict_oom_score_adj: bool,
}

/// The first line of a containerd configuration that this project wrote: a later run may replace it.
const CONTAINERD_MARK: &str = "# Written by Pilothouse's bootstrap; `bootstrap reset` restores what was here before.";

/// containerd's configuration, in the version that 1.6 and later (2.x too) read.
pub(crate) fn containerd(containerd: &ContainerdFlags, node: &NodeFlags) -> String {
    let address = node.container_runtime_endpoint.trim_start_matches("unix://");
    let systemd_cgroup = node.cgroup_driver() == CgroupDriver::Systemd;
    let ContainerdFlags { containerd_root, containerd_state, cni_bin_dir, cni_conf_dir, restrict_oom_score_adj } =
        containerd;
    format!(
        r#"{CONTAINERD_MARK}
version = 2
root = "{containerd_root}"
state = "{containerd_state}"

[grpc]
  address = "{address}"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = {restrict_oom_score_adj}

[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{cni_bin_dir}"
  conf_dir = "{cni_conf_dir}"

[plugins."io.containerd.grpc.v1.cri".containerd]
  default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  SystemdCgroup = {systemd_cgroup}
"#
    )
}

/// Writes containerd's configuration; what somebody else wrote there is kept beside it. True when the file changed.
pub(crate) fn write_containerd(layout: &Layout, flags: &ContainerdFlags, node: &NodeFlags) -> Result<bool> {
    let mut flags = flags.clone();
    flags.restrict_oom_score_adj |= !may_lower_oom_scores(&files::read(Path::new("/proc/self/status"))?);
    let path = layout.containerd_config();
    let text = containerd(&flags, node);
    match files::read_if_exists(&path)? {
        Some(existing) if existing == text => return Ok(false),
        Some(existing) if !existing.starts_with(CONTAINERD_MARK) => {
            files::write(&layout.containerd_config_before(), existing, files::PUBLIC)?;
        }
        _ => {}
    }
    files::write(&path, text, files::PUBLIC)?;
    Ok(true)
}

/// Puts back what was there before [`write_containerd`]. True when something changed.
pub(crate) fn restore_containerd(layout: &Layout) -> Result<bool> {
    let path = layout.containerd_config();
    if !files::read_if_exists(&path)?.is_some_and(|text| text.starts_with(CONTAINERD_MARK)) {
        return Ok(false);
    }
    let before = layout.containerd_config_before();
    match files::read_if_exists(&before)? {
        Some(_) => std::fs::rename(&before, &path),
        None => std::fs::remove_file(&path),
    }
    .with_context(|| format!("cannot restore {}", path.display()))?;
    Ok(true)
}

/// Whether `/proc/self/status` shows CAP_SYS_RESOURCE among the effective capabilities.
fn may_lower_oom_scores(status: &str) -> bool {
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & CAP_SYS_RESOURCE != 0)
}

/// Writes the files that `components` read: configurations and command lines. Returns the names of files that changed.
pub(crate) fn write_all(
    components: &[Component],
    layout: &Layout,
    cluster: &ClusterFlags,
    node: &NodeFlags,
    extra: &[String],
) -> Result<Vec<String>> {
    let mut changed = Vec::new();
    let mut put = |path: &Path, text: String| -> Result<()> {
        if files::read_if_exists(path)?.as_deref() != Some(&text) {
            files::write(path, text, files::PUBLIC)?;
            changed.push(path.display().to_string());
        }
        Ok(())
    };
    for component in components {
        match component {
            Component::Kubelet => {
                let configuration = kubelet(layout, cluster, node)?;
                put(&layout.kubelet().join("config.yaml"), apimachinery::yaml::to_string(&configuration)?)?;
                files::make_dir(&layout.manifests(), 0o755)?;
            }
            Component::KubeProxy => {
                let configuration = kube_proxy(layout, cluster);
                put(&layout.kube_proxy().join("config.conf"), apimachinery::yaml::to_string(&configuration)?)?;
            }
            // etcd itself refuses a directory that others can read.
            Component::Etcd => files::make_dir(&layout.etcd(), 0o700)?,
            _ => {}
        }
        let mut arguments = components::arguments(*component, layout, cluster, node)?;
        arguments.extend_from_slice(extra);
        put(&layout.flags_file(component.name()), components::environment_file(*component, &arguments)?)?;
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::super::layout::tests::flags;
    use super::*;

    fn node() -> NodeFlags {
        NodeFlags {
            container_runtime_endpoint: "unix:///run/containerd/containerd.sock".into(),
            cgroup_driver: Some(CgroupDriver::Cgroupfs),
            cgroup_root: Some("/n1".into()),
            resolv_conf: Some("/etc/resolv.conf".into()),
            node_ip: None,
        }
    }

    fn containerd_flags() -> ContainerdFlags {
        ContainerdFlags {
            containerd_root: "/var/lib/containerd".into(),
            containerd_state: "/run/containerd".into(),
            cni_bin_dir: "/usr/lib/cni".into(),
            cni_conf_dir: "/etc/cni/net.d".into(),
            restrict_oom_score_adj: false,
        }
    }

    #[test]
    fn the_files_are_as_kubeadm_writes_them() -> Result<()> {
        let layout = Layout::below(Path::new("/"));
        insta::assert_snapshot!("kubelet", apimachinery::yaml::to_string(&kubelet(&layout, &flags(), &node())?)?);
        insta::assert_snapshot!("kube_proxy", apimachinery::yaml::to_string(&kube_proxy(&layout, &flags()))?);
        insta::assert_snapshot!("containerd", containerd(&containerd_flags(), &node()));
        Ok(())
    }

    #[test]
    fn a_second_writing_changes_nothing() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let layout = Layout::below(dir.path());
        let changed = write_all(&Component::CONTROL_PLANE, &layout, &flags(), &node(), &[])?;
        assert_eq!(changed.len(), Component::CONTROL_PLANE.len() + 2, "{changed:?}");
        assert!(write_all(&Component::CONTROL_PLANE, &layout, &flags(), &node(), &[])?.is_empty());
        Ok(())
    }

    #[test]
    fn a_containerd_configuration_of_others_comes_back() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let layout = Layout::below(dir.path());
        assert!(!restore_containerd(&layout)?);
        files::write(&layout.containerd_config(), "version = 2\n", files::PUBLIC)?;
        assert!(write_containerd(&layout, &containerd_flags(), &node())?);
        assert!(!write_containerd(&layout, &containerd_flags(), &node())?);
        assert!(restore_containerd(&layout)?);
        assert_eq!(files::read(&layout.containerd_config())?, "version = 2\n");
        std::fs::remove_file(layout.containerd_config())?;
        assert!(write_containerd(&layout, &containerd_flags(), &node())?);
        assert!(restore_containerd(&layout)?);
        assert_eq!(files::read_if_exists(&layout.containerd_config())?, None);
        Ok(())
    }

    #[test]
    fn the_capability_is_read_from_the_mask() {
        assert!(may_lower_oom_scores("Name:\tx\nCapEff:\t000001ffffffffff\n"));
        assert!(!may_lower_oom_scores("CapEff:\t000001fffeffffff\n"));
        assert!(!may_lower_oom_scores(""));
    }
}
