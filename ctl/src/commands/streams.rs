//! The two ends of exec and attach: the process in the cluster and this terminal.

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, AttachParams, AttachedProcess, TerminalSize};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};

use crate::cluster::Cluster;

const BUFFER_BYTES: usize = 32 * 1024;

/// What is connected beside standard output.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Streams {
    pub(crate) stdin: bool,
    pub(crate) tty: bool,
}

/// Runs a command in a container and ends as it ends.
pub(crate) async fn exec(
    cluster: &Cluster,
    pod: &str,
    container: &str,
    command: &[String],
    streams: Streams,
) -> Result<ExitCode> {
    let streams = streams.with_real_terminal();
    let pods: Api<Pod> = Api::namespaced(cluster.upgradable()?, &cluster.namespace);
    let raw = RawMode::enter(streams)?;
    let process = pods.exec(pod, command, &streams.parameters(container)).await.map_err(explain)?;
    let outcome = connect(process, streams).await;
    drop(raw);
    outcome
}

/// Connects to a container's own process.
pub(crate) async fn attach(cluster: &Cluster, pod: &str, container: &str, streams: Streams) -> Result<ExitCode> {
    let streams = streams.with_real_terminal();
    let pods: Api<Pod> = Api::namespaced(cluster.upgradable()?, &cluster.namespace);
    let raw = RawMode::enter(streams)?;
    let process = pods.attach(pod, &streams.parameters(container)).await.map_err(explain)?;
    let outcome = connect(process, streams).await;
    drop(raw);
    outcome
}

impl Streams {
    /// A terminal is only asked for where there is one.
    fn with_real_terminal(mut self) -> Streams {
        if self.tty && self.stdin && !std::io::stdin().is_terminal() {
            eprintln!("Unable to use a TTY - input is not a terminal or the right kind of file");
            self.tty = false;
        }
        self
    }

    fn parameters(self, container: &str) -> AttachParams {
        // A terminal has one output stream.
        AttachParams {
            container: Some(container.to_owned()),
            stdin: self.stdin,
            stdout: true,
            stderr: !self.tty,
            tty: self.tty,
            max_stdin_buf_size: Some(BUFFER_BYTES),
            max_stdout_buf_size: Some(BUFFER_BYTES),
            max_stderr_buf_size: Some(BUFFER_BYTES),
        }
    }
}

/// What the server said about a connection that it did not upgrade.
fn explain(error: kube::Error) -> anyhow::Error {
    match error {
        // The kubelet answers in plain words where the apiserver has a Status.
        kube::Error::Api(status) if status.reason == "Failed to parse error data" => {
            anyhow::anyhow!("unable to upgrade connection: {}", status.message.trim())
        }
        kube::Error::Api(status) => match serde_json::to_value(&status) {
            Ok(status) => crate::cluster::RequestError::from_status(&status).into(),
            Err(error) => error.into(),
        },
        other => anyhow::Error::from(other).context("unable to upgrade connection"),
    }
}

async fn connect(mut process: AttachedProcess, streams: Streams) -> Result<ExitCode> {
    let status = process.take_status();
    let stdout = process.stdout().map(|from| tokio::spawn(copy(from, tokio::io::stdout())));
    let stderr = process.stderr().map(|from| tokio::spawn(copy(from, tokio::io::stderr())));
    // Reading standard input blocks a thread; it is not waited for.
    let stdin = process.stdin().map(|to| tokio::spawn(copy(tokio::io::stdin(), to)));
    let sizes = process.terminal_size().filter(|_| streams.tty).map(|mut to| {
        tokio::spawn(async move {
            use futures::SinkExt;
            let Ok(mut changes) = signal(SignalKind::window_change()) else { return };
            loop {
                if let Ok(size) = tcgetwinsize(std::io::stdout()) {
                    let size = TerminalSize { width: size.ws_col, height: size.ws_row };
                    if to.send(size).await.is_err() {
                        return;
                    }
                }
                if changes.recv().await.is_none() {
                    return;
                }
            }
        })
    });
    let status = match status {
        Some(status) => status.await,
        None => None,
    };
    for output in [stdout, stderr].into_iter().flatten() {
        let _ = output.await;
    }
    for task in [stdin, sizes].into_iter().flatten() {
        task.abort();
    }
    let Some(status) = status else { return Ok(ExitCode::SUCCESS) };
    if status.status.as_deref() == Some("Success") {
        return Ok(ExitCode::SUCCESS);
    }
    let causes = status.details.as_ref().and_then(|details| details.causes.as_deref()).unwrap_or_default();
    let code = causes.iter().find(|cause| cause.reason.as_deref() == Some("ExitCode"));
    match code.and_then(|cause| cause.message.as_deref()?.parse::<u8>().ok()) {
        Some(code) => {
            eprintln!("command terminated with exit code {code}");
            Ok(ExitCode::from(code))
        }
        None => bail!("{}", status.message.unwrap_or_else(|| "the command failed".to_owned())),
    }
}

/// Copies until one side ends, showing each piece at once.
async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    let mut buffer = vec![0; BUFFER_BYTES];
    while let Ok(count) = from.read(&mut buffer).await {
        if count == 0 || to.write_all(&buffer[..count]).await.is_err() || to.flush().await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

/// The terminal hands over every key as it is pressed, until this is dropped.
struct RawMode {
    before: Option<Termios>,
}

impl RawMode {
    fn enter(streams: Streams) -> Result<RawMode> {
        if !(streams.tty && streams.stdin) {
            return Ok(RawMode { before: None });
        }
        let before = tcgetattr(std::io::stdin()).context("the terminal's mode cannot be read")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw).context("the terminal's mode cannot be set")?;
        Ok(RawMode { before: Some(before) })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}
