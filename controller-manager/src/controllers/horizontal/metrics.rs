//! Where metrics come from: `metrics.k8s.io`, `custom.metrics.k8s.io` and `external.metrics.k8s.io`, which others serve.
use super::replicas::{Sample, Samples};
use crate::runtime::is_code;
use apimachinery::{labels::Selector, quantity::Quantity, time::parse_duration};
use http::Request;
use k8s_openapi::{
    api::autoscaling::v2::{CrossVersionObjectReference, MetricIdentifier},
    jiff::{SignedDuration, Timestamp},
};
use kube::Client;
use serde_json::Value;
use std::fmt::Write as _;

const CUSTOM_VERSIONS: [&str; 2] = ["v1beta2", "v1beta1"];
const WINDOW: SignedDuration = SignedDuration::from_secs(60);

pub struct Metrics {
    pub client: Client,
}

fn milli(quantity: &Value) -> i64 {
    quantity.as_str().and_then(|q| Quantity::parse(q).ok()).map_or(0, |q| q.milli_value())
}

fn sample(item: &Value, milli: i64) -> Sample {
    let window = match (item["window"].as_str(), item["windowSeconds"].as_i64()) {
        (Some(text), _) => parse_duration(text).ok().and_then(|w| SignedDuration::try_from(w).ok()),
        (None, seconds) => seconds.map(SignedDuration::from_secs),
    };
    let at = item["timestamp"].as_str().and_then(|t| t.parse().ok()).unwrap_or_else(Timestamp::now);
    Sample { milli, at, window: window.unwrap_or(WINDOW) }
}

fn items(list: &Value) -> &[Value] {
    list["items"].as_array().map_or(&[], Vec::as_slice)
}

/// A selector as a part of a query.
fn query(key: &str, selector: &str) -> String {
    let mut text = format!("{key}=");
    for byte in selector.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'/' => text.push(char::from(byte)),
            // Writing to a text cannot fail.
            _ => drop(write!(text, "%{byte:02X}")),
        }
    }
    text
}

fn metric_selector(metric: &MetricIdentifier) -> Result<String, String> {
    match &metric.selector {
        None => Ok(String::new()),
        Some(selector) => Selector::from_label_selector(selector).map(|s| s.to_string()).map_err(|e| e.to_string()),
    }
}

impl Metrics {
    async fn get(&self, path: &str) -> Result<Value, kube::Error> {
        let request = Request::get(path).body(Vec::new()).map_err(kube::Error::HttpError)?;
        self.client.request(request).await
    }

    /// What the selected pods use of a resource, or one container of each. As `GetResourceMetric`.
    pub async fn resource(
        &self,
        namespace: &str,
        selector: &str,
        resource: &str,
        container: Option<&str>,
    ) -> Result<Samples, String> {
        let path =
            format!("/apis/metrics.k8s.io/v1beta1/namespaces/{namespace}/pods?{}", query("labelSelector", selector));
        let fail = |e: String| format!("unable to fetch metrics from resource metrics API: {e}");
        let list = self.get(&path).await.map_err(|e| fail(crate::runtime::cause(&e)))?;
        let mut samples = Samples::new();
        for item in items(&list) {
            let containers = item["containers"].as_array().map_or(&[][..], Vec::as_slice);
            let asked = containers.iter().filter(|c| container.is_none_or(|name| c["name"] == name));
            // A pod that does not tell all of its containers is as one that tells nothing.
            let known: Option<Vec<i64>> = asked.map(|c| c["usage"].get(resource).map(milli)).collect();
            let Some(known) = known.filter(|k| !k.is_empty()) else { continue };
            let pod = item["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            samples.insert(pod, sample(item, known.into_iter().sum()));
        }
        if samples.is_empty() {
            return Err("no metrics returned from resource metrics API".to_owned());
        }
        Ok(samples)
    }

    async fn custom(&self, namespace: &str, what: &str, query: &str) -> Result<Value, String> {
        let mut outcome = Err(String::new());
        for version in CUSTOM_VERSIONS {
            let path = format!("/apis/custom.metrics.k8s.io/{version}/namespaces/{namespace}/{what}?{query}");
            outcome = match self.get(&path).await {
                Ok(list) => return Ok(list),
                Err(error) if is_code(&error, 404) => Err(crate::runtime::cause(&error)),
                Err(error) => {
                    return Err(format!(
                        "unable to fetch metrics from custom metrics API: {}",
                        crate::runtime::cause(&error)
                    ));
                }
            };
        }
        outcome.map_err(|e: String| format!("unable to fetch metrics from custom metrics API: {e}"))
    }

    /// A metric of each of the selected pods. As `GetRawMetric`.
    pub async fn pods(&self, namespace: &str, selector: &str, metric: &MetricIdentifier) -> Result<Samples, String> {
        let both =
            format!("{}&{}", query("labelSelector", selector), query("metricLabelSelector", &metric_selector(metric)?));
        let list = self.custom(namespace, &format!("pods/*/{}", metric.name), &both).await?;
        let name = |item: &Value| item["describedObject"]["name"].as_str().unwrap_or_default().to_owned();
        Ok(items(&list).iter().map(|item| (name(item), sample(item, milli(&item["value"])))).collect())
    }

    /// A metric of one object, whose resource is `resource.group`. As `GetObjectMetric`.
    pub async fn object(
        &self,
        namespace: &str,
        resource: &str,
        object: &CrossVersionObjectReference,
        metric: &MetricIdentifier,
    ) -> Result<i64, String> {
        let selector = query("metricLabelSelector", &metric_selector(metric)?);
        let list = match object.kind.as_str() {
            "Namespace" => self.custom(&object.name, &format!("metrics/{}", metric.name), &selector).await?,
            _ => self.custom(namespace, &format!("{resource}/{}/{}", object.name, metric.name), &selector).await?,
        };
        let first = items(&list).first().ok_or("no metrics returned from custom metrics API")?;
        Ok(milli(&first["value"]))
    }

    /// The sum of a metric that belongs to no object of the cluster. As `GetExternalMetric`.
    pub async fn external(&self, namespace: &str, metric: &MetricIdentifier) -> Result<i64, String> {
        let selector = query("labelSelector", &metric_selector(metric)?);
        let path = format!("/apis/external.metrics.k8s.io/v1beta1/namespaces/{namespace}/{}?{selector}", metric.name);
        let fail = |e: kube::Error| {
            format!("unable to fetch metrics from external metrics API: {}", crate::runtime::cause(&e))
        };
        let list = self.get(&path).await.map_err(fail)?;
        match items(&list) {
            [] => Err("no metrics returned from external metrics API".to_owned()),
            all => Ok(all.iter().map(|item| milli(&item["value"])).sum()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::client::Body;
    use serde_json::json;

    /// Serves one list under one path; what else is asked for is not there.
    fn serving(path: &'static str, list: Value) -> Metrics {
        let service = tower::service_fn(move |request: Request<Body>| {
            let asked = request.uri().to_string();
            let (code, body) = match asked == path {
                true => (200, list.to_string()),
                false => {
                    (404, json!({"kind": "Status", "code": 404, "message": asked, "reason": "NotFound"}).to_string())
                }
            };
            let response = http::Response::builder().status(code).body(Body::from(body.into_bytes()));
            async move { response.map_err(tower::BoxError::from) }
        });
        Metrics { client: Client::new(service, "t") }
    }

    fn metric(name: &str) -> MetricIdentifier {
        serde_json::from_value(json!({"name": name, "selector": {"matchLabels": {"verb": "GET"}}})).unwrap()
    }

    fn numbers(samples: &Samples) -> Vec<(&str, i64)> {
        samples.iter().map(|(pod, sample)| (pod.as_str(), sample.milli)).collect()
    }

    #[tokio::test]
    async fn resources_are_summed_by_pod() {
        let container = |name: &str, cpu: &str| json!({"name": name, "usage": {"cpu": cpu}});
        let pod = |name: &str, containers: Value| json!({"metadata": {"name": name}, "timestamp": "2026-01-01T12:00:00Z", "window": "30s", "containers": containers});
        let list = json!({"items": [
            pod("a", json!([container("x", "100m"), container("y", "1")])), pod("b", json!([{"name": "x", "usage": {}}]))]});
        let path = "/apis/metrics.k8s.io/v1beta1/namespaces/t/pods?labelSelector=app%3Dweb%2Ctier%20in%20%28x%29";
        let metrics = serving(path, list);
        let all = metrics.resource("t", "app=web,tier in (x)", "cpu", None).await.unwrap();
        assert_eq!((numbers(&all), all["a"].window.as_secs()), (vec![("a", 1100)], 30));
        let one = metrics.resource("t", "app=web,tier in (x)", "cpu", Some("x")).await.unwrap();
        assert_eq!(numbers(&one), [("a", 100)]);
        let error = metrics.resource("t", "app=other", "cpu", None).await.unwrap_err();
        assert!(
            error.starts_with("unable to fetch metrics from resource metrics API: /apis/metrics.k8s.io"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn custom_metrics_are_asked_for_in_either_version() {
        let value = |name: &str| json!({"describedObject": {"name": name}, "timestamp": "2026-01-01T12:00:00Z", "value": "2500m"});
        let path = "/apis/custom.metrics.k8s.io/v1beta1/namespaces/t/pods/*/rps?labelSelector=app%3Dweb&metricLabelSelector=verb%3DGET";
        let metrics = serving(path, json!({"items": [value("a"), value("b")]}));
        let samples = metrics.pods("t", "app=web", &metric("rps")).await.unwrap();
        assert_eq!(numbers(&samples), [("a", 2500), ("b", 2500)]);

        let path = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/t/ingresses.networking.k8s.io/main/rps?metricLabelSelector=verb%3DGET";
        let object: CrossVersionObjectReference =
            serde_json::from_value(json!({"kind": "Ingress", "name": "main"})).unwrap();
        let metrics = serving(path, json!({"items": [value("main")]}));
        assert_eq!(metrics.object("t", "ingresses.networking.k8s.io", &object, &metric("rps")).await, Ok(2500));
    }

    #[tokio::test]
    async fn what_is_outside_is_summed() {
        let path = "/apis/external.metrics.k8s.io/v1beta1/namespaces/t/queue?labelSelector=verb%3DGET";
        let metrics = serving(path, json!({"items": [{"value": "3"}, {"value": "500m"}]}));
        assert_eq!(metrics.external("t", &metric("queue")).await, Ok(3500));
        assert_eq!(
            serving(path, json!({"items": []})).external("t", &metric("queue")).await.unwrap_err(),
            "no metrics returned from external metrics API"
        );
    }
}
