//! The command line: kube-scheduler's.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{ArgAction, Parser};
use component_base::cli::{CommonFlags, Ignored};

/// Flags of kube-scheduler that are accepted without effect.
pub const IGNORED: &[Ignored] = &[
    Ignored::Value("allow-metric-labels"),
    Ignored::Value("allow-metric-labels-manifest"),
    Ignored::Bool("authentication-skip-lookup"),
    Ignored::Value("authentication-token-webhook-cache-ttl"),
    Ignored::Bool("authentication-tolerate-lookup-failure"),
    Ignored::Value("authorization-webhook-cache-authorized-ttl"),
    Ignored::Value("authorization-webhook-cache-unauthorized-ttl"),
    Ignored::Value("cert-dir"),
    Ignored::Bool("contention-profiling"),
    Ignored::Value("disabled-metrics"),
    Ignored::Bool("disable-http2-serving"),
    Ignored::Value("emulated-version"),
    Ignored::Bool("emulation-forward-compatible"),
    Ignored::Value("feature-gates"),
    Ignored::Value("http2-max-streams-per-connection"),
    Ignored::Value("kube-api-burst"),
    Ignored::Value("kube-api-content-type"),
    Ignored::Value("kube-api-qps"),
    Ignored::Value("leader-elect-resource-lock"),
    Ignored::Value("log-flush-frequency"),
    Ignored::Value("log-json-info-buffer-size"),
    Ignored::Bool("log-json-split-stream"),
    Ignored::Value("log-text-info-buffer-size"),
    Ignored::Bool("log-text-split-stream"),
    Ignored::Value("logging-format"),
    Ignored::Value("min-compatibility-version"),
    Ignored::Bool("permit-address-sharing"),
    Ignored::Bool("permit-port-sharing"),
    Ignored::Bool("profiling"),
    Ignored::Value("requestheader-allowed-names"),
    Ignored::Value("requestheader-client-ca-file"),
    Ignored::Value("requestheader-extra-headers-prefix"),
    Ignored::Value("requestheader-group-headers"),
    Ignored::Value("requestheader-uid-headers"),
    Ignored::Value("requestheader-username-headers"),
    Ignored::Value("show-hidden-metrics-for-version"),
    Ignored::Value("tls-cipher-suites"),
    Ignored::Value("tls-curve-preferences"),
    Ignored::Value("tls-min-version"),
    Ignored::Value("tls-sni-cert-key"),
    Ignored::Value("vmodule"),
];

/// Finds a node for every pod that has none.
#[derive(Clone, Debug, Parser)]
#[command(name = "kube-scheduler", version)]
pub struct Options {
    /// The kubeconfig with which the scheduler reaches the apiserver
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The apiserver's address, in place of the kubeconfig's
    #[arg(long, value_name = "URL")]
    pub master: Option<String>,
    /// The kubeconfig for asking the apiserver who a caller of the secure port is
    #[arg(long, value_name = "FILE")]
    pub authentication_kubeconfig: Option<PathBuf>,
    /// The kubeconfig for asking the apiserver what a caller of the secure port may do
    #[arg(long, value_name = "FILE")]
    pub authorization_kubeconfig: Option<PathBuf>,
    /// Paths of the secure port that need no authorization
    #[arg(long, value_delimiter = ',', default_value = "/healthz,/readyz,/livez")]
    pub authorization_always_allow_paths: Vec<String>,
    /// A KubeSchedulerConfiguration
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How long a refused pod waits for something that helps it before it is tried again all the same
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = apimachinery::time::parse_duration)]
    pub pod_max_in_unschedulable_pods_duration: std::time::Duration,
    /// The address of the secure port
    #[arg(long, default_value = "0.0.0.0")]
    pub bind_address: IpAddr,
    /// The port of health and metrics; 0 serves none
    #[arg(long, default_value_t = 10259)]
    pub secure_port: u16,
    /// The certificate of the secure port; a self-signed one is made without it
    #[arg(long, value_name = "FILE", requires = "tls_private_key_file")]
    pub tls_cert_file: Option<PathBuf>,
    #[arg(long, value_name = "FILE", requires = "tls_cert_file")]
    pub tls_private_key_file: Option<PathBuf>,
    /// The authorities whose client certificates name callers of the secure port
    #[arg(long, value_name = "FILE")]
    pub client_ca_file: Option<PathBuf>,
    /// Whether to work only while holding the lease
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = ArgAction::Set)]
    pub leader_elect: Option<bool>,
    #[arg(long, value_name = "DURATION", value_parser = apimachinery::time::parse_duration)]
    pub leader_elect_lease_duration: Option<std::time::Duration>,
    #[arg(long, value_name = "DURATION", value_parser = apimachinery::time::parse_duration)]
    pub leader_elect_renew_deadline: Option<std::time::Duration>,
    #[arg(long, value_name = "DURATION", value_parser = apimachinery::time::parse_duration)]
    pub leader_elect_retry_period: Option<std::time::Duration>,
    #[arg(long)]
    pub leader_elect_resource_name: Option<String>,
    #[arg(long)]
    pub leader_elect_resource_namespace: Option<String>,
    #[command(flatten)]
    pub common: CommonFlags,
}

#[cfg(test)]
mod tests {
    use component_base::cli::{parse_from, without_ignored};

    use super::*;

    #[test]
    fn kubeadms_command_line_is_taken() {
        let line = "kube-scheduler --authentication-kubeconfig=/etc/kubernetes/scheduler.conf \
            --authorization-kubeconfig=/etc/kubernetes/scheduler.conf --bind-address=127.0.0.1 \
            --kubeconfig=/etc/kubernetes/scheduler.conf --leader-elect=true --profiling=false";
        let (kept, warnings) = without_ignored(line.split_whitespace().map(Into::into), IGNORED);
        let options: Options = parse_from(kept).expect("options");
        assert_eq!(options.kubeconfig.as_deref(), Some(std::path::Path::new("/etc/kubernetes/scheduler.conf")));
        assert_eq!((options.bind_address.to_string().as_str(), options.secure_port), ("127.0.0.1", 10259));
        assert_eq!((options.leader_elect, warnings.len()), (Some(true), 1));
        assert_eq!(options.authorization_always_allow_paths, ["/healthz", "/readyz", "/livez"]);
    }
}
