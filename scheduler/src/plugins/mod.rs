//! The plugins, one file each, and the table that names them.

use std::sync::Arc;

use serde_json::Value;

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

/// Makes a plugin with its arguments; `None` if there is no such plugin.
pub fn make(name: &str, arguments: Option<&Value>) -> Option<Result<Arc<dyn Plugin>, String>> {
    fn plain(plugin: impl Plugin + 'static) -> Result<Arc<dyn Plugin>, String> {
        Ok(Arc::new(plugin))
    }
    let kind = arguments.and_then(|arguments| arguments["kind"].as_str());
    if kind.is_some_and(|kind| kind.strip_suffix("Args") != Some(name)) {
        return Some(Err("args: has to match plugin args".to_owned()));
    }
    Some(match name {
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
    })
}

/// A plugin's arguments, or their defaults. They may say what they are; more than there is they may not.
pub(crate) fn arguments<T: serde::de::DeserializeOwned + Default>(value: Option<&Value>) -> Result<T, String> {
    let Some(mut value) = value.filter(|value| !value.is_null()).cloned() else { return Ok(T::default()) };
    if let Some(fields) = value.as_object_mut() {
        fields.remove("apiVersion");
        fields.remove("kind");
    }
    serde_json::from_value(value).map_err(|error| error.to_string())
}
