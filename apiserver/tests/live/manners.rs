//! How the server answers who asks oddly: the table of `manners.yaml`, step by step, against one server.

use crate::common::{JSON, MERGE, Server, has_etcd};
use serde_json::Value;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_requests_are_answered_as_kubernetes_answers_them() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    server.namespace("manners").await;
    let mut wrong = Vec::new();
    for step in apimachinery::yaml::documents(include_str!("manners.yaml")).unwrap().remove(0).as_array().unwrap() {
        let asked = step["ask"].as_str().unwrap();
        let (method, path) = asked.split_once(' ').unwrap();
        let kind = match (step["type"].as_str(), method) {
            (Some(kind), _) => kind,
            (None, "PATCH") => MERGE,
            (None, _) => JSON,
        };
        let body = match &step["body"] {
            Value::Null => Vec::new(),
            Value::String(text) => text.clone().into_bytes(),
            body => body.to_string().into_bytes(),
        };
        let accept = step["accept"].as_str().unwrap_or(JSON);
        let (code, headers, answer) =
            server.raw(method, path, &[("content-type", kind), ("accept", accept)], body).await;
        let text = String::from_utf8_lossy(&answer);
        let object: Value = serde_json::from_slice(&answer).unwrap_or_default();
        let mut refuse = |why: String| wrong.push(format!("{asked} {}\n  {why}\n  {code} {text}", step["body"]));
        if code != step["code"].as_u64().unwrap_or(200) as u16 {
            refuse(format!("not {}", step["code"]));
        }
        if let Some(said) = step["says"].as_str()
            && !object["message"].as_str().unwrap_or(&text).contains(said)
        {
            refuse(format!("does not say {said}"));
        }
        for (pointer, value) in step["has"].as_object().into_iter().flatten() {
            if object.pointer(pointer).unwrap_or(&Value::Null) != value {
                refuse(format!("{pointer} is not {value}"));
            }
        }
        let warnings: Vec<&str> = headers.get_all("warning").iter().filter_map(|w| w.to_str().ok()).collect();
        if let Some(warned) = step["warns"].as_str()
            && !warnings.iter().any(|warning| warning.contains(warned))
        {
            refuse(format!("does not warn of {warned} but {warnings:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
}
