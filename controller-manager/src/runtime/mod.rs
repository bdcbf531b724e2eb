//! What every controller runs on: shared informers, work queues, workers, expectations, credentials, events.
//!
//! A controller's `start` takes a [`Context`], asks it for informers and a client, makes a queue that the informers'
//! handlers fill, and gives a future that runs its workers until shutdown.
mod credentials;
mod discovery;
mod expectations;
mod fresh;
mod index;
mod informers;
mod metrics;
mod queue;
mod worker;

use crate::options::Settings;
use component_base::events::Recorder;
pub use credentials::{Credentials, Limits};
pub use discovery::{Discovery, ServerResource, discover};
pub use expectations::Expectations;
pub use fresh::Fresh;
pub use index::{Index, by_controller, by_node, orphans_of};
pub use informers::{Described, Informers, Watched, api_in, put_status};
use k8s_openapi::api::{
    apps::v1::{ControllerRevision, ReplicaSet},
    batch::v1::Job,
    core::v1::Pod,
};
use kube::Client;
pub use queue::WorkQueue;
use std::sync::{Arc, OnceLock};
use tokio_util::sync::CancellationToken;
pub use worker::{Next, Reconcile, SyncError, cause, gone_is_fine, is_code, is_terminating, run};

/// What controllers share.
pub struct Context {
    pub settings: Settings,
    pub informers: Informers,
    /// The process's own client: for discovery and the metadata watches.
    pub client: Client,
    pub shutdown: CancellationToken,
    credentials: Credentials,
    pods_by_controller: OnceLock<Arc<Index<Pod>>>,
    pods_by_node: OnceLock<Arc<Index<Pod>>>,
    revisions_by_controller: OnceLock<Arc<Index<ControllerRevision>>>,
    jobs_by_controller: OnceLock<Arc<Index<Job>>>,
    sets_by_controller: OnceLock<Arc<Index<ReplicaSet>>>,
}

impl Context {
    pub fn new(settings: Settings, client: Client, credentials: Credentials, shutdown: CancellationToken) -> Self {
        Self {
            settings,
            informers: Informers::new(client.clone()),
            client,
            shutdown,
            credentials,
            pods_by_controller: OnceLock::new(),
            pods_by_node: OnceLock::new(),
            revisions_by_controller: OnceLock::new(),
            jobs_by_controller: OnceLock::new(),
            sets_by_controller: OnceLock::new(),
        }
    }

    /// A client that writes in a controller's name. None when the process is to end.
    pub async fn client_for(&self, account: &str) -> Option<Client> {
        self.credentials.client(account, 1.0).await
    }

    /// As [`Context::client_for`], for one that makes so many times more requests than others.
    pub async fn chatty_client_for(&self, account: &str, times: f64) -> Option<Client> {
        self.credentials.client(account, times).await
    }

    /// Events that come from `component`.
    pub fn recorder(&self, client: &Client, component: &str) -> Recorder {
        Recorder::new(client.clone(), component, "")
    }

    pub fn pods_by_controller(&self) -> Arc<Index<Pod>> {
        self.pods_by_controller.get_or_init(|| Index::new(&self.informers.get::<Pod>(), by_controller)).clone()
    }

    pub fn pods_by_node(&self) -> Arc<Index<Pod>> {
        self.pods_by_node.get_or_init(|| Index::new(&self.informers.get::<Pod>(), by_node)).clone()
    }

    pub fn revisions_by_controller(&self) -> Arc<Index<ControllerRevision>> {
        let made = || Index::new(&self.informers.get::<ControllerRevision>(), by_controller);
        self.revisions_by_controller.get_or_init(made).clone()
    }

    pub fn jobs_by_controller(&self) -> Arc<Index<Job>> {
        self.jobs_by_controller.get_or_init(|| Index::new(&self.informers.get::<Job>(), by_controller)).clone()
    }

    pub fn sets_by_controller(&self) -> Arc<Index<ReplicaSet>> {
        self.sets_by_controller.get_or_init(|| Index::new(&self.informers.get::<ReplicaSet>(), by_controller)).clone()
    }
}
