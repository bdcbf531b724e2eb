//! KubeSchedulerConfiguration v1, as kube-scheduler reads it from `--config`.

mod validation;

use std::time::Duration;

use serde::Deserialize;

use crate::cache::DEFAULT_SCHEDULER_NAME;
use crate::framework::Points;
use crate::plugins::{self, BadArguments};
pub use validation::Faults;
use validation::validate;

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
    /// Fields whose values do not hold.
    #[error(transparent)]
    Invalid(#[from] Faults),
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
        configuration.check_decoding()?;
        validate(&configuration).check()?;
        configuration.leave_to_extenders();
        Ok(configuration)
    }

    /// The wait before the second attempt, and the longest wait.
    pub fn backoff(&self) -> (Duration, Duration) {
        let seconds = |number: i64| Duration::from_secs(number.unsigned_abs());
        (seconds(self.pod_initial_backoff_seconds), seconds(self.pod_max_backoff_seconds))
    }

    /// Arguments that are not of their kind are no fault of a value.
    fn check_decoding(&self) -> Result<(), ConfigError> {
        for (at, profile) in self.profiles.iter().enumerate() {
            for (place, config) in profile.plugin_config.iter().enumerate() {
                if let Some(Err(BadArguments::Malformed(why))) = plugins::make(&config.name, Some(&config.args)) {
                    let path = format!("decoding .profiles[{at}].pluginConfig[{place}]");
                    return Err(ConfigError::Malformed(format!("{path}: {why}")));
                }
            }
        }
        Ok(())
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
    fn what_is_no_configuration_is_refused() {
        let cases = [
            ("profiles: 7", "invalid type"),
            ("parallelizm: 1", "unknown field `parallelizm`"),
            ("profiles: [{plugins: {filters: {}}}]", "unknown field `filters`"),
            (
                "profiles: [{pluginConfig: [{name: VolumeBinding, args: {bindTimeout: 1}}]}]",
                "decoding .profiles[0].pluginConfig[0]: decoding args for plugin VolumeBinding: unknown field `bindTimeout`",
            ),
            (
                "profiles: [{pluginConfig: [{name: VolumeBinding, args: {kind: NodeAffinityArgs}}]}]",
                "args for plugin VolumeBinding were not of type VolumeBindingArgs.kubescheduler.config.k8s.io, \
                 got NodeAffinityArgs.kubescheduler.config.k8s.io",
            ),
        ];
        for (yaml, words) in cases {
            let error = Configuration::parse(&format!("{HEAD}{yaml}\n")).expect_err(yaml).to_string();
            assert!(error.contains(words), "{error} should contain {words}");
        }
        assert!(Configuration::parse("apiVersion: v1\nkind: Pod\n").is_err());
    }
}
