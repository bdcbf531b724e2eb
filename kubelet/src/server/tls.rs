//! How the server speaks TLS: its certificate, whom it knows, and what `tlsMinVersion` and `tlsCipherSuites` leave of
//! versions and cipher suites.

use std::path::Path;
use std::sync::Arc;

use component_base::tls::{ReloadingKeyPair, TlsError, client_verifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::version::TLS13;
use rustls::{ServerConfig, SupportedCipherSuite, SupportedProtocolVersion};

use crate::config::KubeletConfiguration;

const NEWEST: &[&SupportedProtocolVersion] = &[&TLS13];

/// The server's settings, with the certificate and key of these files.
pub(super) fn server_config(
    config: &KubeletConfiguration,
    (certificate, key): (&Path, &Path),
) -> Result<ServerConfig, TlsError> {
    let pair = ReloadingKeyPair::load(certificate, key)?;
    let cipher_suites = suites(&config.tls_cipher_suites).map_err(TlsError::Config)?;
    let provider = CryptoProvider { cipher_suites, ..aws_lc_rs::default_provider() };
    let builder = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(versions(&config.tls_min_version).map_err(TlsError::Config)?)
        .map_err(|error| TlsError::Config(format!("tlsCipherSuites, tlsMinVersion: {error}")))?;
    let builder = match &config.client_ca_file {
        Some(path) => builder.with_client_cert_verifier(client_verifier(path)?),
        None => builder.with_no_client_auth(),
    };
    let mut made = builder.with_cert_resolver(Arc::new(pair));
    made.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(made)
}

/// The versions from this one on. Older ones than 1.2 are not spoken, whoever asks for them.
pub(crate) fn versions(least: &str) -> Result<&'static [&'static SupportedProtocolVersion], String> {
    match least {
        "" | "VersionTLS10" | "VersionTLS11" | "VersionTLS12" => Ok(rustls::ALL_VERSIONS),
        "VersionTLS13" => Ok(NEWEST),
        other => Err(format!("unknown tls version {other:?}")),
    }
}

/// The suites of these names (none: all). Those of TLS 1.3 cannot be chosen among.
pub(crate) fn suites(names: &[String]) -> Result<Vec<SupportedCipherSuite>, String> {
    let all = aws_lc_rs::DEFAULT_CIPHER_SUITES;
    // As Go names them: without the 13, and some without the hash.
    let is = |suite: &SupportedCipherSuite, name: &str| {
        let own = suite.suite().as_str().unwrap_or_default().replace("TLS13_", "TLS_");
        own == name || own.strip_suffix("_SHA256") == Some(name)
    };
    if let Some(unknown) = names.iter().find(|name| !all.iter().any(|suite| is(suite, name))) {
        return Err(format!("Cipher suite {unknown} not supported or doesn't exist"));
    }
    let is_wanted = |suite: &&SupportedCipherSuite| {
        suite.tls13().is_some() || names.is_empty() || names.iter().any(|name| is(suite, name))
    };
    Ok(all.iter().filter(is_wanted).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_suites_are_chosen() {
        assert_eq!(versions("VersionTLS13").unwrap().len(), 1);
        assert_eq!(versions("VersionTLS12").unwrap().len(), 2);
        assert!(versions("TLS 1.3").is_err());
        let old = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            suites(&names).map(|suites| suites.iter().filter(|suite| suite.tls13().is_none()).count())
        };
        assert_eq!(old(&[]), Ok(6));
        assert_eq!(old(&["TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305"]), Ok(2));
        assert_eq!(old(&["TLS_AES_128_GCM_SHA256"]), Ok(0));
        assert!(old(&["TLS_RSA_WITH_RC4_128_SHA"]).is_err());
    }
}
