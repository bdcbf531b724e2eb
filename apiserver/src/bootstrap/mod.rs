//! What the server itself puts into the store: default RBAC, namespaces, priority classes, the `kubernetes` Service,
//! the `extension-apiserver-authentication` ConfigMap. (Being filled.)

use crate::server::Context;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Runs from the time at which the store is ready until `shutdown`. `/readyz` waits for `ready()` having been called.
pub async fn run(_context: Arc<Context>, ready: impl FnOnce() + Send, shutdown: CancellationToken) {
    ready();
    shutdown.cancelled().await;
}
