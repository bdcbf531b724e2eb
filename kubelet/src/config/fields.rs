//! The fields of `KubeletConfiguration` (kubelet.config.k8s.io/v1beta1), and reading them strictly: a field that Kubernetes does
//! not know, or of another type, is an error that names it.

use std::collections::BTreeMap;
use std::time::Duration;

use apimachinery::time::parse_duration;
use serde_json::{Map, Value};

use super::ConfigError;

/// Every field, objects as `parent.child`. What stands here and is not read in `super` is accepted without effect.
const KNOWN: &[&str] = &[
    "address",
    "allowedUnsafeSysctls",
    "apiVersion",
    "authentication",
    "authentication.anonymous",
    "authentication.anonymous.enabled",
    "authentication.webhook",
    "authentication.webhook.cacheTTL",
    "authentication.webhook.enabled",
    "authentication.x509",
    "authentication.x509.clientCAFile",
    "authorization",
    "authorization.mode",
    "authorization.webhook",
    "authorization.webhook.cacheAuthorizedTTL",
    "authorization.webhook.cacheUnauthorizedTTL",
    "cgroupDriver",
    "cgroupRoot",
    "cgroupsPerQOS",
    "clusterDNS",
    "clusterDomain",
    "configMapAndSecretChangeDetectionStrategy",
    "containerLogMaxFiles",
    "containerLogMaxSize",
    "containerLogMaxWorkers",
    "containerLogMonitorInterval",
    "containerRuntimeEndpoint",
    "contentType",
    "cpuCFSQuota",
    "cpuCFSQuotaPeriod",
    "cpuManagerPolicy",
    "cpuManagerPolicyOptions",
    "cpuManagerReconcilePeriod",
    "crashLoopBackOff",
    "crashLoopBackOff.maxContainerRestartPeriod",
    "enableContentionProfiling",
    "enableControllerAttachDetach",
    "enableDebugFlagsHandler",
    "enableDebuggingHandlers",
    "enableProfilingHandler",
    "enableServer",
    "enableSystemLogHandler",
    "enableSystemLogQuery",
    "enforceNodeAllocatable",
    "eventBurst",
    "eventRecordQPS",
    "evictionHard",
    "evictionMaxPodGracePeriod",
    "evictionMinimumReclaim",
    "evictionPressureTransitionPeriod",
    "evictionSoft",
    "evictionSoftGracePeriod",
    "failCgroupV1",
    "failSwapOn",
    "featureGates",
    "fileCheckFrequency",
    "hairpinMode",
    "healthzBindAddress",
    "healthzPort",
    "httpCheckFrequency",
    "imageGCHighThresholdPercent",
    "imageGCLowThresholdPercent",
    "imageMaximumGCAge",
    "imageMinimumGCAge",
    "imagePullCredentialsVerificationPolicy",
    "imageServiceEndpoint",
    "iptablesDropBit",
    "iptablesMasqueradeBit",
    "kernelMemcgNotification",
    "kind",
    "kubeAPIBurst",
    "kubeAPIQPS",
    "kubeReserved",
    "kubeReservedCgroup",
    "kubeletCgroups",
    "localStorageCapacityIsolation",
    "logging",
    "logging.flushFrequency",
    "logging.format",
    "logging.options",
    "logging.verbosity",
    "logging.vmodule",
    "makeIPTablesUtilChains",
    "maxOpenFiles",
    "maxParallelImagePulls",
    "maxPods",
    "memoryManagerPolicy",
    "memoryReservationPolicy",
    "memorySwap",
    "memorySwap.swapBehavior",
    "memoryThrottlingFactor",
    "mergeDefaultEvictionSettings",
    "nodeLeaseDurationSeconds",
    "nodeStatusMaxImages",
    "nodeStatusReportFrequency",
    "nodeStatusUpdateFrequency",
    "oomScoreAdj",
    "podCIDR",
    "podLogsDir",
    "podPidsLimit",
    "podsPerCore",
    "port",
    "preloadedImagesVerificationAllowlist",
    "protectKernelDefaults",
    "providerID",
    "qosReserved",
    "readOnlyPort",
    "registerNode",
    "registerWithTaints",
    "registryBurst",
    "registryPullQPS",
    "reservedMemory",
    "reservedSystemCPUs",
    "resolvConf",
    "rotateCertificates",
    "runOnce",
    "runtimeRequestTimeout",
    "seccompDefault",
    "serializeImagePulls",
    "serverTLSBootstrap",
    "showHiddenMetricsForVersion",
    "shutdownGracePeriod",
    "shutdownGracePeriodByPodPriority",
    "shutdownGracePeriodCriticalPods",
    "singleProcessOOMKill",
    "staticPodPath",
    "staticPodURL",
    "staticPodURLHeader",
    "streamingConnectionIdleTimeout",
    "syncFrequency",
    "systemCgroups",
    "systemReserved",
    "systemReservedCgroup",
    "tlsCertFile",
    "tlsCipherSuites",
    "tlsCurvePreferences",
    "tlsMinVersion",
    "tlsPrivateKeyFile",
    "topologyManagerPolicy",
    "topologyManagerPolicyOptions",
    "topologyManagerScope",
    "tracing",
    "tracing.endpoint",
    "tracing.samplingRatePerMillion",
    "userNamespaces",
    "userNamespaces.idsPerPod",
    "volumePluginDir",
    "volumeStatsAggPeriod",
];

/// The fields of `config` that Kubernetes does not have, as paths.
pub(super) fn unknown(config: &Map<String, Value>) -> Vec<String> {
    let mut found = Vec::new();
    collect_unknown(config, "", &mut found);
    found
}

fn collect_unknown(object: &Map<String, Value>, prefix: &str, found: &mut Vec<String>) {
    for (name, value) in object {
        let path = format!("{prefix}{name}");
        if !KNOWN.contains(&path.as_str()) {
            found.push(path);
        } else if let Value::Object(children) = value {
            let inner = format!("{path}.");
            if KNOWN.iter().any(|known| known.starts_with(&inner)) {
                collect_unknown(children, &inner, found);
            }
        }
    }
}

/// Lay `over` onto `base`: objects merge, all else is replaced. As drop-in files are merged.
pub(super) fn merge(base: &mut Map<String, Value>, over: Map<String, Value>) {
    for (name, value) in over {
        match (base.get_mut(&name), value) {
            (Some(Value::Object(below)), Value::Object(above)) => merge(below, above),
            (_, value) => {
                base.insert(name, value);
            }
        }
    }
}

/// Reads fields by path. An absent one, and a null, is `None`.
pub(super) struct Fields<'c> {
    pub config: &'c Map<String, Value>,
}

// === impl Fields ===

impl<'c> Fields<'c> {
    fn get(&self, path: &str) -> Option<&'c Value> {
        let mut parts = path.split('.');
        let mut value = self.config.get(parts.next()?)?;
        for part in parts {
            value = value.get(part)?;
        }
        Some(value).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        path: &str,
        type_name: &str,
        read: impl FnOnce(&'c Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.get(path) else { return Ok(None) };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => {
                let found = match value {
                    Value::Bool(_) => "bool".to_owned(),
                    Value::Number(number) => format!("number {number}"),
                    Value::String(_) => "string".to_owned(),
                    Value::Array(_) => "array".to_owned(),
                    Value::Object(_) | Value::Null => "object".to_owned(),
                };
                let reason = format!(
                    "json: cannot unmarshal {found} into Go struct field KubeletConfiguration.{path} of type {type_name}"
                );
                Err(ConfigError::Invalid { field: path.to_owned(), reason })
            }
        }
    }

    pub(super) fn string(&self, path: &str) -> Result<Option<String>, ConfigError> {
        Ok(self.typed(path, "string", Value::as_str)?.filter(|text| !text.is_empty()).map(str::to_owned))
    }

    pub(super) fn boolean(&self, path: &str) -> Result<Option<bool>, ConfigError> {
        self.typed(path, "bool", Value::as_bool)
    }

    pub(super) fn int(&self, path: &str) -> Result<Option<i32>, ConfigError> {
        self.typed(path, "int32", |value| value.as_i64().and_then(|value| i32::try_from(value).ok()))
    }

    pub(super) fn long(&self, path: &str) -> Result<Option<i64>, ConfigError> {
        self.typed(path, "int64", Value::as_i64)
    }

    /// A duration; zero (as kubeadm writes what it leaves open) is `None`.
    pub(super) fn duration(&self, path: &str) -> Result<Option<Duration>, ConfigError> {
        let Some(text) = self.typed(path, "string", |value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) if number.as_i64() == Some(0) => Some("0s".to_owned()),
            _ => None,
        })?
        else {
            return Ok(None);
        };
        let duration = parse_duration(&text)
            .map_err(|error| ConfigError::Invalid { field: path.to_owned(), reason: error.to_string() })?;
        Ok(Some(duration).filter(|duration| !duration.is_zero()))
    }

    pub(super) fn strings(&self, path: &str) -> Result<Option<Vec<String>>, ConfigError> {
        self.typed(path, "[]string", |value| {
            value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
        })
    }

    pub(super) fn string_map(&self, path: &str) -> Result<Option<BTreeMap<String, String>>, ConfigError> {
        self.typed(path, "map[string]string", |value| {
            value.as_object()?.iter().map(|(key, item)| Some((key.clone(), item.as_str()?.to_owned()))).collect()
        })
    }

    pub(super) fn bool_map(&self, path: &str) -> Result<Option<BTreeMap<String, bool>>, ConfigError> {
        self.typed(path, "map[string]bool", |value| {
            value.as_object()?.iter().map(|(key, item)| Some((key.clone(), item.as_bool()?))).collect()
        })
    }

    pub(super) fn object<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
        type_name: &str,
    ) -> Result<Option<T>, ConfigError> {
        self.typed(path, type_name, |value| serde_json::from_value(value.clone()).ok())
    }
}
