//! Few lines for many functions: a module stands for its functions where most of its text runs.

use super::trace::Function;
use std::collections::BTreeMap;

/// So many bytes that do not run are taken along, in all programs together, for each line that is saved.
const BYTES_PER_LINE: u64 = 4 << 10;

/// Text in bytes: of all the functions that a line stands for, and of those of them that ran.
#[derive(Clone, Copy, Default)]
struct Text {
    all: u64,
    ran: u64,
}

struct Line {
    text: Text,
    name: String,
}

/// Lines that stand for every function that ran, those with the least text that does not run first: one name is that of many
/// functions, which differ in their types.
pub fn lines(functions: &[Function]) -> Vec<String> {
    let mut names: BTreeMap<&str, Text> = BTreeMap::new();
    for function in functions {
        let text = names.entry(&function.name).or_default();
        text.all += function.size;
        text.ran += if function.ran { function.size } else { 0 };
    }
    let names: Vec<(&str, Text)> = names.into_iter().collect();
    let mut lines = cover(&names, 0);
    let share = |line: &Line| line.text.ran as f64 / line.text.all.max(1) as f64;
    lines.sort_by(|a, b| share(b).total_cmp(&share(a)).then_with(|| a.name.cmp(&b.name)));
    lines.into_iter().map(|line| line.name).collect()
}

/// For names in their order, which are equal up to `from`.
fn cover(names: &[(&str, Text)], from: usize) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut rest = names;
    while let Some((name, text)) = rest.first() {
        let Some(at) = name[from..].find("::") else {
            if text.ran > 0 {
                lines.push(Line { text: *text, name: (*name).to_owned() });
            }
            rest = &rest[1..];
            continue;
        };
        let module = &name[..from + at + 2];
        let (inside, behind) = rest.split_at(rest.partition_point(|(name, _)| name.starts_with(module)));
        lines.extend(shortened(module, inside));
        rest = behind;
    }
    lines
}

/// One line for a module where that is worth it, or those for what is in it.
fn shortened(module: &str, names: &[(&str, Text)]) -> Vec<Line> {
    let single = cover(names, module.len());
    let text = names.iter().fold(Text::default(), |sum, (_, t)| Text { all: sum.all + t.all, ran: sum.ran + t.ran });
    let taken_along = text.all - single.iter().map(|line| line.text.all).sum::<u64>();
    let saved = single.len().saturating_sub(1) as u64;
    if saved > 0 && taken_along <= BYTES_PER_LINE * saved {
        return vec![Line { text, name: format!("{module}*") }];
    }
    single
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(name: &str, size: u64, ran: bool) -> Function {
        Function { name: name.to_owned(), size, ran }
    }

    #[test]
    fn a_module_stands_for_its_functions_where_little_else_comes_along() {
        let functions = [
            function("a::b::one", 100, true),
            function("a::b::two", 100, true),
            function("a::b::not", 1000, false),
            function("a::c::one", 100, true),
            function("a::c::two", 100, true),
            function("a::c::large", 1 << 20, false),
            function("b::alone", 100, true),
            function("main", 10, false),
        ];
        assert_eq!(lines(&functions), ["a::c::one", "a::c::two", "b::alone", "a::b::*"]);
    }

    #[test]
    fn functions_of_one_name_are_one_line_and_stand_behind_those_that_all_run() {
        let functions = [
            function("<Vec<T> as Drop>::drop", 100, true),
            function("<Vec<T> as Drop>::drop", 300, false),
            function("poll", 8000, true),
        ];
        assert_eq!(lines(&functions), ["poll", "<Vec<T> as Drop>::drop"]);
    }
}
