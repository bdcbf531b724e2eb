//! What other parties need to prove our tokens: the issuer's metadata and its keys.
use http::Response;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use serde_json::json;

use super::keys::{self, VerifyingKey};
use crate::options::Options;
use crate::server::body::Body;

const CONFIGURATION_PATH: &str = "/.well-known/openid-configuration";
const JWKS_PATH: &str = "/openid/v1/jwks";

/// The keys of `--service-account-key-file`; the signing key's or the serving key's public half without.
pub fn verifying_keys(options: &Options) -> Result<Vec<VerifyingKey>, keys::KeyError> {
    let mut files: Vec<_> = options.service_account_key_file.iter().collect();
    if files.is_empty() {
        files.extend(options.service_account_signing_key_file.as_ref().or(options.tls_private_key_file.as_ref()));
    }
    let mut all = Vec::new();
    for file in files {
        all.extend(keys::verifying_keys(file)?);
    }
    Ok(all)
}

/// `--api-audiences`, the issuers without.
pub fn api_audiences(options: &Options) -> Vec<String> {
    if options.api_audiences.is_empty() {
        options.service_account_issuer.clone()
    } else {
        options.api_audiences.clone()
    }
}

pub fn document(options: &Options, path: &str) -> Option<Response<Body>> {
    let (content_type, document) = match path {
        CONFIGURATION_PATH => {
            let issuer = options.service_account_issuer.first()?;
            let address = match options.public_address() {
                std::net::IpAddr::V6(address) => format!("[{address}]"),
                address => address.to_string(),
            };
            let ours = format!("https://{address}:{}{JWKS_PATH}", options.secure_port);
            let keys = verifying_keys(options).ok()?;
            let mut algorithms: Vec<String> = keys.iter().map(|key| format!("{:?}", key.algorithm)).collect();
            algorithms.sort();
            algorithms.dedup();
            let configuration = json!({
                "issuer": issuer,
                "jwks_uri": options.service_account_jwks_uri.clone().unwrap_or(ours),
                "response_types_supported": ["id_token"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": algorithms,
            });
            ("application/json", configuration)
        }
        JWKS_PATH => {
            let mut seen = Vec::new();
            let mut jwks = Vec::new();
            for key in verifying_keys(options).ok()? {
                if !seen.contains(&key.id) {
                    seen.push(key.id);
                    jwks.push(key.jwk);
                }
            }
            ("application/jwk-set+json", json!({"keys": jwks}))
        }
        _ => return None,
    };
    let response = Response::builder()
        .header(CONTENT_TYPE, content_type)
        .header(CACHE_CONTROL, "public, max-age=3600")
        .body(Body::from(document.to_string()));
    response.ok()
}
