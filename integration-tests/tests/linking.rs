//! `.cargo/cc`, by which `bootstrap` has programs linked.
use std::{collections::HashSet, path::Path, process::Command};

/// Calls what daemons call, and what they do not.
const PROGRAM: &str = r#"
fn main() {
    let begun = std::time::Instant::now();
    let text = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
    println!("{} {:?} {}", text.trim().len(), begun.elapsed() < std::time::Duration::MAX, f64::sqrt(text.len() as f64) > 0.0);
}
"#;

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn what_runs_all_the_time_is_linked_together_and_first() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (source, program) = (directory.path().join("program.rs"), directory.path().join("program"));
    std::fs::write(&source, PROGRAM).unwrap();
    let linker = format!("-Clinker={}", root.join(".cargo/cc").display());
    output(
        Command::new("rustc")
            .args(["--edition=2024", "-O", "-Clink-arg=-fuse-ld=lld", &linker, "-o"])
            .args([&program, &source]),
    );
    assert_eq!(output(&mut Command::new(&program)), "7 true true\n");

    let list = std::fs::read_to_string(root.join(".cargo/functions")).unwrap();
    let listed: HashSet<&str> = list.lines().filter(|line| !line.starts_with('#')).collect();
    let symbols =
        output(Command::new("nm").args(["--numeric-sort", "--defined-only", "--demangle=rust"]).arg(&program));
    let functions: Vec<&str> = symbols.lines().filter_map(|line| Some(line.split_once(" t ")?.1)).collect();
    let is_listed = |name: &str| {
        let mut modules = name.match_indices("::").map(|(at, _)| format!("{}::*", &name[..at]));
        listed.contains(name) || modules.any(|module| listed.contains(module.as_str()))
    };
    let places: Vec<usize> = (0..functions.len()).filter(|at| is_listed(functions[*at])).collect();
    let (first, last) = (places.first().copied().unwrap_or(0), places.last().copied().unwrap_or(0));
    assert!(places.len() > 3 && functions.len() > 2 * places.len(), "{places:?} of {} are listed", functions.len());
    assert_eq!(last - first + 1, places.len(), "{:?} stand between", &functions[first..=last]);
}
