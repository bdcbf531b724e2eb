//! The command line: kube-controller-manager's flags.
use crate::controllers::gate_of;
use apimachinery::time::parse_duration;
use clap::{ArgAction::Set, Parser};
use component_base::cli::{CommonFlags, Ignored};
use component_base::feature_gates::FeatureGates;
use std::{net::IpAddr, path::PathBuf, time::Duration};
use tracing::error;

/// Controllers that run only when they are named.
pub const SWITCHED_OFF_BY_DEFAULT: [&str; 2] = ["bootstrap-signer-controller", "token-cleaner-controller"];

/// Runs the controllers that make the cluster's state what its objects ask for.
#[derive(Clone, Debug, Parser)]
#[command(name = "controller-manager", version)]
pub struct Flags {
    #[command(flatten)]
    pub common: CommonFlags,
    /// Kubeconfig file with the way to the API server and this process's identity.
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// The API server's address; overrides the kubeconfig's.
    #[arg(long)]
    pub master: Option<String>,
    /// Kubeconfig with which callers of the secure port are authenticated; without it only certificates count.
    #[arg(long)]
    pub authentication_kubeconfig: Option<PathBuf>,
    /// Kubeconfig with which callers of the secure port are authorized.
    #[arg(long)]
    pub authorization_kubeconfig: Option<PathBuf>,
    /// Paths of the secure port that everybody may read.
    #[arg(long, value_delimiter = ',', default_value = "/healthz,/readyz,/livez")]
    pub authorization_always_allow_paths: Vec<String>,
    /// Certificates of those whose client certificates are accepted on the secure port.
    #[arg(long)]
    pub client_ca_file: Option<PathBuf>,
    /// Address of the secure port.
    #[arg(long, default_value = "0.0.0.0")]
    pub bind_address: IpAddr,
    /// The secure port; 0 serves nothing.
    #[arg(long, default_value_t = 10257)]
    pub secure_port: u16,
    /// Serving certificate; without one a self-signed one is made.
    #[arg(long)]
    pub tls_cert_file: Option<PathBuf>,
    #[arg(long)]
    pub tls_private_key_file: Option<PathBuf>,

    /// Work only while holding the lease, so that several instances can stand by.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true, action = Set)]
    pub leader_elect: bool,
    #[arg(long, default_value = "15s", value_parser = duration)]
    pub leader_elect_lease_duration: Duration,
    #[arg(long, default_value = "10s", value_parser = duration)]
    pub leader_elect_renew_deadline: Duration,
    #[arg(long, default_value = "2s", value_parser = duration)]
    pub leader_elect_retry_period: Duration,
    #[arg(long, default_value = "kube-controller-manager")]
    pub leader_elect_resource_name: String,
    #[arg(long, default_value = "kube-system")]
    pub leader_elect_resource_namespace: String,

    /// Controllers to run: `*` all that are on by default, `foo` that one, `-foo` not that one.
    #[arg(long, value_delimiter = ',', default_value = "*", allow_hyphen_values = true)]
    pub controllers: Vec<String>,
    /// Features that are off, or on, unless named: `Name=true,…`.
    #[arg(long, default_value = "", value_parser = FeatureGates::parse)]
    pub feature_gates: FeatureGates,
    /// Each controller writes with a ServiceAccount of its own.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = Set)]
    pub use_service_account_credentials: bool,
    /// Requests a second of each controller; 0 is no limit. The server's fairness is the usual one, so this is high.
    #[arg(long, default_value_t = 2000.0)]
    pub kube_api_qps: f64,
    /// Requests of each controller at once.
    #[arg(long, default_value_t = 4000)]
    pub kube_api_burst: u32,

    /// Certificate that every namespace's kube-root-ca.crt and every ServiceAccount token Secret shows.
    #[arg(long)]
    pub root_ca_file: Option<PathBuf>,
    /// Key that signs the tokens in Secrets of ServiceAccounts (all others are made by the API server).
    #[arg(long)]
    pub service_account_private_key_file: Option<PathBuf>,
    /// Certificate authority that signs certificate requests.
    #[arg(long)]
    pub cluster_signing_cert_file: Option<PathBuf>,
    #[arg(long)]
    pub cluster_signing_key_file: Option<PathBuf>,
    #[command(flatten)]
    pub signers: SignerFiles,
    /// The longest that a signed certificate holds.
    #[arg(long, default_value = "8760h", value_parser = duration)]
    pub cluster_signing_duration: Duration,

    /// Give each node a part of the cluster's pod addresses.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = Set)]
    pub allocate_node_cidrs: bool,
    /// The cluster's pod addresses; two for dual-stack.
    #[arg(long, value_delimiter = ',')]
    pub cluster_cidr: Vec<String>,
    /// The Services' addresses, which no node may get.
    #[arg(long, value_delimiter = ',')]
    pub service_cluster_ip_range: Vec<String>,
    /// Prefix length of a node's part, in a single-stack cluster; 24 for IPv4, 64 for IPv6.
    #[arg(long)]
    pub node_cidr_mask_size: Option<u8>,
    #[arg(long)]
    pub node_cidr_mask_size_ipv4: Option<u8>,
    #[arg(long)]
    pub node_cidr_mask_size_ipv6: Option<u8>,

    /// Between two looks at the nodes' health.
    #[arg(long, default_value = "5s", value_parser = duration)]
    pub node_monitor_period: Duration,
    /// A node that is silent so long is not healthy.
    #[arg(long, default_value = "50s", value_parser = duration)]
    pub node_monitor_grace_period: Duration,
    /// A node that has just started may be silent so long.
    #[arg(long, default_value = "60s", value_parser = duration)]
    pub node_startup_grace_period: Duration,
    /// Nodes a second whose pods are evicted when they fail, while the zone is healthy.
    #[arg(long, default_value_t = 0.1)]
    pub node_eviction_rate: f64,
    /// The same in a large zone most of which failed.
    #[arg(long, default_value_t = 0.01)]
    pub secondary_node_eviction_rate: f64,
    /// A zone with more nodes than this is large.
    #[arg(long, default_value_t = 50)]
    pub large_cluster_size_threshold: usize,
    /// Part of a zone's nodes that must fail for the zone to be unhealthy.
    #[arg(long, default_value_t = 0.55)]
    pub unhealthy_zone_threshold: f64,
    /// Finished pods beyond this number are deleted, the oldest first; 0 keeps all.
    #[arg(long, default_value_t = 12500)]
    pub terminated_pod_gc_threshold: usize,

    #[arg(long, default_value_t = 5)]
    pub concurrent_deployment_syncs: usize,
    #[arg(long, default_value_t = 2)]
    pub concurrent_daemonset_syncs: usize,
    #[arg(long, default_value_t = 5)]
    pub concurrent_statefulset_syncs: usize,
    #[arg(long, default_value_t = 5)]
    pub concurrent_job_syncs: usize,
    #[arg(long, default_value_t = 5)]
    pub concurrent_cron_job_syncs: usize,
    #[arg(long, default_value_t = 5)]
    pub concurrent_ttl_after_finished_syncs: usize,
    #[arg(long, default_value_t = 5)]
    pub concurrent_horizontal_pod_autoscaler_syncs: usize,
    /// Between two looks at the metrics of an autoscaler.
    #[arg(long, default_value = "15s", value_parser = duration)]
    pub horizontal_pod_autoscaler_sync_period: Duration,
    /// How far off the target, as a part of it, a metric may be.
    #[arg(long, default_value_t = 0.1)]
    pub horizontal_pod_autoscaler_tolerance: f64,
    /// An autoscaler goes down to the most that it wanted in this time.
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub horizontal_pod_autoscaler_downscale_stabilization: Duration,
    /// A pod that has just started may use CPU without that meaning anything.
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub horizontal_pod_autoscaler_cpu_initialization_period: Duration,
    /// A change to not ready within this time of the start counts as the first readiness that is still to come.
    #[arg(long, default_value = "30s", value_parser = duration)]
    pub horizontal_pod_autoscaler_initial_readiness_delay: Duration,
    #[arg(long, default_value_t = 5)]
    pub concurrent_replicaset_syncs: usize,
    #[arg(long, default_value_t = 5)]
    pub concurrent_rc_syncs: usize,
    #[arg(long, default_value_t = 10)]
    pub concurrent_namespace_syncs: usize,
    #[arg(long, default_value_t = 5)]
    pub concurrent_endpoint_syncs: usize,
    #[arg(long, default_value_t = 5)]
    pub concurrent_service_endpoint_syncs: usize,
    #[arg(long, default_value_t = 20)]
    pub concurrent_gc_syncs: usize,
    #[arg(long, default_value_t = 5)]
    pub concurrent_resource_quota_syncs: usize,
    /// How often quotas are counted anew though nothing seems to have changed.
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub resource_quota_sync_period: Duration,
    /// How often claims and volumes that wait are looked at though nothing seems to have changed.
    #[arg(long, default_value = "15s", value_parser = duration)]
    pub pvclaimbinder_sync_period: Duration,
    /// Have volumes made for claims whose class names a provisioner.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true, action = Set)]
    pub enable_dynamic_provisioning: bool,
    /// The image whose program makes, empties and removes directories of nodes: `pause`, which every node has.
    #[arg(long, default_value = "pilothouse.dev/pause:0.1")]
    pub volume_helper_image: String,
    /// Never detach what the kubelet says that it still uses, however long its node is not healthy.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = Set)]
    pub disable_force_detach_on_timeout: bool,
    #[arg(long, default_value_t = 5)]
    pub concurrent_ephemeralvolume_syncs: usize,
    #[arg(long, default_value_t = 5)]
    pub concurrent_validating_admission_policy_status_syncs: usize,
    #[arg(long, default_value_t = 5)]
    pub concurrent_serviceaccount_token_syncs: usize,
    /// A token Secret that was made by itself goes when nobody has used it for so long, twice.
    #[arg(long, default_value = "8760h", value_parser = duration)]
    pub legacy_service_account_token_clean_up_period: Duration,
    #[arg(long, default_value_t = 50)]
    pub concurrent_resource_claim_syncs: usize,
    #[arg(long, default_value_t = 8)]
    pub concurrent_device_taint_eviction_syncs: usize,
    /// How long changes of pods are gathered before the endpoints of their Services are written.
    #[arg(long, default_value = "0s", value_parser = duration)]
    pub endpoint_updates_batch_period: Duration,
    /// The same for EndpointSlices.
    #[arg(long, default_value = "0s", value_parser = duration)]
    pub endpointslice_updates_batch_period: Duration,
    /// How long changes of Endpoints are gathered before they are mirrored.
    #[arg(long, default_value = "0s", value_parser = duration)]
    pub mirroring_endpointslice_updates_batch_period: Duration,
    /// Endpoints in one EndpointSlice.
    #[arg(long, default_value_t = 100)]
    pub max_endpoints_per_slice: usize,
    #[arg(long, default_value_t = 5)]
    pub mirroring_concurrent_service_endpoint_syncs: usize,
    /// Addresses of one subset of Endpoints that are mirrored.
    #[arg(long, default_value_t = 1000)]
    pub mirroring_max_endpoints_per_subset: usize,
    /// Delete what lost its owners.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true, action = Set)]
    pub enable_garbage_collector: bool,
}

/// Authorities of one signer each, in place of the common one.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct SignerFiles {
    #[arg(long)]
    pub cluster_signing_kubelet_client_cert_file: Option<PathBuf>,
    #[arg(long)]
    pub cluster_signing_kubelet_client_key_file: Option<PathBuf>,
    #[arg(long)]
    pub cluster_signing_kubelet_serving_cert_file: Option<PathBuf>,
    #[arg(long)]
    pub cluster_signing_kubelet_serving_key_file: Option<PathBuf>,
    #[arg(long)]
    pub cluster_signing_kube_apiserver_client_cert_file: Option<PathBuf>,
    #[arg(long)]
    pub cluster_signing_kube_apiserver_client_key_file: Option<PathBuf>,
    #[arg(long)]
    pub cluster_signing_legacy_unknown_cert_file: Option<PathBuf>,
    #[arg(long)]
    pub cluster_signing_legacy_unknown_key_file: Option<PathBuf>,
}

/// What controllers read of the flags.
pub type Settings = Flags;

impl Flags {
    /// The text of `--root-ca-file`; None without the flag, and where the file cannot be read: then `without` is logged, what there
    /// is not because of it.
    pub async fn root_ca(&self, without: &str) -> Option<String> {
        let file = self.root_ca_file.as_ref()?;
        let read = tokio::fs::read_to_string(file).await;
        read.inspect_err(|cause| error!(file = %file.display(), %cause, "--root-ca-file cannot be read; {without}"))
            .ok()
    }

    /// Whether a controller, known by any of `names`, is to run: the feature that it is for is on as well. As
    /// `IsControllerEnabled`.
    pub fn runs(&self, names: &[&str]) -> bool {
        if names.iter().filter_map(|name| gate_of(name)).any(|feature| !self.feature_gates.enabled(feature)) {
            return false;
        }
        let mut all = false;
        for wanted in &self.controllers {
            match wanted.strip_prefix('-') {
                Some(off) if names.contains(&off) => return false,
                None if names.contains(&wanted.as_str()) => return true,
                None if wanted == "*" => all = true,
                _ => {}
            }
        }
        all && !names.iter().any(|n| SWITCHED_OFF_BY_DEFAULT.contains(n))
    }

    /// The certificate and key of each signer that has an authority. As `areSpecificCertsSet`, one excludes the other.
    pub fn authorities(&self) -> Result<Vec<(&'static str, PathBuf, PathBuf)>, &'static str> {
        let own = &self.signers;
        let table = [
            (
                "kubernetes.io/kube-apiserver-client-kubelet",
                &own.cluster_signing_kubelet_client_cert_file,
                &own.cluster_signing_kubelet_client_key_file,
            ),
            (
                "kubernetes.io/kubelet-serving",
                &own.cluster_signing_kubelet_serving_cert_file,
                &own.cluster_signing_kubelet_serving_key_file,
            ),
            (
                "kubernetes.io/kube-apiserver-client",
                &own.cluster_signing_kube_apiserver_client_cert_file,
                &own.cluster_signing_kube_apiserver_client_key_file,
            ),
            (
                "kubernetes.io/legacy-unknown",
                &own.cluster_signing_legacy_unknown_cert_file,
                &own.cluster_signing_legacy_unknown_key_file,
            ),
        ];
        let specific = table.iter().any(|(_, certificate, key)| certificate.is_some() || key.is_some());
        let (common, common_key) = (&self.cluster_signing_cert_file, &self.cluster_signing_key_file);
        if specific && (common.is_some() || common_key.is_some()) {
            return Err(
                "cannot specify --cluster-signing-{cert,key}-file and other --cluster-signing-*-file flags at \
                        the same time",
            );
        }
        let pair = |certificate: &Option<PathBuf>, key: &Option<PathBuf>| certificate.clone().zip(key.clone());
        let of = |(signer, certificate, key): (&'static str, &Option<PathBuf>, &Option<PathBuf>)| {
            let (certificate, key) = pair(certificate, key).or_else(|| pair(common, common_key))?;
            Some((signer, certificate, key))
        };
        Ok(table.into_iter().filter_map(of).collect())
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|e| e.to_string())
}

/// Flags of Kubernetes without a meaning here.
pub const IGNORED: &[Ignored] = &[
    Ignored::Bool("allow-untagged-cloud"),
    Ignored::Value("attach-detach-reconcile-sync-period"),
    Ignored::Value("authentication-token-webhook-cache-ttl"),
    Ignored::Bool("authentication-skip-lookup"),
    Ignored::Bool("authentication-tolerate-lookup-failure"),
    Ignored::Value("authorization-webhook-cache-authorized-ttl"),
    Ignored::Value("authorization-webhook-cache-unauthorized-ttl"),
    Ignored::Value("cert-dir"),
    Ignored::Value("cidr-allocator-type"),
    Ignored::Value("cloud-config"),
    Ignored::Value("cloud-provider"),
    Ignored::Value("cluster-name"),
    Ignored::Value("concurrent-service-syncs"),
    Ignored::Bool("configure-cloud-routes"),
    Ignored::Bool("contention-profiling"),
    Ignored::Value("controller-start-interval"),
    Ignored::Bool("disable-attach-detach-reconcile-sync"),
    Ignored::Bool("disable-http2-serving"),
    Ignored::Value("disabled-metrics"),
    Ignored::Value("allow-metric-labels"),
    Ignored::Value("allow-metric-labels-manifest"),
    Ignored::Value("emulated-version"),
    Ignored::Bool("emulation-forward-compatible"),
    Ignored::Bool("enable-hostpath-provisioner"),
    Ignored::Bool("enable-leader-migration"),
    Ignored::Value("external-cloud-volume-plugin"),
    Ignored::Value("flex-volume-plugin-dir"),
    Ignored::Value("http2-max-streams-per-connection"),
    Ignored::Value("kube-api-content-type"),
    Ignored::Value("leader-elect-resource-lock"),
    Ignored::Value("leader-migration-config"),
    Ignored::Value("log-flush-frequency"),
    Ignored::Value("log-json-info-buffer-size"),
    Ignored::Bool("log-json-split-stream"),
    Ignored::Value("log-text-info-buffer-size"),
    Ignored::Bool("log-text-split-stream"),
    Ignored::Value("logging-format"),
    Ignored::Value("max-endpoints-per-subset"),
    Ignored::Value("min-compatibility-version"),
    Ignored::Value("min-resync-period"),
    Ignored::Value("namespace-sync-period"),
    Ignored::Bool("permit-address-sharing"),
    Ignored::Bool("permit-port-sharing"),
    Ignored::Bool("profiling"),
    Ignored::Value("pv-recycler-increment-timeout-nfs"),
    Ignored::Value("pv-recycler-minimum-timeout-hostpath"),
    Ignored::Value("pv-recycler-minimum-timeout-nfs"),
    Ignored::Value("pv-recycler-pod-template-filepath-hostpath"),
    Ignored::Value("pv-recycler-pod-template-filepath-nfs"),
    Ignored::Value("pv-recycler-timeout-increment-hostpath"),
    Ignored::Value("requestheader-allowed-names"),
    Ignored::Value("requestheader-client-ca-file"),
    Ignored::Value("requestheader-extra-headers-prefix"),
    Ignored::Value("requestheader-group-headers"),
    Ignored::Value("requestheader-uid-headers"),
    Ignored::Value("requestheader-username-headers"),
    Ignored::Value("route-reconciliation-period"),
    Ignored::Bool("show-hidden-metrics-for-version"),
    Ignored::Value("tls-cipher-suites"),
    Ignored::Value("tls-curve-preferences"),
    Ignored::Value("tls-min-version"),
    Ignored::Value("tls-sni-cert-key"),
    Ignored::Value("vmodule"),
    Ignored::Value("volume-host-allow-local-loopback"),
    Ignored::Value("volume-host-cidr-denylist"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use component_base::cli::{parse_from, without_ignored};
    use std::ffi::OsString;

    fn read(arguments: &str) -> Result<Flags, clap::Error> {
        let arguments = std::iter::once("x").chain(arguments.split_whitespace()).map(OsString::from);
        parse_from(without_ignored(arguments, IGNORED).0)
    }

    #[test]
    fn the_command_line_of_kubeadm_is_understood() {
        let flags = read(
            "--allocate-node-cidrs=true --authentication-kubeconfig=/etc/kubernetes/controller-manager.conf \
             --authorization-kubeconfig=/etc/kubernetes/controller-manager.conf --bind-address=127.0.0.1 \
             --client-ca-file=/etc/kubernetes/pki/ca.crt --cluster-cidr=10.244.0.0/16 --cluster-name=kubernetes \
             --cluster-signing-cert-file=/etc/kubernetes/pki/ca.crt --cluster-signing-key-file=/etc/kubernetes/pki/ca.key \
             --controllers=*,bootstrapsigner,tokencleaner --kubeconfig=/etc/kubernetes/controller-manager.conf \
             --leader-elect=true --requestheader-client-ca-file=/etc/kubernetes/pki/front-proxy-ca.crt \
             --root-ca-file=/etc/kubernetes/pki/ca.crt \
             --service-account-private-key-file=/etc/kubernetes/pki/sa.key \
             --service-cluster-ip-range=10.96.0.0/12 --use-service-account-credentials=true",
        )
        .unwrap();
        assert!(flags.allocate_node_cidrs && flags.leader_elect && flags.use_service_account_credentials);
        assert_eq!(flags.cluster_cidr, ["10.244.0.0/16"]);
        assert!(flags.runs(&["bootstrap-signer-controller", "bootstrapsigner"]));
        assert!(read("--no-such-flag=1").is_err());
        let publisher = ["kube-apiserver-serving-clustertrustbundle-publisher-controller"];
        assert!(!flags.runs(&publisher));
        assert!(read("--feature-gates=ClusterTrustBundle=true").unwrap().runs(&publisher));
    }

    #[test]
    fn signers_share_an_authority_or_have_their_own() {
        for (flags, expected) in [
            ("", Some(0)),
            ("--cluster-signing-cert-file=c --cluster-signing-key-file=k", Some(4)),
            ("--cluster-signing-cert-file=c", Some(0)),
            ("--cluster-signing-kubelet-client-cert-file=c --cluster-signing-kubelet-client-key-file=k", Some(1)),
            ("--cluster-signing-cert-file=c --cluster-signing-legacy-unknown-key-file=k", None),
        ] {
            assert_eq!(read(flags).unwrap().authorities().ok().map(|all| all.len()), expected, "{flags}");
        }
    }

    #[test]
    fn controllers_are_switched_on_and_off_by_name() {
        for (flag, name, expected) in [
            ("*", "deployment-controller", true),
            ("*", "token-cleaner-controller", false),
            ("*,-deployment-controller", "deployment-controller", false),
            ("deployment-controller", "replicaset-controller", false),
            ("*,token-cleaner-controller", "token-cleaner-controller", true),
        ] {
            let flags = read(&format!("--controllers={flag}")).unwrap();
            assert_eq!(flags.runs(&[name]), expected, "{flag} {name}");
        }
    }
}
