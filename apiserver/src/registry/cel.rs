//! Expressions of policies, webhooks, custom resources and device selectors: are they well-formed? They are evaluated elsewhere.

use kube_cel::cel::parser::Parser;

use super::field::{Errors, Field};

/// As much as is parsed at all; an expression this long is no expression.
const LENGTH_MAX: usize = 16 * 1024;
/// Brackets within brackets, and signs before signs.
const DEPTH_MAX: usize = 250;
/// The levels that the parser counts: some to a bracket.
const PARSER_DEPTH_MAX: u16 = 500;
/// The parser and the tree that it makes recurse.
const STACK_BYTES: usize = 64 * 1024 * 1024;
const RESERVED: [&str; 21] = [
    "as",
    "break",
    "const",
    "continue",
    "else",
    "false",
    "for",
    "function",
    "if",
    "import",
    "in",
    "let",
    "loop",
    "namespace",
    "null",
    "package",
    "return",
    "true",
    "var",
    "void",
    "while",
];

/// Reports an expression that does not parse. One that `old` held already is left alone.
pub fn expression(field: &Field<'_, '_>, errors: &mut Errors) {
    if let Err(why) = parse(field.str()) {
        errors.invalid(field, format!("compilation failed: {why}"));
    }
}

/// May a variable be called so?
pub fn is_identifier(name: &str) -> bool {
    let start = |b: u8| b.is_ascii_alphabetic() || b == b'_';
    name.bytes().next().is_some_and(start)
        && name.bytes().all(|b| start(b) || b.is_ascii_digit())
        && !RESERVED.contains(&name)
}

/// What is wrong with an expression.
pub fn parse(expression: &str) -> Result<(), String> {
    if expression.len() > LENGTH_MAX {
        return Err(format!(
            "ERROR: <input>:-1:0: expression code point size exceeds limit: size: {}, limit {LENGTH_MAX}",
            expression.len()
        ));
    }
    if depth(expression) > DEPTH_MAX {
        return Err(format!("ERROR: <input>:-1:0: expression recursion limit exceeded: {DEPTH_MAX}"));
    }
    // The grammar recurses, and so does dropping a tree: on a stack that is deep enough for what the limits let through.
    std::thread::scope(|scope| {
        let parser = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, || {
            Parser::new()
                .enable_optional_syntax(true)
                .max_recursion_depth(PARSER_DEPTH_MAX)
                .parse(expression)
                .map(drop)
                .map_err(|error| error.to_string())
        });
        match parser.map(std::thread::ScopedJoinHandle::join) {
            Ok(Ok(parsed)) => parsed,
            Ok(Err(_)) => Err("the parser gave up".to_owned()),
            Err(error) => Err(format!("no thread to parse on: {error}")),
        }
    })
}

/// How deep brackets lie within each other, and how many signs stand in a row.
fn depth(expression: &str) -> usize {
    let (mut open, mut deepest, mut signs) = (0_usize, 0, 0);
    for byte in expression.bytes() {
        match byte {
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            b'!' | b'-' | b'?' | b'.' => signs += 1,
            b' ' | b'\t' | b'\n' | b'\r' => {}
            _ => signs = if byte.is_ascii_alphanumeric() { 0 } else { signs },
        }
        deepest = deepest.max(open + signs);
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_well_formed_or_not() {
        for good in [
            "true",
            "object.spec.replicas <= params.max && !has(object.metadata.labels)",
            "object.spec.containers.all(c, c.image.startsWith('a/'))",
            "[1, 2].exists(x, x in {'a': 1})",
            "Object{spec: Object.spec{replicas: 1}}",
            "device.attributes['gpu.example.com'].memory.isGreaterThan(quantity('10Gi'))",
            "a ? b : c",
            r#"self.matches("^[a-z]+\\d$")"#,
            "object.?spec.?replicas.orValue(0) > 1",
            "object[?'spec'].hasValue() && {?'a': object.?b}.size() == 0 && [?object.?c] == []",
            "cel.bind(x, size(object.spec.name), x > 1 && x < 5)",
            "self.all(i, v, i < v) && self.map(x, x > 1, x).size() > 0 && self.exists_one(x, x == 1u)",
            "r'a\\b' + b'c' == \"\"\"d\"\"\" || 0x1F == 31 || 1.5e3 > 2.0 || null == dyn(1)",
            "duration('1h') > duration('5m') && timestamp('2024-01-01T00:00:00Z') != object.t",
            "authorizer.group('').resource('pods').namespace('x').check('create').allowed()",
            "!has(oldObject.a) // a comment",
        ] {
            assert_eq!(parse(good), Ok(()), "{good}");
        }
        for bad in ["", "a b", "object.x >", "(", "'", "a..b", "1 +", "{", "all(x", "... [] bad expression"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hostile_expressions_are_refused_not_recursed_into() {
        for hostile in ["(".repeat(10_000), "!".repeat(10_000), "[".repeat(16_000), "-".repeat(300), "a".repeat(17_000)]
        {
            assert!(parse(&hostile).is_err());
        }
        assert_eq!(parse(&format!("1{}", "+1".repeat(8_000))), Ok(()));
        assert_eq!(parse(&format!("{}1{}", "(".repeat(50), ")".repeat(50))), Ok(()));
    }

    #[test]
    fn identifiers_are_words_that_are_not_taken() {
        assert!(is_identifier("_a1") && !is_identifier("in") && !is_identifier("1a") && !is_identifier(""));
    }
}
