//! Feature gates (`--feature-gates`, `featureGates`): what of Kubernetes is off, or on, unless somebody says otherwise. Gates of
//! features that are always on here, or never, switch nothing: their names are taken, and told to whoever asks. As
//! `component-base/featuregate`.

use std::collections::BTreeMap;

/// A feature that can be switched. All are beta and off by default in v1.36.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Feature {
    /// ClusterTrustBundles are served, and published by the controller-manager.
    ClusterTrustBundle,
    /// Pods may have them projected into volumes.
    ClusterTrustBundleProjection,
    /// PodCertificateRequests are served and cleaned up, and pods may have certificates projected into volumes.
    PodCertificateRequest,
}

const FEATURES: [(&str, Feature); 3] = [
    ("ClusterTrustBundle", Feature::ClusterTrustBundle),
    ("ClusterTrustBundleProjection", Feature::ClusterTrustBundleProjection),
    ("PodCertificateRequest", Feature::PodCertificateRequest),
];
/// Switches all features of beta quality that are not named.
const ALL_BETA: &str = "AllBeta";

/// Which features are on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FeatureGates {
    on: Vec<Feature>,
    /// Gates that switch nothing here.
    pub without_effect: Vec<String>,
}

// === impl FeatureGates ===

impl FeatureGates {
    /// `A=true,B=false`, each with the component before a colon or without. As `ColonSeparatedMultimapStringString`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut gates = BTreeMap::new();
        for gate in text.split(',').map(str::trim).filter(|gate| !gate.is_empty()) {
            let gate = gate.split_once(':').map_or(gate, |(_, gate)| gate);
            let Some((name, value)) = gate.split_once('=') else {
                return Err(format!("missing bool value for {gate}"));
            };
            let Some(value) = parse_bool(value.trim()) else {
                let why = format!("strconv.ParseBool: parsing {:?}: invalid syntax", value.trim());
                return Err(format!("invalid value of {name}={value}, err: {why}"));
            };
            gates.insert(name.trim().to_owned(), value);
        }
        Ok(Self::of(&gates))
    }

    /// As a configuration has them.
    pub fn of(gates: &BTreeMap<String, bool>) -> Self {
        let all = gates.get(ALL_BETA).copied().unwrap_or(false);
        let on = FEATURES.iter().filter(|(name, _)| gates.get(*name).copied().unwrap_or(all));
        let known = |name: &&String| name.as_str() == ALL_BETA || FEATURES.iter().any(|(known, _)| known == name);
        Self {
            on: on.map(|(_, feature)| *feature).collect(),
            without_effect: gates.keys().filter(|name| !known(name)).cloned().collect(),
        }
    }

    pub fn enabled(&self, feature: Feature) -> bool {
        self.on.contains(&feature)
    }
}

/// As `strconv.ParseBool`.
pub fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_are_off_unless_they_are_named_or_all_are() {
        let on = |text: &str| FeatureGates::parse(text).unwrap().on;
        assert_eq!(on(""), []);
        assert_eq!(on("ClusterTrustBundle=true,PodCertificateRequest=0"), [Feature::ClusterTrustBundle]);
        assert_eq!(on("kube:PodCertificateRequest=T"), [Feature::PodCertificateRequest]);
        assert_eq!(on("AllBeta=true, ClusterTrustBundle=false").len(), 2);
        assert_eq!(FeatureGates::parse("Other=true").unwrap().without_effect, ["Other"]);
    }

    #[test]
    fn a_gate_needs_a_bool() {
        let refusal = |text: &str| FeatureGates::parse(text).unwrap_err();
        assert_eq!(refusal("ClusterTrustBundle"), "missing bool value for ClusterTrustBundle");
        assert_eq!(
            refusal("Other=yes"),
            "invalid value of Other=yes, err: strconv.ParseBool: parsing \"yes\": invalid syntax"
        );
    }
}
