//! ServiceAccount: a pod runs as an account of its namespace, `default` if it names none, and finds the account's token, the
//! cluster's CA and its namespace under `/var/run/secrets/kubernetes.io/serviceaccount`.
use std::sync::Arc;
use std::time::Duration;

use apimachinery::names::random_suffix;
use apimachinery::references::references;
use apimachinery::status::StatusError;
use futures::future::BoxFuture;
use serde_json::{Value, json};

use super::{AdmissionRequest, Plugin, at, entry, is_mirror_pod, list, list_in, text};
use crate::authorization::lister::{Lister, SERVICE_ACCOUNTS};
use crate::storage::StoredObject;

/// Annotation of an account whose pods use no secrets but those that it lists.
const ENFORCE_SECRETS: &str = "kubernetes.io/enforce-mountable-secrets";
/// What of an account matters to a new pod.
const SAYING: [&str; 2] = ["\"automountServiceAccountToken\"", "\"imagePullSecrets\""];
const DEFAULT: &str = "default";
const MOUNT_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const VOLUME_PREFIX: &str = "kube-api-access-";
/// The kubelet renews tokens well before; see the extended expiration of token requests.
const TOKEN_SECONDS: i64 = 3607;
/// How often, and how long apart, the default account of a new namespace is waited for.
const DEFAULT_ATTEMPTS: u32 = 10;
const RETRY: Duration = Duration::from_millis(100);

pub struct ServiceAccount {
    lister: Arc<dyn Lister>,
}

// === impl ServiceAccount ===

impl ServiceAccount {
    pub fn new(lister: Arc<dyn Lister>) -> Self {
        Self { lister }
    }

    async fn account(&self, namespace: &str, name: &str) -> Result<Option<Arc<StoredObject>>, StatusError> {
        if let Some(account) = self.lister.get(SERVICE_ACCOUNTS, namespace, name) {
            return Ok(Some(account));
        }
        // The default account follows its namespace by a moment.
        for attempt in 0..if name == DEFAULT { DEFAULT_ATTEMPTS } else { 1 } {
            if attempt > 0 {
                tokio::time::sleep(RETRY).await;
            }
            self.lister.refresh().await?;
            if let Some(account) = self.lister.get(SERVICE_ACCOUNTS, namespace, name) {
                return Ok(Some(account));
            }
        }
        Ok(None)
    }

    async fn admit(&self, request: &mut AdmissionRequest<'_>) -> Result<(), StatusError> {
        let Some(pod) = request.object.as_deref_mut() else { return Ok(()) };
        if is_mirror_pod(pod) {
            return Ok(());
        }
        let mut name = text(pod, "/spec/serviceAccountName").to_owned();
        if name.is_empty() {
            name = text(pod, "/spec/serviceAccount").to_owned();
        }
        if name.is_empty() {
            name = DEFAULT.to_owned();
        }
        let spec = entry(pod, "spec");
        spec["serviceAccountName"] = json!(name);
        spec["serviceAccount"] = json!(name);
        let namespace = request.attributes.namespace.clone();
        let Some(account) = self.account(&namespace, &name).await? else {
            return Err(request.forbidden(format!(
                "error looking up service account {namespace}/{name}: serviceaccount {name:?} not found"
            )));
        };
        // Most say nothing of it.
        let says = SAYING.iter().any(|field| account.mentions(field));
        let account = if says { account.value() } else { Value::Null };
        let Some(pod) = request.object.as_deref_mut() else { return Ok(()) };
        if should_automount(&account, pod) {
            mount_token(pod);
        }
        let secrets = list(&account, "/imagePullSecrets");
        if list(pod, "/spec/imagePullSecrets").is_empty() && !secrets.is_empty() {
            entry(pod, "spec")["imagePullSecrets"] = json!(secrets);
        }
        Ok(())
    }
}

impl Plugin for ServiceAccount {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        (request.creates() && request.is("", "pods", ""))
            || (request.updates() && request.is("", "pods", "ephemeralcontainers"))
    }

    fn mutate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        if request.updates() {
            return Box::pin(std::future::ready(Ok(())));
        }
        Box::pin(self.admit(request))
    }

    fn validate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        let pod = request.new_object();
        let why = if is_mirror_pod(pod) {
            mirror_pod_refusal(pod).map(ToOwned::to_owned)
        } else {
            let name = text(pod, "/spec/serviceAccountName");
            let account = self.lister.get(SERVICE_ACCOUNTS, request.namespace(), name);
            let account = account.filter(|account| account.mentions(ENFORCE_SECRETS)).map(|account| account.value());
            let enforced = |account: &Value| {
                account.pointer("/metadata/annotations").is_some_and(|a| a[ENFORCE_SECRETS] == "true")
            };
            account.filter(enforced).and_then(|account| foreign_secret(pod, &account, name))
        };
        Box::pin(std::future::ready(why.map_or(Ok(()), |why| Err(request.forbidden(why)))))
    }
}

/// A secret that a pod uses and its account does not list. As `limitSecretReferences`.
fn foreign_secret(pod: &Value, account: &Value, name: &str) -> Option<String> {
    let lists = |field: &str, secret: &str| list(account, field).iter().any(|s| text(s, "/name") == secret);
    let foreign = |secret: &&str| !secret.is_empty() && !lists("/secrets", secret);
    let mut volumes = list(pod, "/spec/volumes").iter().map(|volume| text(volume, "/secret/secretName"));
    let not = |what: String| {
        Some(format!("{what} is not allowed because service account {name} does not reference that secret"))
    };
    if let Some(secret) = volumes.find(foreign) {
        return not(format!("volume with secret.secretName={secret:?}"));
    }
    let kinds = [
        ("/spec/initContainers", "init container"),
        ("/spec/containers", "container"),
        ("/spec/ephemeralContainers", "ephemeral container"),
    ];
    for (container, kind) in kinds.iter().flat_map(|(member, kind)| list(pod, member).iter().map(move |c| (c, kind))) {
        let of = text(container, "/name");
        for variable in list(container, "/env") {
            if let Some(secret) = Some(text(variable, "/valueFrom/secretKeyRef/name")).filter(foreign) {
                let variable = text(variable, "/name");
                return not(format!("{kind} {of} with envVar {variable} referencing secret.secretName={secret:?}"));
            }
        }
        let mut sources = list(container, "/envFrom").iter().map(|source| text(source, "/secretRef/name"));
        if let Some(secret) = sources.find(foreign) {
            return not(format!("{kind} {of} with envFrom referencing secret.secretName={secret:?}"));
        }
    }
    let pulls = list(pod, "/spec/imagePullSecrets").iter().map(|secret| text(secret, "/name")).enumerate();
    let (at, secret) = pulls.into_iter().find(|(_, secret)| !lists("/imagePullSecrets", secret))?;
    Some(format!(
        "imagePullSecrets[{at}].name={secret:?} is not allowed because service account {name} does not reference that imagePullSecret"
    ))
}

fn mirror_pod_refusal(pod: &Value) -> Option<&'static str> {
    if !text(pod, "/spec/serviceAccountName").is_empty() {
        return Some("a mirror pod may not reference service accounts");
    }
    let projects_token = list(pod, "/spec/volumes").iter().any(|volume| {
        list(volume, "/projected/sources").iter().any(|source| source.get("serviceAccountToken").is_some())
    });
    if projects_token {
        return Some("a mirror pod may not use ServiceAccountToken volume projections");
    }
    // What else it refers to is looked at as if it were no mirror pod.
    let mut plain = pod.clone();
    super::object_in(entry(&mut plain, "metadata"), "annotations").clear();
    let references = serde_json::from_value(plain).map(|pod| references(&pod)).unwrap_or_default();
    (!references.secrets.is_empty()).then_some("a mirror pod may not reference secrets")
}

fn should_automount(account: &Value, pod: &Value) -> bool {
    let of = |value: &Value, pointer: &str| at(value, pointer).and_then(Value::as_bool);
    of(pod, "/spec/automountServiceAccountToken").or(of(account, "/automountServiceAccountToken")).unwrap_or(true)
}

/// Mounts the token into every container that has nothing there yet.
fn mount_token(pod: &mut Value) {
    let volume = format!("{VOLUME_PREFIX}{}", random_suffix(5));
    let mut needed = false;
    for containers in ["initContainers", "containers"] {
        let Some(containers) = pod.pointer_mut(&format!("/spec/{containers}")).and_then(Value::as_array_mut) else {
            continue;
        };
        for container in containers {
            if list(container, "/volumeMounts").iter().any(|mount| text(mount, "/mountPath") == MOUNT_PATH) {
                continue;
            }
            needed = true;
            let mount = json!({"name": volume, "readOnly": true, "mountPath": MOUNT_PATH});
            list_in(container, "volumeMounts").push(mount);
        }
    }
    if needed {
        list_in(entry(pod, "spec"), "volumes").push(json!({
            "name": volume,
            "projected": {
                "sources": [
                    {"serviceAccountToken": {"expirationSeconds": TOKEN_SECONDS, "path": "token"}},
                    {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                    {"downwardAPI": {"items": [
                        {"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
                ],
                "defaultMode": 420,
            },
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::create;
    use crate::authorization::lister::fake::Objects;

    fn plugin(account: Value) -> ServiceAccount {
        ServiceAccount::new(Objects::of([(SERVICE_ACCOUNTS, account)]))
    }

    fn account(name: &str) -> Value {
        json!({"metadata": {"name": name, "namespace": "a"}})
    }

    fn pod() -> Value {
        json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c"}, {"name": "d", "volumeMounts": [
            {"name": "own", "mountPath": MOUNT_PATH}]}], "initContainers": [{"name": "i"}]}})
    }

    #[tokio::test]
    async fn a_pod_gets_the_default_account_and_its_token() {
        let mut pod = pod();
        create(&plugin(account("default")), "/pods", "a", &mut pod).await.unwrap();
        assert_eq!(pod["spec"]["serviceAccountName"], "default");
        let volume = &pod["spec"]["volumes"][0];
        let name = volume["name"].as_str().unwrap();
        assert!(name.starts_with(VOLUME_PREFIX) && name.len() == VOLUME_PREFIX.len() + 5);
        assert_eq!(volume["projected"]["sources"][0]["serviceAccountToken"]["expirationSeconds"], 3607);
        let mount = json!([{"name": name, "readOnly": true, "mountPath": MOUNT_PATH}]);
        assert_eq!(pod["spec"]["containers"][0]["volumeMounts"], mount);
        assert_eq!(pod["spec"]["initContainers"][0]["volumeMounts"], mount);
        assert_eq!(pod["spec"]["containers"][1]["volumeMounts"][0]["name"], "own");
    }

    #[tokio::test]
    async fn automounting_can_be_refused_by_account_and_pod() {
        for (of_account, of_pod, mounted) in [
            (None, None, true),
            (Some(false), None, false),
            (Some(false), Some(true), true),
            (None, Some(false), false),
        ] {
            let mut account = account("default");
            let mut pod = pod();
            if let Some(value) = of_account {
                account["automountServiceAccountToken"] = json!(value);
            }
            if let Some(value) = of_pod {
                pod["spec"]["automountServiceAccountToken"] = json!(value);
            }
            create(&plugin(account), "/pods", "a", &mut pod).await.unwrap();
            assert_eq!(pod["spec"].get("volumes").is_some(), mounted, "{of_account:?} {of_pod:?}");
        }
    }

    #[tokio::test]
    async fn pull_secrets_come_from_the_account_unless_the_pod_has_its_own() {
        let mut account = account("robot");
        account["imagePullSecrets"] = json!([{"name": "s"}]);
        let mut pod = pod();
        pod["spec"]["serviceAccountName"] = json!("robot");
        create(&plugin(account.clone()), "/pods", "a", &mut pod).await.unwrap();
        assert_eq!(pod["spec"]["imagePullSecrets"], json!([{"name": "s"}]));
        pod["spec"]["imagePullSecrets"] = json!([{"name": "mine"}]);
        create(&plugin(account), "/pods", "a", &mut pod).await.unwrap();
        assert_eq!(pod["spec"]["imagePullSecrets"], json!([{"name": "mine"}]));
    }

    #[tokio::test]
    async fn an_account_that_is_not_there_is_named() {
        for name in ["robot", "default"] {
            let mut pod = pod();
            pod["spec"]["serviceAccountName"] = json!(name);
            let error = create(&plugin(account("other")), "/pods", "a", &mut pod).await.unwrap_err();
            let message = format!(
                "pods \"p\" is forbidden: error looking up service account a/{name}: serviceaccount \"{name}\" not found"
            );
            assert_eq!((error.code(), error.message()), (403, message.as_str()));
        }
    }

    #[tokio::test]
    async fn a_mirror_pod_runs_as_nobody() {
        let mut pod = pod();
        pod["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "x"});
        create(&plugin(account("default")), "/pods", "a", &mut pod).await.unwrap();
        assert!(pod["spec"].get("serviceAccountName").is_none());
        pod["spec"]["serviceAccountName"] = json!("default");
        assert!(create(&plugin(account("default")), "/pods", "a", &mut pod).await.is_err());
    }
    #[tokio::test]
    async fn an_account_may_keep_its_pods_to_its_secrets() {
        let mut account = account("robot");
        account["metadata"]["annotations"] = json!({ENFORCE_SECRETS: "true"});
        account["secrets"] = json!([{"name": "mine"}]);
        account["imagePullSecrets"] = json!([{"name": "pull"}]);
        let env = |secret: &str| json!([{"name": "c", "env": [{"name": "E", "valueFrom": {"secretKeyRef": {"name": secret}}}]}]);
        for (field, value, why) in [
            ("volumes", json!([{"name": "v", "secret": {"secretName": "mine"}}]), None),
            (
                "volumes",
                json!([{"name": "v", "secret": {"secretName": "other"}}]),
                Some(
                    "volume with secret.secretName=\"other\" is not allowed because service account robot does not reference that secret",
                ),
            ),
            ("containers", env("mine"), None),
            (
                "containers",
                env("other"),
                Some(
                    "container c with envVar E referencing secret.secretName=\"other\" is not allowed because service account robot does not reference that secret",
                ),
            ),
            (
                "imagePullSecrets",
                json!([{"name": "other"}]),
                Some(
                    "imagePullSecrets[0].name=\"other\" is not allowed because service account robot does not reference that imagePullSecret",
                ),
            ),
        ] {
            let mut pod = pod();
            pod["spec"]["serviceAccountName"] = json!("robot");
            pod["spec"][field] = value;
            let refused = create(&plugin(account.clone()), "/pods", "a", &mut pod).await.err();
            let why = why.map(|why| format!("pods \"p\" is forbidden: {why}"));
            assert_eq!(refused.map(|error| error.message().to_owned()), why);
        }
    }
}
