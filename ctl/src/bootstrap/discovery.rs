//! How a machine that has only an address, a token and a pin learns whom to trust: `cluster-info` is read from whoever
//! answers, its signature is checked with the token, its certificate authority with the pin. As kubeadm's token discovery.

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kube::config::Kubeconfig;
use serde_json::Value;

use super::token::{self, Token};
use super::x509;

/// Where `cluster-info` is.
pub(crate) const CLUSTER_INFO: &str = "/api/v1/namespaces/kube-public/configmaps/cluster-info";

/// A cluster whose identity has been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Trusted {
    pub(crate) server: String,
    pub(crate) ca_certificate: String,
}

/// What is wrong with a pin before anything is asked.
pub(crate) fn check_pins(pins: &[String]) -> Result<()> {
    if pins.is_empty() {
        bail!("give --ca-cert-hash: without it, anyone who holds a token could pose as the cluster");
    }
    for pin in pins {
        let digits =
            pin.strip_prefix("sha256:").with_context(|| format!("the pin {pin:?} does not begin with sha256:"))?;
        if digits.len() != 64 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            bail!("the pin {pin:?} is not sha256: and 64 hexadecimal digits");
        }
    }
    Ok(())
}

/// Checks the ConfigMap `cluster-info` and takes from it what can be trusted.
pub(crate) fn check(cluster_info: &Value, token: &Token, pins: &[String]) -> Result<Trusted> {
    let field = |name: &str| cluster_info["data"][name].as_str();
    let kubeconfig =
        field("kubeconfig").context("cluster-info holds no kubeconfig: is the address that of a cluster?")?;
    let signature = field(&token::signature_key(&token.id)).with_context(|| {
        format!("cluster-info bears no signature of token {:?}: it may have expired; `bootstrap token create` makes another", token.id)
    })?;
    if !token::verify(kubeconfig, signature, token) {
        bail!(
            "the signature of cluster-info does not fit the token: the token's secret is wrong, or this is another cluster"
        );
    }
    let config = Kubeconfig::from_yaml(kubeconfig).context("cluster-info is malformed")?;
    let cluster =
        config.clusters.into_iter().next().and_then(|named| named.cluster).context("cluster-info names no cluster")?;
    let server = cluster.server.context("cluster-info names no server")?;
    let encoded = cluster.certificate_authority_data.context("cluster-info holds no certificate authority")?;
    let ca_certificate = String::from_utf8(STANDARD.decode(encoded)?).context("cluster-info is malformed")?;
    let pin = x509::inspect(&ca_certificate)?.public_key_pin;
    if !pins.iter().any(|expected| expected.eq_ignore_ascii_case(&pin)) {
        bail!("the cluster's certificate authority is not the pinned one: it is {pin}");
    }
    Ok(Trusted { server, ca_certificate })
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use time::OffsetDateTime;

    use super::super::kubeconfig::{Credentials, render};
    use super::super::x509::{Authority, KeyAlgorithm};
    use super::*;

    #[test]
    fn trust_needs_both_the_token_and_the_pin() -> Result<()> {
        let ca = Authority::generate("kubernetes", KeyAlgorithm::EcdsaP256, OffsetDateTime::now_utc())?.certificate;
        let token: Token = "abcdef.0123456789abcdef".parse()?;
        let other: Token = "abcdef.0000000000000000".parse()?;
        let kubeconfig = render("https://10.0.0.1:6443", &ca, "", &Credentials::Anonymous);
        let info = |kubeconfig: &str, signature: &str| json!({"data": {"kubeconfig": kubeconfig, "jws-kubeconfig-abcdef": signature}});
        let pin = x509::inspect(&ca)?.public_key_pin;
        let good = info(&kubeconfig, &token::sign(&kubeconfig, &token));

        let trusted = check(&good, &token, &[pin.to_uppercase().replace("SHA256", "sha256")])?;
        assert_eq!(trusted, Trusted { server: "https://10.0.0.1:6443".into(), ca_certificate: ca.clone() });

        let wrong_pin = vec![format!("sha256:{}", "0".repeat(64))];
        for (info, token, pins, says) in [
            (json!({}), &token, vec![pin.clone()], "holds no kubeconfig"),
            (
                json!({"data": {"kubeconfig": kubeconfig}}),
                &token,
                vec![pin.clone()],
                "bears no signature of token \"abcdef\"",
            ),
            (good.clone(), &other, vec![pin.clone()], "does not fit the token"),
            (
                info(&kubeconfig.replace("10.0.0.1", "10.0.0.9"), &token::sign(&kubeconfig, &token)),
                &token,
                vec![pin],
                "does not fit",
            ),
            (good, &token, wrong_pin, "is not the pinned one"),
        ] {
            let error = check(&info, token, &pins).unwrap_err();
            assert!(format!("{error:#}").contains(says), "{error:#}");
        }
        Ok(())
    }

    #[test]
    fn malformed_pins_are_refused_before_anything_is_asked() {
        assert!(check_pins(&[]).is_err());
        assert!(check_pins(&["md5:00".into()]).is_err());
        assert!(check_pins(&["sha256:12".into()]).is_err());
        assert!(check_pins(&[format!("sha256:{}", "aB".repeat(32))]).is_ok());
    }
}
