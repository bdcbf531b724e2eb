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
/// The label by which containerd's CRI plugin knows an image that garbage collection leaves alone.
const PINNED: &str = "io.cri-containerd.pinned=pinned";

/// `ctl bootstrap image`.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Build image archives: pause, dns, busybox, httpd-app-1.0, httpd-app-2.0 (default: all)
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

/// Has containerd's own client import an archive: it is wherever containerd is. What was imported is pinned, since a kubelet
/// that collected it as unused could not pull it again.
async fn import(archive: &Path, runtime: &RuntimeFlags) -> Result<()> {
    let what = archive.display().to_string();
    let printed = ctr(runtime, &["import", &what]).await.with_context(|| format!("importing {what}"))?;
    print!("{printed}");
    for name in imported_names(&printed) {
        ctr(runtime, &["label", name, PINNED]).await.with_context(|| format!("pinning {name}"))?;
    }
    Ok(())
}

/// What `ctr images import` says it unpacked: `unpacking NAME (DIGEST)...done`.
fn imported_names(printed: &str) -> Vec<&str> {
    printed.lines().filter_map(|line| line.trim().strip_prefix("unpacking ")?.split(' ').next()).collect()
}

/// Runs `ctr images` in the namespace of the kubelet's images.
async fn ctr(runtime: &RuntimeFlags, arguments: &[&str]) -> Result<String> {
    let address = runtime.container_runtime_endpoint.trim_start_matches("unix://");
    let output = Command::new("ctr")
        .args(["--address", address, "--namespace", CRI_NAMESPACE, "images"])
        .args(arguments)
        .kill_on_drop(true)
        .output()
        .await
        .context("cannot run ctr, which comes with containerd")?;
    if !output.status.success() {
        bail!("containerd at {address} refused: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// This machine's architecture by Go's name.
fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("images for {other} are not known"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imported_names_are_read_from_what_ctr_prints() {
        let printed = "unpacking docker.io/library/busybox:latest (sha256:0a1b)...done\nunpacking localhost/pause:3.10 (sha256:2c)...done\n";
        assert_eq!(imported_names(printed), ["docker.io/library/busybox:latest", "localhost/pause:3.10"]);
        assert!(imported_names("saved\n").is_empty());
    }
}
