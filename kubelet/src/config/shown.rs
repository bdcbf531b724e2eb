//! The settings in force as `/configz` shows them: Kubernetes' defaults, what files state, and what the kubelet goes by.

use serde_json::{Map, Value, json};

use super::{KubeletConfiguration, fields};
use crate::images::pulled::Verification;

/// Kubernetes' defaults of what is accepted without effect.
fn without_effect() -> Value {
    json!({
        "enableServer": true, "httpCheckFrequency": "20s", "eventRecordQPS": 50, "eventBurst": 100, "oomScoreAdj": -999,
        "volumeStatsAggPeriod": "1m0s", "runtimeRequestTimeout": "2m0s", "hairpinMode": "promiscuous-bridge",
        "maxOpenFiles": 1_000_000, "contentType": "application/vnd.kubernetes.protobuf", "kubeAPIQPS": 50, "kubeAPIBurst": 100,
        "makeIPTablesUtilChains": true, "iptablesMasqueradeBit": 14, "iptablesDropBit": 15, "failCgroupV1": false,
        "enableControllerAttachDetach": true, "enforceNodeAllocatable": ["pods"], "nodeStatusMaxImages": 50,
        "configMapAndSecretChangeDetectionStrategy": "Watch", "containerLogMaxWorkers": 1, "containerLogMaxSize": "10Mi",
        "enableProfilingHandler": true, "enableDebugFlagsHandler": true, "localStorageCapacityIsolation": true,
        "logging": {"format": "text", "flushFrequency": "5s", "verbosity": 0},
        "authentication": {"webhook": {"cacheTTL": "2m0s"}},
        "authorization": {"webhook": {"cacheAuthorizedTTL": "5m0s", "cacheUnauthorizedTTL": "30s"}},
    })
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
                "webhook": {"enabled": self.webhook_authentication},
                "x509": {"clientCAFile": self.client_ca_file},
            },
            "authorization": {"mode": mode},
            "crashLoopBackOff": {"maxContainerRestartPeriod": time(self.max_container_restart_period)},
            "imagePullCredentialsVerificationPolicy": verification,
            "preloadedImagesVerificationAllowlist": allowed,
            "memorySwap": {"swapBehavior": self.swap_behavior},
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
        config.stated.insert("eventBurst".into(), json!(7));
        let shown = config.shown();
        assert_eq!(fields::unknown(shown.as_object().expect("an object")), Vec::<String>::new());
        for (path, want) in [
            ("/eventBurst", json!(7)),
            ("/syncFrequency", json!("1m0s")),
            ("/clusterDNS", Value::Null),
            ("/authentication/webhook/enabled", json!(true)),
            ("/authentication/webhook/cacheTTL", json!("2m0s")),
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
}
