//! What evaluating an expression may cost at most. As cel-go's `checker.Cost` and Kubernetes' `CostEstimator`, of which only
//! the upper ends are kept.

use super::types::Type;
use kube_cel::cel::common::ast::{CallExpr, EntryExpr, Expr, IdedExpr, LiteralValue};
use std::collections::HashMap;

const LIST: u64 = 10;
const MAP: u64 = 30;
const STRUCT: u64 = 40;
/// Of going over a text, a unit of it.
const TEXT: f64 = 0.1;
/// Of a pattern, a unit of it.
const PATTERN: f64 = 0.25;
/// Of a question to the authorizer.
const AUTHORIZATION: u64 = 350_000;
const DRIVER_MAX: u64 = 63;
const DOMAIN_MAX: u64 = 63;
const ID_MAX: u64 = 32;
const VALUE_MAX: u64 = 64;
const ATTRIBUTES_MAX: u64 = 32;

/// What of the variables an expression is, where that bounds its size.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Device,
    Attributes,
    OfDomain,
    Capacity,
    CapacityOfDomain,
    /// A value of at most so many units.
    Value(u64),
}

pub(super) struct Cost<'e> {
    types: &'e HashMap<u64, Type>,
    /// What macros gave names to: where it comes from, its size.
    bound: Vec<(&'e str, Option<Place>, Option<u64>)>,
    sizes: HashMap<u64, u64>,
}

/// So many units at so much each, rounded up.
fn times(size: u64, factor: f64) -> u64 {
    if size == u64::MAX { size } else { (size as f64 * factor).ceil() as u64 }
}

// === impl Place ===

impl Place {
    /// As `EstimateSize`.
    fn size(self) -> Option<u64> {
        match self {
            Self::Device => None,
            Self::Attributes | Self::OfDomain | Self::Capacity | Self::CapacityOfDomain => Some(ATTRIBUTES_MAX),
            Self::Value(most) => Some(most),
        }
    }

    fn field(self, name: &str) -> Option<Self> {
        match (self, name) {
            (Self::Device, "driver") => Some(Self::Value(DRIVER_MAX)),
            (Self::Device, "attributes") => Some(Self::Attributes),
            (Self::Device, "capacity") => Some(Self::Capacity),
            (Self::OfDomain, _) => Some(Self::Value(VALUE_MAX)),
            _ => None,
        }
    }

    fn value(self) -> Option<Self> {
        match self {
            Self::Attributes => Some(Self::OfDomain),
            Self::OfDomain => Some(Self::Value(VALUE_MAX)),
            Self::Capacity => Some(Self::CapacityOfDomain),
            _ => None,
        }
    }

    fn key(self) -> Option<Self> {
        match self {
            Self::Attributes | Self::Capacity => Some(Self::Value(DOMAIN_MAX)),
            Self::OfDomain | Self::CapacityOfDomain => Some(Self::Value(ID_MAX)),
            _ => None,
        }
    }
}

// === impl Cost ===

impl<'e> Cost<'e> {
    pub fn new(types: &'e HashMap<u64, Type>) -> Self {
        Self { types, bound: Vec::new(), sizes: HashMap::new() }
    }

    pub fn of(&mut self, expr: &'e IdedExpr) -> u64 {
        match &expr.expr {
            Expr::Unspecified | Expr::Literal(_) => 0,
            Expr::Ident(_) => 1,
            Expr::Select(select) => {
                let operand = self.of(&select.operand);
                let looks = matches!(
                    self.types.get(&select.operand.id),
                    Some(Type::Map(_) | Type::Struct(..) | Type::Api(_) | Type::Variables(_) | Type::Patch(_))
                );
                operand.saturating_add(u64::from(looks && !select.test))
            }
            Expr::Call(call) => self.call(expr, call),
            Expr::Comprehension(all) => {
                let mut sum = self.of(&all.iter_range).saturating_add(self.of(&all.accu_init));
                let before = self.bound.len();
                let accumulated = self.known_size(&all.accu_init);
                self.bound.push((&all.accu_var, None, accumulated));
                self.bind_range(&all.iter_range, &all.iter_var, all.iter_var2.as_deref());
                let step = self.of(&all.loop_cond).saturating_add(self.of(&all.loop_step));
                self.bound.truncate(before + 1);
                sum = sum.saturating_add(self.of(&all.result));
                self.bound.truncate(before);
                let count = self.size(&all.iter_range);
                match &all.accu_init.expr {
                    Expr::Literal(_) => _ = self.sizes.insert(expr.id, 1),
                    Expr::List(_) | Expr::Map(_) => _ = self.sizes.insert(expr.id, count),
                    _ => {}
                }
                sum.saturating_add(count.saturating_mul(step))
            }
            Expr::List(list) => self.sum(&list.elements).saturating_add(LIST),
            Expr::Map(map) => map.entries.iter().fold(MAP, |sum, entry| match &entry.expr {
                EntryExpr::MapEntry(entry) => {
                    sum.saturating_add(self.of(&entry.key)).saturating_add(self.of(&entry.value))
                }
                EntryExpr::StructField(field) => sum.saturating_add(self.of(&field.value)),
            }),
            Expr::Struct(made) => made.entries.iter().fold(STRUCT, |sum, entry| match &entry.expr {
                EntryExpr::StructField(field) => sum.saturating_add(self.of(&field.value)),
                EntryExpr::MapEntry(_) => sum,
            }),
        }
    }

    fn sum(&mut self, all: &'e [IdedExpr]) -> u64 {
        all.iter().fold(0, |sum: u64, expr| sum.saturating_add(self.of(expr)))
    }

    /// Names what a macro goes over, one by one.
    fn bind_range(&mut self, range: &'e IdedExpr, first: &'e str, second: Option<&'e str>) {
        let place = self.place(range);
        let (key, value) = (place.and_then(Place::key), place.and_then(Place::value));
        let items = if let Expr::List(list) = &range.expr {
            list.elements.iter().map(|item| self.known_size(item)).try_fold(0, |most, size| Some(size?.max(most)))
        } else {
            None
        };
        match (second, self.types.get(&range.id)) {
            (None, Some(Type::List(_))) => self.bound.push((first, value, items)),
            (None, _) => self.bound.push((first, key, None)),
            (Some(second), _) => self.bound.extend([(first, key, None), (second, value, items)]),
        }
    }

    fn call(&mut self, expr: &'e IdedExpr, call: &'e CallExpr) -> u64 {
        let (name, args, target) = (call.func_name.as_str(), call.args.as_slice(), call.target.as_deref());
        if let Some(cost) = target.and_then(|target| self.macro_call(expr, name, target, args)) {
            return cost;
        }
        let given = args.iter().map(|arg| self.of(arg)).collect::<Vec<u64>>();
        let on = target.map_or(0, |target| self.of(target));
        let sum = given.iter().fold(on, |sum, cost| sum.saturating_add(*cost));
        let sizes: Vec<u64> = target.into_iter().chain(args).map(|arg| self.size(arg)).collect();
        let size = |at: usize| sizes.get(at).copied().unwrap_or(u64::MAX);
        let kinds: Vec<Option<&Type>> = target.into_iter().chain(args).map(|arg| self.types.get(&arg.id)).collect();
        // Or it may be, for all that is known.
        let text = |kind: &Option<&Type>| {
            !matches!(
                kind,
                Some(
                    Type::Int
                        | Type::Uint
                        | Type::Double
                        | Type::Bool
                        | Type::Duration
                        | Type::Timestamp
                        | Type::List(_)
                )
            )
        };
        let (own, result) = match (name, sizes.len()) {
            ("_&&_" | "_||_", 2) => (0, None),
            ("_?_:_", 3) => {
                let branches = given.get(1).max(given.get(2)).copied().unwrap_or_default();
                self.sizes.insert(expr.id, size(1).max(size(2)));
                return given.first().copied().unwrap_or_default().saturating_add(branches);
            }
            ("dyn", 1) => (1, Some(size(0))),
            ("startsWith" | "endsWith", 2) => (times(size(1), TEXT), None),
            ("@in", 2) if !matches!(kinds.get(1), Some(Some(Type::Map(_)))) => (size(1), None),
            ("matches" | "find" | "findAll", 2..) => {
                let found = (name != "matches").then(|| size(0));
                (times(size(0).saturating_add(1), TEXT).saturating_mul(times(size(1), PATTERN)), found)
            }
            ("contains", 2) => (times(size(0), TEXT).saturating_mul(times(size(1), TEXT)), None),
            ("_+_", 2) => {
                let both = size(0).saturating_add(size(1));
                (if kinds.iter().all(text) { times(both, TEXT) } else { 1 }, Some(both))
            }
            ("_==_" | "_!=_", 2) => (times(size(0).min(size(1)), TEXT), None),
            ("_<_" | "_<=_" | "_>_" | "_>=_", 2) if kinds.iter().all(text) => (times(size(0).min(size(1)), TEXT), None),
            ("string", 1) if text(&kinds[0]) => (times(size(0), TEXT), Some(size(0))),
            ("bytes", 1) => (times(size(0), TEXT), Some(size(0).saturating_mul(4))),
            ("format", 2) if target.is_some() => (times(size(0), TEXT), Some(size(0).saturating_add(size(1)))),
            ("lowerAscii" | "upperAscii" | "substring" | "trim" | "url", _) => (times(size(0), TEXT), Some(size(0))),
            ("replace" | "split", _) => (times(size(0), 2.0 * TEXT), Some(size(0))),
            ("join", _) => (times(size(0).saturating_mul(VALUE_MAX), TEXT), Some(size(0).saturating_mul(VALUE_MAX))),
            ("isSorted" | "sum" | "max" | "min" | "indexOf" | "lastIndexOf", 1..) if target.is_some() => {
                (size(0), None)
            }
            ("check", _) if target.is_some() => (AUTHORIZATION, None),
            _ => (1, None),
        };
        if let Some(result) = result {
            self.sizes.insert(expr.id, result);
        }
        sum.saturating_add(own)
    }

    fn macro_call(
        &mut self,
        expr: &'e IdedExpr,
        name: &str,
        target: &'e IdedExpr,
        args: &'e [IdedExpr],
    ) -> Option<u64> {
        let name_of = |arg: &'e IdedExpr| if let Expr::Ident(name) = &arg.expr { Some(name.as_str()) } else { None };
        let (first, second) = (args.first().and_then(name_of), args.get(1).and_then(name_of));
        let before = self.bound.len();
        let cost = match (name, args) {
            ("bind", [_, value, then]) if matches!(&target.expr, Expr::Ident(cel) if cel == "cel") => {
                let sum = self.of(value).saturating_add(LIST);
                let (place, size) = (self.place(value), self.known_size(value));
                self.bound.push((first?, place, size));
                let sum = sum.saturating_add(self.of(then));
                if let Some(size) = self.known_size(then) {
                    self.sizes.insert(expr.id, size);
                }
                sum
            }
            ("optMap" | "optFlatMap", [_, then]) => {
                let sum = self.of(target).saturating_add(LIST);
                self.bound.push((first?, None, None));
                sum.saturating_add(self.of(then))
            }
            ("sortBy", [_, key]) => {
                let sum = self.of(target);
                self.bind_range(target, first?, None);
                sum.saturating_add(self.size(target).saturating_mul(self.of(key).saturating_add(LIST)))
            }
            (
                "all" | "exists" | "exists_one" | "existsOne" | "transformList" | "transformMap" | "transformMapEntry",
                [_, _, rest @ ..],
            ) if !rest.is_empty() => {
                let sum = self.of(target);
                self.bind_range(target, first?, second);
                let step = self.sum(rest).saturating_add(if name.starts_with("transform") { LIST } else { 3 });
                let count = self.size(target);
                self.sizes.insert(expr.id, if name.starts_with("transform") { count } else { 1 });
                sum.saturating_add(count.saturating_mul(step))
            }
            _ => return None,
        };
        self.bound.truncate(before);
        Some(cost)
    }

    fn local(&self, name: &str) -> Option<&(&'e str, Option<Place>, Option<u64>)> {
        self.bound.iter().rev().find(|(bound, ..)| *bound == name)
    }

    fn place(&self, expr: &IdedExpr) -> Option<Place> {
        match &expr.expr {
            Expr::Ident(name) => match self.local(name) {
                Some((_, place, _)) => *place,
                None => (name == "device").then_some(Place::Device),
            },
            Expr::Select(select) if !select.test => self.place(&select.operand)?.field(&select.field),
            Expr::Call(call) if call.func_name == "_[_]" => self.place(call.args.first()?)?.value(),
            _ => None,
        }
    }

    fn size(&self, expr: &IdedExpr) -> u64 {
        self.known_size(expr).unwrap_or(u64::MAX)
    }

    /// As `computeSize`.
    fn known_size(&self, expr: &IdedExpr) -> Option<u64> {
        if let Some(size) = self.sizes.get(&expr.id) {
            return Some(*size);
        }
        match &expr.expr {
            Expr::Literal(LiteralValue::String(text)) => return Some(text.inner().chars().count() as u64),
            Expr::Literal(LiteralValue::Bytes(bytes)) => return Some(bytes.inner().len() as u64),
            Expr::Literal(_) => return Some(1),
            Expr::List(list) => return Some(list.elements.len() as u64),
            Expr::Map(map) => return Some(map.entries.len() as u64),
            _ => {}
        }
        if let Some(size) = self.place(expr).and_then(Place::size) {
            return Some(size);
        }
        let kind = match self.types.get(&expr.id) {
            Some(Type::Optional(inner)) => Some(&**inner),
            other => other,
        };
        if matches!(kind, Some(Type::Bool | Type::Double | Type::Duration | Type::Int | Type::Timestamp | Type::Uint)) {
            return Some(1);
        }
        if let Expr::Ident(name) = &expr.expr { self.local(name).and_then(|(.., size)| *size) } else { None }
    }
}
