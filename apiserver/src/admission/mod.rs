//! What a request must pass after authorization and before the store: the plugins that are on, in Kubernetes' order, first to
//! change the object, then to have a last word on it. A plugin is one file; a webhook or a policy is one more.

mod certificates;
mod configuration;
mod ingress_class;
mod limit_ranger;
mod namespace_lifecycle;
mod node_restriction;
mod node_taint;
mod param_access;
mod pod_security;
mod priority;
mod rbac_escalation;
mod resource_quota;
mod runtime_class;
mod service_account;
mod simple;
mod storage;
mod toleration_seconds;

use crate::authorization::lister::Lister;
use crate::authorization::{Attributes, Authorizer};
use crate::options::Options;
use crate::registry::object::{at, list, text};
use crate::registry::{Registry, Resource};
use crate::server::metrics::AdmissionTimes;
use crate::storage::Store;
use anyhow::Context as _;
use apimachinery::status::StatusError;
use futures::future::BoxFuture;
use pod_security::PodSecurity;
use resource_quota::{Ledger, StoredQuotas};
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::Instant;
use toleration_seconds::DefaultTolerationSeconds;

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Create,
    Update,
    Delete,
    Connect,
}

/// One request as admission sees it.
#[expect(dead_code, reason = "webhooks are told all of it")]
pub struct AdmissionRequest<'a> {
    pub attributes: &'a Attributes,
    /// None for virtual resources.
    pub resource: Option<&'a Resource>,
    pub operation: Operation,
    /// The new object; None for deletes. Mutators change it in place.
    pub object: Option<&'a mut Value>,
    pub old_object: Option<&'a Value>,
    /// CreateOptions, UpdateOptions, DeleteOptions.
    pub options: Option<&'a Value>,
    pub dry_run: bool,
    /// Warnings for the client.
    pub warnings: Vec<String>,
    /// What is to be done if the object is not stored after all.
    pub undo: Vec<Undo>,
}

/// Takes something back.
pub type Undo = Box<dyn FnOnce() -> BoxFuture<'static, ()> + Send + Sync>;

/// One link of the chain.
pub trait Plugin: Send + Sync + 'static {
    /// Whether the plugin has anything to do with a request. Asked of every write, so it must cost nothing.
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool;

    /// Changes the object, or refuses the request.
    fn mutate<'a>(&'a self, _request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Refuses the request, or lets it pass.
    fn validate<'a>(&'a self, _request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

impl<P: Plugin> Plugin for Arc<P> {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        P::handles(self, request)
    }

    fn mutate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        P::mutate(self, request)
    }

    fn validate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        P::validate(self, request)
    }
}

/// The admission plugins that are on, in Kubernetes' order.
pub struct AdmissionChain {
    /// With what is counted of each.
    plugins: Vec<(AdmissionTimes, Box<dyn Plugin>)>,
    steps: AdmissionTimes,
}

/// Whether a plugin is on without being named, and how to make it; None for one that is not built.
struct Known {
    name: &'static str,
    default: bool,
    make: Option<Make>,
}

type Make = fn(&Parts) -> Box<dyn Plugin>;

/// What plugins are made from.
#[derive(Clone)]
struct Parts {
    lister: Arc<dyn Lister>,
    authorizer: Arc<Authorizer>,
    quotas: Arc<dyn Ledger>,
    limits: resource_quota::Configuration,
    pod_security: Arc<PodSecurity>,
    toleration_seconds: DefaultTolerationSeconds,
}

const fn on(name: &'static str, make: Make) -> Known {
    Known { name, default: true, make: Some(make) }
}

const fn off(name: &'static str, make: Make) -> Known {
    Known { name, default: false, make: Some(make) }
}

const fn absent(name: &'static str, default: bool) -> Known {
    Known { name, default, make: None }
}

/// In the order of `AllOrderedPlugins`.
const PLUGINS: &[Known] = &[
    off("AlwaysAdmit", |parts| simple::ALWAYS_ADMIT.equip(parts)),
    absent("NamespaceAutoProvision", false),
    on("NamespaceLifecycle", |parts| Box::new(namespace_lifecycle::NamespaceLifecycle::new(parts.lister.clone()))),
    off("NamespaceExists", |parts| simple::NAMESPACE_EXISTS.equip(parts)),
    off("LimitPodHardAntiAffinityTopology", |parts| simple::LIMIT_ANTI_AFFINITY.equip(parts)),
    on("LimitRanger", |parts| Box::new(limit_ranger::LimitRanger::new(parts.lister.clone()))),
    on("ServiceAccount", |parts| Box::new(service_account::ServiceAccount::new(parts.lister.clone()))),
    off("NodeRestriction", |parts| {
        Box::new(node_restriction::NodeRestriction::new(parts.lister.clone(), parts.authorizer.clone()))
    }),
    on("TaintNodesByCondition", |_| Box::new(node_taint::TaintNodesByCondition)),
    off("AlwaysPullImages", |parts| simple::ALWAYS_PULL_IMAGES.equip(parts)),
    absent("ImagePolicyWebhook", false),
    on("PodSecurity", |parts| Box::new(parts.pod_security.clone())),
    off("PodNodeSelector", |parts| simple::POD_NODE_SELECTOR.equip(parts)),
    on("Priority", |parts| Box::new(priority::Priority::new(parts.lister.clone()))),
    on("DefaultTolerationSeconds", |parts| Box::new(parts.toleration_seconds)),
    absent("PodTolerationRestriction", false),
    absent("EventRateLimit", false),
    off("ExtendedResourceToleration", |parts| simple::EXTENDED_RESOURCE_TOLERATION.equip(parts)),
    on("DefaultStorageClass", |parts| Box::new(storage::DefaultStorageClass::new(parts.lister.clone()))),
    on("StorageObjectInUseProtection", |_| Box::new(storage::StorageObjectInUseProtection)),
    off("OwnerReferencesPermissionEnforcement", |parts| simple::OWNER_REFERENCES.equip(parts)),
    on("PersistentVolumeClaimResize", |parts| {
        Box::new(storage::PersistentVolumeClaimResize::new(parts.lister.clone()))
    }),
    on("RuntimeClass", |parts| Box::new(runtime_class::RuntimeClass::new(parts.lister.clone()))),
    on("CertificateApproval", |parts| Box::new(certificates::ON_APPROVAL.with(&parts.authorizer))),
    on("CertificateSigning", |parts| Box::new(certificates::ON_SIGNING.with(&parts.authorizer))),
    on("ClusterTrustBundleAttest", |parts| Box::new(certificates::ON_ATTESTING.with(&parts.authorizer))),
    on("CertificateSubjectRestriction", |_| Box::new(certificates::CertificateSubjectRestriction)),
    on("DefaultIngressClass", |parts| Box::new(ingress_class::DefaultIngressClass::new(parts.lister.clone()))),
    on("PodTopologyLabels", |parts| simple::POD_TOPOLOGY_LABELS.equip(parts)),
    absent("NodeDeclaredFeatureValidator", true),
    off("DenyServiceExternalIPs", |parts| simple::DENY_EXTERNAL_IPS.equip(parts)),
    absent("MutatingAdmissionPolicy", true),
    absent("MutatingAdmissionWebhook", true),
    absent("ValidatingAdmissionPolicy", true),
    absent("ValidatingAdmissionWebhook", true),
    on("ResourceQuota", |parts| {
        let (lister, quotas) = (parts.lister.clone(), parts.quotas.clone());
        Box::new(resource_quota::ResourceQuota::new(lister, quotas, parts.limits.clone()))
    }),
    off("AlwaysDeny", |parts| simple::ALWAYS_DENY.equip(parts)),
];

// === impl Operation ===

impl Operation {
    /// As admission reviews and metrics have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "CREATE",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
            Self::Connect => "CONNECT",
        }
    }
}

// === impl AdmissionChain ===

impl AdmissionChain {
    pub fn new(
        options: &Options,
        registry: &Registry,
        store: Arc<Store>,
        authorizer: Arc<Authorizer>,
    ) -> anyhow::Result<Self> {
        let named = |list: &[String]| -> Vec<String> { list.iter().filter(|name| !name.is_empty()).cloned().collect() };
        let (enabled, disabled) = (named(&options.enable_admission_plugins), named(&options.disable_admission_plugins));
        let resource = registry.get("", "v1", "resourcequotas").context("there is no resource for quotas")?.clone();
        let quotas = Arc::new(StoredQuotas { store: store.clone(), resource });
        let mut configurations = match &options.admission_control_config_file {
            Some(path) => configuration::read(path)?,
            None => Default::default(),
        };
        let pod_security = configuration::take(&mut configurations, "PodSecurity")?;
        let pod_security = Arc::new(PodSecurity::new(store.clone(), pod_security)?);
        let limits = configuration::take(&mut configurations, "ResourceQuota")?;
        for plugin in configurations.keys() {
            tracing::warn!(plugin, "this admission plugin takes no configuration; it is passed over");
        }
        let toleration_seconds = DefaultTolerationSeconds {
            not_ready: options.default_not_ready_toleration_seconds,
            unreachable: options.default_unreachable_toleration_seconds,
        };
        let parts = Parts { lister: store, authorizer, quotas, limits, pod_security, toleration_seconds };
        Self::with(&enabled, &disabled, parts)
    }

    fn with(enabled: &[String], disabled: &[String], parts: Parts) -> anyhow::Result<Self> {
        for name in enabled.iter().chain(disabled) {
            anyhow::ensure!(
                PLUGINS.iter().any(|plugin| plugin.name == name),
                "admission plugin {name:?} is unknown; see --enable-admission-plugins and --disable-admission-plugins"
            );
            anyhow::ensure!(
                !(enabled.contains(name) && disabled.contains(name)),
                "admission plugin {name:?} is enabled and disabled at once"
            );
        }
        // Granting more than one holds is forbidden whatever plugins are on; in Kubernetes the roles' storage sees to it.
        let escalation: Box<dyn Plugin> = Box::new(rbac_escalation::RbacEscalation(parts.authorizer.clone()));
        let signing = certificates::PodCertificateSigning(parts.authorizer.clone());
        let access = param_access::ParamAccess { lister: parts.lister.clone(), authorizer: parts.authorizer.clone() };
        let mut plugins = vec![
            (AdmissionTimes::of_plugin("RBACEscalation"), escalation),
            (AdmissionTimes::of_plugin("ParamAccess"), Box::new(access)),
            (AdmissionTimes::of_plugin("PodCertificateSigning"), Box::new(signing)),
            (AdmissionTimes::of_plugin("DeviceAdmin"), simple::DEVICE_ADMIN.equip(&parts)),
        ];
        for plugin in PLUGINS {
            let wanted = enabled.iter().any(|name| name == plugin.name);
            if (!plugin.default && !wanted) || disabled.iter().any(|name| name == plugin.name) {
                continue;
            }
            match plugin.make {
                Some(make) => plugins.push((AdmissionTimes::of_plugin(plugin.name), make(&parts))),
                None if wanted => {
                    tracing::warn!(plugin = plugin.name, "admission plugin is not available; it is passed over")
                }
                None => {}
            }
        }
        Ok(Self { plugins, steps: AdmissionTimes::of_steps() })
    }

    /// Has any plugin to do with a request?
    pub fn concerns(&self, request: &AdmissionRequest<'_>) -> bool {
        self.plugins.iter().any(|(_, plugin)| plugin.handles(request))
    }

    pub async fn mutate(&self, request: &mut AdmissionRequest<'_>) -> Result<(), StatusError> {
        self.run(request, true).await
    }

    pub async fn validate(&self, request: &mut AdmissionRequest<'_>) -> Result<(), StatusError> {
        self.run(request, false).await
    }

    /// One step: every plugin that has to do with the request, until one refuses it.
    async fn run(&self, request: &mut AdmissionRequest<'_>, mutating: bool) -> Result<(), StatusError> {
        let (operation, began) = (request.operation, Instant::now());
        let (mut result, mut last) = (Ok(()), began);
        for (times, plugin) in &self.plugins {
            if !plugin.handles(request) {
                continue;
            }
            result = if mutating { plugin.mutate(request) } else { plugin.validate(request) }.await;
            let now = Instant::now();
            times.observe(operation, mutating, result.is_err(), now - last);
            last = now;
            if result.is_err() {
                break;
            }
        }
        self.steps.observe(operation, mutating, result.is_err(), last - began);
        result
    }
}

// === impl AdmissionRequest ===

impl AdmissionRequest<'_> {
    /// `is("", "pods", "")`: group, resource, subresource.
    pub fn is(&self, group: &str, resource: &str, subresource: &str) -> bool {
        let a = self.attributes;
        a.resource == resource && a.subresource == subresource && a.group == group
    }

    pub fn creates(&self) -> bool {
        self.operation == Operation::Create
    }

    pub fn updates(&self) -> bool {
        self.operation == Operation::Update
    }

    pub fn writes(&self) -> bool {
        self.creates() || self.updates()
    }

    pub fn namespace(&self) -> &str {
        &self.attributes.namespace
    }

    /// The new object, to be read; null for none.
    pub fn new_object(&self) -> &Value {
        self.object.as_deref().unwrap_or(&Value::Null)
    }

    pub fn old(&self) -> &Value {
        self.old_object.unwrap_or(&Value::Null)
    }

    /// The object's name, its generateName, or the request's name.
    pub fn name(&self) -> &str {
        let object = if self.object.is_some() { self.new_object() } else { self.old() };
        [text(object, "/metadata/name"), text(object, "/metadata/generateName"), &self.attributes.name]
            .into_iter()
            .find(|name| !name.is_empty())
            .unwrap_or_default()
    }

    /// The 403 of a plugin. As `admission.NewForbidden`.
    pub fn forbidden(&self, why: impl AsRef<str>) -> StatusError {
        StatusError::forbidden(&self.attributes.group, &self.attributes.resource, self.name(), why.as_ref())
    }
}

/// A member that is an object, made if it is absent.
fn object_in<'v>(value: &'v mut Value, key: &str) -> &'v mut Map<String, Value> {
    let member = entry(value, key);
    if !member.is_object() {
        *member = Value::Object(Map::new());
    }
    match member {
        Value::Object(map) => map,
        _ => unreachable!("made an object above"),
    }
}

/// A member that is a list, made if it is absent.
fn list_in<'v>(value: &'v mut Value, key: &str) -> &'v mut Vec<Value> {
    let member = entry(value, key);
    if !member.is_array() {
        *member = Value::Array(Vec::new());
    }
    match member {
        Value::Array(list) => list,
        _ => unreachable!("made a list above"),
    }
}

fn entry<'v>(value: &'v mut Value, key: &str) -> &'v mut Value {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    &mut value[key]
}

/// A static pod's image in the API.
fn is_mirror_pod(pod: &Value) -> bool {
    at(pod, "/metadata/annotations").is_some_and(|a| a.get("kubernetes.io/config.mirror").is_some())
}

#[cfg(test)]
mod testing {
    //! A request for the tests of plugins.
    use super::*;
    use crate::authentication::UserInfo;

    /// `group/resource/subresource` in a namespace, asked by a user.
    pub fn attributes(what: &str, namespace: &str, user: &str, groups: &[&str]) -> Attributes {
        let mut parts = what.split('/');
        let mut part = || parts.next().unwrap_or_default().to_owned();
        Attributes {
            user: Arc::new(UserInfo {
                name: user.into(),
                groups: groups.iter().map(|g| (*g).to_owned()).collect(),
                ..UserInfo::default()
            }),
            group: part(),
            resource: part(),
            subresource: part(),
            namespace: namespace.into(),
            is_resource: true,
            ..Attributes::default()
        }
    }

    pub fn request<'a>(
        attributes: &'a Attributes,
        operation: Operation,
        object: Option<&'a mut Value>,
        old_object: Option<&'a Value>,
    ) -> AdmissionRequest<'a> {
        AdmissionRequest {
            attributes,
            resource: None,
            operation,
            object,
            old_object,
            options: None,
            dry_run: false,
            warnings: Vec::new(),
            undo: Vec::new(),
        }
    }

    struct NoQuotas;

    impl Ledger for NoQuotas {
        fn write<'a>(&'a self, _: &'a Value, _: i64) -> BoxFuture<'a, Result<crate::storage::Put, StatusError>> {
            Box::pin(std::future::ready(Ok(crate::storage::Put::Conflict(None))))
        }
    }

    /// What plugins are made from, over a few objects.
    pub fn parts(objects: Arc<crate::authorization::lister::fake::Objects>) -> Parts {
        let authorizer = Arc::new(Authorizer::with(&["RBAC".to_owned()], objects.clone()).unwrap());
        let pod_security = PodSecurity::new(objects.clone(), pod_security::Configuration::default()).unwrap();
        let (quotas, pod_security) = (Arc::new(NoQuotas), Arc::new(pod_security));
        let (limits, toleration_seconds) = Default::default();
        Parts { lister: objects, authorizer, quotas, limits, pod_security, toleration_seconds }
    }

    /// What a plugin says, as the last, to who writes an object `x`; `old` makes it an update.
    pub async fn write(
        plugin: &dyn Plugin,
        (user, groups): (&str, &[&str]),
        what: &str,
        mut new: Value,
        old: Option<Value>,
    ) -> Result<(), String> {
        let mut attributes = attributes(what, "", user, groups);
        attributes.name = "x".into();
        let operation = if old.is_some() { Operation::Update } else { Operation::Create };
        let mut request = request(&attributes, operation, Some(&mut new), old.as_ref());
        assert!(plugin.handles(&request));
        plugin.validate(&mut request).await.map_err(|error| error.message().to_owned())
    }

    /// Runs a plugin's two steps on a creation.
    pub async fn create(
        plugin: &dyn Plugin,
        what: &str,
        namespace: &str,
        object: &mut Value,
    ) -> Result<(), StatusError> {
        let attributes = attributes(what, namespace, "ann", &[]);
        let mut request = request(&attributes, Operation::Create, Some(object), None);
        if plugin.handles(&request) {
            plugin.mutate(&mut request).await?;
            plugin.validate(&mut request).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authorization::lister::fake::Objects;

    #[test]
    fn plugins_are_named_known_and_not_both_on_and_off() {
        let chain = |enabled: &[&str], disabled: &[&str]| {
            let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
            AdmissionChain::with(&owned(enabled), &owned(disabled), testing::parts(Objects::of([])))
                .map(|chain| chain.plugins.len())
                .map_err(|error| error.to_string())
        };
        let default = chain(&[], &[]).unwrap();
        assert_eq!(chain(&["NodeRestriction"], &[]), Ok(default + 1));
        assert_eq!(chain(&["Priority"], &[]), Ok(default));
        assert_eq!(chain(&[], &["Priority"]), Ok(default - 1));
        assert!(chain(&["Nonsense"], &[]).unwrap_err().contains("\"Nonsense\" is unknown"));
        assert!(chain(&["Priority"], &["Priority"]).is_err());
    }
}
