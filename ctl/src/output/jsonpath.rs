//! kubectl's JSONPath templates: `{.items[*].metadata.name}`, `{range .items[*]}…{end}`, filters, unions, slices, `..`.
//!
//! It is not RFC 9535: text outside of braces is copied, results are joined by blanks, and a missing field is empty.

use std::fmt::Write as _;

use anyhow::{Result, bail};
use serde_json::Value;

/// A parsed template.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Template(Vec<Node>);

#[derive(Debug, Clone, PartialEq)]
enum Node {
    Text(String),
    Path(Path),
    Range(Path, Vec<Node>),
}

/// Steps from the current object (`@`, or nothing) or from the whole (`$`).
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Path {
    from_root: bool,
    steps: Vec<Step>,
}

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Field(String),
    /// `.*` and `[*]`
    All,
    /// `..`: the objects and everything in them.
    Descend,
    Union(Vec<Pick>),
    Filter(Operand, Option<(Comparison, Operand)>),
}

#[derive(Debug, Clone, PartialEq)]
enum Pick {
    Field(String),
    Slice(Option<i64>, Option<i64>, Option<i64>),
    Index(i64),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

#[derive(Debug, Clone, PartialEq)]
enum Operand {
    Path(Path),
    Literal(Value),
}

impl Template {
    /// Parses a template.
    pub(crate) fn parse(text: &str) -> Result<Template> {
        let mut parser = Parser { rest: text };
        let (nodes, ended) = parser.template(false)?;
        debug_assert!(!ended);
        Ok(Template(nodes))
    }

    /// The text for an object.
    pub(crate) fn render(&self, object: &Value) -> String {
        let mut text = String::new();
        render(&self.0, object, object, &mut text);
        text
    }
}

impl Path {
    /// A path without braces, or with: `.metadata.name`, `metadata.name`, `{.metadata.name}`. As `RelaxedJSONPathExpression`.
    pub(crate) fn parse_relaxed(text: &str) -> Result<Path> {
        let inner = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap_or(text);
        let mut parser = Parser { rest: inner };
        let path = parser.path(true)?;
        if !parser.rest.trim().is_empty() {
            bail!(
                "unexpected path string {text:?}, expected a 'name1.name2' or '.name1.name2' or '{{name1.name2}}' or '{{.name1.name2}}'"
            );
        }
        Ok(path)
    }

    /// All values at the path.
    pub(crate) fn find<'a>(&self, object: &'a Value) -> Vec<&'a Value> {
        self.find_from(object, object)
    }

    fn find_from<'a>(&self, root: &'a Value, current: &'a Value) -> Vec<&'a Value> {
        let mut found = vec![if self.from_root { root } else { current }];
        for step in &self.steps {
            found = match step {
                // Pick by pick, not value by value.
                Step::Union(picks) => {
                    picks.iter().flat_map(|pick| found.iter().flat_map(|value| pick.apply(value))).collect()
                }
                step => found.into_iter().flat_map(|value| step.apply(root, value)).collect(),
            };
        }
        found
    }
}

impl Step {
    fn apply<'a>(&self, root: &'a Value, value: &'a Value) -> Vec<&'a Value> {
        match self {
            Step::Field(name) => value.get(name.as_str()).into_iter().collect(),
            Step::All => children(value),
            Step::Descend => {
                let mut all = Vec::new();
                descend(value, &mut all);
                all
            }
            Step::Union(picks) => picks.iter().flat_map(|pick| pick.apply(value)).collect(),
            Step::Filter(left, comparison) => {
                let holds = |item: &&Value| {
                    let Some((comparison, right)) = comparison else { return !left.values(root, item).is_empty() };
                    let (left, right) = (left.values(root, item), right.values(root, item));
                    match (left.first(), right.first()) {
                        (Some(left), Some(right)) => comparison.holds(left, right),
                        _ => false,
                    }
                };
                value.as_array().into_iter().flatten().filter(holds).collect()
            }
        }
    }
}

/// A value and all that is in it, from the outside in.
fn descend<'a>(value: &'a Value, all: &mut Vec<&'a Value>) {
    if value.is_object() || value.is_array() {
        all.push(value);
        for child in children(value) {
            descend(child, all);
        }
    }
}

fn children(value: &Value) -> Vec<&Value> {
    match value {
        Value::Array(items) => items.iter().collect(),
        Value::Object(fields) => fields.values().collect(),
        _ => Vec::new(),
    }
}

impl Pick {
    fn apply<'a>(&self, value: &'a Value) -> Vec<&'a Value> {
        let Value::Array(items) = value else {
            return match self {
                // `['a.b']` is the key or, as in kubectl, the path.
                Pick::Field(name) => {
                    let along_path = || name.split('.').try_fold(value, |place, field| place.get(field));
                    value.get(name.as_str()).or_else(along_path).into_iter().collect()
                }
                _ => Vec::new(),
            };
        };
        let length = items.len() as i64;
        let absolute = |index: i64| if index < 0 { index + length } else { index };
        match self {
            Pick::Field(_) => Vec::new(),
            Pick::Index(index) => {
                usize::try_from(absolute(*index)).ok().and_then(|index| items.get(index)).into_iter().collect()
            }
            Pick::Slice(from, to, step) => {
                let from = absolute(from.unwrap_or(0)).clamp(0, length) as usize;
                let to = absolute(to.unwrap_or(length)).clamp(0, length) as usize;
                let step = usize::try_from(step.unwrap_or(1)).unwrap_or(1).max(1);
                items.get(from..to.max(from)).unwrap_or_default().iter().step_by(step).collect()
            }
        }
    }
}

impl Comparison {
    fn holds(self, left: &Value, right: &Value) -> bool {
        use std::cmp::Ordering;
        let order = match (left, right) {
            (Value::Number(left), Value::Number(right)) => {
                left.as_f64().zip(right.as_f64()).and_then(|(left, right)| left.partial_cmp(&right))
            }
            (Value::String(left), Value::String(right)) => Some(left.cmp(right)),
            (left, right) if left == right => Some(Ordering::Equal),
            _ => None,
        };
        match self {
            Comparison::Equal => order == Some(Ordering::Equal),
            Comparison::NotEqual => order != Some(Ordering::Equal),
            Comparison::Less => order == Some(Ordering::Less),
            Comparison::LessOrEqual => order.is_some_and(Ordering::is_le),
            Comparison::Greater => order == Some(Ordering::Greater),
            Comparison::GreaterOrEqual => order.is_some_and(Ordering::is_ge),
        }
    }
}

impl Operand {
    fn values<'a>(&'a self, root: &'a Value, item: &'a Value) -> Vec<&'a Value> {
        match self {
            Operand::Path(path) => path.find_from(root, item),
            Operand::Literal(value) => vec![value],
        }
    }
}

fn render(nodes: &[Node], root: &Value, current: &Value, text: &mut String) {
    for node in nodes {
        match node {
            Node::Text(literal) => text.push_str(literal),
            Node::Path(path) => {
                let found: Vec<String> = path.find_from(root, current).into_iter().map(plain).collect();
                text.push_str(&found.join(" "));
            }
            Node::Range(path, body) => {
                for item in path.find_from(root, current) {
                    render(body, root, item, text);
                }
            }
        }
    }
}

/// A value as text: strings bare, the rest as JSON.
pub(crate) fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => {
            let mut text = String::new();
            // Writing to a string does not fail.
            let _ = write!(text, "{other}");
            text
        }
    }
}

struct Parser<'a> {
    rest: &'a str,
}

impl Parser<'_> {
    fn eat(&mut self, token: &str) -> bool {
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn blanks(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn expect(&mut self, token: &str) -> Result<()> {
        if !self.eat(token) {
            bail!("error parsing jsonpath: expected {token:?} before {:?}", self.rest);
        }
        Ok(())
    }

    /// Nodes up to the end of the text, or (within a range) up to `{end}`.
    fn template(&mut self, in_range: bool) -> Result<(Vec<Node>, bool)> {
        let mut nodes = Vec::new();
        while !self.rest.is_empty() {
            let Some(open) = self.rest.find('{') else {
                nodes.push(Node::Text(std::mem::take(&mut self.rest).to_owned()));
                break;
            };
            if open > 0 {
                nodes.push(Node::Text(self.rest[..open].to_owned()));
            }
            self.rest = &self.rest[open + 1..];
            self.blanks();
            if self.word("end") {
                self.expect("}")?;
                if !in_range {
                    bail!("error parsing jsonpath: not in range, nothing to end");
                }
                return Ok((nodes, true));
            }
            if self.word("range") {
                let path = self.path(false)?;
                self.blanks();
                self.expect("}")?;
                let (body, ended) = self.template(true)?;
                if !ended {
                    bail!("error parsing jsonpath: unterminated range");
                }
                nodes.push(Node::Range(path, body));
                continue;
            }
            loop {
                self.blanks();
                if self.eat("}") {
                    break;
                }
                if self.rest.is_empty() {
                    bail!("error parsing jsonpath: unclosed action");
                }
                if self.rest.starts_with(['"', '\'']) {
                    nodes.push(Node::Text(self.quoted()?));
                } else {
                    nodes.push(Node::Path(self.path(false)?));
                }
            }
        }
        if in_range { bail!("error parsing jsonpath: unterminated range") } else { Ok((nodes, false)) }
    }

    /// A keyword, if it stands alone.
    fn word(&mut self, word: &str) -> bool {
        match self.rest.strip_prefix(word) {
            Some(rest) if rest.starts_with([' ', '}', '.', '[', '$', '@']) => {
                self.rest = rest.trim_start();
                true
            }
            _ => false,
        }
    }

    fn path(&mut self, relaxed: bool) -> Result<Path> {
        let mut path = Path { from_root: self.eat("$"), steps: Vec::new() };
        if !path.from_root {
            self.eat("@");
        }
        let before = self.rest;
        if relaxed && !self.rest.starts_with(['.', '[']) && !self.rest.is_empty() {
            path.steps.push(Step::Field(self.field()?));
        }
        loop {
            if self.eat("..") {
                path.steps.push(Step::Descend);
                if self.eat("*") {
                    path.steps.push(Step::All);
                } else if !self.rest.starts_with('[') {
                    path.steps.push(Step::Field(self.field()?));
                }
            } else if self.eat(".") {
                if self.eat("*") {
                    path.steps.push(Step::All);
                } else if !self.rest.is_empty() && !self.rest.starts_with(['}', ' ', '[', ')']) {
                    path.steps.push(Step::Field(self.field()?));
                }
            } else if self.eat("[") {
                path.steps.push(self.brackets()?);
            } else {
                break;
            }
        }
        if self.rest == before && !path.from_root && path.steps.is_empty() && !self.rest.starts_with('}') {
            bail!("error parsing jsonpath: unrecognized character in action: {:?}", self.rest);
        }
        Ok(path)
    }

    /// A field's name; a backslash takes the next character as it is.
    fn field(&mut self) -> Result<String> {
        let mut name = String::new();
        let mut characters = self.rest.char_indices();
        let mut end = self.rest.len();
        while let Some((at, character)) = characters.next() {
            match character {
                '\\' => name.extend(characters.next().map(|(_, escaped)| escaped)),
                '.' | '[' | ']' | '}' | ' ' | ')' | '=' | '<' | '>' | '!' | ',' | '\t' | '\n' => {
                    end = at;
                    break;
                }
                other => name.push(other),
            }
        }
        self.rest = &self.rest[end..];
        if name.is_empty() {
            bail!("error parsing jsonpath: a field's name is missing before {:?}", self.rest);
        }
        Ok(name)
    }

    /// What stands in `[ ]`.
    fn brackets(&mut self) -> Result<Step> {
        self.blanks();
        if self.eat("*") {
            self.blanks();
            self.expect("]")?;
            return Ok(Step::All);
        }
        if self.eat("?(") {
            let left = self.operand()?;
            self.blanks();
            let comparisons = [
                ("==", Comparison::Equal),
                ("!=", Comparison::NotEqual),
                ("<=", Comparison::LessOrEqual),
                (">=", Comparison::GreaterOrEqual),
                ("<", Comparison::Less),
                (">", Comparison::Greater),
            ];
            let comparison =
                comparisons.into_iter().find(|(token, _)| self.eat(token)).map(|(_, comparison)| comparison);
            let right = match comparison {
                Some(comparison) => Some((comparison, self.operand()?)),
                None => None,
            };
            self.blanks();
            self.expect(")")?;
            self.blanks();
            self.expect("]")?;
            return Ok(Step::Filter(left, right));
        }
        let mut picks = Vec::new();
        loop {
            self.blanks();
            picks.push(self.pick()?);
            self.blanks();
            if self.eat("]") {
                return Ok(Step::Union(picks));
            }
            self.expect(",")?;
        }
    }

    fn pick(&mut self) -> Result<Pick> {
        if self.rest.starts_with(['"', '\'']) {
            return Ok(Pick::Field(self.quoted()?));
        }
        let end = self.rest.find([']', ',']).unwrap_or(self.rest.len());
        let text = self.rest[..end].trim();
        self.rest = &self.rest[end..];
        let number = |text: &str| match text.trim() {
            "" => Ok(None),
            text => text.parse::<i64>().map(Some),
        };
        let parts: Result<Vec<Option<i64>>, _> = text.split(':').map(number).collect();
        match parts.as_deref() {
            Ok([Some(index)]) => Ok(Pick::Index(*index)),
            Ok([from, to]) => Ok(Pick::Slice(*from, *to, None)),
            Ok([from, to, step]) => Ok(Pick::Slice(*from, *to, *step)),
            _ => bail!("error parsing jsonpath: invalid array index {text:?}"),
        }
    }

    fn operand(&mut self) -> Result<Operand> {
        self.blanks();
        if self.rest.starts_with(['"', '\'']) {
            return Ok(Operand::Literal(Value::String(self.quoted()?)));
        }
        if self.rest.starts_with(['@', '$', '.']) {
            return Ok(Operand::Path(self.path(false)?));
        }
        let end = self.rest.find([')', ' ', '=', '<', '>', '!']).unwrap_or(self.rest.len());
        let text = &self.rest[..end];
        self.rest = &self.rest[end..];
        match serde_json::from_str(text) {
            Ok(value) => Ok(Operand::Literal(value)),
            Err(_) => bail!("error parsing jsonpath: unrecognized value {text:?} in a filter"),
        }
    }

    /// A quoted string with its escapes resolved.
    fn quoted(&mut self) -> Result<String> {
        let mut characters = self.rest.char_indices();
        let quote = characters.next().map(|(_, quote)| quote).unwrap_or('"');
        let mut text = String::new();
        while let Some((at, character)) = characters.next() {
            match character {
                '\\' => match characters.next().map(|(_, escaped)| escaped) {
                    Some('n') => text.push('\n'),
                    Some('t') => text.push('\t'),
                    Some('r') => text.push('\r'),
                    Some(other) => text.push(other),
                    None => break,
                },
                end if end == quote => {
                    self.rest = &self.rest[at + end.len_utf8()..];
                    return Ok(text);
                }
                other => text.push(other),
            }
        }
        bail!("error parsing jsonpath: unterminated quoted string")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object() -> Value {
        json!({
            "kind": "List",
            "items": [
                {"kind": "None", "metadata": {"name": "127.0.0.1", "labels": {"kubernetes.io/hostname": "a"}},
                 "status": {"capacity": {"cpu": "4"}, "ready": true}},
                {"kind": "None", "metadata": {"name": "127.0.0.2"}, "status": {"capacity": {"cpu": "8"}, "age": 7}},
            ],
            "users": [{"name": "myself", "user": {}}, {"name": "e2e", "user": {"username": "admin", "password": "secret"}}],
        })
    }

    #[test]
    fn templates_render_as_kubectls() {
        let cases = [
            ("text", "text"),
            ("kind is {.kind}", "kind is List"),
            ("{.items[*].metadata.name}", "127.0.0.1 127.0.0.2"),
            (
                "{.items[*]['metadata.name', 'status']}",
                "127.0.0.1 127.0.0.2 {\"capacity\":{\"cpu\":\"4\"},\"ready\":true} {\"age\":7,\"capacity\":{\"cpu\":\"8\"}}",
            ),
            ("{..name}", "127.0.0.1 127.0.0.2 myself e2e"),
            ("{.users[?(@.name==\"e2e\")].user.password}", "secret"),
            ("{.users[?(@.user.username)].name}", "e2e"),
            ("{.items[?(@.status.age>5)].metadata.name}", "127.0.0.2"),
            ("{.items[?(@.status.ready==true)].metadata.name}", "127.0.0.1"),
            ("{range .items[*]}[{.metadata.name}, {.status.capacity.cpu}] {end}", "[127.0.0.1, 4] [127.0.0.2, 8] "),
            ("{range .items[*]}{.metadata.name}{\"\\n\"}{end}", "127.0.0.1\n127.0.0.2\n"),
            ("{.items[0].metadata.labels.kubernetes\\.io/hostname}", "a"),
            ("{.items[0].metadata.labels['kubernetes.io/hostname']}", "a"),
            ("{.items[-1].metadata.name}", "127.0.0.2"),
            ("{.items[0:1].metadata.name}", "127.0.0.1"),
            ("{.items[:].status.capacity}", "{\"cpu\":\"4\"} {\"cpu\":\"8\"}"),
            ("{$.kind}{@.kind}", "ListList"),
            ("{.nothing.here}", ""),
            ("{.items[9].metadata}", ""),
            ("{.items[0].status.ready}", "true"),
            ("{.kind} {'x'}", "List x"),
            ("{$}", &object().to_string()),
        ];
        for (template, expected) in cases {
            assert_eq!(Template::parse(template).expect(template).render(&object()), expected, "{template}");
        }
    }

    #[test]
    fn wrong_templates_are_errors() {
        for template in ["{.a", "{range .a}", "{end}", "{.a[x]}", "{.a[?(@.b==c)]}", "{'a}", "{#}"] {
            assert!(Template::parse(template).is_err(), "{template}");
        }
    }

    #[test]
    fn relaxed_paths_need_no_braces() {
        for path in [".metadata.name", "metadata.name", "{.metadata.name}", "{metadata.name}"] {
            let object = json!({"metadata": {"name": "x"}});
            assert_eq!(Path::parse_relaxed(path).expect(path).find(&object), [&json!("x")], "{path}");
        }
        assert!(Path::parse_relaxed("{.a}{.b}").is_err());
    }
}
