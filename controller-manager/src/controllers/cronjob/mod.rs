//! CronJobs: a Job at each time of a schedule.
mod plan;

use super::{claim::controller_reference, job::finished_as};
use crate::runtime::{
    Context, Index, Next, Reconcile, SyncError, WorkQueue, api_in, cause, gone_is_fine, is_code, is_terminating,
    put_status, run,
};
use apimachinery::{meta::NamespacedName, pod::controller_of, time::rfc3339};
use component_base::{
    events::{Recorder, Type, reference},
    informer::Informer,
    metrics::register,
};
use k8s_openapi::{
    api::{
        batch::v1::{CronJob, Job},
        core::v1::ObjectReference,
    },
    jiff::{Timestamp, tz::TimeZone},
};
use kube::{
    Client, ResourceExt as _,
    api::{DeleteParams, PostParams},
};
use plan::{Plan, job_name};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use std::{
    collections::HashSet,
    sync::{Arc, LazyLock},
};

const NAME: &str = "cronjob";
/// Tells the pods of a Job the time that they are for.
const SCHEDULED_AT: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";

struct Controller {
    client: Client,
    recorder: Recorder,
    cron_jobs: Informer<CronJob>,
    jobs: Arc<Index<Job>>,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("cronjob-controller").await else { return };
    let (cron_jobs, jobs) = (context.informers.get::<CronJob>(), context.informers.get::<Job>());
    let controller = Arc::new(Controller {
        recorder: context.recorder(&client, "cronjob-controller"),
        client,
        cron_jobs: cron_jobs.clone(),
        jobs: context.jobs_by_controller(),
    });
    let queue = Arc::new(WorkQueue::new(NAME));
    let to = queue.clone();
    cron_jobs.on_change(move |change| {
        change.new.into_iter().for_each(|c| to.add(NamespacedName::of(c.as_ref())));
    });
    let to = queue.clone();
    jobs.on_change(move |change| {
        // What goes on within a Job is its own business.
        let ended = |j: &Arc<Job>| finished_as(j);
        if change.old.is_some() && change.new.is_some() && change.old.and_then(ended) == change.new.and_then(ended) {
            return;
        }
        let Some(job) = change.latest() else { return };
        if let Some(owner) = controller_of(&job.metadata).filter(|o| o.kind == "CronJob") {
            to.add(NamespacedName::new(job.namespace().unwrap_or_default(), &owner.name));
        }
    });
    cron_jobs.synced().await;
    jobs.synced().await;
    run(NAME, queue, controller, context.settings.concurrent_cron_job_syncs, context.shutdown.clone()).await;
}

/// As `getJobFromTemplate2`.
fn job_for(cron_job: &CronJob, scheduled: Timestamp) -> Job {
    let spec = &cron_job.spec;
    let template = spec.job_template.clone();
    let meta = template.metadata.unwrap_or_default();
    let zone = spec.time_zone.as_ref().and_then(|name| TimeZone::get(name).ok()).unwrap_or(TimeZone::UTC);
    let local = match zone.to_offset(scheduled) {
        offset if offset.seconds() == 0 => rfc3339(scheduled),
        offset => scheduled.display_with_offset(offset).to_string(),
    };
    let mut job = Job { spec: template.spec, ..Job::default() };
    job.metadata.name = Some(job_name(cron_job, scheduled));
    job.metadata.namespace.clone_from(&cron_job.metadata.namespace);
    job.metadata.labels = meta.labels;
    job.metadata.annotations = meta.annotations;
    job.metadata.annotations.get_or_insert_default().insert(SCHEDULED_AT.to_owned(), local);
    job.metadata.owner_references = Some(vec![controller_reference(cron_job)]);
    job
}

/// How late Jobs are.
static SKEW: LazyLock<Histogram> = LazyLock::new(|| {
    let help = "Time between when a cronjob is scheduled to be run, and when the corresponding job is created";
    let skew = Histogram::new(exponential_buckets(1.0, 2.0, 10));
    register("cronjob_controller_job_creation_skew_duration_seconds", help, skew)
});

impl Controller {
    async fn delete(&self, about: &ObjectReference, namespace: &str, name: &str) -> Result<(), SyncError> {
        let api = api_in::<Job>(&self.client, namespace);
        match gone_is_fine(api.delete(name, &DeleteParams::background()).await) {
            Ok(_) => {
                self.recorder.event(about, Type::Normal, "SuccessfulDelete", "", format!("Deleted job {name}"));
                Ok(())
            }
            Err(error) => {
                let message = format!("Deleted job: {}", cause(&error));
                self.recorder.event(about, Type::Warning, "FailedDelete", "", message);
                Err(error.into())
            }
        }
    }

    /// Makes the Job that is due and notes it as active. Not if another's has its name: whoever made that sees to it.
    async fn start_job(&self, cron_job: &CronJob, scheduled: Timestamp, plan: &mut Plan) -> Result<bool, SyncError> {
        let about = reference(cron_job);
        let job = job_for(cron_job, scheduled);
        let api = api_in::<Job>(&self.client, about.namespace.as_deref().unwrap_or_default());
        let made = match api.create(&PostParams::default(), &job).await {
            Ok(made) => {
                let message = format!("Created job {}", made.name_any());
                self.recorder.event(&about, Type::Normal, "SuccessfulCreate", "", message);
                if let Some(at) = &made.metadata.creation_timestamp {
                    SKEW.observe(at.0.duration_since(scheduled).as_secs_f64());
                }
                made
            }
            Err(error) if is_terminating(&error) => return Err(error.into()),
            // We made it, and the note was lost.
            Err(error) if is_code(&error, 409) => {
                let there = api.get(&job.name_any()).await?;
                if controller_of(&there.metadata).map(|o| &o.uid) != cron_job.metadata.uid.as_ref() {
                    return Ok(false);
                }
                there
            }
            Err(error) => {
                let message = format!("Error creating job: {}", cause(&error));
                self.recorder.event(&about, Type::Warning, "FailedCreate", "", message);
                return Err(error.into());
            }
        };
        if finished_as(&made).is_none() {
            plan.status.active.get_or_insert_default().push(reference(&made));
        }
        Ok(true)
    }

    /// Active Jobs that the server does not know.
    async fn gone(&self, cron_job: &CronJob, jobs: &[Arc<Job>]) -> Result<HashSet<Option<String>>, SyncError> {
        let api = api_in::<Job>(&self.client, cron_job.metadata.namespace.as_deref().unwrap_or_default());
        let mut gone = HashSet::new();
        for reference in cron_job.status.iter().flat_map(|s| s.active.iter().flatten()) {
            if jobs.iter().any(|j| j.metadata.uid == reference.uid) {
                continue;
            }
            let live = gone_is_fine(api.get(reference.name.as_deref().unwrap_or_default()).await)?;
            if live.is_none_or(|job| job.metadata.uid != reference.uid) {
                gone.insert(reference.uid.clone());
            }
        }
        Ok(gone)
    }
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(mut cron_job) = self.cron_jobs.get(&key.namespace, &key.name) else { return Ok(Next::Settled) };
        let jobs = self.jobs.get(cron_job.metadata.uid.as_deref().unwrap_or_default());
        let api = api_in::<CronJob>(&self.client, &key.namespace);
        let active = |j: &&Arc<Job>| {
            let mut listed = cron_job.status.iter().flat_map(|s| s.active.iter().flatten());
            finished_as(j).is_some() || listed.any(|r| r.uid == j.metadata.uid)
        };
        // A Job that is not listed may be newer than the list that the cache shows.
        if !jobs.iter().all(|j| active(&j)) {
            cron_job = Arc::new(api.get(&key.name).await?);
        }
        let gone = self.gone(&cron_job, &jobs).await?;
        let mut plan = plan::plan(&cron_job, &jobs, |r| gone.contains(&r.uid), &TimeZone::system(), Timestamp::now());
        let about = reference(cron_job.as_ref());
        for (kind, reason, message) in std::mem::take(&mut plan.events) {
            self.recorder.event(&about, kind, reason, "", message);
        }
        for active in std::mem::take(&mut plan.replace) {
            self.delete(&about, &key.namespace, active.name.as_deref().unwrap_or_default()).await?;
        }
        let mut outcome = Ok(true);
        if let Some(scheduled) = plan.start {
            outcome = self.start_job(&cron_job, scheduled, &mut plan).await;
            if !matches!(outcome, Ok(true)) {
                plan.status.last_schedule_time = cron_job.status.as_ref().and_then(|s| s.last_schedule_time.clone());
            }
        }
        if cron_job.status.clone().unwrap_or_default() != plan.status {
            let mut updated = cron_job.as_ref().clone();
            updated.status = Some(plan.status);
            put_status(&self.client, &updated).await?;
        }
        outcome?;
        for job in &plan.delete {
            self.delete(&about, &key.namespace, &job.name_any()).await?;
        }
        Ok(Next::after(plan.check_again))
    }
}
