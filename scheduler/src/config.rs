//! KubeSchedulerConfiguration v1, as kube-scheduler reads it from `--config`.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Deserialize;

use crate::cache::DEFAULT_SCHEDULER_NAME;
use crate::framework::Points;

const API_VERSION: &str = "kubescheduler.config.k8s.io/v1";
const KIND: &str = "KubeSchedulerConfiguration";

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not YAML, or not of the configuration's shape.
    #[error("{0}")]
    Malformed(String),
    /// Another kind or version.
    #[error("expected {KIND} of {API_VERSION}, found {kind} of {api_version}")]
    WrongKind { api_version: String, kind: String },
    /// A field whose value does not hold.
    #[error("{field}: {cause}")]
    Invalid { field: &'static str, cause: String },
}

/// The configuration, with Kubernetes' defaults in place of what is left out.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Configuration {
    pub api_version: String,
    pub kind: String,
    /// Checked only: a decision is made by one thread.
    pub parallelism: i32,
    pub leader_election: LeaderElection,
    pub client_connection: ClientConnection,
    pub enable_profiling: Option<bool>,
    pub enable_contention_profiling: Option<bool>,
    pub delay_cache_until_active: bool,
    pub percentage_of_nodes_to_score: Option<i32>,
    pub pod_initial_backoff_seconds: i64,
    pub pod_max_backoff_seconds: i64,
    pub profiles: Vec<ProfileConfig>,
    pub extenders: Vec<ExtenderConfig>,
}

impl Default for Configuration {
    fn default() -> Self {
        Configuration {
            api_version: API_VERSION.to_owned(),
            kind: KIND.to_owned(),
            parallelism: 16,
            leader_election: LeaderElection::default(),
            client_connection: ClientConnection::default(),
            enable_profiling: None,
            enable_contention_profiling: None,
            delay_cache_until_active: false,
            percentage_of_nodes_to_score: None,
            pod_initial_backoff_seconds: 1,
            pod_max_backoff_seconds: 10,
            profiles: vec![ProfileConfig::default()],
            extenders: Vec::new(),
        }
    }
}

/// `leaderElection`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct LeaderElection {
    pub leader_elect: Option<bool>,
    #[serde(deserialize_with = "duration")]
    pub lease_duration: Duration,
    #[serde(deserialize_with = "duration")]
    pub renew_deadline: Duration,
    #[serde(deserialize_with = "duration")]
    pub retry_period: Duration,
    pub resource_lock: String,
    pub resource_name: String,
    pub resource_namespace: String,
}

impl Default for LeaderElection {
    fn default() -> Self {
        LeaderElection {
            leader_elect: None,
            lease_duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry_period: Duration::from_secs(2),
            resource_lock: "leases".to_owned(),
            resource_name: "kube-scheduler".to_owned(),
            resource_namespace: "kube-system".to_owned(),
        }
    }
}

fn duration<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    apimachinery::time::parse_duration(&text).map_err(serde::de::Error::custom)
}

/// `clientConnection`. What it says of encoding and rates has no meaning here.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ClientConnection {
    pub kubeconfig: Option<String>,
    pub accept_content_types: String,
    pub content_type: String,
    pub qps: f32,
    pub burst: i32,
}

/// `profiles[]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ProfileConfig {
    pub scheduler_name: String,
    pub percentage_of_nodes_to_score: Option<i32>,
    pub plugins: Plugins,
    pub plugin_config: Vec<PluginConfig>,
}

impl Default for ProfileConfig {
    fn default() -> Self {
        ProfileConfig {
            scheduler_name: DEFAULT_SCHEDULER_NAME.to_owned(),
            percentage_of_nodes_to_score: None,
            plugins: Plugins::default(),
            plugin_config: Vec::new(),
        }
    }
}

impl ProfileConfig {
    /// The arguments for a plugin.
    pub fn arguments(&self, plugin: &str) -> Option<&serde_json::Value> {
        self.plugin_config.iter().find(|config| config.name == plugin).map(|config| &config.args)
    }
}

/// `profiles[].pluginConfig[]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PluginConfig {
    pub name: String,
    #[serde(default)]
    pub args: serde_json::Value,
}

/// `profiles[].plugins`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Plugins {
    pub multi_point: Option<PluginSet>,
    pub pre_enqueue: Option<PluginSet>,
    pub queue_sort: Option<PluginSet>,
    pub pre_filter: Option<PluginSet>,
    pub filter: Option<PluginSet>,
    pub post_filter: Option<PluginSet>,
    pub pre_score: Option<PluginSet>,
    pub score: Option<PluginSet>,
    pub reserve: Option<PluginSet>,
    pub permit: Option<PluginSet>,
    pub pre_bind: Option<PluginSet>,
    pub bind: Option<PluginSet>,
    pub post_bind: Option<PluginSet>,
}

impl Plugins {
    /// The sets of the single points that the configuration gives.
    pub fn points(&self) -> impl Iterator<Item = (&'static str, Points, &PluginSet)> {
        [
            ("preEnqueue", Points::PRE_ENQUEUE, &self.pre_enqueue),
            ("queueSort", Points::QUEUE_SORT, &self.queue_sort),
            ("preFilter", Points::PRE_FILTER, &self.pre_filter),
            ("filter", Points::FILTER, &self.filter),
            ("postFilter", Points::POST_FILTER, &self.post_filter),
            ("preScore", Points::PRE_SCORE, &self.pre_score),
            ("score", Points::SCORE, &self.score),
            ("reserve", Points::RESERVE, &self.reserve),
            ("permit", Points::PERMIT, &self.permit),
            ("preBind", Points::PRE_BIND, &self.pre_bind),
            ("bind", Points::BIND, &self.bind),
            ("postBind", Points::POST_BIND, &self.post_bind),
        ]
        .into_iter()
        .filter_map(|(name, point, set)| Some((name, point, set.as_ref()?)))
    }
}

/// The plugins of a point.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct PluginSet {
    pub enabled: Vec<PluginRef>,
    pub disabled: Vec<PluginRef>,
}

impl PluginSet {
    /// Whether the set switches off a plugin that is on by default.
    pub fn disables(&self, plugin: &str) -> bool {
        self.disabled.iter().any(|disabled| disabled.name == plugin || disabled.name == "*")
    }
}

/// A plugin's name and weight.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct PluginRef {
    pub name: String,
    #[serde(default)]
    pub weight: Option<i64>,
}

/// `extenders[]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ExtenderConfig {
    pub url_prefix: String,
    pub filter_verb: String,
    pub prioritize_verb: String,
    pub preempt_verb: String,
    pub bind_verb: String,
    pub weight: i64,
    #[serde(rename = "tlsConfig")]
    pub tls_config: Option<ExtenderTls>,
    pub http_timeout: Option<String>,
    pub node_cache_capable: bool,
    pub managed_resources: Vec<ManagedResource>,
    pub ignorable: bool,
    #[serde(rename = "enableHTTPS")]
    pub enable_https: bool,
}

impl ExtenderConfig {
    /// How long an answer may take.
    pub fn timeout(&self) -> Duration {
        const DEFAULT: Duration = Duration::from_secs(5);
        let given = self.http_timeout.as_deref().and_then(|text| apimachinery::time::parse_duration(text).ok());
        given.filter(|given| !given.is_zero()).unwrap_or(DEFAULT)
    }
}

/// `extenders[].tlsConfig`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ExtenderTls {
    pub insecure: bool,
    pub server_name: String,
    pub cert_file: String,
    pub key_file: String,
    pub ca_file: String,
    pub cert_data: String,
    pub key_data: String,
    pub ca_data: String,
}

/// `extenders[].managedResources[]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ManagedResource {
    pub name: String,
    pub ignored_by_scheduler: bool,
}

impl Configuration {
    /// Reads and checks a configuration.
    pub fn parse(text: &str) -> Result<Configuration, ConfigError> {
        let documents =
            apimachinery::yaml::documents(text).map_err(|error| ConfigError::Malformed(error.to_string()))?;
        let Some(document) = documents.into_iter().next() else {
            return Err(ConfigError::Malformed("the file is empty".to_owned()));
        };
        let mut configuration: Configuration =
            serde_json::from_value(document).map_err(|error| ConfigError::Malformed(error.to_string()))?;
        if configuration.api_version != API_VERSION || configuration.kind != KIND {
            return Err(ConfigError::WrongKind { api_version: configuration.api_version, kind: configuration.kind });
        }
        if configuration.profiles.is_empty() {
            configuration.profiles.push(ProfileConfig::default());
        }
        configuration.check()?;
        configuration.leave_to_extenders();
        Ok(configuration)
    }

    /// The wait before the second attempt, and the longest wait.
    pub fn backoff(&self) -> (Duration, Duration) {
        let seconds = |number: i64| Duration::from_secs(number.unsigned_abs());
        (seconds(self.pod_initial_backoff_seconds), seconds(self.pod_max_backoff_seconds))
    }

    /// NodeResourcesFit does not look at resources that extenders account for.
    fn leave_to_extenders(&mut self) {
        let managed = self.extenders.iter().flat_map(|extender| &extender.managed_resources);
        let ignored: Vec<serde_json::Value> =
            managed.filter(|resource| resource.ignored_by_scheduler).map(|one| one.name.clone().into()).collect();
        if ignored.is_empty() {
            return;
        }
        for profile in &mut self.profiles {
            const FIT: &str = "NodeResourcesFit";
            if profile.arguments(FIT).is_none() {
                profile.plugin_config.push(PluginConfig { name: FIT.to_owned(), args: serde_json::json!({}) });
            }
            for config in profile.plugin_config.iter_mut().filter(|config| config.name == FIT) {
                if !config.args["ignoredResources"].is_array() {
                    config.args["ignoredResources"] = serde_json::json!([]);
                }
                if let Some(list) = config.args["ignoredResources"].as_array_mut() {
                    list.extend(ignored.clone());
                }
            }
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        let invalid = |field, cause: &str| Err(ConfigError::Invalid { field, cause: cause.to_owned() });
        if self.parallelism <= 0 {
            return invalid("parallelism", "should be an integer value greater than zero");
        }
        if self.client_connection.burst < 0 {
            return invalid("clientConnection.burst", "must be non-negative");
        }
        self.leader_election.check()?;
        if self.pod_initial_backoff_seconds <= 0 {
            return invalid("podInitialBackoffSeconds", "must be greater than 0");
        }
        if self.pod_max_backoff_seconds < self.pod_initial_backoff_seconds {
            return invalid("podMaxBackoffSeconds", "must be greater than or equal to podInitialBackoffSeconds");
        }
        let percentages = self.profiles.iter().map(|profile| profile.percentage_of_nodes_to_score);
        let mut percentages = percentages.chain([self.percentage_of_nodes_to_score]).flatten();
        if percentages.any(|percentage| !(0..=100).contains(&percentage)) {
            return invalid("percentageOfNodesToScore", "not in valid range [0-100]");
        }
        let mut names = BTreeSet::new();
        for profile in &self.profiles {
            if profile.scheduler_name.is_empty() {
                return invalid("profiles[].schedulerName", "Required value");
            }
            if !names.insert(&profile.scheduler_name) {
                return invalid("profiles[].schedulerName", &format!("Duplicate value: {:?}", profile.scheduler_name));
            }
            profile.check()?;
        }
        // The pods of all profiles wait in one queue.
        let queue_sort = |profile: &ProfileConfig| profile.plugins.queue_sort.clone().unwrap_or_default();
        if self.profiles.windows(2).any(|pair| queue_sort(&pair[0]) != queue_sort(&pair[1])) {
            return invalid("profiles[].plugins.queueSort", "must be the same for all profiles");
        }
        let mut managed = BTreeSet::new();
        for extender in &self.extenders {
            if extender.url_prefix.parse::<http::Uri>().is_err() {
                return invalid("extenders[].urlPrefix", "must be a URL");
            }
            if !extender.prioritize_verb.is_empty() && extender.weight <= 0 {
                return invalid("extenders[].weight", "must have a positive weight applied to it");
            }
            for resource in &extender.managed_resources {
                if !is_extended(&resource.name) {
                    let cause = format!("{:?} is an invalid extended resource name", resource.name);
                    return invalid("extenders[].managedResources[].name", &cause);
                }
                if !managed.insert(&resource.name) {
                    let cause = format!("{:?}: duplicate extender managed resource name", resource.name);
                    return invalid("extenders[].managedResources[].name", &cause);
                }
            }
        }
        match self.extenders.iter().filter(|extender| !extender.bind_verb.is_empty()).count() {
            0 | 1 => Ok(()),
            binders => {
                let cause =
                    format!("found {binders} extenders implementing bind: only one extender can implement bind");
                invalid("extenders", &cause)
            }
        }
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

impl LeaderElection {
    /// As `ValidateLeaderElectionConfiguration`.
    fn check(&self) -> Result<(), ConfigError> {
        let invalid = |field, cause: &str| Err(ConfigError::Invalid { field, cause: cause.to_owned() });
        if self.leader_elect == Some(false) {
            return Ok(());
        }
        if self.lease_duration <= self.renew_deadline {
            return invalid("leaderElection.leaseDuration", "LeaseDuration must be greater than RenewDeadline");
        }
        if self.renew_deadline <= self.retry_period || self.retry_period.is_zero() {
            return invalid("leaderElection.renewDeadline", "RenewDeadline must be greater than RetryPeriod");
        }
        if self.resource_lock != "leases" {
            return invalid("leaderElection.resourceLock", "resourceLock value must be \"leases\"");
        }
        if self.resource_name.is_empty() || self.resource_namespace.is_empty() {
            return invalid("leaderElection.resourceName", "resourceName and resourceNamespace are required");
        }
        Ok(())
    }
}

impl ProfileConfig {
    /// As `validateKubeSchedulerProfile`; the arguments are checked by their plugins.
    fn check(&self) -> Result<(), ConfigError> {
        const REMOVED: [&str; 4] = ["AzureDiskLimits", "CinderLimits", "EBSLimits", "GCEPDLimits"];
        let invalid = |field, cause: String| Err(ConfigError::Invalid { field, cause });
        let enabled = self.plugins.points().map(|(.., set)| set).chain(&self.plugins.multi_point);
        let enabled = enabled.flat_map(|set| set.enabled.iter().map(|plugin| &plugin.name));
        let mut configured = BTreeSet::new();
        for name in self.plugin_config.iter().map(|config| &config.name) {
            if !configured.insert(name) {
                return invalid("profiles[].pluginConfig", format!("Duplicate value: {name:?}"));
            }
        }
        if let Some(name) = enabled.chain(configured).find(|name| REMOVED.contains(&name.as_str())) {
            let cause = format!(
                "{name:?} was invalid in version \"v1\" (KubeSchedulerConfiguration is version {API_VERSION:?})"
            );
            return invalid("profiles[].plugins", cause);
        }
        if self.plugins.queue_sort.as_ref().is_some_and(|set| set.enabled.len() > 1) {
            return invalid("profiles[].plugins.queueSort", "only one queue sort plugin can be enabled".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "apiVersion: kubescheduler.config.k8s.io/v1\nkind: KubeSchedulerConfiguration\n";

    #[test]
    fn an_empty_configuration_is_the_default() {
        let configuration = Configuration::parse(HEAD).expect("default");
        assert_eq!(configuration.backoff(), (Duration::from_secs(1), Duration::from_secs(10)));
        assert_eq!(configuration.profiles.len(), 1);
        assert_eq!(configuration.profiles[0].scheduler_name, "default-scheduler");
    }

    #[test]
    fn every_field_of_kubernetes_is_known() {
        let yaml = "
parallelism: 8
leaderElection: {leaderElect: true, leaseDuration: 30s, renewDeadline: 20s, retryPeriod: 5s, resourceLock: leases, resourceName: s, resourceNamespace: kube-system}
clientConnection: {kubeconfig: /k, acceptContentTypes: a, contentType: application/json, qps: 50, burst: 100}
enableProfiling: false
enableContentionProfiling: false
delayCacheUntilActive: true
percentageOfNodesToScore: 50
podInitialBackoffSeconds: 2
podMaxBackoffSeconds: 20
profiles: [{schedulerName: x, percentageOfNodesToScore: 0, plugins: {multiPoint: {enabled: [{name: P, weight: 2}], disabled: [{name: '*'}]}}, pluginConfig: [{name: P, args: {a: 1}}]}]
extenders: [{urlPrefix: 'http://x', filterVerb: f, preemptVerb: p, prioritizeVerb: q, weight: 2, bindVerb: b, enableHTTPS: true, tlsConfig: {insecure: true, serverName: s, certFile: c, keyFile: k, caFile: a, certData: d, keyData: e, caData: g}, httpTimeout: 3s, nodeCacheCapable: true, managedResources: [{name: example.com/gpu, ignoredByScheduler: true}], ignorable: true}]
";
        let configuration = Configuration::parse(&format!("{HEAD}{yaml}")).expect("all fields");
        assert_eq!(configuration.leader_election.lease_duration, Duration::from_secs(30));
        assert_eq!(configuration.extenders[0].timeout(), Duration::from_secs(3));
        assert_eq!(configuration.profiles[0].arguments("P"), Some(&serde_json::json!({"a": 1})));
    }

    #[test]
    fn wrong_values_are_named() {
        let cases = [
            ("profiles: [{schedulerName: a}, {schedulerName: a}]", "Duplicate value: \"a\""),
            ("percentageOfNodesToScore: 101", "percentageOfNodesToScore"),
            ("podInitialBackoffSeconds: 20", "podMaxBackoffSeconds"),
            ("extenders: [{urlPrefix: 'http://x', prioritizeVerb: p}]", "extenders[].weight"),
            ("extenders: [{urlPrefix: 'http://x', bindVerb: b}, {urlPrefix: 'http://y', bindVerb: b}]", "only one"),
            ("profiles: 7", "invalid type"),
            ("percentageOfNodesToScore: -1", "percentageOfNodesToScore"),
            ("parallelism: 0", "greater than zero"),
            ("parallelizm: 1", "unknown field `parallelizm`"),
            ("profiles: [{plugins: {filters: {}}}]", "unknown field `filters`"),
            ("leaderElection: {leaseDuration: 5s}", "LeaseDuration must be greater"),
            ("leaderElection: {resourceLock: endpoints}", "must be \"leases\""),
            ("clientConnection: {burst: -1}", "clientConnection.burst"),
            ("profiles: [{pluginConfig: [{name: A}, {name: A}]}]", "Duplicate value: \"A\""),
            ("profiles: [{plugins: {filter: {enabled: [{name: EBSLimits}]}}}]", "was invalid in version"),
            (
                "profiles: [{schedulerName: a}, {schedulerName: b, plugins: {queueSort: {enabled: [{name: X}]}}}]",
                "same for all",
            ),
            ("extenders: [{urlPrefix: 'http://x', managedResources: [{name: cpu}]}]", "invalid extended resource name"),
            (
                "extenders: [{urlPrefix: 'http://x', managedResources: [{name: a.b/c}, {name: a.b/c}]}]",
                "duplicate extender",
            ),
        ];
        for (yaml, words) in cases {
            let error = Configuration::parse(&format!("{HEAD}{yaml}\n")).expect_err(yaml).to_string();
            assert!(error.contains(words), "{error} should contain {words}");
        }
        assert!(Configuration::parse("apiVersion: v1\nkind: Pod\n").is_err());
    }
}
