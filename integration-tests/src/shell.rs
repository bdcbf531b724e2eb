//! Commands, and waiting for things to become true.
use std::{
    future::Future,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// What a command printed and how it ended.
#[derive(Clone, Debug)]
pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// Standard output of a command that must have succeeded.
    #[track_caller]
    pub fn success(self) -> String {
        assert!(self.code == 0, "the command ended with {}:\n{}\n{}", self.code, self.stdout, self.stderr);
        self.stdout
    }

    /// Standard error of a command that must have failed.
    #[track_caller]
    pub fn failure(self) -> String {
        assert!(self.code != 0, "the command should have failed:\n{}", self.stdout);
        self.stderr
    }
}

/// Runs a command to its end; one that cannot be started is an error of the test.
#[track_caller]
pub fn run(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"));
    Output {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Asks until the answer is `Ok`; after `limit` the last `Err` is the failure.
#[track_caller]
pub fn eventually<T, F, Fut>(what: &str, limit: Duration, mut ask: F) -> impl Future<Output = T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, String>>,
{
    let location = std::panic::Location::caller();
    let what = what.to_owned();
    async move {
        let started = Instant::now();
        loop {
            match ask().await {
                Ok(answer) => return answer,
                Err(last) if started.elapsed() > limit => {
                    panic!("{location}: {what}: not within {} s; last: {last}", limit.as_secs())
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }
}

pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(|file| file.is_file())
}
