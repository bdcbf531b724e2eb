//! `kubelet`: the Kubernetes node agent.
#![forbid(unsafe_code)]

fn main() {}
