//! The shell around every daemon: logs, the crypto provider, the runtime, signals, the exit code.
use std::process::ExitCode;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};
use tracing_subscriber::EnvFilter;

/// Of a daemon on one thread: others that wait for what blocks, and how long one that has nothing to do stays.
const BLOCKING_THREADS: usize = 16;
const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// Runs `main` until it ends. The token is cancelled on SIGTERM or SIGINT; a second signal ends the process at once.
/// An error is logged with its causes and makes the exit code 1.
pub fn run<F, Fut>(component: &'static str, verbosity: u8, main: F) -> ExitCode
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = anyhow::Result<()>>,
{
    run_on(tokio::runtime::Builder::new_multi_thread(), component, verbosity, main)
}

/// As [`run`], on one thread: for a daemon that is idle most of the time, which so needs less memory.
pub fn run_on_one_thread<F, Fut>(component: &'static str, verbosity: u8, main: F) -> ExitCode
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = anyhow::Result<()>>,
{
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    // Threads that wait for disks come and go: each that stays keeps memory of its own.
    runtime.max_blocking_threads(BLOCKING_THREADS).thread_keep_alive(KEEP_ALIVE);
    run_on(runtime, component, verbosity, main)
}

/// As [`run`], on all cores but one: for a daemon beside another one that works as much as it does. What it does on one thread
/// wakes no other.
pub fn run_beside_another<F, Fut>(component: &'static str, verbosity: u8, main: F) -> ExitCode
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = anyhow::Result<()>>,
{
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if std::env::var_os("TOKIO_WORKER_THREADS").is_none() {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        runtime.worker_threads(cores.saturating_sub(1).max(1));
    }
    run_on(runtime, component, verbosity, main)
}

fn run_on<F, Fut>(mut runtime: tokio::runtime::Builder, component: &'static str, verbosity: u8, main: F) -> ExitCode
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = anyhow::Result<()>>,
{
    init(verbosity);
    let runtime = match runtime.enable_all().thread_name(component).build() {
        Ok(runtime) => runtime,
        Err(error) => {
            error!(component, %error, "cannot start the async runtime");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        tokio::spawn(signals(component, shutdown.clone()));
        tokio::spawn(crate::memory::keep_small());
        info!(component, version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), "starting");
        main(shutdown).await
    });
    // What is still running holds nothing that must be saved: state is in etcd, the runtime and the kernel.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => {
            info!(component, "ended");
            ExitCode::SUCCESS
        }
        Err(error) => {
            error!(component, error = format!("{error:#}"), "failed");
            ExitCode::FAILURE
        }
    }
}

/// Logs to standard error, and the one crypto provider. For programs that are no daemons, and for tests.
pub fn init(verbosity: u8) {
    let level = if verbosity >= 4 { "debug" } else { "info" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    // Both fail only when they were done before, by a test in the same process.
    let _ = logs.try_init();
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

async fn signals(component: &'static str, shutdown: CancellationToken) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        error!(component, "cannot listen for signals; end the process with SIGKILL");
        return;
    };
    for _ in 0..2 {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        if shutdown.is_cancelled() {
            break;
        }
        info!(component, signal = name, "stopping");
        shutdown.cancel();
    }
    std::process::exit(1);
}
