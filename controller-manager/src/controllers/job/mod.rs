//! Jobs: pods that run until enough of them succeeded.
mod indexes;
mod metrics;
mod plan;
mod policy;

use super::{
    claim::controller_reference,
    pod_control::{PodControl, PodOwner, in_batches, new_pod, pod_changed, pod_from_template},
};
use crate::runtime::{
    Context, Expectations, Index, Next, Reconcile, SyncError, WorkQueue, api_in, gone_is_fine, is_code, put_status, run,
};
use apimachinery::{labels::Selector, meta::NamespacedName, pod::controller_of};
use component_base::{
    events::{Type, reference},
    informer::Informer,
};
use futures::FutureExt as _;
use k8s_openapi::{
    api::{
        batch::v1::Job,
        core::v1::{EnvVar, EnvVarSource, ObjectFieldSelector, Pod, PodTemplateSpec},
    },
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use plan::{FAILURES, FINALIZER, IGNORED_FAILURES, INDEX, Plan, Wanted};
use serde_json::json;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

pub use plan::finished_as;

const NAME: &str = "job";

struct Controller {
    jobs: Informer<Job>,
    pods: Arc<Index<Pod>>,
    expectations: Arc<Expectations>,
    control: PodControl,
}

/// Pods that our finalizer holds and whose Job is gone. As `syncOrphanPod`.
struct Orphans {
    jobs: Informer<Job>,
    pods: Informer<Pod>,
    control: PodControl,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("job-controller").await else { return };
    let (jobs, pods) = (context.informers.get::<Job>(), context.informers.get::<Pod>());
    let control = PodControl::new(client.clone(), context.recorder(&client, "job-controller"));
    let orphans = Orphans { jobs: jobs.clone(), pods: pods.clone(), control: control.clone() };
    let controller = Arc::new(Controller {
        jobs: jobs.clone(),
        pods: context.pods_by_controller(),
        expectations: Arc::default(),
        control,
    });
    let (queue, orphan_queue) = (Arc::new(WorkQueue::new(NAME)), Arc::new(WorkQueue::new("job_orphan_pod")));
    let (to, to_orphans, seen_by) = (queue.clone(), orphan_queue.clone(), controller.clone());
    jobs.on_change(move |change| {
        let Some(job) = change.latest() else { return };
        let key = NamespacedName::of(job.as_ref());
        if change.new.is_none() {
            seen_by.expectations.forget(&key);
            let left = seen_by.pods.get(job.metadata.uid.as_deref().unwrap_or_default());
            left.iter().for_each(|p| to_orphans.add(NamespacedName::of(p.as_ref())));
        }
        to.add(key);
    });
    let (to, to_orphans, seen_by) = (queue.clone(), orphan_queue.clone(), controller.clone());
    pods.on_change(move |change| {
        metrics::seen(change.old.map(Arc::as_ref), change.new.map(Arc::as_ref));
        if let Some(pod) = change.new.filter(|p| plan::has_finalizer(p))
            && seen_by.jobs.is_synced()
            && job_of(&seen_by.jobs, pod).is_none()
        {
            to_orphans.add(NamespacedName::of(pod.as_ref()));
        }
        pod_changed(change, &seen_by.jobs, &seen_by.expectations, &to);
    });
    jobs.synced().await;
    pods.synced().await;
    let (workers, shutdown) = (context.settings.concurrent_job_syncs, context.shutdown.clone());
    futures::join!(
        run(NAME, queue, controller, workers, shutdown.clone()),
        run("job_orphan_pod", orphan_queue, Arc::new(orphans), 1, shutdown)
    );
}

/// The Job that controls a pod.
fn job_of(jobs: &Informer<Job>, pod: &Pod) -> Option<Arc<Job>> {
    let owner = controller_of(&pod.metadata).filter(|o| o.kind == "Job")?;
    let job = jobs.get(pod.metadata.namespace.as_deref().unwrap_or_default(), &owner.name)?;
    (job.metadata.uid.as_ref() == Some(&owner.uid)).then_some(job)
}

/// Takes our finalizer off a pod. The version makes it fail if its finalizers changed meanwhile.
async fn let_go(control: &PodControl, pod: &Pod) -> Result<(), kube::Error> {
    let kept: Vec<_> = pod.metadata.finalizers.iter().flatten().filter(|f| *f != FINALIZER).collect();
    let patch = json!({"metadata": {"uid": pod.metadata.uid, "resourceVersion": pod.metadata.resource_version,
        "finalizers": if kept.is_empty() { serde_json::Value::Null } else { json!(kept) }}});
    let api = api_in::<Pod>(&control.client, pod.metadata.namespace.as_deref().unwrap_or_default());
    gone_is_fine(api.patch_metadata(&pod.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await)?;
    Ok(())
}

impl PodOwner for Job {
    const FINALIZER: Option<&'static str> = Some(FINALIZER);

    fn selector(&self) -> Result<Selector, SyncError> {
        Selector::from_label_selector_opt(self.spec.as_ref().and_then(|s| s.selector.as_ref()))
            .map_err(|e| SyncError::Invalid(format!("selector: {e}")))
    }
}

impl Reconcile for Orphans {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        if let Some(pod) = self.pods.get(&key.namespace, &key.name)
            && plan::has_finalizer(&pod)
            && job_of(&self.jobs, &pod).is_none()
        {
            let_go(&self.control, &pod).await?;
        }
        Ok(Next::Settled)
    }
}

/// A pod to make. As `podTemplate` with `addCompletionIndexEnvVariables` and `podGenerateNameWithIndex`.
fn pod_for(job: &Job, template: &PodTemplateSpec, wanted: &Wanted) -> Pod {
    let name = job.metadata.name.as_deref().unwrap_or_default();
    let mut template = template.clone();
    let meta = template.metadata.get_or_insert_default();
    meta.finalizers.get_or_insert_default().push(FINALIZER.to_owned());
    let Some(index) = wanted.index else { return pod_from_template(&template, name, &controller_reference(job)) };
    meta.labels.get_or_insert_default().insert(INDEX.to_owned(), index.to_string());
    let annotations = meta.annotations.get_or_insert_default();
    annotations.insert(INDEX.to_owned(), index.to_string());
    if let Some(failures) = wanted.failures {
        annotations.insert(FAILURES.to_owned(), failures.counted.to_string());
        if failures.ignored > 0 {
            annotations.insert(IGNORED_FAILURES.to_owned(), failures.ignored.to_string());
        }
    }
    let spec = template.spec.get_or_insert_default();
    spec.hostname.get_or_insert_with(|| format!("{name}-{index}"));
    let path = format!("metadata.labels['{INDEX}']");
    let field = ObjectFieldSelector { field_path: path, ..ObjectFieldSelector::default() };
    let variable = EnvVar {
        name: "JOB_COMPLETION_INDEX".to_owned(),
        value_from: Some(EnvVarSource { field_ref: Some(field), ..EnvVarSource::default() }),
        ..EnvVar::default()
    };
    for container in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
        let variables = container.env.get_or_insert_default();
        if !variables.iter().any(|v| v.name == variable.name) {
            variables.push(variable.clone());
        }
    }
    // A pod of an index shows it in its name.
    pod_from_template(&template, &format!("{name}-{index}"), &controller_reference(job))
}

impl Controller {
    async fn act(&self, key: &NamespacedName, job: &Job, plan: &Plan) -> Result<(), SyncError> {
        let about = reference(job);
        for (warns, reason, message) in &plan.events {
            let kind = if *warns { Type::Warning } else { Type::Normal };
            self.control.recorder.event(&about, kind, reason, "", message);
        }
        let releases = plan.release.iter().map(|p| let_go(&self.control, p).boxed()).collect();
        in_batches(releases, [plan.release.len()]).await.map_err(|(_, error)| error)?;
        let Some(spec) = &job.spec else { return Ok(()) };
        metrics::released(spec, &plan.release);
        let create = plan.create.iter().map(|wanted| new_pod(&pod_for(job, &spec.template, wanted)));
        let create = create.collect::<Result<Vec<_>, _>>()?;
        let written = self.control.write(&self.expectations, key, &about, &create, &plan.delete).await;
        written.map_err(|(_, error)| error)
    }
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(job) = self.jobs.get(&key.namespace, &key.name) else { return Ok(Next::Settled) };
        if job.metadata.deletion_timestamp.is_some() {
            for pod in self.pods.get(job.metadata.uid.as_deref().unwrap_or_default()) {
                if plan::has_finalizer(&pod) {
                    let_go(&self.control, &pod).await?;
                }
            }
            return Ok(Next::Settled);
        }
        let manager = job.spec.as_ref().and_then(|s| s.managed_by.as_deref());
        if manager.is_some_and(|m| m != "kubernetes.io/job-controller") || !self.expectations.satisfied(key) {
            return Ok(Next::Settled);
        }
        let started = Instant::now();
        let owned = self.control.claim_pods(&self.pods, job.as_ref(), &job.selector()?).await?;
        let plan = plan::plan(&job, &owned, Timestamp::now());
        if job.status.as_ref() != Some(&plan.status) {
            let mut updated = job.as_ref().clone();
            updated.status = Some(plan.status.clone());
            put_status(&self.control.client, &updated).await?;
            metrics::told(&job, &plan.status);
        }
        let outcome = self.act(key, &job, &plan).await;
        metrics::synced(&job, &plan, outcome.is_ok(), started.elapsed());
        outcome?;
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
        let due = change.new.filter(|j| finished_as(j).is_some() && ttl(j).is_some());
        due.into_iter().for_each(|j| to.add(NamespacedName::of(j.as_ref())));
    });
    jobs.synced().await;
    let workers = context.settings.concurrent_ttl_after_finished_syncs;
    run("ttlafterfinished", queue, Arc::new(Remover { client, jobs }), workers, context.shutdown.clone()).await;
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
