//! Gives a transaction to `nft`. It is applied whole or not at all.
use std::{process::Stdio, time::Duration};
use tokio::{io::AsyncWriteExt as _, process::Command};

const TIMEOUT: Duration = Duration::from_secs(60);

/// Why the kernel's rules are not what they should be.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    #[error("cannot run nft: {0}; is the nftables package installed?")]
    Start(std::io::Error),
    #[error("nft refused the rules: {0}")]
    Refused(String),
    #[error("nft did not end within {} seconds", TIMEOUT.as_secs())]
    Timeout,
}

/// Applies `transaction`.
pub async fn apply(transaction: &str) -> Result<(), NftError> {
    run(&["-f", "-"], transaction).await.map(drop)
}

/// True if the table is there. Someone may have flushed all rules behind our back.
pub async fn exists(table: &str) -> bool {
    let arguments: Vec<&str> = ["list", "chain"].into_iter().chain(table.split(' ')).chain(["services"]).collect();
    run(&arguments, "").await.is_ok()
}

async fn run(arguments: &[&str], input: &str) -> Result<String, NftError> {
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(NftError::Start)?;
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A broken pipe shows in the exit code.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
    };
    let all = async { tokio::join!(feed, child.wait_with_output()).1 };
    let output = tokio::time::timeout(TIMEOUT, all).await.map_err(|_| NftError::Timeout)?.map_err(NftError::Start)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    // The first lines name the rule; the rest repeats it for its neighbours.
    let message: Vec<String> = String::from_utf8_lossy(&output.stderr).lines().take(6).map(ToOwned::to_owned).collect();
    Err(NftError::Refused(message.join("; ")))
}
