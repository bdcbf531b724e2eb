//! ClusterTrustBundles: certificates of authorities that pods may trust, of a signer or of nobody in particular.

use super::signers;
use crate::registry::field::{Errors, Field};
use crate::registry::object::text;
use crate::registry::print::{self, NONE};
use crate::registry::rules::Rules;
use apimachinery::names::is_dns1123_subdomain;
use component_base::pem;
use std::collections::BTreeMap;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// As `MaxTrustBundleSize`.
const TRUST_BUNDLE_MAX_BYTES: usize = 1024 * 1024;
const OMITTED: &str = "<value omitted>";

pub const RULES: Rules = Rules {
    // The name depends on the signer: `validate` looks at both.
    name: |_| Vec::new(),
    validate,
    validate_create: |root, errors| {
        let meta = root.at("metadata");
        for field in [meta.at("generateName"), meta.at("name")] {
            if !field.is_blank() {
                let prefix = field.path().ends_with("generateName");
                errors.all(&field, name(root.at("spec").at("signerName").str(), field.str(), prefix));
            }
        }
    },
    validate_update: |new, old, errors| {
        errors.immutable(&new.at("spec").at("signerName"), &old.at("spec").at("signerName"));
    },
    unconditional_update: false,
    selectable_names: &["spec.signerName"],
    selectable: |object| vec![("spec.signerName", text(object, "/spec/signerName").to_owned())],
    row: Some(|object, _| vec![print::name(object), print::or(text(object, "/spec/signerName"), NONE)]),
    ..Rules::DEFAULT
};

/// What is wrong with the name of a signer's bundle, or, without a signer, of another. As `ValidateClusterTrustBundleName`.
pub fn name(signer: &str, name: &str, is_prefix: bool) -> Vec<String> {
    // Something will follow a prefix's trailing dash.
    let stem = |name: &str| match name.strip_suffix('-') {
        Some(stem) if is_prefix && !stem.is_empty() => is_dns1123_subdomain(&format!("{stem}a")),
        _ => is_dns1123_subdomain(name),
    };
    if signer.is_empty() {
        if name.contains(':') {
            return vec!["ClusterTrustBundle without signer name must not have \":\" in its name".to_owned()];
        }
        return stem(name);
    }
    let prefix = format!("{}:", signer.replace('/', ":"));
    match name.strip_prefix(&prefix) {
        Some(rest) => stem(rest),
        None => vec![format!("ClusterTrustBundle for signerName {signer} must be named with prefix {prefix}")],
    }
}

/// As `ValidateClusterTrustBundle`. Trust anchors that an update leaves alone are not looked at again (see `builtin.rs`).
fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let signer = spec.at("signerName");
    if !signer.is_blank() {
        signers::signer_name(&signer, errors);
    }
    trust_bundle(&spec.at("trustBundle"), errors);
}

/// As `validateTrustBundle`.
fn trust_bundle(bundle: &Field<'_, '_>, errors: &mut Errors) {
    if bundle.str().len() > TRUST_BUNDLE_MAX_BYTES {
        errors.too_long(bundle, TRUST_BUNDLE_MAX_BYTES);
        return;
    }
    let before = errors.0.len();
    let mut anchors: BTreeMap<Vec<u8>, Vec<usize>> = BTreeMap::new();
    for (at, block) in pem::blocks(bundle.str()).into_iter().enumerate() {
        let fault = match X509Certificate::from_der(&block.bytes) {
            _ if block.label != pem::CERTIFICATE => format!("entry {at} has bad block type: {}", block.label),
            _ if block.has_headers => format!("entry {at} has PEM block headers"),
            Err(_) => format!("entry {at} does not parse as X.509"),
            Ok((rest, _)) if !rest.is_empty() => format!("entry {at} does not parse as X.509"),
            Ok((_, certificate)) if !certificate.is_ca() => format!("entry {at} does not have the CA bit set"),
            Ok(_) => {
                anchors.entry(block.bytes).or_default().push(at);
                continue;
            }
        };
        errors.invalid_as(bundle, OMITTED, fault);
    }
    if errors.0.len() > before {
        return;
    }
    if anchors.is_empty() {
        errors.invalid_as(bundle, OMITTED, "at least one trust anchor must be provided");
    }
    for places in anchors.values().filter(|places| places.len() > 1) {
        let places: Vec<String> = places.iter().map(ToString::to_string).collect();
        errors.invalid_as(bundle, OMITTED, format!("duplicate trust anchor (indices [{}])", places.join(" ")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn certificate(is_ca: bool) -> String {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, "root");
        if is_ca {
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        }
        params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem()
    }

    fn faults(check: fn(&Field<'_, '_>, &mut Errors), name: &str, signer: &str, bundle: &str) -> Vec<String> {
        let object = json!({"metadata": {"name": name}, "spec": {"signerName": signer, "trustBundle": bundle}});
        let mut errors = Errors::default();
        check(&Field::root(&object), &mut errors);
        errors.0.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_bundle_holds_certificates_of_authorities_each_once() {
        let (one, two) = (certificate(true), certificate(true));
        let told = |bundle: &str| faults(RULES.validate, "x", "", bundle);
        assert!(told(&format!("text\n{one}text\n{two}")).is_empty());
        let of = |what: &str| vec![format!("spec.trustBundle: Invalid value: \"<value omitted>\": {what}")];
        assert_eq!(told(""), of("at least one trust anchor must be provided"));
        assert_eq!(told(&format!("{one}{two}{one}")), of("duplicate trust anchor (indices [0 2])"));
        assert_eq!(told(&format!("{one}{}", certificate(false))), of("entry 1 does not have the CA bit set"));
        let key = one.replace("CERTIFICATE", "PRIVATE KEY");
        assert_eq!(told(&key), of("entry 0 has bad block type: PRIVATE KEY"));
        let headed = one.replacen("-----\n", "-----\nName: value\n\n", 1);
        assert_eq!(told(&headed), of("entry 0 has PEM block headers"));
        assert_eq!(told(&pem::encode(pem::CERTIFICATE, b"none")), of("entry 0 does not parse as X.509"));
        assert_eq!(
            told(&"x".repeat(TRUST_BUNDLE_MAX_BYTES + 1)),
            ["spec.trustBundle: Too long: may not be more than 1048576 bytes"]
        );
    }

    #[test]
    fn a_bundle_is_named_for_its_signer() {
        for (name, signer, fault) in [
            ("plain", "", ""),
            ("example.com:foo:v1", "example.com/foo", ""),
            ("a:b", "", "ClusterTrustBundle without signer name must not have \":\" in its name"),
            (
                "example.com:bar:v1",
                "example.com/foo",
                "ClusterTrustBundle for signerName example.com/foo must be named with prefix example.com:foo:",
            ),
        ] {
            let told = faults(RULES.validate_create, name, signer, "");
            match fault {
                "" => assert!(told.is_empty(), "{told:?}"),
                fault => assert_eq!(told, [format!("metadata.name: Invalid value: {name:?}: {fault}")]),
            }
        }
        assert_eq!(faults(RULES.validate_create, "example.com:foo:UP", "example.com/foo", "").len(), 1);
        assert!(super::name("example.com/foo", "example.com:foo:v-", true).is_empty());
    }
}
