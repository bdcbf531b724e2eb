//! The controllers, by the names that `--controllers` knows them under.
mod bootstrap_tokens;
mod certificates;
mod claim;
mod cluster_role_aggregation;
mod cronjob;
mod daemonset;
mod deployment;
mod device_taint_eviction;
mod disruption;
mod endpoints;
mod endpointslice;
mod garbage_collector;
mod history;
mod horizontal;
mod job;
mod legacy_tokens;
mod namespace;
mod node_ipam;
mod node_lifecycle;
mod pod_control;
mod pod_gc;
mod policy_status;
mod replicaset;
mod resource_claim;
mod resourcequota;
mod root_ca;
mod scale;
mod service_backends;
mod service_cidr;
mod serviceaccount;
mod serviceaccount_token;
mod statefulset;
mod taint_eviction;
mod trust_bundles;
mod ttl;
mod volumes;

use crate::runtime::Context;
use component_base::feature_gates::Feature;
use futures::future::BoxFuture;
use k8s_openapi::api::{apps::v1::ReplicaSet, core::v1::ReplicationController};
use std::sync::Arc;

/// One controller: its name, the name it had before v1.27, and what runs it until shutdown.
pub struct Entry {
    pub name: &'static str,
    pub alias: &'static str,
    pub start: fn(Arc<Context>) -> BoxFuture<'static, ()>,
}

/// Entries of which each starts a future.
macro_rules! entries {
    ($($name:literal, $alias:literal => $start:expr;)*) => {
        &[$(Entry { name: $name, alias: $alias, start: |context| Box::pin($start(context)) },)*]
    };
}

/// All that there are.
pub const ALL: &[Entry] = entries! {
    "serviceaccount-controller", "serviceaccount" => serviceaccount::start;
    "serviceaccount-token-controller", "serviceaccount-token" => serviceaccount_token::start;
    "root-ca-certificate-publisher-controller", "root-ca-cert-publisher" => root_ca::start;
    "clusterrole-aggregation-controller", "clusterrole-aggregation" => cluster_role_aggregation::start;
    "daemonset-controller", "daemonset" => daemonset::start;
    "statefulset-controller", "statefulset" => statefulset::start;
    "deployment-controller", "deployment" => deployment::start;
    "replicaset-controller", "replicaset" => start_replica_sets;
    "replicationcontroller-controller", "replicationcontroller" => start_replication_controllers;
    "job-controller", "job" => job::start;
    "cronjob-controller", "cronjob" => cronjob::start;
    "ttl-after-finished-controller", "ttl-after-finished" => job::start_removing;
    "horizontal-pod-autoscaler-controller", "horizontalpodautoscaling" => horizontal::start;
    "disruption-controller", "disruption" => disruption::start;
    "endpointslice-controller", "endpointslice" => endpointslice::start;
    "endpointslice-mirroring-controller", "endpointslicemirroring" => endpointslice::mirroring::start;
    "endpoints-controller", "endpoint" => endpoints::start;
    "node-lifecycle-controller", "nodelifecycle" => node_lifecycle::start;
    "taint-eviction-controller", "taint-eviction-controller" => taint_eviction::start;
    "device-taint-eviction-controller", "device-taint-eviction-controller" => device_taint_eviction::start;
    "ttl-controller", "ttl" => ttl::start;
    "node-ipam-controller", "nodeipam" => node_ipam::start;
    "service-cidr-controller", "service-cidr-controller" => service_cidr::start;
    "namespace-controller", "namespace" => namespace::start;
    "resourcequota-controller", "resourcequota" => resourcequota::start;
    "garbage-collector-controller", "garbagecollector" => garbage_collector::start;
    "pod-garbage-collector-controller", "podgc" => pod_gc::start;
    "persistentvolume-binder-controller", "persistentvolume-binder" => volumes::binder::start;
    "persistentvolume-attach-detach-controller", "attachdetach" => volumes::attach_detach::start;
    "persistentvolume-expander-controller", "persistentvolume-expander" => volumes::expand::start;
    "persistentvolumeclaim-protection-controller", "pvc-protection" => volumes::protection::start_claims;
    "persistentvolume-protection-controller", "pv-protection" => volumes::protection::start_volumes;
    "volumeattributesclass-protection-controller", "volumeattributesclass-protection-controller" => volumes::protection::start_attribute_classes;
    "ephemeral-volume-controller", "ephemeral-volume" => volumes::ephemeral::start;
    "resourceclaim-controller", "resource-claim-controller" => resource_claim::start;
    "certificatesigningrequest-approving-controller", "csrapproving" => certificates::start_approving;
    "certificatesigningrequest-signing-controller", "csrsigning" => certificates::start_signing;
    "certificatesigningrequest-cleaner-controller", "csrcleaner" => certificates::start_cleaning;
    "podcertificaterequest-cleaner-controller", "podcertificaterequest-cleaner-controller" => certificates::pod_requests::start;
    "kube-apiserver-serving-clustertrustbundle-publisher-controller", "kube-apiserver-serving-clustertrustbundle-publisher-controller" => trust_bundles::start;
    "validatingadmissionpolicy-status-controller", "validatingadmissionpolicy-status" => policy_status::start;
    "legacy-serviceaccount-token-cleaner-controller", "legacy-service-account-token-cleaner" => legacy_tokens::start;
    "bootstrap-signer-controller", "bootstrapsigner" => bootstrap_tokens::start_signing;
    "token-cleaner-controller", "tokencleaner" => bootstrap_tokens::start_cleaning;
};

/// Controllers of Kubernetes v1.36 that are not here, and why. So Services of the type LoadBalancer are left alone, whatever their
/// class: as with kube-controller-manager v1.36, which has no cloud providers any more, their finalizer
/// `service.kubernetes.io/load-balancer-cleanup` and their status come from who provides the balancer.
pub const ABSENT: &[(&str, &str)] = &[
    ("service-lb-controller", CLOUD),
    ("node-route-controller", CLOUD),
    ("cloud-node-lifecycle-controller", CLOUD),
    ("podgroup-protection-controller", GATED),
    ("resourcepoolstatusrequest-controller", GATED),
    ("storageversion-garbage-collector-controller", GATED),
    ("storage-version-migrator-controller", GATED),
    ("selinux-warning-controller", "it is off by default, and no node here relabels volumes"),
];
const CLOUD: &str = "it needs a cloud provider, whose own controller-manager has it";
const GATED: &str = "what it is for is off by default";

/// The feature that a controller is for, where that is off by default.
pub fn gate_of(name: &str) -> Option<Feature> {
    match name {
        "podcertificaterequest-cleaner-controller" => Some(Feature::PodCertificateRequest),
        "kube-apiserver-serving-clustertrustbundle-publisher-controller" => Some(Feature::ClusterTrustBundle),
        _ => None,
    }
}

/// What is wrong with the names that `--controllers` gives.
pub fn check(names: &[String]) -> Result<(), String> {
    for name in names {
        let name = name.strip_prefix('-').unwrap_or(name);
        let known = name == "*"
            || ALL.iter().any(|e| e.name == name || e.alias == name)
            || ABSENT.iter().any(|(absent, _)| *absent == name);
        if !known {
            return Err(format!("{name:?} is not in the list of known controllers"));
        }
    }
    for (name, why) in ABSENT.iter().filter(|(absent, _)| names.iter().any(|n| n == absent)) {
        tracing::warn!(controller = name, why, "the controller does not run");
    }
    Ok(())
}

async fn start_replica_sets(context: Arc<Context>) {
    let workers = context.settings.concurrent_replicaset_syncs;
    replicaset::start::<ReplicaSet>(context, "replicaset-controller", workers).await;
}

async fn start_replication_controllers(context: Arc<Context>) {
    let workers = context.settings.concurrent_rc_syncs;
    replicaset::start::<ReplicationController>(context, "replication-controller", workers).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_known_once() {
        let mut names: Vec<&str> = ALL.iter().map(|e| e.name).chain(ABSENT.iter().map(|(name, _)| *name)).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!((names.len(), count), (52, 52), "Kubernetes v1.36 has so many");
        let given = |names: &[&str]| check(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        assert_eq!(given(&["*", "-deployment-controller", "bootstrapsigner", "service-lb-controller"]), Ok(()));
        assert!(given(&["*", "-deploymnt"]).is_err());
        assert_eq!(ALL.iter().filter(|entry| gate_of(entry.name).is_some()).count(), 2);
    }
}
