//! The container runtime as the kubelet sees it: a CRI client, what runs now, and how a pod's spec becomes CRI messages.

pub mod cri;
