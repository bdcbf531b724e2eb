//! `componentstatuses`: how the scheduler, the controller-manager and etcd are, asked when they are read. Deprecated, and still
//! what `kubectl get cs` shows.

use super::{Answer, Call, Endpoint};
use crate::proxy;
use apimachinery::fields::FieldSelector;
use apimachinery::meta::Gvr;
use apimachinery::status::StatusError;
use futures::future::{BoxFuture, join_all};
use serde_json::{Value, json};
use std::sync::Arc;

/// Name, and port on this host; etcd is asked by the store.
const COMPONENTS: [(&str, Option<u16>); 3] =
    [("controller-manager", Some(10257)), ("etcd-0", None), ("scheduler", Some(10259))];

pub fn endpoints() -> Vec<(Gvr, &'static str, Arc<dyn Endpoint>)> {
    vec![(Gvr::new("", "v1", "componentstatuses"), "", Arc::new(ComponentStatuses))]
}

struct ComponentStatuses;

impl Endpoint for ComponentStatuses {
    fn call<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Answer, StatusError>> {
        Box::pin(async move {
            let name = call.info.name.as_str();
            match call.info.verb {
                "get" => {
                    let component = COMPONENTS.iter().find(|(component, _)| *component == name);
                    let (name, port) =
                        component.ok_or_else(|| StatusError::not_found("", "componentstatuses", name))?;
                    Ok(Answer::ok(status(&call, name, *port).await))
                }
                "list" => {
                    let fields = FieldSelector::parse(call.info.query.get("fieldSelector"))
                        .map_err(|error| StatusError::bad_request(error.to_string()))?;
                    let selected = COMPONENTS.iter().filter(|(name, _)| {
                        fields.matches(|field| if field == "metadata.name" { Some(name) } else { None })
                    });
                    let items = join_all(selected.map(|(name, port)| status(&call, name, *port))).await;
                    Ok(Answer::ok(json!({
                        "kind": "ComponentStatusList", "apiVersion": "v1", "metadata": {}, "items": items,
                    })))
                }
                _ => Err(StatusError::method_not_allowed()),
            }
        })
    }
}

async fn status(call: &Call<'_>, name: &str, port: Option<u16>) -> Value {
    let health = match port {
        Some(port) => proxy::health(port).await,
        None if call.context.state.etcd_answers() => Ok("ok".to_owned()),
        None => Err("etcd does not answer".to_owned()),
    };
    let (healthy, message) = match health {
        Ok(message) => ("True", message),
        Err(message) => ("False", message),
    };
    json!({
        "kind": "ComponentStatus",
        "apiVersion": "v1",
        "metadata": {"name": name},
        "conditions": [{"type": "Healthy", "status": healthy, "message": message}],
    })
}
