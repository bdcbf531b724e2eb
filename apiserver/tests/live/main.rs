//! The apiserver over a real etcd, asked as any client asks it.

mod access;
#[path = "../common/mod.rs"]
mod common;
mod hostile;
mod kinds;
mod lifecycles;
mod services;
mod subresources;
