//! The settings in force as `/configz` shows them: Kubernetes' defaults, what files state, and what the kubelet goes by.

use serde_json::{Map, Value, json};

use super::{KubeletConfiguration, fields};
use crate::images::pulled::Verification;

/// Kubernetes' defaults of what is accepted without effect.
fn without_effect() -> Value {
    json!({
        "hairpinMode": "promiscuous-bridge",
        "contentType": "application/vnd.kubernetes.protobuf", "kubeAPIQPS": 50, "kubeAPIBurst": 100,
        "makeIPTablesUtilChains": true, "iptablesMasqueradeBit": 14, "iptablesDropBit": 15,
        "enableControllerAttachDetach": true,
        "configMapAndSecretChangeDetectionStrategy": "Watch", "containerLogMaxWorkers": 1, "containerLogMaxSize": "10Mi",
        "enableProfilingHandler": true, "enableDebugFlagsHandler": true, "localStorageCapacityIsolation": true,
        "logging": {"format": "text", "flushFrequency": "5s"},
    })
}

/// Fields that nobody reads here, and what they are where they are not stated: nothing.
const IN_VAIN: [&str; 12] = [
    "enableContentionProfiling",
    "enableSystemLogQuery",
    "kernelMemcgNotification",
    "kubeletCgroups",
    "logging.vmodule",
    "qosReserved",
    "runOnce",
    "showHiddenMetricsForVersion",
    "singleProcessOOMKill",
    "systemCgroups",
    "tlsCurvePreferences",
    "tracing",
];

/// The fields that are stated to be other than Kubernetes' default, and without effect.
pub(super) fn stated_in_vain(stated: &Map<String, Value>) -> Vec<String> {
    fn walk(stated: &Map<String, Value>, defaults: &Map<String, Value>, prefix: &str, found: &mut Vec<String>) {
        for (name, value) in stated {
            let path = format!("{prefix}{name}");
            match (value, defaults.get(name)) {
                (Value::Object(inner), Some(Value::Object(defaults))) => {
                    walk(inner, defaults, &format!("{path}."), found)
                }
                (value, Some(default)) if value != default => found.push(path),
                (_, None) if IN_VAIN.contains(&path.as_str()) => found.push(path),
                _ => {}
            }
        }
    }
    // What only says that nothing is said.
    let mut stated = Value::Object(stated.clone());
    tidy(&mut stated);
    let (Value::Object(mut stated), Value::Object(defaults)) = (stated, without_effect()) else { return Vec::new() };
    if let Some(Value::Object(logging)) = stated.get_mut("logging") {
        logging.retain(|_, value| *value != json!(0));
    }
    let mut found = Vec::new();
    walk(&stated, &defaults, "", &mut found);
    found
}

impl KubeletConfiguration {
    /// All settings, in the form of a file.
    pub fn shown(&self) -> Value {
        let time = apimachinery::time::format_duration;
        let mode = if self.webhook_authorization { "Webhook" } else { "AlwaysAllow" };
        let priorities = self.shutdown_grace_period_by_pod_priority.iter();
        let priorities: Vec<Value> =
            priorities.map(|(p, s)| json!({"priority": p, "shutdownGracePeriodSeconds": s})).collect();
        let memory = self.reserved_memory.iter();
        let memory: Vec<Value> = memory.map(|(node, limits)| json!({"numaNode": node, "limits": limits})).collect();
        let (verification, allowed) = match &self.image_pull_verification {
            Verification::Never => ("NeverVerify", None),
            Verification::NotPreloaded => ("NeverVerifyPreloadedImages", None),
            Verification::NotListed(allowed) => ("NeverVerifyAllowlistedImages", Some(allowed)),
            Verification::Always => ("AlwaysVerify", None),
        };
        let of_another_form = json!({
            "kind": "KubeletConfiguration",
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "authentication": {
                "anonymous": {"enabled": self.anonymous_auth},
                "webhook": {"enabled": self.webhook_authentication, "cacheTTL": time(self.remembered.tokens)},
                "x509": {"clientCAFile": self.client_ca_file},
            },
            "authorization": {"mode": mode, "webhook": {
                "cacheAuthorizedTTL": time(self.remembered.allowed),
                "cacheUnauthorizedTTL": time(self.remembered.refused),
            }},
            "crashLoopBackOff": {"maxContainerRestartPeriod": time(self.max_container_restart_period)},
            "imagePullCredentialsVerificationPolicy": verification,
            "preloadedImagesVerificationAllowlist": allowed,
            "memorySwap": {"swapBehavior": self.swap_behavior},
            "userNamespaces": {"idsPerPod": self.ids_per_pod},
            "reservedMemory": memory,
            "shutdownGracePeriodByPodPriority": priorities,
        });
        let own = serde_json::to_value(self).unwrap_or_default();
        let mut shown = Map::new();
        for mut layer in [without_effect(), Value::Object(self.stated.clone()), own, of_another_form] {
            tidy(&mut layer);
            if let Value::Object(layer) = layer {
                fields::merge(&mut shown, layer);
            }
        }
        Value::Object(shown)
    }
}

/// Durations as Go writes them; what is empty, or zero where that means "the default", is left out.
fn tidy(value: &mut Value) {
    let Value::Object(object) = value else { return };
    let number = |name: &str| object.get(name).and_then(Value::as_u64);
    if let (2, Some(seconds), Some(nanos)) = (object.len(), number("secs"), number("nanos")) {
        let time = std::time::Duration::new(seconds, u32::try_from(nanos).unwrap_or(0));
        *value = json!(apimachinery::time::format_duration(time));
        return;
    }
    object.values_mut().for_each(tidy);
    let is_empty = |v: &Value| match v {
        Value::Null => true,
        Value::String(text) => text.is_empty() || text == "0s",
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    };
    object.retain(|_, v| !is_empty(v));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_could_be_a_file() {
        let mut config = KubeletConfiguration::default();
        config.stated.insert("kubeAPIBurst".into(), json!(7));
        config.remembered.refused = std::time::Duration::from_secs(7);
        let shown = config.shown();
        assert_eq!(fields::unknown(shown.as_object().expect("an object")), Vec::<String>::new());
        for (path, want) in [
            ("/kubeAPIBurst", json!(7)),
            ("/eventBurst", json!(100)),
            ("/userNamespaces/idsPerPod", json!(65_536)),
            ("/syncFrequency", json!("1m0s")),
            ("/clusterDNS", Value::Null),
            ("/authentication/webhook/enabled", json!(true)),
            ("/authentication/webhook/cacheTTL", json!("2m0s")),
            ("/authorization/webhook/cacheUnauthorizedTTL", json!("7s")),
            ("/containerLogMaxSize", json!("10Mi")),
            ("/maxPods", json!(110)),
            ("/crashLoopBackOff/maxContainerRestartPeriod", json!("5m0s")),
        ] {
            assert_eq!(shown.pointer(path).cloned().unwrap_or_default(), want, "{path}");
        }
        let again = super::super::from_fields(&super::super::Fields { config: shown.as_object().expect("an object") });
        let again = KubeletConfiguration { stated: config.stated.clone(), ..again.expect("valid") };
        assert_eq!(again, config);
    }

    #[test]
    fn what_is_stated_in_vain_is_told() {
        let stated = json!({"hairpinMode": "none", "contentType": "application/vnd.kubernetes.protobuf", "kubeAPIQPS": 9,
            "logging": {"flushFrequency": 0, "format": "json", "verbosity": 2, "options": {"json": {"infoBufferSize": "0"}}},
            "authentication": {"webhook": {"cacheTTL": "0s", "enabled": true}}, "maxPods": 3, "runOnce": true, "tracing": {}});
        let Value::Object(stated) = stated else { return };
        assert_eq!(stated_in_vain(&stated), ["hairpinMode", "kubeAPIQPS", "logging.format", "runOnce"]);
    }
}
