//! Finds the type of every part of an expression. As cel-go's `checker`, with the macros that the parser leaves alone.

use super::Env;
use super::functions::{overloads, parse_type, type_named};
use super::types::{Found, Type, as_general, assignable};
use crate::time;
use k8s_openapi::jiff::Timestamp;
use kube_cel::cel::common::ast::{CallExpr, EntryExpr, Expr, IdedExpr, LiteralValue, SelectExpr};
use std::collections::HashMap;

pub(super) struct Checker<'e> {
    env: &'e Env,
    /// What macros gave names to, around where we are.
    bound: Vec<(&'e str, Type)>,
    found: Found,
    faults: Vec<(u64, String)>,
    types: HashMap<u64, Type>,
}

/// What an expression comes to, part by part, and what is wrong with which.
pub(super) struct Checked {
    pub kind: Type,
    pub types: HashMap<u64, Type>,
    pub faults: Vec<(u64, String)>,
}

// === impl Checker ===

impl<'e> Checker<'e> {
    pub fn new(env: &'e Env) -> Self {
        Self { env, bound: Vec::new(), found: Found::default(), faults: Vec::new(), types: HashMap::new() }
    }

    pub fn check(mut self, whole: &'e IdedExpr) -> Checked {
        let kind = self.look(whole).with_found(&self.found, true);
        Checked { kind, types: self.types, faults: self.faults }
    }

    fn fault(&mut self, at: &IdedExpr, why: String) -> Type {
        self.faults.push((at.id, why));
        Type::Error
    }

    fn undeclared(&mut self, at: &IdedExpr, name: &str) -> Type {
        self.fault(at, format!("undeclared reference to '{name}' (in container '')"))
    }

    fn unknown(&mut self) -> Type {
        Type::Unknown(self.found.more(1))
    }

    fn known(&self, kind: &Type) -> Type {
        kind.with_found(&self.found, false)
    }

    fn fits(&mut self, a: &Type, b: &Type) -> bool {
        let mark = self.found.mark();
        let fits = assignable(&mut self.found, a, b);
        if !fits {
            self.found.back_to(mark);
        }
        fits
    }

    fn look(&mut self, expr: &'e IdedExpr) -> Type {
        let kind = match &expr.expr {
            Expr::Unspecified => Type::Error,
            Expr::Literal(literal) => of_literal(literal),
            Expr::Ident(name) => match self.named(name) {
                Some(kind) => kind,
                None => self.undeclared(expr, name.trim_start_matches('.')),
            },
            Expr::Select(select) => self.select(expr, select),
            Expr::Call(call) => self.call(expr, call),
            Expr::Comprehension(all) => {
                let range = self.look(&all.iter_range);
                let start = self.look(&all.accu_init);
                let (first, second) = self.of_range(&all.iter_range, &range, all.iter_var2.is_some());
                let before = self.bound.len();
                self.bound.push((all.accu_var.as_str(), start.clone()));
                self.bound.push((all.iter_var.as_str(), first));
                self.bound.extend(all.iter_var2.as_deref().map(|name| (name, second)));
                let goes_on = self.look(&all.loop_cond);
                self.must_be(&all.loop_cond, &Type::Bool, &goes_on);
                let step = self.look(&all.loop_step);
                self.must_be(&all.loop_step, &start, &step);
                self.bound.truncate(before + 1);
                let result = self.look(&all.result);
                self.bound.truncate(before);
                result
            }
            Expr::List(list) => {
                let mut items = None;
                for (at, element) in list.elements.iter().enumerate() {
                    let optional = list.optional_indices.contains(&at);
                    items = Some(self.joined(items, element, optional));
                }
                Type::list(items.unwrap_or_else(|| self.unknown()))
            }
            Expr::Map(map) => {
                let (mut keys, mut values) = (None, None);
                for entry in &map.entries {
                    if let EntryExpr::MapEntry(entry) = &entry.expr {
                        keys = Some(self.joined(keys, &entry.key, false));
                        values = Some(self.joined(values, &entry.value, entry.optional));
                    }
                }
                let keys = keys.unwrap_or_else(|| self.unknown());
                Type::map(keys, values.unwrap_or_else(|| self.unknown()))
            }
            Expr::Struct(made) => {
                let name = made.type_name.trim_start_matches('.');
                let kind = match name {
                    "JSONPatch" if self.env.patches => parse_type("JSONPatch"),
                    _ if self.env.patches && (name == "Object" || name.starts_with("Object.")) => {
                        Type::Patch(name.into())
                    }
                    _ if self.named(name).is_some() => self.fault(expr, format!("'{name}' is not a message type")),
                    _ => self.undeclared(expr, name),
                };
                for entry in &made.entries {
                    let EntryExpr::StructField(field) = &entry.expr else { continue };
                    let value = self.look(&field.value);
                    let value = if field.optional { self.inside(&field.value, &value) } else { value };
                    let at = IdedExpr { id: entry.id, expr: Expr::Unspecified };
                    match kind.field(&field.field) {
                        Some(wanted) if !self.fits(&value, &wanted) => {
                            let (wanted, value) = (wanted.told(), self.known(&value).told());
                            let what = format!("expected type of field '{}' is '{wanted}'", field.field);
                            self.fault(&at, format!("{what} but provided type is '{value}'"));
                        }
                        None if !matches!(kind, Type::Error) => {
                            self.fault(&at, format!("undefined field '{}'", field.field));
                        }
                        _ => {}
                    }
                }
                kind
            }
        };
        let kind = self.known(&kind);
        self.types.insert(expr.id, kind.clone());
        kind
    }

    fn named(&self, name: &str) -> Option<Type> {
        let name = name.trim_start_matches('.');
        let bound = self.bound.iter().rev().find(|(bound, _)| *bound == name);
        let declared = || self.env.variables.iter().find(|(variable, _)| *variable == name);
        bound.or_else(declared).map(|(_, kind)| kind.clone()).or_else(|| type_named(name))
    }

    fn must_be(&mut self, at: &IdedExpr, wanted: &Type, kind: &Type) {
        if !self.fits(kind, wanted) {
            let (wanted, kind) = (self.known(wanted).told(), self.known(kind).told());
            self.fault(at, format!("expected type '{wanted}' but found '{kind}'"));
        }
    }

    /// What is in an optional value.
    fn inside(&mut self, at: &IdedExpr, kind: &Type) -> Type {
        let inner = self.unknown();
        let wanted = Type::optional(inner.clone());
        self.must_be(at, &wanted, kind);
        self.known(&inner)
    }

    /// The type of items of which one more is looked at. As `joinTypes` where literals are of one type.
    fn joined(&mut self, before: Option<Type>, item: &'e IdedExpr, optional: bool) -> Type {
        let kind = self.look(item);
        let kind = if optional { self.inside(item, &kind) } else { kind };
        let Some(before) = before else { return kind };
        if self.fits(&before, &kind) {
            return if as_general(&before, &kind) { before } else { kind };
        }
        self.must_be(item, &before, &kind);
        Type::Error
    }

    /// What the names of a macro stand for that goes over `range`: an item or a key; or both index or key, and value.
    fn of_range(&mut self, at: &IdedExpr, range: &Type, both: bool) -> (Type, Type) {
        match (self.known(range), both) {
            (Type::List(item), false) => ((*item).clone(), Type::Error),
            (Type::List(item), true) => (Type::Int, (*item).clone()),
            (Type::Map(parts), _) => parts.as_ref().clone(),
            (Type::Dyn | Type::Any | Type::Error, _) => (Type::Dyn, Type::Dyn),
            (Type::Unknown(number), _) => {
                self.found.set(number, Type::Dyn);
                (Type::Dyn, Type::Dyn)
            }
            (other, _) => {
                let other = other.told();
                self.fault(
                    at,
                    format!(
                        "expression of type '{other}' cannot be range of a comprehension (must be list, map, or dynamic)"
                    ),
                );
                (Type::Error, Type::Error)
            }
        }
    }

    /// As `checkSelect`.
    fn select(&mut self, expr: &'e IdedExpr, select: &'e SelectExpr) -> Type {
        if !select.test
            && let Some(kind) = dotted(expr).and_then(|name| self.named(&name))
        {
            return kind;
        }
        let operand = self.look(&select.operand);
        let kind = self.field(expr, &operand, &select.field, false);
        if select.test { Type::Bool } else { kind }
    }

    /// As `checkSelectField`.
    fn field(&mut self, at: &IdedExpr, of: &Type, name: &str, optional: bool) -> Type {
        let (of, optional) = if let Type::Optional(inner) = of { (&**inner, true) } else { (of, optional) };
        let kind = match of {
            Type::Map(parts) => parts.1.clone(),
            Type::Struct(..) | Type::Api(_) | Type::Variables(_) | Type::Patch(_) => match of.field(name) {
                Some(kind) => kind,
                None => return self.fault(at, format!("undefined field '{name}'")),
            },
            Type::Unknown(number) => {
                self.found.set(*number, Type::Dyn);
                Type::Dyn
            }
            Type::Dyn | Type::Any | Type::Error => Type::Dyn,
            other => {
                return self.fault(at, format!("type '{}' does not support field selection", other.told()));
            }
        };
        if optional { Type::optional(kind) } else { kind }
    }

    fn call(&mut self, expr: &'e IdedExpr, call: &'e CallExpr) -> Type {
        if let Some(kind) = self.macro_call(expr, call) {
            return kind;
        }
        if call.func_name == "_?._" {
            let [operand, field] = call.args.as_slice() else { return Type::Error };
            let kind = self.look(operand);
            let Expr::Literal(LiteralValue::String(name)) = &field.expr else { return Type::Error };
            return self.field(expr, &kind, name.inner(), true);
        }
        let mut args: Vec<Type> = call.args.iter().map(|arg| self.look(arg)).collect();
        self.literals(call);
        let name = call.func_name.as_str();
        let Some(target) = call.target.as_deref() else {
            return self.resolve(expr, name, &args, false);
        };
        if let Some(whole) = dotted(target).map(|target| format!("{}.{name}", target.trim_start_matches('.')))
            && overloads(&whole).is_some()
        {
            return self.resolve(expr, &whole, &args, false);
        }
        args.insert(0, self.look(target));
        self.resolve(expr, name, &args, true)
    }

    /// As `resolveOverload`.
    fn resolve(&mut self, at: &IdedExpr, name: &str, args: &[Type], member: bool) -> Type {
        let name = name.trim_start_matches('.');
        let Some(ways) = overloads(name).filter(|_| self.env.patches || name != "jsonpatch.escapeKey") else {
            return self.undeclared(at, name);
        };
        let mut result: Option<Type> = None;
        for way in ways.iter().filter(|way| way.member == member && way.args.len() == args.len()) {
            let mark = self.found.mark();
            let first = self.found.more(way.open);
            let found = &mut self.found;
            if !args.iter().zip(&way.args).all(|(arg, wanted)| assignable(found, arg, &wanted.renumbered(first))) {
                found.back_to(mark);
                continue;
            }
            let kind = self.known(&way.result.renumbered(first));
            result = Some(match result {
                None => kind,
                Some(before) if before.is(&kind) => before,
                Some(_) => Type::Dyn,
            });
        }
        result.unwrap_or_else(|| {
            let told: Vec<String> = args.iter().map(|arg| arg.with_found(&self.found, true).told()).collect();
            let told = match told.as_slice() {
                [target, args @ ..] if member => format!("{target}.({})", args.join(", ")),
                args => format!("({})", args.join(", ")),
            };
            self.fault(at, format!("found no matching overload for '{name}' applied to '{told}'"))
        })
    }

    /// Literals that functions would not take. As the validators of cel-go.
    fn literals(&mut self, call: &'e CallExpr) {
        let [.., arg] = call.args.as_slice() else { return };
        let Expr::Literal(LiteralValue::String(text)) = &arg.expr else { return };
        let (name, text) = (call.func_name.as_str(), text.inner());
        let ok = match name {
            "duration" => time::parse_duration(text.trim_start_matches(['-', '+'])).is_ok(),
            "timestamp" => text.parse::<Timestamp>().is_ok(),
            "matches" => regex::Regex::new(text).is_ok(),
            _ => true,
        };
        if !ok {
            self.fault(arg, format!("invalid {name} argument"));
        }
    }

    /// The macros that are calls to the parser.
    fn macro_call(&mut self, expr: &'e IdedExpr, call: &'e CallExpr) -> Option<Type> {
        let (name, args) = (call.func_name.as_str(), call.args.as_slice());
        let target = call.target.as_deref()?;
        let name_of = |arg: &'e IdedExpr| if let Expr::Ident(name) = &arg.expr { Some(name.as_str()) } else { None };
        let (first, second) = (args.first().and_then(name_of), args.get(1).and_then(name_of));
        let before = self.bound.len();
        let kind = match (name, args) {
            ("bind", [_, value, then]) if self.env.bind && dotted(target).as_deref() == Some("cel") => {
                let value = self.look(value);
                self.bound.push((first?, value));
                self.look(then)
            }
            ("optMap" | "optFlatMap", [_, then]) => {
                let kind = self.look(target);
                let inner = self.inside(target, &kind);
                self.bound.push((first?, inner));
                let kind = self.look(then);
                if name == "optMap" {
                    Type::optional(kind)
                } else {
                    self.inside(then, &kind);
                    kind
                }
            }
            ("sortBy", [_, key]) => {
                let list = self.look(target);
                let (item, _) = self.of_range(target, &list, false);
                self.bound.push((first?, item));
                self.look(key);
                list
            }
            (
                "all" | "exists" | "exists_one" | "existsOne" | "transformList" | "transformMap" | "transformMapEntry",
                [_, _, rest @ ..],
            ) if !rest.is_empty() && rest.len() <= if name.starts_with("transform") { 2 } else { 1 } => {
                let range = self.look(target);
                let (key, value) = self.of_range(target, &range, true);
                self.bound.extend([(first?, key.clone()), (second?, value)]);
                let mut last = Type::Error;
                for (at, arg) in rest.iter().enumerate() {
                    last = self.look(arg);
                    if at + 1 < rest.len() {
                        self.must_be(arg, &Type::Bool, &last);
                    }
                }
                match name {
                    "transformList" => Type::list(last),
                    "transformMap" => Type::map(key, last),
                    "transformMapEntry" => last,
                    "all" => self.resolve(expr, "_&&_", &[Type::Bool, last], false),
                    "exists" => self.resolve(expr, "_||_", &[Type::Bool, last], false),
                    _ => match self.resolve(expr, "_?_:_", &[last, Type::Int, Type::Int], false) {
                        Type::Error => Type::Error,
                        _ => Type::Bool,
                    },
                }
            }
            _ => return None,
        };
        self.bound.truncate(before);
        Some(kind)
    }
}

fn of_literal(literal: &LiteralValue) -> Type {
    match literal {
        LiteralValue::Boolean(_) => Type::Bool,
        LiteralValue::Bytes(_) => Type::Bytes,
        LiteralValue::Double(_) => Type::Double,
        LiteralValue::Int(_) => Type::Int,
        LiteralValue::Null => Type::Null,
        LiteralValue::String(_) => Type::String,
        LiteralValue::UInt(_) => Type::Uint,
    }
}

/// `a.b.c`, if an expression is no more than that. As `asQualifiedName`.
fn dotted(expr: &IdedExpr) -> Option<String> {
    match &expr.expr {
        Expr::Ident(name) => Some(name.clone()),
        Expr::Select(select) if !select.test => Some(format!("{}.{}", dotted(&select.operand)?, select.field)),
        _ => None,
    }
}
