//! What the server itself puts into the store once it is up, and keeps there: the namespaces of the system, the default RBAC
//! objects, the system's priority classes, the `kubernetes` Service with its endpoints, and what aggregated servers need to
//! authenticate clients. Everything is reconciled, so that any part may be there already; whatever fails is tried again.
//!
//! Writes go through the same endpoints as anyone's, as a user of `system:masters`.

mod flow_control;
mod loopback;
mod objects;
pub mod rbac;

use crate::authentication::service_account;
use crate::registry::object::{child, set, text};
use crate::server::Context;
use apimachinery::status::StatusError;
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use loopback::Loopback;
use rbac::BindingChange;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Between attempts while something fails.
const RETRY: Duration = Duration::from_secs(1);
/// Between looks at what must stay as it is.
const KEEP: Duration = Duration::from_secs(10);
/// Where the servers of a cluster tell each other of themselves, and for how long after they last did so they count.
const LEASES: &str = "masterleases";
const LEASE_SECONDS: i64 = 15;
/// RBAC objects written at a time.
const CONCURRENCY: usize = 8;

/// Runs from the time at which the store is ready until `shutdown`. `/readyz` waits for `ready()` having been called.
pub async fn run(context: Arc<Context>, ready: impl FnOnce() + Send, shutdown: CancellationToken) {
    let api = Loopback::new(context);
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = keep(&api, ready) => {}
    }
    if let Err(error) = withdraw(&api).await {
        tracing::warn!(%error, "cannot withdraw this server from the kubernetes Service");
    }
}

/// Who looks for a server is not sent to one that has ended.
async fn withdraw(api: &Loopback) -> Result<(), StatusError> {
    let options = &api.context().options;
    if options.public_address().is_loopback() {
        return Ok(());
    }
    let address = options.public_address().to_string();
    let others = api.context().store.withdraw(LEASES, &address).await?;
    // The last one leaves its address behind, as kube-apiserver: there is nobody who could be asked anyway.
    if others.is_empty() {
        return Ok(());
    }
    for part in objects::kubernetes_endpoints(options, &others) {
        api.keep(&part, objects::same_endpoints).await?;
    }
    Ok(())
}

async fn keep(api: &Loopback, ready: impl FnOnce() + Send) {
    if api.context().options.public_address().is_loopback() {
        tracing::warn!("--advertise-address is a loopback address: the kubernetes Service has no endpoints");
    }
    while let Err(error) = first(api).await {
        tracing::warn!(%error, "cannot write the objects of the system yet");
        tokio::time::sleep(RETRY).await;
    }
    ready();
    loop {
        if let Err(error) = flow_control(api).await {
            tracing::warn!(%error, "cannot keep the flow schemas");
        }
        tokio::time::sleep(KEEP).await;
        if let Err(error) = lasting(api).await {
            tracing::warn!(%error, "cannot keep the objects of the system");
        }
    }
}

/// All of it, in the order in which one part needs another.
async fn first(api: &Loopback) -> Result<(), StatusError> {
    for namespace in objects::namespaces() {
        api.ensure(&namespace).await?;
    }
    rbac_defaults(api).await?;
    for class in objects::priority_classes() {
        api.ensure(&class).await?;
    }
    lasting(api).await
}

/// What is put right whenever it was changed: the namespaces, our address, the authorities of clients.
async fn lasting(api: &Loopback) -> Result<(), StatusError> {
    for namespace in objects::namespaces() {
        api.ensure(&namespace).await?;
    }
    let options = &api.context().options;
    let service = objects::kubernetes_service(options).map_err(StatusError::internal)?;
    api.ensure(&service).await?;
    // Nobody but this machine could follow a loopback address, and no Endpoints may hold one.
    if !options.public_address().is_loopback() {
        let store = &api.context().store;
        let address = options.public_address().to_string();
        let others = store.announce(LEASES, &address, &objects::lease(&address), LEASE_SECONDS).await?;
        for part in objects::kubernetes_endpoints(options, &others) {
            api.keep(&part, objects::same_endpoints).await?;
        }
    }
    let today = service_account::day_of(jiff::Timestamp::now().as_second());
    api.keep(&objects::token_tracking(&today), objects::tracks_tokens).await?;
    label_used(api, &today).await?;
    let (client_ca, request_header_ca) = api.context().authenticator.ca_texts();
    let authentication = objects::authentication_config(options, client_ca.as_deref(), request_header_ca.as_deref());
    api.keep(&authentication, |current, wanted| current["data"] == wanted["data"]).await
}

/// The default levels and schemas, and what each schema says of its level.
async fn flow_control(api: &Loopback) -> Result<(), StatusError> {
    each(flow_control::defaults(), |object| async move { api.ensure(&object).await }).await?;
    let levels = api.all("flowcontrol.apiserver.k8s.io", "PriorityLevelConfiguration").await?;
    let exists = |name: &str| levels.iter().any(|level| text(level, "/metadata/name") == name);
    let now = apimachinery::time::rfc3339(jiff::Timestamp::now());
    for schema in api.all("flowcontrol.apiserver.k8s.io", "FlowSchema").await? {
        let Some(said) = flow_control::dangling(&schema, exists, &now) else { continue };
        match api.update_status(said).await {
            Err(error) if error.code() == 409 || error.code() == 404 => {}
            result => result?,
        }
    }
    Ok(())
}

/// Says on Secrets on which day their tokens were used last.
async fn label_used(api: &Loopback, today: &str) -> Result<(), StatusError> {
    for (namespace, name) in api.context().authenticator.take_used_secrets() {
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": namespace, "name": name}});
        let Some(mut secret) = api.get(&secret).await? else { continue };
        set(child(child(&mut secret, "metadata"), "labels"), service_account::LAST_USED, today);
        match api.update(secret).await {
            // It is noted again when it is used again.
            Err(error) if error.code() == 409 || error.code() == 404 => {}
            result => result?,
        }
    }
    Ok(())
}

/// As `rbac/bootstrap-roles`.
async fn rbac_defaults(api: &Loopback) -> Result<(), StatusError> {
    let role = |role: ClusterRole| async move {
        let update = |current: ClusterRole, default: &ClusterRole| {
            let aggregated = current.aggregation_rule.is_none() && default.aggregation_rule.is_some();
            let change = rbac::missing_from_role(
                &current.metadata,
                current.rules.as_deref(),
                &default.metadata,
                default.rules.as_deref(),
            );
            match (change, aggregated) {
                (None, _) => None,
                (Some((metadata, rules)), true) => {
                    Some(ClusterRole { metadata, rules, aggregation_rule: default.aggregation_rule.clone() })
                }
                (Some((metadata, rules)), false) => Some(ClusterRole { metadata, rules, ..current }),
            }
        };
        reconcile(api, "ClusterRole", role, update).await
    };
    each(rbac::cluster_roles(), role).await?;
    let role = |role: Role| async move {
        let update = |current: Role, default: &Role| {
            let (ours, theirs) = (current.rules.as_deref(), default.rules.as_deref());
            rbac::missing_from_role(&current.metadata, ours, &default.metadata, theirs)
                .map(|(metadata, rules)| Role { metadata, rules })
        };
        reconcile(api, "Role", role, update).await
    };
    each(rbac::roles(), role).await?;
    let binding = |default: ClusterRoleBinding| async move {
        let change = |current: &ClusterRoleBinding| {
            rbac::missing_from_binding(
                (&current.metadata, &current.role_ref, current.subjects.as_deref()),
                (&default.metadata, &default.role_ref, default.subjects.as_deref()),
            )
        };
        reconcile_binding(api, "ClusterRoleBinding", &default, change, |current, metadata, subjects| {
            ClusterRoleBinding { metadata, subjects, ..current }
        })
        .await
    };
    each(rbac::cluster_role_bindings(), binding).await?;
    let binding = |default: RoleBinding| async move {
        let change = |current: &RoleBinding| {
            rbac::missing_from_binding(
                (&current.metadata, &current.role_ref, current.subjects.as_deref()),
                (&default.metadata, &default.role_ref, default.subjects.as_deref()),
            )
        };
        reconcile_binding(api, "RoleBinding", &default, change, |current, metadata, subjects| RoleBinding {
            metadata,
            subjects,
            ..current
        })
        .await
    };
    each(rbac::role_bindings(), binding).await
}

async fn each<T, F, Fut>(items: Vec<T>, action: F) -> Result<(), StatusError>
where
    F: Fn(T) -> Fut,
    Fut: Future<Output = Result<(), StatusError>>,
{
    futures::stream::iter(items.into_iter().map(action)).buffer_unordered(CONCURRENCY).try_collect::<()>().await
}

fn rbac_value(object: &impl Serialize, kind: &str) -> Result<Value, StatusError> {
    let mut value = serde_json::to_value(object).map_err(StatusError::internal)?;
    if let Some(map) = value.as_object_mut() {
        map.insert("apiVersion".into(), "rbac.authorization.k8s.io/v1".into());
        map.insert("kind".into(), kind.into());
    }
    Ok(value)
}

/// Creates the default, or changes what is there as `update` says.
async fn reconcile<K: Serialize + DeserializeOwned>(
    api: &Loopback,
    kind: &str,
    default: K,
    update: impl Fn(K, &K) -> Option<K>,
) -> Result<(), StatusError> {
    let wanted = rbac_value(&default, kind)?;
    let Some(current) = api.get(&wanted).await? else { return api.ensure(&wanted).await };
    let current: K = serde_json::from_value(current).map_err(StatusError::internal)?;
    match update(current, &default) {
        Some(changed) => api.update(rbac_value(&changed, kind)?).await,
        None => Ok(()),
    }
}

async fn reconcile_binding<K: Serialize + DeserializeOwned>(
    api: &Loopback,
    kind: &str,
    default: &K,
    change: impl Fn(&K) -> BindingChange,
    apply: impl Fn(
        K,
        k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
        Option<Vec<k8s_openapi::api::rbac::v1::Subject>>,
    ) -> K,
) -> Result<(), StatusError> {
    let wanted = rbac_value(default, kind)?;
    let Some(current) = api.get(&wanted).await? else { return api.ensure(&wanted).await };
    let current: K = serde_json::from_value(current).map_err(StatusError::internal)?;
    match change(&current) {
        BindingChange::None => Ok(()),
        BindingChange::Update(metadata, subjects) => {
            api.update(rbac_value(&apply(current, metadata, subjects), kind)?).await
        }
        BindingChange::Recreate => {
            api.delete(&wanted).await?;
            api.ensure(&wanted).await
        }
    }
}
