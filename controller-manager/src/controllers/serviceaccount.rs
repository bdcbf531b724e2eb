//! Every namespace has a ServiceAccount named `default`.
use crate::runtime::{Context, Next, Reconcile, SyncError, WorkQueue, api_in, is_code, run};
use component_base::informer::Informer;
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use kube::{Client, ResourceExt as _, api::PostParams};
use std::sync::Arc;

const NAME: &str = "serviceaccount";
/// Accounts that every namespace has.
const WANTED: &str = "default";

struct Controller {
    client: Client,
    namespaces: Informer<Namespace>,
    accounts: Informer<ServiceAccount>,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("service-account-controller").await else { return };
    let namespaces = context.informers.get::<Namespace>();
    let accounts = context.informers.get::<ServiceAccount>();
    let queue = Arc::new(WorkQueue::new(NAME));
    let to = queue.clone();
    namespaces.on_change(move |change| change.new.into_iter().for_each(|n| to.add(n.name_any())));
    let to = queue.clone();
    accounts.on_change(move |change| {
        if let (Some(account), None) = (change.old, change.new)
            && account.metadata.name.as_deref() == Some(WANTED)
        {
            to.add(account.namespace().unwrap_or_default());
        }
    });
    namespaces.synced().await;
    accounts.synced().await;
    let controller = Arc::new(Controller { client, namespaces, accounts });
    run(NAME, queue, controller, 1, context.shutdown.clone()).await;
}

/// Whether things are still made in a namespace.
pub fn is_active(namespace: &Namespace) -> bool {
    let phase = namespace.status.as_ref().and_then(|s| s.phase.as_deref());
    namespace.metadata.deletion_timestamp.is_none() && phase.unwrap_or("Active") == "Active"
}

impl Reconcile for Controller {
    type Key = String;

    async fn reconcile(&self, namespace: &String) -> Result<Next, SyncError> {
        let active = self.namespaces.get("", namespace).is_some_and(|n| is_active(&n));
        if !active || self.accounts.get(namespace, WANTED).is_some() {
            return Ok(Next::Settled);
        }
        let mut account = ServiceAccount::default();
        account.metadata.name = Some(WANTED.to_owned());
        match api_in::<ServiceAccount>(&self.client, namespace).create(&PostParams::default(), &account).await {
            Err(error) if is_code(&error, 409) => Ok(Next::Settled),
            outcome => outcome.map(|_| Next::Settled).map_err(SyncError::from),
        }
    }
}
