//! The flags that say what a field of the configuration says, all of Kubernetes': one table. What is given is laid over the files.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, error::ErrorKind};
use serde_json::{Map, Value, json};

/// How a flag's text is the field's value.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Text,
    Switch,
    Number,
    /// `a,b`, or given again.
    List,
    /// `a=1,b=2`, with this in the middle.
    Pairs(char),
    /// `a=true,b=false`; what else is in the field stays.
    Gates,
    /// `key=value:effect,…`
    Taints,
    /// `0:memory=1Gi,hugepages-1M=2Gi`, or given again.
    Memory,
    /// `name:value,…`
    Headers,
}

use Form::*;

/// Flag, field, form.
const FLAGS: &[(&str, &str, Form)] = &[
    ("address", "address", Text),
    ("allowed-unsafe-sysctls", "allowedUnsafeSysctls", List),
    ("anonymous-auth", "authentication.anonymous.enabled", Switch),
    ("authentication-token-webhook", "authentication.webhook.enabled", Switch),
    ("authentication-token-webhook-cache-ttl", "authentication.webhook.cacheTTL", Text),
    ("authorization-mode", "authorization.mode", Text),
    ("authorization-webhook-cache-authorized-ttl", "authorization.webhook.cacheAuthorizedTTL", Text),
    ("authorization-webhook-cache-unauthorized-ttl", "authorization.webhook.cacheUnauthorizedTTL", Text),
    ("cgroup-driver", "cgroupDriver", Text),
    ("cgroup-root", "cgroupRoot", Text),
    ("cgroups-per-qos", "cgroupsPerQOS", Switch),
    ("client-ca-file", "authentication.x509.clientCAFile", Text),
    ("cluster-dns", "clusterDNS", List),
    ("cluster-domain", "clusterDomain", Text),
    ("container-log-max-files", "containerLogMaxFiles", Number),
    ("container-log-max-size", "containerLogMaxSize", Text),
    ("container-runtime-endpoint", "containerRuntimeEndpoint", Text),
    ("contention-profiling", "enableContentionProfiling", Switch),
    ("cpu-cfs-quota", "cpuCFSQuota", Switch),
    ("cpu-cfs-quota-period", "cpuCFSQuotaPeriod", Text),
    ("cpu-manager-policy", "cpuManagerPolicy", Text),
    ("cpu-manager-policy-options", "cpuManagerPolicyOptions", Pairs('=')),
    ("cpu-manager-reconcile-period", "cpuManagerReconcilePeriod", Text),
    ("enable-controller-attach-detach", "enableControllerAttachDetach", Switch),
    ("enable-debugging-handlers", "enableDebuggingHandlers", Switch),
    ("enable-server", "enableServer", Switch),
    ("enforce-node-allocatable", "enforceNodeAllocatable", List),
    ("event-burst", "eventBurst", Number),
    ("event-qps", "eventRecordQPS", Number),
    ("eviction-hard", "evictionHard", Pairs('<')),
    ("eviction-max-pod-grace-period", "evictionMaxPodGracePeriod", Number),
    ("eviction-minimum-reclaim", "evictionMinimumReclaim", Pairs('=')),
    ("eviction-pressure-transition-period", "evictionPressureTransitionPeriod", Text),
    ("eviction-soft", "evictionSoft", Pairs('<')),
    ("eviction-soft-grace-period", "evictionSoftGracePeriod", Pairs('=')),
    ("fail-swap-on", "failSwapOn", Switch),
    ("feature-gates", "featureGates", Gates),
    ("file-check-frequency", "fileCheckFrequency", Text),
    ("hairpin-mode", "hairpinMode", Text),
    ("healthz-bind-address", "healthzBindAddress", Text),
    ("healthz-port", "healthzPort", Number),
    ("http-check-frequency", "httpCheckFrequency", Text),
    ("image-gc-high-threshold", "imageGCHighThresholdPercent", Number),
    ("image-gc-low-threshold", "imageGCLowThresholdPercent", Number),
    ("image-service-endpoint", "imageServiceEndpoint", Text),
    ("iptables-drop-bit", "iptablesDropBit", Number),
    ("iptables-masquerade-bit", "iptablesMasqueradeBit", Number),
    ("kernel-memcg-notification", "kernelMemcgNotification", Switch),
    ("kube-api-burst", "kubeAPIBurst", Number),
    ("kube-api-content-type", "contentType", Text),
    ("kube-api-qps", "kubeAPIQPS", Number),
    ("kube-reserved", "kubeReserved", Pairs('=')),
    ("kube-reserved-cgroup", "kubeReservedCgroup", Text),
    ("kubelet-cgroups", "kubeletCgroups", Text),
    ("local-storage-capacity-isolation", "localStorageCapacityIsolation", Switch),
    ("logging-format", "logging.format", Text),
    ("make-iptables-util-chains", "makeIPTablesUtilChains", Switch),
    ("manifest-url", "staticPodURL", Text),
    ("manifest-url-header", "staticPodURLHeader", Headers),
    ("max-open-files", "maxOpenFiles", Number),
    ("max-pods", "maxPods", Number),
    ("memory-manager-policy", "memoryManagerPolicy", Text),
    ("minimum-image-ttl-duration", "imageMinimumGCAge", Text),
    ("node-status-max-images", "nodeStatusMaxImages", Number),
    ("node-status-update-frequency", "nodeStatusUpdateFrequency", Text),
    ("oom-score-adj", "oomScoreAdj", Number),
    ("pod-cidr", "podCIDR", Text),
    ("pod-manifest-path", "staticPodPath", Text),
    ("pod-max-pids", "podPidsLimit", Number),
    ("pods-per-core", "podsPerCore", Number),
    ("port", "port", Number),
    ("protect-kernel-defaults", "protectKernelDefaults", Switch),
    ("provider-id", "providerID", Text),
    ("qos-reserved", "qosReserved", Pairs('=')),
    ("read-only-port", "readOnlyPort", Number),
    ("register-node", "registerNode", Switch),
    ("register-with-taints", "registerWithTaints", Taints),
    ("registry-burst", "registryBurst", Number),
    ("registry-qps", "registryPullQPS", Number),
    ("reserved-cpus", "reservedSystemCPUs", Text),
    ("reserved-memory", "reservedMemory", Memory),
    ("resolv-conf", "resolvConf", Text),
    ("rotate-certificates", "rotateCertificates", Switch),
    ("rotate-server-certificates", "serverTLSBootstrap", Switch),
    ("runonce", "runOnce", Switch),
    ("runtime-request-timeout", "runtimeRequestTimeout", Text),
    ("seccomp-default", "seccompDefault", Switch),
    ("serialize-image-pulls", "serializeImagePulls", Switch),
    ("streaming-connection-idle-timeout", "streamingConnectionIdleTimeout", Text),
    ("sync-frequency", "syncFrequency", Text),
    ("system-cgroups", "systemCgroups", Text),
    ("system-reserved", "systemReserved", Pairs('=')),
    ("system-reserved-cgroup", "systemReservedCgroup", Text),
    ("tls-cert-file", "tlsCertFile", Text),
    ("tls-cipher-suites", "tlsCipherSuites", List),
    ("tls-min-version", "tlsMinVersion", Text),
    ("tls-private-key-file", "tlsPrivateKeyFile", Text),
    ("topology-manager-policy", "topologyManagerPolicy", Text),
    ("topology-manager-policy-options", "topologyManagerPolicyOptions", Pairs('=')),
    ("topology-manager-scope", "topologyManagerScope", Text),
    ("volume-plugin-dir", "volumePluginDir", Text),
    ("volume-stats-agg-period", "volumeStatsAggPeriod", Text),
];

/// What flags say of the configuration: fields by their path.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ConfigFlags(Vec<(&'static str, Value)>);

// === impl ConfigFlags ===

impl ConfigFlags {
    /// Says what a field is to be.
    pub fn set(&mut self, field: &'static str, value: Value) {
        self.0.push((field, value));
    }

    /// Lays what is said over `config`.
    pub(super) fn lay(&self, config: &mut Map<String, Value>) {
        for (path, value) in &self.0 {
            let mut object = &mut *config;
            let (parents, name) = path.rsplit_once('.').map_or((None, *path), |(parents, name)| (Some(parents), name));
            for parent in parents.into_iter().flat_map(|parents| parents.split('.')) {
                let inner = object.entry(parent).or_insert_with(|| json!({}));
                if !inner.is_object() {
                    *inner = json!({});
                }
                let Value::Object(inner) = inner else { return };
                object = inner;
            }
            match (object.get_mut(name), value) {
                (Some(Value::Object(gates)), Value::Object(given)) if name == "featureGates" => {
                    gates.extend(given.clone());
                }
                _ => {
                    object.insert(name.to_owned(), value.clone());
                }
            }
        }
    }
}

/// A flag's value, or what is wrong with it.
fn read(form: Form, given: &[String]) -> Result<Value, String> {
    let last = given.last().map(String::as_str).unwrap_or_default();
    let items = || given.iter().flat_map(|text| text.split(',')).map(str::trim).filter(|item| !item.is_empty());
    let pair = |item: &str, separator: char| {
        let found = item.split_once(separator).map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()));
        found.ok_or_else(|| format!("{item:?} is not of the form name{separator}value"))
    };
    Ok(match form {
        Text => json!(last),
        Switch => json!(last.parse::<bool>().map_err(|_| format!("{last:?} is neither true nor false"))?),
        Number => json!(last.parse::<i64>().map_err(|_| format!("{last:?} is no number"))?),
        List => items().collect(),
        Pairs(separator) => {
            let pairs = items().map(|item| pair(item, separator).map(|(key, value)| (key, json!(value))));
            Value::Object(pairs.collect::<Result<_, _>>()?)
        }
        Gates => {
            let gate = |item: &str| {
                let (name, on) = pair(item, '=')?;
                let on: bool = on.parse().map_err(|_| format!("{item:?}: neither true nor false"))?;
                Ok::<_, String>((name, json!(on)))
            };
            Value::Object(items().map(gate).collect::<Result<_, _>>()?)
        }
        Taints => items().map(taint).collect::<Result<_, _>>()?,
        Memory => given.iter().map(|text| memory(text)).collect::<Result<_, _>>()?,
        Headers => {
            let mut headers: Map<String, Value> = Map::new();
            for item in items() {
                let (name, value) = pair(item, ':')?;
                if let Value::Array(values) = headers.entry(name).or_insert_with(|| json!([])) {
                    values.push(json!(value));
                }
            }
            Value::Object(headers)
        }
    })
}

/// `key=value:effect`, `key:effect`.
fn taint(text: &str) -> Result<Value, String> {
    let bad = || format!("{text:?} is not of the form key=value:effect");
    let (key_value, effect) = text.rsplit_once(':').ok_or_else(bad)?;
    if !matches!(effect, "NoSchedule" | "PreferNoSchedule" | "NoExecute") {
        return Err(format!("{text:?}: unknown effect {effect:?}"));
    }
    let (key, value) = key_value.split_once('=').unwrap_or((key_value, ""));
    if key.is_empty() {
        return Err(bad());
    }
    Ok(json!({"key": key, "value": Some(value).filter(|value| !value.is_empty()), "effect": effect}))
}

fn memory(text: &str) -> Result<Value, String> {
    let bad = || format!("{text:?} is not of the form node:kind=amount,kind=amount");
    let (node, kinds) = text.split_once(':').ok_or_else(bad)?;
    let node: u32 = node.trim().parse().map_err(|_| bad())?;
    let limits = kinds.split(',').map(|kind| kind.split_once('=').map(|(k, v)| (k.to_owned(), json!(v))));
    let limits: Map<String, Value> = limits.collect::<Option<_>>().ok_or_else(bad)?;
    Ok(json!({"numaNode": node, "limits": limits}))
}

impl FromArgMatches for ConfigFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Self::default();
        for (flag, field, form) in FLAGS {
            let Some(given) = matches.get_many::<String>(flag) else { continue };
            let given: Vec<String> = given.cloned().collect();
            let value = read(*form, &given)
                .map_err(|why| clap::Error::raw(ErrorKind::ValueValidation, format!("--{flag}: {why}\n")))?;
            flags.set(field, value);
        }
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.extend(Self::from_arg_matches(matches)?.0);
        Ok(())
    }
}

impl Args for ConfigFlags {
    fn augment_args(command: Command) -> Command {
        let arg = |(flag, field, form): &(&'static str, &'static str, Form)| {
            let arg = Arg::new(*flag).long(*flag).help(format!("The field {field} of the KubeletConfiguration."));
            match form {
                Switch => arg.num_args(0..=1).require_equals(true).default_missing_value("true"),
                List | Pairs(_) | Gates | Taints | Memory | Headers => arg.action(ArgAction::Append),
                Text | Number => arg.allow_hyphen_values(true),
            }
        };
        command.args(FLAGS.iter().map(arg)).next_help_heading(None)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

#[cfg(test)]
mod tests {
    use super::super::fields;
    use super::*;

    #[test]
    fn every_flag_is_one_of_a_field() {
        for (flag, field, _) in FLAGS {
            let mut config = Map::new();
            ConfigFlags(vec![(field, json!(1))]).lay(&mut config);
            assert_eq!(fields::unknown(&config), Vec::<String>::new(), "{flag}");
        }
    }

    #[test]
    fn flags_are_laid_over_files() {
        let parse = |arguments: &[&str]| {
            let command = ConfigFlags::augment_args(Command::new("kubelet").no_binary_name(true));
            let matches = command.args_override_self(true).try_get_matches_from(arguments)?;
            ConfigFlags::from_arg_matches(&matches)
        };
        let flags = parse(&[
            "--max-pods=7",
            "--max-pods=8",
            "--fail-swap-on=false",
            "--seccomp-default",
            "--oom-score-adj",
            "-5",
            "--cluster-dns=10.0.0.1,10.0.0.2",
            "--eviction-hard=memory.available<50Mi",
            "--feature-gates=A=true,B=false",
            "--authorization-mode=AlwaysAllow",
            "--register-with-taints=a=b:NoSchedule,c:NoExecute",
            "--reserved-memory=0:memory=1Gi,hugepages-2Mi=2Mi",
            "--manifest-url-header=a:hello,a:world",
        ])
        .expect("flags");
        let mut config = json!({"maxPods": 1, "featureGates": {"B": true, "C": true}, "evictionHard": {"x": "1"},
            "authorization": {"webhook": {"cacheTTL": "1s"}}});
        let Value::Object(config) = &mut config else { return };
        flags.lay(config);
        assert_eq!(
            Value::Object(config.clone()),
            json!({"maxPods": 8, "failSwapOn": false, "seccompDefault": true, "oomScoreAdj": -5,
                "clusterDNS": ["10.0.0.1", "10.0.0.2"], "evictionHard": {"memory.available": "50Mi"},
                "featureGates": {"A": true, "B": false, "C": true},
                "authorization": {"webhook": {"cacheTTL": "1s"}, "mode": "AlwaysAllow"},
                "registerWithTaints": [{"key": "a", "value": "b", "effect": "NoSchedule"}, {"key": "c", "value": null, "effect": "NoExecute"}],
                "reservedMemory": [{"numaNode": 0, "limits": {"memory": "1Gi", "hugepages-2Mi": "2Mi"}}],
                "staticPodURLHeader": {"a": ["hello", "world"]}})
        );
        for bad in [
            "--max-pods=many",
            "--fail-swap-on=maybe",
            "--register-with-taints=a",
            "--eviction-hard=memory",
            "--feature-gates=A=1",
        ] {
            assert!(parse(&[bad]).is_err(), "{bad}");
        }
    }
}
