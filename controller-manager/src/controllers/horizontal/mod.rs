//! HorizontalPodAutoscalers: as many replicas as the metrics ask for.
//!
//! `replicas` says how many one metric asks for, `behavior` how far to go at once; `metrics` fetches.
mod behavior;
mod metrics;
mod monitor;
mod replicas;
pub mod words;

use super::scale::Scales;
use crate::runtime::{Context, Next, Reconcile, SyncError, WorkQueue, api_in, cause, is_code, put_status, run};
use apimachinery::{
    labels::{self, Selector},
    meta::NamespacedName,
    quantity::Quantity,
    time::steady,
};
use behavior::{Bounds, Memory};
use component_base::{
    events::{Recorder, Type, reference},
    informer::Informer,
};
use k8s_openapi::{
    api::{
        autoscaling::{
            v1::Scale,
            v2::{
                ContainerResourceMetricStatus, ExternalMetricStatus, HPAScalingRules, HorizontalPodAutoscaler,
                HorizontalPodAutoscalerCondition, HorizontalPodAutoscalerStatus, MetricIdentifier, MetricSpec,
                MetricStatus, MetricTarget, MetricValueStatus, ObjectMetricStatus, PodsMetricStatus,
                ResourceMetricStatus,
            },
        },
        core::v1::Pod,
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use kube::{Client, api::ListParams};
use metrics::Metrics;
use parking_lot::Mutex;
use replicas::{Proposal, Target, Tolerance, Youth, from_pods, from_share, from_total};
use std::{
    cmp::Ordering,
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};
use words::Failure;

const NAME: &str = "horizontalpodautoscaler";

struct Controller {
    client: Client,
    recorder: Recorder,
    scales: Scales,
    metrics: Metrics,
    autoscalers: Informer<HorizontalPodAutoscaler>,
    memories: Mutex<HashMap<NamespacedName, Memory>>,
    /// What each one's target selected last.
    selectors: Mutex<HashMap<NamespacedName, Selector>>,
    period: Duration,
    downscale_window: Duration,
    tolerance: f64,
    youth: Youth,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("horizontal-pod-autoscaler").await else { return };
    let autoscalers = context.informers.get::<HorizontalPodAutoscaler>();
    let settings = &context.settings;
    let controller = Arc::new(Controller {
        recorder: context.recorder(&client, "horizontal-pod-autoscaler"),
        scales: Scales::new(client.clone()),
        metrics: Metrics { client: client.clone() },
        client,
        autoscalers: autoscalers.clone(),
        memories: Mutex::default(),
        selectors: Mutex::default(),
        period: settings.horizontal_pod_autoscaler_sync_period,
        downscale_window: settings.horizontal_pod_autoscaler_downscale_stabilization,
        tolerance: settings.horizontal_pod_autoscaler_tolerance,
        youth: Youth {
            cpu_initialization: settings.horizontal_pod_autoscaler_cpu_initialization_period,
            initial_readiness: settings.horizontal_pod_autoscaler_initial_readiness_delay,
        },
    });
    let queue = Arc::new(WorkQueue::new(NAME));
    let (to, seen_by) = (queue.clone(), controller.clone());
    autoscalers.on_change(move |change| {
        let Some(autoscaler) = change.latest() else { return };
        let key = NamespacedName::of(autoscaler.as_ref());
        if change.new.is_none() {
            seen_by.memories.lock().remove(&key);
            seen_by.selectors.lock().remove(&key);
        } else if change.old.map(|a| &a.spec) != Some(&autoscaler.spec) {
            to.add(key);
        }
    });
    autoscalers.synced().await;
    let workers = settings.concurrent_horizontal_pod_autoscaler_syncs;
    run(NAME, queue, controller, workers, context.shutdown.clone()).await;
}

/// What one metric asks for: how many, under which name, and what is said of it in the status.
struct Asked {
    replicas: i32,
    name: String,
    status: MetricStatus,
}

/// The target's pods, as far as they must be known.
struct Scaled<'a> {
    namespace: &'a str,
    selector: String,
    pods: Vec<Pod>,
    replicas: i32,
    status_replicas: i32,
    tolerance: Tolerance,
}

fn set_condition(status: &mut HorizontalPodAutoscalerStatus, kind: &str, holds: bool, reason: &str, message: &str) {
    let value = if holds { "True" } else { "False" };
    let conditions = status.conditions.get_or_insert_default();
    let former = conditions.iter().position(|c| c.type_ == kind);
    let since =
        former.map(|at| &conditions[at]).filter(|c| c.status == value).and_then(|c| c.last_transition_time.clone());
    let new = HorizontalPodAutoscalerCondition {
        type_: kind.to_owned(),
        status: value.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_transition_time: since.or(Some(Time(Timestamp::now()))),
    };
    match former {
        Some(at) => conditions[at] = new,
        None => conditions.push(new),
    }
}

fn milli(quantity: Option<&k8s_openapi::apimachinery::pkg::api::resource::Quantity>) -> Option<i64> {
    quantity.map(|q| Quantity::from(q).milli_value())
}

/// What a target asks of each pod.
fn per_pod<'a>(
    target: &MetricTarget,
    resource: Option<&'a str>,
    container: Option<&'a str>,
) -> Result<Target<'a>, String> {
    match (milli(target.average_value.as_ref()), target.average_utilization, resource) {
        (Some(milli), ..) => Ok(Target::Average { milli, resource }),
        (None, Some(percent), Some(resource)) => {
            Ok(Target::Utilization { percent: i64::from(percent), resource, container })
        }
        _ => Err("neither an average utilization target nor an average value (usage) target was set".to_owned()),
    }
}

/// The autoscalers of a namespace whose targets select any of the pods. As `hpasControllingPodsUnderSelector`.
fn controlling(selectors: &HashMap<NamespacedName, Selector>, namespace: &str, pods: &[Pod]) -> Vec<String> {
    let selects = |selector: &Selector| pods.iter().any(|pod| selector.matches_opt(pod.metadata.labels.as_ref()));
    let here = selectors.iter().filter(|(key, selector)| key.namespace == namespace && selects(selector));
    let mut keys: Vec<String> = here.map(|(key, _)| key.to_string()).collect();
    keys.sort();
    keys
}

fn average_of(proposal: &Proposal) -> MetricValueStatus {
    MetricValueStatus {
        average_value: Some(Quantity::from_milli(proposal.average_milli).to_api()),
        average_utilization: proposal.utilization.and_then(|u| i32::try_from(u).ok()),
        value: None,
    }
}

impl Controller {
    fn weigh(&self, of: &Scaled<'_>, samples: replicas::Samples, target: Target<'_>) -> Result<Proposal, String> {
        from_pods(of.replicas, &of.pods, samples, target, of.tolerance, self.youth, Timestamp::now())
    }

    /// A value for all: shared by the replicas, or the target of them together.
    fn from_value(
        of: &Scaled<'_>,
        total_milli: i64,
        target: &MetricTarget,
        source: &str,
    ) -> Result<(i32, MetricValueStatus), String> {
        if let Some(target) = milli(target.average_value.as_ref()) {
            let proposal = from_share(of.status_replicas, total_milli, target, of.tolerance);
            return Ok((proposal.replicas, average_of(&proposal)));
        }
        let target = milli(target.value.as_ref()).ok_or_else(|| {
            format!("invalid {source} metric source: neither a value target nor an average value target was set")
        })?;
        let value = Some(Quantity::from_milli(total_milli).to_api());
        let replicas = from_total(of.replicas, total_milli, target, &of.pods, of.tolerance)?;
        Ok((replicas, MetricValueStatus { value, ..MetricValueStatus::default() }))
    }

    /// As `computeReplicasForMetric`; the error is the condition's reason and its cause.
    async fn ask(&self, of: &Scaled<'_>, metric: &MetricSpec) -> Result<Asked, (&'static str, String)> {
        let type_ = metric.type_.clone();
        let mut status = MetricStatus { type_, ..MetricStatus::default() };
        let called = |name: &str, of: &str, target: &Target<'_>| match target {
            Target::Utilization { .. } => format!("{name} {of} utilization (percentage of request)"),
            Target::Average { .. } => format!("{name} resource"),
        };
        let what = |target: &MetricTarget| if target.average_value.is_some() { "usage" } else { "utilization" };
        let resource = |name: &str, e: String| format!("unable to get metrics for resource {name}: {e}");
        if let Some(source) = &metric.resource {
            const REASON: &str = "FailedGetResourceMetric";
            let fail = |e: String| (REASON, format!("failed to get {} {}: {e}", source.name, what(&source.target)));
            let target = per_pod(&source.target, Some(&source.name), None);
            let target = target.map_err(|e| (REASON, format!("invalid resource metric source: {e}")))?;
            let samples = self.metrics.resource(of.namespace, &of.selector, &source.name, None).await;
            let samples = samples.map_err(|e| fail(resource(&source.name, e)))?;
            let proposal = self.weigh(of, samples, target).map_err(fail)?;
            status.resource = Some(ResourceMetricStatus { name: source.name.clone(), current: average_of(&proposal) });
            let name = called(&source.name, "resource", &target);
            return Ok(Asked { replicas: proposal.replicas, name, status });
        }
        if let Some(source) = &metric.container_resource {
            const REASON: &str = "FailedGetContainerResourceMetric";
            let fail = |e: String| (REASON, format!("failed to get {} {}: {e}", source.name, what(&source.target)));
            let container = Some(source.container.as_str());
            let target = per_pod(&source.target, Some(&source.name), container);
            let target = target.map_err(|e| (REASON, format!("invalid resource metric source: {e}")))?;
            let samples = self.metrics.resource(of.namespace, &of.selector, &source.name, container).await;
            let samples = samples.map_err(|e| fail(resource(&source.name, e)))?;
            let proposal = self.weigh(of, samples, target).map_err(fail)?;
            status.container_resource = Some(ContainerResourceMetricStatus {
                name: source.name.clone(),
                container: source.container.clone(),
                current: average_of(&proposal),
            });
            let name = called(&source.name, "container resource", &target);
            return Ok(Asked { replicas: proposal.replicas, name, status });
        }
        if let Some(source) = &metric.pods {
            let fail = |e: String| ("FailedGetPodsMetric", e);
            let target = per_pod(&source.target, None, None).map_err(fail)?;
            let samples = self.metrics.pods(of.namespace, &of.selector, &source.metric).await;
            let samples = samples.map_err(|e| fail(format!("unable to get metric {}: {e}", source.metric.name)))?;
            let proposal = self.weigh(of, samples, target).map_err(fail)?;
            status.pods = Some(PodsMetricStatus { metric: source.metric.clone(), current: average_of(&proposal) });
            let name = format!("pods metric {}", source.metric.name);
            return Ok(Asked { replicas: proposal.replicas, name, status });
        }
        // As both sources with one value call what they scale by an average of it.
        let outside = |metric: &MetricIdentifier| {
            format!("external metric {}({})", metric.name, labels::go_text(metric.selector.as_ref()))
        };
        if let Some(source) = &metric.object {
            let fail = |e: String| ("FailedGetObjectMetric", e);
            let (object, metric) = (&source.described_object, &source.metric);
            let version = object.api_version.as_deref().unwrap_or("v1");
            let resource = self.scales.group_resource(version, &object.kind).await.map_err(|e| fail(cause(&e)))?;
            let resource = resource
                .ok_or_else(|| fail(format!("no matches for kind {:?} in version {version:?}", object.kind)))?;
            let total = self.metrics.object(of.namespace, &resource, object, metric).await.map_err(|e| {
                let (kind, name) = (&object.kind, &object.name);
                fail(format!("unable to get metric {}: {kind} on {} {name}/{e}", metric.name, of.namespace))
            })?;
            let (replicas, current) = Self::from_value(of, total, &source.target, "object").map_err(fail)?;
            let name = match source.target.average_value.is_some() {
                true => outside(metric),
                false => format!("{} metric {}", object.kind, metric.name),
            };
            status.object =
                Some(ObjectMetricStatus { current, described_object: object.clone(), metric: metric.clone() });
            return Ok(Asked { replicas, name, status });
        }
        if let Some(source) = &metric.external {
            let fail = |e: String| ("FailedGetExternalMetric", e);
            let metric = &source.metric;
            let total = self.metrics.external(of.namespace, metric).await.map_err(|e| {
                let selector = labels::go_text(metric.selector.as_ref());
                fail(format!("unable to get external metric {}/{}/{selector}: {e}", of.namespace, metric.name))
            })?;
            let (replicas, current) = Self::from_value(of, total, &source.target, "external").map_err(fail)?;
            status.external = Some(ExternalMetricStatus { current, metric: metric.clone() });
            return Ok(Asked { replicas, name: outside(metric), status });
        }
        Err(("InvalidMetricSourceType", format!("unknown metric source type {:?}", metric.type_)))
    }

    /// The most that any metric asks for. While one is unknown, no less than there is. As `computeReplicasForMetrics`.
    async fn ask_all(
        &self,
        autoscaler: &HorizontalPodAutoscaler,
        of: &Scaled<'_>,
        status: &mut HorizontalPodAutoscalerStatus,
    ) -> Result<(i32, String), Failure> {
        let (mut best, mut failure, mut seen) = (None::<(i32, String)>, None, Vec::new());
        let about = reference(autoscaler);
        let metrics = autoscaler.spec.metrics.as_deref().unwrap_or_default();
        let (mut failed, all) = (0, metrics.len());
        for metric in metrics {
            let began = Instant::now();
            let asked = self.ask(of, metric).await;
            let change = asked.as_ref().map_or(Ordering::Equal, |asked| asked.replicas.cmp(&of.replicas));
            monitor::computed(&metric.type_, change, asked.is_err(), began.elapsed());
            match asked {
                Ok(asked) => {
                    seen.push(asked.status);
                    if best.as_ref().is_none_or(|(most, _)| asked.replicas > *most) {
                        best = Some((asked.replicas, asked.name));
                    }
                }
                Err((reason, why)) => {
                    failed += 1;
                    self.recorder.event(&about, Type::Warning, reason, "", &why);
                    failure.get_or_insert_with(|| (reason, words::prefix(metric), why));
                }
            }
        }
        if let Some(best) = best.filter(|(replicas, _)| failure.is_none() || *replicas >= of.replicas) {
            status.current_metrics = Some(seen);
            return Ok(best);
        }
        // What was seen before stays in the status.
        Err(match failure {
            Some((reason, prefix, why)) => Failure {
                reason,
                told: format!("invalid metrics ({failed} invalid out of {all}), first error is: {prefix}{why}"),
                said: format!("the HPA was unable to compute the replica count: {why}"),
            },
            None => {
                let why = "no metrics are given".to_owned();
                Failure { reason: "InvalidMetricSourceType", said: why.clone(), told: why }
            }
        })
    }

    fn tolerance_of(&self, autoscaler: &HorizontalPodAutoscaler) -> Tolerance {
        let behavior = autoscaler.spec.behavior.as_ref();
        let of = |rules: Option<&HPAScalingRules>| {
            let given = rules.and_then(|r| r.tolerance.as_ref());
            given.map_or(self.tolerance, |q| Quantity::from(q).milli_value() as f64 / 1000.0)
        };
        Tolerance {
            up: of(behavior.and_then(|b| b.scale_up.as_ref())),
            down: of(behavior.and_then(|b| b.scale_down.as_ref())),
        }
    }

    /// The pods that the target's scale selects.
    async fn scaled<'a>(
        &self,
        autoscaler: &HorizontalPodAutoscaler,
        namespace: &'a str,
        scale: &Scale,
    ) -> Result<Scaled<'a>, Failure> {
        let selector = scale.status.as_ref().and_then(|s| s.selector.clone()).unwrap_or_default();
        let warn = |event: &str, reason: &'static str, said: String, told: String| {
            self.recorder.event(&reference(autoscaler), Type::Warning, event, "", &told);
            Failure { reason, said, told }
        };
        if selector.is_empty() {
            let said = "the HPA target's scale is missing a selector".to_owned();
            return Err(warn("SelectorRequired", "InvalidSelector", said, "selector is required".to_owned()));
        }
        let parsed = Selector::parse(&selector).map_err(|error| {
            let why = format!("couldn't convert selector into a corresponding internal selector object: {error}");
            warn("InvalidSelector", "InvalidSelector", why.clone(), why)
        })?;
        let parameters = ListParams::default().labels(&selector).match_any();
        let listed = api_in::<Pod>(&self.client, namespace).list(&parameters).await;
        let pods = listed.map_err(|error| {
            let why = format!("unable to list pods: {}", cause(&error));
            Failure { reason: "FailedGetPods", said: why.clone(), told: why }
        })?;
        let pods = pods.items;
        let others = {
            let mut all = self.selectors.lock();
            all.insert(NamespacedName::of(autoscaler), parsed);
            controlling(&all, namespace, &pods)
        };
        if others.len() > 1 {
            let others = others.join(" ");
            let why = format!("pods by selector {selector} are controlled by multiple HPAs: [{others}]");
            return Err(warn("AmbiguousSelector", "AmbiguousSelector", why.clone(), why));
        }
        Ok(Scaled {
            namespace,
            selector,
            pods,
            replicas: scale.spec.as_ref().and_then(|s| s.replicas).unwrap_or(0),
            status_replicas: scale.status.as_ref().map_or(0, |s| s.replicas),
            tolerance: self.tolerance_of(autoscaler),
        })
    }

    /// The size that is wanted and why; None to leave things as they are.
    async fn desired(
        &self,
        key: &NamespacedName,
        autoscaler: &HorizontalPodAutoscaler,
        scale: &Scale,
        status: &mut HorizontalPodAutoscalerStatus,
    ) -> Option<(i32, String)> {
        let spec = &autoscaler.spec;
        let current = scale.spec.as_ref().and_then(|s| s.replicas).unwrap_or(0);
        let (least, most) = (spec.min_replicas.unwrap_or(1), spec.max_replicas);
        let now = steady();
        self.memories.lock().entry(key.clone()).or_default().begin(current, now);
        let unasked = match current {
            0 if least != 0 => {
                let message = "scaling is disabled since the replica count of the target is zero";
                set_condition(status, "ScalingActive", false, "ScalingDisabled", message);
                Some((0, ""))
            }
            _ if current > most => Some((most, "Current number of replicas above Spec.MaxReplicas")),
            _ if current < least => Some((least, "Current number of replicas below Spec.MinReplicas")),
            _ => None,
        };
        if let Some((replicas, why)) = unasked {
            status.current_metrics = None;
            return Some((replicas, why.to_owned()));
        }
        let asked = match self.scaled(autoscaler, &key.namespace, scale).await {
            Ok(of) => self.ask_all(autoscaler, &of, status).await,
            Err(failure) => Err(failure),
        };
        let (wanted, metric) = match asked {
            Ok(asked) => asked,
            Err(Failure { reason, said, told }) => {
                set_condition(status, "ScalingActive", false, reason, &said);
                let about = reference(autoscaler);
                self.recorder.event(&about, Type::Warning, "FailedComputeMetricsReplicas", "", told);
                return None;
            }
        };
        let message = format!("the HPA was able to successfully calculate a replica count from {metric}");
        set_condition(status, "ScalingActive", true, "ValidMetricFound", &message);
        let bounds =
            Bounds { current, least, most, behavior: spec.behavior.as_ref(), downscale_window: self.downscale_window };
        let decision = self.memories.lock().entry(key.clone()).or_default().decide(wanted, bounds, now);
        for (kind, (holds, reason, message)) in [("AbleToScale", decision.able), ("ScalingLimited", decision.limited)] {
            set_condition(status, kind, holds, reason, message);
        }
        let why = match wanted.cmp(&current) {
            Ordering::Greater => format!("{metric} above target"),
            Ordering::Less => "All metrics below target".to_owned(),
            Ordering::Equal => String::new(),
        };
        Some((decision.replicas, why))
    }

    /// As `reconcileAutoscaler`.
    async fn step(
        &self,
        key: &NamespacedName,
        autoscaler: &HorizontalPodAutoscaler,
    ) -> Result<HorizontalPodAutoscalerStatus, SyncError> {
        let about = reference(autoscaler);
        let target = &autoscaler.spec.scale_target_ref;
        let version = target.api_version.as_deref().unwrap_or("v1");
        let mut status = autoscaler.status.clone().unwrap_or_default();
        status.observed_generation = autoscaler.metadata.generation;
        let warn = |reason: &str, message: String| self.recorder.event(&about, Type::Warning, reason, "", message);
        let scale = match self.scales.get(&key.namespace, version, &target.kind, &target.name).await {
            Ok(Some(scale)) => Ok(scale),
            Ok(None) => {
                let group = version.split_once('/').map_or("", |(group, _)| group);
                let known = self.scales.group_resource(version, &target.kind).await;
                Err(match known.is_ok_and(|resource| resource.is_some()) {
                    true => "the server could not find the requested resource".to_owned(),
                    false => format!("no matches for kind {:?} in group {group:?}", target.kind),
                })
            }
            Err(error) => Err(cause(&error)),
        };
        let mut scale = match scale {
            Ok(scale) => scale,
            Err(why) => {
                let message = format!("the HPA controller was unable to get the target's current scale: {why}");
                set_condition(&mut status, "AbleToScale", false, "FailedGetScale", &message);
                warn("FailedGetScale", why);
                return Ok(status);
            }
        };
        let message = "the HPA controller was able to get the target's current scale";
        set_condition(&mut status, "AbleToScale", true, "SucceededGetScale", message);
        let current = scale.spec.as_ref().and_then(|s| s.replicas).unwrap_or(0);
        status.current_replicas = Some(current);
        let Some((desired, why)) = self.desired(key, autoscaler, &scale, &mut status).await else { return Ok(status) };
        let before = std::mem::replace(&mut status.desired_replicas, desired);
        if desired == current {
            return Ok(status);
        }
        scale.spec.get_or_insert_default().replicas = Some(desired);
        match self.scales.set(&key.namespace, version, &target.kind, &scale).await {
            Ok(()) => {
                let message = format!("the HPA controller was able to update the target scale to {desired}");
                set_condition(&mut status, "AbleToScale", true, "SucceededRescale", &message);
                let message = format!("New size: {desired}; reason: {why}");
                self.recorder.event(&about, Type::Normal, "SuccessfulRescale", "", message);
                self.memories.lock().entry(key.clone()).or_default().scaled(desired - current, steady());
                status.last_scale_time = Some(Time(Timestamp::now()));
            }
            // Its own controller wrote between: the next try sees that.
            Err(error) if is_code(&error, 409) => return Err(error.into()),
            Err(error) => {
                let error = cause(&error);
                warn("FailedRescale", format!("New size: {desired}; reason: {why}; error: {error}"));
                let message = format!("the HPA controller was unable to update the target scale: {error}");
                set_condition(&mut status, "AbleToScale", false, "FailedUpdateScale", &message);
                status.desired_replicas = before;
            }
        }
        Ok(status)
    }
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(autoscaler) = self.autoscalers.get(&key.namespace, &key.name) else { return Ok(Next::Settled) };
        let began = Instant::now();
        let outcome = self.step(key, &autoscaler).await;
        let is_false = |c: &HorizontalPodAutoscalerCondition| {
            c.status == "False"
                && matches!(c.type_.as_str(), "AbleToScale" | "ScalingActive")
                && c.reason.as_deref() != Some("ScalingDisabled")
        };
        let failed = outcome.as_ref().map_or(true, |status| status.conditions.iter().flatten().any(is_false));
        let size =
            |status: &HorizontalPodAutoscalerStatus| status.desired_replicas.cmp(&status.current_replicas.unwrap_or(0));
        monitor::stepped(outcome.as_ref().map_or(Ordering::Equal, size), failed, began.elapsed());
        let status = outcome?;
        if autoscaler.status.as_ref() != Some(&status) {
            let mut updated = autoscaler.as_ref().clone();
            updated.status = Some(status);
            put_status(&self.client, &updated).await?;
        }
        Ok(Next::After(self.period))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn autoscalers_of_the_same_pods_are_found() {
        let selectors =
            [("ns", "b", "app=web"), ("ns", "a", "tier in (x)"), ("ns", "c", "app=other"), ("else", "d", "app=web")];
        let selectors = selectors.map(|(namespace, name, selector)| {
            (NamespacedName::new(namespace, name), Selector::parse(selector).unwrap())
        });
        let pod = |labels| serde_json::from_value::<Pod>(json!({"metadata": {"labels": labels}})).unwrap();
        let (plain, both) = (pod(json!({"app": "web"})), pod(json!({"app": "web", "tier": "x"})));
        assert_eq!(controlling(&selectors.clone().into(), "ns", std::slice::from_ref(&plain)), ["ns/b"]);
        assert_eq!(controlling(&selectors.into(), "ns", &[plain, both]), ["ns/a", "ns/b"]);
    }
}
