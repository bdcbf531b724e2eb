//! How strict a namespace is: by its labels, or, where they are silent, by the defaults of the configuration. As
//! `pod-security-admission/api`.
use apimachinery::status::FieldError;
use serde::Deserialize;
use std::fmt;

use super::checks::Level;

/// The labels of a level and of its version.
const ENFORCE: [&str; 2] = ["pod-security.kubernetes.io/enforce", "pod-security.kubernetes.io/enforce-version"];
const AUDIT: [&str; 2] = ["pod-security.kubernetes.io/audit", "pod-security.kubernetes.io/audit-version"];
const WARN: [&str; 2] = ["pod-security.kubernetes.io/warn", "pod-security.kubernetes.io/warn-version"];
const LEVELS: [(&str, Option<Level>); 3] =
    [("privileged", None), ("baseline", Some(Level::Baseline)), ("restricted", Some(Level::Restricted))];

/// A level and the version of the standards that it is judged by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// None is `privileged`: anything goes.
    pub level: Option<Level>,
    /// None is the newest.
    pub minor: Option<u32>,
}

/// What is refused and what is warned about. (What is only to be audited has no effect on a request.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    pub enforce: Rule,
    pub warn: Rule,
}

/// `PodSecurityConfiguration`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Configuration {
    api_version: String,
    kind: String,
    defaults: Defaults,
    pub exemptions: Exemptions,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Defaults {
    enforce: String,
    enforce_version: String,
    audit: String,
    audit_version: String,
    warn: String,
    warn_version: String,
}

/// Who and what is not judged at all.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Exemptions {
    pub usernames: Vec<String>,
    pub namespaces: Vec<String>,
    pub runtime_classes: Vec<String>,
}

// === impl Configuration ===

impl Configuration {
    /// The policy of namespaces that say nothing.
    pub fn defaults(&self) -> anyhow::Result<Policy> {
        let known = matches!(self.api_version.as_str(), "" | "pod-security.admission.config.k8s.io/v1")
            && matches!(self.kind.as_str(), "" | "PodSecurityConfiguration");
        anyhow::ensure!(known, "PodSecurity: {} {:?} is no configuration of it", self.api_version, self.kind);
        let defaults = &self.defaults;
        let rule = |level: &str, version: &str| -> anyhow::Result<Rule> {
            let level = if level.is_empty() { None } else { parse_level(level).map_err(anyhow::Error::msg)? };
            let minor = if version.is_empty() { None } else { parse_version(version).map_err(anyhow::Error::msg)? };
            Ok(Rule { level, minor })
        };
        rule(&defaults.audit, &defaults.audit_version)?;
        Ok(Policy {
            enforce: rule(&defaults.enforce, &defaults.enforce_version)?,
            warn: rule(&defaults.warn, &defaults.warn_version)?,
        })
    }
}

// === impl Policy ===

impl Policy {
    /// The policy that labels ask for, and what is wrong with them. Enforcing fails closed, warning fails open.
    pub fn of<'l>(label: impl Fn(&str) -> Option<&'l str>, defaults: Self) -> (Self, Vec<FieldError>) {
        let mut errors = Vec::new();
        let mut read = |[level_key, version_key]: [&str; 2], default: Rule, fallback: Option<Level>| {
            let mut refuse = |key: &str, value: &str, why: &str| {
                errors.push(FieldError::invalid(format!("metadata.labels[{key}]"), value, why));
            };
            let level = label(level_key).map(|text| {
                parse_level(text).unwrap_or_else(|why| {
                    refuse(level_key, text, &why);
                    fallback
                })
            });
            let minor = label(version_key).map(|text| {
                parse_version(text).unwrap_or_else(|why| {
                    refuse(version_key, text, why);
                    None
                })
            });
            let rule = Rule { level: level.unwrap_or(default.level), minor: minor.unwrap_or(default.minor) };
            (rule, level.is_some(), minor.is_some())
        };
        let (enforce, enforced, _) = read(ENFORCE, defaults.enforce, Some(Level::Restricted));
        read(AUDIT, Rule::default(), None);
        let (mut warn, warned, warn_version) = read(WARN, defaults.warn, None);
        // Who enforces wants to hear of templates whose pods would be refused.
        if enforced && !warned && enforce.level > warn.level {
            warn.level = enforce.level;
            if !warn_version {
                warn.minor = enforce.minor;
            }
        }
        (Self { enforce, warn }, errors)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = LEVELS.iter().find(|(_, level)| *level == self.level).map_or("", |(name, _)| name);
        match self.minor {
            Some(minor) => write!(f, "{name}:v1.{minor}"),
            None => write!(f, "{name}:latest"),
        }
    }
}

fn parse_level(text: &str) -> Result<Option<Level>, String> {
    let known = LEVELS.iter().find(|(name, _)| *name == text);
    known.map(|(_, level)| *level).ok_or_else(|| format!("must be one of {}", LEVELS.map(|(name, _)| name).join(", ")))
}

fn parse_version(text: &str) -> Result<Option<u32>, &'static str> {
    if text == "latest" {
        return Ok(None);
    }
    let digits = text.strip_prefix("v1.").filter(|digits| *digits == "0" || !digits.starts_with(['0', '+']));
    digits.and_then(|digits| digits.parse().ok()).map(Some).ok_or("must be \"latest\" or \"v1.x\"")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn labels_say_what_is_enforced_and_warned_about() {
        for (labels, expected, errors) in [
            (vec![], "privileged:latest privileged:latest", vec![]),
            (vec![("enforce", "baseline")], "baseline:latest baseline:latest", vec![]),
            (vec![("enforce", "baseline"), ("enforce-version", "v1.30")], "baseline:v1.30 baseline:v1.30", vec![]),
            (vec![("enforce", "baseline"), ("warn", "restricted")], "baseline:latest restricted:latest", vec![]),
            (vec![("enforce", "restricted"), ("warn", "privileged")], "restricted:latest privileged:latest", vec![]),
            (
                vec![("enforce", "strict"), ("warn", "x")],
                "restricted:latest privileged:latest",
                vec!["must be one of privileged, baseline, restricted"; 2],
            ),
            (
                vec![("warn-version", "1.2")],
                "privileged:latest privileged:latest",
                vec!["must be \"latest\" or \"v1.x\""],
            ),
            (
                vec![("audit", "none")],
                "privileged:latest privileged:latest",
                vec!["must be one of privileged, baseline, restricted"],
            ),
        ] {
            let labels: HashMap<String, &str> =
                labels.iter().map(|(key, value)| (format!("pod-security.kubernetes.io/{key}"), *value)).collect();
            let (policy, found) = Policy::of(|key| labels.get(key).copied(), Policy::default());
            assert_eq!(format!("{} {}", policy.enforce, policy.warn), expected, "{labels:?}");
            let found: Vec<String> = found.into_iter().map(|error| error.detail).collect();
            assert_eq!(found, errors, "{labels:?}");
        }
    }

    #[test]
    fn the_configuration_gives_defaults() {
        let text = r#"{"apiVersion": "pod-security.admission.config.k8s.io/v1", "kind": "PodSecurityConfiguration",
            "defaults": {"enforce": "baseline", "enforce-version": "v1.31", "warn": "restricted"},
            "exemptions": {"namespaces": ["kube-system"]}}"#;
        let configuration: Configuration = serde_json::from_str(text).unwrap();
        let policy = configuration.defaults().unwrap();
        assert_eq!(
            (policy.enforce.to_string().as_str(), policy.warn.to_string().as_str()),
            ("baseline:v1.31", "restricted:latest")
        );
        let wrong: Configuration = serde_json::from_str(r#"{"defaults": {"enforce": "x"}}"#).unwrap();
        assert!(wrong.defaults().is_err());
    }
}
