//! Kubeconfigs: one identity each, as kubeadm writes them, with the credentials inside or named by path.

use std::path::Path;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kube::config::Kubeconfig;
use time::OffsetDateTime;

use super::files;
use super::layout::{ClusterFlags, Layout};
use super::pki::{self, Signer};
use super::x509::{self, KeyAlgorithm, Pair, Subject};

/// The name of the cluster in every kubeconfig. As kubeadm's `ClusterName`.
const CLUSTER: &str = "kubernetes";

/// Whose kubeconfig it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Identity {
    Admin,
    SuperAdmin,
    ControllerManager,
    Scheduler,
    Kubelet,
    KubeProxy,
    PodNetwork,
}

impl Identity {
    /// All that a control-plane node has.
    pub(crate) const ALL: [Identity; 7] = [
        Identity::Admin,
        Identity::SuperAdmin,
        Identity::ControllerManager,
        Identity::Scheduler,
        Identity::Kubelet,
        Identity::KubeProxy,
        Identity::PodNetwork,
    ];

    /// The file's name, without `.conf`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Identity::Admin => "admin",
            Identity::SuperAdmin => "super-admin",
            Identity::ControllerManager => "controller-manager",
            Identity::Scheduler => "scheduler",
            Identity::Kubelet => "kubelet",
            Identity::KubeProxy => "kube-proxy",
            Identity::PodNetwork => "pod-network",
        }
    }

    /// Whom the client certificate names.
    fn subject(self, node_name: &str) -> Subject {
        let (common_name, organization) = match self {
            Identity::Admin => ("kubernetes-admin".to_owned(), Some("kubeadm:cluster-admins")),
            Identity::SuperAdmin => ("kubernetes-super-admin".to_owned(), Some("system:masters")),
            Identity::ControllerManager => ("system:kube-controller-manager".to_owned(), None),
            Identity::Scheduler => ("system:kube-scheduler".to_owned(), None),
            Identity::Kubelet => (format!("system:node:{node_name}"), Some("system:nodes")),
            Identity::KubeProxy => ("system:kube-proxy".to_owned(), None),
            Identity::PodNetwork => ("system:pod-network".to_owned(), None),
        };
        Subject { common_name, organization: organization.map(str::to_owned), client: true, ..Subject::default() }
    }

    /// Components of the control plane talk to the API server beside them, people and addons to the stable address.
    fn server(self, flags: &ClusterFlags) -> Result<String> {
        match self {
            Identity::ControllerManager | Identity::Scheduler | Identity::Kubelet => {
                Ok(format!("https://{}", flags.local_endpoint()?))
            }
            _ => flags.server_url(),
        }
    }
}

/// How a kubeconfig's user proves who it is.
#[derive(Debug)]
pub(crate) enum Credentials<'a> {
    /// A client certificate and its key, embedded.
    Certificate(&'a Pair),
    /// A bearer token, embedded.
    Token(&'a str),
    /// A bearer token in a file, read again when it changes.
    TokenFile(&'a Path),
    /// None: for discovery.
    Anonymous,
}

/// The text of a kubeconfig with one cluster, user and context.
pub(crate) fn render(server: &str, ca_certificate: &str, user: &str, credentials: &Credentials<'_>) -> String {
    let ca_certificate = STANDARD.encode(ca_certificate);
    let head = format!(
        "apiVersion: v1\nclusters:\n- cluster:\n    certificate-authority-data: {ca_certificate}\n    server: {server}\n  name: {CLUSTER}\n"
    );
    let credentials = match credentials {
        Credentials::Certificate(pair) => format!(
            "client-certificate-data: {}\n    client-key-data: {}",
            STANDARD.encode(&pair.certificate),
            STANDARD.encode(&pair.key)
        ),
        Credentials::Token(token) => format!("token: {token}"),
        Credentials::TokenFile(path) => format!("tokenFile: {}", path.display()),
        Credentials::Anonymous => {
            return format!(
                "apiVersion: v1\nclusters:\n- cluster:\n    certificate-authority-data: {ca_certificate}\n    server: {server}\n  name: \"\"\ncontexts: null\ncurrent-context: \"\"\nkind: Config\npreferences: {{}}\nusers: null\n"
            );
        }
    };
    format!(
        "{head}contexts:\n- context:\n    cluster: {CLUSTER}\n    user: {user}\n  name: {user}@{CLUSTER}\ncurrent-context: {user}@{CLUSTER}\nkind: Config\npreferences: {{}}\nusers:\n- name: {user}\n  user:\n    {credentials}\n"
    )
}

/// Makes the kubeconfigs of `identities` that are missing; returns the names of those made.
pub(crate) fn ensure(
    layout: &Layout,
    flags: &ClusterFlags,
    identities: &[Identity],
    algorithm: KeyAlgorithm,
    now: OffsetDateTime,
) -> Result<Vec<&'static str>> {
    let ca_certificate = pki::authority_certificate(layout, Signer::Cluster)?;
    let mut made = Vec::new();
    for identity in identities {
        let path = layout.kubeconfig(identity.name());
        let server = identity.server(flags)?;
        if let Some(text) = files::read_if_exists(&path)? {
            check_kept(&text, &server, &ca_certificate, now)
                .with_context(|| format!("{} exists but does not fit; remove or renew it", path.display()))?;
            continue;
        }
        let subject = identity.subject(&flags.node_name()?);
        let pair = pki::authority(layout, Signer::Cluster)?.issue(&subject, algorithm, now)?;
        let text = render(&server, &ca_certificate, &subject.common_name, &Credentials::Certificate(&pair));
        files::write(&path, text, files::PRIVATE)?;
        made.push(identity.name());
    }
    Ok(made)
}

/// Whether a kubeconfig that is there already serves: same server, same authority, not expired.
fn check_kept(text: &str, server: &str, ca_certificate: &str, now: OffsetDateTime) -> Result<()> {
    let config = Kubeconfig::from_yaml(text).context("it is not a kubeconfig")?;
    let cluster = config.clusters.first().and_then(|named| named.cluster.as_ref()).context("it names no cluster")?;
    if cluster.server.as_deref() != Some(server) {
        bail!("its server is {}, not {server}", cluster.server.as_deref().unwrap_or("missing"));
    }
    if let Some(encoded) = &cluster.certificate_authority_data
        && STANDARD.decode(encoded).ok().as_deref() != Some(ca_certificate.as_bytes())
    {
        bail!("its certificate authority is not this cluster's");
    }
    match client_certificate(&config)? {
        Some(certificate) if certificate.not_after <= now => {
            bail!("its certificate expired on {}", certificate.not_after.date())
        }
        _ => Ok(()),
    }
}

/// The client certificate embedded in a kubeconfig.
fn client_certificate(config: &Kubeconfig) -> Result<Option<x509::Inspected>> {
    let encoded = config
        .auth_infos
        .first()
        .and_then(|named| named.auth_info.as_ref())
        .and_then(|user| user.client_certificate_data.as_ref());
    let Some(encoded) = encoded else { return Ok(None) };
    let pem = STANDARD.decode(encoded).context("client-certificate-data is not base64")?;
    x509::inspect(&String::from_utf8_lossy(&pem)).map(Some)
}

/// The client certificate embedded in the kubeconfig of `identity`; `None` where there is none.
pub(crate) fn inspect(layout: &Layout, identity: Identity) -> Result<Option<x509::Inspected>> {
    let path = layout.kubeconfig(identity.name());
    let Some(text) = files::read_if_exists(&path)? else { return Ok(None) };
    let config = Kubeconfig::from_yaml(&text).with_context(|| format!("{} is not a kubeconfig", path.display()))?;
    client_certificate(&config).with_context(|| format!("{} is unusable", path.display()))
}

/// Issues the embedded client certificate again; `None` where there is none.
pub(crate) fn renew(
    layout: &Layout,
    identity: Identity,
    algorithm: KeyAlgorithm,
    now: OffsetDateTime,
) -> Result<Option<()>> {
    let Some(certificate) = inspect(layout, identity)? else { return Ok(None) };
    let path = layout.kubeconfig(identity.name());
    let config = Kubeconfig::from_yaml(&files::read(&path)?)?;
    let cluster = config.clusters.into_iter().next().and_then(|named| named.cluster);
    let server =
        cluster.and_then(|cluster| cluster.server).with_context(|| format!("{} names no server", path.display()))?;
    let pair = pki::authority(layout, Signer::Cluster)?.issue(&certificate.subject, algorithm, now)?;
    let ca_certificate = pki::authority_certificate(layout, Signer::Cluster)?;
    let text = render(&server, &ca_certificate, &certificate.subject.common_name, &Credentials::Certificate(&pair));
    files::write(&path, text, files::PRIVATE)?;
    Ok(Some(()))
}

#[cfg(test)]
mod tests {
    use super::super::layout::tests::flags;
    use super::*;

    fn now() -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(1_800_000_000).expect("a time")
    }

    #[test]
    fn every_identity_has_a_kubeconfig_of_its_own() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let layout = Layout::below(dir.path());
        pki::ensure(&layout, &flags(), KeyAlgorithm::EcdsaP256, now())?;
        assert_eq!(
            ensure(&layout, &flags(), &Identity::ALL, KeyAlgorithm::EcdsaP256, now())?.len(),
            Identity::ALL.len()
        );
        for (identity, name, group) in [
            (Identity::Admin, "kubernetes-admin", Some("kubeadm:cluster-admins")),
            (Identity::SuperAdmin, "kubernetes-super-admin", Some("system:masters")),
            (Identity::Kubelet, "system:node:cp", Some("system:nodes")),
            (Identity::KubeProxy, "system:kube-proxy", None),
        ] {
            let subject = inspect(&layout, identity)?.expect("a certificate").subject;
            assert_eq!((subject.common_name.as_str(), subject.organization.as_deref()), (name, group));
            assert!(subject.client && !subject.server);
        }
        let text = files::read(&layout.kubeconfig("admin"))?;
        let config = Kubeconfig::from_yaml(&text)?;
        assert_eq!(config.current_context.as_deref(), Some("kubernetes-admin@kubernetes"));
        assert!(ensure(&layout, &flags(), &Identity::ALL, KeyAlgorithm::EcdsaP256, now())?.is_empty());
        Ok(())
    }

    #[test]
    fn a_kubeconfig_of_another_cluster_is_an_error() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let layout = Layout::below(dir.path());
        pki::ensure(&layout, &flags(), KeyAlgorithm::EcdsaP256, now())?;
        ensure(&layout, &flags(), &[Identity::Admin], KeyAlgorithm::EcdsaP256, now())?;
        let elsewhere = ClusterFlags { apiserver_bind_port: 7443, ..flags() };
        let error = ensure(&layout, &elsewhere, &[Identity::Admin], KeyAlgorithm::EcdsaP256, now()).unwrap_err();
        assert!(
            format!("{error:#}").contains("its server is https://10.0.0.1:6443, not https://10.0.0.1:7443"),
            "{error:#}"
        );
        std::fs::remove_dir_all(layout.pki())?;
        pki::ensure(&layout, &flags(), KeyAlgorithm::EcdsaP256, now())?;
        let error = ensure(&layout, &flags(), &[Identity::Admin], KeyAlgorithm::EcdsaP256, now()).unwrap_err();
        assert!(format!("{error:#}").contains("certificate authority is not this cluster's"), "{error:#}");
        Ok(())
    }

    #[test]
    fn a_renewed_kubeconfig_keeps_who_it_is() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let layout = Layout::below(dir.path());
        pki::ensure(&layout, &flags(), KeyAlgorithm::EcdsaP256, now())?;
        ensure(&layout, &flags(), &[Identity::Scheduler], KeyAlgorithm::EcdsaP256, now())?;
        let before = inspect(&layout, Identity::Scheduler)?.expect("a certificate");
        renew(&layout, Identity::Scheduler, KeyAlgorithm::EcdsaP256, now() + x509::LEAF_LIFETIME / 2)?
            .expect("renewed");
        let after = inspect(&layout, Identity::Scheduler)?.expect("a certificate");
        assert_eq!(before.subject, after.subject);
        assert!(after.not_after > before.not_after);
        assert!(renew(&layout, Identity::PodNetwork, KeyAlgorithm::EcdsaP256, now())?.is_none());
        Ok(())
    }
}
