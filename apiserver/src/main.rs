//! The Kubernetes API server: the only process that touches etcd, and the only way to what is in it.
#![forbid(unsafe_code)]

mod admission;
mod authentication;
mod authorization;
mod bootstrap;
mod endpoints;
mod features;
mod options;
mod proxy;
mod registry;
mod server;
mod storage;

/// Objects are many small pieces of memory that come and go: the allocator is a quarter of a write's cost with glibc's.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The version of Kubernetes whose API this is.
pub const KUBERNETES_VERSION: &str = "v1.36.0";

fn main() -> std::process::ExitCode {
    let options: options::Options = component_base::cli::parse(options::IGNORED);
    let verbosity = options.common.v;
    // Etcd is most often on the same machine.
    component_base::daemon::run_beside_another("apiserver", verbosity, async move |shutdown| {
        server::run(options, shutdown).await
    })
}
