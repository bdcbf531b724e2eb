//! `pause`: the process that holds a pod's namespaces. It does nothing but reap the orphans that fall to it (with a shared
//! process namespace it is process 1) and end when it is told to.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

fn main() -> ExitCode {
    let mut awaited = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGCHLD] {
        awaited.add(signal);
    }
    // Blocked, so that one that comes between two waits is kept for the next.
    if let Err(error) = awaited.thread_block() {
        eprintln!("pause: signals cannot be blocked: {error}");
        return ExitCode::FAILURE;
    }
    loop {
        match awaited.wait() {
            Ok(Signal::SIGCHLD) => reap(),
            Ok(_) => return ExitCode::SUCCESS,
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                eprintln!("pause: waiting for signals failed: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
}

/// One signal may stand for many children.
fn reap() {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            return;
        }
    }
}
