//! The node agent: takes pods from the API and from static manifests, runs them through a container runtime (CRI), and
//! reports back. `run` ties the parts together; each part is a module beside it.
#![forbid(unsafe_code)]

pub mod certificates;
pub mod config;
pub mod env;
pub mod images;
pub mod objects;
pub mod options;
pub mod runtime;
pub mod static_pods;
pub mod volumes;
