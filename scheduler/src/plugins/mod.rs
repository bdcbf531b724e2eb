//! The plugins, one file each, and the table that names them.

use std::sync::Arc;

use serde_json::Value;

use crate::config::Faults;
use crate::framework::Plugin;

pub mod default_binder;
pub mod default_preemption;
pub mod dynamic_resources;
pub mod image_locality;
pub mod inter_pod_affinity;
pub mod node_affinity;
pub mod node_declared_features;
pub mod node_name;
pub mod node_ports;
pub mod node_resources_balanced_allocation;
pub mod node_resources_fit;
pub mod node_unschedulable;
pub mod node_volume_limits;
pub mod pod_topology_spread;
pub mod priority_sort;
pub mod scheduling_gates;
pub mod taint_toleration;
pub mod volume_binding;
pub mod volume_restrictions;
pub mod volume_zone;

/// The default profile's plugins in their order, with their weights (0: no score). As `getDefaultPlugins`.
pub const DEFAULTS: &[(&str, i64)] = &[
    ("SchedulingGates", 0),
    ("PrioritySort", 0),
    ("NodeUnschedulable", 0),
    ("NodeName", 0),
    ("TaintToleration", 3),
    ("NodeAffinity", 2),
    ("NodePorts", 0),
    ("NodeResourcesFit", 1),
    ("VolumeRestrictions", 0),
    ("NodeVolumeLimits", 0),
    ("VolumeBinding", 0),
    ("VolumeZone", 0),
    ("PodTopologySpread", 2),
    ("InterPodAffinity", 2),
    // Giving a claim free is better than removing a pod.
    ("DynamicResources", 0),
    ("DefaultPreemption", 0),
    ("NodeResourcesBalancedAllocation", 1),
    ("ImageLocality", 1),
    ("DefaultBinder", 0),
    ("NodeDeclaredFeatures", 0),
];

/// Why a plugin does not take its arguments.
#[derive(Debug, thiserror::Error)]
pub enum BadArguments {
    /// They are not of the plugin's kind, or not of that kind's shape.
    #[error("{0}")]
    Malformed(String),
    /// Values in them do not hold.
    #[error(transparent)]
    Invalid(#[from] Faults),
}

/// Makes a plugin with its arguments; `None` if there is no such plugin.
pub fn make(name: &str, arguments: Option<&Value>) -> Option<Result<Arc<dyn Plugin>, BadArguments>> {
    fn plain(plugin: impl Plugin + 'static) -> Result<Arc<dyn Plugin>, BadArguments> {
        Ok(Arc::new(plugin))
    }
    let kind = arguments.and_then(|arguments| arguments["kind"].as_str());
    let other = kind.filter(|kind| kind.strip_suffix("Args") != Some(name));
    let plugin = match name {
        "SchedulingGates" => plain(scheduling_gates::SchedulingGates),
        "PrioritySort" => plain(priority_sort::PrioritySort),
        "NodeUnschedulable" => plain(node_unschedulable::NodeUnschedulable),
        "NodeDeclaredFeatures" => plain(node_declared_features::NodeDeclaredFeatures),
        "NodeName" => plain(node_name::NodeName),
        "TaintToleration" => plain(taint_toleration::TaintToleration),
        "NodeAffinity" => node_affinity::NodeAffinity::new(arguments).and_then(plain),
        "NodePorts" => plain(node_ports::NodePorts),
        "NodeResourcesFit" => node_resources_fit::NodeResourcesFit::new(arguments).and_then(plain),
        "PodTopologySpread" => pod_topology_spread::PodTopologySpread::new(arguments).and_then(plain),
        "InterPodAffinity" => inter_pod_affinity::InterPodAffinity::new(arguments).and_then(plain),
        "NodeResourcesBalancedAllocation" => {
            node_resources_balanced_allocation::NodeResourcesBalancedAllocation::new(arguments).and_then(plain)
        }
        "ImageLocality" => plain(image_locality::ImageLocality),
        "VolumeRestrictions" => plain(volume_restrictions::VolumeRestrictions),
        "NodeVolumeLimits" => plain(node_volume_limits::NodeVolumeLimits),
        "VolumeBinding" => volume_binding::VolumeBinding::new(arguments).and_then(plain),
        "VolumeZone" => plain(volume_zone::VolumeZone),
        "DynamicResources" => dynamic_resources::DynamicResources::new(arguments).and_then(plain),
        "DefaultPreemption" => default_preemption::DefaultPreemption::new(arguments).and_then(plain),
        "DefaultBinder" => plain(default_binder::DefaultBinder),
        _ => return None,
    };
    Some(match (plugin, other) {
        (_, Some(other)) => {
            const GROUP: &str = "kubescheduler.config.k8s.io";
            let why = format!("args for plugin {name} were not of type {name}Args.{GROUP}, got {other}.{GROUP}");
            Err(BadArguments::Malformed(why))
        }
        (Err(BadArguments::Malformed(why)), None) => {
            Err(BadArguments::Malformed(format!("decoding args for plugin {name}: {why}")))
        }
        (made, None) => made,
    })
}

/// A plugin's arguments, or their defaults. They may say what they are; more than there is they may not.
pub(crate) fn arguments<T: serde::de::DeserializeOwned + Default>(value: Option<&Value>) -> Result<T, BadArguments> {
    let Some(mut value) = value.filter(|value| !value.is_null()).cloned() else { return Ok(T::default()) };
    if let Some(fields) = value.as_object_mut() {
        fields.remove("apiVersion");
        fields.remove("kind");
    }
    serde_json::from_value(value).map_err(|error| BadArguments::Malformed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a plugin has against its arguments, which are YAML.
    fn refusal(plugin: &str, text: &str) -> Option<String> {
        let arguments = apimachinery::yaml::documents(text).expect("YAML").remove(0);
        make(plugin, Some(&arguments)).expect("a plugin").err().map(|refused| refused.to_string())
    }

    #[test]
    fn arguments_are_refused_by_the_field_and_in_kubernetes_words() {
        let cases = [
            (
                "DefaultPreemption",
                "minCandidateNodesPercentage: 101",
                "minCandidateNodesPercentage: Invalid value: 101: not in valid range [0, 100]",
            ),
            (
                "DefaultPreemption",
                "minCandidateNodesAbsolute: -1",
                "minCandidateNodesAbsolute: Invalid value: -1: not in valid range [0, inf)",
            ),
            (
                "DefaultPreemption",
                "{minCandidateNodesPercentage: 0, minCandidateNodesAbsolute: 0}",
                "[minCandidateNodesPercentage: Invalid value: 0: cannot be zero at the same time as minCandidateNodesAbsolute, \
                 minCandidateNodesAbsolute: Invalid value: 0: cannot be zero at the same time as minCandidateNodesPercentage]",
            ),
            (
                "InterPodAffinity",
                "hardPodAffinityWeight: 101",
                "hardPodAffinityWeight: Invalid value: 101: not in valid range [0, 100]",
            ),
            (
                "PodTopologySpread",
                "defaultingType: Some",
                "defaultingType: Unsupported value: \"Some\": supported values: \"System\", \"List\"",
            ),
            (
                "PodTopologySpread",
                "defaultConstraints: [{maxSkew: 1, topologyKey: k, whenUnsatisfiable: DoNotSchedule}]",
                "defaultingType: Invalid value: \"System\": when .defaultConstraints are not empty",
            ),
            (
                "PodTopologySpread",
                "{defaultingType: List, defaultConstraints: [{maxSkew: 0, topologyKey: k, whenUnsatisfiable: DoNotSchedule}]}",
                "defaultConstraints[0].maxSkew: Invalid value: 0: not in valid range (0, inf)",
            ),
            (
                "PodTopologySpread",
                "{defaultingType: List, defaultConstraints: [{maxSkew: 1, topologyKey: '', whenUnsatisfiable: DoNotSchedule}]}",
                "defaultConstraints[0].topologyKey: Required value: can not be empty",
            ),
            (
                "PodTopologySpread",
                "{defaultingType: List, defaultConstraints: [{maxSkew: 1, topologyKey: 'a b', whenUnsatisfiable: DoNotSchedule}]}",
                "defaultConstraints[0].topologyKey: Invalid value: \"a b\": name part must consist of",
            ),
            (
                "PodTopologySpread",
                "{defaultingType: List, defaultConstraints: [{maxSkew: 1, topologyKey: k, whenUnsatisfiable: ''}]}",
                "defaultConstraints[0].whenUnsatisfiable: Required value: can not be empty",
            ),
            (
                "PodTopologySpread",
                "{defaultingType: List, defaultConstraints: [{maxSkew: 1, topologyKey: k, whenUnsatisfiable: Never}]}",
                "defaultConstraints[0].whenUnsatisfiable: Unsupported value: \"Never\": supported values: \"DoNotSchedule\", \"ScheduleAnyway\"",
            ),
            (
                "PodTopologySpread",
                "{defaultingType: List, defaultConstraints: [{maxSkew: 1, topologyKey: k, whenUnsatisfiable: DoNotSchedule, labelSelector: {}}]}",
                "defaultConstraints[0].labelSelector: Forbidden: constraint must not define a selector, as they deduced for each pod",
            ),
            (
                "PodTopologySpread",
                "{defaultingType: List, defaultConstraints: [{maxSkew: 1, topologyKey: k, whenUnsatisfiable: DoNotSchedule}, {maxSkew: 2, topologyKey: k, whenUnsatisfiable: DoNotSchedule}]}",
                "defaultConstraints[1]: Duplicate value: \"{k, DoNotSchedule}\"",
            ),
            (
                "NodeResourcesFit",
                "ignoredResources: [a b]",
                "ignoredResources[0]: Invalid value: \"a b\": name part must consist of",
            ),
            (
                "NodeResourcesFit",
                "ignoredResourceGroups: [a/b]",
                "ignoredResourceGroups[0]: Invalid value: \"a/b\": resource group name can't contain '/'",
            ),
            (
                "NodeResourcesFit",
                "{ignoredResourceGroups: [a/b], scoringStrategy: {type: Best, resources: [{name: cpu, weight: 101}]}}",
                "[ignoredResourceGroups[0]: Invalid value: \"a/b\": resource group name can't contain '/', \
                 scoringStrategy.type: Unsupported value: \"Best\": supported values: \"LeastAllocated\", \"MostAllocated\", \
                 \"RequestedToCapacityRatio\", scoringStrategy.resources[0].weight: Invalid value: 101: resource weight of cpu \
                 not in valid range (0, 100]]",
            ),
            (
                "PodTopologySpread",
                "{defaultingType: List, defaultConstraints: [{maxSkew: 0, topologyKey: '', whenUnsatisfiable: Never, labelSelector: {}}]}",
                "[defaultConstraints[0].maxSkew: Invalid value: 0: not in valid range (0, inf), \
                 defaultConstraints[0].topologyKey: Required value: can not be empty, \
                 defaultConstraints[0].whenUnsatisfiable: Unsupported value: \"Never\": supported values: \"DoNotSchedule\", \
                 \"ScheduleAnyway\", defaultConstraints[0].labelSelector: Forbidden: constraint must not define a selector, as \
                 they deduced for each pod]",
            ),
            (
                "NodeResourcesFit",
                "scoringStrategy: {type: Best}",
                "scoringStrategy.type: Unsupported value: \"Best\": supported values: \"LeastAllocated\", \"MostAllocated\", \"RequestedToCapacityRatio\"",
            ),
            (
                "NodeResourcesFit",
                "scoringStrategy: {type: MostAllocated, resources: [{name: cpu, weight: 101}]}",
                "scoringStrategy.resources[0].weight: Invalid value: 101: resource weight of cpu not in valid range (0, 100]",
            ),
            (
                "NodeResourcesFit",
                "scoringStrategy: {type: RequestedToCapacityRatio}",
                "scoringStrategy.shape: Required value: at least one point must be specified",
            ),
            (
                "NodeResourcesFit",
                "scoringStrategy: {type: RequestedToCapacityRatio, requestedToCapacityRatio: {shape: [{utilization: 5, score: 1}, {utilization: 5, score: 1}]}}",
                "scoringStrategy.shape[1].utilization: Invalid value: 5: values must be sorted in increasing order",
            ),
            (
                "NodeResourcesFit",
                "scoringStrategy: {type: LeastAllocated, requestedToCapacityRatio: {shape: [{utilization: 101, score: 1}]}}",
                "scoringStrategy.shape[0].utilization: Invalid value: 101: not in valid range [0, 100]",
            ),
            (
                "NodeResourcesFit",
                "scoringStrategy: {type: RequestedToCapacityRatio, requestedToCapacityRatio: {shape: [{utilization: 5, score: 11}]}}",
                "scoringStrategy.shape[0].score: Invalid value: 11: not in valid range [0, 10]",
            ),
            (
                "NodeResourcesFit",
                "scoringStrategy: {type: RequestedToCapacityRatio, requestedToCapacityRatio: {shape: [{score: 1, use: 2}]}}",
                "unknown field `use`",
            ),
            (
                "NodeResourcesBalancedAllocation",
                "resources: [{name: cpu}, {name: cpu, weight: 7}]",
                "[resources[1].name: Duplicate value: \"cpu\", resources[1].weight: Invalid value: 7: must be 1]",
            ),
            (
                "NodeResourcesBalancedAllocation",
                "resources: [{name: cpu, weight: 2}]",
                "resources[0].weight: Invalid value: 2: must be 1",
            ),
            (
                "NodeAffinity",
                "addedAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: a, operator: Near}]}]}}",
                "addedAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0]: Invalid value",
            ),
            (
                "NodeAffinity",
                "addedAffinity: {preferredDuringSchedulingIgnoredDuringExecution: [{weight: 1, preference: {matchFields: [{key: metadata.name, operator: Near}]}}]}",
                "addedAffinity.preferredDuringSchedulingIgnoredDuringExecution[0].preference: Invalid value",
            ),
            (
                "VolumeBinding",
                "bindTimeoutSeconds: -1",
                "bindTimeoutSeconds: Invalid value: -1: invalid BindTimeoutSeconds, should not be a negative value",
            ),
            (
                "VolumeBinding",
                "shape: [{utilization: 0, score: 0}]",
                "unexpected field `shape`, remove it or turn on the feature gate StorageCapacityScoring",
            ),
            (
                "DynamicResources",
                "filterTimeout: -1s",
                "filterTimeout: Invalid value: \"-1s\": must be zero or positive",
            ),
            (
                "DynamicResources",
                "bindingTimeout: 1ms",
                "bindingTimeout: Invalid value: \"1ms\": must be at least 1 second",
            ),
            ("DynamicResources", "{kind: NodeAffinityArgs}", "were not of type DynamicResourcesArgs"),
            ("DynamicResources", "timeout: 1s", "unknown field `timeout`"),
        ];
        for (plugin, arguments, words) in cases {
            let told = refusal(plugin, arguments).unwrap_or_else(|| panic!("{plugin} takes {arguments}"));
            assert!(told.starts_with(words) || told.contains(words) && !words.contains(": "), "{told}\nfor {words}");
        }
    }

    #[test]
    fn every_field_of_every_arguments_kind_is_taken() {
        let cases = [
            (
                "DefaultPreemption",
                "{apiVersion: kubescheduler.config.k8s.io/v1, kind: DefaultPreemptionArgs, minCandidateNodesPercentage: 0, minCandidateNodesAbsolute: 1}",
            ),
            ("InterPodAffinity", "{hardPodAffinityWeight: 0, ignorePreferredTermsOfExistingPods: true}"),
            (
                "PodTopologySpread",
                "{defaultingType: List, defaultConstraints: [{maxSkew: 1, topologyKey: a/b, whenUnsatisfiable: ScheduleAnyway}]}",
            ),
            (
                "NodeResourcesFit",
                "{ignoredResources: [a.b/c], ignoredResourceGroups: [a.b], scoringStrategy: {type: RequestedToCapacityRatio, resources: [{name: cpu, weight: 0}, {name: a.b/c}], requestedToCapacityRatio: {shape: [{utilization: 0, score: 0}, {utilization: 100, score: 10}]}}}",
            ),
            ("NodeResourcesBalancedAllocation", "{resources: [{name: cpu, weight: 0}, {name: memory, weight: 1}]}"),
            (
                "NodeAffinity",
                "addedAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{}, {matchExpressions: [{key: a, operator: Exists}]}]}, preferredDuringSchedulingIgnoredDuringExecution: [{weight: 1, preference: {}}]}",
            ),
            ("VolumeBinding", "bindTimeoutSeconds: 0"),
            ("DynamicResources", "{filterTimeout: 0s, bindingTimeout: 1s}"),
        ];
        for (plugin, arguments) in cases {
            assert_eq!(refusal(plugin, arguments), None, "{plugin} {arguments}");
        }
    }
}
