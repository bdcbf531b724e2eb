//! Which rules hold for which kind. Kinds that are not here live by [`Rules::DEFAULT`].

use super::rules::Rules;
use super::{
    admissionregistration, apiextensions, apiregistration, apps, autoscaling, batch, certificates, coordination, core,
    discovery, flowcontrol, networking, node, policy, rbac, resource, scheduling, storage,
};

static DEFAULT: Rules = Rules::DEFAULT;

macro_rules! table {
    ($group:expr, $kind:expr, { $($g:literal $k:literal => $rules:path,)* }) => {
        match ($group, $kind) {
            $(($g, $k) => { static RULES: Rules = $rules; &RULES })*
            _ => &DEFAULT,
        }
    };
}

/// The rules of a kind.
pub fn rules(group: &str, kind: &str) -> &'static Rules {
    table!(group, kind, {
        "" "ComponentStatus" => core::component_status::RULES,
        "" "ConfigMap" => core::config_map::RULES,
        "" "Endpoints" => core::endpoints::RULES,
        "" "Event" => core::event::RULES,
        "" "LimitRange" => core::limit_range::RULES,
        "" "Namespace" => core::namespace::RULES,
        "" "Node" => core::node::RULES,
        "" "PersistentVolume" => core::persistent_volume::RULES,
        "" "PersistentVolumeClaim" => core::persistent_volume_claim::RULES,
        "" "Pod" => core::pod::RULES,
        "" "PodTemplate" => core::pod_template::RULES,
        "" "ReplicationController" => core::replication_controller::RULES,
        "" "ResourceQuota" => core::resource_quota::RULES,
        "" "Secret" => core::secret::RULES,
        "" "Service" => core::service::RULES,
        "" "ServiceAccount" => core::service_account::RULES,
        "admissionregistration.k8s.io" "MutatingAdmissionPolicy" => admissionregistration::policy::MUTATING_POLICY,
        "admissionregistration.k8s.io" "MutatingAdmissionPolicyBinding" => admissionregistration::policy::MUTATING_BINDING,
        "admissionregistration.k8s.io" "MutatingWebhookConfiguration" => admissionregistration::webhook::MUTATING,
        "admissionregistration.k8s.io" "ValidatingAdmissionPolicy" => admissionregistration::policy::POLICY,
        "admissionregistration.k8s.io" "ValidatingAdmissionPolicyBinding" => admissionregistration::policy::BINDING,
        "admissionregistration.k8s.io" "ValidatingWebhookConfiguration" => admissionregistration::webhook::VALIDATING,
        "apiextensions.k8s.io" "CustomResourceDefinition" => apiextensions::custom_resource_definition::RULES,
        "apiregistration.k8s.io" "APIService" => apiregistration::api_service::RULES,
        "apps" "ControllerRevision" => apps::controller_revision::RULES,
        "apps" "DaemonSet" => apps::daemon_set::RULES,
        "apps" "Deployment" => apps::deployment::RULES,
        "apps" "ReplicaSet" => apps::replica_set::RULES,
        "apps" "StatefulSet" => apps::stateful_set::RULES,
        "autoscaling" "HorizontalPodAutoscaler" => autoscaling::horizontal_pod_autoscaler::RULES,
        "batch" "CronJob" => batch::cron_job::RULES,
        "batch" "Job" => batch::job::RULES,
        "certificates.k8s.io" "CertificateSigningRequest" => certificates::certificate_signing_request::RULES,
        "certificates.k8s.io" "ClusterTrustBundle" => certificates::cluster_trust_bundle::RULES,
        "certificates.k8s.io" "PodCertificateRequest" => certificates::pod_certificate_request::RULES,
        "coordination.k8s.io" "Lease" => coordination::lease::RULES,
        "discovery.k8s.io" "EndpointSlice" => discovery::endpoint_slice::RULES,
        "events.k8s.io" "Event" => core::event::GROUP_RULES,
        "flowcontrol.apiserver.k8s.io" "FlowSchema" => flowcontrol::flow_schema::RULES,
        "flowcontrol.apiserver.k8s.io" "PriorityLevelConfiguration" => flowcontrol::priority_level::RULES,
        "networking.k8s.io" "IPAddress" => networking::ip_address::RULES,
        "networking.k8s.io" "Ingress" => networking::ingress::RULES,
        "networking.k8s.io" "IngressClass" => networking::ingress_class::RULES,
        "networking.k8s.io" "NetworkPolicy" => networking::network_policy::RULES,
        "networking.k8s.io" "ServiceCIDR" => networking::service_cidr::RULES,
        "node.k8s.io" "RuntimeClass" => node::runtime_class::RULES,
        "policy" "PodDisruptionBudget" => policy::pod_disruption_budget::RULES,
        "rbac.authorization.k8s.io" "ClusterRole" => rbac::role::CLUSTER_ROLE,
        "rbac.authorization.k8s.io" "ClusterRoleBinding" => rbac::binding::CLUSTER_ROLE_BINDING,
        "rbac.authorization.k8s.io" "Role" => rbac::role::ROLE,
        "rbac.authorization.k8s.io" "RoleBinding" => rbac::binding::ROLE_BINDING,
        "resource.k8s.io" "DeviceClass" => resource::claim::DEVICE_CLASS,
        "resource.k8s.io" "ResourceClaim" => resource::claim::CLAIM,
        "resource.k8s.io" "ResourceClaimTemplate" => resource::claim::TEMPLATE,
        "resource.k8s.io" "ResourceSlice" => resource::slice::RULES,
        "scheduling.k8s.io" "PriorityClass" => scheduling::priority_class::RULES,
        "storage.k8s.io" "CSIDriver" => storage::csi::DRIVER,
        "storage.k8s.io" "CSINode" => storage::csi::NODE,
        "storage.k8s.io" "CSIStorageCapacity" => storage::csi::STORAGE_CAPACITY,
        "storage.k8s.io" "StorageClass" => storage::storage_class::RULES,
        "storage.k8s.io" "VolumeAttachment" => storage::volume_attachment::RULES,
        "storage.k8s.io" "VolumeAttributesClass" => storage::storage_class::VOLUME_ATTRIBUTES_CLASS,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::print::Clock;
    use apimachinery::facts;
    use serde_json::json;

    #[test]
    fn every_row_has_a_cell_for_each_column() {
        for kind in facts::kinds().iter().chain(facts::offered()).filter(|k| k.is_stored()) {
            let rules = rules(kind.group, kind.kind);
            let columns = rules.columns.or_else(|| facts::columns(kind.group, kind.kind));
            let Some(row) = rules.row else {
                let names: Vec<&str> = columns.into_iter().flatten().map(|c| c.name).collect();
                assert!(names.is_empty() || names == ["Name", "Age"], "{}: {names:?}", kind.kind);
                continue;
            };
            let cells = row(&json!({"metadata": {"name": "x"}}), &Clock::now());
            // Events of the newer group are shown by the core group's columns; two kinds have columns by default.
            let count = columns.map_or(if kind.kind == "Event" { 10 } else { 2 }, <[_]>::len);
            assert_eq!(cells.len(), count, "{}", kind.kind);
        }
    }

    #[test]
    fn defaults_do_nothing_the_second_time() {
        for kind in facts::kinds().iter().chain(facts::offered()).filter(|k| k.is_stored()) {
            let rules = rules(kind.group, kind.kind);
            let mut object =
                json!({"metadata": {"name": "x"}, "spec": {"template": {"spec": {"containers": [{"image": "a"}]}}}});
            (rules.default)(&mut object);
            let once = object.clone();
            (rules.default)(&mut object);
            assert_eq!(object, once, "{}", kind.kind);
        }
    }
}
