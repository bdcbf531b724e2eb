//! `bench functions`: which functions run in daemons that have nothing new to do, as `.cargo/cc` wants them named. Those that do
//! not keep what little runs all the time apart, so that the kernel maps most of a program's text for a tenth of it.
//!
//! It needs root, binutils, and programs that kept their symbols; x86-64 Linux only.
mod names;
mod trace;

use std::time::Duration;

#[derive(clap::Args)]
pub struct Options {
    /// The processes, of programs with symbols
    #[arg(required = true)]
    pids: Vec<i32>,
    /// Seconds to watch them
    #[arg(long, default_value_t = 330)]
    seconds: u64,
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    let functions = trace::watch(&options.pids, Duration::from_secs(options.seconds))?;
    println!(
        "# Functions that run all the time, `a::*` for those of a module, the densest first. By `bench functions`, for `cc`."
    );
    for line in names::lines(&functions) {
        println!("{line}");
    }
    Ok(())
}
