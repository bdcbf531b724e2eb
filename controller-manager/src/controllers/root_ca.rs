//! Every namespace has a ConfigMap `kube-root-ca.crt` with the certificate by which pods trust the API server.
use super::serviceaccount::is_active;
use crate::runtime::{Context, Next, Reconcile, SyncError, WorkQueue, api_in, is_code, run};
use component_base::informer::Informer;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::{Client, ResourceExt as _, api::PostParams};
use std::{collections::BTreeMap, sync::Arc};

const NAME: &str = "root_ca_cert_publisher";
const CONFIG_MAP: &str = "kube-root-ca.crt";
const KEY: &str = "ca.crt";
const DESCRIPTION: (&str, &str) = (
    "kubernetes.io/description",
    "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints such as the \
     internal service IP or kubernetes.default.svc. No other usage is guaranteed across distributions of Kubernetes \
     clusters.",
);

struct Controller {
    client: Client,
    certificate: String,
    namespaces: Informer<Namespace>,
    config_maps: Informer<ConfigMap>,
}

/// Runs until shutdown, if there is a `--root-ca-file`.
pub async fn start(context: Arc<Context>) {
    let what = "no namespace gets kube-root-ca.crt";
    let Some(certificate) = context.settings.root_ca(what).await else { return };
    let Some(client) = context.client_for("root-ca-cert-publisher").await else { return };
    let namespaces = context.informers.get::<Namespace>();
    let config_maps = context.informers.get::<ConfigMap>();
    let queue = Arc::new(WorkQueue::new(NAME));
    let to = queue.clone();
    namespaces.on_change(move |change| change.new.into_iter().for_each(|n| to.add(n.name_any())));
    let to = queue.clone();
    config_maps.on_change(move |change| {
        change.latest().into_iter().for_each(|c| to.add(c.namespace().unwrap_or_default()));
    });
    namespaces.synced().await;
    config_maps.synced().await;
    let controller = Arc::new(Controller { client, certificate, namespaces, config_maps });
    run(NAME, queue, controller, 1, context.shutdown.clone()).await;
}

/// What the ConfigMap must become; None if it is right.
fn plan(existing: Option<&ConfigMap>, certificate: &str) -> Option<ConfigMap> {
    let data = BTreeMap::from([(KEY.to_owned(), certificate.to_owned())]);
    if existing.is_some_and(|e| {
        let described = e.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(DESCRIPTION.0));
        e.data.as_ref() == Some(&data) && described
    }) {
        return None;
    }
    let mut wanted = existing.cloned().unwrap_or_default();
    wanted.metadata.name = Some(CONFIG_MAP.to_owned());
    wanted.metadata.annotations.get_or_insert_default().insert(DESCRIPTION.0.to_owned(), DESCRIPTION.1.to_owned());
    wanted.data = Some(data);
    wanted.binary_data = None;
    Some(wanted)
}

impl Reconcile for Controller {
    type Key = String;

    async fn reconcile(&self, namespace: &String) -> Result<Next, SyncError> {
        if !self.namespaces.get("", namespace).is_some_and(|n| is_active(&n)) {
            return Ok(Next::Settled);
        }
        let existing = self.config_maps.get(namespace, CONFIG_MAP);
        let Some(wanted) = plan(existing.as_deref(), &self.certificate) else { return Ok(Next::Settled) };
        let api = api_in::<ConfigMap>(&self.client, namespace);
        let outcome = match existing {
            Some(_) => api.replace(CONFIG_MAP, &PostParams::default(), &wanted).await,
            None => api.create(&PostParams::default(), &wanted).await,
        };
        match outcome {
            // The cache lags; the event will bring us back if it is not right.
            Err(error) if existing_race(&error) => Ok(Next::Settled),
            outcome => outcome.map(|_| Next::Settled).map_err(SyncError::from),
        }
    }
}

fn existing_race(error: &kube::Error) -> bool {
    is_code(error, 409) && matches!(error, kube::Error::Api(status) if status.reason == "AlreadyExists")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_certificate_is_put_right() {
        let made = plan(None, "cert").unwrap();
        assert_eq!(made.data.as_ref().unwrap()[KEY], "cert");
        assert_eq!(plan(Some(&made), "cert"), None);
        let mut tampered = made.clone();
        tampered.data.as_mut().unwrap().insert("other".into(), "x".into());
        assert_eq!(plan(Some(&tampered), "cert").unwrap().data, made.data);
        assert_eq!(plan(Some(&made), "renewed").unwrap().data.unwrap()[KEY], "renewed");
    }
}
