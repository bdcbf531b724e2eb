//! gRPC definitions that Pilothouse speaks, from our own `.proto` files. Field numbers and names are the wire's.
#![forbid(unsafe_code)]

/// The Container Runtime Interface (`runtime.v1`): what a kubelet asks of containerd or CRI-O.
pub mod cri {
    #![allow(clippy::all, missing_docs, unreachable_pub, rust_2018_idioms)]
    tonic::include_proto!("runtime.v1");
}

/// The gRPC health checking protocol (`grpc.health.v1`).
pub mod health {
    #![allow(clippy::all, missing_docs, unreachable_pub, rust_2018_idioms)]
    tonic::include_proto!("grpc.health.v1");
}

/// The Container Storage Interface (`csi.v1`), its node side.
pub mod csi {
    #![allow(clippy::all, missing_docs, unreachable_pub, rust_2018_idioms)]
    tonic::include_proto!("csi.v1");
}

/// How plugins register with a kubelet (`pluginregistration`).
pub mod pluginregistration {
    #![allow(clippy::all, missing_docs, unreachable_pub, rust_2018_idioms)]
    tonic::include_proto!("pluginregistration");
}

/// The device plugin API (`v1beta1`).
pub mod deviceplugin {
    #![allow(clippy::all, missing_docs, unreachable_pub, rust_2018_idioms)]
    tonic::include_proto!("v1beta1");
}

/// The pod resources API (`v1`).
pub mod podresources {
    #![allow(clippy::all, missing_docs, unreachable_pub, rust_2018_idioms)]
    tonic::include_proto!("v1");
}

/// Drivers of dynamic resources (`k8s.io.kubelet.pkg.apis.dra.v1`).
pub mod dra {
    #![allow(clippy::all, missing_docs, unreachable_pub, rust_2018_idioms)]
    tonic::include_proto!("k8s.io.kubelet.pkg.apis.dra.v1");
}

/// What drivers of dynamic resources say of their devices' health (`v1alpha1`).
pub mod dra_health {
    #![allow(clippy::all, missing_docs, unreachable_pub, rust_2018_idioms)]
    tonic::include_proto!("v1alpha1");
}
