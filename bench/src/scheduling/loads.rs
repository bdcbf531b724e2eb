//! The scheduler in a cluster.

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only the decision, without a cluster
    #[arg(long)]
    pub decisions: bool,
}

pub fn run(_options: Options) -> anyhow::Result<()> {
    Ok(())
}
