//! How many replicas a metric asks for. Pure. As `replica_calculator.go`.
use apimachinery::{
    pod::{condition, is_pod_level, is_ready, is_sidecar, phase, requests as pod_requests},
    quantity::Quantity,
};
use k8s_openapi::{
    api::core::v1::{Container, Pod},
    jiff::{SignedDuration, Timestamp},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// What a pod uses, in thousandths, when, and over how long a time.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub milli: i64,
    pub at: Timestamp,
    pub window: SignedDuration,
}

/// Samples by pod.
pub type Samples = BTreeMap<String, Sample>;

/// How far the use may be off the target, as a part of it, before anything is done.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    pub down: f64,
    pub up: f64,
}

impl Tolerance {
    fn allows(self, ratio: f64) -> bool {
        (1.0 - self.down..=1.0 + self.up).contains(&ratio)
    }
}

/// What young pods are allowed: their first use of CPU says little.
#[derive(Clone, Copy, Debug)]
pub struct Youth {
    pub cpu_initialization: Duration,
    pub initial_readiness: Duration,
}

/// What each pod's use should be on average.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// So many percent of what its containers, or one of them, request of a resource.
    Utilization { percent: i64, resource: &'a str, container: Option<&'a str> },
    /// So many thousandths; of a resource, where one is named.
    Average { milli: i64, resource: Option<&'a str> },
}

/// What is proposed, from which use: its average in thousandths, and percent of the requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Proposal {
    pub replicas: i32,
    pub average_milli: i64,
    pub utilization: Option<i64>,
}

/// The pods of a target, by what their samples are worth. As `groupPods`.
#[derive(Debug, Default, PartialEq)]
struct Groups {
    ready: i32,
    unready: BTreeSet<String>,
    missing: BTreeSet<String>,
    ignored: BTreeSet<String>,
}

fn name(pod: &Pod) -> String {
    pod.metadata.name.clone().unwrap_or_default()
}

fn group(pods: &[Pod], samples: &Samples, cpu: bool, youth: Youth, now: Timestamp) -> Groups {
    let mut groups = Groups::default();
    for pod in pods {
        let sample = samples.get(&name(pod));
        if pod.metadata.deletion_timestamp.is_some() || phase(pod) == "Failed" {
            groups.ignored.insert(name(pod));
        } else if phase(pod) == "Pending" || (cpu && sample.is_some_and(|s| is_young(pod, s, youth, now))) {
            groups.unready.insert(name(pod));
        } else if sample.is_none() {
            groups.missing.insert(name(pod));
        } else {
            groups.ready += 1;
        }
    }
    groups
}

/// Whether a pod's use of CPU says nothing yet.
fn is_young(pod: &Pod, sample: &Sample, youth: Youth, now: Timestamp) -> bool {
    let started = pod.status.as_ref().and_then(|s| s.start_time.as_ref());
    let (Some(ready), Some(started)) = (condition(pod, "Ready"), started) else { return true };
    let since = ready.last_transition_time.as_ref().map_or(started.0, |t| t.0);
    let after = |time: Timestamp, by: Duration| {
        SignedDuration::try_from(by).ok().and_then(|by| time.checked_add(by).ok()).unwrap_or(Timestamp::MAX)
    };
    let is_unready = ready.status == "False";
    if after(started.0, youth.cpu_initialization) > now {
        // It still starts: only a whole window after it got ready counts.
        return is_unready || since.checked_add(sample.window).is_ok_and(|counts| sample.at < counts);
    }
    // It never was ready.
    is_unready && after(started.0, youth.initial_readiness) > since
}

/// What a pod requests of a resource, or its containers, or one of them, in thousandths. As `calculateRequests`.
fn requests(pod: &Pod, resource: &str, container: Option<&str>) -> Result<i64, String> {
    let Some(spec) = &pod.spec else { return Ok(0) };
    let own = spec.resources.as_ref().and_then(|r| r.requests.as_ref());
    // A container that is named goes before what is asked for the pod as a whole.
    if container.is_none() && own.is_some_and(|own| own.keys().any(|name| is_pod_level(name))) {
        let whole = pod_requests(spec).get(resource).map(Quantity::milli_value);
        return whole.ok_or_else(|| format!("missing pod-level request for {resource} in Pod {}", name(pod)));
    }
    let of = |c: &Container| {
        let requests = c.resources.as_ref().and_then(|r| r.requests.as_ref());
        requests.and_then(|r| r.get(resource)).map(|q| Quantity::from(q).milli_value())
    };
    let sidecars = spec.init_containers.iter().flatten().filter(|c| is_sidecar(c));
    let missing =
        |c: &Container| format!("missing request for {resource} in container {} of Pod {}", c.name, name(pod));
    let mut all = spec.containers.iter().chain(sidecars);
    match container {
        None => all.map(|c| of(c).ok_or_else(|| missing(c))).sum(),
        Some(wanted) => {
            let found = all.find(|c| c.name == wanted);
            let found = found.ok_or_else(|| format!("container {wanted} not found in Pod {}", name(pod)))?;
            of(found).ok_or_else(|| missing(found))
        }
    }
}

/// The ratio of use and target, with the numbers behind it.
fn usage(samples: &Samples, requests: &BTreeMap<String, i64>, target: Target<'_>) -> Result<(f64, Proposal), String> {
    let known = |pod: &&String| !matches!(target, Target::Utilization { .. }) || requests.contains_key(*pod);
    let counted: Vec<&String> = samples.keys().filter(known).collect();
    let total: i64 = counted.iter().filter_map(|pod| samples.get(*pod)).map(|s| s.milli).sum();
    let average_milli = total / i64::try_from(counted.len()).unwrap_or(i64::MAX).max(1);
    let proposal = Proposal { replicas: 0, average_milli, utilization: None };
    Ok(match target {
        Target::Utilization { percent, .. } => {
            let requested: i64 = counted.iter().filter_map(|pod| requests.get(*pod)).sum();
            if requested == 0 {
                return Err("no metrics returned matched known pods".to_owned());
            }
            let utilization = total * 100 / requested;
            let ratio = utilization as f64 / percent as f64;
            (ratio, Proposal { utilization: Some(utilization), ..proposal })
        }
        Target::Average { milli, .. } => (average_milli as f64 / milli as f64, proposal),
    })
}

fn up(count: f64) -> i32 {
    // A float that is too large becomes the largest number.
    count.ceil() as i32
}

/// From a sample a pod. As `GetResourceReplicas`, `GetRawResourceReplicas` and `GetMetricReplicas`.
pub fn from_pods(
    current: i32,
    pods: &[Pod],
    mut samples: Samples,
    target: Target<'_>,
    tolerance: Tolerance,
    youth: Youth,
    now: Timestamp,
) -> Result<Proposal, String> {
    if pods.is_empty() {
        return Err("no pods returned by selector while calculating replica count".to_owned());
    }
    let resource = match target {
        Target::Utilization { resource, .. } => Some(resource),
        Target::Average { resource, .. } => resource,
    };
    let groups = group(pods, &samples, resource == Some("cpu"), youth, now);
    samples.retain(|pod, _| !groups.ignored.contains(pod) && !groups.unready.contains(pod));
    if samples.is_empty() {
        return Err("did not receive metrics for targeted pods (pods might be unready)".to_owned());
    }
    let requested = match target {
        Target::Utilization { resource, container, .. } => {
            pods.iter().map(|p| Ok((name(p), requests(p, resource, container)?))).collect::<Result<_, String>>()?
        }
        Target::Average { .. } => BTreeMap::new(),
    };
    let (ratio, seen) = usage(&samples, &requested, target)?;
    let proposes = |replicas| Ok(Proposal { replicas, ..seen });
    let grows_with_unready = !groups.unready.is_empty() && ratio > 1.0;
    if !grows_with_unready && groups.missing.is_empty() {
        return proposes(if tolerance.allows(ratio) { current } else { up(ratio * f64::from(groups.ready)) });
    }
    // What is not known is taken to be such that less is done.
    let mut assume = |pods: &BTreeSet<String>, milli: &dyn Fn(&str) -> i64| {
        for pod in pods {
            let sample = Sample { milli: milli(pod), at: now, window: SignedDuration::ZERO };
            samples.insert(pod.clone(), sample);
        }
    };
    if ratio < 1.0 {
        let full = |pod: &str| match target {
            Target::Utilization { percent, .. } => requested.get(pod).copied().unwrap_or(0) * percent.max(100) / 100,
            Target::Average { milli, .. } => milli,
        };
        assume(&groups.missing, &full);
    } else if ratio > 1.0 {
        assume(&groups.missing, &|_| 0);
    }
    if grows_with_unready {
        assume(&groups.unready, &|_| 0);
    }
    let (new_ratio, _) = usage(&samples, &requested, target)?;
    let turned = (ratio < 1.0 && new_ratio > 1.0) || (ratio > 1.0 && new_ratio < 1.0);
    if tolerance.allows(new_ratio) || turned {
        return proposes(current);
    }
    let replicas = up(new_ratio * samples.len() as f64);
    let backwards = (new_ratio < 1.0 && replicas > current) || (new_ratio > 1.0 && replicas < current);
    proposes(if backwards { current } else { replicas })
}

/// From one value for all of them together. As `GetObjectMetricReplicas` and `GetExternalMetricReplicas`.
pub fn from_total(
    current: i32,
    total_milli: i64,
    target_milli: i64,
    pods: &[Pod],
    tolerance: Tolerance,
) -> Result<i32, String> {
    let ratio = total_milli as f64 / target_milli as f64;
    if current == 0 {
        return Ok(up(ratio));
    }
    if tolerance.allows(ratio) {
        return Ok(current);
    }
    if pods.is_empty() {
        return Err(
            "unable to calculate ready pods: no pods returned by selector while calculating replica count".to_owned()
        );
    }
    let ready = pods.iter().filter(|p| phase(p) == "Running" && is_ready(p)).count();
    Ok(up(ratio * ready as f64))
}

/// From one value, a part of it for each of the replicas. As the `PerPod` variants.
pub fn from_share(status_replicas: i32, total_milli: i64, target_milli: i64, tolerance: Tolerance) -> Proposal {
    let ratio = total_milli as f64 / (target_milli as f64 * f64::from(status_replicas));
    let replicas = match tolerance.allows(ratio) {
        true => status_replicas,
        false => up(total_milli as f64 / target_milli as f64),
    };
    let average_milli = (total_milli as f64 / f64::from(status_replicas.max(1))).ceil() as i64;
    Proposal { replicas, average_milli, utilization: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const TOLERANCE: Tolerance = Tolerance { down: 0.1, up: 0.1 };
    const YOUTH: Youth =
        Youth { cpu_initialization: Duration::from_secs(300), initial_readiness: Duration::from_secs(30) };

    fn now() -> Timestamp {
        "2026-01-01T12:00:00Z".parse().unwrap()
    }

    /// A pod that requests a whole CPU: `r`eady, `u`nready and young, `p`ending, `f`ailed, `d`eleted.
    fn pod(at: usize, kind: char) -> Pod {
        let (ready, started, phase) = match kind {
            'u' => ("False", "2026-01-01T11:59:00Z", "Running"),
            'p' => ("False", "2026-01-01T11:59:00Z", "Pending"),
            'f' => ("False", "2026-01-01T10:00:00Z", "Failed"),
            _ => ("True", "2026-01-01T10:00:00Z", "Running"),
        };
        let deleted = (kind == 'd').then_some("2026-01-01T11:59:00Z");
        serde_json::from_value(json!({"metadata": {"name": format!("p{at}"), "deletionTimestamp": deleted},
            "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]},
            "status": {"phase": phase, "startTime": started, "conditions": [
                {"type": "Ready", "status": ready, "lastTransitionTime": started}]}}))
        .unwrap()
    }

    fn propose(kinds: &str, milli: &[i64], target: Target<'_>) -> Result<Proposal, String> {
        let pods: Vec<_> = kinds.chars().enumerate().map(|(at, kind)| pod(at, kind)).collect();
        let sample = |milli: &i64| Sample { milli: *milli, at: now(), window: SignedDuration::from_secs(60) };
        let samples = milli.iter().enumerate().filter(|(_, m)| **m >= 0);
        let samples = samples.map(|(at, milli)| (format!("p{at}"), sample(milli))).collect();
        let current = i32::try_from(pods.len()).unwrap();
        from_pods(current, &pods, samples, target, TOLERANCE, YOUTH, now())
    }

    #[test]
    fn replicas_follow_what_the_pods_use() {
        // Without a sample: -1.
        for (name, kinds, milli, percent, expected) in [
            ("above", "rrr", vec![300, 500, 700], 30, 5),
            ("below", "rrrrr", vec![100, 300, 500, 250, 250], 50, 3),
            ("within the tolerance", "rrr", vec![1010, 1030, 1020], 100, 3),
            ("unready ones use nothing", "uuur", vec![100, 200, 300, 1000], 50, 4),
            ("pending ones use nothing", "rrrp", vec![500, 500, 700, -1], 30, 6),
            ("unready ones do not matter below", "rru", vec![100, 100, 100], 50, 1),
            ("failed and deleted ones are left out", "rrfd", vec![800, 800, 800, 800], 50, 4),
            ("missing ones use nothing above", "rrr", vec![600, 600, -1], 50, 3),
            ("missing ones use all below", "rrr", vec![100, 100, -1], 50, 3),
            ("missing ones use all far below", "rrrr", vec![10, 10, 10, -1], 50, 2),
        ] {
            let target = Target::Utilization { percent, resource: "cpu", container: None };
            assert_eq!(propose(kinds, &milli, target).unwrap().replicas, expected, "{name}");
        }
        let average = Target::Average { milli: 15_000, resource: None };
        let got = propose("rrr", &[20_000, 10_000, 30_000], average).unwrap();
        assert_eq!(got, Proposal { replicas: 4, average_milli: 20_000, utilization: None });
    }

    #[test]
    fn what_cannot_be_computed_says_why() {
        let target = |container| Target::Utilization { percent: 50, resource: "memory", container };
        let error = propose("r", &[100], target(None)).unwrap_err();
        assert_eq!(error, "missing request for memory in container c of Pod p0");
        assert!(propose("", &[], target(None)).unwrap_err().starts_with("no pods returned"));
        assert!(propose("rr", &[], target(None)).unwrap_err().starts_with("did not receive metrics"));
    }

    #[test]
    fn requests_are_of_the_pod_or_of_its_containers() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": {
            "resources": {"requests": {"cpu": "2"}},
            "containers": [{"name": "a", "resources": {"requests": {"cpu": "500m", "memory": "1Ki"}}}, {"name": "b"}]}}))
        .unwrap();
        assert_eq!(requests(&pod, "cpu", None), Ok(2000));
        assert_eq!(requests(&pod, "memory", None), Ok(1_024_000));
        assert_eq!(
            requests(&pod, "hugepages-2Mi", None).unwrap_err(),
            "missing pod-level request for hugepages-2Mi in Pod p"
        );
        assert_eq!(requests(&pod, "cpu", Some("a")), Ok(500));
        assert_eq!(requests(&pod, "cpu", Some("b")).unwrap_err(), "missing request for cpu in container b of Pod p");
        assert_eq!(requests(&pod, "cpu", Some("c")).unwrap_err(), "container c not found in Pod p");
    }

    #[test]
    fn totals_are_shared() {
        let pods: Vec<_> = (0..4).map(|at| pod(at, 'r')).collect();
        for (current, total, target, expected) in [(4, 40, 20, 8), (4, 21, 20, 4), (4, 10, 20, 2), (0, 50, 20, 3)] {
            assert_eq!(from_total(current, total, target, &pods, TOLERANCE), Ok(expected), "{total}");
        }
        let error = from_total(4, 40, 20, &[], TOLERANCE).unwrap_err();
        assert!(error.starts_with("unable to calculate ready pods: no pods returned by selector"), "{error}");
        let shared = from_share(3, 8600, 2000, TOLERANCE);
        // The average is over the replicas there are, rounded up.
        assert_eq!((shared.replicas, shared.average_milli), (5, 2867));
        assert_eq!(from_share(3, 6100, 2000, TOLERANCE).replicas, 3);
    }
}
