//! A whole cluster on one machine, for tests: hosts that are namespaces, set up by the project's own `bootstrap` script.
//!
//! [`Lab`] is the network between hosts, and takes everything away when it goes. [`Host`] is a machine: mount, network,
//! process and host-name namespaces with the default paths private to it. [`Cluster`] is hosts with Pilothouse on them.
//!
//! Nothing outlives a test: each host's processes are in a process namespace whose first process dies with the test, even
//! when that is killed; what is left on disk and in cgroups then is removed by the next test that starts.

mod cluster;
mod host;
mod lab;
pub mod requests;
mod shell;

pub use cluster::{Cluster, Setup};
pub use host::Host;
pub use lab::Lab;
pub use shell::{Output, eventually, run};

/// True if this machine and user can run hosts; otherwise says on standard output what a test leaves out.
pub fn can_run_hosts(test: &str) -> bool {
    let missing = if !nix::unistd::geteuid().is_root() {
        Some("root".to_owned())
    } else {
        ["containerd", "etcd", "nft", "nsenter", "ip", "conntrack", "setpriv"]
            .into_iter()
            .find(|program| shell::find_program(program).is_none())
            .map(|program| format!("the program {program}"))
    };
    match missing {
        Some(what) if std::env::var_os("CI").is_some() => panic!("{test}: needs {what}, and CI leaves nothing out"),
        Some(what) => {
            println!("{test}: left out: it needs {what}");
            false
        }
        None => true,
    }
}
