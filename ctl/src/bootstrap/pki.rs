//! The certificates and keys under `/etc/kubernetes/pki`, as kubeadm names, fills and keeps them: what exists and is
//! valid stays, what is missing is made, what names the wrong thing is an error with a way out.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use rcgen::KeyPair;
use time::OffsetDateTime;

use super::files;
use super::layout::{ClusterFlags, Layout};
use super::x509::{self, Authority, KeyAlgorithm, Pair, Subject};

/// Who signs a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signer {
    Cluster,
    FrontProxy,
    Etcd,
}

impl Signer {
    /// All authorities, in the order in which they are made.
    pub(crate) const ALL: [Signer; 3] = [Signer::Cluster, Signer::FrontProxy, Signer::Etcd];

    /// The file name below the certificate directory, without `.crt` and `.key`.
    pub(crate) fn stem(self) -> &'static str {
        match self {
            Signer::Cluster => "ca",
            Signer::FrontProxy => "front-proxy-ca",
            Signer::Etcd => "etcd/ca",
        }
    }

    fn common_name(self) -> &'static str {
        match self {
            Signer::Cluster => "kubernetes",
            Signer::FrontProxy => "front-proxy-ca",
            Signer::Etcd => "etcd-ca",
        }
    }
}

/// A certificate that is not an authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Leaf {
    pub(crate) stem: &'static str,
    pub(crate) signer: Signer,
    pub(crate) subject: Subject,
}

/// The leaf certificates of a control-plane node. As kubeadm's `GetDefaultCertList`.
pub(crate) fn leaves(flags: &ClusterFlags) -> Result<Vec<Leaf>> {
    let node = flags.node_name()?;
    let address = flags.advertise_address()?.to_string();
    let first_service = flags
        .service_cidr
        .kubernetes_service()
        .with_context(|| format!("--service-cidr {} is too small", flags.service_cidr))?
        .to_string();

    let mut api_sans = vec![
        node.clone(),
        "kubernetes".to_owned(),
        "kubernetes.default".to_owned(),
        "kubernetes.default.svc".to_owned(),
        format!("kubernetes.default.svc.{}", flags.service_dns_domain),
        first_service,
        address.clone(),
    ];
    api_sans.extend(flags.control_plane_host().map(str::to_owned));
    api_sans.extend(flags.apiserver_cert_extra_sans.iter().cloned());
    let mut seen = std::collections::BTreeSet::new();
    api_sans.retain(|san| seen.insert(san.clone()));
    if let Some(bad) = api_sans.iter().find(|san| !x509::is_san(san)) {
        bail!("{bad:?} cannot stand in a certificate: it is neither an address nor a DNS name");
    }
    let etcd_sans: Vec<String> =
        [node.as_str(), "localhost", &address, "127.0.0.1", "::1"].iter().map(|san| (*san).to_owned()).collect();

    let server =
        |name: &str, sans: Vec<String>| Subject { common_name: name.into(), sans, server: true, ..Subject::default() };
    let client = |name: &str| Subject { common_name: name.into(), client: true, ..Subject::default() };
    Ok(vec![
        Leaf { stem: "apiserver", signer: Signer::Cluster, subject: server("kube-apiserver", api_sans) },
        Leaf {
            stem: "apiserver-kubelet-client",
            signer: Signer::Cluster,
            subject: Subject {
                organization: Some("kubeadm:cluster-admins".into()),
                ..client("kube-apiserver-kubelet-client")
            },
        },
        Leaf { stem: "front-proxy-client", signer: Signer::FrontProxy, subject: client("front-proxy-client") },
        Leaf {
            stem: "etcd/server",
            signer: Signer::Etcd,
            subject: Subject { client: true, ..server(&node, etcd_sans.clone()) },
        },
        Leaf { stem: "etcd/peer", signer: Signer::Etcd, subject: Subject { client: true, ..server(&node, etcd_sans) } },
        Leaf { stem: "etcd/healthcheck-client", signer: Signer::Etcd, subject: client("kube-etcd-healthcheck-client") },
        Leaf { stem: "apiserver-etcd-client", signer: Signer::Etcd, subject: client("kube-apiserver-etcd-client") },
    ])
}

/// Makes what is missing under the certificate directory; returns the stems that were made.
pub(crate) fn ensure(
    layout: &Layout,
    flags: &ClusterFlags,
    algorithm: KeyAlgorithm,
    now: OffsetDateTime,
) -> Result<Vec<String>> {
    let mut made = Vec::new();
    for signer in Signer::ALL {
        if ensure_authority(layout, signer, algorithm, now)? {
            made.push(signer.stem().to_owned());
        }
    }
    for leaf in leaves(flags)? {
        if ensure_leaf(layout, &leaf, algorithm, now)? {
            made.push(leaf.stem.to_owned());
        }
    }
    if ensure_service_account_key(layout)? {
        made.push("sa".to_owned());
    }
    Ok(made)
}

/// The authority's certificate, PEM.
pub(crate) fn authority_certificate(layout: &Layout, signer: Signer) -> Result<String> {
    files::read(&certificate_path(layout, signer.stem()))
}

/// Loads an authority to sign with.
pub(crate) fn authority(layout: &Layout, signer: Signer) -> Result<Authority> {
    let path = certificate_path(layout, signer.stem());
    let pair = read_pair(layout, signer.stem())?.with_context(|| {
        format!("{} and its key are needed to sign: run this on a control-plane node", path.display())
    })?;
    Authority::load(&pair).with_context(|| format!("{} is unusable", path.display()))
}

fn ensure_authority(layout: &Layout, signer: Signer, algorithm: KeyAlgorithm, now: OffsetDateTime) -> Result<bool> {
    let stem = signer.stem();
    let path = certificate_path(layout, stem);
    if let Some(certificate) = files::read_if_exists(&path)? {
        let inspected = x509::inspect(&certificate).with_context(|| format!("{} is unusable", path.display()))?;
        if !inspected.is_authority {
            bail!("{} is not a certificate authority", path.display());
        }
        if inspected.not_after <= now {
            bail!("{} expired on {}", path.display(), inspected.not_after.date());
        }
        // The key may be kept elsewhere: what it has signed is then there already, or its absence is reported later.
        return Ok(false);
    }
    write_pair(layout, stem, &Authority::generate(signer.common_name(), algorithm, now)?)?;
    Ok(true)
}

fn ensure_leaf(layout: &Layout, leaf: &Leaf, algorithm: KeyAlgorithm, now: OffsetDateTime) -> Result<bool> {
    if let Some(pair) = read_pair(layout, leaf.stem)? {
        let path = certificate_path(layout, leaf.stem);
        let found = x509::inspect(&pair.certificate).with_context(|| format!("{} is unusable", path.display()))?;
        check_kept(leaf, &found, now).with_context(|| {
            format!("{} exists but does not fit; remove it with its key, or renew it", path.display())
        })?;
        return Ok(false);
    }
    let issued = authority(layout, leaf.signer)?.issue(&leaf.subject, algorithm, now)?;
    write_pair(layout, leaf.stem, &issued)?;
    Ok(true)
}

/// Whether a certificate that is there already serves the purpose.
fn check_kept(leaf: &Leaf, found: &x509::Inspected, now: OffsetDateTime) -> Result<()> {
    if found.not_after <= now {
        bail!("it expired on {}", found.not_after.date());
    }
    if (leaf.subject.server && !found.subject.server) || (leaf.subject.client && !found.subject.client) {
        bail!("its extended key usage lacks the one that is needed");
    }
    if let Some(missing) = leaf.subject.sans.iter().find(|san| !found.subject.sans.contains(san)) {
        bail!("it is not valid for {missing:?}");
    }
    Ok(())
}

/// `sa.key` and `sa.pub`, with which ServiceAccount tokens are signed and checked: RSA, since every consumer knows RS256.
fn ensure_service_account_key(layout: &Layout) -> Result<bool> {
    let (private, public) = (layout.pki_file("sa.key"), layout.pki_file("sa.pub"));
    let existing = files::read_if_exists(&private)?;
    let key = match &existing {
        Some(pem) => KeyPair::from_pem(pem).with_context(|| format!("{} is unusable", private.display()))?,
        None => KeyAlgorithm::Rsa2048.generate()?,
    };
    if existing.is_none() {
        files::write(&private, key.serialize_pem(), files::PRIVATE)?;
    }
    if existing.is_none() || files::read_if_exists(&public)?.is_none() {
        files::write(&public, key.public_key_pem(), files::PRIVATE)?;
        return Ok(true);
    }
    Ok(false)
}

/// Issues a leaf again, with a new key and what its certificate says now; `None` where there is no such certificate.
pub(crate) fn renew(layout: &Layout, leaf: &Leaf, algorithm: KeyAlgorithm, now: OffsetDateTime) -> Result<Option<()>> {
    let Some(pair) = read_pair(layout, leaf.stem)? else { return Ok(None) };
    let subject = x509::inspect(&pair.certificate)?.subject;
    let issued = authority(layout, leaf.signer)?.issue(&subject, algorithm, now)?;
    write_pair(layout, leaf.stem, &issued)?;
    Ok(Some(()))
}

/// `STEM.crt`.
pub(crate) fn certificate_path(layout: &Layout, stem: &str) -> PathBuf {
    layout.pki_file(&format!("{stem}.crt"))
}

fn key_path(layout: &Layout, stem: &str) -> PathBuf {
    layout.pki_file(&format!("{stem}.key"))
}

fn read_pair(layout: &Layout, stem: &str) -> Result<Option<Pair>> {
    let certificate = files::read_if_exists(&certificate_path(layout, stem))?;
    let key = files::read_if_exists(&key_path(layout, stem))?;
    Ok(certificate.zip(key).map(|(certificate, key)| Pair { certificate, key }))
}

/// The key first: a certificate without its key would be taken for one kept elsewhere.
fn write_pair(layout: &Layout, stem: &str, pair: &Pair) -> Result<()> {
    files::write(&key_path(layout, stem), &pair.key, files::PRIVATE)?;
    files::write(&certificate_path(layout, stem), &pair.certificate, files::PUBLIC)
}

#[cfg(test)]
mod tests {
    use super::super::layout::tests::flags;
    use super::*;

    fn now() -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(1_800_000_000).expect("a time")
    }

    #[test]
    fn names_are_kubeadms() -> Result<()> {
        let leaves = leaves(&ClusterFlags {
            control_plane_endpoint: Some("api.example:443".into()),
            apiserver_cert_extra_sans: vec!["cp".into(), "203.0.113.7".into()],
            ..flags()
        })?;
        let by_stem = |stem: &str| leaves.iter().find(|leaf| leaf.stem == stem).expect(stem).subject.clone();
        assert_eq!(
            by_stem("apiserver").sans,
            [
                "cp",
                "kubernetes",
                "kubernetes.default",
                "kubernetes.default.svc",
                "kubernetes.default.svc.cluster.local",
                "10.96.0.1",
                "10.0.0.1",
                "api.example",
                "203.0.113.7"
            ]
        );
        assert_eq!(by_stem("apiserver-kubelet-client").organization.as_deref(), Some("kubeadm:cluster-admins"));
        assert_eq!(by_stem("etcd/peer").sans, ["cp", "localhost", "10.0.0.1", "127.0.0.1", "::1"]);
        assert!(by_stem("etcd/server").client && by_stem("etcd/server").server);
        assert!(!by_stem("apiserver").client);
        Ok(())
    }

    #[test]
    fn a_second_run_keeps_everything() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let layout = Layout::below(dir.path());
        let made = ensure(&layout, &flags(), KeyAlgorithm::EcdsaP256, now())?;
        assert_eq!(made.len(), 3 + 7 + 1, "{made:?}");
        let before = files::read(&certificate_path(&layout, "apiserver"))?;
        assert!(ensure(&layout, &flags(), KeyAlgorithm::EcdsaP256, now())?.is_empty());
        assert_eq!(files::read(&certificate_path(&layout, "apiserver"))?, before);

        // What is lost comes back, signed by the same authority.
        std::fs::remove_file(certificate_path(&layout, "apiserver"))?;
        std::fs::remove_file(layout.pki_file("sa.pub"))?;
        assert_eq!(ensure(&layout, &flags(), KeyAlgorithm::EcdsaP256, now())?, ["apiserver", "sa"]);
        Ok(())
    }

    #[test]
    fn a_certificate_for_another_address_is_an_error_that_names_it() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let layout = Layout::below(dir.path());
        ensure(&layout, &flags(), KeyAlgorithm::EcdsaP256, now())?;
        let moved = ClusterFlags { apiserver_advertise_address: Some([10, 0, 0, 2].into()), ..flags() };
        let error = ensure(&layout, &moved, KeyAlgorithm::EcdsaP256, now()).unwrap_err();
        assert!(format!("{error:#}").contains("it is not valid for \"10.0.0.2\""), "{error:#}");
        let error = ensure(&layout, &flags(), KeyAlgorithm::EcdsaP256, now() + x509::LEAF_LIFETIME).unwrap_err();
        assert!(format!("{error:#}").contains("it expired on"), "{error:#}");
        Ok(())
    }

    #[test]
    fn a_renewed_certificate_says_the_same_for_another_year() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let layout = Layout::below(dir.path());
        ensure(&layout, &flags(), KeyAlgorithm::EcdsaP256, now())?;
        let later = now() + x509::LEAF_LIFETIME / 2;
        for leaf in leaves(&flags())? {
            renew(&layout, &leaf, KeyAlgorithm::EcdsaP256, later)?.expect("it exists");
            let renewed = x509::inspect(&files::read(&certificate_path(&layout, leaf.stem))?)?;
            assert_eq!(renewed.subject, leaf.subject);
            assert_eq!(renewed.not_after, later + x509::LEAF_LIFETIME);
        }
        Ok(())
    }
}
