//! `ctl bootstrap image`: builds images from files on the machine and imports them into containerd, where a registry is
//! out of reach.

mod catalog;
mod oci;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use tokio::process::Command;

use super::files;

/// containerd's namespace of what CRI sees.
const CRI_NAMESPACE: &str = "k8s.io";

/// `ctl bootstrap image`.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Build image archives: pause, busybox, httpd-app-1.0, httpd-app-2.0 (default: all)
    Build {
        names: Vec<String>,
        /// The directory to write NAME.tar into
        #[arg(long, value_name = "DIR", default_value = ".")]
        out: PathBuf,
        /// The directory of our own static programs (default: beside ctl)
        #[arg(long, value_name = "DIR")]
        binaries: Option<PathBuf>,
    },
    /// Import image archives into containerd
    Import {
        #[arg(required = true)]
        archives: Vec<PathBuf>,
        #[command(flatten)]
        runtime: RuntimeFlags,
    },
    /// Build the images and import them
    Load {
        names: Vec<String>,
        /// The directory of our own static programs (default: beside ctl)
        #[arg(long, value_name = "DIR")]
        binaries: Option<PathBuf>,
        #[command(flatten)]
        runtime: RuntimeFlags,
    },
}

/// Which containerd.
#[derive(Debug, clap::Args)]
pub(crate) struct RuntimeFlags {
    /// Where containerd listens
    #[arg(long, value_name = "URL", default_value = "unix:///run/containerd/containerd.sock")]
    container_runtime_endpoint: String,
}

/// Runs one of the commands.
pub(crate) async fn run(command: ImageCommand) -> Result<()> {
    match command {
        ImageCommand::Build { names, out, binaries } => {
            for archive in build(&names, &out, binaries)? {
                println!("built {}", archive.display());
            }
        }
        ImageCommand::Import { archives, runtime } => {
            for archive in archives {
                import(&archive, &runtime).await?;
            }
        }
        ImageCommand::Load { names, binaries, runtime } => {
            let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
            for archive in build(&names, directory.path(), binaries)? {
                import(&archive, &runtime).await?;
            }
        }
    }
    Ok(())
}

fn build(names: &[String], out: &Path, binaries: Option<PathBuf>) -> Result<Vec<PathBuf>> {
    let binaries = binaries.map_or_else(catalog::default_binaries, Ok)?;
    let names: Vec<&str> = match names {
        [] => catalog::NAMES.to_vec(),
        names => names.iter().map(String::as_str).collect(),
    };
    let mut archives = Vec::new();
    for name in names {
        let image = catalog::image(name, &binaries).with_context(|| format!("cannot build the image {name}"))?;
        let path = out.join(format!("{name}.tar"));
        files::write(&path, oci::archive(&image, architecture()?)?, files::PUBLIC)?;
        archives.push(path);
    }
    Ok(archives)
}

/// Has containerd's own client import an archive: it is wherever containerd is.
async fn import(archive: &Path, runtime: &RuntimeFlags) -> Result<()> {
    let address = runtime.container_runtime_endpoint.trim_start_matches("unix://");
    let output = Command::new("ctr")
        .args(["--address", address, "--namespace", CRI_NAMESPACE, "images", "import"])
        .arg(archive)
        .kill_on_drop(true)
        .output()
        .await
        .context("cannot run ctr, which comes with containerd")?;
    if !output.status.success() {
        bail!(
            "containerd at {address} did not import {}: {}",
            archive.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    print!("{}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}

/// This machine's architecture by Go's name.
fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("images for {other} are not known"),
    }
}
