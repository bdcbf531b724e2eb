//! The node's certificates: TLS bootstrap and renewal of the client's, and the serving certificate of the kubelet.
//!
//! Files are Kubernetes': `<cert-dir>/kubelet-client-current.pem`, `kubelet-server-current.pem`, `kubelet.crt` and
//! `kubelet.key`. Who uses them reads them again when they change, so a renewal needs no restart.

mod csr;
mod store;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::config::KubeletConfiguration;
use crate::options::Flags;
use csr::{CsrError, Wish};
use store::Store;

/// Why the node has no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("{0}")]
    Failed(String),
}

/// How often a bootstrap that failed is tried again.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// The longest sleep of the renewal task: the clock may be set meanwhile.
const MAX_SLEEP: Duration = Duration::from_secs(3600);

const USER_AGENT: &str = "kubelet/v1.36.0 (linux/amd64) pilothouse";

/// The client configuration of the node's identity: `--kubeconfig`, or, where that file is not there yet (or its certificate
/// has expired), one made by asking with `--bootstrap-kubeconfig` (and written to `--kubeconfig`). None: standalone. Starts
/// the renewal task.
pub async fn client(
    flags: &Flags,
    config: &KubeletConfiguration,
    node_name: &str,
    shutdown: CancellationToken,
) -> Result<Option<kube::Config>, CertificateError> {
    let Some(kubeconfig) = flags.kubeconfig.as_deref() else { return Ok(None) };
    let store = Store::new(&flags.cert_dir, "kubelet-client");
    let wish = Wish {
        signer: csr::CLIENT_SIGNER,
        usages: csr::CLIENT_USAGES,
        node_name: node_name.to_owned(),
        dns_names: Vec::new(),
        ip_addresses: Vec::new(),
    };
    if !is_usable(kubeconfig) {
        if let Some(bootstrap_kubeconfig) = flags.bootstrap_kubeconfig.as_deref().filter(|path| path.exists()) {
            tokio::select! {
                // A stop while nobody has approved yet.
                () = shutdown.cancelled() => return Err(failed("shut down while waiting for a certificate")),
                done = bootstrap(bootstrap_kubeconfig, kubeconfig, &store, &wish) => done?,
            }
        } else if !kubeconfig.exists() {
            return Err(failed(format!(
                "{} does not exist; give it, or a bootstrap token with --bootstrap-kubeconfig",
                kubeconfig.display()
            )));
        }
    }
    let loaded = component_base::client::load(Some(kubeconfig)).await.map_err(failed)?;
    if config.rotate_certificates && client_file(&loaded).is_some_and(|file| file == store.current()) {
        let client = component_base::client::connect(loaded.clone(), USER_AGENT).map_err(failed)?;
        tokio::spawn(renew(client, store, wish, shutdown));
    }
    Ok(Some(loaded))
}

/// Files of the serving certificate: as configured, from the API (`serverTLSBootstrap`), or self-signed in `--cert-dir`.
///
/// While the API has not signed yet, a self-signed certificate stands in, at the same path.
pub async fn serving(
    flags: &Flags,
    config: &KubeletConfiguration,
    client: Option<&kube::Client>,
    node_name: &str,
    addresses: &[String],
    shutdown: CancellationToken,
) -> Result<(PathBuf, PathBuf), CertificateError> {
    if let (Some(certificate), Some(key)) = (&config.tls_cert_file, &config.tls_private_key_file) {
        return Ok((certificate.clone(), key.clone()));
    }
    let ip_addresses: Vec<IpAddr> = addresses.iter().filter_map(|address| address.parse().ok()).collect();
    let mut dns_names = vec![node_name.to_owned()];
    dns_names.extend(addresses.iter().filter(|name| name.parse::<IpAddr>().is_err() && *name != node_name).cloned());
    if let Some(client) = client.filter(|_| config.server_tls_bootstrap) {
        let store = Store::new(&flags.cert_dir, "kubelet-server");
        if store.info().is_none_or(|info| info.not_after <= now_s()) {
            let (certificate, key) =
                component_base::x509::self_signed(node_name, &dns_names, &ip_addresses).map_err(failed)?;
            store.store(&certificate, &key).map_err(failed)?;
        }
        let current = store.current();
        let wish = Wish {
            signer: csr::SERVING_SIGNER,
            usages: csr::SERVING_USAGES,
            node_name: node_name.to_owned(),
            dns_names,
            ip_addresses,
        };
        tokio::spawn(renew(client.clone(), store, wish, shutdown));
        return Ok((current.clone(), current));
    }
    self_signed(&flags.cert_dir, node_name, &dns_names, &ip_addresses)
}

/// `kubelet.crt` and `kubelet.key`: the ones of an earlier start while they hold and name this node, else new ones.
fn self_signed(
    directory: &Path,
    node_name: &str,
    dns_names: &[String],
    ip_addresses: &[IpAddr],
) -> Result<(PathBuf, PathBuf), CertificateError> {
    let (certificate_path, key_path) = (directory.join("kubelet.crt"), directory.join("kubelet.key"));
    let usable = key_path.exists()
        && std::fs::read(&certificate_path).ok().and_then(|pem| component_base::x509::read_pem(&pem).ok()).is_some_and(
            |info| {
                const A_MONTH_S: i64 = 30 * 24 * 3600;
                info.not_after > now_s() + A_MONTH_S
                    && ip_addresses.iter().all(|address| info.ip_addresses.contains(address))
            },
        );
    if !usable {
        let common_name = format!("{node_name}@{}", now_s());
        let (certificate, key) =
            component_base::x509::self_signed(&common_name, dns_names, ip_addresses).map_err(failed)?;
        store::write_private(&key_path, &key).map_err(failed)?;
        store::write_private(&certificate_path, &certificate).map_err(failed)?;
    }
    Ok((certificate_path, key_path))
}

/// Ask for the first client certificate with the bootstrap identity, until there is one; then write `--kubeconfig`.
async fn bootstrap(
    bootstrap_kubeconfig: &Path,
    kubeconfig: &Path,
    store: &Store,
    wish: &Wish,
) -> Result<(), CertificateError> {
    let mut pause = RETRY_FIRST;
    loop {
        let attempt = async {
            let config =
                component_base::client::load(Some(bootstrap_kubeconfig)).await.map_err(|error| error.to_string())?;
            let client = component_base::client::connect(config, USER_AGENT).map_err(|error| error.to_string())?;
            obtain(&client, store, wish).await.map_err(|error| error.to_string())
        };
        match attempt.await {
            Ok(()) => break,
            Err(error) => {
                tracing::warn!(error, retry_in_s = pause.as_secs(), "TLS bootstrap failed");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_MAX);
            }
        }
    }
    let text = std::fs::read_to_string(bootstrap_kubeconfig).map_err(failed)?;
    let written = node_kubeconfig(&text, &store.current()).map_err(failed)?;
    store::write_private(kubeconfig, &written).map_err(|error| failed(format!("{}: {error}", kubeconfig.display())))?;
    tracing::info!(kubeconfig = %kubeconfig.display(), "TLS bootstrap done");
    Ok(())
}

/// One certificate, asked for and stored.
async fn obtain(client: &kube::Client, store: &Store, wish: &Wish) -> Result<(), CsrError> {
    let key = store.pending_key().map_err(CsrError::Other)?;
    match csr::ask(client, &key, wish).await {
        Ok(certificate) => {
            store.store(&certificate, &key.serialize_pem()).map_err(|error| CsrError::Other(error.to_string()))?;
            store.drop_pending_key();
            tracing::info!(signer = wish.signer, file = %store.current().display(), "certificate stored");
            Ok(())
        }
        Err(error) => {
            // Another attempt needs another request, and so another key.
            if !matches!(error, CsrError::Other(_)) {
                store.drop_pending_key();
            }
            Err(error)
        }
    }
}

/// Renew the certificate whenever 70 to 90 % of its life is over, until shutdown.
async fn renew(client: kube::Client, store: Store, wish: Wish, shutdown: CancellationToken) {
    let share = 0.7 + 0.2 * rand::random::<f64>();
    let mut retry = RETRY_FIRST;
    loop {
        let due = store.info().map_or(0, |info| {
            // A stand-in is to be replaced at once.
            let is_stand_in = info.organizations.is_empty();
            if is_stand_in { 0 } else { renewal_time_s(info.not_before, info.not_after, share) }
        });
        let wait = Duration::from_secs(u64::try_from(due - now_s()).unwrap_or(0)).min(MAX_SLEEP);
        if wait.is_zero() {
            let done = tokio::select! {
                () = shutdown.cancelled() => return,
                done = obtain(&client, &store, &wish) => done,
            };
            match done {
                Ok(()) => {
                    retry = RETRY_FIRST;
                    continue;
                }
                Err(error) => {
                    tracing::warn!(signer = wish.signer, %error, retry_in_s = retry.as_secs(), "certificate not renewed");
                    if tokio::time::timeout(retry, shutdown.cancelled()).await.is_ok() {
                        return;
                    }
                    retry = (retry * 2).min(RETRY_MAX);
                    continue;
                }
            }
        }
        if tokio::time::timeout(wait, shutdown.cancelled()).await.is_ok() {
            return;
        }
    }
}

/// When `share` of a certificate's life is over.
fn renewal_time_s(not_before: i64, not_after: i64, share: f64) -> i64 {
    let life = not_after.saturating_sub(not_before).max(0);
    not_before + (life as f64 * share) as i64
}

/// Whether the kubeconfig is there, and its client certificate (if it has one in a file) has not expired.
fn is_usable(kubeconfig: &Path) -> bool {
    let Ok(parsed) = kube::config::Kubeconfig::read_from(kubeconfig) else { return false };
    let files = parsed.auth_infos.iter().filter_map(|named| named.auth_info.as_ref()?.client_certificate.clone());
    for file in files {
        let path = kubeconfig.parent().map_or_else(|| PathBuf::from(&file), |parent| parent.join(&file));
        let Some(info) = std::fs::read(path).ok().and_then(|pem| component_base::x509::read_pem(&pem).ok()) else {
            return false;
        };
        if info.not_after <= now_s() {
            return false;
        }
    }
    true
}

fn client_file(config: &kube::Config) -> Option<PathBuf> {
    config.auth_info.client_certificate.as_ref().map(PathBuf::from)
}

/// The bootstrap kubeconfig's cluster with the node's own certificate for its user.
fn node_kubeconfig(bootstrap: &str, certificate: &Path) -> Result<String, String> {
    use serde_json::{Value, json};
    let parsed: Value = apimachinery::yaml::from_str(bootstrap).map_err(|error| error.to_string())?;
    let named = |list: &str, name: &str| {
        let items = parsed.get(list)?.as_array()?;
        items.iter().find(|item| item.get("name").and_then(Value::as_str) == Some(name))
    };
    let current = parsed.get("current-context").and_then(Value::as_str).ok_or("no current-context")?;
    let context =
        named("contexts", current).and_then(|item| item.get("context")).ok_or("the current context is missing")?;
    let cluster = context.get("cluster").and_then(Value::as_str).and_then(|name| named("clusters", name));
    let cluster = cluster.and_then(|item| item.get("cluster")).ok_or("the current context's cluster is missing")?;
    let file = certificate.to_string_lossy();
    let written = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "default-cluster", "cluster": cluster}],
        "contexts": [{"name": "default-context",
            "context": {"cluster": "default-cluster", "namespace": "default", "user": "default-auth"}}],
        "current-context": "default-context",
        "users": [{"name": "default-auth", "user": {"client-certificate": file, "client-key": file}}],
    });
    apimachinery::yaml::to_string(&written).map_err(|error| error.to_string())
}

fn now_s() -> i64 {
    Timestamp::now().as_second()
}

fn failed(error: impl std::fmt::Display) -> CertificateError {
    CertificateError::Failed(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOTSTRAP: &str = "apiVersion: v1
kind: Config
clusters: [{name: kubernetes, cluster: {server: 'https://10.0.0.1:6443', certificate-authority-data: QUJD}}]
contexts: [{name: tls-bootstrap-token-user@kubernetes, context: {cluster: kubernetes, user: tls-bootstrap-token-user}}]
current-context: tls-bootstrap-token-user@kubernetes
users: [{name: tls-bootstrap-token-user, user: {token: abcdef.0123456789abcdef}}]
";

    #[test]
    fn the_node_kubeconfig_keeps_the_cluster_and_names_the_certificate() {
        let text =
            node_kubeconfig(BOOTSTRAP, Path::new("/var/lib/kubelet/pki/kubelet-client-current.pem")).expect("written");
        assert!(
            text.contains("server: https://10.0.0.1:6443") && text.contains("certificate-authority-data: QUJD"),
            "{text}"
        );
        assert!(text.contains("client-certificate: /var/lib/kubelet/pki/kubelet-client-current.pem"), "{text}");
        assert!(!text.contains("abcdef"), "{text}");
        let parsed: kube::config::Kubeconfig = apimachinery::yaml::from_str(&text).expect("a kubeconfig");
        assert_eq!(parsed.current_context.as_deref(), Some("default-context"));
    }

    #[test]
    fn a_kubeconfig_with_a_lost_certificate_is_not_usable() {
        let dir = tempfile::tempdir().expect("a directory");
        let kubeconfig = dir.path().join("kubelet.conf");
        assert!(!is_usable(&kubeconfig));
        let store = Store::new(dir.path(), "kubelet-client");
        std::fs::write(&kubeconfig, node_kubeconfig(BOOTSTRAP, &store.current()).expect("text")).expect("written");
        assert!(!is_usable(&kubeconfig));
        let (certificate, key) = component_base::x509::self_signed("n", &[], &[]).expect("made");
        store.store(&certificate, &key).expect("stored");
        assert!(is_usable(&kubeconfig));
    }

    #[test]
    fn renewal_comes_late_in_life() {
        assert_eq!(renewal_time_s(1000, 2000, 0.8), 1800);
        assert_eq!(renewal_time_s(2000, 1000, 0.8), 2000);
    }

    #[tokio::test]
    async fn a_self_signed_serving_certificate_is_kept_while_it_fits() {
        let dir = tempfile::tempdir().expect("a directory");
        let flags = Flags { cert_dir: dir.path().to_owned(), ..Flags::default() };
        let config = KubeletConfiguration::default();
        let make = async |addresses: &[&str]| {
            let addresses: Vec<String> = addresses.iter().map(|address| (*address).to_owned()).collect();
            let (certificate, _) =
                serving(&flags, &config, None, "n1", &addresses, CancellationToken::new()).await.expect("files");
            std::fs::read_to_string(certificate).expect("text")
        };
        let first = make(&["10.0.0.1"]).await;
        assert_eq!(make(&["10.0.0.1"]).await, first);
        assert_ne!(make(&["10.0.0.2"]).await, first);
    }
}
