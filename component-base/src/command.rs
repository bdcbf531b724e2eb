//! Programs of the host (`nft`, `iptables-restore`, `ip`, `conntrack`) that are given their orders on standard input.
use std::{process::Stdio, time::Duration};
use tokio::{io::AsyncWriteExt as _, process::Command};

const TIMEOUT: Duration = Duration::from_secs(60);

/// Why a program did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("cannot run {program}: {cause}; is it installed?")]
    Start { program: String, cause: std::io::Error },
    #[error("{program} refused: {message}")]
    Refused { program: String, message: String },
    #[error("{program} did not end within {} seconds", TIMEOUT.as_secs())]
    Timeout { program: String },
}

/// Runs `program` with `input` as its standard input; gives what it printed.
pub async fn run(program: &str, arguments: &[&str], input: &str) -> Result<String, CommandError> {
    let start = |cause| CommandError::Start { program: program.to_owned(), cause };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(start)?;
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A broken pipe shows in the exit code.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
    };
    let all = async { tokio::join!(feed, child.wait_with_output()).1 };
    let timeout = |_| CommandError::Timeout { program: program.to_owned() };
    let output = tokio::time::timeout(TIMEOUT, all).await.map_err(timeout)?.map_err(start)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    // The first lines name what is wrong; the rest repeats it for its neighbours.
    let message: Vec<String> = String::from_utf8_lossy(&output.stderr).lines().take(6).map(ToOwned::to_owned).collect();
    Err(CommandError::Refused { program: program.to_owned(), message: message.join("; ") })
}
