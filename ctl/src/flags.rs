//! The flags that every command understands, with kubectl's names, and the logging that `-v` turns on.

use std::path::PathBuf;

use clap::Args;

/// kubectl's global flags: which cluster, as whom, in which namespace.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Global flags")]
pub(crate) struct GlobalFlags {
    /// Path to the kubeconfig file (default: $KUBECONFIG, then ~/.kube/config)
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The name of the kubeconfig context to use
    #[arg(long, global = true)]
    pub(crate) context: Option<String>,
    /// The name of the kubeconfig cluster to use
    #[arg(long, global = true)]
    pub(crate) cluster: Option<String>,
    /// The name of the kubeconfig user to use
    #[arg(long, global = true)]
    pub(crate) user: Option<String>,
    /// The namespace of this request
    #[arg(short = 'n', long, global = true)]
    pub(crate) namespace: Option<String>,
    /// The address and port of the API server
    #[arg(short = 's', long, global = true, value_name = "URL")]
    pub(crate) server: Option<String>,
    /// Bearer token for authentication to the API server
    #[arg(long, global = true)]
    pub(crate) token: Option<String>,
    /// Path to a certificate authority's file
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) certificate_authority: Option<PathBuf>,
    /// Path to a client certificate file for TLS
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) client_certificate: Option<PathBuf>,
    /// Path to a client key file for TLS
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) client_key: Option<PathBuf>,
    /// Do not check the server's certificate; this makes the connection insecure
    #[arg(long, global = true, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value_t = false, action = clap::ArgAction::Set)]
    pub(crate) insecure_skip_tls_verify: bool,
    /// Server name to check the server's certificate against
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) tls_server_name: Option<String>,
    /// User to impersonate
    #[arg(long = "as", global = true, value_name = "USER")]
    pub(crate) impersonate_user: Option<String>,
    /// Group to impersonate; may be repeated
    #[arg(long = "as-group", global = true, value_name = "GROUP")]
    pub(crate) impersonate_groups: Vec<String>,
    /// How long to wait for one request (1s, 2m, 3h); 0 waits for ever
    #[arg(long, global = true, value_name = "DURATION")]
    pub(crate) request_timeout: Option<String>,
    /// How much to log (0-9)
    #[arg(short = 'v', long = "v", global = true, value_name = "LEVEL", default_value_t = 0)]
    pub(crate) verbosity: u8,
}

/// Sends logs to standard error: warnings at level 0, everything from level 8 on.
pub(crate) fn init_logging(verbosity: u8) {
    let level = match verbosity {
        // The client says at each request that set-up and `--insecure-skip-tls-verify` check no certificate.
        0..=1 => "warn,kube_client=error",
        2..=4 => "info",
        5..=7 => "debug",
        _ => "trace",
    };
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(level))
        .with_writer(std::io::stderr)
        .with_target(verbosity >= 5)
        .without_time()
        .init();
}
