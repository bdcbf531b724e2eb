//! Files of variables that containers write for those that come after them (`fileKeyRef`): a line a variable, `NAME='value'`,
//! the value taken as it stands between the quotes, over several lines if need be. Comments begin with `#`.

use std::collections::BTreeMap;

/// The variables of a file.
pub(super) fn parse(text: &str) -> Result<BTreeMap<String, String>, String> {
    let mut variables = BTreeMap::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (line, tail) = rest.split_once('\n').unwrap_or((rest, ""));
        let trimmed = line.trim();
        if trimmed.is_empty() || trimmed.starts_with('#') {
            rest = tail;
            continue;
        }
        let begun = line.trim_start();
        let (name, value) =
            begun.split_once('=').ok_or_else(|| format!("invalid environment variable format: {line}"))?;
        let named = |c: char| c.is_ascii_graphic() && c != '=';
        if name.is_empty() || !name.chars().all(named) {
            return Err(format!("invalid environment variable name: {name:?}"));
        }
        let Some(quoted) = value.strip_prefix('\'') else {
            variables.insert(name.to_owned(), value.trim_end().to_owned());
            rest = tail;
            continue;
        };
        // The quote that ends the value may be lines away.
        let from = rest.len() - (tail.len() + usize::from(rest.len() > line.len())) - quoted.len();
        let (value, after) =
            rest[from..].split_once('\'').ok_or_else(|| format!("unterminated single quote: {name}"))?;
        let (left, tail) = after.split_once('\n').unwrap_or((after, ""));
        if !left.trim().is_empty() && !left.trim_start().starts_with('#') {
            return Err(format!("unexpected text after the value of {name}"));
        }
        variables.insert(name.to_owned(), value.to_owned());
        rest = tail;
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_variables() {
        let text = "# made\n\nA='1 $B'\nB=two \n  C='three\nlines\n' # note\nD=''\n";
        let want = [("A", "1 $B"), ("B", "two"), ("C", "three\nlines\n"), ("D", "")];
        let want: BTreeMap<String, String> = want.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        assert_eq!(parse(text), Ok(want));
        for bad in ["A", "='x'", "A='x", "A='x' y", "A B='x'"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[A='\n# x]{0,40}") {
            let _read = parse(&text);
        }
    }
}
