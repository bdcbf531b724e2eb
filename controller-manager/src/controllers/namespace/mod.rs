//! Namespaces that are being deleted: everything in them goes, then they go.
mod plan;

use crate::runtime::{
    Context, Next, Reconcile, ServerResource, SyncError, WorkQueue, cause, discover, gone_is_fine, is_code, run,
};
use component_base::informer::Informer;
use k8s_openapi::{
    api::core::v1::{Namespace, Pod},
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ListParams, PostParams},
    core::{ApiResource, DynamicObject},
};
use plan::Findings;
use std::sync::Arc;
use tracing::info;

const NAME: &str = "namespace";
/// Objects that one list of what remains may hold.
const PAGE: u32 = 500;

struct Controller {
    client: Client,
    namespaces: Informer<Namespace>,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("namespace-controller").await else { return };
    let namespaces = context.informers.get::<Namespace>();
    let queue = Arc::new(WorkQueue::new(NAME));
    let to = queue.clone();
    namespaces.on_change(move |change| {
        if let Some(namespace) = change.new.filter(|n| n.metadata.deletion_timestamp.is_some()) {
            to.add(namespace.name_any());
        }
    });
    namespaces.synced().await;
    let controller = Arc::new(Controller { client, namespaces });
    run(NAME, queue, controller, context.settings.concurrent_namespace_syncs, context.shutdown.clone()).await;
}

/// Pods are known without asking for the server's kinds: a pass that waits for them is cheap.
fn pods() -> ServerResource {
    let api = ApiResource::erase::<Pod>(&());
    let verbs = ["delete", "deletecollection", "list"].map(str::to_owned).to_vec();
    ServerResource { api, namespaced: true, verbs }
}

impl Controller {
    /// Deletes all that can be deleted and says what is left. Pods go first: what they use must outlive them.
    async fn delete_content(&self, namespace: &str) -> Result<Findings, SyncError> {
        let mut findings = Findings::default();
        self.delete_all_of(namespace, &pods(), &mut findings).await?;
        if !findings.remaining.is_empty() {
            return Ok(findings);
        }
        let discovered = discover(&self.client).await?;
        for (group_version, error) in discovered.failures {
            let text = format!("unable to retrieve the complete list of server APIs: {group_version}: {error}");
            findings.discovery_failures.push(text);
        }
        for resource in discovered.resources.into_iter().filter(|r| r.namespaced && r.can("delete")) {
            if let Err(error) = self.delete_all_of(namespace, &resource, &mut findings).await {
                findings.content_failures.push(format!("{}: {}", resource.group_resource(), cause(&error)));
            }
        }
        Ok(findings)
    }

    async fn delete_all_of(
        &self,
        namespace: &str,
        resource: &ServerResource,
        findings: &mut Findings,
    ) -> Result<(), kube::Error> {
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &resource.api);
        if resource.can("deletecollection") {
            gone_is_fine(api.delete_collection(&DeleteParams::background(), &ListParams::default()).await)?;
        }
        if !resource.can("list") {
            return Ok(());
        }
        let mut page = ListParams::default().limit(PAGE);
        loop {
            let list = match api.list_metadata(&page).await {
                // Kinds that are listed but not served here.
                Err(error) if is_code(&error, 404) || is_code(&error, 405) => return Ok(()),
                list => list?,
            };
            for object in &list.items {
                if !resource.can("deletecollection") && object.metadata.deletion_timestamp.is_none() {
                    gone_is_fine(api.delete(&object.name_any(), &DeleteParams::background()).await)?;
                }
                findings.remains(&format!("{}.{}", resource.api.plural, resource.api.group), &object.metadata);
            }
            match list.metadata.continue_.filter(|c| !c.is_empty()) {
                Some(token) => page = page.continue_token(&token),
                None => return Ok(()),
            }
        }
    }
}

impl Reconcile for Controller {
    type Key = String;

    async fn reconcile(&self, name: &String) -> Result<Next, SyncError> {
        let Some(cached) = self.namespaces.get("", name) else { return Ok(Next::Settled) };
        if cached.metadata.deletion_timestamp.is_none() || !plan::has_our_finalizer(&cached) {
            return Ok(Next::Settled);
        }
        let findings = self.delete_content(name).await?;
        let api: Api<Namespace> = Api::all(self.client.clone());
        // Read anew: conditions and finalizers are everybody's.
        let Some(mut namespace) = api.get_opt(name).await? else { return Ok(Next::Settled) };
        if namespace.metadata.uid != cached.metadata.uid {
            return Ok(Next::Settled);
        }
        let status = plan::status(&namespace, &findings, Timestamp::now());
        if namespace.status.as_ref() != Some(&status) && !findings.is_clean() {
            namespace.status = Some(status);
            namespace = api.replace_status(name, &PostParams::default(), &namespace).await?;
        }
        if !findings.is_clean() {
            return Ok(Next::After(findings.look_again()));
        }
        let updated = plan::finalized(&namespace);
        gone_is_fine(api.replace_subresource("finalize", name, &PostParams::default(), &updated).await)?;
        info!(namespace = %name, "namespace finalized");
        Ok(Next::Settled)
    }
}
