//! Label selectors: the one matcher behind `labelSelector` query parameters, `spec.selector` and node affinity.
use crate::names;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use std::{collections::BTreeMap, fmt};

/// A conjunction of requirements on labels. Without requirements it matches everything, unless it is [`Selector::nothing`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    requirements: Vec<Requirement>,
    nothing: bool,
}

/// One condition on one label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    pub key: String,
    pub operator: Operator,
    /// Sorted, each once; one integer for `Gt` and `Lt`; empty for `Exists` and `DoesNotExist`.
    pub values: Vec<String>,
}

/// As in `labels.Requirement`; `=`/`==` are `In` with one value, `!=` is `NotIn` with one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
    Gt,
    Lt,
}

/// A selector that cannot be read; the message says what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SelectorError(pub String);

// === impl Selector ===

impl Selector {
    /// Matches every object.
    pub fn everything() -> Self {
        Self::default()
    }

    /// Matches no object.
    pub fn nothing() -> Self {
        Self { requirements: Vec::new(), nothing: true }
    }

    /// `a=b,c in (d,e),!f`: the syntax of the `labelSelector` query parameter.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut parser = Parser { tokens: tokenize(text), position: 0, text };
        let mut requirements = Vec::new();
        while parser.peek() != &Token::End {
            requirements.push(parser.requirement()?);
            match parser.next() {
                Token::End => break,
                Token::Comma if parser.peek() != &Token::End => {}
                Token::Comma => return Err(parser.error("identifier after ','")),
                _ => return Err(parser.error("',' or the end")),
            }
        }
        Ok(Self { requirements, nothing: false })
    }

    /// An absent selector matches nothing; an empty one everything. As `LabelSelectorAsSelector`.
    pub fn from_label_selector_opt(selector: Option<&LabelSelector>) -> Result<Self, SelectorError> {
        selector.map_or_else(|| Ok(Self::nothing()), Self::from_label_selector)
    }

    /// As `LabelSelectorAsSelector` of a selector that is there.
    pub fn from_label_selector(selector: &LabelSelector) -> Result<Self, SelectorError> {
        let mut requirements = equalities(selector.match_labels.iter().flatten());
        for expression in selector.match_expressions.iter().flatten() {
            let operator = match expression.operator.as_str() {
                "In" => Operator::In,
                "NotIn" => Operator::NotIn,
                "Exists" => Operator::Exists,
                "DoesNotExist" => Operator::DoesNotExist,
                other => return Err(SelectorError(format!("{other:?} is not a valid label selector operator"))),
            };
            let values = expression.values.clone().unwrap_or_default();
            requirements.push(Requirement::new(&expression.key, operator, values)?);
        }
        Ok(Self { requirements, nothing: false })
    }

    /// Every label of `map` must be there with its value.
    pub fn from_map(map: &BTreeMap<String, String>) -> Self {
        Self { requirements: equalities(map), nothing: false }
    }

    /// From requirements that were made one by one, as node affinity's.
    pub fn from_requirements(requirements: Vec<Requirement>) -> Self {
        Self { requirements, nothing: false }
    }

    pub fn requirements(&self) -> &[Requirement] {
        &self.requirements
    }

    /// True when it matches everything.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty() && !self.nothing
    }

    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.matches_with(|key| labels.get(key).map(String::as_str))
    }

    /// Of an object whose labels may be absent.
    pub fn matches_opt(&self, labels: Option<&BTreeMap<String, String>>) -> bool {
        self.matches_with(|key| labels.and_then(|l| l.get(key)).map(String::as_str))
    }

    /// For labels held in another form.
    pub fn matches_with<'a>(&self, get: impl Fn(&str) -> Option<&'a str>) -> bool {
        !self.nothing && self.requirements.iter().all(|r| r.matches(get(&r.key)))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, requirement) in self.requirements.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            let Requirement { key, operator, values } = requirement;
            match (operator, values.as_slice()) {
                (Operator::Exists, _) => write!(f, "{comma}{key}")?,
                (Operator::DoesNotExist, _) => write!(f, "{comma}!{key}")?,
                (Operator::In, [one]) => write!(f, "{comma}{key}={one}")?,
                (Operator::NotIn, [one]) => write!(f, "{comma}{key}!={one}")?,
                (Operator::In, many) => write!(f, "{comma}{key} in ({})", many.join(","))?,
                (Operator::NotIn, many) => write!(f, "{comma}{key} notin ({})", many.join(","))?,
                (Operator::Gt, many) => write!(f, "{comma}{key}>{}", many.join(","))?,
                (Operator::Lt, many) => write!(f, "{comma}{key}<{}", many.join(","))?,
            }
        }
        Ok(())
    }
}

// === impl Requirement ===

impl Requirement {
    /// Checks key, values and their number, as `labels.NewRequirement`.
    pub fn new(key: &str, operator: Operator, mut values: Vec<String>) -> Result<Self, SelectorError> {
        if let Some(message) = names::is_qualified_name(key).first() {
            return Err(SelectorError(format!("key: Invalid value: {key:?}: {message}")));
        }
        match operator {
            Operator::In | Operator::NotIn if values.is_empty() => {
                return Err(SelectorError(
                    "values: Invalid value: []: for 'in', 'notin' operators, values set can't be empty".into(),
                ));
            }
            Operator::Exists | Operator::DoesNotExist if !values.is_empty() => {
                return Err(SelectorError(
                    "values: Invalid value: values set must be empty for exists and does not exist".into(),
                ));
            }
            Operator::Gt | Operator::Lt if values.len() != 1 || values[0].parse::<i64>().is_err() => {
                return Err(SelectorError(
                    "values: Invalid value: for 'Gt', 'Lt' operators, the value must be an integer".into(),
                ));
            }
            _ => {}
        }
        for value in &values {
            if let Some(message) = names::is_label_value(value).first() {
                return Err(SelectorError(format!("values[0][{key}]: Invalid value: {value:?}: {message}")));
            }
        }
        values.sort_unstable();
        values.dedup();
        Ok(Self { key: key.to_owned(), operator, values })
    }

    /// `value` is what the object has under the key.
    pub fn matches(&self, value: Option<&str>) -> bool {
        let listed = |v: &str| self.values.binary_search_by(|x| x.as_str().cmp(v)).is_ok();
        match self.operator {
            Operator::In => value.is_some_and(listed),
            Operator::NotIn => !value.is_some_and(listed),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
            Operator::Gt | Operator::Lt => {
                let number = |s: &str| s.parse::<i64>().ok();
                match (value.and_then(number), self.values.first().and_then(|v| number(v))) {
                    (Some(have), Some(bound)) if self.operator == Operator::Gt => have > bound,
                    (Some(have), Some(bound)) => have < bound,
                    _ => false,
                }
            }
        }
    }
}

fn equalities<'a>(map: impl IntoIterator<Item = (&'a String, &'a String)>) -> Vec<Requirement> {
    map.into_iter()
        .map(|(k, v)| Requirement { key: k.clone(), operator: Operator::In, values: vec![v.clone()] })
        .collect()
}

// === parsing ===

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    Comma,
    Open,
    Close,
    Equals,
    NotEquals,
    Not,
    Greater,
    Less,
    End,
}

fn tokenize(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let token = match c {
            c if c.is_whitespace() => continue,
            ',' => Token::Comma,
            '(' => Token::Open,
            ')' => Token::Close,
            '>' => Token::Greater,
            '<' => Token::Less,
            '=' => {
                chars.next_if_eq(&'=');
                Token::Equals
            }
            '!' if chars.next_if_eq(&'=').is_some() => Token::NotEquals,
            '!' => Token::Not,
            c => {
                let mut word = String::from(c);
                while let Some(c) = chars.next_if(|c| !c.is_whitespace() && !",()=!<>".contains(*c)) {
                    word.push(c);
                }
                Token::Word(word)
            }
        };
        tokens.push(token);
    }
    tokens.push(Token::End);
    tokens
}

struct Parser<'a> {
    tokens: Vec<Token>,
    position: usize,
    text: &'a str,
}

impl Parser<'_> {
    fn peek(&self) -> &Token {
        self.tokens.get(self.position).unwrap_or(&Token::End)
    }

    fn next(&mut self) -> Token {
        let token = self.peek().clone();
        self.position += 1;
        token
    }

    fn error(&self, expected: &str) -> SelectorError {
        SelectorError(format!("unable to parse requirement: {:?}: expected {expected}", self.text))
    }

    fn requirement(&mut self) -> Result<Requirement, SelectorError> {
        let negated = self.peek() == &Token::Not;
        if negated {
            self.next();
        }
        let Token::Word(key) = self.next() else { return Err(self.error("a label key")) };
        if negated {
            return Requirement::new(&key, Operator::DoesNotExist, Vec::new());
        }
        let (operator, values) = match self.peek().clone() {
            Token::End | Token::Comma => (Operator::Exists, Vec::new()),
            Token::Equals => (Operator::In, vec![self.value()]),
            Token::NotEquals => (Operator::NotIn, vec![self.value()]),
            Token::Greater => (Operator::Gt, vec![self.value()]),
            Token::Less => (Operator::Lt, vec![self.value()]),
            Token::Word(word) if word == "in" => (Operator::In, self.values()?),
            Token::Word(word) if word == "notin" => (Operator::NotIn, self.values()?),
            _ => return Err(self.error("one of: !, =, ==, !=, in, notin, <, >")),
        };
        Requirement::new(&key, operator, values)
    }

    /// After an operator: a word, or nothing for the empty value.
    fn value(&mut self) -> String {
        self.next();
        match self.peek().clone() {
            Token::Word(word) => {
                self.next();
                word
            }
            _ => String::new(),
        }
    }

    /// After `in`/`notin`: `(a, b)`.
    fn values(&mut self) -> Result<Vec<String>, SelectorError> {
        self.next();
        if self.next() != Token::Open {
            return Err(self.error("'(' after in/notin"));
        }
        let mut values = Vec::new();
        loop {
            match self.next() {
                Token::Word(word) => {
                    values.push(word);
                    match self.next() {
                        Token::Comma => {
                            if self.peek() == &Token::Close {
                                values.push(String::new());
                            }
                        }
                        Token::Close => return Ok(values),
                        _ => return Err(self.error("',' or ')'")),
                    }
                }
                Token::Comma => values.push(String::new()),
                Token::Close => {
                    if values.is_empty() {
                        values.push(String::new());
                    }
                    return Ok(values);
                }
                _ => return Err(self.error("a value, ',' or ')'")),
            }
        }
    }
}

/// A selector as Go prints the API's type.
pub fn go_text(selector: Option<&LabelSelector>) -> String {
    let Some(selector) = selector else { return "nil".to_owned() };
    let labels: String = selector.match_labels.iter().flatten().map(|(k, v)| format!("{k}: {v},")).collect();
    let requirements = selector.match_expressions.iter().flatten().map(|one| {
        let values = one.values.as_deref().unwrap_or_default().join(" ");
        format!("LabelSelectorRequirement{{Key:{},Operator:{},Values:[{values}],}},", one.key, one.operator)
    });
    let requirements: String = requirements.collect();
    format!(
        "&LabelSelector{{MatchLabels:map[string]string{{{labels}}},MatchExpressions:[]LabelSelectorRequirement{{{requirements}}},}}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn matching() {
        let web = labels(&[("app", "web"), ("tier", "front"), ("n", "5")]);
        for (selector, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web,tier=front", true),
            ("app=db", false),
            ("app!=db", true),
            ("missing!=x", true),
            ("app in (db, web)", true),
            ("app notin (db,web)", false),
            ("missing notin (a)", true),
            ("app", true),
            ("!app", false),
            ("!missing", true),
            ("n>4", true),
            ("n<5", false),
            ("missing>1", false),
            ("app=", false),
        ] {
            assert_eq!(Selector::parse(selector).unwrap().matches(&web), expected, "{selector}");
        }
    }

    #[test]
    fn malformed_selectors_are_refused() {
        for text in ["=a", "a=b=c", "a in b", "a in (b", "a,", ",a", "a b", "-a=b", "a=b!", "a>x", "x in ((a))"] {
            assert!(Selector::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_absent_selector_matches_nothing_and_an_empty_one_everything() {
        assert!(!Selector::from_label_selector_opt(None).unwrap().matches(&labels(&[])));
        assert!(Selector::from_label_selector_opt(Some(&LabelSelector::default())).unwrap().matches(&labels(&[])));
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(text in "[a-z]{1,5}(=|!=)[a-z]{1,5}(,!?[a-z]{1,5}){0,3}") {
            let selector = Selector::parse(&text).unwrap();
            prop_assert_eq!(Selector::parse(&selector.to_string()).unwrap(), selector);
        }

        #[test]
        fn no_text_panics(text in ".{0,60}") {
            let _ = Selector::parse(&text);
        }
    }

    #[test]
    fn selectors_look_as_go_writes_them() {
        let both: LabelSelector = serde_json::from_value(serde_json::json!({"matchLabels": {"b": "2", "a": "1"},
            "matchExpressions": [{"key": "k", "operator": "In", "values": ["x", "y"]}]}))
        .unwrap();
        let expected = "&LabelSelector{MatchLabels:map[string]string{a: 1,b: 2,},MatchExpressions:[]LabelSelectorRequirement{\
                        LabelSelectorRequirement{Key:k,Operator:In,Values:[x y],},},}";
        assert_eq!((go_text(Some(&both)).as_str(), go_text(None).as_str()), (expected, "nil"));
    }
}
