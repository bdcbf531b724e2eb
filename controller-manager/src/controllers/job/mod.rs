//! Jobs: pods that run until enough of them succeeded.
mod indexes;
mod plan;

use super::{
    claim::{claim, controller_reference},
    pod_control::PodControl,
};
use crate::runtime::{
    Context, Expectations, Index, Next, Reconcile, SyncError, WorkQueue, api_in, gone_is_fine, is_code, orphans_of, run,
};
use apimachinery::{labels::Selector, meta::NamespacedName, pod::controller_of};
use component_base::{
    events::{Type, reference},
    informer::{Change, Informer},
};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use k8s_openapi::{
    api::{
        batch::v1::Job,
        core::v1::{EnvVar, Pod, PodTemplateSpec},
    },
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
};
use plan::{FINALIZER, INDEX, Plan};
use serde_json::json;
use std::{sync::Arc, time::Duration};

const NAME: &str = "job";
const PARALLEL: usize = 16;

struct Controller {
    jobs: Informer<Job>,
    pods: Arc<Index<Pod>>,
    expectations: Expectations,
    control: PodControl,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("job-controller").await else { return };
    let (jobs, pods) = (context.informers.get::<Job>(), context.informers.get::<Pod>());
    let controller = Arc::new(Controller {
        jobs: jobs.clone(),
        pods: context.pods_by_controller(),
        expectations: Expectations::default(),
        control: PodControl { recorder: context.recorder(&client, "job-controller"), client },
    });
    let queue = Arc::new(WorkQueue::new(NAME));
    let to = queue.clone();
    jobs.on_change(move |change| {
        change.latest().into_iter().for_each(|j| to.add(NamespacedName::of(j.as_ref())));
    });
    let (to, seen_by) = (queue.clone(), controller.clone());
    pods.on_change(move |change| seen_by.pod_changed(change, &to));
    jobs.synced().await;
    pods.synced().await;
    run(NAME, queue, controller, context.settings.concurrent_job_syncs, context.shutdown.clone()).await;
}

/// What the pod for one index, or any pod, is made from.
fn template_for(job: &Job, template: &PodTemplateSpec, index: Option<i32>) -> PodTemplateSpec {
    let mut template = template.clone();
    let meta = template.metadata.get_or_insert_default();
    meta.finalizers.get_or_insert_default().push(FINALIZER.to_owned());
    let Some(index) = index else { return template };
    meta.labels.get_or_insert_default().insert(INDEX.to_owned(), index.to_string());
    meta.annotations.get_or_insert_default().insert(INDEX.to_owned(), index.to_string());
    let spec = template.spec.get_or_insert_default();
    spec.hostname.get_or_insert_with(|| format!("{}-{index}", job.metadata.name.as_deref().unwrap_or_default()));
    let variable =
        EnvVar { name: "JOB_COMPLETION_INDEX".to_owned(), value: Some(index.to_string()), ..EnvVar::default() };
    for container in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
        let variables = container.env.get_or_insert_default();
        if !variables.iter().any(|v| v.name == variable.name) {
            variables.push(variable.clone());
        }
    }
    template
}

impl Controller {
    fn pod_changed(&self, change: Change<'_, Pod>, queue: &WorkQueue<NamespacedName>) {
        for pod in change.old.into_iter().chain(change.new) {
            let Some(owner) = controller_of(&pod.metadata).filter(|o| o.kind == "Job") else { continue };
            let key = NamespacedName::new(pod.metadata.namespace.clone().unwrap_or_default(), &owner.name);
            if change.old.is_none() {
                self.expectations.creation_observed(&key);
            }
            if change.new.is_none_or(|p| p.metadata.deletion_timestamp.is_some()) {
                self.expectations.deletion_observed(&key, pod.metadata.uid.as_deref().unwrap_or_default());
            }
            queue.add(key);
        }
    }

    async fn claim_pods(&self, key: &NamespacedName, job: &Job) -> Result<Vec<Arc<Pod>>, SyncError> {
        let selector = Selector::from_label_selector_opt(job.spec.as_ref().and_then(|s| s.selector.as_ref()))
            .map_err(|e| SyncError::Invalid(format!("selector: {e}")))?;
        let uid = job.metadata.uid.as_deref();
        let mut candidates = self.pods.get(uid.unwrap_or_default());
        candidates.extend(self.pods.get(&orphans_of(&key.namespace)));
        let claimed = claim(&job.metadata, &selector, candidates);
        for pod in &claimed.release {
            self.control.release(pod, uid).await?;
        }
        let mut owned = claimed.owned;
        for pod in claimed.adopt {
            self.control.adopt(&pod, &controller_reference(job)).await?;
            owned.push(pod);
        }
        Ok(owned)
    }

    /// Takes our finalizer off a pod. The version makes it fail if its finalizers changed meanwhile.
    async fn let_go(&self, pod: &Pod) -> Result<(), kube::Error> {
        let kept: Vec<_> = pod.metadata.finalizers.iter().flatten().filter(|f| *f != FINALIZER).collect();
        let patch = json!({"metadata": {"uid": pod.metadata.uid, "resourceVersion": pod.metadata.resource_version,
            "finalizers": if kept.is_empty() { serde_json::Value::Null } else { json!(kept) }}});
        let api = api_in::<Pod>(&self.control.client, pod.metadata.namespace.as_deref().unwrap_or_default());
        gone_is_fine(api.patch_metadata(&pod.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await)?;
        Ok(())
    }

    async fn act(&self, key: &NamespacedName, job: &Job, plan: &Plan) -> Result<(), SyncError> {
        let about = reference(job);
        for (warns, reason, message) in &plan.events {
            let kind = if *warns { Type::Warning } else { Type::Normal };
            self.control.recorder.event(&about, kind, reason, "", message);
        }
        let releases: Vec<BoxFuture<'_, _>> = plan.release.iter().map(|p| self.let_go(p).boxed()).collect();
        let outcomes: Vec<_> = stream::iter(releases).buffer_unordered(PARALLEL).collect().await;
        outcomes.into_iter().collect::<Result<Vec<()>, _>>()?;

        let Some(spec) = &job.spec else { return Ok(()) };
        let (about, controller) = (&about, &controller_reference(job));
        let id = |p: &Pod| p.metadata.uid.clone().unwrap_or_default();
        self.expectations.expect(key, plan.create.len(), plan.delete.iter().map(|p| id(p)));
        let deletions = plan.delete.iter().map(|pod| -> BoxFuture<'_, Result<(), kube::Error>> {
            async move {
                let outcome = self.control.delete(pod, about).await;
                outcome.inspect_err(|_| self.expectations.deletion_observed(key, &id(pod)))
            }
            .boxed()
        });
        let creations = plan.create.iter().map(|index| -> BoxFuture<'_, Result<(), kube::Error>> {
            let template = template_for(job, &spec.template, *index);
            // A pod of an index shows it in its name.
            let prefix = index.map_or_else(|| controller.name.clone(), |i| format!("{}-{i}", controller.name));
            async move {
                let outcome = self.control.create_named(&key.namespace, &template, about, controller, &prefix).await;
                outcome.map(|_| ()).inspect_err(|_| self.expectations.creation_observed(key))
            }
            .boxed()
        });
        let all: Vec<_> = deletions.chain(creations).collect();
        let outcomes: Vec<_> = stream::iter(all).buffer_unordered(PARALLEL).collect().await;
        outcomes.into_iter().collect::<Result<Vec<()>, _>>()?;
        Ok(())
    }
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(job) = self.jobs.get(&key.namespace, &key.name) else {
            self.expectations.forget(key);
            // Pods that outlive their Job must not be held by it.
            return Ok(Next::Settled);
        };
        if job.metadata.deletion_timestamp.is_some() {
            for pod in self.pods.get(job.metadata.uid.as_deref().unwrap_or_default()) {
                if pod.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER) {
                    self.let_go(&pod).await?;
                }
            }
            return Ok(Next::Settled);
        }
        if job.spec.as_ref().and_then(|s| s.managed_by.as_deref()).is_some_and(|m| m != "kubernetes.io/job-controller")
        {
            return Ok(Next::Settled);
        }
        if !self.expectations.satisfied(key) {
            return Ok(Next::Settled);
        }
        let owned = self.claim_pods(key, &job).await?;
        let plan = plan::plan(&job, &owned, Timestamp::now());
        if job.status.as_ref() != Some(&plan.status) {
            let mut updated = job.as_ref().clone();
            updated.status = Some(plan.status.clone());
            let api = api_in::<Job>(&self.control.client, &key.namespace);
            api.replace_status(&key.name, &PostParams::default(), &updated).await?;
        }
        self.act(key, &job, &plan).await?;
        Ok(Next::after(plan.check_again))
    }
}

// === Jobs that are over and may go ===

struct Remover {
    client: Client,
    jobs: Informer<Job>,
}

/// Deletes finished Jobs after their `ttlSecondsAfterFinished`; runs until shutdown.
pub async fn start_removing(context: Arc<Context>) {
    let Some(client) = context.client_for("ttl-after-finished-controller").await else { return };
    let jobs = context.informers.get::<Job>();
    let queue = Arc::new(WorkQueue::new("ttl_jobs_to_delete"));
    let to = queue.clone();
    jobs.on_change(move |change| {
        let due = change.new.filter(|j| plan::is_finished(j) && ttl(j).is_some());
        due.into_iter().for_each(|j| to.add(NamespacedName::of(j.as_ref())));
    });
    jobs.synced().await;
    run("ttlafterfinished", queue, Arc::new(Remover { client, jobs }), 5, context.shutdown.clone()).await;
}

fn ttl(job: &Job) -> Option<i64> {
    job.spec.as_ref()?.ttl_seconds_after_finished.map(i64::from)
}

impl Reconcile for Remover {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(job) = self.jobs.get(&key.namespace, &key.name) else { return Ok(Next::Settled) };
        let ended = job.status.iter().flat_map(|s| s.conditions.iter().flatten());
        let ended = ended.filter(|c| matches!(c.type_.as_str(), "Complete" | "Failed") && c.status == "True");
        let ended = ended.filter_map(|c| c.last_transition_time.as_ref()).map(|t| t.0.as_second()).next();
        let (Some(ended), Some(ttl)) = (ended, ttl(&job)) else { return Ok(Next::Settled) };
        let left = ended + ttl - Timestamp::now().as_second();
        if let Ok(left @ 1..) = u64::try_from(left) {
            return Ok(Next::After(Duration::from_secs(left)));
        }
        let api: Api<Job> = api_in(&self.client, &key.namespace);
        let only_this = Preconditions { uid: job.metadata.uid.clone(), resource_version: None };
        let parameters = DeleteParams { preconditions: Some(only_this), ..DeleteParams::foreground() };
        match gone_is_fine(api.delete(&key.name, &parameters).await) {
            Err(error) if !is_code(&error, 409) => Err(error.into()),
            _ => Ok(Next::Settled),
        }
    }
}
