//! rbac.authorization.k8s.io/v1: roles and bindings, of namespaces and of the cluster.

pub mod binding;
pub mod role;
