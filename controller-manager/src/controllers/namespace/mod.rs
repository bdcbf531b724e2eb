//! Namespaces that are being deleted: everything in them goes, then they go.
mod plan;

use crate::runtime::{
    Context, Next, Reconcile, ServerResource, SyncError, WorkQueue, cause, discover, gone_is_fine, is_code, run,
};
use component_base::informer::Informer;
use k8s_openapi::{
    api::core::v1::{Namespace, Pod},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ListParams, PostParams},
    core::{ApiResource, DynamicObject},
};
use parking_lot::Mutex;
use plan::Findings;
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tracing::{debug, info};

const NAME: &str = "namespace";
/// Objects that one list of what remains may hold.
const PAGE: u32 = 500;

/// Another API server may let something into a namespace for a moment after it began to go. As `namespaceDeletionGracePeriod`.
const GRACE: Duration = Duration::from_secs(5);

/// Requests that this controller may make a second, as a multiple of others': it asks for every kind in every namespace.
const CHATTY: f64 = 20.0;

struct Controller {
    client: Client,
    namespaces: Informer<Namespace>,
    /// When a namespace was first seen to be going: nothing is made in it after that. Bounded by the namespaces.
    going: Mutex<HashMap<String, Instant>>,
    /// The server's kinds, and since when they were asked for. Kinds that came later have no objects in a namespace that
    /// was going already, so one answer serves all that were.
    kinds: tokio::sync::Mutex<Option<(Instant, Arc<Vec<ServerResource>>)>>,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.chatty_client_for("namespace-controller", CHATTY).await else { return };
    let controller = Arc::new(Controller {
        client,
        namespaces: context.informers.get(),
        going: Mutex::default(),
        kinds: tokio::sync::Mutex::default(),
    });
    let queue = Arc::new(WorkQueue::new(NAME));
    let (to, seen) = (queue.clone(), controller.clone());
    controller.namespaces.on_change(move |change| match (change.old, change.new) {
        (_, Some(namespace)) if namespace.metadata.deletion_timestamp.is_some() => {
            seen.going.lock().entry(namespace.name_any()).or_insert_with(Instant::now);
            to.add(namespace.name_any());
        }
        (Some(namespace), None) => _ = seen.going.lock().remove(&namespace.name_any()),
        _ => {}
    });
    controller.namespaces.synced().await;
    run(NAME, queue, controller, context.settings.concurrent_namespace_syncs, context.shutdown.clone()).await;
}

/// Pods are known without asking for the server's kinds: a pass that waits for them is cheap.
fn pods() -> ServerResource {
    let api = ApiResource::erase::<Pod>(&());
    let verbs = ["delete", "deletecollection", "list"].map(str::to_owned).to_vec();
    ServerResource { api, namespaced: true, verbs }
}

impl Controller {
    /// The kinds that may have objects in the namespace, and why some could not be asked for.
    async fn kinds(&self, namespace: &str, findings: &mut Findings) -> Result<Arc<Vec<ServerResource>>, SyncError> {
        let since = self.going.lock().get(namespace).copied().unwrap_or_else(Instant::now);
        let mut kinds = self.kinds.lock().await;
        if let Some((asked, known)) = kinds.as_ref().filter(|(asked, _)| *asked > since) {
            debug!(namespace, asked_ms = asked.elapsed().as_millis() as u64, "the server's kinds are known");
            return Ok(known.clone());
        }
        let asked = Instant::now();
        let mut discovered = discover(&self.client).await?;
        discovered.resources.retain(|r| r.namespaced && r.can("delete"));
        let found = Arc::new(discovered.resources);
        findings.discovery_failures.extend(discovered.failures.iter().cloned());
        *kinds = discovered.failures.is_empty().then(|| (asked, found.clone()));
        Ok(found)
    }

    /// Deletes all that can be deleted and says what is left. Pods go first: what they use must outlive them.
    async fn delete_content(&self, namespace: &str, going_for: Duration) -> Result<Findings, SyncError> {
        let mut findings = Findings::default();
        self.delete_all_of(namespace, &pods(), going_for, &mut findings).await?;
        if !findings.remaining.is_empty() {
            return Ok(findings);
        }
        let since = self.going.lock().get(namespace).copied();
        findings.early = since.and_then(|since| GRACE.checked_sub(since.elapsed())).filter(|left| !left.is_zero());
        if findings.early.is_some() {
            return Ok(findings);
        }
        for resource in self.kinds(namespace, &mut findings).await?.iter() {
            if let Err(error) = self.delete_all_of(namespace, resource, going_for, &mut findings).await {
                findings.content_failures.push(cause(&error));
            }
        }
        Ok(findings)
    }

    /// Most kinds have nothing in most namespaces: they are asked first.
    async fn delete_all_of(
        &self,
        namespace: &str,
        resource: &ServerResource,
        going_for: Duration,
        findings: &mut Findings,
    ) -> Result<(), kube::Error> {
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &resource.api);
        let mut left = self.list(&api, resource).await?;
        if left.is_empty() && resource.can("list") {
            return Ok(());
        }
        if resource.can("deletecollection") {
            gone_is_fine(api.delete_collection(&DeleteParams::background(), &ListParams::default()).await)?;
        } else {
            for object in left.iter().filter(|o| o.deletion_timestamp.is_none()) {
                let name = object.name.as_deref().unwrap_or_default();
                gone_is_fine(api.delete(name, &DeleteParams::background()).await)?;
            }
        }
        left = self.list(&api, resource).await?;
        findings.remain(namespace, &resource.api, &left, going_for);
        Ok(())
    }

    async fn list(&self, api: &Api<DynamicObject>, resource: &ServerResource) -> Result<Vec<ObjectMeta>, kube::Error> {
        let (mut all, mut page) = (Vec::new(), ListParams::default().limit(PAGE));
        while resource.can("list") {
            let list = match api.list_metadata(&page).await {
                // Kinds that are listed but not served here.
                Err(error) if is_code(&error, 404) || is_code(&error, 405) => break,
                list => list?,
            };
            all.extend(list.items.into_iter().map(|object| object.metadata));
            match list.metadata.continue_.filter(|c| !c.is_empty()) {
                Some(token) => page = page.continue_token(&token),
                None => break,
            }
        }
        Ok(all)
    }
}

impl Reconcile for Controller {
    type Key = String;

    async fn reconcile(&self, name: &String) -> Result<Next, SyncError> {
        let Some(cached) = self.namespaces.get("", name) else { return Ok(Next::Settled) };
        let Some(deleted) = cached.metadata.deletion_timestamp.as_ref().filter(|_| plan::has_our_finalizer(&cached))
        else {
            return Ok(Next::Settled);
        };
        let going_for = Duration::try_from(Timestamp::now().duration_since(deleted.0)).unwrap_or_default();
        let findings = self.delete_content(name, going_for).await?;
        if let Some(left) = findings.early {
            return Ok(Next::After(left));
        }
        let api: Api<Namespace> = Api::all(self.client.clone());
        // Read anew: conditions and finalizers are everybody's.
        let Some(mut namespace) = api.get_opt(name).await? else { return Ok(Next::Settled) };
        if namespace.metadata.uid != cached.metadata.uid {
            return Ok(Next::Settled);
        }
        let status = plan::status(&namespace, &findings, Timestamp::now());
        // Who else holds the namespace shall not read of what is gone; one that goes at once is read by nobody.
        let is_read = !findings.is_clean() || plan::is_held_by_others(&namespace);
        if namespace.status.as_ref() != Some(&status) && is_read {
            namespace.status = Some(status);
            namespace = api.replace_status(name, &PostParams::default(), &namespace).await?;
        }
        if findings.has_failed() {
            return Err(SyncError::Waiting(format!("what fails in the namespace: {findings:?}")));
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
