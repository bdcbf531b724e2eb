//! `ctl bootstrap certs`: how long each certificate lasts, and renewing them, as `kubeadm certs`.

use std::fmt::Write;

use anyhow::{Result, bail};
use time::OffsetDateTime;

use super::files;
use super::kubeconfig::{self, Identity};
use super::layout::{ClusterFlags, Layout};
use super::pki::{self, Signer};
use super::x509::{self, KeyAlgorithm};

/// A line of the expiry report.
struct Expiry {
    name: String,
    not_after: Option<OffsetDateTime>,
    signer: &'static str,
}

/// The table that `certs check-expiration` prints.
pub(crate) fn check_expiration(layout: &Layout, flags: &ClusterFlags, now: OffsetDateTime) -> Result<String> {
    let mut leaves = Vec::new();
    for identity in Identity::ALL {
        let not_after = kubeconfig::inspect(layout, identity)?.map(|certificate| certificate.not_after);
        leaves.push(Expiry { name: format!("{}.conf", identity.name()), not_after, signer: Signer::Cluster.stem() });
    }
    for leaf in pki::leaves(flags)? {
        leaves.push(Expiry {
            name: leaf.stem.replace('/', "-"),
            not_after: expiry_of(layout, leaf.stem)?,
            signer: leaf.signer.stem(),
        });
    }
    let mut authorities = Vec::new();
    for signer in Signer::ALL {
        authorities.push(Expiry {
            name: signer.stem().replace('/', "-"),
            not_after: expiry_of(layout, signer.stem())?,
            signer: "",
        });
    }
    Ok(format!("{}\n{}", table("CERTIFICATE", &leaves, now)?, table("CERTIFICATE AUTHORITY", &authorities, now)?))
}

/// Renews `name` (`all`, a certificate or a kubeconfig); returns what was renewed.
pub(crate) fn renew(
    layout: &Layout,
    flags: &ClusterFlags,
    name: &str,
    algorithm: KeyAlgorithm,
    now: OffsetDateTime,
) -> Result<Vec<String>> {
    let wanted = |candidate: &str| name == "all" || name == candidate;
    let mut known = false;
    let mut renewed = Vec::new();
    for identity in Identity::ALL {
        let candidate = format!("{}.conf", identity.name());
        if wanted(&candidate) {
            known = true;
            renewed.extend(kubeconfig::renew(layout, identity, algorithm, now)?.map(|()| candidate));
        }
    }
    for leaf in pki::leaves(flags)? {
        let candidate = leaf.stem.replace('/', "-");
        if wanted(&candidate) {
            known = true;
            renewed.extend(pki::renew(layout, &leaf, algorithm, now)?.map(|()| candidate));
        }
    }
    if !known {
        bail!("no certificate is named {name:?}; `certs check-expiration` lists them");
    }
    if renewed.is_empty() {
        bail!("{name}: there is nothing to renew under {}", layout.kubernetes().display());
    }
    Ok(renewed)
}

fn expiry_of(layout: &Layout, stem: &str) -> Result<Option<OffsetDateTime>> {
    files::read_if_exists(&pki::certificate_path(layout, stem))?
        .map(|pem| x509::inspect(&pem).map(|certificate| certificate.not_after))
        .transpose()
}

fn table(title: &str, rows: &[Expiry], now: OffsetDateTime) -> Result<String> {
    let mut text = format!("{title:<26}{:<26}{:<16}AUTHORITY\n", "EXPIRES", "RESIDUAL TIME");
    for row in rows {
        let (expires, residual) = match row.not_after {
            Some(not_after) if not_after <= now => (date(not_after), "expired".to_owned()),
            Some(not_after) => (date(not_after), format!("{}d", (not_after - now).whole_days())),
            None => ("<missing>".to_owned(), String::new()),
        };
        writeln!(text, "{}", format!("{:<26}{expires:<26}{residual:<16}{}", row.name, row.signer).trim_end())?;
    }
    Ok(text)
}

fn date(at: OffsetDateTime) -> String {
    let (year, month, day) = at.to_calendar_date();
    format!("{year}-{:02}-{day:02} {:02}:{:02} UTC", u8::from(month), at.hour(), at.minute())
}

#[cfg(test)]
mod tests {
    use super::super::layout::tests::flags;
    use super::*;

    #[test]
    fn the_report_shows_what_is_left_and_what_is_missing() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let layout = Layout::below(dir.path());
        let now = OffsetDateTime::from_unix_timestamp(1_800_000_000)?;
        pki::ensure(&layout, &flags(), KeyAlgorithm::EcdsaP256, now)?;
        let report = check_expiration(&layout, &flags(), now)?;
        assert!(
            report.contains("apiserver                 2028-01-15 08:00 UTC      365d            ca\n"),
            "{report}"
        );
        assert!(report.contains("admin.conf                <missing>"), "{report}");
        let later = now + x509::LEAF_LIFETIME;
        assert!(check_expiration(&layout, &flags(), later)?.contains("expired"));
        assert_eq!(renew(&layout, &flags(), "etcd-peer", KeyAlgorithm::EcdsaP256, later)?, ["etcd-peer"]);
        assert_eq!(renew(&layout, &flags(), "all", KeyAlgorithm::EcdsaP256, later)?.len(), 7);
        assert!(renew(&layout, &flags(), "nonsense", KeyAlgorithm::EcdsaP256, later).is_err());
        Ok(())
    }
}
