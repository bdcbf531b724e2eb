//! What a client sees of the store, whatever happens to etcd: lists, watches, deletions, and how they hold under load.

mod chunks;
#[path = "../common/mod.rs"]
mod common;
mod conformance;
mod deletion;
mod history;
mod overload;
mod replay;
mod watch;
mod watches;

use common::Server;
use serde_json::Value;

pub const PATH: &str = "/api/v1/namespaces/w/configmaps";

/// A server with the namespace that [`PATH`] lies in.
pub async fn start(flags: &[&str]) -> Server {
    let server = Server::start_with(flags).await;
    server.namespace("w").await;
    server
}

pub fn version(object: &Value) -> &str {
    object["metadata"]["resourceVersion"].as_str().unwrap()
}

pub fn names(list: &Value) -> Vec<&str> {
    list["items"].as_array().unwrap().iter().map(|item| item["metadata"]["name"].as_str().unwrap()).collect()
}
