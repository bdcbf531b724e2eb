//! Command lines as Kubernetes' components take them (pflag): `--flag=value`, `--flag value`, `--bool`, `--bool=false`,
//! underscores for dashes, repeated flags of which the last wins.
//!
//! A flag of Kubernetes that has no meaning here is listed as [`Ignored`]: it is accepted with a warning. Any other
//! unknown flag is an error that names it.
use clap::Parser;
use std::ffi::OsString;

/// A flag that is accepted and not acted upon.
#[derive(Clone, Copy, Debug)]
pub enum Ignored {
    /// Takes a value: `--name=value` or `--name value`.
    Value(&'static str),
    /// Takes a value only behind `=`.
    Bool(&'static str),
}

/// Flags that every component has.
#[derive(Clone, Debug, clap::Args)]
pub struct CommonFlags {
    /// Number for the log level verbosity: 0 to 3 inform, from 4 on debug.
    #[arg(long = "v", short = 'v', default_value_t = 0, value_name = "LEVEL")]
    pub v: u8,
}

/// Reads the process's command line; on an error or `--help` it says so and exits.
pub fn parse<F: Parser>(ignored: &[Ignored]) -> F {
    let (arguments, warnings) = without_ignored(std::env::args_os(), ignored);
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
    parse_from(arguments).unwrap_or_else(|e| e.exit())
}

/// As [`parse`], from given arguments (the program's name first), without exiting.
pub fn parse_from<F: Parser>(arguments: Vec<OsString>) -> Result<F, clap::Error> {
    let matches = F::command().args_override_self(true).try_get_matches_from(arguments)?;
    F::from_arg_matches(&matches)
}

/// Takes the ignored flags out, with a line to print for each.
pub fn without_ignored(
    arguments: impl IntoIterator<Item = OsString>,
    ignored: &[Ignored],
) -> (Vec<OsString>, Vec<String>) {
    let (mut kept, mut warnings) = (Vec::new(), Vec::new());
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        if argument == "--" {
            kept.push(argument);
            kept.extend(arguments);
            break;
        }
        let Some(flag) = argument.to_str().and_then(|a| a.strip_prefix("--")) else {
            kept.push(argument);
            continue;
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name.replace('_', "-"), Some(value)),
            None => (flag.replace('_', "-"), None),
        };
        let listed = ignored.iter().find(|i| matches!(i, Ignored::Value(n) | Ignored::Bool(n) if *n == name));
        match listed {
            Some(flag) => {
                if matches!(flag, Ignored::Value(_)) && value.is_none() {
                    arguments.next();
                }
                warnings.push(format!("flag --{name} has no meaning here and is ignored"));
            }
            None => kept.push(match value {
                Some(value) => format!("--{name}={value}").into(),
                None => format!("--{name}").into(),
            }),
        }
    }
    (kept, warnings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Parser, Debug)]
    struct Flags {
        #[arg(long)]
        port: Option<u16>,
        #[arg(long, value_delimiter = ',')]
        names: Vec<String>,
        #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true, action = clap::ArgAction::Set)]
        elect: bool,
    }

    fn read(arguments: &[&str]) -> Result<(Flags, Vec<String>), clap::Error> {
        let all = std::iter::once("x").chain(arguments.iter().copied()).map(OsString::from);
        let (kept, warnings) = without_ignored(all, &[Ignored::Value("old"), Ignored::Bool("legacy")]);
        parse_from(kept).map(|flags| (flags, warnings))
    }

    #[test]
    fn flags_are_read_as_pflag_does() {
        let (flags, warnings) =
            read(&["--port", "1", "--port=2", "--names=a,b", "--elect=false", "--old", "7", "--legacy", "--old=8"])
                .unwrap();
        assert_eq!((flags.port, flags.elect, flags.names.len(), warnings.len()), (Some(2), false, 2, 3));
        let (flags, _) = read(&["--elect"]).unwrap();
        assert!(flags.elect);
    }

    #[test]
    fn an_unknown_flag_is_named() {
        let error = read(&["--nonsense=1"]).unwrap_err().to_string();
        assert!(error.contains("--nonsense"), "{error}");
    }
}
