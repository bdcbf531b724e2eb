//! The apiserver over a real etcd, asked as any client asks it.

mod access;
mod apply;
#[path = "../common/mod.rs"]
mod common;
mod content;
mod documents;
mod hostile;
mod field_validation;
mod kinds;
mod lifecycles;
mod services;
mod subresources;
