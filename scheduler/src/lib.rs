//! The scheduler: finds a node for every pod that has none.
//!
//! `cache` holds the picture of the cluster, `queue` the pods that wait, `framework` and `plugins` what decides, `decide` the
//! decision itself; all of that is pure. `driver` feeds them from watches and carries the decisions out.

#![forbid(unsafe_code)]

pub mod cache;
pub mod config;
pub mod decide;
pub mod driver;
pub mod explain;
pub mod extender;
pub mod framework;
pub mod metrics;
#[cfg(test)]
mod naive;
pub mod options;
pub mod plugins;
pub mod queue;
pub mod resources;
pub mod server;
#[cfg(test)]
mod testing;
