//! `$(VAR)` references in env values, commands, arguments and `subPathExpr`. As Kubernetes' `expansion.Expand`: a
//! reference to an undefined name stays as it is written, `$$` is a literal `$` (so `$$(VAR)` becomes `$(VAR)`).

/// Replace every `$(NAME)` in `input` by what `lookup` knows of it; an unknown name stays as `$(NAME)`.
pub fn expand<'v>(input: &str, lookup: impl Fn(&str) -> Option<&'v str>) -> String {
    expand_noting_unknown(input, lookup).0
}

/// As [`expand`], and the names that were not known (`subPathExpr` refuses them).
pub fn expand_noting_unknown<'v>(input: &str, lookup: impl Fn(&str) -> Option<&'v str>) -> (String, Vec<String>) {
    let mut output = String::with_capacity(input.len());
    let mut unknown = Vec::new();
    let mut rest = input;
    while let Some(at) = rest.find('$') {
        output.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            output.push('$');
            rest = tail;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|reference| reference.split_once(')')) {
            match lookup(name) {
                Some(value) => output.push_str(value),
                None => {
                    unknown.push(name.to_owned());
                    output.push_str(&rest[at..at + name.len() + 3]);
                }
            }
            rest = tail;
        } else {
            output.push('$');
            rest = after;
        }
    }
    output.push_str(rest);
    (output, unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_expand_as_in_kubernetes() {
        let lookup = |name: &str| match name {
            "A" => Some("1"),
            "B" => Some("two words"),
            "EMPTY" => Some(""),
            "REF" => Some("$(A)"),
            _ => None,
        };
        let cases = [
            ("", ""),
            ("plain", "plain"),
            ("$(A)", "1"),
            ("x$(A)y$(B)z", "x1ytwo wordsz"),
            ("$(EMPTY)", ""),
            ("$(MISSING)", "$(MISSING)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$$$$(A)", "$$(A)"),
            ("$(A", "$(A"),
            ("$A", "$A"),
            ("$", "$"),
            ("$$", "$"),
            ("a$", "a$"),
            ("$()", "$()"),
            ("$(REF)", "$(A)"),
            ("é$(A)é", "é1é"),
            ("$(A)$(A)$", "11$"),
        ];
        for (input, want) in cases {
            assert_eq!(expand(input, lookup), want, "{input}");
        }
    }

    #[test]
    fn unknown_names_are_told() {
        assert_eq!(expand_noting_unknown("$(X)/$(Y)", |_| None).1, ["X", "Y"]);
    }

    proptest::proptest! {
        #[test]
        fn text_without_references_stays(text in "[^$]*") {
            proptest::prop_assert_eq!(expand(&text, |_| Some("x")), text);
        }

        #[test]
        fn what_is_escaped_comes_out_as_it_was(text in ".*") {
            proptest::prop_assert_eq!(expand(&text.replace('$', "$$"), |_| Some("x")), text);
        }

        #[test]
        fn with_nothing_known_only_escapes_change(text in "[$()A-Z]*") {
            let (expanded, _) = expand_noting_unknown(&text, |_| None);
            proptest::prop_assert!(expanded.len() <= text.len());
            proptest::prop_assert_eq!(expanded.replace('$', ""), text.replace('$', ""));
        }
    }
}
