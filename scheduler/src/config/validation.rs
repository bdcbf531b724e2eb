//! Whether a configuration holds. All that is wrong with it is told at once, by the field and in Kubernetes' words. As
//! `pkg/scheduler/apis/config/validation`. Pure.

use std::collections::BTreeMap;
use std::fmt;

use apimachinery::status::{FieldError, aggregate};
use serde_json::{Value, json};

use super::{API_VERSION, Configuration, ExtenderConfig, LeaderElection, PluginSet, ProfileConfig};
use crate::plugins;

/// What is wrong, in the order in which it was found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Faults(Vec<FieldError>);

// === impl Faults ===

impl Faults {
    /// Notes one more.
    pub fn add(&mut self, fault: FieldError) {
        self.0.push(fault);
    }

    /// A value that does not hold.
    pub fn invalid(&mut self, field: impl Into<String>, value: impl Into<Value>, why: &str) {
        self.add(FieldError::invalid(field, value, why));
    }

    /// As `ValidateLabelName`.
    pub fn label_name(&mut self, field: &str, value: &str) {
        for why in apimachinery::names::is_qualified_name(value) {
            self.invalid(field, value, &why);
        }
    }

    /// Fails if anything was noted.
    pub fn check(self) -> Result<(), Faults> {
        if self.0.is_empty() { Ok(()) } else { Err(self) }
    }

    /// Takes over what was found below a field.
    fn extend_under(&mut self, path: &str, below: Faults) {
        self.0
            .extend(below.0.into_iter().map(|fault| FieldError { field: format!("{path}.{}", fault.field), ..fault }));
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&aggregate(&self.0))
    }
}

impl std::error::Error for Faults {}

/// As `ValidateKubeSchedulerConfiguration`.
pub fn validate(configuration: &Configuration) -> Faults {
    let mut faults = Faults::default();
    let burst = configuration.client_connection.burst;
    if burst < 0 {
        faults.invalid("clientConnection.burst", burst, "must be non-negative");
    }
    leader_election(&mut faults, &configuration.leader_election);
    if configuration.parallelism <= 0 {
        let why = "should be an integer value greater than zero";
        faults.invalid("parallelism", configuration.parallelism, why);
    }
    let mut names: BTreeMap<&str, usize> = BTreeMap::new();
    for (at, one) in configuration.profiles.iter().enumerate() {
        let path = format!("profiles[{at}]");
        profile(&mut faults, &path, one);
        if let Some(former) = names.insert(&one.scheduler_name, at) {
            let former = format!("profiles[{former}].schedulerName");
            faults.add(FieldError::duplicate(format!("{path}.schedulerName"), former));
        }
    }
    queue_sort(&mut faults, &configuration.profiles);
    percentage(&mut faults, "percentageOfNodesToScore", configuration.percentage_of_nodes_to_score);
    let (first, longest) = (configuration.pod_initial_backoff_seconds, configuration.pod_max_backoff_seconds);
    if first <= 0 {
        faults.invalid("podInitialBackoffSeconds", first, "must be greater than 0");
    }
    if longest < first {
        let why = "must be greater than or equal to PodInitialBackoffSeconds";
        faults.invalid("podMaxBackoffSeconds", longest, why);
    }
    extenders(&mut faults, &configuration.extenders);
    faults
}

/// As `ValidateLeaderElectionConfiguration`.
fn leader_election(faults: &mut Faults, election: &LeaderElection) {
    let field = |name: &str| format!("leaderElection.{name}");
    if election.leader_elect == Some(false) {
        return;
    }
    let times = [
        ("leaseDuration", election.lease_duration),
        ("renewDeadline", election.renew_deadline),
        ("retryPeriod", election.retry_period),
    ];
    let shown = |time| apimachinery::time::format_duration(time);
    for (name, time) in times.into_iter().filter(|(_, time)| time.is_zero()) {
        faults.invalid(field(name), shown(time), "must be greater than zero");
    }
    if election.lease_duration <= election.renew_deadline {
        let why = "LeaseDuration must be greater than RenewDeadline";
        faults.invalid(field("leaseDuration"), shown(election.renew_deadline), why);
    }
    if election.renew_deadline <= election.retry_period {
        let why = "RenewDeadline must be greater than RetryPeriod";
        faults.invalid(field("renewDeadline"), shown(election.renew_deadline), why);
    }
    let names = [
        ("resourceLock", &election.resource_lock),
        ("resourceNamespace", &election.resource_namespace),
        ("resourceName", &election.resource_name),
    ];
    for (name, _) in names.into_iter().filter(|(_, value)| value.is_empty()) {
        faults.invalid(field(name), "", &format!("{name} is required"));
    }
    if election.resource_lock != "leases" {
        let why = "resourceLock value must be \"leases\"";
        faults.invalid(field("resourceLock"), election.resource_lock.as_str(), why);
    }
}

fn percentage(faults: &mut Faults, field: &str, percentage: Option<i32>) {
    if let Some(wrong) = percentage.filter(|percentage| !(0..=100).contains(percentage)) {
        faults.invalid(field, wrong, "not in valid range [0-100]");
    }
}

/// As `validateKubeSchedulerProfile`.
fn profile(faults: &mut Faults, path: &str, profile: &ProfileConfig) {
    const REMOVED: [&str; 4] = ["AzureDiskLimits", "CinderLimits", "EBSLimits", "GCEPDLimits"];
    let why = format!("was invalid in version \"v1\" (KubeSchedulerConfiguration is version {API_VERSION:?})");
    let removed = |faults: &mut Faults, field: String, name: &str| {
        if REMOVED.contains(&name) {
            faults.invalid(field, name, &why);
        }
    };
    if profile.scheduler_name.is_empty() {
        faults.add(FieldError::required(format!("{path}.schedulerName"), ""));
    }
    percentage(faults, &format!("{path}.percentageOfNodesToScore"), profile.percentage_of_nodes_to_score);
    let multi = profile.plugins.multi_point.iter().map(|set| ("multiPoint", set));
    for (point, set) in profile.plugins.points().map(|(name, _, set)| (name, set)).chain(multi) {
        for (at, plugin) in set.enabled.iter().enumerate() {
            removed(faults, format!("{path}.plugins.{point}.enabled[{at}]"), &plugin.name);
        }
    }
    for (at, config) in profile.plugin_config.iter().enumerate() {
        let field = format!("{path}.pluginConfig[{at}]");
        if profile.plugin_config[..at].iter().any(|other| other.name == config.name) {
            faults.add(FieldError::duplicate(field.as_str(), config.name.as_str()));
        }
        removed(faults, field.clone(), &config.name);
        if let Some(Err(plugins::BadArguments::Invalid(wrong))) = plugins::make(&config.name, Some(&config.args)) {
            faults.extend_under(&format!("{field}.args"), wrong);
        }
    }
}

/// The pods of all profiles wait in one queue. As `validateCommonQueueSort`.
fn queue_sort(faults: &mut Faults, profiles: &[ProfileConfig]) {
    const SAME: &str = "queueSort must be the same for all profiles";
    let set = |profile: &ProfileConfig| profile.plugins.queue_sort.clone().unwrap_or_default();
    let Some((first, others)) = profiles.split_first() else { return };
    let canon = set(first);
    if canon.enabled.len() > 1 {
        let why = "only one queue sort plugin can be enabled";
        faults.invalid("profiles[0].plugins.queueSort.Enabled", canon.enabled.len(), why);
    }
    let sorter = canon.enabled.first().map(|plugin| plugin.name.as_str());
    let arguments = |profile: &ProfileConfig| sorter.and_then(|name| profile.arguments(name)).cloned();
    for (at, profile) in others.iter().enumerate() {
        let path = format!("profiles[{}]", at + 1);
        let own = set(profile);
        if own != canon {
            faults.invalid(format!("{path}.plugins.queueSort"), as_go(&own), SAME);
        }
        if let Some(own) = arguments(profile).filter(|own| Some(own) != arguments(first).as_ref()) {
            faults.invalid(format!("{path}.pluginConfig.args"), own, SAME);
        }
    }
}

/// A set as Go writes the internal type.
fn as_go(set: &PluginSet) -> Value {
    let all = |plugins: &[super::PluginRef]| match plugins {
        [] => Value::Null,
        all => all.iter().map(|one| json!({"Name": one.name, "Weight": one.weight.unwrap_or(0)})).collect(),
    };
    json!({"Enabled": all(&set.enabled), "Disabled": all(&set.disabled)})
}

/// As `validateExtenders`.
fn extenders(faults: &mut Faults, extenders: &[ExtenderConfig]) {
    let mut managed: Vec<&str> = Vec::new();
    for (at, extender) in extenders.iter().enumerate() {
        let path = format!("extenders[{at}]");
        if extender.url_prefix.parse::<http::Uri>().is_err() {
            faults.invalid(format!("{path}.urlPrefix"), extender.url_prefix.as_str(), "must be a URL");
        }
        if !extender.prioritize_verb.is_empty() && extender.weight <= 0 {
            faults.invalid(format!("{path}.weight"), extender.weight, "must have a positive weight applied to it");
        }
        for (at, resource) in extender.managed_resources.iter().enumerate() {
            let (field, name) = (format!("{path}.managedResources[{at}].name"), resource.name.as_str());
            if !apimachinery::names::is_qualified_name(name).is_empty() {
                faults.label_name(&field, name);
            } else if !is_extended(name) {
                faults.invalid(field.as_str(), name, "is an invalid extended resource name");
            }
            if managed.contains(&name) {
                faults.invalid(field, name, "duplicate extender managed resource name");
            }
            managed.push(name);
        }
    }
    let binders = extenders.iter().filter(|extender| !extender.bind_verb.is_empty()).count();
    if binders > 1 {
        let found = format!("found {binders} extenders implementing bind");
        faults.invalid("extenders", found, "only one extender can implement bind");
    }
}

/// As `IsExtendedResourceName`.
fn is_extended(name: &str) -> bool {
    let own = |domain: &str| domain == "kubernetes.io" || domain.ends_with(".kubernetes.io");
    let asked = format!("requests.{name}");
    name.split_once('/').is_some_and(|(domain, _)| !own(domain) && !domain.starts_with("requests."))
        && apimachinery::names::is_qualified_name(name).is_empty()
        && apimachinery::names::is_qualified_name(&asked).is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigError;

    fn told(yaml: &str) -> Vec<String> {
        let head = "apiVersion: kubescheduler.config.k8s.io/v1\nkind: KubeSchedulerConfiguration\n";
        match Configuration::parse(&format!("{head}{yaml}\n")) {
            Err(ConfigError::Invalid(faults)) => faults.0.iter().map(ToString::to_string).collect(),
            other => panic!("{other:?}\nfor {yaml}"),
        }
    }

    #[test]
    fn wrong_values_are_told_by_their_field() {
        let cases = [
            ("clientConnection: {burst: -1}", "clientConnection.burst: Invalid value: -1: must be non-negative"),
            (
                "leaderElection: {leaseDuration: 5s}",
                "leaderElection.leaseDuration: Invalid value: \"10s\": LeaseDuration must be greater than RenewDeadline",
            ),
            (
                "leaderElection: {resourceLock: endpoints}",
                "leaderElection.resourceLock: Invalid value: \"endpoints\": resourceLock value must be \"leases\"",
            ),
            ("parallelism: 0", "parallelism: Invalid value: 0: should be an integer value greater than zero"),
            ("profiles: [{schedulerName: ''}]", "profiles[0].schedulerName: Required value"),
            (
                "profiles: [{schedulerName: a}, {schedulerName: a}]",
                "profiles[1].schedulerName: Duplicate value: \"profiles[0].schedulerName\"",
            ),
            (
                "profiles: [{percentageOfNodesToScore: 101}]",
                "profiles[0].percentageOfNodesToScore: Invalid value: 101: not in valid range [0-100]",
            ),
            (
                "profiles: [{plugins: {filter: {enabled: [{name: A}, {name: EBSLimits}]}}}]",
                "profiles[0].plugins.filter.enabled[1]: Invalid value: \"EBSLimits\": was invalid in version \"v1\" \
                 (KubeSchedulerConfiguration is version \"kubescheduler.config.k8s.io/v1\")",
            ),
            (
                "profiles: [{pluginConfig: [{name: A}, {name: A}]}]",
                "profiles[0].pluginConfig[1]: Duplicate value: \"A\"",
            ),
            (
                "profiles: [{pluginConfig: [{name: InterPodAffinity, args: {hardPodAffinityWeight: 101}}]}]",
                "profiles[0].pluginConfig[0].args.hardPodAffinityWeight: Invalid value: 101: not in valid range [0, 100]",
            ),
            (
                "profiles: [{plugins: {queueSort: {enabled: [{name: A}, {name: B}]}}}]",
                "profiles[0].plugins.queueSort.Enabled: Invalid value: 2: only one queue sort plugin can be enabled",
            ),
            (
                "profiles: [{schedulerName: a}, {schedulerName: b, plugins: {queueSort: {enabled: [{name: X}]}}}]",
                "profiles[1].plugins.queueSort: Invalid value: {\"Disabled\":null,\"Enabled\":[{\"Name\":\"X\",\"Weight\":0}]}: \
                 queueSort must be the same for all profiles",
            ),
            ("percentageOfNodesToScore: -1", "percentageOfNodesToScore: Invalid value: -1: not in valid range [0-100]"),
            (
                "podInitialBackoffSeconds: 20",
                "podMaxBackoffSeconds: Invalid value: 10: must be greater than or equal to PodInitialBackoffSeconds",
            ),
            (
                "extenders: [{urlPrefix: 'http://x', prioritizeVerb: p}]",
                "extenders[0].weight: Invalid value: 0: must have a positive weight applied to it",
            ),
            (
                "extenders: [{urlPrefix: 'http://x', managedResources: [{name: cpu}]}]",
                "extenders[0].managedResources[0].name: Invalid value: \"cpu\": is an invalid extended resource name",
            ),
            (
                "extenders: [{urlPrefix: 'http://x', managedResources: [{name: a.b/c}, {name: a.b/c}]}]",
                "extenders[0].managedResources[1].name: Invalid value: \"a.b/c\": duplicate extender managed resource name",
            ),
            (
                "extenders: [{urlPrefix: 'http://x', bindVerb: b}, {urlPrefix: 'http://y', bindVerb: b}]",
                "extenders: Invalid value: \"found 2 extenders implementing bind\": only one extender can implement bind",
            ),
        ];
        for (yaml, words) in cases {
            assert_eq!(told(yaml), [words], "{yaml}");
        }
    }

    #[test]
    fn all_that_is_wrong_is_told_at_once() {
        let yaml = "parallelism: 0\npodInitialBackoffSeconds: 0\nprofiles: [{pluginConfig: [{name: DefaultPreemption, \
                    args: {minCandidateNodesPercentage: -1, minCandidateNodesAbsolute: -2}}, {name: VolumeBinding, \
                    args: {bindTimeoutSeconds: -1}}]}]";
        let fields: Vec<String> =
            told(yaml).iter().filter_map(|fault| Some(fault.split_once(": ")?.0.to_owned())).collect();
        assert_eq!(
            fields,
            [
                "parallelism",
                "profiles[0].pluginConfig[0].args.minCandidateNodesPercentage",
                "profiles[0].pluginConfig[0].args.minCandidateNodesAbsolute",
                "profiles[0].pluginConfig[1].args.bindTimeoutSeconds",
                "podInitialBackoffSeconds"
            ]
        );
        let mut faults = Faults::default();
        faults.invalid("a", 1, "wrong");
        assert_eq!(faults.to_string(), "a: Invalid value: 1: wrong");
        faults.invalid("a", 1, "wrong");
        faults.invalid("b", "x", "wrong");
        assert_eq!(faults.to_string(), "[a: Invalid value: 1: wrong, b: Invalid value: \"x\": wrong]");
    }
}
