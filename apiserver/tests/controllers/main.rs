//! The apiserver and the controllers together, without nodes: what a cluster promises of workloads, quotas, namespaces, owners and
//! identities, as the conformance programme describes it.

mod accounts;
mod apps;
mod clocks;
#[path = "../common/mod.rs"]
mod common;
mod endpoints;
mod garbage;
mod held;
mod kubectl;
mod leaders;
mod namespaces;
mod nodes;
mod quota;
mod ranges;
mod volumes;

/// A control plane with a namespace `t`; None where it cannot be set up.
async fn start() -> Option<common::Server> {
    if !common::has_controllers() {
        return None;
    }
    let server = common::Server::start_with_controllers().await;
    ready(&server).await;
    Some(server)
}

/// Makes the namespace `t`, and waits until pods can be made in it.
async fn ready(server: &common::Server) {
    server.namespace("t").await;
    // Pods need it.
    common::eventually("the default ServiceAccount", async || {
        server
            .get("/api/v1/namespaces/t/serviceaccounts/default")
            .await
            .map_err(|error| format!("{error:?} {}", server.controllers_log()))
    })
    .await;
}
