//! Expressions of policies, webhooks, custom resources and device selectors: are they well-formed, do they speak of what there
//! is, and what type do they come to? As cel-go's checker, in its words. They are evaluated elsewhere.

mod check;
mod cost;
mod functions;
#[cfg(test)]
mod tests;
mod types;

pub use types::Type;

use check::Checker;
use cost::Cost;
use kube_cel::cel::common::ast::{IdedExpr, SourceInfo};
use kube_cel::cel::parser::Parser;
use std::sync::Arc;

/// As much as is parsed at all; an expression this long is no expression.
const LENGTH_MAX: usize = 16 * 1024;
/// Brackets within brackets, and signs before signs.
const DEPTH_MAX: usize = 250;
/// The levels that the parser counts: some to a bracket.
const PARSER_DEPTH_MAX: u16 = 500;
/// The parser and the tree that it makes recurse.
const STACK_BYTES: usize = 64 * 1024 * 1024;
/// Faults that are told of one expression.
const FAULTS_MAX: usize = 100;
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

/// What an expression may speak of.
#[derive(Clone, Debug, Default)]
pub struct Env {
    pub variables: Vec<(&'static str, Type)>,
    /// `Object{}` and `JSONPatch{}` may be made, and paths escaped.
    pub patches: bool,
    /// `cel.bind` is there.
    pub bind: bool,
}

/// May a variable be called so?
pub fn is_identifier(name: &str) -> bool {
    let start = |b: u8| b.is_ascii_alphabetic() || b == b'_';
    name.bytes().next().is_some_and(start)
        && name.bytes().all(|b| start(b) || b.is_ascii_digit())
        && !RESERVED.contains(&name)
}

// === impl Env ===

impl Env {
    /// What an expression about a request may speak of, whose objects are of type `object`.
    pub fn of_requests(object: &Type) -> Self {
        let named = |name| functions::parse_type(name);
        let variables = vec![
            ("object", object.clone()),
            ("oldObject", object.clone()),
            ("request", named("kubernetes.AdmissionRequest")),
            ("namespaceObject", named("kubernetes.Namespace")),
            ("authorizer", named("kubernetes.authorization.Authorizer")),
            ("authorizer.requestResource", named("kubernetes.authorization.ResourceCheck")),
        ];
        Self { variables, ..Self::default() }
    }

    /// What a selector of devices may speak of.
    pub fn of_devices() -> Self {
        let variables = vec![("device", functions::parse_type("kubernetes.DRADevice"))];
        Self { variables, bind: true, ..Self::default() }
    }

    pub fn and(mut self, name: &'static str, kind: Type) -> Self {
        self.variables.push((name, kind));
        self
    }

    /// Declares a variable of a policy, `variables.name`; what it comes to is forgotten but for plain values, lists and maps.
    pub fn define(&mut self, name: &str, kind: &Type) {
        let before =
            self.variables.iter().position(|(name, _)| *name == "variables").map(|at| self.variables.remove(at));
        let mut all = if let Some((_, Type::Variables(all))) = before { all.to_vec() } else { Vec::new() };
        all.push((name.to_owned(), kind.of_variable()));
        self.variables.push(("variables", Type::Variables(all.into())));
    }

    /// Without the variables of these names, and of what is below them.
    pub fn without(mut self, names: &[&str]) -> Self {
        self.variables.retain(|(name, _)| !names.contains(&name.split('.').next().unwrap_or(name)));
        self
    }

    /// The type that an expression comes to, or why it does not, as cel-go tells it.
    pub fn compile(&self, expression: &str) -> Result<Type, String> {
        self.weigh(expression).map(|(kind, _)| kind)
    }

    /// As [`Env::compile`], with what evaluating it may cost at most.
    pub fn weigh(&self, expression: &str) -> Result<(Type, u64), String> {
        if expression.len() > LENGTH_MAX {
            let size = expression.chars().count();
            return Err(format!(
                "ERROR: <input>:-1:0: expression code point size exceeds limit: size: {size}, limit {LENGTH_MAX}"
            ));
        }
        if depth(expression) > DEPTH_MAX {
            return Err(format!("ERROR: <input>:-1:0: expression recursion limit exceeded: {DEPTH_MAX}"));
        }
        // The grammar recurses, and so does dropping a tree: on a stack that is deep enough for what the limits let through.
        std::thread::scope(|scoped| {
            let parser = std::thread::Builder::new().stack_size(STACK_BYTES);
            match parser.spawn_scoped(scoped, || self.check(expression)).map(std::thread::ScopedJoinHandle::join) {
                Ok(Ok(checked)) => checked,
                Ok(Err(_)) => Err("the parser gave up".to_owned()),
                Err(error) => Err(format!("no thread to parse on: {error}")),
            }
        })
    }

    fn check(&self, expression: &str) -> Result<(Type, u64), String> {
        let parsed = parse(expression).map_err(|errors| {
            let told = errors.iter().map(|error| tell(expression, error.pos.0, error.pos.1, &error.msg));
            told.collect::<Vec<_>>().join("\n")
        })?;
        let checked = Checker::new(self).check(&parsed);
        if checked.faults.is_empty() {
            let cost = Cost::new(&checked.types).of(&parsed);
            return Ok((checked.kind, cost));
        }
        let mut faults = checked.faults;
        let places = places(expression);
        let place = |id: u64| places.as_ref().and_then(|places| places.offset_for(id)).map_or(0, |(start, _)| start);
        faults.sort_by_key(|(id, _)| place(*id));
        faults.dedup();
        let told = faults.iter().take(FAULTS_MAX).map(|(id, why)| {
            let before = expression.get(..place(*id) as usize).unwrap_or_default();
            let column = before.rsplit_once('\n').map_or(before, |(_, line)| line).chars().count();
            tell(expression, before.matches('\n').count() as isize + 1, column as isize + 1, why)
        });
        Err(told.collect::<Vec<_>>().join("\n"))
    }
}

fn parse(expression: &str) -> Result<IdedExpr, Vec<kube_cel::cel::parser::ParseError>> {
    let parser = Parser::new().enable_optional_syntax(true).max_recursion_depth(PARSER_DEPTH_MAX);
    parser.parse(expression).map_err(|errors| errors.errors)
}

/// Where the parts of a well-formed expression stand: the parser keeps that for those who made a mistake.
fn places(expression: &str) -> Option<Arc<SourceInfo>> {
    parse(&format!("{expression}\n)")).err()?.into_iter().find_map(|error| error.source_info)
}

/// One fault in CEL's words, with its place.
fn tell(expression: &str, line: isize, column: isize, why: &str) -> String {
    let text = usize::try_from(line - 1).ok().and_then(|at| expression.lines().nth(at)).unwrap_or_default();
    let dots = ".".repeat(usize::try_from(column - 1).unwrap_or_default());
    format!("ERROR: <input>:{line}:{column}: {why}\n | {text}\n | {dots}^")
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
