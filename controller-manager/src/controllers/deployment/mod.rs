//! Deployments: ReplicaSets that follow a template, one taking over from the other.
mod plan;
mod sets;
mod status;

use super::{
    claim::{adoption, claim, controller_reference, release},
    pod_control::{Behind, TOLD_LATER},
};
use crate::runtime::{
    Context, Index, Next, Reconcile, SyncError, WorkQueue, api_in, cause, gone_is_fine, is_code, is_terminating,
    orphans_of, put_status, run,
};
use apimachinery::{labels::Selector, meta::NamespacedName, pod::controller_of};
use component_base::{
    client::send,
    events::{Recorder, Type, reference},
    informer::Informer,
    lean,
};
use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentStatus, ReplicaSet},
        core::v1::Pod,
    },
    jiff::Timestamp,
};
use kube::{
    Client, Resource as _,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use plan::Action;
use std::{collections::HashMap, sync::Arc};

const NAME: &str = "deployment";

struct Controller {
    client: Client,
    recorder: Recorder,
    deployments: Informer<Deployment>,
    sets: Arc<Index<ReplicaSet>>,
    pods: Arc<Index<Pod>>,
    behind: Behind,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("deployment-controller").await else { return };
    let deployments = context.informers.get::<Deployment>();
    let (sets, pods) = (context.informers.get::<ReplicaSet>(), context.informers.get::<Pod>());
    let controller = Arc::new(Controller {
        recorder: context.recorder(&client, "deployment-controller"),
        client,
        deployments: deployments.clone(),
        sets: context.sets_by_controller(),
        pods: context.pods_by_controller(),
        behind: Behind::default(),
    });
    let queue = Arc::new(WorkQueue::new(NAME));
    let to = queue.clone();
    deployments.on_change(move |change| {
        if let Some(deployment) = change.latest() {
            to.add(NamespacedName::of(deployment.as_ref()));
        }
    });
    let (to, all) = (queue.clone(), deployments.clone());
    sets.on_change(move |change| {
        for set in change.old.into_iter().chain(change.new) {
            wake_owner(set, &all, &to);
        }
    });
    // Recreate waits for the last old pod to be gone.
    let (to, all_sets) = (queue.clone(), sets.clone());
    pods.on_change(move |change| {
        if let (Some(pod), None) = (change.old, change.new)
            && let Some(owner) = controller_of(&pod.metadata).filter(|o| o.kind == "ReplicaSet")
            && let Some(set) = all_sets.get(pod.metadata.namespace.as_deref().unwrap_or_default(), &owner.name)
            && let Some(deployment) = owner_of(&set)
        {
            to.add(deployment);
        }
    });
    deployments.synced().await;
    sets.synced().await;
    pods.synced().await;
    run(NAME, queue, controller, context.settings.concurrent_deployment_syncs, context.shutdown.clone()).await;
}

fn owner_of(set: &ReplicaSet) -> Option<NamespacedName> {
    let owner = controller_of(&set.metadata).filter(|o| o.kind == "Deployment")?;
    Some(NamespacedName::new(set.metadata.namespace.clone().unwrap_or_default(), &owner.name))
}

fn wake_owner(set: &ReplicaSet, deployments: &Informer<Deployment>, queue: &WorkQueue<NamespacedName>) {
    if controller_of(&set.metadata).is_some() {
        if let Some(owner) = owner_of(set) {
            queue.add(owner);
        }
        return;
    }
    // An orphan may be adopted by whoever selects it.
    for deployment in deployments.list_in(set.metadata.namespace.as_deref().unwrap_or_default()) {
        if selector_of(&deployment).is_ok_and(|s| !s.is_empty() && s.matches_opt(set.metadata.labels.as_ref())) {
            queue.add(NamespacedName::of(deployment.as_ref()));
        }
    }
}

fn selector_of(deployment: &Deployment) -> Result<Selector, SyncError> {
    Selector::from_label_selector_opt(deployment.spec.as_ref().map(|s| &s.selector))
        .map_err(|e| SyncError::Invalid(format!("selector: {e}")))
}

impl Controller {
    async fn claim_sets(
        &self,
        key: &NamespacedName,
        deployment: &Deployment,
        selector: &Selector,
    ) -> Result<Vec<Arc<ReplicaSet>>, SyncError> {
        let uid = deployment.metadata.uid.as_deref();
        let mut candidates = self.sets.get(uid.unwrap_or_default());
        candidates.extend(self.sets.get(&orphans_of(&key.namespace)));
        let claimed = claim(&deployment.metadata, selector, candidates);
        let api = api_in::<ReplicaSet>(&self.client, &key.namespace);
        for set in &claimed.release {
            let patch = Patch::Strategic(release(uid, set.metadata.uid.as_deref()));
            gone_is_fine(api.patch_metadata(sets::name(set), &PatchParams::default(), &patch).await)?;
        }
        let mut owned = claimed.owned;
        if !claimed.adopt.is_empty() {
            let live = api_in::<Deployment>(&self.client, &key.namespace).get(&key.name).await?;
            if live.metadata.uid.as_deref() == uid && live.metadata.deletion_timestamp.is_none() {
                for set in claimed.adopt {
                    let patch =
                        Patch::Strategic(adoption(&controller_reference(deployment), set.metadata.uid.as_deref()));
                    api.patch_metadata(sets::name(&set), &PatchParams::default(), &patch).await?;
                    // What the patch changed must be in what is planned with: the next step sees it.
                    owned.push(set);
                }
                return Err(SyncError::Waiting("adopted replica sets".to_owned()));
            }
        }
        Ok(owned)
    }

    async fn write_status(&self, mut deployment: Deployment, status: DeploymentStatus) -> Result<(), SyncError> {
        deployment.status = Some(status);
        Ok(put_status(&self.client, &deployment).await?)
    }

    /// Makes the new set. A set that has its name already is ours, or makes us look for another name.
    async fn create(&self, deployment: &Deployment, set: &ReplicaSet) -> Result<(), SyncError> {
        let namespace = deployment.metadata.namespace.as_deref().unwrap_or_default();
        let api = api_in::<ReplicaSet>(&self.client, namespace);
        let error = match api.create(&PostParams::default(), set).await {
            Ok(created) => {
                self.tell_scaling(deployment, &created, 0);
                return Ok(());
            }
            Err(error) => error,
        };
        let mut status = deployment.status.clone().unwrap_or_default();
        if is_code(&error, 409) {
            let there = api.get(sets::name(set)).await?;
            let template = |s: &ReplicaSet| s.spec.as_ref().and_then(|s| s.template.clone()).unwrap_or_default();
            let ours = controller_of(&there.metadata).map(|o| o.uid.as_str()) == deployment.metadata.uid.as_deref();
            if ours && sets::same_template(&template(&there), &template(set)) {
                return Err(SyncError::Waiting(format!("replica set {} in the cache", sets::name(set))));
            }
            status.collision_count = Some(status.collision_count.unwrap_or(0) + 1);
            self.write_status(deployment.clone(), status).await?;
            return Err(SyncError::Waiting("a replica set name that is free".to_owned()));
        }
        if is_terminating(&error) {
            // So will all others be refused; the namespace says so by itself.
            return Err(error.into());
        }
        let message = format!("Failed to create new replica set \"{}\": {}", sets::name(set), cause(&error));
        if status::has_deadline(deployment) {
            status::set_creation_failure(&mut status, message.clone(), Timestamp::now());
            self.write_status(deployment.clone(), status).await?;
        }
        self.recorder.event(&reference(deployment), Type::Warning, "ReplicaSetCreateError", "", message);
        Err(error.into())
    }

    /// Writes a set; `versions` are of those that this step has written before.
    async fn replace(
        &self,
        set: &mut ReplicaSet,
        versions: &mut HashMap<String, Option<String>>,
    ) -> Result<(), kube::Error> {
        if let Some(version) = versions.get(sets::name(set)) {
            set.metadata.resource_version.clone_from(version);
        }
        let all = kube::core::Request::new(ReplicaSet::url_path(&(), set.metadata.namespace.as_deref()));
        let body = serde_json::to_vec(set).map_err(kube::Error::SerdeError)?;
        let text = send(&self.client, all.replace(sets::name(set), &PostParams::default(), body)).await?;
        versions.insert(sets::name(set).to_owned(), lean::version_of(&text));
        Ok(())
    }

    fn tell_scaling(&self, deployment: &Deployment, set: &ReplicaSet, from: i32) {
        let to = sets::size(set);
        if from == to {
            return;
        }
        let way = if to > from { "up" } else { "down" };
        let message = format!("Scaled {way} replica set {} from {from} to {to}", sets::name(set));
        self.recorder.event(&reference(deployment), Type::Normal, "ScalingReplicaSet", "", message);
    }

    /// Carries the actions out in order; the Deployment's own revision is written with its status.
    async fn act(&self, deployment: &Deployment, actions: Vec<Action>) -> Result<(), SyncError> {
        let namespace = deployment.metadata.namespace.as_deref().unwrap_or_default();
        let api = api_in::<ReplicaSet>(&self.client, namespace);
        // Of sets that one step writes twice.
        let mut versions: HashMap<String, Option<String>> = HashMap::new();
        for action in actions {
            match action {
                Action::AnnotateRevision(_) => {}
                Action::Create(set) => self.create(deployment, &set).await?,
                Action::Update(mut set) => self.replace(&mut set, &mut versions).await?,
                Action::Scale { mut set, from } => {
                    self.replace(&mut set, &mut versions).await?;
                    self.tell_scaling(deployment, &set, from);
                }
                Action::RollBack { deployment: updated, event } => {
                    let all = api_in::<Deployment>(&self.client, namespace);
                    let name = updated.metadata.name.clone().unwrap_or_default();
                    all.replace(&name, &PostParams::default(), &updated).await?;
                    if let Some(told) = event {
                        let kind = if told.is_warning { Type::Warning } else { Type::Normal };
                        self.recorder.event(&reference(deployment), kind, told.reason, "", told.message);
                    }
                }
                Action::Delete(set) => {
                    gone_is_fine(api.delete(&set, &DeleteParams::background()).await)?;
                }
            }
        }
        Ok(())
    }
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(deployment) = self.deployments.get(&key.namespace, &key.name) else {
            self.behind.wait(key, None);
            return Ok(Next::Settled);
        };
        let selector = selector_of(&deployment)?;
        if selector.is_empty() {
            let message = "This deployment is selecting all pods. A non-empty selector is required.";
            self.recorder.event(&reference(deployment.as_ref()), Type::Warning, "SelectingAll", "", message);
            return Ok(Next::Settled);
        }
        let owned = self.claim_sets(key, &deployment, &selector).await?;
        let uids = owned.iter().filter_map(|s| s.metadata.uid.as_deref());
        let pods: Vec<Arc<Pod>> = uids.flat_map(|uid| self.pods.get(uid)).collect();
        let plan = plan::plan(&deployment, &owned, &pods, Timestamp::now());

        let former = deployment.status.clone().unwrap_or_default();
        // With the status, so that the generation stays: nobody has asked for anything new.
        let annotated = plan.actions.iter().find_map(|action| match action {
            Action::AnnotateRevision(revision) => plan::with_revision(&deployment, revision),
            _ => None,
        });
        let creates = plan.actions.iter().any(|action| matches!(action, Action::Create(_)));
        let differs = annotated.is_some() || !status::same(&plan.status, &former);
        let can_wait = annotated.is_none() && status::can_wait(&deployment, &plan.status, &former);
        let behind = self.behind.wait(key, (differs && can_wait).then_some(TOLD_LATER));
        let tell = async {
            if behind.is_some() || !differs {
                return Ok(());
            }
            self.write_status(annotated.unwrap_or_else(|| deployment.as_ref().clone()), plan.status).await
        };
        let act = self.act(&deployment, plan.actions);
        if creates && !status::has_no_set(&former) {
            // Pods wait for the set: the next Deployment's must not wait for words. Where it cannot be made, the next step says so.
            let (acted, told) = tokio::join!(act, tell);
            acted?;
            told?;
        } else {
            act.await?;
            tell.await?;
        }
        Ok(Next::after([plan.check_again, behind].into_iter().flatten().min()))
    }
}
