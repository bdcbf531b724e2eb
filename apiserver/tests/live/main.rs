//! The apiserver over a real etcd, asked as any client asks it.

mod access;
mod apply;
#[path = "../common/mod.rs"]
mod common;
mod conformance;
mod content;
mod documents;
mod field_validation;
mod hostile;
mod kinds;
mod lifecycles;
mod manners;
mod services;
mod subresources;
mod switched;
