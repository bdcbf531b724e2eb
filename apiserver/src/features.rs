//! What is off by default and was switched on: features by `--feature-gates`, versions of the API by `--runtime-config`. Both
//! hold for the whole process, as Kubernetes' `DefaultFeatureGate` does, and are set once, before anything else.

use apimachinery::facts::{self, KindFacts};
use component_base::feature_gates::{Feature, FeatureGates, parse_bool};
use std::sync::OnceLock;

static GATES: OnceLock<FeatureGates> = OnceLock::new();

/// Is a feature on?
pub fn enabled(feature: Feature) -> bool {
    GATES.get().is_some_and(|gates| gates.enabled(feature))
}

/// Switches on what the command line asks for.
pub fn switch(gates: &FeatureGates, runtime_config: &[String]) -> Result<(), String> {
    for gate in &gates.without_effect {
        tracing::warn!(gate, "this feature gate switches nothing here");
    }
    let wanted = RuntimeConfig::parse(runtime_config)?;
    let mut on = Vec::new();
    for kind in facts::offered().iter().filter(|kind| wanted.enabled(kind)) {
        match gate_of(kind) {
            Some((name, feature)) if !gates.enabled(feature) => {
                let kind = kind.kind;
                tracing::warn!("{kind} storage is disabled because the {name} feature gate is disabled");
            }
            _ => on.push(kind),
        }
    }
    let first = GATES.set(gates.clone()).is_ok() && facts::switch_on(&on);
    if first { Ok(()) } else { Err("features are switched once, at the start".to_owned()) }
}

/// The gate that a kind needs beside its version.
fn gate_of(kind: &KindFacts) -> Option<(&'static str, Feature)> {
    match kind.resource {
        "clustertrustbundles" => Some(("ClusterTrustBundle", Feature::ClusterTrustBundle)),
        "podcertificaterequests" => Some(("PodCertificateRequest", Feature::PodCertificateRequest)),
        _ => None,
    }
}

/// `--runtime-config`, as far as it names what is off by default. As `MergeAPIResourceConfigs`.
#[derive(Debug, Default)]
struct RuntimeConfig {
    /// `api/all`, `api/beta`, `api/alpha`: whether all of that quality is wanted.
    all: Option<bool>,
    beta: Option<bool>,
    /// Group, version and resource (or none for all of the version).
    named: Vec<(String, String, Option<String>, bool)>,
}

// === impl RuntimeConfig ===

impl RuntimeConfig {
    fn parse(entries: &[String]) -> Result<Self, String> {
        let mut config = Self::default();
        let mut unknown = Vec::new();
        let entries: Vec<(&str, &str)> = entries
            .iter()
            .map(|entry| entry.trim())
            .filter(|entry| !entry.is_empty())
            .map(|entry| entry.split_once('=').unwrap_or((entry, "")))
            .map(|(key, value)| (key.trim(), value.trim()))
            .collect();
        for (key, value) in &entries {
            let on = match *value {
                "" => true,
                value => parse_bool(value).ok_or_else(|| {
                    let why = format!("strconv.ParseBool: parsing {value:?}: invalid syntax");
                    format!("invalid value of {key}: {value}, err: {why}")
                })?,
            };
            match key.split('/').collect::<Vec<_>>().as_slice() {
                ["api", "all"] if !on && entries.len() == 1 => {
                    return Err("invalid key with only api/all=false".to_owned());
                }
                ["api", "all"] => config.all = Some(on),
                ["api", "beta"] => config.beta = Some(on),
                // There is nothing of that quality to switch on.
                ["api", "alpha"] => {}
                ["api", "ga" | "v1" | "legacy"] | ["v1"] if on => {}
                ["api", "ga" | "v1" | "legacy"] | ["v1"] => stays(key),
                [_] => unknown.push((*key).to_owned()),
                [group, version, resource @ ..] => match (versions(group), resource) {
                    (None, _) => unknown.push((*group).to_owned()),
                    (Some(versions), _) if !versions.contains(version) => {
                        return Err(format!("group version {group}/{version} that has not been registered"));
                    }
                    (Some(_), []) => config.named.push(((*group).to_owned(), (*version).to_owned(), None, on)),
                    (Some(_), [resource, ..]) => {
                        let resource = Some((*resource).to_owned());
                        config.named.push(((*group).to_owned(), (*version).to_owned(), resource, on));
                    }
                },
                [] => {}
            }
        }
        if !unknown.is_empty() {
            return Err(format!("unknown api groups {}", unknown.join(",")));
        }
        for (group, version, resource, on) in &config.named {
            let generally = facts::versions_off()
                .iter()
                .all(|facts| facts.name != group || !facts.versions.contains(&version.as_str()));
            let is_offered = |kind: &KindFacts| {
                kind.group == group && kind.version == version && resource.as_ref().is_none_or(|r| r == kind.resource)
            };
            let key = format!("{group}/{version}");
            if generally && !on {
                stays(&key);
            } else if !generally && *on && !facts::offered().iter().any(is_offered) {
                tracing::warn!("--runtime-config: {key} is not available; it is passed over");
            }
        }
        Ok(config)
    }

    /// The more particular word counts, and of two alike the last.
    fn enabled(&self, kind: &KindFacts) -> bool {
        let named = |resource: Option<&str>| {
            let mut named = self.named.iter().rev();
            let of = |(group, version, named, _): &&(String, String, Option<String>, bool)| {
                group == kind.group && version == kind.version && named.as_deref() == resource
            };
            named.find(of).map(|(_, _, _, on)| *on)
        };
        let beta = kind.version.contains("beta").then_some(self.beta).flatten();
        named(Some(kind.resource)).or_else(|| named(None)).or(beta).or(self.all).unwrap_or(false)
    }
}

/// All versions of a group; None for one that there is not.
fn versions(group: &str) -> Option<Vec<&'static str>> {
    // Not `facts::groups`, which is made of what is decided here.
    let off = facts::versions_off().iter().filter(|facts| facts.name == group).flat_map(|facts| &facts.versions);
    let generally = facts::generally_available().iter().filter(|facts| facts.name == group);
    let mut versions: Vec<&str> = generally.flat_map(|facts| &facts.versions).copied().collect();
    versions.extend(off);
    (!versions.is_empty()).then_some(versions)
}

fn stays(key: &str) {
    tracing::warn!("--runtime-config: {key} is generally available and stays served");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(entries: &[&str]) -> Result<Vec<&'static str>, String> {
        let entries: Vec<String> = entries.iter().map(|entry| (*entry).to_owned()).collect();
        let config = RuntimeConfig::parse(&entries)?;
        Ok(facts::offered().iter().filter(|kind| config.enabled(kind)).map(|kind| kind.resource).collect())
    }

    #[test]
    fn what_is_off_is_switched_on_by_quality_by_version_or_by_resource() {
        let (both, bundles, requests): (&[&str], &[&str], &[&str]) =
            (&["clustertrustbundles", "podcertificaterequests"], &["clustertrustbundles"], &["podcertificaterequests"]);
        let none: &[&str] = &[];
        for (entries, expected) in [
            (&[][..], none),
            (&["api/all=true"], both),
            (&["api/beta"], both),
            (&["api/alpha=true"], none),
            (&["api/all=true", "api/beta=false"], none),
            (&["certificates.k8s.io/v1beta1"], both),
            (&["certificates.k8s.io/v1beta1=true"], both),
            (&["certificates.k8s.io/v1beta1=false", "api/all"], none),
            (&["certificates.k8s.io/v1alpha1=true"], none),
            (&["certificates.k8s.io/v1beta1/clustertrustbundles=1"], bundles),
            (&["api/beta", "certificates.k8s.io/v1beta1/clustertrustbundles=false"], requests),
            (&["resource.k8s.io/v1beta2=true", "apps/v1=true", "v1=true"], none),
        ] {
            assert_eq!(on(entries).unwrap(), expected, "{entries:?}");
        }
    }

    #[test]
    fn what_means_nothing_is_refused() {
        for (entries, refusal) in [
            (&["api/all=false"][..], "invalid key with only api/all=false"),
            (&["nothing.example.com/v1=true", "other/v1"], "unknown api groups nothing.example.com,other"),
            (&["apps/v1beta9"], "group version apps/v1beta9 that has not been registered"),
            (
                &["apps/v1=maybe"],
                "invalid value of apps/v1: maybe, err: strconv.ParseBool: parsing \"maybe\": invalid syntax",
            ),
        ] {
            assert_eq!(on(entries).unwrap_err(), refusal);
        }
    }
}
