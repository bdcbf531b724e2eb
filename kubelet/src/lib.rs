//! The node agent: takes pods from the API and from static manifests, runs them through a container runtime (CRI), and
//! reports back. `run` ties the parts together; each part is a module beside it.
#![forbid(unsafe_code)]

pub mod allocation;
pub mod certificates;
pub mod config;
pub mod csi;
pub mod dra;
mod dra_health;
pub mod env;
pub mod events;
pub mod eviction;
pub mod hollow;
mod housekeeping;
pub mod images;
pub mod metrics;
pub mod node;
pub mod objects;
pub mod options;
pub mod plan;
pub mod plugins;
pub mod pod_workers;
pub mod probes;
mod rate;
mod run;
pub mod runtime;
pub mod server;
pub mod shutdown;
pub mod static_pods;
pub mod status;
pub mod systemd;
pub mod usage;
pub mod volumes;

pub use run::run;
